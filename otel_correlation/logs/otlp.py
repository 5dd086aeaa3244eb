"""
Records over OTLP: every logger's, uvicorn's included, none twice, and never what the export itself logs.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from types import NoneType
from typing import TYPE_CHECKING, Any, Final

from opentelemetry._logs import LogRecord, get_logger_provider
from opentelemetry.context import Context, get_current
from opentelemetry.semconv.attributes import code_attributes, exception_attributes
from opentelemetry.trace import SpanContext, TraceFlags, get_current_span

from otel_correlation import guard, identity, semconv
from otel_correlation.export import in_export
from otel_correlation.logs import lines
from otel_correlation.logs.record import EXPORTED, is_warning, may_quote, seams
from otel_correlation.policy import CUT, DEFAULT, bounds_for, class_name, hide_quoted, scrubbed, text_of
from otel_correlation.upstream.api import SUPPRESS_INSTRUMENTATION as _SUPPRESS_INSTRUMENTATION_KEY
from otel_correlation.upstream.sdk import BoundedAttributes
from otel_correlation.upstream.sdk_logs import ProxyLoggerProvider, ReadWriteLogRecord, SdkLogger, std_to_otel

if TYPE_CHECKING:
    import logging

    from opentelemetry._logs import Logger, LoggerProvider

    from otel_correlation.policy import Bounds
    from otel_correlation.settings import Settings

# What the export says about itself must not be exported: each failed batch would feed the next one.
_NEVER: Final = "opentelemetry"
_LOGGERS: Final = 1024
# The longest name of an attribute.
_NAME: Final = 256
# What is left of each text of a list or dict whose texts are too long together.
_SHORTEST: Final = 64
# Of one value: how many it holds, and how deep. The encoding ends there, too.
_NODES: Final = 16_384
_DEPTH: Final = 30
_INT64: Final = 1 << 63
# What is sent as it is in place of a text, as OpenTelemetry's own handler does.
_STRUCTURED: Final = (int, float, bytes, NoneType, Mapping, Sequence)
# Logs data model, "Displaying Severity".
_SEVERITY_TEXT: Final = {"WARNING": "WARN", "CRITICAL": "FATAL"}
_NO_CONTEXT: Final = Context()


class Export:
    """
    Turns one record into one OpenTelemetry log record; never raises.
    """

    def __init__(self, provider: LoggerProvider, settings: Settings) -> None:
        self._provider = provider
        self._only_sampled = settings.logs_export == "sampled"
        self._query_values = settings.query_values
        self._busy = threading.local()
        # With the bounds of its values, and how many attributes a record may have; None is any number.
        self._loggers: dict[str, tuple[Logger, Bounds, int | None]] = {}

    def __call__(self, record: logging.LogRecord) -> None:
        """
        Emit ``record`` unless it, or what it is a copy of, was emitted before, or comes from the export itself.
        """
        found = record.__dict__
        if EXPORTED in found:
            return
        # Never by a record's values: at a frozen instant, or with somebody else's times, different records are equal.
        found[EXPORTED] = True
        busy = self._busy.__dict__
        if busy or in_export():  # made while this thread emits or exports another record
            return
        busy["now"] = True
        try:
            self._emit(record)
        except Exception:  # a log call must not fail in user code
            if os.environ.get(guard.STRICT_ENV):
                raise
            guard.count("internal_error.logs.export")
        finally:
            busy.clear()

    def doubles(self, handler: logging.Handler) -> bool:
        """
        Return whether ``handler`` is OpenTelemetry's own, on our provider: contrib's logging instrumentation adds one.
        """
        if not type(handler).__module__.startswith("opentelemetry."):
            return False
        provider = getattr(handler, "_logger_provider", None)
        if isinstance(provider, ProxyLoggerProvider):
            provider = get_logger_provider()
        return provider is self._provider

    def skip(self, record: logging.LogRecord) -> None:
        """
        Count ``record`` as emitted.
        """
        record.__dict__[EXPORTED] = True

    def _emit(self, record: logging.LogRecord) -> None:
        context = get_current()
        if record.name.partition(".")[0] == _NEVER:
            return
        # Exporters of others mark their threads with this key; user code inside of a request may set it, too.
        if context.get(_SUPPRESS_INSTRUMENTATION_KEY) and identity.get_from(context) is None:
            return
        ids = _ids(record)
        if self._only_sampled and _is_unsampled(ids or get_current_span(context).get_span_context()):
            return
        found = self._loggers.get(record.name)
        if found is None:
            made = self._provider.get_logger(record.name)
            limits = made._log_record_limits if type(made) is SdkLogger else None
            length = limits.max_log_record_attribute_length if limits is not None else None
            found = made, bounds_for(length), limits.max_log_record_attributes if limits is not None else None
            if len(self._loggers) < _LOGGERS:
                self._loggers[record.name] = found
        logger, bounds, room = found
        level = record.levelname
        out = LogRecord(
            timestamp=int(record.created * 1e9),
            observed_timestamp=time.time_ns(),
            context=context,
            severity_number=std_to_otel(record.levelno),
            severity_text=_SEVERITY_TEXT.get(level, level),
            body=_body(record, self._query_values, bounds),
            attributes=_attributes(record, bounds, room),
        )
        if ids is not None:
            # The record's own: those of the request that made it, or the ones left on its exception.
            out.trace_id, out.span_id, out.trace_flags = ids[0], ids[1], TraceFlags(ids[2])
        if type(logger) is SdkLogger:
            if logger._is_enabled():
                logger._multi_log_record_processor.on_emit(_writable(logger, out))
        else:
            logger.emit(out)
        # The record waits in a queue; the context would keep the request, and all that the application put there.
        out.context = _NO_CONTEXT


def _writable(logger: SdkLogger, out: LogRecord) -> ReadWriteLogRecord:
    """
    Return what ``Logger.emit`` hands to processors, without checking again what ``_attributes`` made within its limits.

    Its copy into ``BoundedAttributes`` is most of what a record costs.
    """
    made = ReadWriteLogRecord.__new__(ReadWriteLogRecord)
    made.log_record = out
    made.resource = logger._resource
    made.instrumentation_scope = logger._instrumentation_scope
    made.limits = logger._log_record_limits
    return made


def _is_unsampled(ids: tuple[int, int, int] | SpanContext) -> bool:
    trace_id, flags = (ids.trace_id, ids.trace_flags) if isinstance(ids, SpanContext) else (ids[0], ids[2])
    return trace_id != 0 and not flags & TraceFlags.SAMPLED


def _ids(record: logging.LogRecord) -> tuple[int, int, int] | None:
    """
    Return the ids on ``record`` as numbers, or None where they are not (or not only) ours.
    """
    found = record.__dict__
    trace_id, span_id, flags = found.get(semconv.TRACE_ID), found.get(semconv.SPAN_ID), found.get(semconv.TRACE_FLAGS)
    if not (isinstance(trace_id, str) and isinstance(span_id, str) and isinstance(flags, str)):
        return None
    if len(trace_id) != 32 or len(span_id) not in (0, 16) or len(flags) != 2:
        return None
    try:
        return int(trace_id, 16), int(span_id or "0", 16), int(flags, 16)
    except ValueError:
        return None


def _body(record: logging.LogRecord, query_values: str, bounds: Bounds) -> Any:
    message = record.msg
    kind = type(message)
    # By the type: isinstance() may ask an object's own __class__, which is code of the user's.
    if (
        kind is not str
        and not record.args
        and issubclass(kind, _STRUCTURED)
        and not issubclass(kind, str)
        and lines.event_of(record) is None
    ):
        return _Value(bounds, bounds.body, hides=may_quote(record)).of(message)
    return _utf8(lines.message_of(record, query_values, bounds.body, bounds))


def _attributes(record: logging.LogRecord, bounds: Bounds, room: int | None) -> Mapping[str, Any]:
    """
    Return the attributes of ``record``, at most ``room`` of them: what is left out are the last of its extras.
    """
    found = record.__dict__
    attributes: dict[str, Any] = {}
    request = found.get(semconv.REQUEST_ID)
    if request:
        attributes[semconv.REQUEST_ID] = _value(request, bounds)
    trace_id = found.get(semconv.TRACE_ID)
    if trace_id and not (isinstance(trace_id, str) and len(trace_id) == 32):
        attributes[semconv.TRACE_ID] = _value(trace_id, bounds)  # the user's own
    if record.lineno:
        attributes[code_attributes.CODE_FILE_PATH] = _value(record.pathname, bounds)
        attributes[code_attributes.CODE_LINE_NUMBER] = record.lineno
        if record.funcName:
            attributes[code_attributes.CODE_FUNCTION_NAME] = _value(record.funcName, bounds)
    exc_info = lines.exc_info_of(record)
    if exc_info is not None:
        kind, error, _ = exc_info
        attributes[exception_attributes.EXCEPTION_TYPE] = _value(class_name(kind), bounds)
        attributes[exception_attributes.EXCEPTION_MESSAGE] = _utf8(scrubbed(text_of(error), bounds.message, bounds))
        attributes[exception_attributes.EXCEPTION_STACKTRACE] = _utf8(lines.exception_text(exc_info, bounds))
    elif text := lines.record_exception(record, bounds):
        attributes[exception_attributes.EXCEPTION_STACKTRACE] = _utf8(text)
    shown = seams.names.id_keys
    hides = is_warning(record)
    dropped = 0
    for name, value in lines.extras_of(record, bounds.value, bounds).items():
        # structlog and loguru have the ids under the preset's names; what is said above is not said by others.
        if not name or name in shown or name in attributes:
            continue
        if room is not None and len(attributes) >= room:
            dropped += 1
            continue
        attributes[_utf8(name if len(name) <= _NAME else bounds.cut(name, _NAME))] = _value(value, bounds, hides=hides)
    if dropped or (room is not None and len(attributes) > room):
        return _within(attributes, room or 0, dropped)
    return attributes


def _within(attributes: dict[str, Any], room: int, dropped: int) -> Mapping[str, Any]:
    """
    Return the first ``room`` attributes in what tells OTLP how many are missing, the ``dropped`` that are gone too.
    """
    dropped += max(len(attributes) - room, 0)
    guard.count("log_attributes_dropped", dropped)
    held = BoundedAttributes(attributes=dict(islice(attributes.items(), room)), immutable=False)
    held.dropped = dropped
    return held


def _utf8(text: str) -> str:
    """
    Return ``text`` without lone surrogates: one would make the encoding of its whole batch fail.
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()
    return text


