"""
What an event loop says of a task or a callback that failed: under the ids of the request that started it.

``Task exception was never retrieved`` is logged when the task is collected as garbage: in no request, or in the middle
of somebody else's.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import sys
from contextvars import Context as Variables
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import context as otel_context
from opentelemetry.context import Context

from otel_correlation import guard
from otel_correlation.identity import detach
from otel_correlation.logs.record import seams
from otel_correlation.upstream.api import context_variable

if TYPE_CHECKING:
    from collections.abc import Mapping

_NAME: Final = "call_exception_handler"
_NOTHING: Final = Context()
_VARIABLE: Final = context_variable()

# Owner -> ours, and what stood in the class: nothing in uvloop's, which inherits the method from compiled code and is
# asked for it by name.
_patched: Final[dict[type, tuple[Any, Any]]] = {}


def watch() -> None:
    """
    Put the ids on what loops say from now on; call it again once uvloop may have been imported.
    """
    # Not imported for this: nobody's loop is of a module that is not there yet.
    for owner in (asyncio.BaseEventLoop, getattr(sys.modules.get("uvloop"), "Loop", None)):
        if owner is not None and owner not in _patched:
            ours = _wrapper(getattr(owner, _NAME))
            _patched[owner] = ours, owner.__dict__.get(_NAME)
            setattr(owner, _NAME, ours)


def unwatch() -> None:
    """
    Leave the loops as they were found; a wrapper that somebody wrapped in turn stays and does nothing.
    """
    for owner, (ours, found) in list(_patched.items()):
        if owner.__dict__.get(_NAME) is not ours:
            continue
        if found is None:
            delattr(owner, _NAME)
        else:
            setattr(owner, _NAME, found)
        del _patched[owner]


def _wrapper(original: Any) -> Any:
    @functools.wraps(original)
    def call_exception_handler(self: Any, context: dict[str, Any]) -> Any:
        token = None
        if seams.fields is not None:
            with guard.never_raise("logs.loops"):
                found = _context_of(context)
                if found is not None:
                    token = otel_context.attach(found)
        try:
            return original(self, context)
        finally:
            if token is not None:
                detach(token)

    return call_exception_handler


def _context_of(told: Mapping[str, Any]) -> Context | None:
    """
    Return the context of what failed, an empty one where it is not known, or None where the current one is right.
    """
    failed = told.get("task") or told.get("handle") or told.get("future")
    if failed is None:
        return None  # of a transport or a server: called where it failed
    variables = _variables_of(failed)
    if variables is None:
        # gather() makes a future of its own; the exception is one of its tasks'.
        error = told.get("exception")
        for child in getattr(failed, "_children", ()):
            if child.done() and not child.cancelled() and child.exception() is error:
                variables = _variables_of(child)
                break
    if variables is None:
        return _NOTHING
    found = None if _VARIABLE is None else variables.get(_VARIABLE)
    return found if isinstance(found, Context) else _NOTHING


def _variables_of(owner: Any) -> Variables | None:
    get = getattr(owner, "get_context", None)
    if get is not None:
        found = get()
        return found if isinstance(found, Variables) else None
    # Python 3.11's tasks and uvloop's handles do not give their context away, but tell the collector of it.
    return next((held for held in gc.get_referents(owner) if isinstance(held, Variables)), None)
