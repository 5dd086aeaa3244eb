"""
The bridge contract, points 1 to 3, end to end: which ids a request gets from what the caller sent.
"""

from __future__ import annotations

import json
import re
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI, Request
from opentelemetry import propagate
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from otel_correlation import guard, request_id, trace_id
from otel_correlation.identity import log_ids
from tests.contract.wire import CALLER, PARENT, TRACE, UUID, Headers, call

if TYPE_CHECKING:
    from tests.contract.wire import Wire

HEX32 = "0123456789abcdef0123456789ABCDEF"
LONG = "gateway-eu1-000000123"
RANDOM = TraceFlags.RANDOM_TRACE_ID


def application(seen: list[Any] | None = None) -> FastAPI:
    """
    Return an application that tells what it sees of its request's ids.
    """
    app = FastAPI()

    @app.get("/ids")
    async def ids(request: Request) -> dict[str, Any]:
        if seen is not None:
            seen.append(request)
        return {
            "header": request.headers.getlist("x-request-id"),
            "state": request.state.request_id,
            "request_id": request_id(),
            "trace_id": trace_id(),
            "log": log_ids(),
        }

    return app


def given(request: str | bytes | None = None, parent: bytes | None = None, state: bytes | None = None) -> Headers:
    """
    Return the headers of one row.
    """
    headers: Headers = []
    if request is not None:
        headers.append((b"x-request-id", request if isinstance(request, bytes) else request.encode()))
    if parent is not None:
        headers.append((b"traceparent", parent))
    if state is not None:
        headers.append((b"tracestate", state))
    return headers


def hashed(value: str) -> str:
    """
    Return what ``b2sum -l 128`` prints.
    """
    return blake2b(value.encode(), digest_size=16).hexdigest()


@pytest.mark.parametrize(
    ("headers", "trace", "request_out"),
    [
        (given(LONG, PARENT), TRACE, LONG),
        (given("42", PARENT), TRACE, "42"),
        (given(None, PARENT), TRACE, TRACE),
        (given("not valid", PARENT), TRACE, TRACE),
        (given(UUID), UUID.replace("-", ""), UUID),
        (given(UUID.upper()), UUID.replace("-", ""), UUID.upper()),
        (given(HEX32), HEX32.lower(), HEX32),
        (given("1-67891233-abcdef012345678912345678"), "67891233abcdef012345678912345678", "1-67891233-abcdef012345678912345678"),
        (given(LONG), hashed(LONG), LONG),
        (given("urn:uuid:" + UUID), hashed("urn:uuid:" + UUID), "urn:uuid:" + UUID),
        (given(LONG, b"00-" + b"0" * 32 + b"-" + CALLER.encode() + b"-01"), hashed(LONG), LONG),
        (given("42"), None, "42"),
        (given("0" * 32), None, "0" * 32),
        (given("00000000-0000-0000-0000-000000000000"), None, "00000000-0000-0000-0000-000000000000"),
        (given(), None, None),
        (given("a b"), None, None),
        (given("x" * 201), None, None),
        (given(None, b"rubbish"), None, None),
    ],
)  # fmt: skip
def test_mapping_table(wire: Wire, headers: Headers, trace: str | None, request_out: str | None) -> None:
    """
    Every row of the contract's table: the trace id and the request id are what it says, everywhere they are seen.
    """
    reply = call(application(), path="/ids", headers=headers)
    span = wire.server
    assert span.context is not None
    found = f"{span.context.trace_id:032x}"
    if trace is not None:
        assert found == trace
    final = request_out or found
    assert reply.request_id == final
    assert span.attributes is not None
    assert span.attributes["request_id"] == final
    body = json.loads(reply.body)
    assert body["header"] == [final]
    assert body["state"] == body["request_id"] == final
    assert body["trace_id"] == found
    assert body["log"] == [found, f"{span.context.span_id:016x}", f"{span.context.trace_flags:02x}", final]


@pytest.mark.parametrize(
    ("headers", "flags", "state"),
    [
        (given(), RANDOM | 1, r"ot=th:0"),
        (given("42"), RANDOM | 1, r"ot=th:0"),
        (given(UUID), 1, r"ot=th:0;rv:[0-9a-f]{14}"),
        (given(LONG), 1, r"ot=th:0;rv:[0-9a-f]{14}"),
        (given(None, PARENT), 1, r""),
        (given(None, PARENT[:-2] + b"03", b"b=2,ot=th:0,a=1"), RANDOM | 1, r"b=2,ot=th:0,a=1"),
        (given(LONG, PARENT, b"b=2,a=1"), 1, r"b=2,a=1"),
    ],
)
def test_flags_and_tracestate(wire: Wire, headers: Headers, flags: int, state: str) -> None:
    """
    The random flag is set for random ids only, randomness is explicit for bridged ones, a caller's members stay in order.
    """
    call(application(), path="/ids", headers=headers)
    context = wire.server.context
    assert context is not None
    assert context.trace_flags == flags
    assert re.fullmatch(state, context.trace_state.to_header())


