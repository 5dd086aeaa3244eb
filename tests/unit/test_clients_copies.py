"""
Headers that were copied from another request: what of them names us stays with the hosts that may have it.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import baggage, propagate
from opentelemetry import context as otel_context
from opentelemetry.context import _SUPPRESS_HTTP_INSTRUMENTATION_KEY
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.trace import NonRecordingSpan, SpanContext, get_current_span

from otel_correlation import guard, identity, propagators, semconv
from otel_correlation.clients import _attempt, _copies
from otel_correlation.settings import Settings
from tests.clients_probe import REQUEST_ID, SIDES, SPAN_ID, TRACE_ID, Probe, Side, attempts, request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

POLICIES = (
    semconv.OTEL_CORRELATION_OUTBOUND_TRACEPARENT,
    semconv.OTEL_CORRELATION_OUTBOUND_BAGGAGE,
    semconv.OTEL_CORRELATION_OUTBOUND_REQUEST_ID,
)
INSIDE, OUTSIDE = "http://orders/", "http://outside.example/"
# Ours leave for one host.
CLOSED = dict.fromkeys(POLICIES, "orders")
PARENT = f"00-{TRACE_ID:032x}-{SPAN_ID:016x}-01"
OWN_TRACE = f"00-{'1' * 32}-{'2' * 16}-01"
NAMES = ("traceparent", "tracestate", "baggage", "x-request-id", "x_request_id", "x-correlation-id", "x-amzn-trace-id")


@pytest.fixture(params=SIDES, ids=repr)
def side(request: pytest.FixtureRequest) -> Side:
    """
    Each of the four ways to send.
    """
    found: Side = request.param
    return found


class Hosts:
    """
    Answers for every host, and keeps by host what reached it of what could be ours.
    """

    def __init__(self, side: Side, answer: Callable[[Any], Any] | None = None) -> None:
        self._side = side
        self._answer = answer
        self.seen: list[tuple[str, list[tuple[str, str]]]] = []

    def __call__(self, request: Any) -> Any:
        pairs = [(name.decode(), value.decode("latin-1")) for name, value in request.headers.raw]
        self.seen.append((request.url.host, [pair for pair in pairs if pair[0].lower() in NAMES]))
        answer = None if self._answer is None else self._answer(request)
        return self._side.library.Response(200) if answer is None else answer

    def reached(self, url: str) -> list[tuple[str, str]]:
        """
        Return what reached one host, over all requests.
        """
        host = httpx.URL(url).host
        return [pair for found, pairs in self.seen if found == host for pair in pairs]


@contextmanager
def inbound(**members: str) -> Iterator[dict[str, str]]:
    """
    Run the block as inside of a request that came with these headers; the edge has shown the final id to the app.
    """
    members = members or {"tier": "gold", "tenant": "blue"}
    with request(state=[("vendor", "a"), ("ot", "th:0")]):
        context = otel_context.get_current()
        text = ",".join(f"{key}={value}" for key, value in members.items())
        context = propagators.extract_baggage_from_headers([text.encode()], context)
        token = otel_context.attach(context)
        try:
            yield {
                "accept": "*/*",
                "traceparent": PARENT,
                "tracestate": "vendor=a,ot=th:0",
                "baggage": text,
                "x-request-id": REQUEST_ID,
            }
        finally:
            otel_context.detach(token)


def test_inbound_headers_that_are_passed_on(side: Side) -> None:
    """
    ``headers=request.headers`` carries nothing of ours to a host that is not allowed, and all of it to one that is.
    """
    hosts = Hosts(side)
    with attempts(Probe(), environ=CLOSED) as probe, inbound() as received:
        side.fetch(side.mock(hosts), OUTSIDE, headers=received)
        side.fetch(side.mock(hosts), INSIDE, headers=received)
    assert hosts.reached(OUTSIDE) == []
    assert dict(hosts.reached(INSIDE)) == {name: value for name, value in received.items() if name != "accept"}
    outside = probe.spans[0]
    assert not outside.links
    assert outside.get_span_context().trace_id == TRACE_ID


@pytest.mark.parametrize("kind", range(3))
def test_each_kind_is_kept_back_alone(side: Side, kind: int) -> None:
    """
    A host that may have two of the three gets these two of a copy, tracestate with traceparent.
    """
    hosts = Hosts(side)
    with attempts(Probe(), environ={POLICIES[kind]: "none"}), inbound() as received:
        side.fetch(side.mock(hosts), OUTSIDE, headers=received)
    gone = ({"traceparent", "tracestate"}, {"baggage"}, {"x-request-id"})[kind]
    assert {name for name, _ in hosts.reached(OUTSIDE)} == {name for name in received if name != "accept"} - gone


OWN = {
    "another trace": {"traceparent": OWN_TRACE},
    "another trace with its state": {"traceparent": OWN_TRACE, "tracestate": "own=1"},
    "another trace with the usual state": {"traceparent": OWN_TRACE, "tracestate": "ot=th:0"},
    "no trace at all": {"traceparent": "nonsense"},
    "an id of its own": {"x-request-id": "its-own-request-id"},
    "an id of its own under another name": {"x-correlation-id": "its-own-request-id"},
    "baggage of its own": {"baggage": "own=1;secret , other=2"},
    "the same key, another value": {"baggage": "tier=silver"},
    "a part of our id": {"x-request-id": REQUEST_ID[:-1]},
    "an id that ends in ours": {"x-request-id": "prefix-" + REQUEST_ID},
    "a state without a trace": {"tracestate": "own=1"},
    "baggage that nobody can read": {"baggage": "tier"},
}


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_what_user_code_chose_stays(side: Side, own: dict[str, str]) -> None:
    """
    A value that is not ours is sent unchanged wherever user code sends it.
    """
    hosts = Hosts(side)
    with attempts(Probe(), environ=CLOSED), inbound():
        side.fetch(side.mock(hosts), OUTSIDE, headers=own)
    assert hosts.reached(OUTSIDE) == list(own.items())


COPIES: dict[str, list[tuple[str, str]]] = {
    "upper case": [("TRACEPARENT", PARENT), ("Baggage", "tier=gold"), ("X-REQUEST-ID", REQUEST_ID)],
    "an underscore": [("X_Request_ID", REQUEST_ID)],
    "a standard name that is not configured": [("X-Correlation-ID", REQUEST_ID)],
    "an upper-case trace id": [("traceparent", PARENT.upper())],
    "spaces around it": [("traceparent", f" {PARENT} "), ("x-request-id", f"\t{REQUEST_ID} ")],
    "another span of our trace": [("traceparent", f"00-{TRACE_ID:032x}-{'3' * 16}-00")],
    "a future version": [("traceparent", f"01-{TRACE_ID:032x}-{SPAN_ID:016x}-01-extra")],
    "two fields": [("traceparent", PARENT), ("traceparent", PARENT), ("x-request-id", REQUEST_ID)] * 2,
    "two fields as one": [("traceparent", f"{PARENT}, {PARENT}"), ("x-request-id", f"{REQUEST_ID}, {REQUEST_ID}")],
    "one member": [("baggage", "tenant=blue")],
    "a member that is encoded otherwise": [("baggage", "tier=%67old")],
    "a member with a property": [("baggage", "tier=gold;since=2026")],
    "a state alone": [("tracestate", "vendor=a,ot=th:0")],
    "a part of the state": [("tracestate", "vendor=a")],
    "a state beside nothing readable": [("traceparent", PARENT), ("tracestate", "=;nobody reads this")],
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_every_spelling_is_recognised(side: Side, copy: list[tuple[str, str]]) -> None:
    """
    Ours is ours in every spelling, however many fields it stands in.
    """
    hosts = Hosts(side)
    with attempts(Probe(), environ=CLOSED), inbound():
        side.fetch(side.mock(hosts), OUTSIDE, headers=copy)
    assert hosts.reached(OUTSIDE) == []


def test_ours_and_its_own_in_one_header(side: Side) -> None:
    """
    Of a list that holds both, the members that user code chose are left.
    """
    hosts = Hosts(side)
    mixed = {
        "traceparent": OWN_TRACE,
        "tracestate": "own=1,vendor=a",
        "baggage": "tier=gold,own=1;since=2026,tenant=blue",
    }
    with attempts(Probe(), environ=CLOSED), inbound():
        side.fetch(side.mock(hosts), OUTSIDE, headers=mixed)
    assert dict(hosts.reached(OUTSIDE)) == {
        "traceparent": OWN_TRACE,
        "tracestate": "own=1",
        "baggage": "own=1;since=2026",
    }


def test_baggage_that_the_application_took_out_is_still_the_callers(side: Side) -> None:
    """
    A member that the application removed from the current baggage came with the request all the same.
    """
    hosts = Hosts(side)
    with attempts(Probe(), environ=CLOSED), inbound() as received:
        token = otel_context.attach(baggage.set_baggage("own", "1", baggage.remove_baggage("tier")))
        side.fetch(side.mock(hosts), OUTSIDE, headers={"baggage": received["baggage"] + ",own=1,chosen=2"})
        otel_context.detach(token)
    assert hosts.reached(OUTSIDE) == [("baggage", "chosen=2")]


def test_headers_of_another_request_of_the_same_work(side: Side) -> None:
    """
    What we put on one outbound request does not leave on a second one that user code made of it.
    """
    hosts = Hosts(side)

    def job(client: Any) -> None:
        first = client.get(INSIDE)
        client.get(OUTSIDE, headers=first.request.headers)
        client.send(client.build_request("GET", OUTSIDE, headers=dict(first.request.headers)))

    async def job_async(client: Any) -> None:
        first = await client.get(INSIDE)
        await client.get(OUTSIDE, headers=first.request.headers)
        await client.send(client.build_request("GET", OUTSIDE, headers=dict(first.request.headers)))

    with attempts(Probe(), environ=CLOSED), inbound():
        side.run(side.client(side.mock(hosts)), job_async if side.is_async else job)
    assert len(hosts.reached(INSIDE)) == 4
    assert hosts.reached(OUTSIDE) == []


@pytest.mark.parametrize("later", ["outside of any request", "in another request"])
def test_headers_of_an_earlier_request(side: Side, later: str) -> None:
    """
    What left on an earlier request is ours also where another trace is current, or none.
    """
    hosts = Hosts(side)
    with attempts(Probe(), environ=CLOSED):
        context = identity.set_in(otel_context.Context(), identity.Identity("an-earlier-request-id"))
        token = otel_context.attach(baggage.set_baggage("tier", "gold", context))
        first = side.fetch(side.mock(hosts), INSIDE).request
        otel_context.detach(token)
        if later == "in another request":
            with inbound(other="1"):
                side.fetch(side.mock(hosts), OUTSIDE, headers=first.headers)
        else:
            side.fetch(side.mock(hosts), OUTSIDE, headers=first.headers)
    assert [name for name, _ in hosts.reached(INSIDE)] == ["traceparent", "tracestate", "baggage", "X-Request-ID"]
    assert hosts.reached(OUTSIDE) == []


def test_a_short_id_of_an_earlier_request_is_nobodys(side: Side) -> None:
    """
    Ids such as ``test`` repeat: one that an earlier request had is not taken for ours when user code sends it.
    """
    hosts = Hosts(side)
    with attempts(Probe(), environ=CLOSED):
        context = identity.set_in(otel_context.Context(), identity.Identity("test"))
        token = otel_context.attach(context)
        side.fetch(side.mock(hosts), INSIDE)
        side.fetch(side.mock(hosts), OUTSIDE, headers={"x-request-id": "test"})
        otel_context.detach(token)
        assert hosts.reached(OUTSIDE) == []
        side.fetch(side.mock(hosts), OUTSIDE, headers={"x-request-id": "test"})
    assert hosts.reached(OUTSIDE) == [("x-request-id", "test")]


def test_defaults_of_a_client(side: Side) -> None:
    """
    Headers that a client was made with, or was given later, and those that an event hook adds are looked at alike.
    """
    hosts = Hosts(side)
    with attempts(Probe(), environ=CLOSED), inbound() as received:

        def add(request: Any) -> None:
            request.headers["X-Request-ID"] = REQUEST_ID

        async def add_async(request: Any) -> None:
            add(request)

        hooks = {"request": [add_async if side.is_async else add]}
        side.fetch(side.mock(hosts), OUTSIDE, headers={"x": "1"}, event_hooks=hooks)
        client = side.client(side.mock(hosts), headers={"traceparent": received["traceparent"]})
        client.headers.update({"baggage": received["baggage"]})
        side.send(client, client.build_request("GET", OUTSIDE))
    assert len(hosts.seen) == 2
    assert hosts.reached(OUTSIDE) == []


def test_a_hook_of_the_instrumentation(side: Side) -> None:
    """
    A request hook, which runs when our headers are there, can put nothing of ours on a request that may not have it.
    """
    hosts = Hosts(side)

    def hook(_span: Any, info: Any) -> None:
        info.headers["x-request-id"] = REQUEST_ID
        info.headers["baggage"] = "tier=gold,own=1"

    async def async_hook(span: Any, info: Any) -> None:
        hook(span, info)

    with attempts(Probe(), environ=CLOSED, request_hook=hook, async_request_hook=async_hook), inbound():
        side.fetch(side.mock(hosts), OUTSIDE)
    assert hosts.reached(OUTSIDE) == [("baggage", "own=1")]


def test_what_is_kept_back_is_counted(side: Side) -> None:
    """
    ``outbound.copies_kept_back`` counts requests that carried a copy, and no other.
    """
    hosts = Hosts(side)
    with attempts(Probe(), environ=CLOSED), inbound() as received:
        for headers in (received, {"x-request-id": "its-own-request-id"}, {"x": "1"}):
            side.fetch(side.mock(hosts), OUTSIDE, headers=headers)
    assert guard.counters() == {"outbound.copies_kept_back": 1}


def test_an_authentication_that_makes_a_request_of_its_own(side: Side) -> None:
    """
    An ``httpx.Auth`` that copies headers to its token server, before and after our headers are on them, takes nothing along.
    """
    hosts = Hosts(side)
    token_server = "http://login.example/token"

    class Copying(side.library.Auth):  # type: ignore[misc, name-defined]
        def auth_flow(self, request: Any) -> Any:
            yield side.library.Request("POST", token_server, headers=request.headers)
            yield request
            yield side.library.Request("POST", token_server, headers=request.headers)
            request.url = side.library.URL(OUTSIDE)
            yield request

    with attempts(Probe(), environ=CLOSED), inbound() as received:
        side.fetch(side.mock(hosts), INSIDE, headers=received, auth=Copying())
    assert [host for host, _ in hosts.seen] == ["login.example", "orders", "login.example", "outside.example"]
    assert len(hosts.reached(INSIDE)) == 4
    assert hosts.reached(token_server) == []
    assert hosts.reached(OUTSIDE) == []


def test_a_redirect_of_passed_on_headers(side: Side) -> None:
    """
    What user code passed on to an allowed host does not follow a redirect to one that is not.
    """

    def answer(request: Any) -> Any:
        return side.library.Response(302, headers={"location": OUTSIDE}) if request.url.host == "orders" else None

    hosts = Hosts(side, answer)
    with attempts(Probe(), environ=CLOSED), inbound() as received:
        side.fetch(side.mock(hosts), INSIDE, headers=received, follow_redirects=True)
    assert len(hosts.reached(INSIDE)) == 4
    assert [host for host, _ in hosts.seen] == ["orders", "outside.example"]
    assert hosts.reached(OUTSIDE) == []


def rewriting(side: Side, inner: Any, *, copies: bool) -> Any:
    """
    Return a transport of the user's that sends everything to another host first, and then where it should go.
    """

    def elsewhere(request: Any) -> Any:
        if copies:
            return side.library.Request(request.method, OUTSIDE, headers=request.headers, stream=request.stream)
        request.url = side.library.URL(OUTSIDE)
        request.headers["X-Correlation-ID"] = REQUEST_ID
        return request

    class Rewriting(side.library.BaseTransport, side.library.AsyncBaseTransport):  # type: ignore[misc, name-defined]
        def handle_request(self, request: Any) -> Any:
            inner.handle_request(elsewhere(request))
            return inner.handle_request(elsewhere(request))

        async def handle_async_request(self, request: Any) -> Any:
            await inner.handle_async_request(elsewhere(request))
            return await inner.handle_async_request(elsewhere(request))

    return Rewriting()


@pytest.mark.parametrize("copies", [False, True])
def test_a_transport_that_sends_elsewhere(side: Side, copies: bool) -> None:
    """
    A transport above httpx's own that changes the host, or copies the request, is asked the policy for where it sends.
    """
    hosts = Hosts(side)
    with attempts(Probe(), environ=CLOSED) as probe, inbound() as received:
        side.fetch(rewriting(side, side.mock(hosts), copies=copies), INSIDE, headers=received)
    assert [host for host, _ in hosts.seen] == ["outside.example"] * 2
    assert hosts.reached(OUTSIDE) == []
    assert len(probe.spans) == 2


def test_suppressed_instrumentation_does_not_open_the_gate(side: Side) -> None:
    """
    Where user code suppresses instrumentation there is no span, and a copy still does not leave.
    """
    hosts = Hosts(side)
    with attempts(Probe(), environ=CLOSED) as probe, inbound() as received:
        token = otel_context.attach(otel_context.set_value(_SUPPRESS_HTTP_INSTRUMENTATION_KEY, True))
        side.fetch(side.mock(hosts), OUTSIDE, headers=received)
        side.fetch(side.mock(hosts), INSIDE, headers=received)
        otel_context.detach(token)
    assert not probe.spans
    assert hosts.reached(OUTSIDE) == []
    assert len(hosts.reached(INSIDE)) == 4


def test_an_excluded_url_does_not_open_the_gate(side: Side) -> None:
    """
    An excluded URL has no span, and the policy holds for it.
    """
    hosts = Hosts(side)
    environ = {**CLOSED, "OTEL_PYTHON_HTTPX_EXCLUDED_URLS": "outside"}
    with attempts(Probe(), environ=environ) as probe, inbound() as received:
        side.fetch(side.mock(hosts), OUTSIDE, headers=received)
    assert not probe.spans
    assert hosts.reached(OUTSIDE) == []


def test_what_the_request_came_with(side: Side) -> None:
    """
    What the caller sent is recognised by the exact value, too, also where no trace could be made of it.
    """
    raw: Mapping[bytes, list[bytes]] = {
        b"traceparent": [f"00-{'a' * 32}-{'b' * 16}-01".encode(), b"no traceparent at all"],
        b"tracestate": [b"unreadable;"],
        b"baggage": [b"unreadable", b"late=1"],
        b"x-correlation-id": [b"the-callers-second-id"],
    }
    hosts = Hosts(side)
    environ = {**CLOSED, semconv.OTEL_CORRELATION_REQUEST_ID_HEADERS: "X-Request-ID,X-Correlation-ID"}
    with attempts(Probe(), environ=environ), request():
        known = identity.current()
        assert known is not None
        known.received = raw
        pairs = [(name.decode(), value.decode()) for name, values in raw.items() for value in values]
        side.fetch(side.mock(hosts), OUTSIDE, headers=pairs)
        side.fetch(side.mock(hosts), OUTSIDE, headers={"baggage": "unreadable,late=1", "x": "1"})
    assert hosts.reached(OUTSIDE) == []


def test_the_trace_of_the_request_beside_the_current_one(side: Side) -> None:
    """
    A message of a WebSocket has a trace of its own; the handshake's, which the headers name, is ours as well.
    """
    hosts = Hosts(side)
    with attempts(Probe(), environ=CLOSED), request():
        known = identity.current()
        assert known is not None
        handshake = SpanContext(0xABCDEF << 96, SPAN_ID, is_remote=False)
        known.span = NonRecordingSpan(handshake)
        headers = {"traceparent": f"00-{handshake.trace_id:032x}-{SPAN_ID:016x}-01", "tracestate": "vendor=a"}
        side.fetch(side.mock(hosts), OUTSIDE, headers=headers)
    assert hosts.reached(OUTSIDE) == []


class Elsewhere(TextMapPropagator):
    """
    A format with headers of its own, as B3 has.
    """

    def extract(self, carrier: Any, context: Any = None, getter: Any = None) -> Any:
        """
        Read nothing.
        """
        del carrier, getter
        return context

    def inject(self, carrier: Any, context: Any = None, setter: Any = None) -> None:
        """
        Write the trace, and something beside it.
        """
        del setter
        span_context = get_current_span(context).get_span_context()
        carrier["X-B3-TraceId"] = f"{span_context.trace_id:032x}"
        carrier["X-B3-Sampled"] = "1"

    @property
    def fields(self) -> set[str]:
        """
        What is written.
        """
        return {"X-B3-TraceId", "X-B3-Sampled"}


def test_headers_of_another_format(side: Side) -> None:
    """
    The headers of a propagator that is not ours are recognised by our trace id in them.
    """
    seen: list[dict[str, str]] = []

    def answer(request: Any) -> Any:
        seen.append({name: value for name, value in request.headers.items() if name.startswith("x-b3")})
        return side.library.Response(200)

    with attempts(Probe(), environ=CLOSED), inbound():
        before = propagate.get_global_textmap()
        propagate.set_global_textmap(Elsewhere())
        try:
            first = side.fetch(side.mock(answer), INSIDE).request
            side.fetch(side.mock(answer), OUTSIDE, headers=first.headers)
            side.fetch(side.mock(answer), OUTSIDE, headers={"x-b3-traceid": "1" * 32, "x-b3-sampled": "1"})
        finally:
            propagate.set_global_textmap(before)
    assert seen == [
        {"x-b3-traceid": f"{TRACE_ID:032x}", "x-b3-sampled": "1"},
        {},
        {"x-b3-traceid": "1" * 32, "x-b3-sampled": "1"},
    ]


def test_without_the_private_list_copies_are_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Where httpx holds its headers in another way, what is kept back is the same.
    """
    hosts = Hosts(SIDES[0])
    monkeypatch.setattr(
        _attempt, "_entries", lambda headers: [(name, name.lower(), value) for name, value in headers.raw]
    )
    with attempts(Probe(), environ=CLOSED), inbound() as received:
        SIDES[0].fetch(SIDES[0].mock(hosts), OUTSIDE, headers={**received, "baggage": "tier=gold,own=1"})
    assert hosts.reached(OUTSIDE) == [("baggage", "own=1")]


