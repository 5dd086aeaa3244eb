"""
The five fields, on every record that the process makes.

``logging.Logger.handle`` is where a record has left user code (so a field can no longer make ``extra=`` raise, as one
from a record factory does) and no filter, handler or queue has seen it yet. Fields must stand in ``record.__dict__``:
that is what all three format styles read.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import os
from typing import TYPE_CHECKING, Any, Final, Protocol

from opentelemetry.context import get_current

from otel_correlation import guard, identity, semconv
from otel_correlation.formats import FIELDS as _FIELDS
from otel_correlation.logs.presets import PLAIN, build
from otel_correlation.policy import hide_quoted, scrub
from otel_correlation.upstream.api import SPAN_KEY as _SPAN_KEY

if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import local

    from otel_correlation.logs.presets import Names
    from otel_correlation.settings import Settings

# What contrib's logging instrumentation puts on records (its own names, its own values for "none").
CONTRIB_FIELDS: Final = ("otelTraceID", "otelSpanID", "otelTraceSampled", "otelServiceName")
CORRELATION_ID: Final = "correlation_id"
# On a record that was exported, and on whatever copies it: a queue's handler, pickle, ``makeLogRecord``. Formatters
# take a name that begins with an underscore as private.
EXPORTED: Final = "_otel_correlation_exported"

# Module globals, because every record of the process passes here.
_IDENTITY: Final = identity._KEY
_SPAN: Final = _SPAN_KEY
_TRACE_ID: Final = semconv.TRACE_ID
_SPAN_ID: Final = semconv.SPAN_ID
_TRACE_FLAGS: Final = semconv.TRACE_FLAGS
_REQUEST_ID: Final = semconv.REQUEST_ID
_SERVICE_NAME: Final = semconv.SERVICE_NAME
FIELDS: Final = _FIELDS
_NO_TRACE: Final = ("", "", "")
_MEMO_SIZE: Final = 64
_ASGI_CORRELATION_ID: Final = "asgi_correlation_id"


class _Fields:
    """
    Puts the fields on one record; a value that is already there stays.
    """

    __slots__ = ("contrib", "correlation_id", "memo", "service_name")

    def __init__(self, settings: Settings) -> None:
        self.service_name = settings.service_name
        self.contrib = settings.log_correlation
        self.correlation_id = importlib.util.find_spec(_ASGI_CORRELATION_ID) is not None
        # Span -> its ids as text: most requests log more than once, and the text costs more than all the rest.
        self.memo: dict[object, tuple[str, str, str]] = {}

    def put(self, record: logging.LogRecord) -> None:
        context = get_current()
        found = context.get(_IDENTITY)
        span: Any = context.get(_SPAN)
        trace = _NO_TRACE if span is None else self.memo.get(span) or self._text(span)
        bound = None
        if isinstance(found, identity.Identity):
            request, bound = found.request_id, found.fields
        else:
            request = ""
            error = record.exc_info
            if error and trace is _NO_TRACE and type(error) is tuple:
                # uvicorn logs "Exception in ASGI application" when the request's context is gone.
                left = identity.stashed(error[1])
                if left is not None:
                    trace, request = left[:3], left[3]
        trace_id, span_id, flags = trace
        default = record.__dict__.setdefault
        default(_TRACE_ID, trace_id)
        default(_SPAN_ID, span_id)
        default(_TRACE_FLAGS, flags)
        default(_REQUEST_ID, request)
        default(_SERVICE_NAME, self.service_name)
        if bound:
            for name, value in bound.items():
                default(name, value)
        if self.contrib:
            default("otelTraceID", trace_id or "0")
            default("otelSpanID", span_id or "0")
            default("otelTraceSampled", bool(flags) and int(flags, 16) & 1 == 1)
            default("otelServiceName", self.service_name)
        if self.correlation_id:
            # That package's own filter puts None outside of a request.
            default(CORRELATION_ID, request or None)

    def now(self, error: BaseException | None = None) -> tuple[tuple[str, ...], dict[str, Any]]:
        """
        Return what ``put`` would put on a record: the five values and the bound fields, for loggers with no record.
        """
        context = get_current()
        found = context.get(_IDENTITY)
        span: Any = context.get(_SPAN)
        trace = _NO_TRACE if span is None else self.memo.get(span) or self._text(span)
        if isinstance(found, identity.Identity):
            return (*trace, found.request_id, self.service_name), found.fields
        if error is not None and trace is _NO_TRACE:
            left = identity.stashed(error)
            if left is not None:
                return (*left, self.service_name), {}
        return (*trace, "", self.service_name), {}

    def _text(self, span: Any) -> tuple[str, str, str]:
        span_context = span.get_span_context()
        if not span_context.trace_id:
            return _NO_TRACE
        text = (
            f"{span_context.trace_id:032x}",
            f"{span_context.span_id:016x}" if span_context.span_id else "",
            f"{span_context.trace_flags & 0xFF:02x}",
        )
        if len(self.memo) >= _MEMO_SIZE:
            self.memo.clear()
        self.memo[span] = text
        return text


class Exports(Protocol):
    """
    What sends records away.
    """

    def __call__(self, record: logging.LogRecord) -> None:
        """
        Take one record that a logger let through, before its handlers do.
        """

    def doubles(self, handler: logging.Handler) -> bool:
        """
        Return whether ``handler`` would send the same records to the same place.
        """
        ...

    def skip(self, record: logging.LogRecord) -> None:
        """
        Count ``record`` as sent: whoever made it from another logger's line has sent that line.
        """


class _Seams:
    """
    What is active now: the wrappers below stay pass-through while these are None.
    """

    __slots__ = ("added", "adopt", "export", "fields", "handling", "names", "route")

    def __init__(self) -> None:
        self.fields: _Fields | None = None
        self.export: Exports | None = None
        # Called instead of the logger's handlers; returns False to let them have the record.
        self.route: Callable[[logging.Logger, logging.LogRecord], bool] | None = None
        # Called when a logger got a handler.
        self.added: Callable[[logging.Logger, logging.Handler], None] | None = None
        # Called with a record that another logger's sink made, before it gets its fields.
        self.adopt: Callable[[logging.LogRecord], None] | None = None
        # Its ``record`` is what a handler of this thread is busy with; somebody wants to know.
        self.handling: local | None = None
        self.names: Names = PLAIN


seams: Final = _Seams()


def enrich(record: logging.LogRecord) -> None:
    """
    Put the fields on ``record`` if we are installed; never raises and never replaces a value.
    """
    fields = seams.fields
    if fields is None:
        return
    try:
        fields.put(record)
    except Exception:  # a log call must not fail in user code
        if os.environ.get(guard.STRICT_ENV):
            raise
        guard.count("internal_error.logs.fields")
        for name in FIELDS:
            record.__dict__.setdefault(name, "")


# In place of what a class does not have itself.
_INHERITED: Final = object()
# CPython's flags of a class: made by a class statement, and closed to changes all the same.
_HEAP_TYPE: Final = 1 << 9
_IMMUTABLE_TYPE: Final = 1 << 8


def _takes_methods(kind: type) -> bool:
    return kind.__flags__ & (_HEAP_TYPE | _IMMUTABLE_TYPE) == _HEAP_TYPE


class Patch:
    """
    One wrapped method, and what it wraps.

    Args:
        owner: The class. Where it inherits the method, because somebody put a subclass in the place of the one that we
            know (gevent's ``Thread``), the method of the class that has it is wrapped: objects of both are covered. A
            class of compiled code (under uvloop's loop) lets nobody do that; then it is wrapped in ``owner``.
        name: The method's name.
    """

    __slots__ = ("found", "name", "original", "ours", "owner", "placed")

    def __init__(self, owner: type, name: str) -> None:
        has_it = next(kind for kind in owner.__mro__ if name in kind.__dict__)
        self.owner = has_it if _takes_methods(has_it) else owner
        self.name = name
        self.original: Any = getattr(self.owner, name)
        # As it stands in the class, which is not what reading it there gives: a static method, a wrapt wrapper.
        self.found: Any = self.owner.__dict__.get(name, _INHERITED)
        self.ours: Any = None
        self.placed = False

    def place(self) -> None:
        """
        Put ours there.
        """
        # Still placed after an uninstall: somebody wrapped ours in turn, so it is called and must not wrap itself.
        if not self.placed:
            found = self.owner.__dict__.get(self.name, _INHERITED)
            if found is not self.ours:  # it is ours when whoever wrapped it has put it back since
                self.original, self.found = getattr(self.owner, self.name), found
                setattr(self.owner, self.name, self.ours)
            self.placed = True

    def remove(self) -> None:
        """
        Put back what was there, unless somebody has wrapped ours in turn.
        """
        if self.placed and self.owner.__dict__.get(self.name) is self.ours:
            if self.found is _INHERITED:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, self.found)
            self.placed = False


_logger_handle: Final = Patch(logging.Logger, "handle")
_call_handlers: Final = Patch(logging.Logger, "callHandlers")
_add_handler: Final = Patch(logging.Logger, "addHandler")
_handler_handle: Final = Patch(logging.Handler, "handle")
_format: Final = Patch(logging.Formatter, "format")
_format_exception: Final = Patch(logging.Formatter, "formatException")
_PATCHES: Final = (_logger_handle, _call_handlers, _add_handler, _handler_handle, _format, _format_exception)

_LEFT: Final = ("message", "asctime", "exc_text")
# The rarest of the five in user code: a record that has it was seen by us.
_SEEN: Final = _TRACE_FLAGS


def _our_logger_handle(self: logging.Logger, record: logging.LogRecord) -> None:  # pragma: no cover
    enrich(record)
    _logger_handle.original(self, record)


def _our_call_handlers(self: logging.Logger, record: logging.LogRecord) -> None:  # pragma: no cover
    if _SEEN not in record.__dict__:  # a Logger subclass with a handle() of its own
        enrich(record)
    export = seams.export
    if export is not None:
        export(record)
    route = seams.route
    if route is None or not route(self, record):
        _call_handlers.original(self, record)


def _our_add_handler(self: logging.Logger, hdlr: logging.Handler) -> None:  # pragma: no cover
    _add_handler.original(self, hdlr)
    added = seams.added
    if added is not None:
        added(self, hdlr)


def _our_handler_handle(self: logging.Handler, record: logging.LogRecord) -> Any:  # pragma: no cover
    if _SEEN not in record.__dict__:  # made by hand and given to a handler
        adopt = seams.adopt
        if adopt is not None:
            adopt(record)
        enrich(record)
    export = seams.export
    if export is not None and export.doubles(self):
        return False
    handling = seams.handling
    if handling is None:
        return _handler_handle.original(self, record)
    before = getattr(handling, "record", None)
    handling.record = record
    try:
        return _handler_handle.original(self, record)
    finally:
        handling.record = before


def _our_format(self: logging.Formatter, record: logging.LogRecord) -> Any:  # pragma: no cover
    if _SEEN not in record.__dict__:  # made by hand and given to handler.emit()
        enrich(record)
    if seams.fields is not None and may_quote(record):
        shown = _clean(record)
        if shown is not record:
            text = _format.original(self, shown)
            # What formatting leaves on a record; a subclass may look at it afterwards.
            for name in _LEFT:
                if name in shown.__dict__:
                    record.__dict__[name] = shown.__dict__[name]
            return text
    return _format.original(self, record)


def _our_format_exception(self: logging.Formatter, ei: Any) -> Any:  # pragma: no cover
    text = _format_exception.original(self, ei)
    if seams.fields is None or not isinstance(text, str):
        return text
    with guard.never_raise("logs.scrub"):
        return scrub(text)
    return "(a traceback whose values could not be hidden)"


def is_warning(record: logging.LogRecord) -> bool:
    """
    Tell whether a record is a warning or worse.
    """
    level = record.levelno
    # None on a record that was made by hand.
    return type(level) is int and level >= logging.WARNING


def may_quote(record: logging.LogRecord) -> bool:
    """
    Tell whether a message may hold an exception's text: it is a warning or worse, is one, or has one as an argument.
    """
    # By the type: isinstance() may ask an object's own __class__, which is code of the user's.
    if is_warning(record) or issubclass(type(record.msg), BaseException):
        return True
    arguments: Any = record.args
    if type(arguments) is dict:
        arguments = tuple(arguments.values())
    if type(arguments) is tuple:
        for argument in arguments:
            if issubclass(type(argument), BaseException):
                return True
    return False


def _clean(record: logging.LogRecord) -> logging.LogRecord:
    """
    Return the record without what an exception's text in its message quotes of a user; the record itself stays.
    """
    # A dict is structlog's; what begins with a brace was rendered, and whoever did that looked at its exceptions.
    kind = type(record.msg)
    if not issubclass(kind, str | BaseException) or (issubclass(kind, str) and record.msg[:1] == "{"):
        return record
    try:
        message = record.getMessage()
        shown = hide_quoted(message)
    except Exception:  # noqa: BLE001 - arguments that do not fit: logging tells of them in its own way
        return record
    if shown != message:
        record = copy.copy(record)
        record.msg, record.args = shown, ()
    return record


def _wrap(patch: Patch, ours: Any) -> None:
    patch.ours = functools.update_wrapper(ours, patch.original)
    # Handlers look for the caller by walking up until a frame is not of this file (loguru's recipe for intercepting
    # logging does): ours are frames of logging to them, and to coverage, which cannot see them.
    ours.__code__ = ours.__code__.replace(co_filename=logging.__file__)


_wrap(_logger_handle, _our_logger_handle)
_wrap(_call_handlers, _our_call_handlers)
_wrap(_add_handler, _our_add_handler)
_wrap(_handler_handle, _our_handler_handle)
_wrap(_format, _our_format)
_wrap(_format_exception, _our_format_exception)


def install(settings: Settings) -> None:
    """
    Put the fields on every record from now on; a second call changes only the settings.
    """
    seams.fields = _Fields(settings)
    seams.names = build(settings)
    for patch in _PATCHES:
        patch.place()


def uninstall() -> None:
    """
    Leave ``logging`` as it was found; a wrapper that somebody wrapped in turn stays and does nothing.
    """
    seams.fields = seams.export = seams.route = seams.added = None
    seams.names = PLAIN
    for patch in _PATCHES:
        patch.remove()
