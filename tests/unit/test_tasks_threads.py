"""
Threads, timers and pools: whose identity their code has, and that nothing else about them changes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import importlib
import logging.handlers
import multiprocessing.dummy
import multiprocessing.pool
import queue
import subprocess
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import anyio.to_thread
import pytest
from opentelemetry import context as otel_context

from otel_correlation import guard, identity, request_id, tasks, work
from otel_correlation.tasks import threads
from tests.contract.wire import wired

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.contract.wire import Wire

DEADLINE_S = 30.0


@pytest.fixture(autouse=True)
def wire() -> Iterator[Wire]:
    """
    A process that is set up.
    """
    with wired("light", instrument=False) as found:
        tasks.activate(lambda: found.settings)
        yield found
        tasks.deactivate()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """
    A pool of one worker.
    """
    with ThreadPoolExecutor(1) as found:
        yield found


class Kept(threading.Thread):
    """
    A thread with a ``run`` of its own.
    """

    seen: Any = "nothing"

    def run(self) -> None:
        self.seen = request_id()


def in_thread(make: Callable[[Callable[[], None]], threading.Thread]) -> str | None:
    """
    Return the request id that a thread's code sees.
    """
    seen: list[str | None] = []
    thread = make(lambda: seen.append(request_id()))
    thread.start()
    thread.join(DEADLINE_S)
    assert "run" not in vars(thread), "the thread object is as it was"
    return seen[0]


MAKES: dict[str, Callable[[Any], threading.Thread]] = {
    "target": lambda call: threading.Thread(target=call),
    "timer": lambda call: threading.Timer(0, call),
    "partial": lambda call: threading.Thread(target=functools.partial(call)),
    "asyncio": lambda call: threading.Thread(target=asyncio.run, args=(acall(call),)),
    "dummy process": lambda call: multiprocessing.dummy.Process(target=call),
}


async def acall(call: Callable[[], None]) -> None:
    """
    Call.
    """
    call()


@pytest.mark.parametrize("make", MAKES)
def test_a_thread_has_the_identity_of_whoever_starts_it(make: str) -> None:
    """
    What a thread or timer runs has the ids of the place where it was started, and none if that has none.
    """
    with work("tick"):
        assert in_thread(MAKES[make]) == request_id() is not None
    assert in_thread(MAKES[make]) is None


def test_a_subclass_with_a_run_of_its_own() -> None:
    """
    A thread class that overrides ``run`` is covered, too.
    """
    thread = Kept()
    with work("tick"):
        rid = request_id()
        thread.start()
    thread.join(DEADLINE_S)
    assert thread.seen == rid


def test_start_counts_and_not_construction() -> None:
    """
    A thread that was made outside and is started inside has the ids; the other way round it has none.
    """
    made_outside = Kept()
    with work("tick"):
        rid = request_id()
        made_inside = Kept()
        made_outside.start()
    made_inside.start()
    made_outside.join(DEADLINE_S)
    made_inside.join(DEADLINE_S)
    assert (made_outside.seen, made_inside.seen) == (rid, None)


def test_a_thread_outlives_its_request() -> None:
    """
    A thread keeps the ids of its request after that has ended, while others run.
    """
    release = threading.Event()
    seen: list[str | None] = []

    def late() -> None:
        release.wait(DEADLINE_S)
        seen.append(request_id())

    thread = threading.Thread(target=late)
    with work("first"):
        rid = request_id()
        thread.start()
    with work("second"):
        release.set()
        thread.join(DEADLINE_S)
    assert seen == [rid]


def test_a_thread_that_cannot_start_is_left_as_it_was() -> None:
    """
    Where ``start`` raises, it raises the same, and the thread object is untouched.
    """
    thread = Kept()
    thread.start()
    thread.join(DEADLINE_S)
    with work("tick"), pytest.raises(RuntimeError, match="once"):
        thread.start()
    assert "run" not in vars(thread)


def test_a_run_that_somebody_put_on_the_object_stays() -> None:
    """
    A ``run`` that was set on the thread object itself is what runs, and is there afterwards.
    """
    seen: list[str | None] = []

    def mine() -> None:
        seen.append(request_id())

    thread: Any = threading.Thread()
    thread.run = mine
    with work("tick"):
        rid = request_id()
        thread.start()
        thread.join(DEADLINE_S)
    assert seen == [rid]
    assert thread.run is mine


def test_our_failure_does_not_cost_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A thread that we cannot look at runs all the same.
    """

    class Odd(Kept):
        @property
        def _target(self) -> Any:
            raise ValueError("odd")

        @_target.setter
        def _target(self, value: Any) -> None:
            return

        @_target.deleter
        def _target(self) -> None:
            return

    monkeypatch.delenv(guard.STRICT_ENV)
    thread = Odd()
    with work("tick"):
        thread.start()
        thread.join(DEADLINE_S)
    assert thread.seen is None
    assert guard.counters()["internal_error.tasks.thread"] == 1