def test_an_allowed_host_and_no_policy_look_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Where a host may have everything, or no policy is set, no header is compared with anything.
    """
    looks: list[object] = []
    monkeypatch.setattr(_attempt, "kept_back", lambda *given: looks.append(given))
    for environ in ({}, CLOSED):
        hosts = Hosts(SIDES[0])
        with attempts(Probe(), environ=environ), inbound() as received:
            SIDES[0].fetch(SIDES[0].mock(hosts), INSIDE, headers=received)
        assert len(hosts.reached(INSIDE)) == 4
    assert looks == []


def test_what_is_remembered_is_bounded() -> None:
    """
    A process that sends for ever remembers the last requests only, whatever they carried.
    """
    hosts = Hosts(SIDES[0])
    with attempts(Probe(), environ=CLOSED), SIDES[0].client(SIDES[0].mock(hosts)) as client:
        first = client.get(INSIDE).request.headers
        for number in range(_copies.MAX_REMEMBERED + 10):
            _copies.remember_sent([(b"x-request-id", b"x-request-id", b"%016d" % number)])
        assert _copies.remembered() <= 2 * _copies.MAX_REMEMBERED
        client.get(OUTSIDE, headers={"x-request-id": f"{_copies.MAX_REMEMBERED:016d}"})
        assert hosts.reached(OUTSIDE) == []
        for number in range(2 * _copies.MAX_REMEMBERED):
            _copies.remember_sent([(b"x-request-id", b"x-request-id", b"%016d" % number)])
        client.get(OUTSIDE, headers=first)
    assert [name for name, _ in hosts.reached(OUTSIDE)] == ["traceparent", "tracestate"]


def test_a_copy_of_a_huge_header_is_looked_at_in_linear_work() -> None:
    """
    Whatever the size of the headers that user code passes on, they are answered for, and nothing is raised.
    """
    hosts = Hosts(SIDES[0])
    big = {
        "traceparent": "0" * 200_000 + f"{TRACE_ID:032x}",
        "tracestate": "a=b," * 50_000,
        "baggage": "tier=gold," + "x=y;" * 50_000,
        "x-request-id": "," * 200_000 + REQUEST_ID,
    }
    with attempts(Probe(), environ=CLOSED), inbound():
        SIDES[0].fetch(SIDES[0].mock(hosts), OUTSIDE, headers=big)
    assert dict(hosts.reached(OUTSIDE)).keys() <= {"tracestate"}
    assert guard.counters().get("internal_error.client.begin", 0) == 0


# Headers of a hostile caller that a gateway passes on: one field of each kind, of this number.
FIELDS = {
    "traceparent": lambda number: f"00-{number + 1:032x}-{SPAN_ID:016x}-01",
    "tracestate": lambda number: f"k{number}=v",
    "baggage": lambda number: f"k{number}=v",
    "x-request-id": lambda number: f"an-id-of-the-caller-{number}",
    "x-amzn-trace-id": lambda number: f"Root=1-{number:08x}-{SPAN_ID:024x}",
}


@pytest.mark.parametrize("name", FIELDS)
def test_many_fields_are_linear_work(name: str) -> None:
    """
    Eight times as many fields that the caller sent and a gateway passes on are not much more than eight times the work.
    """
    names = _copies.Names(Settings(), ())

    def seconds(count: int) -> float:
        values = [FIELDS[name](number).encode() for number in range(count)]
        who = identity.Identity(REQUEST_ID)
        who.received = {name.encode(): values}
        context = identity.set_in(otel_context.Context(), who)
        entries = [(name.encode(), name.encode(), value) for value in values]
        best = 60.0
        for _ in range(3):
            began = time.process_time()
            left = _copies.kept_back(names, context, entries, (False, False, False))
            best = min(best, time.process_time() - began)
            assert left == []
        return best

    assert seconds(8_000) < 8 * 4 * seconds(1_000)


_TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([*NAMES, "accept", "x-b3-traceid"]), st.one_of(_TEXT, st.just(PARENT), st.just(REQUEST_ID))
        ),
        max_size=8,
    )
)
def test_any_headers_leave_without_our_ids(pairs: list[tuple[str, str]]) -> None:
    """
    Whatever else is copied beside them, no header that we would write leaves with the current trace id or request id.
    """
    side = SIDES[0]
    hosts = Hosts(side)
    with attempts(Probe(), environ=CLOSED), inbound():
        side.fetch(side.mock(hosts), OUTSIDE, headers=pairs)
    left = hosts.reached(OUTSIDE)
    assert not [value for name, value in left if name.lower() == "traceparent" and f"{TRACE_ID:032x}" in value.lower()]
    assert not [value for name, value in left if "id" in name.lower() and value.strip() == REQUEST_ID]
    ours = (PARENT, REQUEST_ID)
    chosen = [pair for pair in pairs if pair[1] not in ours and pair[0] in ("x-request-id", "x-correlation-id")]
    assert [pair for pair in left if pair in chosen] == chosen


def test_asynchronous_requests_at_once_keep_their_own_apart() -> None:
    """
    Requests of many callers at once: each copy is recognised in the request that it belongs to.
    """
    side = next(each for each in SIDES if each.is_async)
    hosts = Hosts(side)

    async def one(client: Any, number: int) -> None:
        name = f"request-number-{number:04d}"
        token = otel_context.attach(identity.set_in(otel_context.Context(), identity.Identity(name)))
        await asyncio.sleep(0)
        await client.get(OUTSIDE, headers={"x-request-id": name})
        otel_context.detach(token)

    async def job(client: Any) -> None:
        await asyncio.gather(*(one(client, number) for number in range(50)))

    with attempts(Probe(), environ=CLOSED):
        side.run(side.client(side.mock(hosts)), job)
    assert len(hosts.seen) == 50
    assert hosts.reached(OUTSIDE) == []
