"""
Values that OpenTelemetry's packages raise on: which they are, and how they are kept from that code and nobody else.

The API reads OTEL_PROPAGATORS while ``opentelemetry.propagate`` is imported and raises on a wrong one; the SDK raises
on a wrong limit and prints a traceback for an unknown resource detector. The environment itself stays as the user set
it: a process that the service starts may be no Python, and know a propagator that is not installed here. See ADR 006.
"""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

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
    "OTEL_LOGRECORD_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_LOGRECORD_ATTRIBUTE_VALUE_LENGTH_LIMIT",
    "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT",
    "OTEL_SPAN_EVENT_COUNT_LIMIT",
    "OTEL_SPAN_LINK_COUNT_LIMIT",
)

# What is read while a module is imported; the module keeps what it found.
_READERS: Final = {
    "OTEL_PROPAGATORS": "opentelemetry.propagate",
    "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "opentelemetry.sdk.trace",
    "OTEL_EXPERIMENTAL_RESOURCE_DETECTORS": "opentelemetry.sdk._logs",
}


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
    from otel_correlation.upstream.metadata import entry_points  # noqa: PLC0415 - rarely needed

    return bool(entry_points(group=group, name=name))


def replacements(environ: Mapping[str, str]) -> dict[str, str | None]:
    """
    Return what stands in for each value that OpenTelemetry's packages raise on; None where the variable has to go.
    """
    found: dict[str, str | None] = {}
    for variable in LISTS:
        value = environ.get(variable, "")
        names = [name.strip() for name in value.split(",")]
        good = [name for name in names if name and _is_installed(variable, name)]
        # An empty value, too: the API looks for a propagator without a name.
        if variable in environ and good != names:
            found[variable] = ",".join(good) or None
    for name in LIMITS:
        if not is_limit(environ.get(name, "")):
            found[name] = None
    return found


@contextmanager
def shielded() -> Generator[dict[str, str]]:
    """
    Keep wrong values from code that raises on them; afterwards ``os.environ`` is as it was.

    Gives the values that are hidden, by name. Keep the block short: a process that another thread starts meanwhile
    inherits what stands in.
    """
    before: dict[str, str] = {}
    for name, value in replacements(os.environ).items():
        before[name] = os.environ[name]
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    try:
        yield before
    finally:
        os.environ.update(before)


def load_readers() -> None:
    """
    Import the modules that raise on what the environment says while they are imported, so that they do not.

    Nothing is imported where they would not raise.
    """
    with shielded() as hidden:
        for name, module in _READERS.items():
            if name in hidden:
                # One that does not fit at all fails where it is used, too, and there somebody says so.
                with suppress(Exception):
                    import_module(module)