def test_an_uncaught_exception_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    ``threading.excepthook`` gets the user's exception, without a frame of ours, with the ids on it.
    """
    caught: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", caught.append)
    error = LookupError("gone")

    def fail() -> None:
        raise error

    with work("tick"):
        rid = request_id()
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join(DEADLINE_S)
    (hooked,) = caught
    assert hooked.exc_value is error
    assert hooked.thread is thread
    assert frames(error) == ["_bootstrap_inner", "run", "fail"]
    stashed = identity.stashed(error)
    assert stashed is not None
    assert stashed[3] == rid


def frames(error: BaseException | None) -> list[str]:
    """
    Return the names of the functions in a traceback.
    """
    assert error is not None
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


def test_pools(pool: ThreadPoolExecutor) -> None:
    """
    Each task has the ids of whoever submitted it, by ``submit``, ``map`` and ``run_in_executor``; others have none.
    """

    async def run_in_executor() -> str | None:
        return await asyncio.get_running_loop().run_in_executor(pool, request_id)

    for _ in range(2):
        with work("tick"):
            rid = request_id()
            assert pool.submit(request_id).result(DEADLINE_S) == rid
            assert list(pool.map(lambda _: request_id(), range(3))) == [rid] * 3
            assert asyncio.run(run_in_executor()) == rid
        assert pool.submit(request_id).result(DEADLINE_S) is None
        assert list(pool.map(lambda _: request_id(), range(3))) == [None] * 3
        assert asyncio.run(run_in_executor()) is None


def test_a_worker_keeps_nothing_of_the_request_that_started_it() -> None:
    """
    A worker thread that a request started has no context of its own: not in its initializer, not between tasks.
    """
    seen: list[str | None] = []
    with ThreadPoolExecutor(1, initializer=lambda: seen.append(request_id())) as pool:
        with work("tick"):
            pool.submit(request_id).result(DEADLINE_S)
        pool.submit(lambda: seen.append(request_id())).result(DEADLINE_S)
        assert pool.submit(otel_context.get_current).result(DEADLINE_S) == {}
    assert seen == [None, None]


def test_a_pool_with_workers_of_its_own() -> None:
    """
    A pool that starts worker threads of the user's own class does not hand them the request that it is in.
    """

    class Worker(threading.Thread):
        def __init__(self, pool: Any) -> None:
            super().__init__(daemon=True)
            self.items = pool._work_queue
            # Since Python 3.14 a task is run in a context of its worker.
            self.contexts = [pool._create_worker_context()] if hasattr(pool, "_create_worker_context") else []
            self.seen: list[str | None] = []

        def run(self) -> None:
            self.seen.append(request_id())
            self.items.get().run(*self.contexts)
            self.seen.append(request_id())

    class Pool(ThreadPoolExecutor):
        def _adjust_thread_count(self) -> None:
            self.worker = Worker(self)
            self.worker.start()

    pool = Pool(1)
    with work("tick"):
        assert pool.submit(request_id).result(DEADLINE_S) == request_id()
    pool.worker.join(DEADLINE_S)
    assert pool.worker.seen == [None, None]


def test_what_a_pools_thread_knows_stays(pool: ThreadPoolExecutor) -> None:
    """
    Context variables that belong to a worker thread are seen by its tasks, and what a task sets stays there.
    """
    variable = contextvars.ContextVar("variable", default=0)
    pool.submit(variable.set, 1).result(DEADLINE_S)
    with work("tick"):
        assert pool.submit(variable.get).result(DEADLINE_S) == 1
        pool.submit(variable.set, 2).result(DEADLINE_S)
    assert pool.submit(variable.get).result(DEADLINE_S) == 2


def test_a_users_own_context_wins(pool: ThreadPoolExecutor) -> None:
    """
    Code that submits ``copy_context().run`` itself gets the context that it copied.
    """
    with work("first"):
        first, context = request_id(), contextvars.copy_context()
    with work("second"):
        assert pool.submit(context.run, request_id).result(DEADLINE_S) == first
        assert pool.submit(contextvars.copy_context().run, request_id).result(DEADLINE_S) == request_id()
    assert pool.submit(context.run, request_id).result(DEADLINE_S) == first


def test_exceptions_of_tasks_are_the_same(pool: ThreadPoolExecutor) -> None:
    """
    A task's exception is the user's object, with the traceback that it has without us.
    """
    error = LookupError("gone")

    def fail() -> None:
        raise error

    plain = frames(pool.submit(int, "x").exception(DEADLINE_S))
    with work("tick"):
        assert pool.submit(fail).exception(DEADLINE_S) is error
        builtin = pool.submit(int, "x").exception(DEADLINE_S)
    assert frames(error) == [*plain, "fail"]
    assert frames(builtin) == plain
    assert set(plain) == {"run"}  # The pool's own: one until Python 3.13, two since.


@dataclass(frozen=True)
class FrozenError(Exception):
    """
    An exception that lets nobody set its attributes.
    """

    code: int


def test_a_frozen_exception_of_a_task_is_the_same(pool: ThreadPoolExecutor) -> None:
    """
    A frozen dataclass that is raised in a task arrives, with its traceback, and not an error about its being frozen.
    """
    error = FrozenError(7)

    def fail() -> None:
        raise error

    plain = frames(pool.submit(int, "x").exception(DEADLINE_S))
    with work("tick"):
        assert pool.submit(fail).exception(DEADLINE_S) is error
    assert frames(error) == [*plain, "fail"]


class OwnTraceback(Exception):  # noqa: N818
    """
    An exception with a method of its own where others have Python's.
    """

    def with_traceback(self, trace: Any, note: str) -> Self:  # type: ignore[override]
        """
        Want one argument more.
        """
        return self


def test_an_exception_of_a_task_keeps_its_own_methods(pool: ThreadPoolExecutor) -> None:
    """
    Whatever an exception's class has made of ``with_traceback``, the task's exception is that one.
    """

    def fail() -> None:
        raise OwnTraceback

    with work("tick"):
        assert type(pool.submit(fail).exception(DEADLINE_S)) is OwnTraceback


def test_cancelling(pool: ThreadPoolExecutor) -> None:
    """
    A task that has not started can be cancelled; its function is not called.
    """
    release = threading.Event()
    called: list[int] = []
    with work("tick"):
        pool.submit(release.wait, DEADLINE_S)
        waiting = pool.submit(called.append, 1)
        assert waiting.cancel()
    release.set()
    with pytest.raises(concurrent.futures.CancelledError):
        waiting.result(DEADLINE_S)
    assert called == []


def test_keyword_arguments_are_the_tasks(pool: ThreadPoolExecutor) -> None:
    """
    Any keyword is the function's, ``fn`` and ``self``, too.
    """
    with work("tick"):
        result = pool.submit(dict, fn=1, self=2, context=3).result(DEADLINE_S)
    assert result == {"fn": 1, "self": 2, "context": 3}


class Idle(ThreadPoolExecutor):
    """
    A pool that starts nothing.
    """

    def _adjust_thread_count(self) -> None:
        return


def test_outside_nothing_is_wrapped() -> None:
    """
    Without a request the pool gets the very function, and a thread object is not touched.
    """
    idle = Idle(1)
    idle.submit(request_id)
    item = idle._work_queue.get_nowait()
    function = getattr(item, "fn", None) or item.task[0]  # type: ignore[attr-defined] # another name since Python 3.14
    assert function is request_id
    thread = Kept()
    ran: list[Any] = []
    thread.run = lambda: ran.append(vars(thread)["run"])  # type: ignore[method-assign]
    thread.start()
    thread.join(DEADLINE_S)
    assert ran == [thread.run]


def test_threads_that_serve_everybody() -> None:
    """
    Threads that libraries keep for themselves have no ids, although a request was the first to need them.
    """
    seen: list[str | None] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(request_id())

    async def in_anyio() -> Any:
        return await anyio.to_thread.run_sync(lambda: contextvars.Context().run(request_id))

    records: queue.SimpleQueue[Any] = queue.SimpleQueue()
    listener = logging.handlers.QueueListener(records, Handler())
    with work("tick"):
        listener.start()
        thread_pool = multiprocessing.pool.ThreadPool(1)
        assert asyncio.run(in_anyio()) is None
    records.put(logging.makeLogRecord({}))
    listener.stop()
    with thread_pool:
        assert thread_pool.apply(request_id) is None
    assert seen == [None]


_INHERITING = """
import threading
from otel_correlation import bootstrap, request_id, work
bootstrap(traces_exporters=())
seen = {}
def first():
    ended.wait()
    seen["armed once"] = request_id()
    timer = threading.Timer(0, lambda: seen.update(again=request_id()))
    timer.start()
    timer.join()
