"""
Identities that no request brings: work of the service's own, and what messages carry.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import baggage, propagate, trace
from opentelemetry import context as otel_context
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.trace import SpanKind, StatusCode

from otel_correlation import bind, continue_from, guard, identity, inject, request_id, tasks, trace_id, work
from otel_correlation.tasks import carriers
from otel_correlation.tracer import Tracer
from tests.contract.wire import CALLER, TRACE, UUID, wired

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.sdk.trace import ReadableSpan

    from otel_correlation.settings import Settings
    from tests.contract.wire import Wire

PARENT = f"00-{TRACE}-{CALLER}-01"
RID = "order-4711-customer-quote"


@pytest.fixture(params=["light", "plain"])
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    """
    A process that is set up, with light spans and with the SDK's.
    """
    with wired(request.param, instrument=False) as found:
        tasks.activate(lambda: found.settings)
        yield found
        tasks.deactivate()


def only(wire: Wire) -> ReadableSpan:
    """
    Return the one span that ended.
    """
    (span,) = wire.spans
    return span


def ids() -> tuple[str | None, str | None]:
    """
    Return request id and trace id as user code sees them.
    """
    return request_id(), trace_id()


def test_work_is_a_trace_of_its_own(wire: Wire) -> None:
    """
    ``work`` makes an INTERNAL root span; its trace id in hex is the request id, there and on the span.
    """
    with work("tick", attributes={"job": 7, "list": [1, 2]}) as span:
        rid, tid = ids()
        assert trace.get_current_span() is span
        assert rid == tid
    assert ids() == (None, None)
    ended = only(wire)
    assert (ended.name, ended.kind, ended.parent) == ("tick", SpanKind.INTERNAL, None)
    assert f"{span.get_span_context().trace_id:032x}" == tid
    assert dict(ended.attributes or {}) == {"job": 7, "list": (1, 2), "request_id": rid}
    assert ended.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize(
    ("given_id", "trace_of"),
    [(UUID, "f4a2b3c1deadbeef0000aabbccddeeff"), (RID, "b2sum"), ("42", None), ("not valid", None), ("é", None)],
)
def test_a_given_request_id_is_bridged(wire: Wire, given_id: str, trace_of: str | None) -> None:
    """
    A request id given to ``work`` leads to its trace as at the edge; one that is not valid is replaced and not shown.
    """
    with work("tick", request_id=given_id):
        rid, tid = ids()
    refused = given_id in ("not valid", "é")
    assert (rid == given_id) is not refused
    assert guard.counters().get("request_id.refused", 0) == int(refused)
    if trace_of == "b2sum":
        assert tid != rid
        with work("again", request_id=given_id):
            assert trace_id() == tid
    elif trace_of:
        assert tid == trace_of
    elif refused:
        assert rid == tid
    assert given_id not in str([span.attributes for span in wire.spans]) or not refused


def test_minting_a_uuid(wire: Wire) -> None:
    """
    With ``mint=uuid`` the request id is a UUID whose bits are the trace id.
    """
    wire.configure(mint="uuid")
    with work("tick"):
        rid, tid = ids()
    assert rid is not None
    assert len(rid) == 36
    assert rid.replace("-", "") == tid


def test_work_inside_of_something_is_linked(wire: Wire) -> None:
    """
    Inside a request or other work, ``work`` still is a new trace, linked to what was current; that is current again.
    """
    with work("outer") as outer:
        before = ids()
        with work("inner"):
            inner = ids()
        assert ids() == before
    assert before[0] != inner[0]
    assert before[1] != inner[1]
    ended = wire.spans[0]
    assert ended.parent is None
    assert [link.context for link in ended.links] == [outer.get_span_context()]
    assert wire.spans[1].links == () or not list(wire.spans[1].links)


def test_the_reuse_guard_counts_work_too(wire: Wire) -> None:
    """
    One constant request id never builds an endless trace.
    """
    traces = set()
    for _ in range(103):
        with work("tick", request_id=UUID):
            traces.add(trace_id())
            assert request_id() == UUID
    assert len(traces) == 4
    assert guard.counters()["request_id.reused"] == 3
    assert (wire.spans[-1].attributes or {})["otel_correlation.request_id.reused"] is True


def test_an_exception_is_recorded_once_and_passes(wire: Wire) -> None:
    """
    What the block raises passes through as the same object, is recorded once with ``error.type``, and keeps the ids.
    """
    error = LookupError("gone")
    kept = None

    @work("tick")
    def fail() -> None:
        nonlocal kept
        kept = identity.log_ids()
        raise error

    with pytest.raises(LookupError) as caught:
        fail()
    assert caught.value is error
    ended = only(wire)
    assert [event.name for event in ended.events] == ["exception"]
    assert (ended.attributes or {})["error.type"] == "LookupError"
    assert ended.status.status_code is StatusCode.ERROR
    assert identity.stashed(error) == kept


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (asyncio.CancelledError(), "asyncio.exceptions.CancelledError"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (SystemExit(3), "SystemExit"),
        (SystemExit(0), None),
        (GeneratorExit(), None),
    ],
)
def test_ends_that_are_no_bugs(wire: Wire, error: BaseException, kind: str | None) -> None:
    """
    A cancelled block has ``error.type`` and no exception event; one that ends on purpose is no error at all.
    """
    with pytest.raises(type(error)), work("tick"):
        raise error
    ended = only(wire)
    assert not ended.events
    assert (ended.attributes or {}).get("error.type") == kind
    assert ended.status.status_code is (StatusCode.ERROR if kind else StatusCode.UNSET)


def test_decorated_functions(wire: Wire) -> None:
    """
    Each call of a decorated function or coroutine function has an identity of its own, also at the same time.
    """

    @work("tick")
    def tick(number: int) -> tuple[int, str | None]:
        """
        Tick.
        """
        return number, request_id()

    @work("tock")
    async def tock() -> str | None:
        await asyncio.sleep(0)
        return request_id()

    async def both() -> list[str | None]:
        return list(await asyncio.gather(tock(), tock()))

    one, two = tick(1), tick(2)
    assert (one[0], two[0]) == (1, 2)
    assert len({one[1], two[1], *asyncio.run(both())} - {None}) == 4
    assert tick.__name__ == "tick"
    assert [span.name for span in wire.spans] == ["tick", "tick", "tock", "tock"]


def test_a_generator_is_not_decorated() -> None:
    """
    A generator function is refused at once: it would run after its identity has ended.
    """

    def numbers() -> Iterator[int]:
        yield 1

    with pytest.raises(TypeError, match="with block"):
        work("tick")(numbers)


def test_async_with(wire: Wire) -> None:
    """
    ``async with`` does the same.
    """

    async def run() -> None:
        async with work("tick") as span:
            assert trace.get_current_span() is span
        async with continue_from({"traceparent": PARENT}, "consume"):
            assert trace_id() == TRACE

    asyncio.run(run())
    assert [span.name for span in wire.spans] == ["tick", "consume"]


def test_tasks_share_a_scope(wire: Wire) -> None:
    """
    One object that two tasks enter is an identity for each; each ends its own, whoever ends first.
    """
    tick = work("tick")

    async def first(entered: asyncio.Event, left: asyncio.Event) -> None:
        with tick as span:
            await entered.wait()
        assert ids() == (None, None)
        assert not span.is_recording()
        left.set()

    async def second(entered: asyncio.Event, left: asyncio.Event) -> None:
        with tick as span:
            before = ids()
            entered.set()
            await left.wait()
            assert ids() == before
            assert span.is_recording()
        assert ids() == (None, None)

    async def both() -> None:
        entered, left = asyncio.Event(), asyncio.Event()
        await asyncio.gather(first(entered, left), second(entered, left))

    asyncio.run(both())
    assert len(wire.spans) == 2


def test_bind_reaches_the_span_of_work(wire: Wire) -> None:
    """
    ``bind`` inside ``work`` puts its fields on the span of ``work``, from inside a child span, too.
    """
    with work("tick"), trace.get_tracer("user").start_as_current_span("child"):
        bind(batch="b-7")
    assert (wire.spans[-1].attributes or {})["batch"] == "b-7"


def test_without_the_sdk_request_ids_go_on(wire: Wire) -> None:
    """
    With the SDK disabled there are request ids and nothing else, in work and in messages.
    """
    wire.configure(sdk_disabled=True)
    with work("tick", request_id=RID):
        assert ids() == (RID, None)
        carrier = inject()
    assert carrier == {"X-Request-ID": RID}
    with continue_from({**carrier, "traceparent": PARENT}, "consume"):
        assert ids() == (RID, None)
    with continue_from({}):
        rid, tid = ids()
        assert rid is not None
        assert tid is None
    assert wire.spans == []


def test_before_the_start_nothing_happens() -> None:
    """
    In a process that was not set up, or is switched off, nothing has ids and nothing fails.
    """
    with work("tick", request_id=RID) as span:
        assert ids() == (None, None)
        assert not span.is_recording()
        assert inject({"k": "v"}) == {"k": "v"}
        with continue_from({"traceparent": PARENT}, "consume"):
            assert ids() == (None, None)


def test_a_message_carries_everything(wire: Wire) -> None:
    """
    Trace, tracestate, baggage and request id of the producer are the consumer's, whose span is the producer's child.
    """
    with continue_from({"traceparent": PARENT, "tracestate": "vendor=1", "x-request-id": RID}, "produce") as producer:
        token = otel_context.attach(baggage.set_baggage("customer", "c 7"))
        carrier = inject()
        otel_context.detach(token)
    assert set(carrier) == {"traceparent", "tracestate", "baggage", "X-Request-ID"}
    assert all(type(value) is str for value in carrier.values())
    with continue_from(carrier, "consume", attributes={"messaging.system": "test"}) as consumer:
        assert ids() == (RID, TRACE)
        assert baggage.get_baggage("customer") == "c 7"
    assert baggage.get_baggage("customer") is None
    ended = wire.spans[-1]
    assert (ended.name, ended.kind) == ("consume", SpanKind.CONSUMER)
    assert ended.parent is not None
    assert ended.parent.span_id == producer.get_span_context().span_id
    assert consumer.get_span_context().trace_state["vendor"] == "1"
    assert dict(ended.attributes or {}) == {"messaging.system": "test", "request_id": RID}


def test_injecting_again_replaces_what_an_earlier_identity_left(wire: Wire) -> None:
    """
    A carrier that is used for several messages says only what the last one's identity says, however it was spelled.
    """
    carrier = {"Traceparent": PARENT, "tracestate": "vendor=1", "BAGGAGE": "a=1", "x-request-id": "old", "k": "v"}
    with work("tick", request_id=RID):
        assert inject(carrier) is carrier
        tid = trace_id()
    assert carrier["X-Request-ID"] == RID
    assert str(tid) in carrier["traceparent"]
    assert "vendor" not in carrier.get("tracestate", "")
    assert {name.lower() for name in carrier} <= {"traceparent", "tracestate", "x-request-id", "k"}
    assert len({name.lower() for name in carrier}) == len(carrier)


def test_outside_nothing_is_injected(wire: Wire) -> None:
    """
    Where nothing is current nothing is written.
    """
    assert inject() == {}
    assert inject({"k": "v"}) == {"k": "v"}


def test_without_the_sdk_the_propagators_still_count(wire: Wire) -> None:
    """
    Where OTEL_PROPAGATORS leaves the request id out, a message goes without it, also with the SDK disabled.
    """
    cases: list[tuple[str, dict[str, str]]] = [("tracecontext", {}), ("xrequestid", {"X-Request-ID": RID})]
    for name, written in cases:
        wire.configure(sdk_disabled=True, propagators=[name])
        with work("tick", request_id=RID):
            assert inject() == written


@pytest.mark.parametrize("settings", [{"sdk_disabled": True}, {"propagators": ["xrequestid"]}])
def test_a_trace_that_is_not_wanted_is_no_fault_of_the_message(wire: Wire, settings: dict[str, Any]) -> None:
    """
    Where traces are not continued on purpose, nobody is warned of a message that has one.
    """
    wire.configure(**settings)
    with continue_from({"traceparent": PARENT}, "consume"):
        assert request_id() is not None
    assert not {"message.malformed", "message.without_ids"} & guard.counters().keys()


def test_the_header_has_the_name_of_the_settings(wire: Wire) -> None:
    """
    Messages use the names that requests use.
    """
    wire.configure(response_header="X-Correlation-ID", request_id_headers=["X-Correlation-ID", "X-Request-ID"])
    with work("tick", request_id=RID):
        carrier = inject()
    assert carrier["X-Correlation-ID"] == RID
    with continue_from(carrier):
        assert request_id() == RID


def test_a_carrier_that_refuses_is_no_error(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A carrier that cannot be written to costs the message its headers and nothing else.
    """

    class Frozen(dict[str, str]):
        def update(self, *args: Any, **kwargs: Any) -> None:
            raise TypeError("frozen")

    monkeypatch.delenv(guard.STRICT_ENV)
    with work("tick"):
        assert inject(Frozen(k="v")) == {"k": "v"}
    assert guard.counters()["internal_error.tasks.inject"] == 1


