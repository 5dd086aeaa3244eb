"""
How a platform wants the fields of a line to be called and written. Sources of the names stand in ``semconv``.
"""

from __future__ import annotations

import os
import re
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from otel_correlation import semconv
from otel_correlation.formats import FIELDS
from otel_correlation.settings import Settings, renamed

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Mapping, Sequence

_HEX: Final = re.compile("[0-9a-f]{16}(?:[0-9a-f]{16})?")
# The version whose field names are used; every ECS event must have one (elastic.co/docs/reference/ecs/ecs-ecs).
_ECS_VERSION: Final = "8.11.0"
# LogSeverity (docs.cloud.google.com/logging/docs/reference/v2/rest/v2/LogEntry).
_SEVERITIES: Final = frozenset({"DEBUG", "INFO", "NOTICE", "WARNING", "ERROR", "CRITICAL", "ALERT", "EMERGENCY"})


class Names:
    """
    What the fields of a line are called, and how their values are written.

    Attributes:
        keys: Our name of a field to the one that is shown.
        ids: The five fields as (our name, shown name, how a value is written or None).
        id_keys: The shown names of the five.
        level: Returns how a record's level is shown.
        error: The shown names of an exception's type and message, or None where only its traceback is shown.
        head: Fields of every line of ours.
        tags: Fields of every line, structlog's and loguru's included.
        summary: Turns the fields of a request's summary line into the platform's.
        is_plain: Whether the five are called and written as they are on records.
    """

    __slots__ = ("error", "head", "id_keys", "ids", "is_plain", "keys", "level", "summary", "tags")

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        preset = settings.log_preset
        self.keys, _ = renamed(preset, settings.log_fields)
        write: dict[str, Callable[[str], Any]] = {}
        self.level: Callable[[logging.LogRecord], str] | None = None
        self.error: tuple[str, str] | None = None
        self.head: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.summary: Callable[[dict[str, Any], logging.LogRecord], dict[str, Any]] | None = None
        if preset == "ecs":
            self.level, self.summary = _lower, _ecs_summary
            self.error = ("error.type", "error.message")
            self.head = {"ecs.version": _ECS_VERSION}
        elif preset == "gcp":
            self.level, self.summary = _severity, _gcp_summary
            project = environ.get("GOOGLE_CLOUD_PROJECT", "").strip()
            if project:
                # The short form is the id alone, and is right inside of the log's own project.
                write[semconv.TRACE_ID] = f"projects/{project}/traces/{{}}".format
            write[semconv.TRACE_FLAGS] = _is_sampled
        elif preset == "datadog":
            self.level, self.summary = _lower, _datadog_summary
            self.error = ("error.kind", "error.message")
            write[semconv.TRACE_ID] = write[semconv.SPAN_ID] = _decimal
            self.tags = _datadog_tags(environ)
        self.ids = tuple((name, self.keys[name], write.get(name)) for name in FIELDS)
        self.id_keys = frozenset(key for _, key, _ in self.ids)
        self.is_plain = self.id_keys == frozenset(FIELDS) and not write and not self.tags

    def named(self, values: Sequence[str]) -> dict[str, Any]:
        """
        Return the five values under their shown names; empty ones are left out.
        """
        if self.is_plain:
            return {name: value for name, value in zip(FIELDS, values, strict=True) if value}
        return {key: value for key, value in self.all(values) if value != ""}

    def all(self, values: Sequence[str]) -> list[tuple[str, Any]]:
        """
        Return the five values under their shown names, empty ones too.
        """
        found: list[tuple[str, Any]] = [
            (key, write(value) if value and write is not None else value)
            for (_, key, write), value in zip(self.ids, values, strict=True)
        ]
        return [*found, *self.tags.items()]


def _lower(record: logging.LogRecord) -> str:
    return record.levelname.lower()


def _severity(record: logging.LogRecord) -> str:
    name, level = record.levelname, record.levelno
    if name in _SEVERITIES:
        return name
    steps = ((50, "CRITICAL"), (40, "ERROR"), (30, "WARNING"), (20, "INFO"))
    return next((severity for least, severity in steps if level >= least), "DEBUG")


def _is_sampled(flags: str) -> bool:
    # Odd: the lowest bit of the last digit.
    return flags[-1:] in "13579bdf"


def _decimal(value: str) -> str:
    """
    Return the low 64 bits of an id as Datadog writes them; a value that is no id stays.
    """
    return str(int(value[-16:], 16)) if _HEX.fullmatch(value) else value


def _datadog_tags(environ: Mapping[str, str]) -> dict[str, str]:
    """
    Return ``dd.env`` and ``dd.version``, as far as the environment says them.
    """
    resource: dict[str, str] = {}
    for pair in environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(","):
        key, _, value = pair.partition("=")
        resource[key.strip()] = unquote(value.strip())
    env = environ.get("DD_ENV") or resource.get("deployment.environment.name") or resource.get("deployment.environment")
    version = environ.get("DD_VERSION") or resource.get("service.version")
    return {key: value for key, value in (("dd.env", env), ("dd.version", version)) if value}


def _moved(
    names: Mapping[str, str], duration: str, fields: dict[str, Any], _record: logging.LogRecord
) -> dict[str, Any]:
    moved = {names.get(name, name): value for name, value in fields.items()}
    milliseconds = moved.pop("duration_ms", None)
    if isinstance(milliseconds, int | float):
        moved[duration] = round(milliseconds * 1e6)  # nanoseconds, on both platforms
    return moved


_ecs_summary: Final = partial(
    _moved,
    {
        "method": "http.request.method",
        "route": "http.route",
        "status": "http.response.status_code",
        "error_type": "error.type",
    },
    "event.duration",
)
_datadog_summary: Final = partial(
    _moved,
    {"method": "http.method", "route": "http.route", "status": "http.status_code", "error_type": "error.kind"},
    "duration",
)


def _gcp_summary(fields: dict[str, Any], record: logging.LogRecord) -> dict[str, Any]:
    """
    Return the fields with ``httpRequest`` (LogEntry.HttpRequest) in place of method, status and duration.
    """
    rest = dict(fields)
    request: dict[str, Any] = {"requestMethod": rest.pop("method", "")}
    if isinstance(record.args, tuple) and len(record.args) > 1:
        request["requestUrl"] = record.args[1]
    request["status"] = rest.pop("status", 0)
    milliseconds = rest.pop("duration_ms", None)
    if isinstance(milliseconds, int | float):
        request["latency"] = f"{milliseconds / 1e3:.6f}s"
    return {"httpRequest": request, **rest}


def build(settings: Settings, environ: Mapping[str, str] | None = None) -> Names:
    """
    Return the names that ``settings`` ask for.

    Args:
        settings: The settings.
        environ: Where ``GOOGLE_CLOUD_PROJECT``, ``DD_ENV`` and ``DD_VERSION`` are looked up; ``os.environ`` if None.
    """
    return Names(settings, os.environ if environ is None else environ)


PLAIN: Final = build(Settings(), {})
