"""
Whose identity the garbage collector's finalizers have: nobody's.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import subprocess
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import context as otel_context

from otel_correlation import request_id, tasks, work
from tests.contract.wire import wired

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.contract.wire import Wire

# Collections in the middle of nearly every change of a context, in four threads, with finalizers that change contexts themselves.
STRESS = """
import contextvars, gc, sys, threading
from opentelemetry import context
from otel_correlation import bootstrap, request_id, work

bootstrap()
own = contextvars.ContextVar("own", default=0)

class Loop:
    def __init__(self):
        self.me = self
    def __del__(self):
        if request_id():
            wrong.append(request_id())
        context.detach(context.attach(context.set_value("a", 1)))

wrong = []
gc.set_threshold(1, 1, 1)

def one(name):
    for turn in range(300):
        with work(name) as begun:
            mine = request_id()
            Loop()
            own.set(turn)
            token = context.attach(context.set_value("turn", turn))
            Loop()
            contextvars.copy_context().run(own.set, -1)
            if (own.get(), context.get_value("turn"), request_id()) != (turn, turn, mine):
                wrong.append((name, turn))
            context.detach(token)
            if request_id() != mine:
                wrong.append((name, turn, "after"))

threads = [threading.Thread(target=one, args=(f"w{number}",)) for number in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
gc.set_threshold(0)
sys.exit(str(wrong[:3]) if wrong else 0)
"""


# As Celery's time limits: a signal's handler raises, most often while a collection of a big heap runs.
SIGNALS = """
import gc, random, signal, sys, time
from otel_correlation import bootstrap, request_id, work

bootstrap()
heap = [[number] for number in range(1_000_000)]

class Limit(Exception):
    pass

def limit(*_):
    raise Limit

signal.signal(signal.SIGALRM, limit)
missed = foreign = 0
for turn in range(30):
    begun = time.monotonic()
    foreign += request_id() is not None
    interrupted = False
    try:
        with work("task"):
            mine = request_id()
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.001, 0.02))
            while time.monotonic() < begun + 60:
                gc.collect()
                foreign += request_id() != mine
    except Limit:
        interrupted = time.monotonic() < begun + 60
    missed += not interrupted
    if missed:
        break
sys.exit(f"missed {missed}, foreign {foreign}" if missed or foreign else 0)
"""


@pytest.fixture(autouse=True)
def wire() -> Iterator[Wire]:
    """
    A process that is set up.
    """
    with wired("light", instrument=False) as found:
        tasks.activate(lambda: found.settings)
        yield found
        tasks.deactivate()


class Abandoned:
    """
    A generator that only the garbage collector can end, because it is part of a cycle.
    """

    def __init__(self, ended: list[str | None]) -> None:
        self._rows = self._read(ended)
        next(self._rows)

    def _read(self, ended: list[str | None]) -> Iterator[int]:
        try:
            yield 1
        finally:
            ended.append(request_id())


def test_a_collected_generator_has_no_foreign_ids() -> None:
    """
    The ``finally`` of a generator that is collected inside another request has no ids; that request keeps its own.
    """
    ended: list[str | None] = []
    with work("one"):
        Abandoned(ended)
    with work("another"):
        mine = request_id()
        gc.collect()
        assert ended == [None]
        assert request_id() == mine


@pytest.mark.anyio
async def test_a_collected_asynchronous_generator_has_no_foreign_ids() -> None:
    """
    ``asyncio`` ends a collected asynchronous generator in a task, which has no ids of whoever was collecting.
    """
    ended: asyncio.Queue[str | None] = asyncio.Queue()

    async def rows(_cycle: list[Any]) -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            ended.put_nowait(request_id())

    async def abandon() -> None:
        cycle: list[Any] = []
        cycle.append(rows(cycle))
        await anext(cycle[0])

    with work("one"):
        await asyncio.create_task(abandon())
    with work("another"):
        gc.collect()
        assert await asyncio.wait_for(ended.get(), 30) is None


def test_a_collection_in_any_thread_leaves_the_context_as_it_was() -> None:
    """
    Values of the context other than ours are there again after a collection, in the thread that ran it and in others.
    """
    seen: list[object] = []

    def inside() -> None:
        otel_context.attach(otel_context.set_value("mine", threading.get_ident()))
        gc.collect()
        seen.append(otel_context.get_value("mine") == threading.get_ident())

    threads = [threading.Thread(target=inside) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True, True, True]


def test_a_collection_keeps_no_context() -> None:
    """
    What the variables of interrupted contexts held is free after some more collections.
    """
    held = contextvars.ContextVar[object]("held")

    class Value:
        pass

    def inside(value: Value) -> None:
        held.set(value)
        with work("one"):
            gc.collect()

    values = []
    for _ in range(20):
        value = Value()
        values.append(weakref.ref(value))
        contextvars.copy_context().run(inside, value)
    del value
    gc.collect()
    assert sum(value() is not None for value in values) <= 5


def test_a_signal_during_a_collection_reaches_the_program() -> None:
    """
    What a signal's handler raises arrives, whenever the signal comes, and the identity is right before and after.
    """
    ended = subprocess.run([sys.executable, "-c", SIGNALS], capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]


def test_switched_off_it_is_gone() -> None:
    """
    After ``deactivate`` collections are as Python has them, and two ``activate`` are one.
    """
    before = list(gc.callbacks)
    tasks.garbage.activate()
    assert gc.callbacks == before
    tasks.deactivate()
    assert len(gc.callbacks) == len(before) - 1


def test_collections_within_changes_of_the_context() -> None:
    """
    With a collection at nearly every allocation no context is mixed up, no finalizer sees an identity, nothing crashes.
    """
    ended = subprocess.run([sys.executable, "-c", STRESS], capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