SHAPES: list[Any] = [
    {"traceparent": PARENT, "x-request-id": RID},
    {"TraceParent": PARENT, "X-REQUEST-ID": RID},
    {b"traceparent": PARENT.encode(), b"x-request-id": RID.encode()},
    {"traceparent": [PARENT], "x-request-id": (RID,)},
    {"traceparent": PARENT.encode(), "x-request-id": bytearray(RID.encode()), "priority": 3, "none": None},
    [("traceparent", PARENT.encode()), ("x-request-id", RID.encode()), ("x", None)],
    ((b"traceparent", PARENT.encode()), [b"x-request-id", memoryview(RID.encode())]),
]


@pytest.mark.parametrize("carrier", SHAPES)
def test_shapes_of_carriers(wire: Wire, carrier: Any) -> None:
    """
    Mappings and pairs are read, of text and of bytes, whatever the case of the names, and other headers are no matter.
    """
    with continue_from(carrier, "consume"):
        assert ids() == (RID, TRACE)
    with continue_from(carrier):
        assert ids() == (RID, TRACE)
    assert guard.counters() == {}


def test_a_generator_of_pairs(wire: Wire) -> None:
    """
    An iterator is read once.
    """
    with continue_from((pair for pair in SHAPES[0].items()), "consume"):
        assert ids() == (RID, TRACE)


