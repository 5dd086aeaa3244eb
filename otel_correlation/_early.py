"""
Values that stop the start before any distribution is asked: taken out of the environment when the interpreter starts.

The API reads OTEL_PROPAGATORS, and the SDK its limits, while they are imported, and raise on a wrong value (of a
resource detector the SDK prints a traceback); under ``opentelemetry-instrument`` that happens before our distro is
loaded. ``otel_correlation.pth`` imports this module,
only where one of these variables is set. The originals travel in one variable, so that the process which serves can
say what was wrong. See ADR 006.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

# Comma lists of entry points: their group, and the names that need no look.
LISTS: Final = {
    "OTEL_PROPAGATORS": ("opentelemetry_propagator", frozenset({"tracecontext", "baggage", "none", "xrequestid"})),
    "OTEL_EXPERIMENTAL_RESOURCE_DETECTORS": (
        "opentelemetry_resource_detector",
        frozenset({"otel", "process", "os", "host", "service_instance", "*"}),
    ),
}
LIMITS: Final = (
    "OTEL_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT",
    "OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_LINK_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT",
    "OTEL_SPAN_EVENT_COUNT_LIMIT",
    "OTEL_SPAN_LINK_COUNT_LIMIT",
)
# Not a setting: how one process tells the next what it replaced.
_REPLACED: Final = "_OTEL_CORRELATION_REPLACED"


def is_limit(value: str) -> bool:
    """
    Tell whether the SDK takes this value of a limit: empty, ``unset`` or a whole number.
    """
    text = value.strip().lower()
    return text in ("", "unset") or (text.isascii() and text.isdigit())


def _is_installed(variable: str, name: str) -> bool:
    group, known = LISTS[variable]
    if name in known:
        return True
    from importlib.metadata import entry_points  # noqa: PLC0415 - costs milliseconds and is rarely needed

    return bool(entry_points(group=group, name=name))


def replace(environ: MutableMapping[str, str]) -> None:
    """
    Take wrong values out of ``environ`` and remember them there.
    """
    wrong: dict[str, tuple[str, str]] = {}
    for variable in LISTS:
        value = environ.get(variable, "")
        names = [name.strip() for name in value.split(",")]
        good = [name for name in names if name and _is_installed(variable, name)]
        # An empty value, too: the API looks for a propagator without a name.
        if variable in environ and good != names:
            wrong[variable] = value, ",".join(good)
            if good:
                environ[variable] = ",".join(good)
            else:
                del environ[variable]
    for name in LIMITS:
        if name in environ and not is_limit(environ[name]):
            wrong[name] = environ.pop(name), ""
    if wrong:
        environ[_REPLACED] = json.dumps({**_remembered(environ), **wrong})


def _remembered(environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """
    Return what was replaced, and by what, as far as it still stands there: a child may have values of its own.
    """
    try:
        found = json.loads(environ.get(_REPLACED, "{}"))
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    pairs = {name: tuple(pair) for name, pair in found.items() if isinstance(pair, list) and len(pair) == 2}
    return {
        name: pair
        for name, pair in pairs.items()
        if isinstance(pair[0], str) and isinstance(pair[1], str) and environ.get(name, "") == pair[1]
    }


def originals(environ: Mapping[str, str]) -> dict[str, str]:
    """
    Return ``environ`` as the user set it.
    """
    return {**environ, **{name: value for name, (value, _) in _remembered(environ).items()}}


replace(os.environ)
