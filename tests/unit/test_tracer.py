"""
Spans of ours are OpenTelemetry SDK spans to everybody else, and plain ones wherever a third party looks at their start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import trace as trace_api
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import (
    ConcurrentMultiSpanProcessor,
    ReadableSpan,
    Span,
    SpanLimits,
    SpanProcessor,
    TracerProvider,
    _TracerConfig,
)
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, Sampler
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    NoOpTracerProvider,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from otel_correlation import identity
from otel_correlation.ids import CorrelationIdGenerator
from otel_correlation.outcome import record_exception
from otel_correlation.sampling import RatioSampler
from otel_correlation.tracer import SCHEMA_URL, LightSpan, Tracer, exception_event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

TRACE_ID = 0xF4A2B3C1DEADBEEF0000AABBCCDDEEFF
RESOURCE = Resource({"service.name": "tests"})


class Kept(SpanProcessor):
    """
    A processor that keeps ended spans and says that it needs nothing at their start, as our pipeline does.
    """

    accepts_light_spans = True

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(span)


class Foreign(SpanProcessor):
    """
    A third party's processor: it reads and writes the span at its start.
    """

    def __init__(self) -> None:
        self.started: list[Mapping[str, Any]] = []
        self.spans: list[ReadableSpan] = []

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        self.started.append(dict(span.attributes or {}))
        span.set_attribute("foreign", True)

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(span)


class XRayLike(IdGenerator):
    """
    A third party's id generator: the time is in the id.
    """

    def generate_span_id(self) -> int:
        return 0x1111

    def generate_trace_id(self) -> int:
        return 0x5F84C7A1 << 96 | 0x2222


def _provider(
    *processors: SpanProcessor,
    sampler: Sampler | None = None,
    limits: SpanLimits | None = None,
    id_generator: IdGenerator | None = None,
    **options: Any,
) -> TracerProvider:
    provider = TracerProvider(
        sampler=sampler or RatioSampler(1.0),
        resource=RESOURCE,
        id_generator=id_generator or CorrelationIdGenerator(),
        span_limits=limits,
        shutdown_on_exit=False,
        **options,
    )
    for processor in processors:
        provider.add_span_processor(processor)
    return provider


def _start(
    tracer: Tracer,
    name: str = "GET /",
    attributes: dict[str, Any] | Callable[[], dict[str, Any]] | None = None,
    context: Context | None = None,
    **options: Any,
) -> Any:
    return tracer.start(
        name,
        SpanKind.SERVER,
        Context() if context is None else context,
        {} if attributes is None else attributes,
        **options,
    )


def _is_light(span: object) -> bool:
    return type(span) is LightSpan


@pytest.fixture
def kept() -> Kept:
    """
    Where light spans end.
    """
    return Kept()


@pytest.fixture
def tracer(kept: Kept) -> Tracer:
    """
    A tracer with nothing but our own parts behind it.
    """
    return Tracer("tests", _provider(kept))


def _plain_twin(light: LightSpan, do: Callable[[Any], None], **options: Any) -> ReadableSpan:
    """
    Return the span that the SDK makes of the same start and the same calls, with the ids of ``light``.
    """
    kept = Kept()
    provider = _provider(kept, id_generator=RandomIdGenerator(), **options)
    sdk_tracer: Any = provider.get_tracer("tests", light.instrumentation_scope.version, SCHEMA_URL)  # type: ignore[union-attr]
    span = sdk_tracer.start_span("GET /", Context(), SpanKind.SERVER, {"http.request.method": "GET"}, start_time=1_000)
    span._context = light._context
    do(span)
    span.end(2_000)
    return kept.spans[0]


def _encoded(span: ReadableSpan) -> bytes:
    return bytes(encode_spans([span]).SerializeToString(deterministic=True))


# ---- what a light span is to others


def test_a_span_with_only_our_parts_behind_it_is_light(tracer: Tracer, kept: Kept) -> None:
    """
    With our sampler, ids and pipeline a light span is made, and it is an SDK span by every test that others make.
    """
    span = _start(tracer, attributes={"a": 1})
    assert _is_light(span)
    assert all(isinstance(span, kind) for kind in (Span, ReadableSpan, trace_api.Span))
    assert span.is_recording()
    assert span.context is span.get_span_context()
    assert span.context.is_valid
    assert not span.context.is_remote
    span.end()
    assert not span.is_recording()
    assert kept.spans == [span]
    assert span.resource is RESOURCE or span.resource == RESOURCE
    assert span.instrumentation_scope.name == "tests"
    assert span.instrumentation_scope.schema_url == SCHEMA_URL
    assert (span.kind, span.parent, span.name) == (SpanKind.SERVER, None, "GET /")
    assert span.attributes == {"a": 1}
    assert (span.events, span.links) == ((), ())
    assert (span.dropped_attributes, span.dropped_events, span.dropped_links) == (0, 0, 0)
    assert span.status.status_code is StatusCode.UNSET
    assert span.start_time <= span.end_time


def test_a_light_span_can_be_current_and_have_children(tracer: Tracer, kept: Kept) -> None:
    """
    ``use_span`` and ``start_as_current_span`` of any tracer see it as the parent.
    """
    provider = tracer._fixed
    assert provider is not None
    with trace_api.use_span(_start(tracer), end_on_exit=True) as span:
        assert trace_api.get_current_span() is span
        with provider.get_tracer("library").start_as_current_span("child") as child:
            assert child.get_span_context().trace_id == span.get_span_context().trace_id
    first, second = kept.spans
    assert first.parent == second.get_span_context()
    assert first.resource is second.resource


def test_a_light_span_is_a_context_manager_that_records_what_escapes(tracer: Tracer, kept: Kept) -> None:
    """
    ``with span:`` ends it, and an exception that leaves the block is recorded and re-raised, as with the SDK's.
    """
    with pytest.raises(KeyError), _start(tracer):
        raise KeyError("gone")
    (span,) = kept.spans
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "KeyError: 'gone'"
    assert [event.name for event in span.events] == ["exception"]
    assert (span.events[0].attributes or {})["exception.escaped"] == "True"


def test_use_span_records_what_escapes(tracer: Tracer, kept: Kept) -> None:
    """
    ``use_span`` records an exception once and sets the status.
    """
    with pytest.raises(ValueError, match="no"), trace_api.use_span(_start(tracer), end_on_exit=True):
        raise ValueError("no")
    (span,) = kept.spans
    assert span.status.description == "ValueError: no"
    assert len(span.events) == 1


# The order of one kind of calls is kept; a value is never written twice, as the SDK then moves it to the end.
SCRIPTS: Mapping[str, Callable[[Any], Any]] = {
    "nothing": lambda span: None,
    "plain values": lambda span: span.set_attributes({"s": "x", "b": True, "i": -1, "f": 0.5}),
    "sequences": lambda span: span.set_attributes({"l": ["a", "b"], "t": (1, 2), "empty": []}),
    "odd values": lambda span: span.set_attributes({"none": None, "map": {"a": {"b": 1}}, "mixed": [1, "a", None]}),
    "empty key": lambda span: span.set_attribute("", "x"),
    "wrong key": lambda span: span.set_attribute(5, "x"),
    "odd then plain": lambda span: (span.set_attribute("l", [1]), span.set_attribute("p", "x")),
    "events": lambda span: (span.add_event("one", {"a": 1}, 1_500), span.add_event("two", None, 1_600)),
    "too many event attributes": lambda span: span.add_event("many", {f"k{n}": n for n in range(200)}, 1_500),
    "links": lambda span: span.add_link(SpanContext(1, 2, is_remote=True, trace_flags=TraceFlags(1)), {"a": "b"}),
    "invalid link": lambda span: span.add_link(SpanContext(0, 0, is_remote=True)),
    "renamed": lambda span: span.update_name("GET /items/{id}"),
    "error": lambda span: span.set_status(Status(StatusCode.ERROR, "bad")),
    "error by code": lambda span: span.set_status(StatusCode.ERROR, "bad"),
    "ok is final": lambda span: (span.set_status(StatusCode.OK), span.set_status(StatusCode.ERROR, "late")),
    "unset changes nothing": lambda span: (span.set_status(StatusCode.ERROR, "x"), span.set_status(StatusCode.UNSET)),
    "error after error": lambda span: (span.set_status(StatusCode.ERROR, "a"), span.set_status(StatusCode.ERROR, "b")),
    "exception": lambda span: span.record_exception(ValueError("v"), {"more": 1}, 1_700),
    "own exception, escaped": lambda span: span.record_exception(OwnError("v"), None, 1_700, escaped=True),
    "128 attributes": lambda span: span.set_attributes({f"k{n}": n for n in range(127)}),
    "200 attributes": lambda span: span.set_attributes({f"k{n}": n for n in range(200)}),
    "200 events": lambda span: [span.add_event(f"e{n}", None, n + 1) for n in range(200)],
    "200 links": lambda span: [span.add_link(SpanContext(1, n + 1, is_remote=False)) for n in range(200)],
}


class OwnError(Exception):
    """
    An exception with a module in its name.
    """


@pytest.mark.parametrize("script", SCRIPTS)
def test_whatever_is_called_on_it_it_is_exported_like_the_sdks(script: str, tracer: Tracer, kept: Kept) -> None:
    """
    After the same calls the stock OTLP encoder and ``to_json`` make the same of a light span and of the SDK's.
    """
    do = SCRIPTS[script]
    span = _start(tracer, attributes={"http.request.method": "GET"}, start_time=1_000)
    assert _is_light(span)
    do(span)
    span.end(2_000)
    twin = _plain_twin(span, do)
    assert _encoded(span) == _encoded(twin)
    assert json.loads(span.to_json()) == json.loads(twin.to_json())
    assert span.dropped_attributes == twin.dropped_attributes
    assert span.dropped_events == twin.dropped_events
    assert span.dropped_links == twin.dropped_links


LATE: Mapping[str, Callable[[Any], Any]] = {
    **{name: do for name, do in SCRIPTS.items() if name != "nothing"},
    "end": lambda span: span.end(9_000),
}


@pytest.mark.parametrize("script", LATE)
def test_nothing_changes_after_the_end(script: str, tracer: Tracer, kept: Kept) -> None:
    """
    Calls after ``end`` are ignored, and a second ``end`` exports nothing twice.
    """
    span = _start(tracer, attributes={"a": 1}, start_time=1_000)
    span.end(2_000)
    before = span.to_json()
    LATE[script](span)
    assert span.to_json() == before
    assert len(kept.spans) == 1


def test_two_threads_that_end_a_span_end_it_once(tracer: Tracer, kept: Kept) -> None:
    """
    However many threads end a span at the same time, it is exported once.
    """
    threads = 4
    barrier = threading.Barrier(threads)
    spans = [_start(tracer) for _ in range(300)]

    def end_all() -> None:
        barrier.wait(60)
        for span in spans:
            span.end()

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(end_all) for _ in range(threads)]:
            done.result(60)
    assert len(kept.spans) == len(spans)


def test_an_attribute_can_be_overwritten(tracer: Tracer) -> None:
    """
    The last value of a key wins, whether or not the attributes were bounded in between.
    """
    span = _start(tracer, attributes={"a": 1})
    span.set_attribute("a", 2)
    assert span.attributes == {"a": 2}
    span.set_attribute("list", [1, 2])
    span.set_attribute("a", "three")
    assert span.attributes == {"a": "three", "list": (1, 2)}


def test_a_sequence_is_copied(tracer: Tracer) -> None:
    """
    A list that the caller changes later is exported as it was when it was set.
    """
    values = ["a"]
    span = _start(tracer)
    span.set_attribute("list", values)
    values.append("b")
    assert span.attributes == {"list": ("a",)}


def test_the_count_limit_holds_from_the_start(kept: Kept) -> None:
    """
    A span keeps no more attributes than the limit says, those of its start included, and counts what it dropped.
    """
    tracer = Tracer("tests", _provider(kept, limits=SpanLimits(max_span_attributes=3)))
    span = _start(tracer, attributes={f"k{n}": n for n in range(5)})
    assert _is_light(span)
    assert len(span.attributes) == 3
    assert span.dropped_attributes == 2
    span.set_attribute("more", 1)
    assert len(span.attributes) == 3
    assert span.dropped_attributes == 3


def test_no_limit_is_no_limit(kept: Kept) -> None:
    """
    Where the count limit is switched off every attribute is kept.
    """
    tracer = Tracer("tests", _provider(kept, limits=SpanLimits(max_span_attributes=SpanLimits.UNSET)))
    span = _start(tracer)
    span.set_attributes({f"k{n}": n for n in range(1_000)})
    assert len(span.attributes) == 1_000
    assert span.dropped_attributes == 0


def test_links_given_at_the_start_are_kept_up_to_the_limit(kept: Kept) -> None:
    """
    Links of the start are the span's links, the last ones where there are too many.
    """
    tracer = Tracer("tests", _provider(kept, limits=SpanLimits(max_links=2)))
    links = [Link(SpanContext(1, n + 1, is_remote=True)) for n in range(3)]
    span = _start(tracer, links=links)
    span.add_link(SpanContext(9, 9, is_remote=True))
    assert [link.context.span_id for link in span.links] == [3, 9]


def test_times_can_be_given(tracer: Tracer) -> None:
    """
    A given start and end are kept, zero too; without them the clock decides.
    """
    span = _start(tracer, start_time=0)
    span.end(0)
    assert (span.start_time, span.end_time) == (0, 0)
    span = _start(tracer)
    span.end()
    assert 0 < span.start_time <= span.end_time


def test_a_snapshot_can_be_taken(tracer: Tracer) -> None:
    """
    Code of the SDK that copies a span gets a readable one with everything in it.
    """
    span = _start(tracer, attributes={"a": 1})
    copy = span._readable_span()
    assert copy.attributes == {"a": 1}
    assert copy.get_span_context() == span.get_span_context()
    assert copy.resource is span.resource
    assert span._limits.max_span_attributes == 128
    assert span._span_processor is tracer.processor
    assert "GET /" in repr(span)


# ---- ids, parents and the request id


def test_a_bridged_root_has_the_given_id_and_no_random_flag(tracer: Tracer) -> None:
    """
    A root gets the trace id that it is given; the W3C random flag is set for a minted one only.
    """
    bridged = _start(tracer, trace_id=TRACE_ID).get_span_context()
    assert (bridged.trace_id, bridged.trace_flags) == (TRACE_ID, 1)
    minted = _start(tracer, trace_id=TRACE_ID, minted=True).get_span_context()
    assert (minted.trace_id, minted.trace_flags) == (TRACE_ID, 3)
    own = _start(tracer).get_span_context()
    assert own.trace_id not in (0, TRACE_ID)
    assert own.trace_flags == 3


@pytest.mark.parametrize("flags", range(4))
def test_a_child_follows_its_parent(tracer: Tracer, flags: int) -> None:
    """
    Below a remote parent a span has its trace id and flags, whatever trace id was offered.
    """
    parent = SpanContext(7, 8, is_remote=True, trace_flags=TraceFlags(flags))
    span = _start(tracer, context=set_span_in_context(NonRecordingSpan(parent), Context()), trace_id=TRACE_ID)
    context = span.get_span_context()
    assert (context.trace_id, context.trace_flags) == (7, flags)
    assert span.is_recording() is bool(flags & 1)
    if flags & 1:
        assert span.parent == parent


def test_an_invalid_parent_is_no_parent(tracer: Tracer) -> None:
    """
    Below an invalid span context a root is made.
    """
    span = _start(tracer, context=set_span_in_context(trace_api.INVALID_SPAN, Context()), trace_id=TRACE_ID)
    assert span.parent is None
    assert span.get_span_context().trace_id == TRACE_ID


def test_attributes_are_collected_only_when_somebody_will_see_them(kept: Kept) -> None:
    """
    A dropped span has valid ids, records nothing, and its attributes are never collected.
    """
    tracer = Tracer("tests", _provider(kept, sampler=RatioSampler(0.0)))

    def collect() -> dict[str, Any]:
        raise AssertionError("collected for nobody")

    span = _start(tracer, attributes=collect, trace_id=TRACE_ID)
    assert isinstance(span, NonRecordingSpan)
    assert span.get_span_context().trace_id == TRACE_ID
    assert span.get_span_context().trace_flags == 0
    span.end()
    assert kept.spans == []


@pytest.mark.parametrize("plain", [False, True])
def test_every_span_carries_the_request_id(plain: bool) -> None:
    """
    The request id of the context stands on the span, light or plain, and collected attributes beside it.
    """
    tracer = Tracer("tests", _provider(Foreign() if plain else Kept()))
    context = identity.set_in(Context(), identity.Identity("customer-4711"))
    span = _start(tracer, attributes=lambda: {"a": 1}, context=context)
    assert _is_light(span) is not plain
    assert span.attributes["request_id"] == "customer-4711"
    assert span.attributes["a"] == 1


# ---- where the SDK makes the span


def _foreign_provider(case: str) -> TracerProvider:
    kept = Kept()
    if case == "processor":
        return _provider(kept, Foreign())
    if case == "sampler":
        return _provider(kept, sampler=ParentBased(ALWAYS_ON))
    if case == "id generator":
        return _provider(kept, id_generator=RandomIdGenerator())
    if case == "length limit":
        return _provider(kept, limits=SpanLimits(max_span_attribute_length=5))
    concurrent = ConcurrentMultiSpanProcessor()
    concurrent.add_span_processor(kept)
    return _provider(active_span_processor=concurrent)


@pytest.mark.parametrize("case", ["processor", "sampler", "id generator", "length limit", "concurrent"])
def test_with_a_third_partys_part_the_sdk_makes_the_span(case: str) -> None:
    """
    With a foreign processor, sampler, id generator or processor list, or a length limit, spans are plain and complete.
    """
    provider = _foreign_provider(case)
    tracer = Tracer("tests", provider)
    for _ in range(2):
        span = _start(tracer, attributes={"a": "123456789"}, trace_id=TRACE_ID, start_time=5)
        assert isinstance(span, Span)
        assert not isinstance(span, LightSpan)
        assert span.get_span_context().trace_id == TRACE_ID
        assert span.start_time == 5
        assert span.attributes is not None
        assert span.attributes["a"] == ("12345" if case == "length limit" else "123456789")
        span.end()
    assert list(provider._tracers) == [tracer.scope]
    if case == "concurrent":
        provider.shutdown()


def test_a_foreign_processor_sees_and_changes_attributes_at_the_start() -> None:
    """
    A third party's ``on_start`` has all attributes in its hands, and what it sets is exported.
    """
    foreign = Foreign()
    tracer = Tracer("tests", _provider(foreign))
    _start(tracer, attributes={"a": 1}).end()
    assert foreign.started == [{"a": 1}]
    assert foreign.spans[0].attributes == {"a": 1, "foreign": True}


def test_a_processor_added_later_gets_every_span_from_then_on(kept: Kept) -> None:
    """
    A span processor that the application adds while serving sees the next span from its start.
    """
    provider = _provider(kept)
    tracer = Tracer("tests", provider)
    assert _is_light(_start(tracer))
    foreign = Foreign()
    provider.add_span_processor(foreign)
    span = _start(tracer, attributes={"a": 1})
    assert not _is_light(span)
    span.end()
    assert len(foreign.spans) == len(kept.spans) == 1


def test_a_second_processor_of_ours_keeps_spans_light(kept: Kept) -> None:
    """
    Several processors that need nothing at the start all get the light span at its end.
    """
    other = Kept()
    tracer = Tracer("tests", _provider(kept, other))
    span = _start(tracer)
    assert _is_light(span)
    span.end()
    assert kept.spans == other.spans == [span]


def test_without_any_processor_spans_go_nowhere() -> None:
    """
    A provider without processors is served, and a processor of ours added later gets the spans.
    """
    provider = _provider()
    tracer = Tracer("tests", provider)
    span = _start(tracer)
    assert _is_light(span)
    span.end()
    kept = Kept()
    provider.add_span_processor(kept)
    _start(tracer).end()
    assert len(kept.spans) == 1


def test_a_sampler_that_is_exchanged_decides_from_then_on(kept: Kept) -> None:
    """
    A ratio that is changed while serving holds from the next span on.
    """
    provider = _provider(kept)
    tracer = Tracer("tests", provider)
    assert _start(tracer).is_recording()
    for sdk_tracer in provider._tracers.values():
        sdk_tracer.sampler = RatioSampler(0.0)
    assert not _start(tracer).is_recording()
    for sdk_tracer in provider._tracers.values():
        sdk_tracer.sampler = ALWAYS_ON
    span = _start(tracer)
    assert span.is_recording()
    assert not _is_light(span)


@pytest.fixture
def no_global_provider() -> Iterator[None]:
    """
    A process in which nobody has set a tracer provider yet.
    """
    before = trace_api._TRACER_PROVIDER
    trace_api._TRACER_PROVIDER = None
    yield
    trace_api._TRACER_PROVIDER = before


@pytest.mark.usefixtures("no_global_provider")
def test_the_global_provider_is_asked_again_when_it_changes(kept: Kept) -> None:
    """
    Without a provider of its own a tracer follows the global one, which may be set after the first span.
    """
    tracer = Tracer("tests")
    nothing = _start(tracer, attributes={"a": 1}, trace_id=TRACE_ID)
    assert not nothing.is_recording()
    trace_api._TRACER_PROVIDER = _provider(kept)
    assert _is_light(_start(tracer))
    trace_api._TRACER_PROVIDER = _provider(Foreign())
    assert not _is_light(_start(tracer))
    trace_api._TRACER_PROVIDER = NoOpTracerProvider()
    assert not _start(tracer).is_recording()
    trace_api._TRACER_PROVIDER = _provider(kept)
    assert _is_light(_start(tracer))


def test_a_disabled_tracer_makes_no_spans(kept: Kept) -> None:
    """
    A tracer that the provider's configurator switches off records nothing, before and after its first span.
    """
    provider = _provider(kept)
    tracer = Tracer("tests", provider)
    assert _start(tracer).is_recording()
    provider._set_tracer_configurator(tracer_configurator=lambda scope: _TracerConfig(is_enabled=False))
    assert not _start(tracer).is_recording()


@pytest.mark.parametrize("minted", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_plain_root_takes_the_given_id_too(minted: bool, wrapped: bool) -> None:
    """
    On the SDK's way a root has the given id, too, with the random flag of its own kind, on any id generator.
    """
    generator = RandomIdGenerator() if wrapped else CorrelationIdGenerator()
    tracer = Tracer("tests", _provider(Foreign(), id_generator=generator))
    context = _start(tracer, trace_id=TRACE_ID, minted=minted).get_span_context()
    assert context.trace_id == TRACE_ID
    assert context.trace_flags.random_trace_id is minted
    other = _start(tracer).get_span_context()
    assert other.trace_id not in (0, TRACE_ID)


@pytest.mark.parametrize("processor", [Kept, Foreign])
def test_the_users_own_roots_never_get_the_given_id(processor: type[SpanProcessor]) -> None:
    """
    A new root that user code starts, in the request or in a processor's ``on_start``, has an id of its own.
    """
    seen: list[int] = []

    class Nested(SpanProcessor):
        def on_start(self, span: Span, parent_context: Context | None = None) -> None:
            if span.name != "audit":
                root = provider.get_tracer("user").start_span("audit", Context())
                seen.append(root.get_span_context().trace_id)

    provider = _provider(processor(), Nested())
    span = _start(Tracer("tests", provider), trace_id=TRACE_ID)
    own = provider.get_tracer("user").start_span("own", Context())
    seen.append(own.get_span_context().trace_id)
    assert span.get_span_context().trace_id == TRACE_ID
    assert TRACE_ID not in seen
    assert len(set(seen)) == len(seen) >= 2


def test_new_trace_ids_come_from_the_providers_own_generator() -> None:
    """
    A foreign id generator makes the minted trace ids from the first request on, and all span ids.
    """
    provider = _provider(Kept(), id_generator=XRayLike())
    tracer = Tracer("tests", provider)
    assert tracer.new_trace_id() == 0x5F84C7A1 << 96 | 0x2222
    assert _start(tracer).get_span_context().span_id == 0x1111
    assert isinstance(provider.id_generator, XRayLike)


@pytest.mark.usefixtures("no_global_provider")
def test_new_trace_ids_are_random_where_nobody_makes_spans() -> None:
    """
    Without an SDK trace ids are still made, for the log lines.
    """
    tracer = Tracer("tests")
    assert len({tracer.new_trace_id() for _ in range(100)} - {0}) == 100


def test_a_plain_span_goes_through_a_stock_exporter() -> None:
    """
    With a stock processor and exporter our spans arrive complete.
    """
    exporter = InMemorySpanExporter()
    tracer = Tracer("tests", _provider(SimpleSpanProcessor(exporter)))
    _start(tracer, attributes={"a": 1}, trace_id=TRACE_ID).end()
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.attributes) == ("GET /", {"a": 1})


# ---- exceptions


@pytest.mark.parametrize("limit", [None, 100])
def test_an_exception_that_was_recorded_and_cut_is_not_recorded_again(limit: int | None) -> None:
    """
    Where attributes have a greatest length, the event of user code is known by what is left of its message.
    """
    span = TracerProvider(span_limits=SpanLimits(max_attribute_length=limit)).get_tracer("shop").start_span("work")
    error, other = OwnError("z" * 500), OwnError("y" * 500)
    span.record_exception(error)
    record_exception(span, error)
    assert isinstance(span, ReadableSpan)
    assert len(span.events) == 1
    record_exception(span, other)
    assert len(span.events) == 2


def test_record_exception_marks_the_span(tracer: Tracer) -> None:
    """
    An exception that ended the work is one event, status ERROR and ``error.type``, by name or as told.
    """
    span = _start(tracer)
    try:
        raise OwnError("lost")
    except OwnError as error:
        record_exception(span, error)
        values = exception_event(error)
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == f"{__name__}.OwnError"
    assert [event.name for event in span.events] == ["exception"]
    assert dict(span.events[0].attributes or {}) == values
    assert values["exception.type"] == f"{__name__}.OwnError"
    assert values["exception.message"] == "lost"
    assert "raise OwnError" in values["exception.stacktrace"]
    other = _start(tracer)
    record_exception(other, ValueError("x"), error_type="timeout")
    assert other.attributes["error.type"] == "timeout"


def test_an_exception_on_a_span_that_records_nothing_is_left_alone() -> None:
    """
    For a dropped span no traceback is formatted.
    """

    class Unprintable(Exception):  # noqa: N818 - it is one
        def __str__(self) -> str:
            raise AssertionError("formatted for nobody")

    record_exception(trace_api.INVALID_SPAN, Unprintable())


# ---- fork

_FORKING = """
import os, sys
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind
from otel_correlation.ids import CorrelationIdGenerator
from otel_correlation.sampling import RatioSampler
from otel_correlation.tracer import LightSpan, Tracer

