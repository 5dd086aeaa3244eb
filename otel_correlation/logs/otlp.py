"""
Records over OTLP: every logger's, uvicorn's included, none twice, and never what the export itself logs.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from opentelemetry._logs import LogRecord, get_logger_provider
from opentelemetry.context import Context, get_current
from opentelemetry.semconv.attributes import code_attributes, exception_attributes
from opentelemetry.trace import SpanContext, TraceFlags, get_current_span

from otel_correlation import guard, identity, semconv
from otel_correlation.export import in_export
from otel_correlation.logs import lines
from otel_correlation.logs.record import FIELDS, seams
from otel_correlation.policy import bounds_for, class_name, scrubbed, text_of
from otel_correlation.upstream.api import SUPPRESS_INSTRUMENTATION as _SUPPRESS_INSTRUMENTATION_KEY
from otel_correlation.upstream.sdk_logs import ProxyLoggerProvider, ReadWriteLogRecord, SdkLogger, std_to_otel

if TYPE_CHECKING:
    import logging

    from opentelemetry._logs import Logger, LoggerProvider

    from otel_correlation.policy import Bounds
    from otel_correlation.settings import Settings

# What the export says about itself must not be exported: each failed batch would feed the next one.
_NEVER: Final = "opentelemetry"
_RECENT: Final = 1024
_LOGGERS: Final = 1024
# Of the SDK's 128; more would make it warn with every record.
_ATTRIBUTES: Final = 100
# The longest name of one.
_NAME: Final = 256
# What is left of each text of a list or dict whose texts are too long together.
_SHORTEST: Final = 64
_INT64: Final = 1 << 63
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
        self._loggers: dict[str, tuple[Logger, Bounds]] = {}
        self._recent: set[tuple[Any, ...]] = set()
        self._order: deque[tuple[Any, ...]] = deque()

    def __call__(self, record: logging.LogRecord) -> None:
        """
        Emit ``record`` unless it was emitted before, or comes from the export itself.
        """
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
        self._seen(record)

    def _emit(self, record: logging.LogRecord) -> None:
        context = get_current()
        if record.name.partition(".")[0] == _NEVER:
            return
        # Exporters of others mark their threads with this key; user code inside of a request may set it, too.
        if context.get(_SUPPRESS_INSTRUMENTATION_KEY) and identity.get_from(context) is None:
            return
        if self._seen(record):
            return
        ids = _ids(record)
        if self._only_sampled and _is_unsampled(ids or get_current_span(context).get_span_context()):
            return
        found = self._loggers.get(record.name)
        if found is None:
            made = self._provider.get_logger(record.name)
            limits = made._log_record_limits.max_log_record_attribute_length if type(made) is SdkLogger else None
            found = made, bounds_for(limits)
            if len(self._loggers) < _LOGGERS:
                self._loggers[record.name] = found
        logger, bounds = found
        out = LogRecord(
            timestamp=int(record.created * 1e9),
            observed_timestamp=time.time_ns(),
            context=context,
            severity_number=std_to_otel(record.levelno),
            severity_text=record.levelname,
            body=_utf8(lines.message_of(record, self._query_values, bounds.body, bounds)),
            attributes=_attributes(record, bounds),
        )
        if ids is not None:
            # The record's own: those of the request that made it, or the ones left on its exception.
            out.trace_id, out.span_id, out.trace_flags = ids[0], ids[1], TraceFlags(ids[2])
        if type(logger) is SdkLogger and _is_within(logger, out):
            if logger._is_enabled():
                logger._multi_log_record_processor.on_emit(_writable(logger, out))
        else:
            logger.emit(out)
        # The record waits in a queue; the context would keep the request, and all that the application put there.
        out.context = _NO_CONTEXT

    def _seen(self, record: logging.LogRecord) -> bool:
        """
        Return whether this record, or one that a queue or a socket copied, was emitted before.
        """
        if record.process is not None and record.process != os.getpid():
            # Unpickled from another process: one that is correlated exports its own records.
            return all(name in record.__dict__ for name in FIELDS)
        key = (record.created, record.thread, record.name, record.lineno, record.relativeCreated)
        if key in self._recent:
            return True
        self._recent.add(key)
        self._order.append(key)
        if len(self._order) > _RECENT:
            self._recent.discard(self._order.popleft())
        return False


def _is_within(logger: SdkLogger, out: LogRecord) -> bool:
    limits = logger._log_record_limits
    count = limits.max_log_record_attributes
    return limits.max_log_record_attribute_length is None and (count is None or count >= len(out.attributes or ()))


def _writable(logger: SdkLogger, out: LogRecord) -> ReadWriteLogRecord:
    """
    Return what ``Logger.emit`` hands to processors, without checking again what ``_attributes`` made.

    Its copy into ``BoundedAttributes`` is most of what a record costs, and matters only where a limit is reached.
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


