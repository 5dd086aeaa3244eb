"""
Values that stop the start before any distribution is asked: taken out of the environment when the interpreter starts.

The API reads OTEL_PROPAGATORS, and the SDK its limits, while they are imported, and raise on a wrong value; under
``opentelemetry-instrument`` that happens before our distro is loaded. ``otel_correlation.pth`` imports this module,
only where one of these variables is set. The originals travel in one variable, so that the process which serves can
say what was wrong. See ADR 006.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

PROPAGATORS: Final = "OTEL_PROPAGATORS"
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
_KNOWN: Final = frozenset({"tracecontext", "baggage", "none", "xrequestid"})


def is_limit(value: str) -> bool:
    """
    Tell whether the SDK takes this value of a limit: empty, ``unset`` or a whole number.
    """
    text = value.strip().lower()
    return text in ("", "unset") or (text.isascii() and text.isdigit())


def _is_installed(name: str) -> bool:
    if name in _KNOWN:
        return True
    from importlib.metadata import entry_points  # noqa: PLC0415 - costs milliseconds and is rarely needed

    return bool(entry_points(group="opentelemetry_propagator", name=name))


def replace(environ: MutableMapping[str, str]) -> None:
    """
    Take wrong values out of ``environ`` and remember them there.
    """
    wrong: dict[str, str] = {}
    value = environ.get(PROPAGATORS, "")
    names = [name.strip() for name in value.split(",")]
    good = [name for name in names if name and _is_installed(name)]
    # An empty value, too: the API looks for a propagator without a name.
    if PROPAGATORS in environ and good != names:
        wrong[PROPAGATORS] = value
        if good:
            environ[PROPAGATORS] = ",".join(good)
        else:
            del environ[PROPAGATORS]
    for name in LIMITS:
        if name in environ and not is_limit(environ[name]):
            wrong[name] = environ.pop(name)
    if wrong:
        environ[_REPLACED] = json.dumps({**_remembered(environ), **wrong})


def _remembered(environ: Mapping[str, str]) -> dict[str, str]:
    try:
        found = json.loads(environ.get(_REPLACED, "{}"))
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, str)}


def originals(environ: Mapping[str, str]) -> dict[str, str]:
    """
    Return ``environ`` as the user set it.
    """
    return {**environ, **_remembered(environ)}


replace(os.environ)
