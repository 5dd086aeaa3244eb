"""
What `stats()` counts and how full the queues are, as metrics with the names of the semantic conventions.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, NumberDataPoint

from otel_correlation import export, guard
from otel_correlation.export.batching import Batcher

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otel_correlation.export.sending import Kind

PATIENCE_S = 20.0


@pytest.fixture(autouse=True)
def counters() -> Iterator[None]:
    """
    Every test counts from zero.
    """
    guard.reset()
    yield
    guard.reset()


class Held:
    """
    A batcher whose exporter holds its first batch until it is let go.
    """

    def __init__(self, kind: Kind = "spans", *, room: int = 4) -> None:
        self.entered = threading.Event()
        self.go = threading.Event()
        self.batcher: Batcher[int] = Batcher(kind, self._export, delay_ms=60_000, max_queue_size=room, max_batch_size=2)

    def _export(self, _batch: list[int]) -> None:
        self.entered.set()
        assert self.go.wait(PATIENCE_S)

    def close(self) -> None:
        self.go.set()
        self.batcher.shutdown()


@pytest.fixture
def held() -> Iterator[Held]:
    """
    A held batcher of spans, let go at the end.
    """
    held = Held()
    yield held
    held.close()


def collect(*batchers: Batcher[Any]) -> dict[tuple[str, str], int]:
    """
    Return each value by the metric's name and its ``error.type`` or reason.
    """
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    export.observe(provider, batchers)
    data = reader.get_metrics_data()
    assert data is not None
    values: dict[tuple[str, str], int] = {}
    for metric in data.resource_metrics[0].scope_metrics[0].metrics:
        for point in metric.data.data_points:
            assert isinstance(point, NumberDataPoint)
            attributes: Any = point.attributes
            reason = attributes.get("error.type") or attributes.get("otel_correlation.reason") or ""
            values[metric.name, reason] = int(point.value)
    provider.shutdown()
    return values


def test_the_queue_is_seen_filling_and_overflowing(held: Held) -> None:
    """
    What waits, what may wait, what was handed over and what found the queue full are four numbers.
    """
    for item in range(2):
        held.batcher.put(item)
    assert held.entered.wait(PATIENCE_S)
    for item in range(7):
        held.batcher.put(item)
    values = collect(held.batcher)
    prefix = "otel.sdk.processor.span."
    assert values[f"{prefix}queue.capacity", ""] == 4
    assert values[f"{prefix}queue.size", ""] == 4
    assert values[f"{prefix}processed", ""] == 2
    assert values[f"{prefix}processed", "queue_full"] == 3


def test_what_a_queue_full_of_bytes_drops_has_a_reason_of_its_own(held: Held) -> None:
    """
    Items and bytes have bounds of their own, so the metric says which of them was reached.
    """
    guard.count("spans.dropped.queue_bytes", 7)
    values = collect(held.batcher)
    assert values["otel.sdk.processor.span.processed", "queue_bytes"] == 7
    assert ("otel.sdk.exporter.span.exported", "queue_bytes") not in values


def test_losses_are_counted_by_their_cause(held: Held) -> None:
    """
    What the exporter lost is `exported` with `error.type`; what it never saw is `processed` with one; nothing is both.
    """
    for name, amount in {"exported": 5, "dropped.rejected_by_collector": 2, "dropped.http_400": 3}.items():
        guard.count(f"spans.{name}", amount)
    guard.count("spans.dropped.after_shutdown", 4)
    values = collect(held.batcher)
    exported = {reason: value for (name, reason), value in values.items() if name == "otel.sdk.exporter.span.exported"}
    assert exported == {"": 5, "rejected": 2, "http_400": 3}
    processed = {
        reason: value for (name, reason), value in values.items() if name == "otel.sdk.processor.span.processed"
    }
    assert processed == {"": 0, "queue_full": 0, "already_shutdown": 4}


def test_zero_is_there_before_anything_happens(held: Held) -> None:
    """
    A rate needs a value to rise from, so what was exported and what found the queue full are there as zeros.
    """
    values = collect(held.batcher)
    assert values["otel.sdk.exporter.span.exported", ""] == 0
    assert values["otel.sdk.processor.span.processed", "queue_full"] == 0


def test_other_counters_are_one_metric(held: Held) -> None:
    """
    What the conventions have no name for is `otel_correlation.events` by reason, without what other metrics say.
    """
    for name in ("request_id.reused", "spans.possible_duplicates", "spans.exported", "spans.dropped.queue_full"):
        guard.count(name)
    values = collect(held.batcher)
    events = {reason: value for (name, reason), value in values.items() if name == "otel_correlation.events"}
    assert events == {"request_id.reused": 1, "spans.possible_duplicates": 1}


def test_only_what_is_exported_has_metrics(held: Held) -> None:
    """
    A service that exports no logs has no zeros about logs; with both, each has its own.
    """
    assert not any("log" in name.split(".") for name, _ in collect(held.batcher))
    logs = Held("logs", room=9)
    values = collect(held.batcher, logs.batcher)
    logs.close()
    assert values["otel.sdk.processor.log.queue.capacity", ""] == 9
    assert values["otel.sdk.processor.span.queue.capacity", ""] == 4


def test_two_exporters_of_a_kind_are_summed(held: Held) -> None:
    """
    The counters do not tell exporters apart, so neither do the queues.
    """
    other = Held(room=10)
    values = collect(held.batcher, other.batcher)
    other.close()
    assert values["otel.sdk.processor.span.queue.capacity", ""] == 14


def test_a_provider_without_metrics_is_harmless(held: Held) -> None:
    """
    The API's no-op provider takes the instruments and never asks.
    """
    export.observe(NoOpMeterProvider(), [held.batcher])
