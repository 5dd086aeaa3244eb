"""
Timers of event loops: what a request arms is its own, and what arms itself again after its end is nobody's.

A scheduler that a request wakes, and any callback that arms itself, would otherwise keep that request for ever. Looked
at are ``call_later`` and ``call_at``, and ``call_soon_threadsafe`` where the loop's own thread calls it, which is how
APScheduler wakes itself; from another thread it hands work over. A context that the caller passes is the caller's.

``threading.Timer`` is looked at in ``threads``. See: ADR-017.
"""

from __future__ import annotations

import functools
from asyncio import BaseEventLoop
from asyncio.events import _get_running_loop
from contextvars import Context as Variables
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Final

from wrapt import register_post_import_hook

from otel_correlation import guard, identity
from otel_correlation.logs.record import Patch
from otel_correlation.upstream.api import context_variable

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from opentelemetry.context import Context

# Modules whose callbacks only end a wait or a connection: nearly all that a service arms. They arm nothing that runs
# code of the application's, so nothing has to be done for them.
_QUIET: Final = frozenset(
    {
        "aiohttp.helpers",
        "anyio._backends._asyncio",
        "async_timeout",
        "asyncio.futures",
        "asyncio.timeouts",
        "uvicorn.protocols.http.h11_impl",
        "uvicorn.protocols.http.httptools_impl",
    }
)

# Another implementation of OpenTelemetry's context has no such variable; then loops are left alone.
_variable: Final[Any] = context_variable()
_on = False
_hooked = False
_patches: Final[list[Patch]] = []


def _variables(current: Context, callback: object) -> Variables | None:
    """
    Return the context variables that a callback is armed with, or None where they are those of whoever arms it.
    """
    try:
        if not _on or getattr(callback, "__module__", None) in _QUIET:
            return None
        wanted = identity.armed(current)
        if wanted is current:
            return None
        variables = copy_context()
        variables.run(_variable.set, wanted)
    except Exception:  # noqa: BLE001 - the timer is armed all the same
        guard.report("tasks.timer")
        return None
    return variables


def _call_later(patch: Patch) -> Callable[..., Any]:
    get = _variable.get

    def call_later(
        self: Any, delay: float, callback: Callable[..., Any], *args: Any, context: Variables | None = None
    ) -> Any:
        if context is None and (current := get()):
            context = _variables(current, callback)
        return patch.original(self, delay, callback, *args, context=context)

    return call_later


def _call_at(patch: Patch) -> Callable[..., Any]:
    get = _variable.get

    def call_at(
        self: Any, when: float, callback: Callable[..., Any], *args: Any, context: Variables | None = None
    ) -> Any:
        if context is None and (current := get()):
            context = _variables(current, callback)
        return patch.original(self, when, callback, *args, context=context)

    return call_at


def _call_soon_threadsafe(patch: Patch) -> Callable[..., Any]:
    get = _variable.get

    def call_soon_threadsafe(
        self: Any, callback: Callable[..., Any], *args: Any, context: Variables | None = None
    ) -> Any:
        if context is None and (current := get()) and _get_running_loop() is self:
            context = _variables(current, callback)
        return patch.original(self, callback, *args, context=context)

    return call_soon_threadsafe


def _add(owner: type, name: str, make: Callable[[Patch], Callable[..., Any]]) -> None:
    patch = Patch(owner, name)
    patch.ours = functools.update_wrapper(make(patch), patch.original)
    _patches.append(patch)
    if _on:
        patch.place()


def _on_uvloop(module: ModuleType) -> None:
    with guard.never_raise("tasks.uvloop"):
        # Its call_at() comes to its call_later(); asyncio's do it the other way round.
        _add(module.Loop, "call_later", _call_later)
        _add(module.Loop, "call_soon_threadsafe", _call_soon_threadsafe)


def activate() -> None:
    """
    Patch asyncio's event loops, and uvloop's when that is imported; a second call changes nothing.
    """
    global _hooked, _on  # noqa: PLW0603 - one process, one switch
    if _variable is None:
        return
    _on = True
    if not _hooked:
        _hooked = True
        _add(BaseEventLoop, "call_at", _call_at)
        _add(BaseEventLoop, "call_soon_threadsafe", _call_soon_threadsafe)
        register_post_import_hook(_on_uvloop, "uvloop")
    for patch in _patches:
        patch.place()


def deactivate() -> None:
    """
    Leave event loops as they were found; a wrapper that somebody wrapped in turn stays and does nothing.
    """
    global _on  # noqa: PLW0603 - see activate
    _on = False
    for patch in _patches:
        patch.remove()
