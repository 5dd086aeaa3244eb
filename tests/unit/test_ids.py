"""
Trace and span ids, the one-shot slot for a given trace id, and the guard against endless traces.
"""

from __future__ import annotations

import contextvars
import multiprocessing
import os
import random
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator

from otel_correlation import ids
from otel_correlation.ids import (
    CorrelationIdGenerator,
    ReuseGuard,
    given_trace_id,
    random_span_id,
    random_trace_id,
    was_given,
)

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from opentelemetry.trace import Span

GIVEN = 0x0123456789ABCDEF0123456789ABCDEF


class Scripted(random.Random):
    """
    A source that returns what the test says.
    """

    def __init__(self, *values: int) -> None:
        super().__init__()
        self.values = list(values)

    def getrandbits(self, k: int, /) -> int:
        return self.values.pop(0)


class Clock:
    """
    A clock that stands until the test moves it.
    """

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Counting(IdGenerator):
    """
    The id generator of somebody else.
    """

    def generate_span_id(self) -> int:
        return 11

    def generate_trace_id(self) -> int:
        return 22

    def is_trace_id_random(self) -> bool:
        return False


def trace_id_of(span: Span) -> int:
    """
    The trace id of a span.
    """
    return span.get_span_context().trace_id


class TestRandomIds:
    def test_never_zero(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """
        A zero from the source is not an id: the next value is taken.
        """
        monkeypatch.setattr(ids, "_random", Scripted(0, 0, 7, 0, 9))
        assert (random_trace_id(), random_span_id()) == (7, 9)

    def test_width(self) -> None:
        """
        Trace ids use all 128 bits and span ids all 64, and do not repeat.
        """
        traces = {random_trace_id() for _ in range(2_000)}
        spans = {random_span_id() for _ in range(2_000)}
        assert (len(traces), len(spans)) == (2_000, 2_000)
        ones, bits = 0, 0
        for value in traces:
            ones |= value
            bits |= ~value
        assert ones == 2**128 - 1
        assert bits & (2**128 - 1) == 2**128 - 1
        assert max(spans).bit_length() == 64

    def test_a_user_seed_changes_nothing(self) -> None:
        """
        random.seed(42) in user code does not repeat ids, and our ids do not disturb the user's numbers.
        """
        state = random.getstate()
        try:
            random.seed(42)
            first = random_trace_id(), random_span_id(), random.random()
            random.seed(42)
            second = random_trace_id(), random_span_id(), random.random()
        finally:
            random.setstate(state)
        assert first[0] != second[0]
        assert first[1] != second[1]
        assert first[2] == second[2]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_children_do_not_repeat_ids(self) -> None:
        """
        Forked processes with one seed make ids that differ from each other's and from their parent's.
        """
        here, there = multiprocessing.get_context("fork").Pipe(duplex=False)
        children = [multiprocessing.get_context("fork").Process(target=_send_ids, args=(there,)) for _ in range(4)]
        for child in children:
            child.start()
        found = [here.recv() for _ in children]
        for child in children:
            child.join(60)
            assert child.exitcode == 0
        found.append([random_trace_id() for _ in range(100)])
        assert len({value for values in found for value in values}) == 500


def _send_ids(there: Connection) -> None:
    random.seed(42)
    there.send([random_trace_id() for _ in range(100)])
    # Nothing of the test run's own (coverage, exit handlers) runs in the child.
    os._exit(0)


class TestGivenTraceId:
    def test_one_root_takes_it(self) -> None:
        """
        The first root inside the block has the given id, and is not called random; the next one is random.
        """
        generator = CorrelationIdGenerator()
        with given_trace_id(GIVEN):
            assert generator.is_trace_id_random()
            assert generator.generate_trace_id() == GIVEN
            assert not generator.is_trace_id_random()
            assert generator.generate_trace_id() != GIVEN
        assert generator.generate_trace_id() != GIVEN
        assert generator.is_trace_id_random()
        assert generator.generate_span_id() != generator.generate_span_id()

    def test_users_roots_never_see_it(self) -> None:
        """
        Spans that the SDK starts after the one that it was given for, and outside the block, get ids of their own.
        """
        tracer = TracerProvider(id_generator=CorrelationIdGenerator(), shutdown_on_exit=False).get_tracer("test")
        with given_trace_id(GIVEN):
            span = tracer.start_span("server")
        assert trace_id_of(span) == GIVEN
        assert not span.get_span_context().trace_flags & 2
        with given_trace_id(GIVEN):
            first, second = tracer.start_span("server"), tracer.start_span("a root of the user's")
        assert (trace_id_of(first), trace_id_of(second) == GIVEN) == (GIVEN, False)
        assert trace_id_of(tracer.start_span("outside")) != GIVEN

    def test_unused_it_is_gone(self) -> None:
        """
        An id that nobody took inside the block is gone after it, an exception or not.
        """
        generator = CorrelationIdGenerator()
        with pytest.raises(KeyError), given_trace_id(GIVEN):
            raise KeyError
        assert generator.generate_trace_id() != GIVEN

    def test_over_another_generator(self) -> None:
        """
        A user's own generator goes on making all ids but the given one, and says itself whether they are random.
        """
        generator = CorrelationIdGenerator(Counting())
        with given_trace_id(GIVEN):
            assert (generator.generate_trace_id(), generator.generate_span_id()) == (GIVEN, 11)
            assert generator.generate_trace_id() == 22
        assert (generator.generate_trace_id(), generator.is_trace_id_random()) == (22, False)

    def test_minted(self) -> None:
        """
        A given id that was minted counts as random; one that came from a request id does not.
        """
        generator = CorrelationIdGenerator()
        for minted in (True, False):
            assert not was_given()
            with given_trace_id(GIVEN, random=minted):
                assert not was_given()
                assert generator.generate_trace_id() == GIVEN
                assert (generator.is_trace_id_random(), was_given()) == (minted, not minted)

    def test_nested(self) -> None:
        """
        An inner block has its own id; the outer one's is still there for one root afterwards.
        """
        generator = CorrelationIdGenerator()
        with given_trace_id(1):
            with given_trace_id(2):
                assert generator.generate_trace_id() == 2
            assert generator.generate_trace_id() == 1

    def test_copied_contexts_share_the_one_shot(self) -> None:
        """
        A task or thread that was started inside the block cannot take an id that was taken.
        """
        generator = CorrelationIdGenerator()
        with given_trace_id(GIVEN):
            copied = contextvars.copy_context()
            assert generator.generate_trace_id() == GIVEN
        assert copied.run(generator.generate_trace_id) != GIVEN

    def test_threads(self) -> None:
        """
        Each of many threads at once gets the id that it was given.
        """
        generator = CorrelationIdGenerator()
        barrier = threading.Barrier(8)

        def worker(start: int) -> list[int]:
            barrier.wait(60)
            found: list[int] = []
            for number in range(start, start + 500):
                with given_trace_id(number):
                    found.append(generator.generate_trace_id())
            return found

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(worker, range(1, 4_001, 500)))
        assert [value for found in results for value in found] == list(range(1, 4_001))


