"""
Threads, timers and thread pools take the identity of whoever starts or submits.

A thread that is started inside a request keeps the request's identity for its life, a timer that is started by another
one of a request that has ended has none. A pool's worker has that of the
task which it runs, for as long as it runs it. Threads that libraries keep for themselves have none, however lazily
they are started. Outside of a request nothing is wrapped.

``asyncio`` and ``anyio`` copy the context themselves; with them nothing has to be done.
"""

from __future__ import annotations

import concurrent.futures
import functools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.context import Context

from otel_correlation import guard, identity
from otel_correlation.logs.record import Patch
from otel_correlation.upstream.api import RUNTIME_CONTEXT as _RUNTIME_CONTEXT

if TYPE_CHECKING:
    from collections.abc import Callable

# Threads and processes that serve everybody: they are started when somebody needs them first, which may be a request.
# Packages whose threads have a target in them, and those that have classes of their own. Tuples, for startswith().
_TARGETS: Final = (
    "aiosqlite.", "apscheduler.", "concurrent.", "ddtrace.", "grpc.", "logging.handlers.", "multiprocessing.",
    "opentelemetry.exporter.", "opentelemetry.sdk.", "otel_correlation.export.", "prometheus_client.",
    "psycopg_pool.", "pymongo.", "sentry_sdk.", "socketserver.",
)  # fmt: skip
_CLASSES: Final = (
    *_TARGETS, "amqp.", "anyio.", "billiard.", "celery.", "kafka.", "kombu.", "redis.", "watchdog.",
)  # fmt: skip
# Whoever uses these classes says by the target what for.
_GENERAL: Final = frozenset({"multiprocessing.context", "multiprocessing.dummy", "multiprocessing.process"})
_NOTHING: Final = Context()

_on = False


class _Carried:
    """
    A call in the context of whoever asked for it; its result, its exception and the traceback are the call's own.
    """

    __slots__ = ("_call", "_context")

    def __init__(self, context: Context, call: Callable[..., Any]) -> None:
        self._context = context
        self._call = call

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        token = self._enter()
        try:
            return self._call(*args, **kwargs)
        except BaseException as error:
            identity.stash(error)
            if error.__traceback__ is not None:
                # Without this frame; not by assignment, which a frozen exception refuses.
                BaseException.with_traceback(error, error.__traceback__.tb_next)
            raise
        finally:
            identity.detach(token)

    def _enter(self) -> Any:
        return _RUNTIME_CONTEXT.attach(self._context)


def serves_all(worker: object) -> bool:
    """
    Tell whether a library keeps this thread or process for itself.
    """
    kind = type(worker).__module__
    if f"{kind}.".startswith(_CLASSES) and kind not in _GENERAL:
        return True
    target: Any = getattr(worker, "_target", None)
    target = getattr(target, "func", target)  # of a partial, what it calls
    return f"{getattr(target, '__module__', None)}.".startswith(_TARGETS)


class _Run(_Carried):
    """
    ``Thread.run`` of one thread, in the context of whoever started it; gone as soon as it is called.
    """

    __slots__ = ("_replaced", "_thread")

    def __init__(self, context: Context, thread: threading.Thread) -> None:
        super().__init__(context, thread.run)
        self._thread = thread
        self._replaced = vars(thread).get("run")
        vars(thread)["run"] = self

    def _enter(self) -> Any:
        self.take_back()
        return super()._enter()

    def take_back(self) -> None:
        """
        Leave the thread object as it was.
        """
        if self._replaced is None:
            vars(self._thread).pop("run", None)
        else:
            vars(self._thread)["run"] = self._replaced


def _our_start(self: threading.Thread) -> None:
    context = _RUNTIME_CONTEXT.get_current()
    run: _Run | None = None
    if context and _on:
        try:
            theirs = identity.armed(context) if isinstance(self, threading.Timer) else context
            if theirs and not serves_all(self):
                run = _Run(theirs, self)
        except Exception:  # noqa: BLE001 - the user's thread starts all the same
            guard.report("tasks.thread")
    if run is None:
        if not (context and _on and _INHERITS):
            _start.original(self)
            return
        # The interpreter itself would hand the request to a thread that is not to have it.
        token = _RUNTIME_CONTEXT.attach(_NOTHING)
        try:
            _start.original(self)
        finally:
            identity.detach(token)
        return
    try:
        _start.original(self)
    except BaseException:
        run.take_back()
        raise


def _our_submit(self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    context = _RUNTIME_CONTEXT.get_current()
    if not context or not _on or isinstance(self, _OTHER_INTERPRETERS):
        return _submit.original(self, fn, *args, **kwargs)
    # A worker that the pool starts now, of whatever class, is not this request's.
    token = _RUNTIME_CONTEXT.attach(_NOTHING)
    try:
        return _submit.original(self, _Carried(context, fn), *args, **kwargs)
    finally:
        identity.detach(token)


# Since Python 3.14 an interpreter may start every thread in a copy of its starter's context; free-threaded builds do.
_INHERITS: Final = bool(getattr(sys.flags, "thread_inherit_context", False))
# Python 3.14 sends what is submitted to these through pickle.
_OTHER_INTERPRETERS: Final[Any] = getattr(concurrent.futures, "InterpreterPoolExecutor", ())

_start: Final = Patch(threading.Thread, "start")
_submit: Final = Patch(ThreadPoolExecutor, "submit")
_start.ours = functools.update_wrapper(_our_start, _start.original)
_submit.ours = functools.update_wrapper(_our_submit, _submit.original)


def activate() -> None:
    """
    Patch threads and thread pools; a second call changes nothing.
    """
    global _on  # noqa: PLW0603 - one process, one switch
    _on = True
    _start.place()
    _submit.place()


def deactivate() -> None:
    """
    Leave threads and thread pools as they were found; a wrapper that somebody wrapped in turn stays and does nothing.
    """
    global _on  # noqa: PLW0603 - see activate
    _on = False
    _start.remove()
    _submit.remove()