ended = threading.Event()
with work("tick"):
    mine = request_id()
    plain = threading.Thread(target=lambda: seen.update(plain=request_id()))
    plain.start(); plain.join()
    served = threading.Thread(target=lambda: seen.update(served=request_id()))
    served._target.__module__ = "sentry_sdk.worker"
    served.start(); served.join()
    chain = threading.Timer(0, first)
    chain.start()
ended.set()
chain.join()
print(seen == {"plain": mine, "served": None, "armed once": mine, "again": None}, seen, mine)
"""


@pytest.mark.skipif(sys.version_info < (3, 14), reason="an option of Python 3.14")
@pytest.mark.parametrize("inherits", [0, 1])
def test_an_interpreter_that_hands_contexts_to_threads(inherits: int) -> None:
    """
    Where each thread starts in a copy of its starter's context, the same threads have a request's ids, and no others.
    """
    command = [sys.executable, "-X", f"thread_inherit_context={inherits}", "-c", _INHERITING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "\nTrue " in done.stdout, done.stdout + done.stderr


def test_switching_off_and_on(wire: Wire) -> None:
    """
    Activation is idempotent, and switching off leaves the very methods that were there; one setting does it.
    """
    ours = threading.Thread.start, ThreadPoolExecutor.submit
    tasks.activate(lambda: wire.settings)
    assert (threading.Thread.start, ThreadPoolExecutor.submit) == ours
    wire.configure(patch_threads=False)
    tasks.activate(lambda: wire.settings)
    assert (threading.Thread.start, ThreadPoolExecutor.submit) == (threads._start.original, threads._submit.original)
    assert threading.Thread.start.__module__ == "threading"
    with work("tick"), ThreadPoolExecutor(1) as pool:
        assert in_thread(MAKES["target"]) is None
        assert pool.submit(request_id).result(DEADLINE_S) is None
    wire.configure(patch_threads=True)
    tasks.activate(lambda: wire.settings)
    with work("tick"):
        assert in_thread(MAKES["target"]) == request_id()


def test_somebody_wraps_us(monkeypatch: pytest.MonkeyPatch, wire: Wire) -> None:
    """
    A patch of somebody else's around ours stays when we go, works, and is not doubled when we come back.
    """
    calls: list[str] = []
    ours = ThreadPoolExecutor.submit

    def theirs(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        calls.append("theirs")
        return ours(self, *args, **kwargs)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", theirs)
    with work("tick"), ThreadPoolExecutor(1) as pool:
        tasks.deactivate()
        assert ThreadPoolExecutor.submit is theirs
        assert pool.submit(request_id).result(DEADLINE_S) is None
        tasks.activate(lambda: wire.settings)
        assert pool.submit(request_id).result(DEADLINE_S) == request_id()
    assert calls == ["theirs", "theirs"]


def test_contribs_way_of_doing_it_beside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Beside another instrumentation that carries contexts the same way, ids are right and workers keep none.
    """
    start, run = threading.Thread.start, threading.Thread.run

    def their_start(self: Any) -> None:
        self._otel_context = otel_context.get_current()
        start(self)

    def their_run(self: Any) -> None:
        token = otel_context.attach(self._otel_context)
        try:
            run(self)
        finally:
            otel_context.detach(token)

    monkeypatch.setattr(threading.Thread, "start", their_start)
    monkeypatch.setattr(threading.Thread, "run", their_run)
    with ThreadPoolExecutor(1) as pool:
        with work("tick"):
            assert in_thread(MAKES["target"]) == request_id()
            assert pool.submit(request_id).result(DEADLINE_S) == request_id()
        assert pool.submit(request_id).result(DEADLINE_S) is None


