"""
loguru: the ids in every record's ``extra``, beside the user's own patcher, and tracebacks without what a user sent.

loguru asks its core for a patcher with every line, after ``bind``, ``contextualize`` and the line's own arguments have
made ``extra``. We stand there as a descriptor of the core's class; ``configure(patcher=...)`` sets the user's as ever.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import threading
from typing import Any, Final

from otel_correlation import guard, semconv
from otel_correlation.formats import FIELDS
from otel_correlation.logs import foreign
from otel_correlation.logs.lines import text_of
from otel_correlation.logs.record import Patch, seams
from otel_correlation.policy import hide_quoted, scrub

_core: Final[Any] = importlib.import_module("loguru._logger").Core
_handler: Final[Any] = importlib.import_module("loguru._handler").Handler
_exceptions: Final[Any] = importlib.import_module("loguru._better_exceptions").ExceptionFormatter

_PATCHER: Final = "patcher"
_EXTRA: Final = "extra"
_PENDING: Final = 256

# Lines whose patcher has run, by identity, until the first sink gets them: only then are they what the user made them.
_pending: Final[dict[int, None]] = {}


class Extra(dict[str, Any]):
    """
    ``extra`` where a preset renamed the ids: format strings that say ``{extra[request_id]}`` still find them.
    """

    plain: dict[str, str]

    def __missing__(self, name: str) -> Any:
        """
        Return the value under its name without a preset.
        """
        return self.plain[name]


def _failed() -> None:
    if os.environ.get(guard.STRICT_ENV):
        raise  # noqa: PLE0704 - called from an except block only
    guard.count("internal_error.logs.loguru")


def _within() -> logging.LogRecord | None:
    """
    Return the record of ``logging`` that a handler of this thread hands to loguru, or None.
    """
    found = getattr(seams.handling, "record", None)
    return found if isinstance(found, logging.LogRecord) else None


def _put(core: Any, users: Any, record: dict[str, Any]) -> None:
    """
    The patcher: the ids, then the user's.
    """
    try:
        _add(core, record)
    except Exception:  # noqa: BLE001 - a log call must not fail in user code
        _failed()
    if users is not None:
        users(record)


def _add(core: Any, record: dict[str, Any]) -> None:
    fields = seams.fields
    if fields is None:
        return
    names = seams.names
    exception = record["exception"]
    values, bound = fields.now(exception.value if exception is not None else None)
    source = _within()
    if source is not None and not values[0] and not values[3]:
        # An intercepted line behind a queue, or of a server: its record has the ids.
        values = tuple(text_of(source.__dict__.get(name, "")) for name in FIELDS)
    extra: dict[str, Any] = record[_EXTRA]
    if record["level"].no >= logging.WARNING:
        shown = hide_quoted(record["message"])
        if shown != record["message"]:
            record["message"] = shown
        foreign.hide(extra)
    if not names.is_plain:
        made = Extra(extra)
        made.plain = dict(zip(FIELDS, values, strict=True))
        record[_EXTRA] = extra = made
    defaults = core.extra
    for name, value in zip(FIELDS, values, strict=True) if names.is_plain else names.all(values):
        # What configure(extra=...) says is what lines have that nobody gave a value: so it gives way to one.
        if name not in extra or (value and name in defaults and extra[name] is defaults[name]):
            extra[name] = value
    for name, value in bound.items():
        if name not in extra:
            extra[name] = value
    if seams.export is not None and source is None:
        if len(_pending) >= _PENDING:  # left by patchers that raised
            _pending.clear()
        _pending[id(record)] = None


class _Patcher:
    """
    ``Core.patcher``: what loguru reads is ours and the user's in turn, what it sets is the user's.
    """

    __slots__ = ("_last",)

    def __init__(self) -> None:
        # It is read twice for a line, and there is one core.
        self._last = functools.partial(_put, None, None)

    def __get__(self, core: Any, owner: Any = None) -> Any:
        if core is None:
            return self
        users = core.__dict__.get(_PATCHER)
        if seams.fields is None:
            return users
        last = self._last
        if last.args[0] is not core or last.args[1] is not users:
            self._last = last = functools.partial(_put, core, users)
        return last

    def __set__(self, core: Any, users: Any) -> None:
        # Somebody may set what was read.
        while isinstance(users, functools.partial) and users.func is _put:
            users = users.args[1]
        core.__dict__[_PATCHER] = users


def _emit_patch() -> Patch:
    patch = Patch(_handler, "emit")

    def emit(self: Any, record: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if _pending and id(record) in _pending:
            _pending.pop(id(record), None)
            try:
                _send(record)
            except Exception:  # noqa: BLE001 - a log call must not fail in user code
                _failed()
        return patch.original(self, record, *args, **kwargs)

    patch.ours = functools.update_wrapper(emit, patch.original)
    return patch


def _send(record: dict[str, Any]) -> None:
    exception = record["exception"]
    error = None if exception is None or exception.value is None else tuple(exception)
    made = logging.LogRecord(
        record["name"] or "loguru",
        record["level"].no,
        record["file"].path,
        record["line"],
        record["message"],
        None,
        error,
        record["function"],
    )
    made.levelname = record["level"].name
    made.__dict__[_EXTRA] = record[_EXTRA]
    _adopt_ids(made)
    foreign.send(made, record["time"].timestamp())


def _adopt_ids(record: logging.LogRecord) -> bool:
    """
    Give ``record``, made of a line of loguru's, the ids of that line; return whether it is one.
    """
    extra = record.__dict__.get(_EXTRA)
    keys = seams.names.keys
    if not isinstance(extra, dict) or keys[semconv.TRACE_FLAGS] not in extra:
        return False
    plain = extra.plain if isinstance(extra, Extra) else extra
    for name in FIELDS:
        value = plain.get(name)
        if isinstance(value, str):
            record.__dict__.setdefault(name, value)
    return True


def _adopt(record: logging.LogRecord) -> None:
    """
    Take over a record that loguru's sink for handlers made: its line has the ids, and was exported.
    """
    try:
        export = seams.export
        if _adopt_ids(record) and export is not None:
            export.skip(record)
    except Exception:  # noqa: BLE001 - a log call must not fail in user code
        _failed()


def _format_exception_patch() -> Patch:
    patch = Patch(_exceptions, "format_exception")

    def format_exception(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = patch.original(self, *args, **kwargs)
        return made if seams.fields is None else [scrub("".join(made))]

    patch.ours = functools.update_wrapper(format_exception, patch.original)
    return patch


def _serialize_patch() -> Patch:
    patch = Patch(_handler, "_serialize_record")

    def serialize_record(text: str, record: dict[str, Any]) -> Any:
        exception = record["exception"]
        if exception is not None and exception.value is not None and seams.fields is not None:
            shown = text_of(exception.value)
            clean = scrub(shown)
            if clean != shown:
                record = {**record, "exception": exception._replace(value=clean)}
        return patch.original(text, record)

    patch.ours = staticmethod(functools.update_wrapper(serialize_record, patch.original))
    return patch


_PATCHES: Final = (_emit_patch(), _format_exception_patch(), _serialize_patch())


def install() -> None:
    """
    Add the ids to every line from now on; twice is once.
    """
    if not isinstance(_core.__dict__.get(_PATCHER), _Patcher):
        setattr(_core, _PATCHER, _Patcher())
    for patch in _PATCHES:
        patch.place()
    seams.adopt = _adopt
    if seams.handling is None:
        seams.handling = threading.local()


def uninstall() -> None:
    """
    Leave loguru as it was found.
    """
    seams.adopt = seams.handling = None
    if isinstance(_core.__dict__.get(_PATCHER), _Patcher):
        delattr(_core, _PATCHER)
    for patch in _PATCHES:
        patch.remove()
    _pending.clear()


if seams.fields is not None:  # imported by the application before its library, while we are active
    install()
