"""
An exception as text, in bounded time and space, whatever its text, its chain or its group holds.
"""

from __future__ import annotations

import re
import traceback
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from otel_correlation.policy.bounds import CUT
from otel_correlation.policy.scrubbing import scrub

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType, TracebackType

    from otel_correlation.policy.bounds import Bounds

# Exceptions of a chain and of groups, and their frames, that are formatted as Python does it. Python itself stops at
# 1,000 frames (sys.getrecursionlimit) unless it is told otherwise.
_EXCEPTIONS: Final = 64
_FRAMES: Final = 2_000
# Beyond that: the first frames of an exception, and its last ones.
_FIRST: Final = 32
_LAST: Final = 96
# Links that are followed to the first exception of a chain.
_LINKS: Final = 10_000
_NOTES: Final = 16


_FRAME: Final = re.compile(r'^[ |+]*File "', re.MULTILINE)
_MARK: Final = re.compile(r"\n\.\.\.\[cut from [0-9]+ characters\]\Z")
_URL_END: Final = re.compile(r"[\s'\"<>]")


def scrubbed(text: str, limit: int, bounds: Bounds) -> str:
    """
    Return an exception's text, cut, without what a user sent in it; a secret that the cut divides is hidden.
    """
    length = len(text)
    mark = f"\n{CUT}{length} characters]" if bounds.marked else ""
    if length > limit:
        text = _without_open_url(text[: limit - len(mark)]) + mark
    elif length == limit and not bounds.marked:
        text = _without_open_url(text)  # the SDK may have cut it
    text = scrub(text)
    if len(text) <= limit:
        return text
    # Hiding made it longer. A mark that it has from before is the right one.
    before = _MARK.search(text)
    if before is not None:
        mark = before[0]
    return text[: limit - len(mark)] + mark


def scrubbed_stack(text: str, bounds: Bounds) -> str:
    """
    Return a traceback as ``scrubbed`` does, but cut in its middle: its end names the line that failed.
    """
    limit = bounds.stack
    length = len(text)
    if length <= limit or not bounds.marked:
        return scrubbed(text, limit, bounds)
    mark = f"{CUT}{length} characters]\n"
    room = limit - len(mark)
    head = text[: room // 4]
    tail = text[len(head) - room :]
    # Only from a line of a frame on: what comes before it may be the rest of a value that had to be hidden.
    frame = _FRAME.search(tail)
    if frame is None:
        return scrubbed(text, limit, bounds)
    text = scrub(head[: head.rfind("\n") + 1] + mark + tail[frame.start() :])
    return text if len(text) <= limit else scrubbed(text, limit, bounds)


def _without_open_url(text: str) -> str:
    """
    Leave out what comes after ``scheme://`` where a text was cut in a URL: a password shows only by the ``@`` after it.
    """
    last = _URL_END.split(text)[-1]
    at = last.find("://")
    return text if at < 0 else text[: len(text) - len(last) + at + 3]


def class_name(kind: type) -> str:
    """
    Return the full name of a class, as ``exception.type`` and ``error.type`` want it; builtins have no module.
    """
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def text_of(error: BaseException) -> str:
    """
    Return ``str(error)``, or what can be said when that raises.
    """
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - somebody's __str__
        return "<no text: __str__ failed>"


def stack_of(error: BaseException, trace: TracebackType | None, bounds: Bounds) -> str:
    """
    Return the traceback of an exception without what a user sent, of at most ``bounds.stack`` characters.

    Args:
        error: The exception.
        trace: Its traceback.
        bounds: How long its own text and the whole may be.
    """
    if _is_small(error, trace):
        told = traceback.TracebackException(type(error), error, trace, compact=True)
        _cut_texts(told, bounds)
        text = "".join(told.format())
    else:
        text = "".join(_abridged(error, trace, bounds))
    return scrubbed_stack(text, bounds)


def _is_small(error: BaseException, trace: TracebackType | None) -> bool:
    """
    Tell whether an exception, all that it was raised from and all members of its groups may be formatted by Python.
    """
    waiting: list[tuple[BaseException, TracebackType | None]] = [(error, trace)]
    seen: set[int] = set()
    frames = exceptions = 0
    while waiting:
        found, at = waiting.pop()
        seen.add(id(found))
        exceptions += 1
        if exceptions > _EXCEPTIONS:
            return False
        while at is not None:
            frames += 1
            if frames > _FRAMES:
                return False
            at = at.tb_next
        behind = [
            other for other in (found.__cause__, found.__context__) if other is not None and id(other) not in seen
        ]
        if isinstance(found, BaseExceptionGroup):
            if len(found.exceptions) > _EXCEPTIONS:
                return False
            behind += found.exceptions  # each as often as it is there, as Python does
        waiting += [(other, other.__traceback__) for other in behind]
    return True


def _cut_texts(told: traceback.TracebackException, bounds: Bounds) -> None:
    """
    Cut what exceptions say of themselves before it is indented, joined and searched.
    """
    waiting: list[Any] = [told]
    while waiting:
        found = waiting.pop()
        text = getattr(found, "_str", None)
        if isinstance(text, str) and len(text) > bounds.message:
            found._str = scrubbed(text, bounds.message, bounds)
        notes = getattr(found, "__notes__", None)
        if isinstance(notes, list):
            found.__notes__ = [
                scrubbed(note, bounds.message, bounds) if isinstance(note, str) else note for note in notes[:_NOTES]
            ]
        for name in ("text", "msg"):  # of a SyntaxError
            said = getattr(found, name, None)
            if isinstance(said, str) and len(said) > bounds.message:
                setattr(found, name, None if name == "text" else bounds.cut(said, bounds.message))
        members = getattr(found, "exceptions", None) or ()
        waiting += [other for other in (found.__cause__, found.__context__, *members) if other is not None]


def _abridged(error: BaseException, trace: TracebackType | None, bounds: Bounds) -> Iterator[str]:
    """
    Return the first exception of a chain that is too large, or a member of a group that is, and the last one.
    """
    first = _first(error)
    if first is not error:
        yield from _one(first, first.__traceback__, bounds)
        yield "\n(Exceptions between the two are left out.)\n\n"
    yield from _one(error, trace, bounds)


def _first(error: BaseException) -> BaseException:
    seen = {id(error)}
    for _ in range(_LINKS):
        found = error.__context__ if error.__cause__ is None else error.__cause__
        if found is None and isinstance(error, BaseExceptionGroup):
            found = error.exceptions[0]
        if found is None or id(found) in seen:
            break
        seen.add(id(found))
        error = found
    return error


def _one(error: BaseException, trace: TracebackType | None, bounds: Bounds) -> Iterator[str]:
    yield "Traceback (most recent call last):\n"
    count = sum(1 for _ in traceback.walk_tb(trace))
    yield from _frames(islice(traceback.walk_tb(trace), _FIRST))
    if count > _FIRST + _LAST:
        yield f"  ({count - _FIRST - _LAST} frames are left out.)\n"
    yield from _frames(deque(islice(traceback.walk_tb(trace), _FIRST, None), _LAST))
    name = class_name(type(error))
    yield f"{name}: {scrubbed(text_of(error), bounds.message, bounds)}\n"


def _frames(pairs: Any) -> list[str]:
    found: list[tuple[FrameType, int]] = list(pairs)
    return traceback.StackSummary.extract(iter(found)).format()
