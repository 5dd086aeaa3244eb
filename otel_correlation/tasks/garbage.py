"""
What the garbage collector runs has no identity, in place of somebody else's.

Python collects wherever the allocation happened to be that was one too many, most likely inside some request. What it
ends there, the ``finally`` of a generator whose client went away or a ``__del__``, is of another request, or of none.
So for as long as a collection runs the context is empty, and tasks that are begun meanwhile (``asyncio`` ends an
asynchronous generator in a task) copy an empty one. A value that ends with its last reference is not the collector's:
it has the ids of that place.
"""

from __future__ import annotations

import contextvars
import gc
import sys
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.context import _RUNTIME_CONTEXT, Context

from otel_correlation import identity

if TYPE_CHECKING:
    from collections.abc import Mapping

_NOTHING: Final = Context()

# Up to 3.11 a collection may begin in the middle of a change of the very context that we change, whose C code has only
# borrowed the table of values: freed by us, it would be read once more. So tables are kept until a collection
# elsewhere; those of the same instruction, which may still be running, together.
_KEEP: Final = sys.version_info < (3, 12)
_kept: deque[contextvars.Context] = deque(maxlen=8)
_place: tuple[int, int] | None = None

_token: Any = None  # one for all threads: the interpreter runs one collection at a time


def _around(phase: str, _info: Mapping[str, int]) -> None:
    global _token  # noqa: PLW0603 - a callback of the interpreter's only collector
    if phase == "start":
        if _RUNTIME_CONTEXT.get_current():
            if _KEEP:
                _keep()
            _token = _RUNTIME_CONTEXT.attach(_NOTHING)
    elif _token is not None:
        token, _token = _token, None
        identity.detach(token)


def _keep() -> None:
    global _place  # noqa: PLW0603 - see above
    frame = sys._getframe(1).f_back  # none where the interpreter ends
    place = id(frame), frame.f_lasti if frame else 0
    if place != _place:
        _kept.clear()
        _place = place
    _kept.append(contextvars.copy_context())


def activate() -> None:
    """
    Take the identity away from whatever a collection runs.
    """
    if _around not in gc.callbacks:
        gc.callbacks.append(_around)


def deactivate() -> None:
    """
    Leave collections as they were found.
    """
    if _around in gc.callbacks:
        gc.callbacks.remove(_around)
    _kept.clear()