def _attributes(record: logging.LogRecord, bounds: Bounds) -> dict[str, Any]:
    found = record.__dict__
    attributes: dict[str, Any] = {}
    request = found.get(semconv.REQUEST_ID)
    if request:
        attributes[semconv.REQUEST_ID] = _value(request, bounds)
    shown = seams.names.id_keys
    for name, value in lines.extras_of(record, bounds.value, bounds).items():
        if name in shown:  # structlog and loguru have the ids under the preset's names
            continue
        if len(attributes) >= _ATTRIBUTES:
            guard.count("log_attributes_dropped")
            break
        if name and value is not None:
            attributes[_utf8(name if len(name) <= _NAME else bounds.cut(name, _NAME))] = _value(value, bounds)
    trace_id = found.get(semconv.TRACE_ID)
    if trace_id and not (isinstance(trace_id, str) and len(trace_id) == 32):
        attributes[semconv.TRACE_ID] = _value(trace_id, bounds)  # the user's own
    if record.lineno:
        attributes[code_attributes.CODE_FILE_PATH] = _utf8(record.pathname)
        attributes[code_attributes.CODE_LINE_NUMBER] = record.lineno
        if record.funcName:
            attributes[code_attributes.CODE_FUNCTION_NAME] = _utf8(record.funcName)
    exc_info = lines.exc_info_of(record)
    if exc_info is not None:
        kind, error, _ = exc_info
        attributes[exception_attributes.EXCEPTION_TYPE] = class_name(kind)
        attributes[exception_attributes.EXCEPTION_MESSAGE] = _utf8(scrubbed(text_of(error), bounds.message, bounds))
        attributes[exception_attributes.EXCEPTION_STACKTRACE] = _utf8(lines.exception_text(exc_info, bounds))
    elif text := lines.record_exception(record, bounds):
        attributes[exception_attributes.EXCEPTION_STACKTRACE] = _utf8(text)
    return attributes


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


def _value(value: object, bounds: Bounds) -> Any:
    kind = type(value)
    if kind is str:
        return _utf8(value if len(value) <= bounds.value else bounds.cut(value, bounds.value))  # type: ignore[arg-type]
    if kind is int and -_INT64 <= value < _INT64:  # type: ignore[operator] # it is an int
        return value
    if kind is bool or kind is float:
        return lines.plain(value)
    return _within(lines.plain(value), bounds, [bounds.value])


def _within(value: Any, bounds: Bounds, left: list[int]) -> Any:
    """
    Return ``value`` with its texts cut, where all of them together may have ``left[0]`` characters.
    """
    if isinstance(value, str):
        kept = max(left[0], min(_SHORTEST, bounds.value))
        left[0] -= len(value)
        return _utf8(value if len(value) <= kept else bounds.cut(value, kept))
    if isinstance(value, dict):
        return {_within(name, bounds, left): _within(item, bounds, left) for name, item in value.items()}
    if isinstance(value, list):
        return [_within(item, bounds, left) for item in value]
    return value
