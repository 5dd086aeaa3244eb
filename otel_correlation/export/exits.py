"""
Ends of a process at which buffered telemetry would be lost.

Covered: uvicorn however it is started (one worker, ``--workers``, ``--reload``, ``python -m``, ``uvicorn.run()``, under
gunicorn's uvicorn worker, with ``--preload`` too) on SIGTERM, SIGINT, code reload and ``--limit-max-requests``; every
process that ends by itself; and children of ``multiprocessing``, which skip ``atexit`` when they are forked.

uvicorn re-raises SIGTERM with the handler of before once it has stopped, so ``atexit`` is not reached; what is reached
is the end of ``uvicorn.Server._serve``. No signal handler is installed or changed, so exit codes stay.

Not covered: SIGKILL, ``os._exit``, a script without a SIGTERM handler that gets SIGTERM, and gunicorn's quick shutdown
(SIGINT or SIGQUIT to the master alone), which uvicorn's worker ignores until it is killed; then everything that was
older than the schedule delay is out.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import sys
import weakref
from typing import TYPE_CHECKING, Any, Final

from wrapt import register_post_import_hook

from otel_correlation import guard
from otel_correlation.clocks import monotonic
from otel_correlation.export.batching import EXIT_BUDGET_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

_ORIGINAL: Final = "_otel_correlation_original"

_flush: Callable[[float], object] | None = None
_hooked = False
_last_s = 0.0
_spent_s = 0.0
# Servers whose whole run is wrapped.
_serving: Final[weakref.WeakSet[Any]] = weakref.WeakSet()


def flush_now() -> None:
    """
    Flush within what is left of the budget: the end of a server and that of its process share one.
    """
    global _last_s, _spent_s  # noqa: PLW0603 - one process has one end
    if _flush is None:
        return
    begun = monotonic()
    if begun - _last_s > 2 * EXIT_BUDGET_S:
        _spent_s = 0.0  # an earlier server's end; the process went on
    with guard.never_raise("export.exits"):
        _flush(max(EXIT_BUDGET_S - _spent_s, 0.1))
    _last_s = monotonic()
    _spent_s += _last_s - begun


async def _flush_beside() -> None:
    # On a thread: the loop may have other servers and tasks, which an absent collector must not hold up.
    try:
        await asyncio.to_thread(flush_now)
    except (RuntimeError, asyncio.CancelledError):
        flush_now()
        raise


def _wrap_server(module: ModuleType) -> None:
    """
    Flush whenever ``uvicorn.Server._serve`` has ended.

    Where the application calls ``bootstrap()``, that method runs already: it is what imports the application. Then the
    end of ``Server.shutdown``, the last that it calls, has to do; only uvicorn's very last log record comes later.
    """
    server = getattr(module, "Server", None)
    # Older servers have no such methods; then atexit is all there is.
    serve, shutdown = getattr(server, "_serve", None), getattr(server, "shutdown", None)
    if server is None or serve is None or shutdown is None or hasattr(serve, _ORIGINAL):
        return

    @functools.wraps(serve)
    async def _serve(self: Any, *args: Any, **kwargs: Any) -> Any:
        _serving.add(self)
        try:
            return await serve(self, *args, **kwargs)
        finally:
            await _flush_beside()

    @functools.wraps(shutdown)
    async def _shutdown(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await shutdown(self, *args, **kwargs)
        finally:
            if self not in _serving:
                await _flush_beside()

    for wrapper, original in ((_serve, serve), (_shutdown, shutdown)):
        setattr(wrapper, _ORIGINAL, original)
    server._serve, server.shutdown = _serve, _shutdown


def _on_import(module: ModuleType) -> None:
    if _flush is not None:
        with guard.never_raise("export.exits"):
            _wrap_server(module)


def _on_multiprocessing(module: ModuleType) -> None:
    def in_child(flush: Callable[[], None]) -> None:
        module.Finalize(None, flush, exitpriority=-100)

    # In the child, the finalizers of the parent are cleared first, and these functions are called then.
    module.register_after_fork(flush_now, in_child)
    if sys.modules["multiprocessing.process"].parent_process() is not None:
        # This child was set up by what it was asked to call, after that.
        in_child(flush_now)


def install(flush: Callable[[float], object]) -> None:
    """
    Call ``flush`` with its time budget in seconds before this process or any of its servers ends; idempotent.

    uvicorn is not imported by this; it is wrapped when, and if, somebody imports it.
    """
    global _flush, _hooked  # noqa: PLW0603 - one process has one end
    if _flush is None:
        atexit.register(flush_now)
    _flush = flush
    if not _hooked:
        _hooked = True
        register_post_import_hook(_on_import, "uvicorn.server")
        register_post_import_hook(_on_multiprocessing, "multiprocessing.util")
        return
    if (module := sys.modules.get("uvicorn.server")) is not None:
        _on_import(module)


def uninstall() -> None:
    """
    Leave everything as it was before ``install``.
    """
    global _flush  # noqa: PLW0603 - see install
    if _flush is None:
        return
    _flush = None
    atexit.unregister(flush_now)
    server = getattr(sys.modules.get("uvicorn.server"), "Server", None)
    for name in ("_serve", "shutdown"):
        original = getattr(getattr(server, name, None), _ORIGINAL, None)
        if original is not None:
            setattr(server, name, original)
