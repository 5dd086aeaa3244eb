"""
Headers that are there before ours: what a request's own caller sent is replaced, and lists of others are merged.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import baggage, propagate
from opentelemetry import context as otel_context
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.trace import get_current_span

from otel_correlation import guard, identity, propagators, semconv
from otel_correlation.clients._attempt import _Injector
from otel_correlation.propagators import TraceState
from otel_correlation.settings import Settings
from tests.clients_probe import REQUEST_ID, SIDES, SPAN_ID, TRACE_ID, Probe, Side, attempts, request, traceparent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

URL = "http://orders/"
CALLER = f"00-{TRACE_ID:032x}-{'c' * 16}-01"
OTHER = f"00-{'1' * 32}-{'2' * 16}-01"
NAMES = ("traceparent", "tracestate", "baggage", "x-request-id")


@pytest.fixture(params=SIDES, ids=repr)
def side(request: pytest.FixtureRequest) -> Side:
    """
    Each of the four ways to send.
    """
    found: Side = request.param
    return found


class Server:
    """
    Keeps the propagation fields of each request; answers by the given statuses, then 200.
    """

    def __init__(self, side: Side, *answers: str, fields: tuple[str, ...] = NAMES) -> None:
        self._side = side
        self._answers = list(answers)
        self._fields = fields
        self.seen: list[dict[str, list[str]]] = []
        self.transport = side.mock(self._answer)

    def _answer(self, request: Any) -> Any:
        got: dict[str, list[str]] = {}
        for name, value in request.headers.multi_items():
            if name in self._fields:
                got.setdefault(name, []).append(value)
        self.seen.append(got)
        if self._answers:
            return self._side.library.Response(302, headers={"location": self._answers.pop(0)})
        return self._side.library.Response(200)


@contextmanager
def inbound(*pairs: tuple[str, str], members: str = "", state: str = "") -> Iterator[None]:
    """
    Run the block as inside of a request with these headers, whose span has this baggage and tracestate.
    """
    received: dict[bytes, list[bytes]] = {}
    for name, value in pairs:
        received.setdefault(name.encode(), []).append(value.encode())
    with request(state=[*TraceState.from_header([state]).items()]):
        known = identity.current()
        assert known is not None
        known.received = received
        token = otel_context.attach(
            propagators.extract_baggage_from_headers([members.encode()], otel_context.get_current())
        )
        try:
            yield
        finally:
            otel_context.detach(token)


def test_the_callers_own_traceparent_is_replaced(side: Side) -> None:
    """
    A request's own traceparent that goes on with its headers becomes the CLIENT span's, its tracestate too; no link.
    """
    server = Server(side)
    headers = {"traceparent": CALLER, "tracestate": "vendor=a", "x-request-id": REQUEST_ID}
    with attempts(Probe()) as probe, inbound(*headers.items()):
        side.fetch(server.transport, URL, headers=headers)
    assert server.seen == [{"traceparent": [traceparent(probe.span)], "x-request-id": [REQUEST_ID]}]
    assert not probe.span.links


def test_another_traceparent_is_the_callers_intent(side: Side) -> None:
    """
    Beside the same inbound headers, a traceparent that differs stays with its tracestate, and is linked.
    """
    server = Server(side)
    with attempts(Probe()) as probe, inbound(("traceparent", CALLER), ("tracestate", "vendor=a"), state="vendor=a"):
        side.fetch(server.transport, URL, headers={"traceparent": OTHER, "tracestate": "vendor=a,other=b"})
    (got,) = server.seen
    assert (got["traceparent"], got["tracestate"]) == ([OTHER], ["vendor=a,other=b"])
    assert [f"{link.context.trace_id:032x}" for link in probe.span.links] == ["1" * 32]


@pytest.mark.parametrize(
    "fields",
    [("no traceparent at all",), (CALLER, OTHER), (f"00-{'0' * 32}-{'c' * 16}-01",), (CALLER.upper(),)],
    ids=["text", "two", "zero", "upper case"],
)
def test_a_caller_that_was_not_continued_is_replaced_too(side: Side, fields: tuple[str, ...]) -> None:
    """
    Where nothing could be made of the caller's traceparent, the upstream does not get it either, however many fields.
    """
    server = Server(side)
    headers = [("traceparent", value) for value in fields]
    with attempts(Probe()) as probe, inbound(*headers):
        side.fetch(server.transport, URL, headers=headers)
    assert server.seen[0]["traceparent"] == [traceparent(probe.span)]


def test_a_refused_request_id_is_replaced(side: Side) -> None:
    """
    A request id of the caller's that the edge refused does not go on behind it.
    """
    server = Server(side)
    with attempts(Probe()), inbound(("x-request-id", "two words")):
        side.fetch(server.transport, URL, headers={"x-request-id": "two words"})
        side.fetch(server.transport, URL, headers={"x-request-id": "of-the-application"})
    assert [got["x-request-id"] for got in server.seen] == [[REQUEST_ID], ["of-the-application"]]


def test_every_attempt_decides_anew(side: Side) -> None:
    """
    Redirects and the same request object again: each attempt has its own traceparent, and no field is there twice.
    """
    server = Server(side, "/again", "http://elsewhere/")
    headers = {"traceparent": CALLER, "baggage": "theirs=1,tenant=old"}
    with attempts(Probe()) as probe, inbound(("traceparent", CALLER), members="tenant=acme"):
        client = side.client(server.transport, follow_redirects=True)
        same = client.build_request("GET", URL, headers=headers)
        side.send(client, same, same)
    assert [got["traceparent"] for got in server.seen] == [[traceparent(span)] for span in probe.spans]
    assert [got["baggage"] for got in server.seen] == [["theirs=1,tenant=acme"]] * 4


def test_a_policy_gives_others_back_what_is_theirs(side: Side) -> None:
    """
    A redirect to a host that gets none of ours has the members that somebody else wrote, and only those.
    """
    server = Server(side, "http://outside.example/", URL)
    closed = dict.fromkeys(
        (
            semconv.OTEL_CORRELATION_OUTBOUND_TRACEPARENT,
            semconv.OTEL_CORRELATION_OUTBOUND_BAGGAGE,
            semconv.OTEL_CORRELATION_OUTBOUND_REQUEST_ID,
        ),
        "orders",
    )
    headers = {"traceparent": CALLER, "baggage": "theirs=1"}
    with attempts(Probe(), environ=closed) as probe, inbound(("traceparent", CALLER), members="tenant=acme"):
        side.fetch(server.transport, URL, headers=headers, follow_redirects=True)
    inside, outside, back = server.seen
    assert (inside["baggage"], outside) == (["theirs=1,tenant=acme"], {"baggage": ["theirs=1"]})
    assert (back["baggage"], back["traceparent"]) == (["theirs=1,tenant=acme"], [traceparent(probe.spans[2])])


@pytest.mark.parametrize(
    ("environ", "sent"),
    [
        ({"OTEL_PROPAGATORS": "baggage,xrequestid"}, CALLER),
        ({"OTEL_SDK_DISABLED": "true"}, CALLER),
        ({"OTEL_PYTHON_HTTPX_EXCLUDED_URLS": "orders"}, f"00-{TRACE_ID:032x}-{SPAN_ID:016x}-01"),
    ],
    ids=["no propagator", "disabled", "excluded"],
)
def test_only_what_we_write_replaces(side: Side, environ: dict[str, str], sent: str) -> None:
    """
    Where we write no traceparent the caller's goes on as it would without us; an excluded URL gets the request's own.
    """
    server = Server(side)
    with attempts(Probe(), environ=environ), inbound(("traceparent", CALLER)):
        side.fetch(server.transport, URL, headers={"traceparent": CALLER})
    assert server.seen[0]["traceparent"] == [sent]


class Elsewhere(TextMapPropagator):
    """
    A format that names a span by two headers, as B3 has.
    """

    def extract(self, carrier: Any, context: Any = None, getter: Any = None) -> Any:
        """
        Read nothing.
        """
        del carrier, getter
        return context

    def inject(self, carrier: Any, context: Any = None, setter: Any = None) -> None:
        """
        Write the span.
        """
        del setter
        found = get_current_span(context).get_span_context()
        carrier["X-B3-TraceId"] = f"{found.trace_id:032x}"
        carrier["X-B3-SpanId"] = f"{found.span_id:016x}"
        carrier["baggage"] = "tenant=acme"

    @property
    def fields(self) -> set[str]:
        """
        What is written.
        """
        return {"X-B3-TraceId", "X-B3-SpanId", "baggage"}


def test_headers_of_another_format_are_passed_on_alike(side: Side) -> None:
    """
    Of a format that needs two headers both are replaced, or neither where one of them was chosen.
    """
    caller = {"x-b3-traceid": "a" * 32, "x-b3-spanid": "b" * 16}
    chosen = {**caller, "x-b3-spanid": "d" * 16}
    server = Server(side, fields=("x-b3-traceid", "x-b3-spanid", "baggage"))
    with attempts(Probe()) as probe, inbound(*caller.items()):
        before = propagate.get_global_textmap()
        propagate.set_global_textmap(Elsewhere())
        try:
            for headers in ({**caller, "baggage": "theirs=1"}, chosen):
                side.fetch(server.transport, URL, headers=headers)
        finally:
            propagate.set_global_textmap(before)
    ours = probe.spans[0].get_span_context()
    assert server.seen == [
        {
            "x-b3-traceid": [f"{ours.trace_id:032x}"],
            "x-b3-spanid": [f"{ours.span_id:016x}"],
            "baggage": ["theirs=1,tenant=acme"],
        },
        {"x-b3-traceid": ["a" * 32], "x-b3-spanid": ["d" * 16], "baggage": ["tenant=acme"]},
    ]


def by_hook(side: Side, text: str) -> dict[str, Any]:
    """
    Return options of a client whose event hook writes baggage.
    """

    def write(request: Any) -> None:
        request.headers["baggage"] = text

    async def write_async(request: Any) -> None:
        write(request)

    return {"event_hooks": {"request": [write_async if side.is_async else write]}}


def by_auth(side: Side, text: str) -> dict[str, Any]:
    """
    Return options of a client whose authentication writes baggage.
    """

    class Writes(side.library.Auth):  # type: ignore[misc, name-defined]
        def auth_flow(self, request: Any) -> Any:
            request.headers["baggage"] = text
            yield request

    return {"auth": Writes()}


def by_default(side: Side, text: str) -> dict[str, Any]:
    """
    Return options of a client that has baggage among its own headers.
    """
    del side
    return {"headers": {"baggage": text}}


@pytest.mark.parametrize("way", [by_hook, by_auth, by_default])
def test_baggage_of_others_and_ours(side: Side, way: Callable[[Side, str], dict[str, Any]]) -> None:
    """
    Whoever wrote baggage first: its members leave in order and with properties, then ours; of a key in both ours.
    """
    theirs = "sentry-trace_id=abc,tenant=old;p=1 , sentry-release=1%2C0;q, wrong member"
    server = Server(side)
    with attempts(Probe()), inbound(members="tenant=acme;tier=1,user=alice"):
        side.fetch(server.transport, URL, **way(side, theirs))
    assert server.seen[0]["baggage"] == [
        "sentry-trace_id=abc,sentry-release=1%2C0;q,wrong member,tenant=acme;tier=1,user=alice"
    ]


def test_two_fields_become_one(side: Side) -> None:
    """
    Two ``baggage`` fields are one list, and leave as one field with ours.
    """
    server = Server(side)
    with attempts(Probe()), inbound(members="c=3,b=0"):
        side.fetch(server.transport, URL, headers=[("baggage", "a=1"), ("baggage", "b=2")])
    assert server.seen[0]["baggage"] == ["a=1,c=3,b=0"]


def test_inbound_baggage_that_is_passed_on_is_not_doubled(side: Side) -> None:
    """
    The caller's own baggage goes out once, as the application changed it meanwhile.
    """
    server = Server(side)
    text = "tenant=acme,user=alice"
    with attempts(Probe()), inbound(("baggage", text), members=text):
        side.fetch(server.transport, URL, headers={"baggage": text})
        token = otel_context.attach(baggage.remove_baggage("user"))
        side.fetch(server.transport, URL, headers={"baggage": text})
        side.fetch(server.transport, URL, headers={"baggage": f"{text},more=1"})
        otel_context.detach(token)
    assert [got["baggage"] for got in server.seen] == [[text], ["tenant=acme"], ["user=alice,more=1,tenant=acme"]]


def test_tracestate_of_others_and_ours(side: Side) -> None:
    """
    Who writes a tracestate without a traceparent adds to ours, which stands left; one outside the grammar goes.
    """
    server = Server(side)
    with attempts(Probe()), inbound(state="ot=th:0,vendor=a"):
        side.fetch(server.transport, URL, headers=[("tracestate", "mine=1"), ("tracestate", "vendor=old,b=2")])
        side.fetch(server.transport, URL, headers={"tracestate": "not a tracestate"})
    assert [got["tracestate"] for got in server.seen] == [["ot=th:0,vendor=a,mine=1,b=2"], ["ot=th:0,vendor=a"]]


def test_without_anything_of_ours_theirs_is_untouched(side: Side) -> None:
    """
    A request that has no baggage of its own leaves what others wrote as it is, field for field.
    """
    server = Server(side)
    with attempts(Probe()), inbound():
        side.fetch(server.transport, URL, headers=[("baggage", "a=1 ,, b=2"), ("baggage", "c=3")])
    assert server.seen[0]["baggage"] == ["a=1 ,, b=2", "c=3"]


def test_the_limits_cost_whole_members_of_ours() -> None:
    """
    64 members and 8,192 bytes: what is there stays, ours come as far as they fit, and what did not is counted.
    """
    count = guard.counters().get("baggage.members_over_limit", 0)
    ours = "x=1,y=2,z=3"
    many = ",".join(f"k{number}=v" for number in range(62))
    assert propagators.merge_baggage([many.encode()], ours).decode() == f"{many},x=1,y=2"
    long = "k=" + "v" * (8_192 - 2 - 4)
    assert propagators.merge_baggage([long.encode()], ours).decode() == f"{long},x=1"
    # Over the limits by itself: as it would leave without us, and nothing of it is parsed.
    huge = b"a=1," * 1_000_000
    assert propagators.merge_baggage([huge], ours) is huge
    assert guard.counters()["baggage.members_over_limit"] == count + 1 + 2 + 3
    states = propagators.merge_tracestate(
        [",".join(f"k{number}=v" for number in range(32)).encode()], TraceState([("ot", "th:0")])
    )
    assert (states.count(",") + 1, states.partition(",")[0]) == (32, "ot=th:0")


MEMBERS = st.lists(st.tuples(st.sampled_from("abcdef"), st.text("xyz %,;=", max_size=4)), max_size=80)


@given(MEMBERS, MEMBERS)
def test_any_two_lists_are_merged_within_the_limits(theirs: list[tuple[str, str]], ours: list[tuple[str, str]]) -> None:
    """
    Merging is one pass that never raises, never repeats a key of ours and never makes a list longer than the limits.
    """
    context = otel_context.Context()
    for key, value in ours:
        context = baggage.set_baggage(key, value, context)
    text = propagators.format_baggage(context)
    there = ",".join(f"{key}={value}" for key, value in theirs)
    merged = propagators.merge_baggage([there.encode()], text).decode()
    assert merged.endswith(text) or not text or merged.count(",") >= 63
    again = propagators.merge_baggage([merged.encode()], text).decode()
    assert again == merged


@pytest.mark.parametrize("name", NAMES)
def test_many_fields_that_are_passed_on_are_linear_work(name: str) -> None:
    """
    Eight times as many fields that the caller sent and a gateway passes on are not much more than eight times the work.
    """
    injector = _Injector(propagators.build(Settings()), Settings())

    def seconds(count: int) -> float:
        values = [f"k{number}=v".encode() for number in range(count)]
        who = identity.Identity(REQUEST_ID)
        who.received = {name.encode(): values}
        context = identity.set_in(otel_context.Context(), who)
        entries = [(name.encode(), name.encode(), value) for value in values]
        present = {name.encode(): values[-1]}
        best = 60.0
        for _ in range(3):
            began = time.process_time()
            passed = injector.passed_on(context, present, entries)
            injector.headers(context, None, present, entries, passed, None)
            best = min(best, time.process_time() - began)
            assert name.encode() in passed
        return best

    assert seconds(8_000) < 8 * 4 * seconds(1_000)
