"""
What structlog and loguru share: when their adapters are loaded, which fields they add, what their exceptions show.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import TYPE_CHECKING, Any, Final

import wrapt

from otel_correlation import guard
from otel_correlation.logs.lines import SHORTEST_QUOTE, text_of
from otel_correlation.logs.record import seams
from otel_correlation.policy import hide_quoted, scrub

if TYPE_CHECKING:
    import logging
    from collections.abc import MutableMapping

_LIBRARIES: Final = ("structlog", "loguru")
_DEPTH: Final = 8
_LINKS: Final = 64
_hooked: set[str] = set()


def watch() -> None:
    """
    Load the adapter of each library that the application imports, now or when it does; nothing for all others.
    """
    for name in _LIBRARIES:
        if name not in _hooked:
            _hooked.add(name)
            wrapt.register_post_import_hook(_adapt, name)
        elif name in sys.modules:
            _adapt(sys.modules[name])


def _adapt(module: Any) -> None:
    # The hook stays after an uninstall: wrapt cannot take one back.
    if seams.fields is not None:
        with guard.never_raise(f"logs.{module.__name__}"):
            adapter: Any = importlib.import_module(f"otel_correlation.logs.{module.__name__}")
            # An adapter that the application imported itself is here half made: it has just imported its library.
            if hasattr(adapter, "install"):
                adapter.install()


def unwatch() -> None:
    """
    Leave the libraries as they were found.
    """
    for name in _LIBRARIES:
        adapter = sys.modules.get(f"otel_correlation.logs.{name}")
        if adapter is not None:
            adapter.uninstall()


def add_fields(target: MutableMapping[str, Any], error: BaseException | None = None) -> None:
    """
    Put the ids (those that are not empty) and the bound fields into ``target``; what is there already stays.

    Args:
        target: What is logged.
        error: Its exception, which may carry the ids of the request that it left.
    """
    fields = seams.fields
    if fields is None:
        return
    values, bound = fields.now(error)
    for name, value in seams.names.named(values).items():
        if name not in target:
            target[name] = value
    if bound:
        for name, value in bound.items():
            if name not in target:
                target[name] = value


def send(record: logging.LogRecord, created: float | None = None) -> None:
    """
    Export a line that never becomes a record of ``logging``.

    Args:
        record: The line as a record.
        created: When it was written, in seconds since the epoch; now if None.
    """
    export = seams.export
    if export is not None:
        if created is not None:
            record.created = created
        fields = seams.fields
        if fields is not None:
            fields.put(record)
        export(record)


class _Printable(Exception):  # noqa: N818 - it stands for another exception, whose name its subclasses have
    """
    Prints as the exception that it stands for, without what a user sent.
    """

    def __str__(self) -> str:
        return str(self.args[0])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.args[0]!r})"


@functools.lru_cache(maxsize=64)
def _printable_class(kind: type[BaseException]) -> type[_Printable]:
    return type(kind.__name__, (_Printable,), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


def printable(error: BaseException) -> BaseException:
    """
    Return ``error``, or one that prints like it where its text, or that of one it came from, quotes what a user sent.

    The exception itself is never touched. Where a stand-in is made it has at most 64 exceptions behind it.
    """
    return _printable(error, [_LINKS])


def _printable(error: BaseException, left: list[int]) -> BaseException:
    left[0] -= 1
    if left[0] < 0:
        return _stand_in(error)  # what is behind it is cut off, unseen
    cause, context = error.__cause__, error.__context__
    shown_cause = None if cause is None else _printable(cause, left)
    # What ``raise ... from`` hides is not printed.
    hidden = context is None or cause is not None or error.__suppress_context__
    shown_context = context if hidden or context is None else _printable(context, left)
    members: tuple[BaseException, ...] = ()
    if isinstance(error, BaseExceptionGroup):
        members = tuple(_printable(member, left) for member in error.exceptions[:_LINKS])
        changed = members != error.exceptions
    else:
        changed = False
    notes = [note for note in getattr(error, "__notes__", ()) if isinstance(note, str)]
    clean_notes = [scrub(note) for note in notes]
    text = text_of(error)
    changed = changed or shown_cause is not cause or shown_context is not context
    if not changed and clean_notes == notes and scrub(text) == text:
        return error
    made = _stand_in(error)
    if members:
        made = BaseExceptionGroup(scrub(str(error.args[0])), members).with_traceback(error.__traceback__)
    if clean_notes:
        made.__notes__ = clean_notes
    made.__cause__, made.__context__ = shown_cause, shown_context
    made.__suppress_context__ = error.__suppress_context__
    return made


def _stand_in(error: BaseException) -> BaseException:
    made = _printable_class(type(error))  # type: ignore[arg-type] # typeshed's object.__hash__
    return made(scrub(text_of(error))).with_traceback(error.__traceback__)


def hide(fields: MutableMapping[str, Any]) -> None:
    """
    Take out of texts and exceptions among ``fields`` what they quote of a user; for warnings and worse, as in records.
    """
    for name, value in list(fields.items()):
        if isinstance(value, str):
            if len(value) >= SHORTEST_QUOTE and (shown := hide_quoted(value)) != value:
                fields[name] = shown
        elif isinstance(value, BaseException) and (error := printable(value)) is not value:
            fields[name] = error


def scrubbed(value: Any, depth: int = _DEPTH) -> Any:
    """
    Return ``value``, a text or the lists and dicts of a structured traceback, without what a user sent.
    """
    if isinstance(value, str):
        return scrub(value)
    if depth > 0:
        if isinstance(value, dict):
            return {key: scrubbed(item, depth - 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [scrubbed(item, depth - 1) for item in value]
    return value