class TestReuseGuard:
    def test_limit(self) -> None:
        """
        By default an id roots 100 requests and not one more.
        """
        guard = ReuseGuard()
        assert [guard.allows(1) for _ in range(150)] == [True] * 100 + [False] * 50
        assert guard.allows(2)

    def test_silence(self) -> None:
        """
        After ten minutes of silence an id may root traces again; refused requests are no silence.
        """
        clock = Clock()
        guard = ReuseGuard(limit=2, clock=clock)
        assert [guard.allows(1) for _ in range(3)] == [True, True, False]
        for _ in range(5):
            clock.now += 599
            assert not guard.allows(1)
        clock.now += 600
        assert [guard.allows(1) for _ in range(3)] == [True, True, False]

    def test_a_slow_caller_is_bound_too(self) -> None:
        """
        A probe that comes every minute for ever uses up its requests like a fast one.
        """
        clock = Clock()
        guard = ReuseGuard(clock=clock)
        allowed = 0
        for _ in range(1_000):
            clock.now += 60
            allowed += guard.allows(1)
        assert allowed == 100

    def test_flood(self) -> None:
        """
        The table never outgrows its capacity, whatever number of ids comes.
        """
        guard = ReuseGuard()
        for number in range(70_000):
            assert guard.allows(number)
        assert len(guard) == 65_536

    def test_least_recently_used_is_forgotten(self) -> None:
        """
        A flood forgets the ids that have been silent longest, not one that keeps coming.
        """
        guard = ReuseGuard(limit=1, capacity=3)
        assert guard.allows(1)
        for number in range(2, 100):
            assert guard.allows(number)
            assert not guard.allows(1)
        assert guard.allows(2)
        assert len(guard) == 3

    @given(st.lists(st.integers(0, 5), max_size=200), st.integers(0, 10))
    def test_never_more_than_the_limit(self, numbers: list[int], limit: int) -> None:
        """
        In any order of requests, every id is allowed exactly as often as the limit says.
        """
        guard = ReuseGuard(limit=limit, clock=Clock())
        allowed = [number for number in numbers if guard.allows(number)]
        for number in set(numbers):
            assert allowed.count(number) == min(limit, numbers.count(number))

    def test_bound_under_concurrency(self) -> None:
        """
        Threads that ask for one id at the same time get the limit between them.
        """
        guard = ReuseGuard(limit=100)
        barrier = threading.Barrier(8)

        def worker(_: int) -> int:
            barrier.wait(60)
            return sum(guard.allows(1) for _ in range(200))

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(8) as pool:
                assert sum(pool.map(worker, range(8))) == 100
        finally:
            sys.setswitchinterval(interval)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_fork(self) -> None:
        """
        A child starts with an empty table, and a lock that its parent held at the fork does not hang it.
        """
        guard = ReuseGuard(limit=1)
        assert guard.allows(1)
        held, done = threading.Event(), threading.Event()

        def hold() -> None:
            with guard._lock:
                held.set()
                done.wait(60)

        thread = threading.Thread(target=hold)
        thread.start()
        try:
            assert held.wait(60)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # this process has a thread, which is the point
                child = os.fork()
            if child == 0:
                os._exit(0 if len(guard) == 0 and guard.allows(1) and not guard.allows(1) else 1)
        finally:
            done.set()
            thread.join(60)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not guard.allows(1)


def test_after_fork_handlers() -> None:
    """
    What runs in a forked child reseeds the source and empties the table.
    """
    before = ids._random.getstate()
    ids._reseed()
    assert ids._random.getstate() != before
    guard = ReuseGuard()
    guard.allows(1)
    guard._after_fork()
    assert len(guard) == 0
