"""
What a 422 says of itself: the location and the type of each error, and nothing that a client sent.

A location may hold what a client made up: the name of a field that is not allowed, the key of a dictionary. Only names
that the endpoint declares are shown; anything else is ``*``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Final

_NAMES: Final = "_otel_correlation_names"
_ERRORS: Final = 16
_PARTS: Final = 12
_LENGTH: Final = 64
# Of a schema; a service's largest have some thousands.
_NODES: Final = 50_000

# Where FastAPI looks, and what pydantic puts for the key of a dictionary and for the result of a function.
_EVERYWHERE: Final = frozenset({"path", "query", "header", "cookie", "body", "response", "[key]", "return"})
_PARAMETERS: Final = ("path_params", "query_params", "header_params", "cookie_params", "body_params")


def describe(errors: Any, route: Any) -> tuple[str, ...]:
    """
    Return ``location: type`` of each error, such as ``body.items.0.price: int_parsing``; 16 at most.

    Args:
        errors: What pydantic's ``errors()`` gives.
        route: FastAPI's route, which declares the names; None where none is known.
    """
    known = _declared(route)
    found = list(errors)
    lines = [
        f"{_location(error.get('loc', ()), known)}: {str(error.get('type', ''))[:_LENGTH]}" for error in found[:_ERRORS]
    ]
    if len(found) > _ERRORS:
        lines.append(f"and {len(found) - _ERRORS} more")
    return tuple(lines)


def _location(location: Any, known: frozenset[str]) -> str:
    parts = [location] if isinstance(location, str | int) else list(location)
    shown = [_part(part, known) for part in parts[:_PARTS]]
    return ".".join([*shown, "..."] if len(parts) > _PARTS else shown)


def _part(part: object, known: frozenset[str]) -> str:
    if type(part) is int:
        return str(part)
    if isinstance(part, str):
        if part in known:
            return part[:_LENGTH]
        # What pydantic calls a member of a union: list[int], function-after[check(), str].
        head, bracket, _ = part.partition("[")
        if bracket and head in known:
            return head[:_LENGTH]
    return "*"


def _declared(route: Any) -> frozenset[str]:
    """
    Return every name that an endpoint declares for what it receives; kept on the route.
    """
    kept = getattr(route, _NAMES, None)
    if isinstance(kept, frozenset):
        return kept
    names = set(_EVERYWHERE)
    waiting = [getattr(route, "dependant", None)]
    schemas: list[Any] = []
    while waiting:
        dependant = waiting.pop()
        if dependant is None:
            continue
        waiting += getattr(dependant, "dependencies", ())
        for kind in _PARAMETERS:
            for field in getattr(dependant, kind, ()):
                spelled = [field.name, field.alias, getattr(field, "validation_alias", None)]
                names.update(name for name in spelled if isinstance(name, str))
                schemas.append(getattr(getattr(field, "_type_adapter", None), "core_schema", None))
    _collect(schemas, names)
    # FastAPI spells the fields of a model of headers with dashes.
    names |= {name.replace("_", "-") for name in names}
    known = frozenset(names)
    with contextlib.suppress(Exception):  # a route of somebody else's without room for it
        setattr(route, _NAMES, known)
    return known


def _collect(nodes: list[Any], names: set[str]) -> None:
    """
    Add the names of fields, the tags of unions and the kinds of types that stand in pydantic's schemas.
    """
    seen: set[int] = set()
    while nodes and len(seen) < _NODES:
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Mapping):
            for key in ("type", "name", "alias"):
                if isinstance(text := node.get(key), str):
                    names.add(text)
            if isinstance(kind := node.get("cls"), type):
                names.add(kind.__name__)
            _add(node.get("validation_alias"), names)
            for key in ("fields", "choices"):
                if isinstance(held := node.get(key), Mapping):
                    names.update(str(name) for name in held)
            # What a default or the metadata holds is no schema.
            nodes += [value for key, value in node.items() if key not in ("default", "metadata", "serialization")]
        elif isinstance(node, list | tuple):
            nodes += node


def _add(alias: object, names: set[str]) -> None:
    if isinstance(alias, str):
        names.add(alias)
    elif isinstance(alias, list | tuple):
        for part in alias:
            _add(part, names)
