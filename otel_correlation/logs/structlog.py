"""
structlog: the ids on every event, whatever its processors, its logger and the time of its configuration.

The seam is ``BoundLoggerBase._process_event``: every bound logger runs its processors there, cached and bound ones
that are older than us included. Our step comes just before the renderer, so that it sees what all the user's processors
made of the event, and nothing of the user's configuration is changed.
"""

from __future__ import annotations

import builtins
import functools
import logging
import os
import threading
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final

import structlog
from structlog._base import BoundLoggerBase
from structlog.stdlib import ProcessorFormatter, render_to_log_kwargs

from otel_correlation import guard
from otel_correlation.formats import FIELDS
from otel_correlation.logs import foreign, lines
from otel_correlation.logs.record import EXPORTED, Patch, seams

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping, Sequence

_EXCEPTION: Final = "exception"
_EXC_INFO: Final = "exc_info"
_RENDERERS: Final = (
    structlog.processors.JSONRenderer,
    structlog.processors.KeyValueRenderer,
    structlog.processors.LogfmtRenderer,
    structlog.dev.ConsoleRenderer,
)
# What these hand to logging becomes ``extra``, and the record has its ids from us.
_TO_RECORDS: Final = tuple(
    found
    for found in (render_to_log_kwargs, getattr(structlog.stdlib, "render_to_log_args_and_kwargs", None))
    if found is not None
)
# Tests compare what these keep with what they expect.
_CAPTURES: Final = ("structlog.testing", "pytest_structlog")
# Loggers that write by themselves; of all others it is not known whether they end in logging.
_WRITERS: Final = tuple(
    getattr(structlog, name) for name in ("PrintLogger", "WriteLogger", "BytesLogger") if hasattr(structlog, name)
)
_LEVELS: Final = {
    "debug": logging.DEBUG,
    "warning": logging.WARNING,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "err": logging.ERROR,
    "failure": logging.ERROR,
    "exception": logging.ERROR,
    "critical": logging.CRITICAL,
    "fatal": logging.CRITICAL,
}
_formatting: Final = threading.local()