def test_roots_have_no_fake_parent(wire: Wire) -> None:
    """
    A bridged request is a root; a continued one has exactly the caller as its remote parent.
    """
    call(application(), path="/ids", headers=given(UUID))
    call(application(), path="/ids", headers=given(UUID, PARENT))
    root, child = wire.servers
    assert root.parent is None
    assert child.parent is not None
    assert (child.parent.span_id, child.parent.is_remote) == (int(CALLER, 16), True)


@pytest.mark.parametrize(
    "value",
    [b"a\r\nb", b"a\nb", b"abcdefgh\n", b"\xc3\xa9\xc3\xa9", b"a@b", b"{id}", b" ", b"", b"\x00", b"a,b", b"x" * 4000],
)
def test_refused_id_is_replaced_and_unseen(wire: Wire, value: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """
    A refused value is replaced, counted, never logged and never shown to the application.
    """
    reply = call(application(), path="/ids", headers=[(b"x-request-id", value)])
    assert re.fullmatch("[0-9a-f]{32}", reply.request_id)
    assert guard.counters()["request_id.refused"] == 1
    assert len(value.strip()) < 2 or value.decode("latin-1") not in caplog.text
    assert wire.server.attributes is not None
    assert wire.server.attributes["otel_correlation.request_id.refused"] is True


def test_two_fields_are_refused(wire: Wire) -> None:
    """
    Two request id fields are no list: a new id takes their place, also in what the application sees.
    """
    seen: list[Request] = []
    reply = call(
        application(seen),
        path="/ids",
        headers=[(b"x-request-id", b"first-id-000001"), (b"x-request-id", b"second-id-00001")],
    )
    assert seen[0].headers.getlist("x-request-id") == [reply.request_id]
    assert reply.request_id not in ("first-id-000001", "second-id-00001")
    assert len(wire.servers) == 1


def test_reuse_guard(wire: Wire) -> None:
    """
    One id roots a hundred requests; later ones keep the id and get traces of their own, marked and counted.
    """
    app = application()
    replies = [call(app, path="/ids", headers=given(LONG)) for _ in range(103)]
    assert {reply.request_id for reply in replies} == {LONG}
    contexts = [span.context for span in wire.servers if span.context is not None]
    assert len({context.trace_id for context in contexts}) == 4
    assert all(context.trace_flags & RANDOM for context in contexts[100:])
    marked = [bool((span.attributes or {}).get("otel_correlation.request_id.reused")) for span in wire.servers]
    assert marked == [False] * 100 + [True] * 3
    assert guard.counters()["request_id.reused"] == 3


def test_unsampled_keeps_ids(wire: Wire) -> None:
    """
    At ratio 0 nothing is exported; ids, header and the request id in code go on, unsampled.
    """
    wire.configure(ratio=0.0)
    reply = call(application(), path="/ids", headers=given(UUID))
    log = json.loads(reply.body)["log"]
    assert wire.spans == []
    assert log[0] == UUID.replace("-", "")
    assert log[2:] == ["00", UUID]
    assert reply.request_id == UUID


def test_caller_decides_sampling(wire: Wire) -> None:
    """
    A parent's sampled flag is followed, whatever the ratio.
    """
    wire.configure(ratio=0.0)
    call(application(), path="/ids", headers=given(None, PARENT))
    wire.configure(ratio=1.0)
    call(application(), path="/ids", headers=given(None, PARENT[:-2] + b"00"))
    assert len(wire.spans) == 1


def test_sdk_disabled(wire: Wire) -> None:
    """
    Without the SDK there are no spans and no trace ids; the request id goes on.
    """
    wire.configure(sdk_disabled=True)
    reply = call(application(), path="/ids", headers=given(LONG, PARENT))
    assert json.loads(reply.body)["log"] == ["", "", "", LONG]
    assert reply.request_id == LONG
    minted = call(application(), path="/ids")
    assert re.fullmatch("[0-9a-f]{32}", minted.request_id)
    assert wire.spans == []


def test_mint_uuid(wire: Wire) -> None:
    """
    The switch mints UUIDv4 and bridges it.
    """
    wire.configure(mint="uuid")
    reply = call(application(), path="/ids")
    context = wire.server.context
    assert context is not None
    assert re.fullmatch("[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", reply.request_id)
    assert context.trace_id == int(reply.request_id.replace("-", ""), 16)
    assert context.trace_flags == 1


def test_other_header_names(wire: Wire) -> None:
    """
    The first present header of the list is the request id, an invalid one is not followed by the next; one name goes out.
    """
    wire.configure(
        request_id_headers=["X-Kong-Request-ID", "X-Correlation-ID", "X-Amzn-Trace-Id"], response_header="X-Trace-Key"
    )
    root = b"Self=1-67891234-12456789abcdef012345678;Root=1-67891233-abcdef012345678912345678"
    cases: list[tuple[Headers, str | None]] = [
        ([(b"x-correlation-id", b"correlation-00001"), (b"x-amzn-trace-id", root)], "correlation-00001"),
        ([(b"x-amzn-trace-id", root)], "1-67891233-abcdef012345678912345678"),
        ([(b"x-kong-request-id", b"bad id"), (b"x-correlation-id", b"correlation-00001")], None),
        ([(b"x-request-id", b"nobody-asked-for-it")], None),
    ]
    for headers, expected in cases:
        (value,) = call(application(), path="/ids", headers=headers).all("x-trace-key")
        assert value == (expected or f"{wire.servers[-1].context.trace_id:032x}")


def test_refused_value_of_another_header_is_unseen(wire: Wire) -> None:
    """
    A refused value stands in no header that the application reads, whatever the header's name.
    """
    wire.configure(request_id_headers=["X-Request-ID", "X-Correlation-ID"])
    seen: list[Request] = []
    call(application(seen), path="/ids", headers=[(b"x-correlation-id", b"bad id")])
    assert "x-correlation-id" not in seen[0].headers
    assert re.fullmatch("[0-9a-f]{32}", seen[0].headers["x-request-id"])


@pytest.mark.parametrize("parent", [PARENT, None])
def test_propagators_none(wire: Wire, parent: bytes | None) -> None:
    """
    ``OTEL_PROPAGATORS=none`` continues no trace and breaks no request; the request id still roots its trace.
    """
    wire.configure(propagators=())
    reply = call(application(), path="/ids", headers=given(UUID, parent))
    context = wire.server.context
    assert context is not None
    assert (reply.status, reply.request_id) == (200, UUID)
    assert context.trace_id == int(UUID.replace("-", ""), 16)
    assert wire.server.parent is None


class Rot13(TextMapPropagator):
    """
    Somebody's own propagator: the trace id in one header of its own.
    """

    def extract(self, carrier: Any, context: Context | None = None, getter: Any = None) -> Context:
        found = getter.get(carrier, "X-Own-Trace")
        if not found:
            return context or Context()
        remote = SpanContext(int(found[0], 16), 7, is_remote=True, trace_flags=TraceFlags(1))
        return set_span_in_context(NonRecordingSpan(remote), context)

    def inject(self, carrier: Any, context: Context | None = None, setter: Any = None) -> None:
        raise NotImplementedError

    @property
    def fields(self) -> set[str]:
        return {"x-own-trace"}


def test_foreign_propagator(wire: Wire) -> None:
    """
    A propagator that the application made the global one decides which trace a request belongs to.
    """
    propagate.set_global_textmap(Rot13())
    reply = call(
        application(),
        path="/ids",
        headers=[(b"x-own-trace", TRACE.encode()), (b"traceparent", PARENT.replace(b"0", b"1"))],
    )
    span = wire.server
    assert span.parent is not None
    assert f"{span.parent.trace_id:032x}" == TRACE
    assert reply.request_id == TRACE


def test_failing_foreign_propagator(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A propagator that raises costs the caller's trace, not the request's ids.
    """
    monkeypatch.delenv(guard.STRICT_ENV)
    propagate.set_global_textmap(Rot13())
    reply = call(application(), path="/ids", headers=[(b"x-own-trace", b"no hex"), (b"x-request-id", UUID.encode())])
    assert (reply.status, reply.request_id) == (200, UUID)
    assert wire.server.parent is None
    assert guard.counters()["internal_error.edge.extract"] == 1


def test_trace_response(wire: Wire) -> None:
    """
    ``traceresponse`` and ``Server-Timing`` name the SERVER span where asked for, and are absent otherwise.
    """
    app = application()
    assert call(app, path="/ids").all("traceresponse") == []
    wire.clear()
    wire.configure(traceresponse=True, server_timing=True)
    reply = call(app, path="/ids")
    context = wire.server.context
    assert context is not None
    expected = f"00-{context.trace_id:032x}-{context.span_id:016x}-03"
    assert reply.all("traceresponse") == [expected]
    assert reply.all("server-timing") == [f"trace;desc={expected}"]
