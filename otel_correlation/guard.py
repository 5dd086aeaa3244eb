"""
The never-raise boundary: a failure of telemetry is reported once in a while and never becomes the application's.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Generator

logger: Final = logging.getLogger("otel_correlation")

# Our tests set it, so that a bug hidden by the boundary fails them (logfire's idea of re-raising under tests).
STRICT_ENV: Final = "OTEL_CORRELATION_STRICT"

_INTERVAL_S: Final = 60.0
_lock = threading.Lock()
_last: dict[str, float] = {}
_counts: dict[str, int] = {}


class ConfigError(ValueError):
    """
    A setting that was passed in code is wrong; names the setting, the value and the fix.
    """


def count(reason: str, amount: int = 1) -> None:
    """
    Add to the counter that ``stats()`` shows under ``reason``; never raises.
    """
    with _lock:
        _counts[reason] = _counts.get(reason, 0) + amount


def counters() -> dict[str, int]:
    """
    Return a copy of all counters, by reason.
    """
    with _lock:
        return dict(_counts)


def warn_seldom(key: str, message: str, *args: object) -> None:
    """
    Log a warning at most once a minute for each ``key``; ``args`` must never hold a value that a caller sent.
    """
    now = time.monotonic()
    with _lock:
        last = _last.get(key)
        if last is not None and now - last < _INTERVAL_S:
            return
        _last[key] = now
    logger.warning(message, *args)


def report(where: str) -> None:
    """
    Count and log the exception being handled, at most once a minute for each place; re-raise it in strict mode.
    """
    if os.environ.get(STRICT_ENV):
        raise  # noqa: PLE0704 - called from an except block only
    count(f"internal_error.{where}")
    now = time.monotonic()
    with _lock:
        last = _last.get(where)
        if last is not None and now - last < _INTERVAL_S:
            return
        _last[where] = now
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
    global _lock  # noqa: PLW0603 - a lock held in the parent at fork would never be released in the child
    _lock = threading.Lock()
    _last.clear()
    _counts.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=reset)
