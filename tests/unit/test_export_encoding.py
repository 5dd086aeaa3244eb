"""
Our OTLP bytes against the stock encoder's messages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.attributes import BoundedAttributes
from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs as stock_logs
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans as stock_spans
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.util import BoundedList
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from otel_correlation import export, guard
from otel_correlation.export.encoding import encode_logs, encode_spans

if TYPE_CHECKING:
    from collections.abc import Sequence

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = st.one_of(st.sampled_from(["http.route", "request_id", "k"]), st.text(st.characters(codec="utf-8"), min_size=1))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    text,
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.binary(max_size=20),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=4)),
    max_leaves=8,
)
attributes = st.dictionaries(names, values, max_size=12)
trace_ids = st.integers(1, 2**128 - 1)
span_ids = st.integers(1, 2**64 - 1)
times = st.integers(0, 2**63)


@st.composite
def trace_states(draw: st.DrawFn) -> TraceState:
    keys = draw(st.lists(st.sampled_from(["ot", "a", "vendor", "x1"]), unique=True))
    return TraceState([(key, draw(st.sampled_from(["th:0", "rv:00112233445566", "1"]))) for key in keys])


@st.composite
def contexts(draw: st.DrawFn) -> SpanContext:
    flags = TraceFlags(draw(st.integers(0, 3)))
    return SpanContext(draw(trace_ids), draw(span_ids), draw(st.booleans()), flags, draw(trace_states()))


@st.composite
def bounded(draw: st.DrawFn) -> BoundedAttributes:
    held = BoundedAttributes(attributes=draw(attributes), immutable=True)
    held.dropped = draw(st.sampled_from([0, 1, 127, 128, 70000]))
    return held


@st.composite
def events(draw: st.DrawFn) -> list[Event]:
    return [
        Event(draw(text), draw(bounded()), timestamp=draw(st.integers(1, 2**63)))
        for _ in range(draw(st.integers(0, 3)))
    ]


def lists(items: Sequence[object], dropped: int) -> Any:
    held = BoundedList.from_seq(None, items)
    held.dropped = dropped
    return held


resources = st.builds(
    Resource, st.dictionaries(names, scalars.filter(lambda value: value is not None), max_size=4), st.none() | text
)
scopes = st.none() | st.builds(
    InstrumentationScope, text, st.none() | text, st.none() | text, st.none() | st.dictionaries(names, text, max_size=2)
)


@st.composite
def spans(draw: st.DrawFn) -> ReadableSpan:
    links = [Link(draw(contexts()), draw(bounded())) for _ in range(draw(st.integers(0, 2)))]
    code = draw(st.sampled_from(list(StatusCode)))
    return ReadableSpan(
        name=draw(text),
        context=draw(contexts()),
        parent=draw(st.none() | contexts()),
        resource=draw(resources),
        attributes=draw(st.one_of(bounded(), attributes, st.none())),
        events=lists(draw(events()), draw(st.sampled_from([0, 3]))),
        links=lists(links, draw(st.sampled_from([0, 300]))),
        kind=draw(st.sampled_from(list(SpanKind))),
        status=Status(code, draw(st.none() | text) if code is StatusCode.ERROR else None),
        start_time=draw(st.none() | times),
        end_time=draw(st.none() | times),
        instrumentation_scope=draw(scopes),
    )


def flat(request: Any) -> list[tuple[Any, ...]]:
    """
    Return each span or record with its resource and scope; which equal groups are merged does not matter.
    """
    found: list[tuple[Any, ...]] = []
    for group in request.resource_spans if hasattr(request, "resource_spans") else request.resource_logs:
        resource = sorted(pair.SerializeToString(deterministic=True) for pair in group.resource.attributes)
        for scope in group.scope_spans if hasattr(group, "scope_spans") else group.scope_logs:
            items = scope.spans if hasattr(scope, "spans") else scope.log_records
            head = (resource, group.schema_url, scope.scope.SerializeToString(deterministic=True), scope.schema_url)
            found += [(*head, item.SerializeToString(deterministic=True)) for item in items]
    return sorted(found)


@given(st.lists(spans(), max_size=3))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_spans_are_the_stock_message(batch: list[ReadableSpan]) -> None:
    """
    Every span decodes to the very message that the stock encoder makes of it.
    """
    payload, count = encode_spans(batch)
    assert count == len(batch)
    assert flat(ExportTraceServiceRequest.FromString(payload)) == flat(stock_spans(batch))
    if len(batch) == 1:
        assert ExportTraceServiceRequest.FromString(payload) == stock_spans(batch)


@st.composite
def log_records(draw: st.DrawFn) -> ReadableLogRecord:
    record = LogRecord(
        timestamp=draw(st.none() | times),
        observed_timestamp=draw(times),
        severity_text=draw(st.none() | text),
        severity_number=draw(st.none() | st.sampled_from(list(SeverityNumber))),
        body=draw(values),
        attributes=draw(st.none() | bounded()),
        event_name=draw(st.none() | text),
    )
    record.trace_id = draw(st.just(0) | trace_ids)
    record.span_id = draw(st.just(0) | span_ids)
    record.trace_flags = TraceFlags(draw(st.integers(0, 3)))
    return ReadableLogRecord(record, draw(resources), draw(scopes))


@given(st.lists(log_records(), max_size=3))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_logs_are_the_stock_message(batch: list[ReadableLogRecord]) -> None:
    """
    Every log record decodes to the very message that the stock encoder makes of it.
    """
    payload, count = encode_logs(batch)
    assert count == len(batch)
    assert flat(ExportLogsServiceRequest.FromString(payload)) == flat(stock_logs(batch))
    if len(batch) == 1:
        assert ExportLogsServiceRequest.FromString(payload) == stock_logs(batch)


def span_with(attributes: dict[str, object] | None = None, name: str = "s") -> ReadableSpan:
    context = SpanContext(1, 2, is_remote=False, trace_flags=TraceFlags(1))
    return ReadableSpan(name, context, resource=Resource({}), attributes=attributes)  # type: ignore[arg-type]


def decoded(span: ReadableSpan) -> dict[str, object]:
    request = ExportTraceServiceRequest.FromString(encode_spans([span])[0])
    (encoded,) = request.resource_spans[0].scope_spans[0].spans
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "", None) for pair in encoded.attributes}


def test_equal_values_of_different_types_keep_their_types() -> None:
    """
    True, 1 and 1.0 under one key arrive as a boolean, an integer and a float, in any order.
    """
    for value in (1, True, 1.0, 0, False, 0.0, True, 1):
        found = decoded(span_with({"same.key": value}))["same.key"]
        assert found == value
        assert type(found) is type(value)


def test_many_values_of_a_key_arrive_unchanged() -> None:
    """
    Values beyond what the caches hold, of many lengths, arrive like the first ones.
    """
    for number in range(300):
        value = f"/items/{'x' * (number * 7)}é"
        assert decoded(span_with({"wide.key": value, "wide.number": number})) == {
            "wide.key": value,
            "wide.number": number,
        }


def test_short_values_that_never_repeat_arrive_unchanged() -> None:
    """
    Hundreds of ids and paths under one key, with and without ASCII and Unicode, arrive as they are.
    """
    for number in range(400):
        value = f"{number:032x}" if number % 3 else "é" * (number % 50)
        assert decoded(span_with({"an.id": value, "": value})) == {"an.id": value, "": value}
    assert decoded(span_with({"an.id": "a\ud800b", "": "long" * 1000})) == {"an.id": "a?b", "": "long" * 1000}


def test_many_keys_arrive_unchanged() -> None:
    """
    More distinct keys and names than the caches hold change nothing.
    """
    for number in range(6000):
        span = span_with({f"key.{number}": "value"}, name=f"name {number}")
        if number % 500 == 0:
            assert ExportTraceServiceRequest.FromString(encode_spans([span])[0]) == stock_spans([span])
        else:
            encode_spans([span])


class Broken:
    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a\ud800b", "a?b"),
        (2**70, hex(2**70)),
        (-(2**63) - 1, hex(-(2**63) - 1)),
        (complex(1, 2), "(1+2j)"),
        (Broken(), None),
    ],
)
def test_what_otlp_cannot_hold_is_replaced(value: object, expected: object) -> None:
    """
    A value that OTLP has no place for becomes text, or an empty value; the span and its other attributes arrive.
    """
    assert decoded(span_with({"odd": value, "kept": "yes"})) == {"odd": expected, "kept": "yes"}


def test_text_that_is_not_unicode_is_replaced_everywhere() -> None:
    """
    Lone surrogates in names, keys, values and status never lose a span.
    """
    bad = "x\udcff"
    span = ReadableSpan(
        bad,
        SpanContext(1, 2, is_remote=False, trace_flags=TraceFlags(1)),
        resource=Resource({bad: bad}),
        attributes={bad: bad},
        events=[Event(bad, {bad: bad}, timestamp=1)],
        status=Status(StatusCode.ERROR, bad),
        instrumentation_scope=InstrumentationScope(bad, bad, bad),
    )
    for _ in range(200):  # past the caches' limits, too
        payload, count = encode_spans([span])
        assert count == 1
        (encoded,) = ExportTraceServiceRequest.FromString(payload).resource_spans[0].scope_spans[0].spans
        assert (encoded.name, encoded.status.message, encoded.attributes[0].key) == ("x?", "x?", "x?")


def test_a_list_that_contains_itself_is_cut() -> None:
    """
    A value without an end is cut at a depth that receivers accept.
    """
    endless: list[object] = ["x"]
    endless.append(endless)
    assert "endless" in decoded(span_with({"endless": endless}))


def test_a_span_that_cannot_be_encoded_costs_itself_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    One impossible span is left out and counted; the others of its batch arrive.
    """
    monkeypatch.delenv(guard.STRICT_ENV)
    impossible = span_with()
    impossible._start_time = -1
    payload, count = encode_spans([span_with(name="first"), impossible, span_with(name="last")])
    found = ExportTraceServiceRequest.FromString(payload).resource_spans[0].scope_spans[0].spans
    assert (count, [span.name for span in found]) == (2, ["first", "last"])
    assert guard.counters()["spans.dropped.not_encodable"] == 1


def test_light_spans_are_the_stock_message() -> None:
    """
    A light span with everything on it decodes to the message that the stock encoder makes of it.
    """
    from opentelemetry.context import Context

    from otel_correlation.ids import CorrelationIdGenerator
    from otel_correlation.sampling import RatioSampler
    from otel_correlation.tracer import LightSpan, Tracer

    ended: list[ReadableSpan] = []

    class Keep(export.SpanPipeline):
        def on_end(self, span: ReadableSpan) -> None:
            ended.append(span)

    provider = TracerProvider(sampler=RatioSampler(1.0), id_generator=CorrelationIdGenerator())
    provider.add_span_processor(Keep([]))
    span = Tracer("otel_correlation.server", provider).start(
        "GET /x", SpanKind.SERVER, Context(), {"a": "b", "n": 1, "f": 1.5, "t": True}
    )
    span.set_attribute("list", [1, 2])
    span.add_event("e", {"k": "v"})
    span.add_link(SpanContext(3, 4, is_remote=True), {"l": 1})
    span.set_status(StatusCode.ERROR, "why")
    span.end()
    assert type(ended[0]) is LightSpan
    assert ExportTraceServiceRequest.FromString(encode_spans(ended)[0]) == stock_spans(ended)
