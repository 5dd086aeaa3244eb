"""
A signal handler or a finalizer may run between any two lines of ours, on the same thread, and call us again.

The handlers here run at every line of the functions that hold a lock or count, which is more often than any signal.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import context as otel_context
from opentelemetry.context import Context

from otel_correlation import bind, guard, identity, ids
from otel_correlation.export import batching, sending
from otel_correlation.export.batching import Batcher
from otel_correlation.identity import Identity

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, ModuleType


def at_every_line(action: Callable[[], object], handler: Callable[[], object], *modules: ModuleType) -> int:
    """
    Run ``action`` and, before each line that it executes in ``modules``, ``handler``; return how often that was.

    A deadlock ends the test, with the stack of the thread that waits, and not the whole run.
    """
    files = {module.__file__ for module in modules}
    interrupted = 0
    inside = False
    failures: list[BaseException] = []

    def trace(frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal interrupted, inside
        if frame.f_code.co_filename not in files:
            return None
        if event == "line" and not inside:
            inside = True
            interrupted += 1
            try:
                handler()
            finally:
                inside = False
        return trace

    def run() -> None:
        sys.settrace(trace)
        try:
            action()
        except BaseException as error:
            failures.append(error)
        finally:
            sys.settrace(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)
    if thread.is_alive():
        import traceback

        stack = sys._current_frames()[thread.ident or 0]
        pytest.fail("deadlock:\n" + "".join(traceback.format_stack(stack)))
    if failures:
        raise failures[0]
    return interrupted


def test_counting() -> None:
    """
    No count is lost and nothing waits, whatever line of counting, adding up or reading another count interrupts.
    """

    def count() -> None:
        for _ in range(600):
            guard.count("outer", 2)
        guard.counters()

    interrupted = at_every_line(count, lambda: guard.count("inner"), guard)
    assert interrupted > 600
    assert guard.counters() == {"outer": 1200, "inner": interrupted}


def test_reading_counters() -> None:
    """
    A handler that reads the counters does not wait for the thread that it interrupted.
    """
    guard.count("before")
    seen: list[dict[str, int]] = []
    assert at_every_line(guard.counters, lambda: seen.append(guard.counters()), guard)
    assert all(shown.keys() <= {"before"} for shown in seen)
    assert guard.counters() == {"before": 1}


def test_warning() -> None:
    """
    A handler may log the same warning that is being logged.
    """
    assert at_every_line(
        lambda: guard.warn_seldom("key", "outer"), lambda: guard.warn_seldom("key", "from a handler"), guard, threading
    )


@pytest.mark.parametrize("room", [4, 100_000])
def test_queueing_and_flushing(room: int) -> None:
    """
    A handler may queue and flush while the thread that it interrupted does; each item is exported or counted once.
    """
    exported: list[int] = []
    batcher = Batcher[int](
        "spans", exported.extend, delay_ms=10, max_queue_size=room, max_batch_size=2, size_of=lambda _: 1
    )
    handled = 0

    def put() -> None:
        for number in range(20):
            batcher.put(number)
        batcher.flush(5)

    def handler() -> None:
        nonlocal handled
        handled += 1
        batcher.put(-handled)
        if handled % 3 == 0:
            batcher.flush(0.01)  # it may have interrupted the start of the thread that it waits for

    assert at_every_line(put, handler, batching, sending, threading)
    batcher.shutdown()
    lost = sum(amount for reason, amount in guard.counters().items() if reason.startswith("spans.dropped."))
    assert len(exported) == len(set(exported))
    assert len(exported) + lost == 20 + handled


def test_the_reuse_guard() -> None:
    """
    A handler may start work of its own while a request's id is looked up.
    """
    reuse = ids.ReuseGuard(limit=5)

    def ask() -> None:
        assert [reuse.allows(1) for _ in range(7)] == [True] * 5 + [False] * 2

    assert at_every_line(ask, lambda: reuse.allows(2), ids)


def test_binding() -> None:
    """
    A handler may bind fields while the request that it interrupted does.
    """
    who = Identity("id")

    def outer() -> None:
        token = otel_context.attach(identity.set_in(Context(), who))
        try:
            bind(a=1)
            bind(b=2)
        finally:
            otel_context.detach(token)

    assert at_every_line(outer, lambda: bind(c=3), identity)
    assert who.fields == {"a": 1, "b": 2, "c": 3}