def _value(value: object, bounds: Bounds, *, hides: bool = False) -> Any:
    kind = type(value)
    if kind is str:
        return _utf8(value if len(value) <= bounds.value else bounds.cut(value, bounds.value))  # type: ignore[arg-type]
    if kind is int and -_INT64 <= value < _INT64:  # type: ignore[operator] # it is an int
        return value
    if kind is bool or kind is float:
        return value
    return _Value(bounds, bounds.value, hides=hides).of(value)


class _Value:
    """
    What OTLP can carry of one value: scalars, bytes, lists and dicts with texts for keys; anything else is its text.

    Args:
        bounds: How texts are cut.
        limit: The longest text. All texts together may have as many characters, or the default's where that is more.
        hides: Whether texts lose what they quote of a user; those of exceptions always do.
    """

    __slots__ = ("_bounds", "_characters", "_hides", "_limit", "_nodes")

    def __init__(self, bounds: Bounds, limit: int, *, hides: bool) -> None:
        self._bounds = bounds
        self._limit = limit
        self._characters = max(limit, DEFAULT.value)
        self._nodes = _NODES
        self._hides = hides

    def of(self, value: Any, depth: int = _DEPTH) -> Any:
        kind = type(value)
        if value is None or kind is bool or kind is float:
            return value
        # By the type, as above.
        if issubclass(kind, str):
            return self._text(str.__str__(value))
        if issubclass(kind, int):
            number = int.__int__(value)
            return number if -_INT64 <= number < _INT64 else self._text(lines.text_of(number))
        if issubclass(kind, float):
            return float.__float__(value)
        if issubclass(kind, bytes):
            return self._raw(bytes(value))
        is_mapping = issubclass(kind, Mapping)
        if not is_mapping and not issubclass(kind, Sequence):
            return self._text(lines.field_text(value))
        if depth <= 0:
            return f"<{kind.__qualname__} too deep>"
        try:
            return self._mapping(value, depth - 1) if is_mapping else self._sequence(value, depth - 1)
        except Exception:  # noqa: BLE001 - changed by another thread meanwhile, or a strange class of the user's
            return f"<{kind.__qualname__}>"

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        pairs = list(islice(value.items(), self._nodes + 1))
        made = {}
        for name, item in pairs[: self._take(len(pairs))]:
            made[self._text(lines.text_of(name))] = self.of(item, depth)
        if len(made) < len(pairs) and self._nodes <= 0:
            made[f"{CUT}{len(value)} items]"] = None
        return made

    def _sequence(self, value: Sequence[Any], depth: int) -> list[Any]:
        items = list(islice(value, self._nodes + 1))
        made = [self.of(item, depth) for item in items[: self._take(len(items))]]
        if len(made) < len(items):
            made.append(f"{CUT}{len(value)} items]")
        return made

    def _take(self, count: int) -> int:
        taken = min(count, self._nodes)
        self._nodes -= taken
        return taken

    def _text(self, text: str) -> str:
        kept = self._keep(len(text))
        shown = text if len(text) <= kept else self._bounds.cut(text, kept)
        if self._hides and len(shown) >= lines.SHORTEST_QUOTE:
            shown = hide_quoted(shown)
        return _utf8(shown)

    def _raw(self, raw: bytes) -> bytes:
        shown = raw[: self._keep(len(raw))]
        if self._hides and len(shown) >= lines.SHORTEST_QUOTE:
            text = shown.decode("latin-1")
            if (hidden := hide_quoted(text)) != text:
                return hidden.encode("latin-1", "replace")
        return shown

    def _keep(self, length: int) -> int:
        kept = min(self._limit, max(self._characters, _SHORTEST))
        self._characters -= length
        return kept
