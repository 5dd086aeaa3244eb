"""
Contract point 4, inbound: who is not trusted gets new ids everywhere, and its own are a link and an attribute.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI, Request, WebSocket
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry import baggage, propagate
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import TextMapPropagator, default_getter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, get_current_span, set_span_in_context
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from otel_correlation import guard, request_id, semconv
from otel_correlation.edge import _fastapi as plug
from otel_correlation.identity import log_ids
from otel_correlation.sampling import RatioSampler, randomness
from tests.contract.wire import (
    CALLER,
    PARENT,
    TRACE,
    UUID,
    Headers,
    Reply,
    Wire,
    call,
    exchange,
    http_scope,
    open_socket,
    talk,
    websocket_scope,
)

if TYPE_CHECKING:
    from opentelemetry.propagators.textmap import CarrierT, Getter

SENT: Headers = [
    (b"x-request-id", UUID.encode()),
    (b"traceparent", PARENT),
    (b"tracestate", b"vendor=theirs,ot=th:8;rv:ffffffffffffff"),
    (b"baggage", b"tier=gold"),
]
INSIDE: dict[str, Any] = {"client": ("10.1.2.3", 50000)}
OUTSIDE: dict[str, Any] = {"client": ("203.0.113.9", 50000)}


def seen(request: Any) -> dict[str, Any]:
    """
    Return what an application can see of its caller.
    """
    names = ("x-request-id", "traceparent", "tracestate", "baggage", "b3")
    return {
        "headers": {name: request.headers.getlist(name) for name in names if name in request.headers},
        "state": request.state.request_id,
        "ids": log_ids(),
        "id": request_id(),
        "baggage": dict(baggage.get_all()),
        "tracestate": get_current_span().get_span_context().trace_state.to_header(),
    }


def application() -> FastAPI:
    """
    Return an application that tells what it sees.
    """
    app = FastAPI()

    @app.get("/seen")
    @app.get("/health")
    async def tell(request: Request) -> dict[str, Any]:
        return seen(request)

    @app.websocket("/ws")
    async def chat(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_json(seen(socket))
        await socket.close()

    return app


def ask(app: Any, headers: Headers, path: str = "/seen", **more: Any) -> tuple[Reply, dict[str, Any]]:
    """
    Make one request; return the reply and what the application saw.
    """
    reply = call(app, "GET", path, headers, **more)
    assert reply.status == 200
    return reply, json.loads(reply.body)


def span_context(wire: Wire) -> SpanContext:
    """
    Return the only SERVER span's context.
    """
    found = wire.server.get_span_context()
    assert found is not None
    return found


def restarted(wire: Wire, told: dict[str, Any], answered: str) -> None:
    """
    Check that nothing of the caller's is left but a link and an attribute.
    """
    trace_id, _, flags, final = told["ids"]
    assert trace_id not in (TRACE, UUID.replace("-", ""))
    assert flags == "03"
    assert final == trace_id == told["id"] == told["state"] == answered
    assert told["headers"] == {"x-request-id": [final]}
    assert told["baggage"] == {}
    assert told["tracestate"] == "ot=th:0"
    span = wire.server
    assert span.parent is None
    assert span.attributes is not None
    assert span.attributes[semconv.REQUEST_ID] == final
    assert span.attributes[semconv.CALLER_REQUEST_ID] == UUID
    (link,) = span.links
    assert (f"{link.context.trace_id:032x}", f"{link.context.span_id:016x}") == (TRACE, CALLER)
    assert link.context.is_remote
    assert not link.context.trace_state
    assert guard.counters()["caller.restarted"] == 1


@pytest.mark.parametrize(
    "settings",
    [{"edge": "public"}, {"edge": "public", "trusted_networks": ["10.0.0.0/8"]}, {"trusted_networks": ["10.0.0.0/8"]}],
)
def test_a_stranger_is_restarted(wire: Wire, settings: dict[str, Any]) -> None:
    """
    Outside the declared networks a request gets new ids; the caller's are a link and an attribute, and no more.
    """
    wire.configure(**settings)
    reply, told = ask(application(), SENT, **OUTSIDE)
    restarted(wire, told, reply.request_id)


def test_a_websocket_is_restarted(wire: Wire) -> None:
    """
    A WebSocket's handshake, too.
    """
    wire.configure(edge="public")
    reply = open_socket(application(), headers=SENT)
    told = json.loads(reply.messages[1]["text"])
    restarted(wire, told, reply.request_id)


@pytest.mark.parametrize(
    ("settings", "client"),
    [
        ({}, OUTSIDE),
        ({"edge": "public", "trusted_networks": ["10.0.0.0/8"]}, INSIDE),
        ({"trusted_networks": ["10.0.0.0/8"]}, INSIDE),
    ],
)
def test_who_is_trusted_is_continued(wire: Wire, settings: dict[str, Any], client: dict[str, Any]) -> None:
    """
    Where nothing is declared everybody, else callers in the networks: all that they sent holds.
    """
    wire.configure(**settings)
    reply, told = ask(application(), SENT, **client)
    assert (told["ids"][0], told["id"], reply.request_id) == (TRACE, UUID, UUID)
    assert told["headers"] == {name.decode(): [value.decode()] for name, value in SENT}
    assert told["baggage"] == {"tier": "gold"}
    assert told["tracestate"] == "vendor=theirs,ot=th:8;rv:ffffffffffffff"
    assert wire.server.links == ()
    assert semconv.CALLER_REQUEST_ID not in (wire.server.attributes or {})


def test_a_stranger_without_ids(wire: Wire) -> None:
    """
    Who sends nothing is an ordinary new request.
    """
    wire.configure(edge="public")
    reply, told = ask(application(), [], **OUTSIDE)
    assert told["ids"][0] == told["id"] == reply.request_id
    assert wire.server.links == ()
    assert semconv.CALLER_REQUEST_ID not in (wire.server.attributes or {})
    assert "caller.restarted" not in guard.counters()


def test_a_strangers_wrong_id(wire: Wire) -> None:
    """
    What is no request id is no attribute either; it is counted and goes nowhere.
    """
    wire.configure(edge="public")
    reply, told = ask(application(), [(b"x-request-id", b"<script>"), (b"traceparent", b"00-bad")], **OUTSIDE)
    attributes = wire.server.attributes or {}
    assert told["headers"] == {"x-request-id": [reply.request_id]}
    assert attributes[semconv.REFUSED_REQUEST_ID] is True
    assert semconv.CALLER_REQUEST_ID not in attributes
    assert not any("script" in str(value) for value in attributes.values())


def test_every_header_that_can_be_the_id_ends(wire: Wire) -> None:
    """
    All configured names are taken from the application's view, which has the new id under the first.
    """
    wire.configure(edge="public", request_id_headers=["X-Request-ID", "X-Correlation-ID"], mint="uuid")
    reply, told = ask(application(), [(b"x-correlation-id", UUID.encode()), *SENT[1:]], **OUTSIDE)
    assert told["headers"] == {"x-request-id": [reply.request_id]}
    assert reply.request_id.replace("-", "") == told["ids"][0]
    assert (wire.server.attributes or {})[semconv.CALLER_REQUEST_ID] == UUID


@pytest.mark.parametrize(
    "name",
    [
        *(b"X_Request_ID", b"x_request-id", b"TRACEPARENT", b"TraceState", b"Baggage"),
        *(b"x-force", b"X_Force", b"x-answer", b"x_answer"),
        *(b"x-request-id", b"X-Amzn-Trace-Id", b"b3", b"x-b3-flags", b"X_B3_TraceId", b"uber-trace-id"),
    ],
)
def test_every_header_that_somebody_behind_would_believe_ends(wire: Wire, name: bytes) -> None:
    """
    In any spelling: the force header, the one that answers carry, the standard ones; other headers go on.
    """
    wire.configure(
        edge="public",
        request_id_headers=["X-Correlation-ID"],
        response_header="X-Answer",
        force_sample_header="X-Force",
        trusted_networks=["10.0.0.0/8"],
    )
    seen: list[Request] = []
    app = FastAPI()

    @app.get("/")
    async def look(request: Request) -> None:
        seen.append(request)

    other = (b"x-answers", b"1")
    assert call(app, headers=[(name, b"1"), other], **OUTSIDE).status == 200
    assert [pair[0] for pair in seen[0].scope["headers"][2:]] == [b"x-answers", b"x-correlation-id"]
    call(app, headers=[(name, b"1"), other], **INSIDE)
    assert name in [pair[0] for pair in seen[1].scope["headers"]]


@pytest.mark.filterwarnings("ignore:starlette.middleware.wsgi is deprecated")
def test_a_mounted_wsgi_application(wire: Wire) -> None:
    """
    WSGI reads ``X_Request_ID`` and ``X-Request-ID`` as one header: of a stranger's it gets neither.
    """
    from starlette.middleware.wsgi import WSGIMiddleware

    wire.configure(edge="public")
    environs: list[dict[str, Any]] = []

    def old(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        environs.append(environ)
        start_response("200 OK", [])
        return [b""]

    app = FastAPI()
    app.mount("/old", WSGIMiddleware(old))
    sent: Headers = [(b"X_Request_ID", UUID.encode()), (b"TraceParent", PARENT)]
    reply = call(app, "GET", "/old/", sent, **OUTSIDE)
    assert reply.status == 200
    assert environs[0]["HTTP_X_REQUEST_ID"] == reply.request_id
    assert "HTTP_TRACEPARENT" not in environs[0]


NAMES = [b"x-request-id", b"traceparent", b"tracestate", b"baggage", b"x-force", b"x-forwarded-for", b"accept"]
VALUES = st.binary(max_size=40) | st.sampled_from([value for _, value in SENT] + [b"1", b"10.1.2.3", b"42"])


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(headers=st.lists(st.tuples(st.sampled_from(NAMES), VALUES), max_size=6))
def test_whatever_a_stranger_sends(wire: Wire, headers: Headers) -> None:
    """
    No header of a stranger's decides an id, a flag or a state; all others come to the application unchanged.
    """
    wire.configure(edge="public", trusted_networks=["10.0.0.0/8"], force_sample_header="X-Force", ratio=0.5)
    wire.clear()
    seen: list[Request] = []
    app = FastAPI()

    @app.get("/")
    async def look(request: Request) -> None:
        seen.append(request)
        trace_id, _, flags, final = log_ids()
        assert trace_id == final
        kept = RatioSampler(0.5).decide(None, int(trace_id, 16), given=False)
        assert flags == ("03" if kept[0] else "02")
        state = get_current_span().get_span_context().trace_state
        assert kept[1] is not None
        assert state.to_header() == kept[1].to_header()
        assert not baggage.get_all()

    reply = call(app, headers=list(headers), **OUTSIDE)
    assert (reply.error, reply.status) == (None, 200)
    ours = (b"x-request-id", reply.request_id.encode())
    assert ours[1] not in [value for _, value in headers]
    others = [pair for pair in headers if pair[0] in NAMES[5:]]
    assert seen[0].scope["headers"][2:] == [*others, ours]


def test_a_stranger_wears_out_no_id(wire: Wire) -> None:
    """
    A ticket's id that strangers replay roots nothing, and still roots its trace when a trusted caller sends it.
    """
    wire.configure(edge="public", trusted_networks=["10.0.0.0/8"])
    app = application()
    replayed: Headers = [(b"x-request-id", UUID.encode())]
    traces = {ask(app, replayed, **OUTSIDE)[1]["ids"][0] for _ in range(150)}
    assert len(traces) == 150
    assert ask(app, replayed, **INSIDE)[1]["ids"][0] == UUID.replace("-", "")
    assert "request_id.reused" not in guard.counters()


def test_a_sampled_flag_forces_nothing(wire: Wire) -> None:
    """
    At ratio 0 a stranger's sampled flag makes no span; that of a trusted caller does.
    """
    wire.configure(edge="public", trusted_networks=["10.0.0.0/8"], ratio=0.0)
    app = application()
    assert ask(app, SENT, **OUTSIDE)[1]["ids"][2] == "02"
    assert wire.spans == []
    ask(app, SENT, **INSIDE)
    assert span_context(wire).trace_id == int(TRACE, 16)


@pytest.mark.parametrize("client", [OUTSIDE, INSIDE])
def test_excluded_routes(wire: Wire, client: dict[str, Any]) -> None:
    """
    An excluded route keeps a trusted caller's trace without a span, and nothing of a stranger's.
    """
    wire.configure(edge="public", trusted_networks=["10.0.0.0/8"], excluded_server="health")
    reply, told = ask(application(), SENT, "/health", **client)
    assert wire.spans == []
    if client is INSIDE:
        assert (told["ids"][0], told["ids"][1], reply.request_id) == (TRACE, CALLER, UUID)
    else:
        assert told["ids"][0] == reply.request_id
        assert told["ids"][0] not in (TRACE, UUID.replace("-", ""))
        assert told["ids"][2] == "02"
        assert told["headers"] == {"x-request-id": [reply.request_id]}


def test_without_the_sdk(wire: Wire) -> None:
    """
    With OTEL_SDK_DISABLED the request id is restarted all the same.
    """
    wire.configure(edge="public", sdk_disabled=True)
    reply, told = ask(application(), SENT, **OUTSIDE)
    assert told["headers"] == {"x-request-id": [reply.request_id]}
    assert reply.request_id != UUID
    assert told["ids"] == ["", "", "", reply.request_id]


class Letter(TextMapPropagator):
    """
    Somebody else's propagator, with a header of its own.
    """

    def extract(
        self, carrier: CarrierT, context: Context | None = None, getter: Getter[CarrierT] = default_getter
    ) -> Context:
        """
        Take the trace from ``b3``.
        """
        context = Context() if context is None else context
        found = getter.get(carrier, "b3")
        if not found:
            return context
        trace_id, _, span_id = found[0].partition("-")
        span_context = SpanContext(int(trace_id, 16), int(span_id, 16), True, TraceFlags(1))
        return set_span_in_context(NonRecordingSpan(span_context), baggage.set_baggage("a", "b", context))

    def inject(self, carrier: Any, context: Context | None = None, setter: Any = None) -> None:
        """
        Write nothing.
        """

    @property
    def fields(self) -> set[str]:
        """
        Its header.
        """
        return {"B3"}


def test_a_propagator_of_somebody_else(wire: Wire) -> None:
    """
    Whatever header the caller's trace came in, it ends here.
    """
    wire.configure(edge="public")
    propagate.set_global_textmap(Letter())
    reply, told = ask(application(), [(b"b3", f"{TRACE}-{CALLER}".encode()), *SENT], **OUTSIDE)
    restarted(wire, told, reply.request_id)


def test_nothing_of_a_strangers_context_is_parsed(wire: Wire) -> None:
    """
    Baggage and tracestate that will be thrown away are not read, and no propagator of another library is asked.
    """
    wire.configure(edge="public", trusted_networks=["10.0.0.0/8"])
    app = application()
    many: Headers = [(b"baggage", b",".join(b"k%d=v" % number for number in range(70)))]
    ask(app, many, **OUTSIDE)
    assert "baggage.members_over_limit" not in guard.counters()
    ask(app, many, **INSIDE)
    assert guard.counters()["baggage.members_over_limit"] == 6

    asked: list[object] = []

    class Recording(Letter):
        def extract(
            self, carrier: CarrierT, context: Context | None = None, getter: Getter[CarrierT] = default_getter
        ) -> Context:
            asked.append(carrier)
            return super().extract(carrier, context, getter)

    propagate.set_global_textmap(Recording())
    letter: Headers = [(b"b3", f"{TRACE}-{CALLER}".encode())]
    ask(app, letter, **OUTSIDE)
    assert asked == []
    ask(app, letter, **INSIDE)
    assert len(asked) == 1


PROXIED: dict[str, Any] = {"trusted_networks": ["10.0.0.0/8"], "trusted_proxies": ["192.0.2.80"]}


@pytest.mark.parametrize(
    ("believed", "settings", "peer", "forwarded", "continued"),
    [
        # uvicorn's default: no header is believed from here.
        ("127.0.0.1", PROXIED, "192.0.2.80", "10.1.2.3", True),
        ("127.0.0.1", PROXIED, "192.0.2.80", "10.1.2.3, 203.0.113.9", False),
        ("127.0.0.1", PROXIED, "203.0.113.9", "10.1.2.3", False),
        # uvicorn believes everybody, and takes the leftmost address.
        ("*", PROXIED, "203.0.113.9", "10.1.2.3", False),
        ("*", PROXIED, "192.0.2.80", "10.1.2.3, 203.0.113.9", False),
        ("*", PROXIED, "192.0.2.80", "203.0.113.9, 10.1.2.3", True),
        # uvicorn believes the proxy, which nobody declared here: the proxy is the caller.
        ("192.0.2.80", {"trusted_networks": ["10.0.0.0/8"]}, "192.0.2.80", "10.1.2.3", False),
        ("192.0.2.80", {"trusted_networks": ["10.0.0.0/8", "192.0.2.80"]}, "192.0.2.80", "203.0.113.9", False),
        ("192.0.2.80", {"trusted_networks": ["10.0.0.0/8", "192.0.2.80"]}, "192.0.2.80", "10.1.2.3", True),
    ],
)
def test_behind_uvicorns_proxy_headers(
    wire: Wire, believed: str, settings: dict[str, Any], peer: str, forwarded: str, continued: bool
) -> None:
    """
    The socket's peer counts, although uvicorn has put another address into the scope before us.
    """
    wire.configure(edge="public", **settings)
    inner: Any = application()
    app = ProxyHeadersMiddleware(inner, trusted_hosts=believed)
    _, told = ask(app, [*SENT, (b"x-forwarded-for", forwarded.encode())], client=(peer, 50000))
    assert (told["id"] == UUID) is continued


def test_uvicorn_is_left_as_it_was(wire: Wire) -> None:
    """
    The middleware is touched only while somebody is declared, once, and is put back.
    """
    module = sys.modules[ProxyHeadersMiddleware.__module__]
    middleware: Any = module.ProxyHeadersMiddleware
    before = middleware.__call__
    wire.configure(edge="public")
    wrapped = middleware.__call__
    assert wrapped is not before
    wire.configure(edge="public", mint="uuid")
    assert middleware.__call__ is wrapped
    plug.deactivate()
    assert middleware.__call__ is before


FORCE: Headers = [(b"x-force", b"1")]
FORCING: dict[str, Any] = {"force_sample_header": "X-Force", "trusted_networks": ["10.0.0.0/8"], "ratio": 0.0}


def ot(state: str) -> dict[str, str]:
    """
    Return the parts of the ``ot`` member.
    """
    member = dict(part.split("=", 1) for part in state.split(",") if part).get("ot", "")
    return dict(part.split(":", 1) for part in member.split(";") if part)


def test_a_forced_root(wire: Wire) -> None:
    """
    A trusted caller's header gets its trace sampled at any ratio, without a threshold: it stands for no others.
    """
    wire.configure(**FORCING)
    _, told = ask(application(), [*FORCE, SENT[0]], **INSIDE)
    trace_id = UUID.replace("-", "")
    assert (told["ids"][0], told["ids"][2]) == (trace_id, "01")
    assert ot(told["tracestate"]) == {"rv": f"{randomness(int(trace_id, 16)):014x}"}
    assert span_context(wire).trace_state.to_header() == told["tracestate"]


def test_a_forced_continuation(wire: Wire) -> None:
    """
    It samples what the caller's own trace left out, and takes away a threshold that no longer tells the truth.
    """
    wire.configure(**FORCING)
    parent = PARENT[:-1] + b"0"
    state = b"vendor=theirs,ot=th:8;rv:00000000000001;x:y"
    _, told = ask(application(), [*FORCE, (b"traceparent", parent), (b"tracestate", state)], **INSIDE)
    assert (told["ids"][0], told["ids"][2]) == (TRACE, "01")
    assert ot(told["tracestate"]) == {"rv": "00000000000001", "x": "y"}
    assert "vendor=theirs" in told["tracestate"]
    assert wire.server.parent is not None


def test_forcing_what_the_ratio_keeps_anyway(wire: Wire) -> None:
    """
    A trace that the ratio keeps was chosen by probability and says so, forced or not.
    """
    wire.configure(**{**FORCING, "ratio": 0.5})
    app = application()
    thresholds: dict[bool, set[str | None]] = {True: set(), False: set()}
    for _ in range(60):
        _, told = ask(app, FORCE, **INSIDE)
        kept = RatioSampler(0.5).decide(None, int(told["ids"][0], 16), given=False)[0]
        thresholds[kept].add(ot(told["tracestate"]).get("th"))
    assert len(wire.servers) == 60
    assert thresholds == {True: {"8"}, False: {None}}


def test_a_forced_trace_says_so(wire: Wire) -> None:
    """
    Its SERVER span has an attribute, at ratio 1 as well, by which tail sampling keeps it; no other request's has.
    """
    wire.configure(**{**FORCING, "ratio": 1.0})
    app = application()
    for headers, client in ((FORCE, INSIDE), ([], INSIDE), (FORCE, OUTSIDE)):
        ask(app, headers, **client)
    assert [(span.attributes or {}).get(semconv.FORCED) for span in wire.servers] == [True, None, None]


@pytest.mark.parametrize(
    ("changed", "client", "headers"),
    [
        ({}, OUTSIDE, FORCE),
        ({}, INSIDE, [(b"x-force", b"0")]),
        ({}, INSIDE, []),
        ({"force_sample_header": ""}, INSIDE, FORCE),
        ({"trusted_networks": []}, INSIDE, FORCE),
        ({"edge": "public", "trusted_networks": []}, INSIDE, FORCE),
    ],
)
def test_who_cannot_force(wire: Wire, changed: dict[str, Any], client: dict[str, Any], headers: Headers) -> None:
    """
    Strangers, callers that nobody declared, and other values force nothing.
    """
    wire.configure(**{**FORCING, **changed})
    ask(application(), headers, **client)
    assert wire.spans == []


def test_forcing_leaves_the_next_request_alone(wire: Wire) -> None:
    """
    Two requests in one task: only the one that asked is sampled.
    """
    wire.configure(**FORCING)
    app = application()

    async def both() -> None:
        await exchange(app, http_scope("GET", "/seen", FORCE, **INSIDE))
        await exchange(app, http_scope("GET", "/seen", [], **INSIDE))

    asyncio.run(both())
    assert len(wire.servers) == 1


def test_a_third_partys_sampler_decides_itself(wire: Wire) -> None:
    """
    Where the sampler is not ours the header changes nothing, and nothing fails.
    """
    wire.configure(**FORCING)
    wire.provider.sampler = ParentBased(TraceIdRatioBased(0.0))
    for tracer in wire.provider._tracers.values():
        tracer.sampler = wire.provider.sampler
    ask(application(), FORCE, **INSIDE)
    assert wire.spans == []


def test_a_forced_websocket(wire: Wire) -> None:
    """
    The header works on a handshake as on a request.
    """
    wire.configure(**FORCING)
    asyncio.run(talk(application(), {**websocket_scope("/ws", FORCE), **INSIDE}))
    assert len(wire.servers) == 1
