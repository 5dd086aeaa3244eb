"""
The thread pool of blocking code as metrics.
"""

from __future__ import annotations

import asyncio
import threading

from anyio import to_thread
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, NumberDataPoint

from otel_correlation.edge import _threads


def collected(reader: InMemoryMetricReader) -> dict[str, float]:
    """
    Return the value of each gauge.
    """
    data = reader.get_metrics_data()
    if data is None:
        return {}
    return {
        metric.name.removeprefix("otel_correlation.thread_pool."): point.value
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
        if isinstance(point, NumberDataPoint)
    }


def observed() -> tuple[MeterProvider, InMemoryMetricReader]:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    _threads.observe(provider)
    return provider, reader


def test_a_pool_that_is_full_shows_who_waits() -> None:
    """
    Two of two threads at work and three calls behind them are three numbers; afterwards nothing is used.
    """
    provider, reader = observed()
    gate = threading.Event()
    at_work = threading.Barrier(3)

    def work() -> None:
        if not gate.is_set():
            at_work.wait(20)
            gate.wait(20)

    async def main() -> tuple[dict[str, float], dict[str, float]]:
        _threads.watch(asyncio.get_running_loop())
        to_thread.current_default_thread_limiter().total_tokens = 2
        calls = [asyncio.create_task(to_thread.run_sync(work)) for _ in range(5)]
        await asyncio.to_thread(at_work.wait, 20)
        full = collected(reader)
        gate.set()
        await asyncio.gather(*calls)
        return full, collected(reader)

    full, idle = asyncio.run(main())
    provider.shutdown()
    assert full == {"used": 2, "limit": 2, "waiting": 3}
    assert idle == {"used": 0, "limit": 2, "waiting": 0}


def test_a_loop_that_is_closed_counts_no_more() -> None:
    """
    Tests and scripts run one loop after the other: their pools are not added up, and without any there is no value.
    """

    async def main() -> dict[str, float]:
        _threads.watch(asyncio.get_running_loop())
        return collected(reader)

    provider, reader = observed()
    for _ in range(3):
        assert asyncio.run(main())["limit"] == 40
    assert collected(reader) == {}
    provider.shutdown()
