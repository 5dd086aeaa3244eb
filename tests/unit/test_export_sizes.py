"""
What an item is taken to hold is close to what it holds, and looking costs nothing that grows with it.
"""

from __future__ import annotations

import gc
import logging
import tracemalloc
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.context import Context
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode

from otel_correlation import export
from otel_correlation.export.encoding import encode_logs, encode_spans
from otel_correlation.export.sizes import record_bytes, span_bytes
from otel_correlation.ids import CorrelationIdGenerator
from otel_correlation.logs.otlp import Export
from otel_correlation.propagators import TraceState
from otel_correlation.sampling import RatioSampler
from otel_correlation.settings import Settings
from otel_correlation.tracer import LightSpan, Tracer

if TYPE_CHECKING:
    from collections.abc import Callable

COUNT = 300


class KeptSpans(export.SpanPipeline):
    """
    Keeps what would be queued.
    """

    def __init__(self) -> None:
        super().__init__([])
        self.kept: list[Any] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.kept.append(span)


class KeptRecords(export.LogPipeline):
    """
    Keeps what would be queued.
    """

    def __init__(self) -> None:
        super().__init__([])
        self.kept: list[Any] = []

    def emit(self, record: Any) -> None:
        self.kept.append(record)


def attributes(number: int, count: int, text: str) -> dict[str, Any]:
    return {f"attribute.{place}": f"{number}{text}" for place in range(count)}


SPANS: dict[str, Callable[[Any, int], Any]] = {
    "empty": lambda start, _: start({}),
    "usual": lambda start, number: start(attributes(number, 12, "value of usual length")),
    "long": lambda start, number: start(attributes(number, 12, "x" * 1000)),
    "not ascii": lambda start, number: start(attributes(number, 4, "\N{SNOWMAN}" * 500)),
    "event": lambda start, number: start({}).add_event("event", attributes(number, 3, "x" * 300)),
    "link": lambda start, number: start({}, links=[Link(SpanContext(1, number + 1, True), {"a": f"{number}"})]),
    "status": lambda start, number: start({}).set_status(Status(StatusCode.ERROR, f"{number}" + "x" * 3000)),
    "name": lambda start, number: start({}).update_name(f"{number}" + "x" * 3000),
    "list": lambda start, number: start({}).set_attribute("list", [f"{number}" + "x" * 500, "y" * 500]),
}


@pytest.mark.parametrize("light", [True, False])
@pytest.mark.parametrize("case", SPANS)
def test_the_estimate_of_a_span_is_near_its_memory_and_above_its_encoding(case: str, light: bool) -> None:
    """
    An estimate is between a half and three times of what a span holds, and not below what it is as OTLP.
    """
    pipeline = KeptSpans()
    provider = TracerProvider(
        sampler=RatioSampler(1.0), id_generator=CorrelationIdGenerator() if light else None, shutdown_on_exit=False
    )
    provider.add_span_processor(pipeline)
    tracer = Tracer("test", provider)
    started: list[Any] = []

    def start(values: dict[str, Any], **more: Any) -> Any:
        started.append(tracer.start("GET /x", SpanKind.SERVER, Context(), values, **more))
        return started[-1]

    def make(number: int) -> None:
        SPANS[case](start, number)
        started.pop().end()

    make(COUNT)
    held = memory(make)
    span = pipeline.kept[-1]
    assert isinstance(span, LightSpan) == light
    estimate = span_bytes(span)
    assert held / 2 <= estimate <= held * 3
    assert estimate >= len(encode_spans([span])[0])


@pytest.mark.parametrize("length", [20, 2000])
def test_the_estimate_of_a_record_is_near_its_memory_and_above_its_encoding(length: int) -> None:
    """
    The same for log records.
    """
    pipeline = KeptRecords()
    provider = LoggerProvider(shutdown_on_exit=False)
    provider.add_log_record_processor(pipeline)
    emit = Export(provider, Settings())
    logger = logging.getLogger("test")

    def make(number: int) -> None:
        extra = attributes(number, 3, "x" * length)
        record = logger.makeRecord("test", 20, "/a.py", 3, f"{number}" + "y" * length, (), None, "f", extra)
        record.relativeCreated = number
        emit(record)

    make(COUNT)
    held = memory(make)
    estimate = record_bytes(pipeline.kept[-1])
    assert held / 2 <= estimate <= held * 3
    assert estimate >= len(encode_logs([pipeline.kept[-1]])[0])


def memory(make: Callable[[int], None]) -> float:
    """
    Return the bytes that each of many calls leaves behind.
    """
    gc.collect()
    tracemalloc.start()
    for number in range(COUNT):
        make(number)
    gc.collect()
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return used / COUNT


def test_a_long_tracestate_counts() -> None:
    """
    What a caller sent as tracestate is held by the span, and counted.
    """
    state = TraceState([(f"k{number}", "v" * 200) for number in range(32)])
    plain = ReadableSpan("a", SpanContext(1, 2, False))
    assert span_bytes(ReadableSpan("a", SpanContext(1, 2, False, trace_state=state))) - span_bytes(plain) > 6_000


def test_something_strange_has_a_size() -> None:
    """
    What looks like no span and no record is counted with a size all the same.
    """
    strange: Any = object()
    assert span_bytes(strange) > 1_000
    assert record_bytes(strange) > 1_000


def test_a_value_within_a_value_counts() -> None:
    """
    What a list, a dict or bytes hold is counted; one that holds itself ends.
    """
    body: dict[str, Any] = {"a": ["x" * 1000, b"y" * 1000, {"b": "z" * 1000}]}
    record: Any = SimpleNamespace(log_record=SimpleNamespace(body=body, attributes=None))
    assert 3_000 < record_bytes(record) < 6_000
    body["a"].append(body)
    assert record_bytes(record) > 3_000
