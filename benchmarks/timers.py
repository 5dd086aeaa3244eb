"""
What timers of event loops cost: as Python has them and as patched, outside of a request and inside one.

    python benchmarks/timers.py
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import uvloop

import otel_correlation
from otel_correlation.tasks import timers

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS = 5_000
ROUNDS = 15


class KeepAlive:
    """
    What uvicorn arms after each request.
    """

    def close(self) -> None:
        return


KeepAlive.close.__module__ = "uvicorn.protocols.http.httptools_impl"


def user() -> None:
    return


async def armed(callback: Callable[[], None]) -> float:
    loop = asyncio.get_running_loop()
    begun = time.thread_time_ns()
    for _ in range(CALLS):
        loop.call_later(1000, callback).cancel()
    taken = time.thread_time_ns() - begun
    await asyncio.sleep(0)  # asyncio forgets cancelled timers
    return taken / CALLS / 1000


async def slept(delay_s: float, calls: int) -> float:
    begun = time.thread_time_ns()
    for _ in range(calls):
        await asyncio.sleep(delay_s)
    return (time.thread_time_ns() - begun) / calls / 1000


async def measure() -> dict[tuple[str, str], float]:
    best: dict[tuple[str, str], float] = {}
    forms: dict[str, Callable[[], Any]] = {
        "asyncio.sleep(1e-9)": lambda: slept(1e-9, CALLS),
        "asyncio.sleep(0.001)": lambda: slept(0.001, 100),
        "keep-alive of uvicorn": lambda: armed(KeepAlive().close),
        "call_later of a user": lambda: armed(user),
    }
    for _ in range(ROUNDS):
        for form, call in forms.items():
            for how in ("without", "outside", "inside"):
                if how == "without":
                    timers.deactivate()
                else:
                    timers.activate()
                with otel_correlation.work("request") if how == "inside" else otel_correlation.detached():
                    taken = await call()
                best[form, how] = min(taken, best.get((form, how), taken))
    return best


def main() -> None:
    """
    Print the best of many interleaved rounds.
    """
    otel_correlation.bootstrap(traces_exporters=(), log_format="none")
    print("CPU microseconds        without  outside           inside")
    for name, run in (("asyncio", asyncio.run), ("uvloop", uvloop.run)):
        best: Any = run(measure())
        print(name)
        for form in dict.fromkeys(form for form, _ in best):
            bare, outside, inside = (best[form, how] for how in ("without", "outside", "inside"))
            print(f"{form:22} {bare:8.2f} {outside:8.2f} x{outside / bare:.2f}  {inside:8.2f} x{inside / bare:.2f}")


if __name__ == "__main__":
    main()