def test_a_message_without_headers_starts_fresh(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    """
    A message without headers, or without any of ours, is counted, and one warning a minute says so; None is no message.
    """
    carriers: list[Any] = [None, {}, [], {"content-type": "json"}]
    for carrier in carriers:
        with continue_from(carrier, "consume"):
            rid, tid = ids()
            assert rid == tid
    assert guard.counters() == {"message.without_ids": 3}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert all(span.parent is None for span in wire.spans)


class Hostile(dict[str, str]):
    """
    A mapping that cannot be read.
    """

    def items(self) -> Any:
        raise RuntimeError("no")


MALFORMED: list[Any] = [
    {"traceparent": "00-zz"},
    {"traceparent": PARENT + "x" * 100_000},
    {"traceparent": [PARENT, PARENT]},
    [("traceparent", PARENT), ("Traceparent", PARENT)],
    {"traceparent": None},
    {"traceparent": 7},
    {"traceparent": PARENT.replace(TRACE, "0" * 32)},
    {"traceparent": b"\xff\xfe" + PARENT.encode()},
    PARENT,
    7,
    object(),
    Hostile(traceparent=PARENT),
    [("traceparent",)],
    [None],
    {f"h{number}": "v" for number in range(257)},
]


@pytest.mark.parametrize("carrier", MALFORMED, ids=[str(number) for number in range(len(MALFORMED))])
def test_malformed_headers_start_fresh(wire: Wire, carrier: Any, caplog: pytest.LogCaptureFixture) -> None:
    """
    Headers that cannot be used start a new trace, are counted, and give one warning a minute that shows none of them.
    """
    for _ in range(3):
        with continue_from(carrier, "consume"):
            rid, tid = ids()
            assert rid == tid != TRACE
    assert guard.counters() == {"message.malformed": 3}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert TRACE not in caplog.text
    assert all(span.parent is None for span in wire.spans)


@pytest.mark.parametrize("value", ["a b", "x" * 201, "a\n", "é", "", [RID, RID], None, b"\xff"])
def test_a_refused_request_id_is_replaced(wire: Wire, value: Any, caplog: pytest.LogCaptureFixture) -> None:
    """
    A request id that is not valid, or comes twice, is replaced as at the edge; the trace goes on.
    """
    with continue_from({"traceparent": PARENT, "x-request-id": value}, "consume"):
        assert ids() == (TRACE, TRACE)
    assert guard.counters() == {"request_id.refused": 1}
    assert len(caplog.records) == 1


def test_a_request_id_alone_leads_to_its_trace(wire: Wire) -> None:
    """
    A message of a legacy producer that has only a request id is in the trace that this id leads to.
    """
    with continue_from({"x-request-id": UUID}, "consume"):
        assert ids() == (UUID, UUID.replace("-", ""))
    assert only(wire).parent is None


def test_without_a_name_the_producer_is_current(wire: Wire) -> None:
    """
    Without a name no span is made; one that is made inside is the producer's child and has the request id.
    """
    with continue_from({"traceparent": PARENT, "x-request-id": RID}):
        assert ids() == (RID, TRACE)
        assert trace.get_current_span().get_span_context().span_id == int(CALLER, 16)
        Tracer("ours").start("inside", SpanKind.CLIENT, otel_context.get_current(), {}).end()
    ended = only(wire)
    assert ended.parent is not None
    assert ended.parent.span_id == int(CALLER, 16)
    assert (ended.attributes or {})["request_id"] == RID


@pytest.mark.parametrize("who", ["ours", "theirs"])
@pytest.mark.parametrize("carrier", [None, {"x-request-id": UUID}])
def test_without_a_name_the_first_span_gets_the_trace(wire: Wire, who: str, carrier: Any) -> None:
    """
    Where somebody else makes the first span of a fresh message, it gets the trace of the request id; the next does not.
    """

    def span() -> str:
        if who == "ours":
            made: Any = Tracer("ours").start("x", SpanKind.CONSUMER, otel_context.get_current(), {})
        else:
            made = trace.get_tracer("theirs").start_span("x")
        return f"{made.get_span_context().trace_id:032x}"

    with continue_from(carrier):
        rid = request_id()
        assert rid is not None
        assert span() == rid.replace("-", "")
        assert span() != rid.replace("-", "")
    with continue_from(carrier):
        pass
    assert span() != rid.replace("-", "")


@pytest.mark.parametrize(("setting", "argument"), [("continue", True), ("link", None), ("link", True)])
def test_links_instead_of_children(wire: Wire, setting: str, argument: bool | None) -> None:
    """
    With ``link`` the consumer has a trace of its own with a link to the producer, and the producer's request id.
    """
    wire.configure(messages=setting)
    with continue_from({"traceparent": PARENT, "x-request-id": RID}, "consume", link=argument) as span:
        rid, tid = ids()
    assert rid == RID
    assert tid != TRACE
    ended = only(wire)
    assert ended.parent is None
    assert [f"{link.context.trace_id:032x}" for link in ended.links] == [TRACE]
    assert span.get_span_context().trace_flags.random_trace_id


def test_a_call_wins_over_the_setting(wire: Wire) -> None:
    """
    ``link=False`` continues the trace whatever the setting says.
    """
    wire.configure(messages="link")
    with continue_from({"traceparent": PARENT}, "consume", link=False):
        assert trace_id() == TRACE


def test_a_message_inside_of_something_is_linked_to_it(wire: Wire) -> None:
    """
    A message that is handled inside a request continues its producer and has a link to the request's span.
    """
    with work("request") as outer, continue_from({"traceparent": PARENT}, "consume"):
        assert trace_id() == TRACE
    assert [link.context for link in wire.spans[0].links] == [outer.get_span_context()]


def test_a_foreign_propagator_that_fails(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A propagator of somebody else's that raises costs the message its trace, not its request id.
    """

    class Broken(TextMapPropagator):
        def extract(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no")

        def inject(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("no")

        @property
        def fields(self) -> set[str]:
            return set()

    monkeypatch.delenv(guard.STRICT_ENV)
    propagate.set_global_textmap(Broken())
    with continue_from({"x-request-id": RID}, "consume"):
        assert request_id() == RID
        assert inject() == {}


@pytest.mark.parametrize(
    "scope", [lambda: work("inside"), lambda: continue_from(None), lambda: continue_from({}, "in")]
)
def test_closing_a_generator_elsewhere_leaks_nothing(wire: Wire, scope: Any) -> None:
    """
    A generator that holds an identity and is closed in another context leaves that one's as it was, and says nothing.
    """

    async def numbers() -> Any:
        with scope():
            yield 1

    async def run() -> None:
        held = numbers()

        async def first() -> None:
            await anext(held)

        await asyncio.create_task(first())
        with work("closer"):
            before = ids()
            await held.aclose()
            assert ids() == before
        assert ids() == (None, None)

    asyncio.run(run())
    assert wire.spans[-1].name == "closer"
    assert not [name for name in guard.counters() if name.startswith("internal_error")]


texts = st.text(max_size=40) | st.sampled_from([PARENT, RID, UUID, "00-zz", "a=1", "ot=th:0", "x" * 300])
parts = texts | st.binary(max_size=40) | st.sampled_from([PARENT.encode(), RID.encode()]) | st.none() | st.integers()
names = st.sampled_from(
    ["traceparent", "TRACEPARENT", "tracestate", "baggage", "x-request-id", b"baggage", b"traceparent"]
)
keys = names | st.text(max_size=5) | st.binary(max_size=5) | st.none()
messages = st.one_of(
    st.dictionaries(keys, parts | st.lists(parts, max_size=3), max_size=6),
    st.lists(st.tuples(keys, parts), max_size=6),
    st.lists(st.one_of(parts, st.lists(parts, max_size=3)), max_size=4),
    parts,
)


@given(carrier=messages, name=st.none() | st.just("consume"), link=st.none() | st.booleans())
def test_no_carrier_breaks_anything(carrier: Any, name: str | None, link: bool | None) -> None:
    """
    Whatever a message carries: no exception, a valid request id inside, the same context as before outside.
    """
    with wired("light", instrument=False) as found:
        tasks.activate(lambda: found.settings)
        before = otel_context.get_current()
        with continue_from(carrier, name, link=link):
            rid = request_id()
            assert rid is not None
            assert len(rid) <= 200
            again = inject()
        assert otel_context.get_current() is before
        with continue_from(again, "next"):
            assert request_id() == rid
        tasks.deactivate()
    assert not any(key.startswith("internal_error") for key in guard.counters())


@given(rid=st.text("abcdefABC0189._~:/+=#-", min_size=1, max_size=200), shape=st.integers(0, 3))
def test_every_valid_id_goes_round(rid: str, shape: int) -> None:
    """
    Any valid request id and its trace come out of a message as they went in, whatever client carried it.
    """
    with wired("light", instrument=False) as found:
        tasks.activate(lambda: found.settings)
        with work("produce", request_id=rid):
            carrier = inject()
            before = ids()
        shaped: list[Any] = [
            carrier,
            list(carrier.items()),
            {key.encode(): value.encode() for key, value in carrier.items()},
            {key.upper(): [value] for key, value in carrier.items()},
        ]
        with continue_from(shaped[shape], "consume"):
            assert ids() == before
        tasks.deactivate()


def test_one_import_gives_everything() -> None:
    """
    The public names are functions of the package, whatever submodules were imported.
    """
    import otel_correlation

    assert "otel_correlation.tasks" in sys.modules
    for name in ("carried", "continue_from", "inject", "work"):
        assert callable(getattr(otel_correlation, name))
        assert name in otel_correlation.__all__


def test_our_failure_does_not_cost_the_work(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Where an identity cannot be begun, or its span cannot end, the block runs, and the context is as it was afterwards.
    """

    class Broken(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            raise OSError("no")

    def no_settings() -> Settings:
        raise OSError("no")

    monkeypatch.delenv(guard.STRICT_ENV)
    wire.provider.add_span_processor(Broken())
    with work("tick"):
        assert request_id() is not None
    assert ids() == (None, None)
    carriers.switch(no_settings)
    with work("tick") as span:
        assert ids() == (None, None)
        assert not span.is_recording()
    counted = guard.counters()
    assert (counted["internal_error.tasks.end"], counted["internal_error.tasks.begin"]) == (1, 1)


@pytest.mark.parametrize("calls", ["bootstrap()", "bootstrap(enabled=False); bootstrap(ratio=0.5)", ""])
def test_switched_off_nothing_is_patched(calls: str) -> None:
    """
    In a process that is switched off, or was not set up, threads are Python's own and nothing has ids.
    """
    code = f"""
import threading
from concurrent.futures import ThreadPoolExecutor
from otel_correlation import bootstrap, carried, continue_from, inject, request_id, work
{calls}
assert threading.Thread.start.__module__ == "threading"
assert ThreadPoolExecutor.submit.__module__ == "concurrent.futures.thread"
with work("tick", request_id="order-4711"), continue_from({{"x-request-id": "order-4711"}}, "consume"):
    assert request_id() is None and inject() == {{}} and carried(print) is print
"""
    environ = {**os.environ, "OTEL_TRACES_EXPORTER": "none"}
    if "enabled" not in calls:
        environ["OTEL_CORRELATION_ENABLED"] = "false"
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
