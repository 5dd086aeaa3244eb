"""
What the garbage collector runs has no identity, in place of somebody else's.

Python collects wherever the allocation happened to be that was one too many, most likely inside some request. What it
ends there, the ``finally`` of a generator whose client went away or a ``__del__``, is of another request, or of none.
So for as long as a collection runs the context is empty, and tasks that are begun meanwhile (``asyncio`` ends an
asynchronous generator in a task) copy an empty one. A value that ends with its last reference is not the collector's:
it has the ids of that place.
"""

from __future__ import annotations

import gc
import sys
from collections import deque
from contextvars import Context as Variables
from contextvars import copy_context
from functools import partial
from itertools import repeat, starmap
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.context import Context

from otel_correlation.upstream.api import RUNTIME_CONTEXT as _RUNTIME_CONTEXT

if TYPE_CHECKING:
    from collections.abc import Callable

_callback: Callable[..., Any] | None = None

# Up to 3.11 a collection may begin in the middle of a change of the very context that is changed here, whose C code has
# only borrowed the table of values: freed by us, it would be read once more. Several collections fit into one such
# change (finalizers allocate), so the last tables are kept, and what their variables hold with them.
_TABLES: Final = 4 if sys.version_info < (3, 12) else 0


def _around(variable: Any) -> Callable[..., Any]:
    """
    Return the callback of the collector, made of nothing that is written in Python.

    Python code in a callback would be the first to run after a collection, so that a signal of that time would be
    handled in it: what the handler raises (``KeyboardInterrupt``, a time limit of Celery's) would end there, unseen.
    """
    kept: deque[Variables] = deque(maxlen=_TABLES)
    keep = map(kept.append, starmap(copy_context, repeat(())))
    # Each start sets an empty context and leaves the token for its stop; collections do not overlap. No token stays
    # anywhere, because it holds the context that it was made in.
    tokens: deque[Any] = deque()
    leave = map(tokens.append, map(variable.set, repeat(Context())))
    begin = partial(next, zip(keep, leave, strict=False))
    end = partial(next, map(variable.reset, iter(tokens.pop, None)))
    # getattr(phases, phase, info) runs the property of this name.
    return partial(getattr, type("Phases", (), {"start": property(begin), "stop": property(end)})())


def activate() -> None:
    """
    Take the identity away from whatever a collection runs.
    """
    global _callback  # noqa: PLW0603 - the interpreter has one collector
    variable = getattr(_RUNTIME_CONTEXT, "_current_context", None)
    # Another implementation of OpenTelemetry's context is left as it is.
    if _callback is None and variable is not None:
        _callback = _around(variable)
        gc.callbacks.append(_callback)


def deactivate() -> None:
    """
    Leave collections as they were found.
    """
    global _callback  # noqa: PLW0603 - see activate()
    if _callback is not None and _callback in gc.callbacks:
        gc.callbacks.remove(_callback)
    _callback = None
