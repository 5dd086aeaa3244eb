"""
The never-raise boundary: what fails in us is counted and said seldom, and never becomes the application's.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from otel_correlation import guard

if TYPE_CHECKING:
    from collections.abc import Callable


class Clock:
    """
    A monotonic clock that the test moves.
    """

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """
    The clock that guard reads, and nobody else.
    """
    fake = Clock()
    monkeypatch.setattr(guard, "monotonic", fake.monotonic)
    return fake


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Guard as it is in production: nothing is re-raised.
    """
    monkeypatch.delenv(guard.STRICT_ENV)


def _fail() -> None:
    raise ZeroDivisionError("ours")


def test_counters_add_up_by_reason() -> None:
    """
    Each reason has its own count, and the copy that is handed out changes nothing.
    """
    guard.count("spans.dropped.full")
    guard.count("spans.dropped.full", 41)
    guard.count("request_id.refused")
    shown = guard.counters()
    assert shown == {"spans.dropped.full": 42, "request_id.refused": 1}
    shown.clear()
    assert guard.counters()["spans.dropped.full"] == 42


def test_no_count_is_lost_between_threads() -> None:
    """
    Eight threads that count at once lose nothing.
    """
    start = threading.Barrier(8)

    def work() -> None:
        start.wait(30)
        for _ in range(2_000):
            guard.count("many")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert guard.counters() == {"many": 16_000}


def test_a_warning_comes_at_most_once_a_minute_for_each_key(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """
    The same key is silent for 60 seconds after its warning; another key is not.
    """
    for moment, key in ((0.0, "a"), (0.0, "b"), (59.9, "a"), (59.9, "b"), (60.0, "a"), (60.1, "a"), (120.0, "a")):
        clock.now = 1_000.0 + moment
        guard.warn_seldom(key, "%s at %s", key, moment)
    assert [record.getMessage() for record in caplog.records] == ["a at 0.0", "b at 0.0", "a at 60.0", "a at 120.0"]
    assert {(record.name, record.levelname) for record in caplog.records} == {("otel_correlation", "WARNING")}


@pytest.mark.usefixtures("lenient")
def test_a_failure_of_ours_does_not_leave_the_block(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """
    The block's exception is counted each time, logged with its traceback once a minute, and goes no further.
    """
    for moment in (0.0, 30.0, 60.0):
        clock.now = 1_000.0 + moment
        with guard.never_raise("edge"):
            _fail()
    assert guard.counters() == {"internal_error.edge": 3}
    assert len(caplog.records) == 2
    assert "Telemetry failed in edge" in caplog.text
    assert "ZeroDivisionError: ours" in caplog.text
    assert {record.levelno for record in caplog.records} == {logging.ERROR}


def test_in_strict_mode_a_failure_of_ours_is_raised() -> None:
    """
    Under our tests the boundary hides nothing, and counts nothing either.
    """
    with pytest.raises(ZeroDivisionError, match="ours"), guard.never_raise("edge"):
        _fail()
    assert guard.counters() == {}


def test_an_empty_variable_is_not_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The strict variable set to the empty string is unset.
    """
    monkeypatch.setenv(guard.STRICT_ENV, "")
    with guard.never_raise("edge"):
        _fail()
    assert guard.counters() == {"internal_error.edge": 1}


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_not_a_failure_passes(kind: type[BaseException]) -> None:
    """
    Interrupts and exits pass through the boundary unchanged.
    """
    error = kind()
    with pytest.raises(kind) as caught, guard.never_raise("edge"):
        raise error
    assert caught.value is error
    assert guard.counters() == {}


def test_a_block_that_works_leaves_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    """
    Without a failure nothing is counted or logged.
    """
    with guard.never_raise("edge"):
        pass
    assert guard.counters() == {}
    assert caplog.records == []


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("again", [lambda: guard.warn_seldom("key", "said"), lambda: _reported("key")])
def test_reset_forgets_counts_and_silence(
    again: Callable[[], None], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """
    After a reset counters are empty and a warning may come at once.
    """
    guard.count("x")
    again()
    guard.reset()
    assert guard.counters() == {}
    again()
    assert len(caplog.records) == 2


def _reported(where: str) -> None:
    with guard.never_raise(where):
        _fail()


def test_a_config_error_is_a_value_error() -> None:
    """
    Code that catches ValueError for wrong settings catches ours.
    """
    assert issubclass(guard.ConfigError, ValueError)


_FORKING = """
import os, threading
from otel_correlation import guard

guard.count("parent")
held, done = threading.Event(), threading.Event()

def hold():
    with guard._adding:
        held.set()
        done.wait(60)

thread = threading.Thread(target=hold)
thread.start()
held.wait(60)
child = os.fork()
if child == 0:
    # The parent's thread does not exist here and will never release its lock.
    guard.count("child")
    guard.warn_seldom("key", "from the child")
    print(guard.counters(), flush=True)
    os._exit(0)
status = os.waitpid(child, 0)[1]
done.set()
thread.join(60)
print(guard.counters(), status, flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_worker_starts_with_free_locks_and_counts_of_its_own() -> None:
    """
    A fork while another thread counts neither hangs the child nor mixes the two processes' counters.
    """
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _FORKING]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == ["{'child': 1}", "{'parent': 1} 0"]
    assert "from the child" in done.stderr


def test_what_another_thread_adds_up_just_now_is_counted() -> None:
    """
    Where the thread that adds up does not come to its end, because it has no CPU, nothing that was counted misses.
    """
    guard.count("before")
    assert guard.counters() == {"before": 1}
    with guard._adding:
        guard.count("before", 2)
        guard.count("after")
        assert guard.counters() == {"before": 3, "after": 1}
    assert guard.counters() == {"before": 3, "after": 1}