def test_contribs_own_is_not_loaded_beside_ours(monkeypatch: pytest.MonkeyPatch, wire: Wire) -> None:
    """
    ``opentelemetry-instrument`` leaves contrib's threading instrumentation out while ours is on.
    """
    bootstrap: Any = importlib.import_module("otel_correlation.bootstrap")
    loaded: list[str] = []
    entry = SimpleNamespace(
        name="threading",
        value="opentelemetry.instrumentation.threading:ThreadingInstrumentor",
        load=lambda: lambda: SimpleNamespace(instrument=lambda **_: loaded.append("threading")),
    )
    for patch_threads in (True, False):
        wire.configure(patch_threads=patch_threads)
        monkeypatch.setattr(bootstrap._state, "settings", wire.settings)
        bootstrap.Distro().load_instrumentor(entry)
    assert loaded == ["threading"]


def test_two_hundred_requests_over_one_pool() -> None:
    """
    Many requests at once over few pooled threads: no task sees another's ids.
    """

    async def one(pool: ThreadPoolExecutor) -> bool:
        loop = asyncio.get_running_loop()
        with work("request"):
            rid = request_id()
            seen = [await loop.run_in_executor(pool, request_id)]
            seen += await asyncio.gather(*[loop.run_in_executor(pool, request_id) for _ in range(3)])
            seen += list(await asyncio.to_thread(lambda: list(pool.map(lambda _: request_id(), range(2)))))
        return seen == [rid] * 6

    async def run() -> list[bool]:
        with ThreadPoolExecutor(4) as pool:
            return await asyncio.gather(*[one(pool) for _ in range(200)])

    assert all(asyncio.run(run()))
