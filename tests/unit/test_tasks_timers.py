"""
Timers of event loops and ``detached()``: whose identity their code has, and that nothing else about them changes.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from typing import TYPE_CHECKING, Any

import anyio.to_thread
import pytest
import uvloop
from fastapi import FastAPI, WebSocket
from opentelemetry import baggage, trace
from opentelemetry import context as otel_context
from starlette.testclient import TestClient

from otel_correlation import bind, continue_from, detached, guard, identity, request_id, tasks, work
from otel_correlation.tasks import timers
from tests.contract.wire import wired

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from tests.contract.wire import Wire

DEADLINE_S = 30.0
Run = Any


@pytest.fixture(autouse=True)
def wire() -> Iterator[Wire]:
    """
    A process that is set up.
    """
    with wired("light") as found:
        tasks.activate(lambda: found.settings)
        yield found
        tasks.deactivate()


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """
    Runs a coroutine on either kind of event loop, for at most half a minute.
    """
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop

    def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(asyncio.wait_for(coroutine, DEADLINE_S))

    return run


async def enough(seen: list[Any], count: int) -> None:
    """
    Wait for so many entries; threads may add them, too.
    """
    while len(seen) < count:  # noqa: ASYNC110 - an event of asyncio is none for threads
        await asyncio.sleep(0.001)


class Ticks:
    """
    What each turn of a chain saw, and a way to wait for the next one.
    """

    def __init__(self) -> None:
        self.seen: list[str | None] = []
        self.loop = asyncio.get_running_loop()

    def note(self) -> None:
        self.seen.append(request_id())

    async def until(self, count: int) -> list[str | None]:
        await enough(self.seen, count)
        return self.seen


def test_a_chain_keeps_its_request_while_that_runs_and_no_longer(run: Run) -> None:
    """
    Every turn that is armed while the request runs has its ids, the first one after it, too; the others have none.
    """

    async def main() -> None:
        ticks = Ticks()

        def turn() -> None:
            ticks.note()
            ticks.loop.call_later(0.001, turn)

        with work("request"):
            rid = request_id()
            ticks.loop.call_later(0.001, turn)
            during = len(await ticks.until(3))
        after = await ticks.until(during + 4)
        assert after[:during] == [rid] * during
        assert after[during + 1 :] == [None] * (len(after) - during - 1)

    run(main())


def test_what_is_armed_after_the_end_by_no_timer_is_its_requests(run: Run) -> None:
    """
    A task of the request that runs on may arm once, and so may what that calls, for itself.
    """

    async def main() -> None:
        ticks, over = Ticks(), asyncio.Event()

        async def runs_on() -> None:
            await over.wait()
            ticks.loop.call_soon(ticks.loop.call_later, 0.001, ticks.note)
            await asyncio.sleep(0.001)
            async with asyncio.timeout(DEADLINE_S):
                await asyncio.sleep(0.001)
            ticks.note()

        with work("request"):
            rid = request_id()
            task = asyncio.create_task(runs_on())
        over.set()
        await task
        assert await ticks.until(2) == [rid, rid]

    run(main())


def test_a_task_of_a_timer_keeps_its_ids_to_its_end(run: Run) -> None:
    """
    A reminder may be a task that sleeps, calls into threads and makes tasks: all of it is the request's.
    """

    async def main() -> None:
        done = asyncio.get_running_loop().create_future()

        async def remind() -> None:
            seen = [request_id()]
            await asyncio.sleep(0.001)
            seen.append(await asyncio.to_thread(request_id))
            seen.append(await anyio.to_thread.run_sync(request_id))
            with anyio.fail_after(DEADLINE_S):
                seen.append(await asyncio.create_task(now()))
            done.set_result([*seen, request_id()])

        async def now() -> str | None:
            await asyncio.sleep(0)
            return request_id()

        loop = asyncio.get_running_loop()
        with work("request"):
            rid = request_id()
            loop.call_later(0.001, lambda: seen.append(loop.create_task(remind())))
        seen: list[Any] = []
        assert await done == [rid] * 5

    run(main())


def test_work_of_a_timer_is_its_own(run: Run) -> None:
    """
    An identity that a turn gives itself is its timers' for one time, whoever armed the turn.
    """

    async def main() -> None:
        ticks = Ticks()
        ids: list[str | None] = []

        def turn() -> None:
            with work("turn"):
                ids.append(request_id())
                ticks.loop.call_later(0.001, ticks.note)

        with work("request"):
            ticks.loop.call_later(0.001, turn)
        assert await ticks.until(1) == ids

    run(main())


def test_nothing_of_the_request_is_left(run: Run) -> None:
    """
    What is armed again has no span, no baggage and no bound fields; the application's own variables stay.
    """
    own = contextvars.ContextVar("own", default="")

    async def main() -> tuple[Any, ...]:
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def second() -> None:
            done.set_result((dict(otel_context.get_current()), trace.get_current_span(), own.get()))

        with work("request"):
            bind(user="ada")
            own.set("mine")
            token = otel_context.attach(baggage.set_baggage("tenant", "acme"))
            loop.call_later(0.001, loop.call_later, 0.001, second)
            otel_context.detach(token)
        found: tuple[Any, ...] = await done
        return found

    assert run(main()) == ({}, trace.INVALID_SPAN, "mine")


@pytest.mark.parametrize("full", [True, False])
def test_a_context_that_the_caller_passes_is_used(run: Run, full: bool) -> None:
    """
    ``context=`` is the caller's own decision, for each way to arm, an empty one, too.
    """

    async def main() -> None:
        loop = asyncio.get_running_loop()
        variable = contextvars.ContextVar("variable", default="")
        variable.set("mine")
        context = contextvars.copy_context() if full else contextvars.Context()
        seen: list[tuple[str, str | None]] = []

        def see() -> None:
            seen.append((variable.get(), request_id()))

        with work("request"):
            loop.call_later(0.001, see, context=context)
            loop.call_at(loop.time(), see, context=context)
            loop.call_soon_threadsafe(see, context=context)
        await enough(seen, 3)
        assert seen == [("mine" if full else "", None)] * 3

    run(main())


def test_work_that_another_thread_hands_to_the_loop_keeps_its_ids(run: Run) -> None:
    """
    What a timer's thread hands over after the end of the request is its reminder still, by both ways to do it.
    """

    async def main() -> None:
        ticks, over = Ticks(), threading.Event()

        async def remind() -> None:
            ticks.note()

        def hand_over() -> None:
            over.wait(DEADLINE_S)
            ticks.loop.call_soon_threadsafe(ticks.note)
            asyncio.run_coroutine_threadsafe(remind(), ticks.loop)

        with work("request"):
            rid = request_id()
            threading.Timer(0, hand_over).start()
        over.set()
        assert await ticks.until(2) == [rid, rid]

    run(main())


def test_a_timers_thread_that_starts_threads_and_timers() -> None:
    """
    Of a ``Timer`` that fires after the end, its own threads have the ids; another timer has none.
    """
    over, done = threading.Event(), threading.Event()
    seen: dict[str, str | None] = {}

    def first() -> None:
        over.wait(DEADLINE_S)
        seen["first"] = request_id()
        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join(DEADLINE_S)

    def in_thread() -> None:
        seen["thread"] = request_id()
        threading.Timer(0, second).start()

    def second() -> None:
        seen["second"] = request_id()
        done.set()

    with work("request"):
        rid = request_id()
        threading.Timer(0, first).start()
    over.set()
    assert done.wait(DEADLINE_S)
    assert seen == {"first": rid, "thread": rid, "second": None}


def test_a_websockets_timers_are_its_own_until_it_closes() -> None:
    """
    A heartbeat of a connection has its ids for as long as that is open, and none after it.
    """
    app = FastAPI()
    seen: list[str | None] = []
    closed, after = threading.Event(), threading.Event()

    def beat() -> None:
        was_closed = closed.is_set()
        seen.append(request_id())
        if was_closed and seen[-1] is None:
            after.set()
            return
        asyncio.get_running_loop().call_later(0.001, beat)

    @app.websocket("/ws")
    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        beat()
        await enough(seen, 5)
        await socket.send_json(seen[:5])
        await socket.close()

    with TestClient(app) as client:
        with client.websocket_connect("/ws", headers={"x-request-id": "order-7781-customer-quote"}) as socket:
            assert socket.receive_json() == ["order-7781-customer-quote"] * 5
        closed.set()
        assert after.wait(DEADLINE_S)


def test_a_messages_timers_end_with_it(run: Run) -> None:
    """
    What ``continue_from`` continued has ended with its block, as a request has.
    """

    async def main() -> None:
        ticks = Ticks()

        def turn() -> None:
            ticks.note()
            ticks.loop.call_later(0.001, turn)

        with continue_from({"X-Request-ID": "order-7781-customer-quote"}, "process"):
            ticks.loop.call_later(0, turn)
        seen = await ticks.until(4)
        assert seen[0] == "order-7781-customer-quote"
        assert seen[1:4] == [None] * 3

    run(main())


def test_detached(wire: Wire, run: Run) -> None:
    """
    In a detached block there is no request: not for spans, lines, tasks, threads and timers; afterwards there is again.
    """

    async def main() -> None:
        ticks = Ticks()

        async def task() -> None:
            ticks.note()
            ticks.loop.call_later(0.001, ticks.note)

        with work("request"):
            rid = request_id()
            with detached():
                assert request_id() is None
                assert bind(user="ada") is None  # type: ignore[func-returns-value]
                wire.provider.get_tracer("jobs").start_span("own").end()
                started = asyncio.create_task(task())
                thread = threading.Thread(target=ticks.note)
                with work("inside"), detached(), detached():
                    assert request_id() is None
            assert request_id() == rid
            thread.start()  # counts where it is started, as ever
            await started
        thread.join(DEADLINE_S)
        seen = await ticks.until(3)
        assert sorted(seen, key=str) == sorted([None, None, rid], key=str)

    run(main())
    spans = {span.name: span for span in wire.spans}
    own, request = spans["own"], spans["request"]
    assert own.parent is None
    assert own.context.trace_id != request.context.trace_id
    assert "request_id" not in (own.attributes or {})


def test_detached_lets_errors_through_and_is_no_decorator() -> None:
    """
    What is raised in the block passes, and the request is back; a decorator, which a coroutine would run out of, it is not.
    """
    with work("request"):
        rid = request_id()
        with pytest.raises(LookupError), detached():
            raise LookupError
        assert request_id() == rid
    with pytest.raises(TypeError):
        detached()(print)  # type: ignore[operator]


def test_detached_in_a_process_that_is_not_set_up() -> None:
    """
    Without a set-up it does nothing, and harms nothing.
    """
    tasks.deactivate()
    with detached():
        assert request_id() is None


def test_switching_off_and_on(wire: Wire) -> None:
    """
    Activation is idempotent, and switching off leaves the very methods that were there; one setting does it.
    """
    names: set[tuple[type, str]] = {(asyncio.BaseEventLoop, "call_at"), (asyncio.BaseEventLoop, "call_soon_threadsafe")}
    names |= {(uvloop.Loop, "call_later"), (uvloop.Loop, "call_soon_threadsafe")}
    ours = {(owner, name): getattr(owner, name) for owner, name in names}
    tasks.activate(lambda: wire.settings)
    assert {(owner, name): getattr(owner, name) for owner, name in names} == ours
    wire.configure(patch_threads=False)
    tasks.activate(lambda: wire.settings)
    assert not {"call_later", "call_at", "call_soon_threadsafe"} & set(vars(uvloop.Loop))
    assert all(getattr(owner, name) is not ours[owner, name] for owner, name in names)
    assert asyncio.BaseEventLoop.call_at.__code__.co_filename == asyncio.base_events.__file__
    wire.configure(patch_threads=True)
    tasks.activate(lambda: wire.settings)
    assert {(owner, name): getattr(owner, name) for owner, name in names} == ours


def test_our_failure_does_not_cost_a_timer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A callback that we cannot look at is armed all the same, and runs.
    """
    monkeypatch.delenv(guard.STRICT_ENV)

    def fail(_context: object) -> None:
        raise LookupError

    monkeypatch.setattr(identity, "armed", fail)

    async def main() -> None:
        called = asyncio.Event()
        with work("request"):
            asyncio.get_running_loop().call_later(0.001, called.set)
        await called.wait()

    run(main())
    assert guard.counters()["internal_error.tasks.timer"] == 1


def test_a_wrong_call_is_the_loops_own_error(run: Run) -> None:
    """
    What the event loop refuses it refuses as ever, and keywords are its own.
    """

    async def main() -> None:
        loop: Any = asyncio.get_running_loop()
        with work("request"):
            called = asyncio.Event()
            loop.call_later(delay=0.001, callback=called.set)
            await called.wait()
            with pytest.raises(TypeError):
                loop.call_later()
            with pytest.raises(TypeError):
                loop.call_later(1, called.set, key="word")

    run(main())


def test_outside_nothing_is_copied(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Without a request, and for a wait inside one, nothing is done about a timer.
    """
    made: list[contextvars.Context] = []

    def copied() -> contextvars.Context:
        made.append(contextvars.copy_context())
        return made[-1]

    monkeypatch.setattr(timers, "copy_context", copied)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(0, len, "")
        with work("request"):
            await asyncio.sleep(0.001)
            async with asyncio.timeout(1):
                await asyncio.sleep(0)
            with anyio.fail_after(1):
                await anyio.sleep(0.001)

    run(main())
    assert made == []