def add_ids(_logger: Any, _method: str, event_dict: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """
    Add the ids and the bound fields to an event: a structlog processor, for loggers that the package cannot reach.

    It is needed only where a ``wrapper_class`` replaces structlog's own way through its processors. What is in the
    event already stays.
    """
    try:
        foreign.add_fields(event_dict, _error_of(event_dict))
    except Exception:  # noqa: BLE001 - a log call must not fail in user code
        _failed()
    return event_dict


def _failed() -> None:
    if os.environ.get(guard.STRICT_ENV):
        raise  # noqa: PLE0704 - called from an except block only
    guard.count("internal_error.logs.structlog")


def _error_of(event_dict: MutableMapping[str, Any]) -> BaseException | None:
    given = event_dict.get(_EXC_INFO)
    found = lines.resolved(given) if given else None
    return found[1] if found is not None else None


def _clean(event_dict: MutableMapping[str, Any]) -> None:
    """
    Take out of the exception of an event what a user sent, rendered or not.
    """
    if _EXCEPTION in event_dict:
        event_dict[_EXCEPTION] = foreign.scrubbed(event_dict[_EXCEPTION])
    given = event_dict.get(_EXC_INFO)
    if given:
        found = lines.resolved(given)
        if found is not None:
            shown = foreign.printable(found[1])
            if shown is not found[1]:
                event_dict[_EXC_INFO] = (type(shown), shown, found[2])


class _Step:
    """
    Our processor, just before the renderer.

    Args:
        given: What the event was given as ``exc_info``; a processor may have rendered it since.
        fields: Whether it adds fields, or leaves that to the record that the event becomes.
    """

    __slots__ = ("_fields", "_given")

    def __init__(self, given: object = None, *, fields: bool = True) -> None:
        self._given = given
        self._fields = fields

    def __call__(self, logger: Any, method: str, event_dict: Any) -> Any:
        try:
            if isinstance(event_dict, dict):
                if _EXCEPTION in event_dict or _EXC_INFO in event_dict:
                    _clean(event_dict)
                if method in _LEVELS and _LEVELS[method] >= logging.WARNING:
                    foreign.hide(event_dict)
                if self._fields:
                    error = lines.resolved(self._given) if self._given else None
                    foreign.add_fields(event_dict, error[1] if error is not None else None)
                if seams.export is not None and isinstance(logger, _WRITERS):
                    _send(logger, method, event_dict, self._given)
        except Exception:  # noqa: BLE001 - a log call must not fail in user code
            _failed()
        return event_dict


_STEP: Final = _Step()
_ONLY_CLEAN: Final = _Step(fields=False)


def _send(logger: Any, method: str, event_dict: dict[str, Any], given: object) -> None:
    error = lines.resolved(given or event_dict.get(_EXC_INFO))
    if error is None and _EXCEPTION in event_dict:
        error = lines.resolved(True)  # what exc_info=True means
    name = event_dict.get("logger")
    level = _LEVELS.get(method, logging.INFO)
    name = name if isinstance(name, str) else "structlog"
    record = logging.LogRecord(name, level, "", 0, dict(event_dict), None, error)
    record.__dict__.update(_logger=logger, _name=method)
    for field, key, write in seams.names.ids:
        if write is None and isinstance(event_dict.get(key), str):
            record.__dict__[field] = event_dict[key]  # the user's own, perhaps
    foreign.send(record)


def _place(processors: Sequence[Any]) -> int:
    """
    Return where the renderer stands; everything after it works on text.
    """
    last = len(processors) - 1
    if not isinstance(processors[last], _RENDERERS):
        for at, processor in enumerate(processors):
            if isinstance(processor, _RENDERERS):
                return at
    return last


def _view(bound: Any, event_kw: dict[str, Any]) -> Any:
    """
    Return what ``_process_event`` reads of ``bound``, with our step among the processors.
    """
    if seams.fields is None:
        return bound
    try:
        processors = list(bound._processors)
        if not processors:
            return bound
        step, at, last = _STEP, len(processors) - 1, processors[-1]
        if type(last) not in _RENDERERS:
            if type(getattr(last, "__self__", last)).__module__.startswith(_CAPTURES):
                return bound
            if last in _TO_RECORDS:
                step = _ONLY_CLEAN
            at = _place(processors)
        given = event_kw.get(_EXC_INFO)
        if given and step is _STEP:
            step = _Step(lines.resolved(given))
        processors.insert(at, step)
        view: Any = object.__new__(BoundLoggerBase)
        view._logger, view._context = bound._logger, bound._context
        view._processors = processors
        return view
    except Exception:  # noqa: BLE001 - a log call must not fail in user code
        _failed()
        return bound


def _nameless(function: Callable[..., Any]) -> Callable[..., Any]:
    """
    Return ``function`` as one of structlog's own frames, which it skips when it looks for the caller.
    """
    made = FunctionType(
        function.__code__,
        {"__name__": "structlog._base", "__builtins__": builtins},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return functools.update_wrapper(made, function)


def _process_event_patch() -> Patch:
    patch = Patch(BoundLoggerBase, "_process_event")
    view = _view

    def process_event(self: Any, method_name: str, event: Any, event_kw: dict[str, Any]) -> Any:
        return patch.original(view(self, event_kw), method_name, event, event_kw)

    patch.ours = functools.update_wrapper(_nameless(process_event), patch.original)
    return patch


def _foreign_step(_logger: Any, _method: str, event_dict: Any) -> Any:
    """
    Add what its record has to an event that ``ProcessorFormatter`` made of a line of ``logging``.
    """
    record = getattr(_formatting, "record", None)
    fields = seams.fields
    if record is None or fields is None or not isinstance(event_dict, dict):
        return event_dict
    try:
        event_dict.pop(EXPORTED, None)  # from ExtraAdder
        if _EXCEPTION in event_dict or _EXC_INFO in event_dict:
            _clean(event_dict)
        if record.levelno >= logging.WARNING:
            foreign.hide(event_dict)
        found = record.__dict__
        # The record's own ids, of where it was written: a queue may be between.
        values = tuple(text if isinstance(text := found.get(name, ""), str) else "" for name in FIELDS)
        for name, key, _ in seams.names.ids:
            # ExtraAdder has copied the record's, the empty ones and under their plain names.
            if name in event_dict and event_dict[name] is found.get(name) and (key != name or event_dict[name] == ""):
                del event_dict[name]
        for name, value in seams.names.named(values).items():
            event_dict.setdefault(name, value)
        for name in fields.now()[1]:
            if name in found:
                event_dict.setdefault(name, found[name])
    except Exception:  # noqa: BLE001 - a log call must not fail in user code
        _failed()
    return event_dict


def _format_patch() -> Patch:
    patch = Patch(ProcessorFormatter, "format")

    def format(self: Any, record: logging.LogRecord) -> Any:  # noqa: A001 - the name of what it wraps
        try:
            processors = self.processors
            if seams.fields is not None and _foreign_step not in processors:
                at = _place(processors)
                self.processors = (*processors[:at], _foreign_step, *processors[at:])
        except Exception:  # noqa: BLE001 - a line must not be lost
            _failed()
        before = getattr(_formatting, "record", None)
        _formatting.record = record
        try:
            return patch.original(self, record)
        finally:
            _formatting.record = before

    patch.ours = functools.update_wrapper(format, patch.original)
    return patch


_PATCHES: Final = (_process_event_patch(), _format_patch())


def install() -> None:
    """
    Add the ids to every event from now on; twice is once.
    """
    for patch in _PATCHES:
        patch.place()


def uninstall() -> None:
    """
    Leave structlog as it was found.
    """
    for patch in _PATCHES:
        patch.remove()


if seams.fields is not None:  # imported by the application before its library, while we are active
    install()
