"""
The thread pool that every ``def`` endpoint, dependency and background task of this process waits for, as metrics.

It has 40 threads by default. A service whose 40 are busy answers nothing that is not ``async``, without an error, while
its CPU is idle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from anyio.to_thread import current_default_thread_limiter
from opentelemetry.metrics import Observation

from otel_correlation._version import __version__

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable, Iterable

    from opentelemetry.metrics import CallbackOptions, MeterProvider

USED: Final = "otel_correlation.thread_pool.used"
LIMIT: Final = "otel_correlation.thread_pool.limit"
WAITING: Final = "otel_correlation.thread_pool.waiting"

# Each event loop has a pool; almost every process has one event loop.
_pools: Final[WeakKeyDictionary[AbstractEventLoop, Any]] = WeakKeyDictionary()


def watch(loop: AbstractEventLoop) -> None:
    """
    Remember the pool of the event loop, which must be the one that runs now.
    """
    _pools[loop] = current_default_thread_limiter()


def observe(provider: MeterProvider) -> None:
    """
    Offer the use of all pools that are watched as metrics; call it once for each provider.
    """
    meter = provider.get_meter("otel_correlation.server", __version__)
    for name, unit, description, read in (
        (USED, "{thread}", "Threads of the pool for blocking code that are at work.", _used),
        (LIMIT, "{thread}", "Threads that this pool has at most.", _limit),
        (WAITING, "{call}", "Calls that wait for a free thread of this pool.", _waiting),
    ):
        meter.create_observable_gauge(name, [_sum(read)], unit, description)


def _used(limiter: Any) -> float:
    return float(limiter.borrowed_tokens)


def _limit(limiter: Any) -> float:
    return float(limiter.total_tokens)


def _waiting(limiter: Any) -> float:
    return float(limiter.statistics().tasks_waiting)


def _sum(read: Callable[[Any], float]) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def observed(_options: CallbackOptions) -> Iterable[Observation]:
        pools = [pool for loop, pool in list(_pools.items()) if not loop.is_closed()]
        # A process that has served nothing yet has no pool.
        return [Observation(sum(map(read, pools)))] if pools else []

    return observed
