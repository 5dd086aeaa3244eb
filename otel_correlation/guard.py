"""
The never-raise boundary: a failure of telemetry is reported once in a while and never becomes the application's.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from otel_correlation.clocks import monotonic

if TYPE_CHECKING:
    from collections.abc import Generator

logger: Final = logging.getLogger("otel_correlation")

# Our tests set it, so that a bug hidden by the boundary fails them (logfire's idea of re-raising under tests).
STRICT_ENV: Final = "OTEL_CORRELATION_STRICT"

_INTERVAL_S: Final = 60.0
# A signal handler or a finalizer that logs may count at any bytecode, also while its own thread counts or adds up: no
# lock is waited for here. What is counted is appended, which is one step, and added up in bulk by one thread at a time.
_uncounted: Final[deque[tuple[str, int]]] = deque()
_MAX_UNCOUNTED: Final = 256
_TRIES: Final = 16
_adding = threading.Lock()
_counts: dict[str, int] = {}
_last: dict[str, float] = {}


class ConfigError(ValueError):
    """
    A setting that was passed in code is wrong; names the setting, the value and the fix.
    """


def count(reason: str, amount: int = 1) -> None:
    """
    Add to the counter that ``stats()`` shows under ``reason``; never raises, never waits.
    """
    _uncounted.append((reason, amount))
    if len(_uncounted) > _MAX_UNCOUNTED:
        _add_up()


def _add_up() -> bool:
    """
    Move what was counted into the table, unless that is being done: on another thread, or below this very call.
    """
    if not _adding.acquire(blocking=False):
        return False
    try:
        # Not until it is empty: what is counted meanwhile may never end.
        for _ in range(len(_uncounted)):
            reason, amount = _uncounted.popleft()
            _counts[reason] = _counts.get(reason, 0) + amount
    finally:
        _adding.release()
    return True


def counters() -> dict[str, int]:
    """
    Return a copy of all counters, by reason.

    In a signal handler that interrupted ``counters`` or ``count`` themselves, one call of ``count`` may miss.
    """
    # Nothing is waited for: a signal handler that interrupted the adding up would wait for itself, and each next one,
    # which interrupts that, would wait, too, until Python's stack is full.
    if _add_up():
        return dict(_counts)
    left, found = _uncounted.copy(), dict(_counts)
    for _ in range(_TRIES):
        if len(left) <= len(_uncounted):  # else some were added up in between
            break
        left, found = _uncounted.copy(), dict(_counts)
    for reason, amount in left:
        found[reason] = found.get(reason, 0) + amount
    return found


def _is_time(key: str) -> bool:
    """
    Tell whether the last line of this key was a minute ago, and remember this one.
    """
    # Without a lock: two threads at the same instant may both log.
    now = monotonic()
    last = _last.get(key)
    if last is not None and now - last < _INTERVAL_S:
        return False
    _last[key] = now
    return True


def warn_seldom(key: str, message: str, *args: object) -> None:
    """
    Log a warning at most once a minute for each ``key``; ``args`` must never hold a value that a caller sent.
    """
    if _is_time(key):
        logger.warning(message, *args)


def report(where: str) -> None:
    """
    Count and log the exception being handled, at most once a minute for each place; re-raise it in strict mode.
    """
    if os.environ.get(STRICT_ENV):
        raise  # noqa: PLE0704 - called from an except block only
    count(f"internal_error.{where}")
    if _is_time(where):
        logger.exception(  # noqa: LOG004 - called from an except block only
            "Telemetry failed in %s; the request is not affected. Reported at most once a minute.", where
        )


@contextmanager
def never_raise(where: str) -> Generator[None]:
    """
    Run a block of ours so that its failure cannot reach the application.

    Args:
        where: A constant that names the place, for the counter and the log line.
    """
    try:
        yield
    except Exception:  # noqa: BLE001 - this is the boundary
        report(where)


def reset() -> None:
    """
    Forget all counters and the times of the last warnings (for tests and after a fork).
    """
    global _adding  # noqa: PLW0603 - a lock held in the parent at fork would never be released in the child
    _adding = threading.Lock()
    _last.clear()
    _uncounted.clear()
    _counts.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=reset)
