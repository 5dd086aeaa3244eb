"""
How a record looks: one JSON object or one readable line, and nothing that a caller sent can end the line (CWE-117).
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from otel_correlation import semconv
from otel_correlation.logs.record import (
    CONTRIB_FIELDS,
    CORRELATION_ID,
    EXPORTED,
    FIELDS,
    is_warning,
    may_quote,
    seams,
)
from otel_correlation.policy import (
    CUT,
    DEFAULT,
    LINE_FIELD,
    LINE_MESSAGE,
    LINES,
    class_name,
    hide_quoted,
    redact_query,
    scrubbed,
    scrubbed_stack,
    stack_of,
)

if TYPE_CHECKING:
    from types import TracebackType

    from otel_correlation.logs.presets import Names
    from otel_correlation.policy import Bounds

# What logging itself puts on a record (taskName from Python 3.12 on), and what uvicorn adds for its own formatter.
_OWN: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}
_NOT_EXTRA: Final = _OWN.union(FIELDS, CONTRIB_FIELDS, (CORRELATION_ID, EXPORTED))

# C0, DEL, C1 (TAB, ESC, CR, LF, NEL), the line and paragraph separators, the marks that reorder text on a screen, and
# lone surrogates, which cannot be written as UTF-8.
_UNSAFE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}

# The loggers whose lines hold the path and the query of a request.
_SERVER_LOGGERS: Final = frozenset({"uvicorn.access", "uvicorn.error"})

# The logger of the one line per request.
SUMMARY_LOGGER: Final = "otel_correlation.request"
# Its message says these already.
_IN_SUMMARY: Final = ("method", "route", "status", "duration_ms")

_NOT_ASCII: Final = re.compile("[^\x00-\x7f]+")

# No text that quotes anything is shorter; most fields are.
SHORTEST_QUOTE: Final = 16

_DEPTH: Final = 8
_ITEMS: Final = 256
# Of all lists and dicts of a value: those of a cycle hold each other many times over.
_NODES: Final = 16_384


def exception_text(
    exc_info: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    bounds: Bounds = LINES,
) -> str:
    """
    Return the traceback of ``exc_info`` as every output shows it; never raises.
    """
    kind, error, trace = exc_info
    if kind is None or error is None:
        return ""
    try:
        return stack_of(error, trace, bounds).rstrip("\n")
    except Exception:  # noqa: BLE001 - an exception whose own text raises
        return f"{kind.__module__}.{kind.__qualname__} (its text could not be made)"


def message_of(
    record: logging.LogRecord, query_values: str = "sensitive", limit: int = LINE_MESSAGE, bounds: Bounds = LINES
) -> str:
    """
    Return the message of ``record``; arguments that do not fit it are shown beside it instead of raising.

    Args:
        record: The record.
        query_values: Which query values stay in uvicorn's lines about requests, as in ``Settings.query_values``.
        limit: How many characters are kept.
        bounds: How the rest is cut.
    """
    event = event_of(record)
    if event is not None:
        return bounds.cut(text_of(next((event[name] for name in _EVENT_TEXT if name in event), "")), limit)
    try:
        if record.name in _SERVER_LOGGERS and isinstance(record.args, tuple) and record.args:
            message = str(record.msg) % tuple(_without_values(argument, query_values) for argument in record.args)
            return message if len(message) <= limit else bounds.cut(message, limit)
        message = record.getMessage()
    except Exception as error:  # noqa: BLE001 - user's __str__, or a template that its arguments do not fit
        template, arguments = bounds.cut(text_of(record.msg), limit // 2), bounds.cut(text_of(record.args), limit // 2)
        return f"{template} (arguments {arguments} do not fit: {type(error).__name__})"
    # It is cut before anybody looks for what it quotes.
    if len(message) > limit:
        message = bounds.cut(message, limit)
    return hide_quoted(message) if may_quote(record) else message


def _without_values(argument: object, query_values: str) -> object:
    if not isinstance(argument, str) or "?" not in argument:
        return argument
    path, _, query = argument.partition("?")
    cut = len(query) - DEFAULT.query
    shown = redact_query(query if cut <= 0 else query[: DEFAULT.query], query_values)
    return f"{path}?{shown}" if cut <= 0 else f"{path}?{shown}{CUT}{len(query)} characters]"


def record_exception(record: logging.LogRecord, bounds: Bounds = LINES) -> str:
    """
    Return the traceback that belongs to ``record``, or an empty text.
    """
    exc_info = exc_info_of(record)
    if exc_info is not None:
        return exception_text(exc_info, bounds)
    event = event_of(record)
    if event is not None and isinstance(event.get("exception"), str):
        return scrubbed_stack(event["exception"], bounds)
    # A record that went through a queue or a socket has only the text.
    return scrubbed_stack(record.exc_text, bounds) if record.exc_text else ""


def extras_of(record: logging.LogRecord, limit: int = LINE_FIELD, bounds: Bounds = LINES) -> dict[str, Any]:
    """
    Return what ``extra`` and ``bind`` put on ``record``, in their order.

    Args:
        record: The record.
        limit: How many characters are searched for what they quote, and kept then.
        bounds: How the rest is cut.
    """
    found = {str(name): value for name, value in list(record.__dict__.items()) if name not in _NOT_EXTRA}
    if "_name" in found and (event := event_of(record)) is not None:
        del found["_name"], found["_logger"]
        found |= {str(name): value for name, value in event.items() if name not in _NOT_EVENT}
        if isinstance(event.get("exception"), list):  # structlog's dict_tracebacks
            found["exception"] = event["exception"]
    nested = found.get("extra")
    if isinstance(nested, dict) and seams.names.keys[semconv.TRACE_FLAGS] in nested:  # loguru's sink for handlers
        del found["extra"]
        ours = seams.names.id_keys.union(seams.names.tags)
        found = {str(name): value for name, value in nested.items() if name not in ours} | found
    if found and is_warning(record):
        for name, value in found.items():
            if isinstance(value, str) and len(value) >= SHORTEST_QUOTE:
                found[name] = hide_quoted(value if len(value) <= limit else bounds.cut(value, limit))
    return found


# What structlog's wrap_for_formatter leaves on a record, beside the event in place of its message.
_WRAPPED: Final = ("_name", "_logger")
_EVENT_TEXT: Final = ("event", "message", "msg")
_NOT_EVENT: Final = frozenset(
    {*_EVENT_TEXT, *FIELDS, "exc_info", "exception", "stack_info", "level", "logger", "timestamp", "_record"}
    | {"_from_structlog"}
)


def event_of(record: logging.LogRecord) -> dict[str, Any] | None:
    """
    Return structlog's event where ``record`` carries one for its ``ProcessorFormatter``, else None.
    """
    event = record.msg
    if type(event) is dict and all(name in record.__dict__ for name in _WRAPPED):
        return event
    return None


def exc_info_of(
    record: logging.LogRecord,
) -> tuple[type[BaseException], BaseException, TracebackType | None] | None:
    """
    Return the exception of ``record``, or None.
    """
    if isinstance(record.exc_info, tuple):
        return record.exc_info if record.exc_info[0] is not None else None
    event = event_of(record)
    return None if event is None else resolved(event.get("exc_info"))


def resolved(given: object) -> tuple[type[BaseException], BaseException, TracebackType | None] | None:
    """
    Return what ``exc_info=`` may be given as a tuple, or None where it names no exception.
    """
    if isinstance(given, BaseException):
        return type(given), given, given.__traceback__
    found: Any = given if isinstance(given, tuple) else sys.exc_info() if given else None
    return found if found is not None and len(found) == 3 and isinstance(found[1], BaseException) else None


def text_of(value: object) -> str:
    """
    Return ``str(value)``, or what can be said when that raises.
    """
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - user's __str__
        try:
            return repr(value)
        except Exception:  # noqa: BLE001 - user's __repr__
            return f"<{type(value).__qualname__} without text>"


def field_text(value: object) -> str:
    """
    Return the text of a field's value; that of an exception, or of what holds one, is without what a user sent.
    """
    text = text_of(value)
    return text if len(text) < SHORTEST_QUOTE or isinstance(value, str) else scrubbed(text, LINE_FIELD, LINES)


def plain(value: object, depth: int = _DEPTH, left: list[int] | None = None) -> Any:
    """
    Return ``value`` as str, bool, int, float, None, lists and dicts of them: finite, bounded and without cycles.

    Numbers that JSON or OTLP cannot carry (NaN, infinities, more than 64 bits) become text.
    """
    kind = type(value)
    if kind is str or kind is bool or value is None:
        return value
    if kind is int:
        return value if -(1 << 63) <= value < (1 << 63) else text_of(value)  # type: ignore[operator]
    if kind is float:
        return value if value - value == 0.0 else text_of(value)  # type: ignore[operator]
    left = [_NODES] if left is None else left
    if depth > 0 and left[0] > 0:
        try:
            if isinstance(value, dict):
                pairs = list(islice(value.items(), _ITEMS))
                left[0] -= len(pairs)
                return {text_of(key): plain(item, depth - 1, left) for key, item in pairs}
            if isinstance(value, list | tuple | set | frozenset):
                items = list(islice(value, _ITEMS))
                left[0] -= len(items)
                return [plain(item, depth - 1, left) for item in items]
        except Exception:  # noqa: BLE001 - changed by another thread meanwhile, or a strange subclass
            return f"<{kind.__qualname__}>"
    if isinstance(value, dict | list | tuple | set | frozenset):
        return f"<{kind.__qualname__} too deep>" if depth <= 0 else f"<{kind.__qualname__} too large>"
    return field_text(value)


class _Clock:
    """
    Times of records as text; the part before the milliseconds is made once a second.
    """

    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last = (-1, "", "")

    def utc(self, created: float) -> str:
        seconds, text, _ = self._at(created)
        return f"{text}.{int((created - seconds) * 1000):03d}Z"

    def local(self, created: float) -> str:
        seconds, _, text = self._at(created)
        return f"{text}.{int((created - seconds) * 1000):03d}"

    def _at(self, created: float) -> tuple[int, str, str]:
        last = self.last
        seconds = int(created // 1)
        if last[0] != seconds:
            utc = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
            self.last = last = (seconds, utc, time.strftime("%H:%M:%S", time.localtime(seconds)))
        return last


_encode: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=field_text).encode


class JsonLines(logging.Formatter):
    """
    One JSON object on one line (RFC 8259), fields in a fixed order, empty ones left out.

    An application that configures logging itself can name it: ``"()": "otel_correlation.logs.JsonLines"``.

    Args:
        query_values: Which query values stay in uvicorn's lines about requests, as in ``Settings.query_values``.
        names: What fields are called; what the settings say if None.
    """

    def __init__(self, query_values: str = "sensitive", names: Names | None = None) -> None:
        super().__init__()
        self._query_values = query_values
        self._names = names
        self._clock = _Clock()

    def format(self, record: logging.LogRecord) -> str:
        """
        Return the line of ``record``; never raises.
        """
        found = record.__dict__
        names = self._names or seams.names
        keys = names.keys
        line: dict[str, Any] = {
            keys["timestamp"]: self._clock.utc(record.created),
            keys["level"]: record.levelname if names.level is None else names.level(record),
        }
        if names.head:  # ECS wants the message third
            line[keys["message"]] = message_of(record, self._query_values)
            line |= names.head
            line[keys["logger"]] = record.name
        else:
            line[keys["logger"]] = record.name
            line[keys["message"]] = message_of(record, self._query_values)
        for name, key, write in names.ids:
            value = found.get(name)
            if value is not None and value != "":
                line[key] = value if write is None or type(value) is not str else write(value)
        if names.tags:
            line |= names.tags
        extras = extras_of(record)
        if extras:
            if names.summary is not None and record.name == SUMMARY_LOGGER:
                extras = names.summary(extras, record)
            last = (keys["exception"], keys["stack"])
            for name, value in extras.items():
                key = name
                # One that has the shown name of an id is the user's own and wins, as it does on the record.
                while (key in line and key not in names.id_keys) or key in last:
                    key = "extra." + key
                line[key] = (
                    value if type(value) is not str or len(value) <= LINE_FIELD else LINES.cut(value, LINE_FIELD)
                )
        error = record_exception(record)
        if error:
            exc_info = None if names.error is None else exc_info_of(record)
            if names.error is not None and exc_info is not None:
                kind, text = names.error
                line[kind] = class_name(exc_info[0])
                line[text] = scrubbed(text_of(exc_info[1]), LINES.message, LINES)
            line[keys["exception"]] = error
        if record.stack_info:
            line[keys["stack"]] = record.stack_info
        try:
            text = _encode(line)
        except Exception:  # noqa: BLE001 - a cycle, NaN, a key that is no text, a number of 5000 digits
            text = _encode({name: plain(value) for name, value in line.items()})
        # json has escaped everything below U+0020; what else could end a line or change the screen follows.
        return text if text.isascii() and "\x7f" not in text else _UNSAFE.sub(_json_escape, text)


def _json_escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def _text_escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return _SHORT.get(found[0]) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def ascii_only(line: str) -> str:
    """
    Return ``line`` with everything that is not ASCII escaped as in JSON, for an output that cannot carry it.
    """
    return _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], line)


def one_line(text: str) -> str:
    """
    Return ``text`` with everything escaped that could end a line, move a cursor or reorder what a screen shows.
    """
    return _UNSAFE.sub(_text_escape, text)


_COLOURS: Final = {"DEBUG": "36", "INFO": "32", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}


class TextLines(logging.Formatter):
    """
    One readable line; a traceback follows it, each of its lines behind a bar so that none can pass for a record.
    """

    def __init__(self, query_values: str = "sensitive", *, colours: bool = False) -> None:
        super().__init__()
        self._query_values = query_values
        self._colours = colours
        self._clock = _Clock()

    def format(self, record: logging.LogRecord) -> str:
        """
        Return the line of ``record`` (and its traceback); never raises.
        """
        found = record.__dict__
        level = f"{one_line(record.levelname):<8}"
        request, trace = found.get(semconv.REQUEST_ID), found.get(semconv.TRACE_ID)
        # A minted request id is the trace id.
        shown = {semconv.REQUEST_ID: request, semconv.TRACE_ID: None if trace == request else trace}
        shown |= extras_of(record)
        if record.name == SUMMARY_LOGGER:
            for field in _IN_SUMMARY:
                shown.pop(field, None)
        fields = [f"{name}={_quoted(value)}" for name, value in shown.items() if value is not None and value != ""]
        time_text = self._clock.local(record.created)
        name = one_line(record.name)
        tail = one_line(" ".join(fields))
        if self._colours:
            level = f"\x1b[{_COLOURS.get(record.levelname, '0')}m{level}\x1b[0m"
            time_text = f"\x1b[2m{time_text}\x1b[0m"
            name = f"\x1b[2m{name}\x1b[0m"
            tail = f"\x1b[2m{tail}\x1b[0m" if tail else ""
        line = f"{time_text} {level} {name}  {one_line(message_of(record, self._query_values).rstrip())}"
        if tail:
            line += "  " + tail
        for block in (record_exception(record), record.stack_info):
            if block:
                line += "".join("\n  | " + one_line(part) for part in block.split("\n"))
        return line


def _quoted(value: object) -> str:
    text = (
        ", ".join(value)
        if value and type(value) is list and all(type(part) is str for part in value)
        else field_text(value)
    )
    if len(text) > LINE_FIELD:
        text = LINES.cut(text, LINE_FIELD)
    return repr(text) if " " in text else text
