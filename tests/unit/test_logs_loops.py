"""
What an event loop says of a failed task or callback: under the ids of the request that started it, and no other's.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from typing import TYPE_CHECKING, Any

import pytest
import uvloop
from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, set_span_in_context

from otel_correlation import identity, logs
from otel_correlation.identity import Identity
from otel_correlation.logs import loops
from otel_correlation.settings import Settings
from otel_correlation.tasks import threads

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

FAILED = threading.Event()
RUNNERS = {"asyncio": asyncio.run, "uvloop": uvloop.run}


class Keep(logging.Handler):
    """
    Keeps what the logger of asyncio says.
    """

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def said() -> Iterator[list[logging.LogRecord]]:
    """
    Records of the loop's logger, in a process that has our fields on them.
    """
    keep = Keep()
    logger = logging.getLogger("asyncio")
    level = logger.level
    logger.addHandler(keep)
    logger.setLevel(logging.ERROR)
    logs.install(Settings(service_name="shop"))
    try:
        yield keep.records
    finally:
        logs.uninstall()
        logger.removeHandler(keep)
        logger.setLevel(level)


def ids_of(number: int) -> Context:
    """
    Return the context of a request.
    """
    span = NonRecordingSpan(SpanContext(number, number, is_remote=False))
    return identity.set_in(set_span_in_context(span, Context()), Identity(f"order-{number}"))


async def fail() -> None:
    """
    Raise.
    """
    raise ValueError("boom")


def fail_now() -> None:
    """
    Raise in a callback.
    """
    FAILED.set()
    raise ValueError("boom")


async def forgotten_task(loop: asyncio.AbstractEventLoop) -> Any:
    """
    Start a task that nobody waits for.
    """
    return loop.create_task(fail())


async def forgotten_gather(loop: asyncio.AbstractEventLoop) -> Any:
    """
    Gather what nobody waits for.
    """
    del loop
    return asyncio.gather(asyncio.sleep(0), fail(), fail())


async def callback(loop: asyncio.AbstractEventLoop) -> Any:
    """
    Have the loop call what fails.
    """
    loop.call_soon(fail_now)


async def timer(loop: asyncio.AbstractEventLoop) -> Any:
    """
    Have the loop call it later.
    """
    loop.call_later(0.001, fail_now)


async def as_request(number: int, start: Callable[[asyncio.AbstractEventLoop], Coroutine[Any, Any, Any]]) -> None:
    """
    Start something in one request, and collect the garbage in the middle of another one.
    """
    FAILED.clear()
    token = otel_context.attach(ids_of(number))
    held = [await start(asyncio.get_running_loop())]
    otel_context.detach(token)
    token = otel_context.attach(ids_of(99))
    async with asyncio.timeout(60):
        # Polled: the event is a thread's.
        while not (held[0].done() if isinstance(held[0], asyncio.Future) else FAILED.is_set()):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)  # the loop tells of a callback in the same step as it failed
    held.clear()
    gc.collect()
    otel_context.detach(token)


@pytest.mark.parametrize("start", [forgotten_task, forgotten_gather, callback, timer])
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_failed_task_names_its_own_request(
    said: list[logging.LogRecord], runner: str, start: Callable[..., Any]
) -> None:
    """
    Task, gather, callback and timer, collected while another request runs: the line has the ids of the one that began it.
    """
    loops.watch()
    RUNNERS[runner](as_request(7, start))
    gc.collect()
    assert said
    for record in said:
        found: Any = record
        assert record.exc_info
        assert (found.request_id, found.trace_id) == ("order-7", f"{7:032x}")


async def forgotten_future(loop: asyncio.AbstractEventLoop) -> Any:
    """
    Fail a future that nobody waits for.
    """
    future: asyncio.Future[None] = loop.create_future()
    future.set_exception(ValueError("boom"))
    return future


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_future_of_nobody_names_no_request(said: list[logging.LogRecord], runner: str) -> None:
    """
    A bare future does not know who made it: no ids rather than those of the request that happened to run.
    """
    loops.watch()
    RUNNERS[runner](as_request(7, forgotten_future))
    gc.collect()
    (record,) = said
    found: Any = record
    assert (found.request_id, found.trace_id) == ("", "")


def test_a_future_whose_exception_was_seen_names_its_request(said: list[logging.LogRecord]) -> None:
    """
    An exception that passed our edge tells of its request, whatever holds it.
    """

    async def start(loop: asyncio.AbstractEventLoop) -> Any:
        future: asyncio.Future[None] = loop.create_future()
        error = ValueError("boom")
        identity.stash(error)
        future.set_exception(error)
        return future

    asyncio.run(as_request(7, start))
    gc.collect()
    (record,) = said
    assert record.__dict__["request_id"] == "order-7"


async def forgotten_executor(loop: asyncio.AbstractEventLoop) -> Any:
    """
    Let a thread pool fail for nobody.
    """
    return loop.run_in_executor(None, fail_now)


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_thread_pools_failure_names_its_request(said: list[logging.LogRecord], runner: str) -> None:
    """
    ``run_in_executor`` that nobody waits for: its exception remembers the request that it failed for.
    """
    loops.watch()
    threads.activate()
    try:
        RUNNERS[runner](as_request(7, forgotten_executor))
    finally:
        threads.deactivate()
    gc.collect()
    (record,) = said
    assert record.__dict__["request_id"] == "order-7"


def test_a_hook_for_threads_can_log_under_the_ids(said: list[logging.LogRecord], monkeypatch: Any) -> None:
    """
    What ``docs/how-to/errors.md`` says: a ``threading.excepthook`` that logs has the ids of the thread's request.
    """

    def hook(args: Any) -> None:
        logging.getLogger("asyncio").error("thread", exc_info=(args.exc_type, args.exc_value, args.exc_traceback))

    monkeypatch.setattr(threading, "excepthook", hook)
    threads.activate()
    try:
        token = otel_context.attach(ids_of(7))
        thread = threading.Thread(target=fail_now)
        thread.start()
        otel_context.detach(token)
        thread.join(60)
    finally:
        threads.deactivate()
    (record,) = said
    assert record.__dict__["request_id"] == "order-7"


def test_the_applications_own_handler_runs_under_the_ids(said: list[logging.LogRecord]) -> None:
    """
    ``loop.set_exception_handler`` stays the application's, and what it logs has the ids.
    """
    seen: list[str | None] = []

    async def main() -> None:
        def handler(_loop: Any, _context: dict[str, Any]) -> None:
            seen.append(identity.request_id())

        asyncio.get_running_loop().set_exception_handler(handler)
        await as_request(7, forgotten_task)

    asyncio.run(main())
    gc.collect()
    assert (seen, said) == (["order-7"], [])


def test_what_no_task_is_behind_stays_where_it_is(said: list[logging.LogRecord]) -> None:
    """
    A transport's or a server's own trouble is told where it happens: the current ids are right.
    """

    async def main() -> None:
        token = otel_context.attach(ids_of(7))
        asyncio.get_running_loop().call_exception_handler({"message": "lost", "exception": ValueError("boom")})
        otel_context.detach(token)
        assert identity.request_id() is None

    asyncio.run(main())
    (record,) = said
    assert record.__dict__["request_id"] == "order-7"


def test_a_task_outside_of_a_request_has_no_ids(said: list[logging.LogRecord]) -> None:
    """
    A task of start-up that fails while a request runs is not that request's.
    """

    async def main() -> None:
        task = asyncio.create_task(fail())
        token = otel_context.attach(ids_of(99))
        await asyncio.wait([task])
        del task
        gc.collect()
        otel_context.detach(token)

    asyncio.run(main())
    (record,) = said
    assert record.__dict__["request_id"] == ""


def test_loops_are_left_as_they_were() -> None:
    """
    Installing and uninstalling, twice, leaves each class as it was; what somebody wrapped in turn stays.
    """
    before = (asyncio.BaseEventLoop.__dict__["call_exception_handler"], dict(vars(uvloop.Loop)))
    for _ in range(2):
        loops.watch()
        loops.watch()
        assert asyncio.BaseEventLoop.__dict__["call_exception_handler"] is not before[0]
        assert "call_exception_handler" in vars(uvloop.Loop)
        loops.unwatch()
        assert asyncio.BaseEventLoop.__dict__["call_exception_handler"] is before[0]
        assert dict(vars(uvloop.Loop)) == before[1]


def test_a_wrapper_around_ours_stays(said: list[logging.LogRecord]) -> None:
    """
    Somebody who wrapped the method in turn keeps it, before and after we are gone.
    """
    calls: list[str] = []
    ours: Any = asyncio.BaseEventLoop.call_exception_handler

    def theirs(self: Any, context: dict[str, Any]) -> None:
        calls.append(context["message"])
        ours(self, context)

    asyncio.BaseEventLoop.call_exception_handler = theirs  # type: ignore[method-assign]
    try:
        loops.unwatch()
        assert asyncio.BaseEventLoop.__dict__["call_exception_handler"] is theirs
        loops.watch()
        asyncio.run(as_request(7, callback))
    finally:
        asyncio.BaseEventLoop.call_exception_handler = ours  # type: ignore[method-assign]
    assert len(calls) == len(said) == 1
    assert said[0].__dict__["request_id"] == "order-7"