provider = TracerProvider(sampler=RatioSampler(1.0), id_generator=CorrelationIdGenerator(), shutdown_on_exit=False)
tracer = Tracer("tests", provider)

def show(who):
    span = tracer.start("GET /", SpanKind.SERVER, Context(), {})
    assert type(span) is LightSpan
    instance = span.resource.attributes["service.instance.id"]
    print(who, instance, f"{span.context.trace_id:032x}", span.resource is provider.resource, flush=True)

show("parent")
child = os.fork()
if child == 0:
    show("child")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
show("parent")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_the_resource_is_renewed_after_a_fork() -> None:
    """
    A forked worker's spans carry its own ``service.instance.id`` and trace ids of their own.
    """
    done = subprocess.run([sys.executable, "-c", _FORKING], capture_output=True, text=True, check=True, timeout=60)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["parent", "child", "parent"]
    parent, child, again = lines
    assert parent[1] == again[1] != child[1]
    assert len({line[2] for line in lines}) == 3
    assert {line[3] for line in lines} == {"True"}


def test_the_flags_of_every_decision_exist(tracer: Tracer) -> None:
    """
    Sampled and random flags of the span context are TraceFlags, not plain numbers, in every combination.
    """
    contexts: Sequence[SpanContext] = [
        _start(tracer, trace_id=TRACE_ID, minted=minted).get_span_context() for minted in (True, False)
    ]
    assert all(isinstance(context.trace_flags, TraceFlags) and context.trace_flags.sampled for context in contexts)


def test_bytes_are_exported(tracer: Tracer) -> None:
    """
    A bytes value is exported as bytes (``to_json`` of the SDK itself cannot show one).
    """
    span = _start(tracer, attributes={"http.request.method": "GET"}, start_time=1_000)
    span.set_attribute("raw", b"\x00\xff")
    span.end(2_000)
    assert _encoded(span) == _encoded(_plain_twin(span, lambda plain: plain.set_attribute("raw", b"\x00\xff")))
