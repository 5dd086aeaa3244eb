"""
What a patched pool and a patched thread cost: without us, outside of a request, and inside one.

    python benchmarks/threads.py
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import otel_correlation
from otel_correlation.tasks import threads

TASKS = 20_000
THREADS = 1_000
ROUNDS = 15


class Idle(ThreadPoolExecutor):
    """
    A pool whose tasks this thread runs itself, so that no switch between threads is measured.
    """

    def _adjust_thread_count(self) -> None:
        return


def measure() -> dict[str, float]:
    """
    Return CPU microseconds of one submit, of one task that does nothing, and of one thread.
    """
    pool = Idle(1)
    begun = time.thread_time_ns()
    for _ in range(TASKS):
        pool.submit(int)
    submitted = time.thread_time_ns()
    for _ in range(TASKS):
        pool._work_queue.get_nowait().run()
    ran = time.thread_time_ns()
    process = time.process_time_ns()
    for _ in range(THREADS):
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()
    ended = time.process_time_ns()
    return {
        "submit": (submitted - begun) / TASKS / 1000,
        "task": (ran - submitted) / TASKS / 1000,
        "thread": (ended - process) / THREADS / 1000,
    }


def main() -> None:
    """
    Print the best of many interleaved rounds.
    """
    otel_correlation.bootstrap(traces_exporters=(), log_format="none")
    best: dict[tuple[str, str], float] = {}
    for _ in range(ROUNDS):
        for where in ("without", "outside", "inside"):
            if where == "without":
                threads.deactivate()
            else:
                threads.activate()
            if where == "inside":
                with otel_correlation.work("request"):
                    found = measure()
            else:
                found = measure()
            for what, cost in found.items():
                best[where, what] = min(cost, best.get((where, what), cost))
    print("us       submit   task  thread")
    for where in ("without", "outside", "inside"):
        print(f"{where:8s} {best[where, 'submit']:6.2f} {best[where, 'task']:6.2f} {best[where, 'thread']:7.1f}")


if __name__ == "__main__":
    main()
