"""
Hostile headers: never a 5xx, never a forged header or line, never another request's id.
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI, Request
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from otel_correlation.request_id import parse
from tests.contract.wire import PARENT, UUID, Wire, exchange, http_scope, talk, websocket_scope, wired

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = (
    b"x-request-id",
    b"x-correlation-id",
    b"x-amzn-trace-id",
    b"traceparent",
    b"tracestate",
    b"baggage",
    b"host",
    b"user-agent",
    b"X-Request-ID",
    b"content-length",
    b"",
)
NEAR = st.sampled_from(
    [
        UUID.encode(),
        UUID.encode() + b"\n",
        PARENT,
        PARENT + b"-x",
        b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01",
        b"a\r\nset-cookie: x=1",
        b"ot=th:0;rv:00000000000000",
        b"ot=th:zz",
        b"k=v;p=1,k=v2",
        b"%00%0d%0a=%ff",
        b"Root=1-67891233-abcdef012345678912345678",
        b"[::1",
        b"host:99999999999999999999",
        "é\u2028".encode(),
        b"x" * 9000,
        b"a=1," * 200,
        b"0" * 32,
    ]
)
VALUE = st.one_of(NEAR, st.binary(max_size=300), st.binary(min_size=1, max_size=20))
HEADERS = st.lists(
    st.tuples(st.one_of(st.sampled_from(NAMES), st.sampled_from(NAMES[:7]), st.binary(max_size=20)), VALUE), max_size=12
)


class Lines(logging.Handler):
    """
    Keeps every line that anybody logs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(repr(record.__dict__))


@pytest.fixture(params=["light", "plain"], scope="module")
def shared(request: pytest.FixtureRequest) -> Iterator[tuple[Wire, FastAPI, list[Request], Lines]]:
    """
    One process for all examples, with every switch on that reads or writes headers.
    """
    seen: list[Request] = []
    app = FastAPI()

    @app.get("/x")
    async def x(request: Request) -> dict[str, str]:
        seen.append(request)
        return {}

    @app.websocket("/ws")
    async def ws(websocket: Any) -> None:
        await websocket.accept()

    lines = Lines()
    logging.getLogger().addHandler(lines)
    with wired(
        request.param,
        traceresponse=True,
        server_timing=True,
        request_id_headers=["X-Request-ID", "X-Correlation-ID", "X-Amzn-Trace-Id"],
        capture_server_request=[".*"],
        capture_server_response=[".*"],
        ratio=0.5,
    ) as wire:
        yield wire, app, seen, lines
    logging.getLogger().removeHandler(lines)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(headers=HEADERS, query=st.binary(max_size=60))
@example(headers=[(b"x-request-id", b"secret-in-a-header\x00")], query=b"")
@example(headers=[(b"traceparent", PARENT), (b"traceparent", PARENT)], query=b"&&=&%=%zz")
def test_any_headers(
    shared: tuple[Wire, FastAPI, list[Request], Lines], headers: list[tuple[bytes, bytes]], query: bytes
) -> None:
    """
    Whatever headers come: the application answers, with one valid request id, which is the one that it saw itself.
    """
    wire, app, seen, lines = shared
    for held in (wire.spans, seen, lines.lines):
        held.clear()
    scope = http_scope("GET", "/x")
    scope.update(headers=list(headers), query_string=query)
    reply = asyncio.run(exchange(app, scope))
    assert (reply.error, reply.status) == (None, 200)
    request_id = reply.request_id
    assert parse(request_id.encode("latin-1")) == request_id
    assert [value for name, value in seen[0].scope["headers"] if name == b"x-request-id"] == [request_id.encode()]
    assert seen[0].state.request_id == request_id
    assert all(re.fullmatch(rb"[\x20-\x7e]*", value) for _, value in reply.headers)
    sent = [value for name, value in headers if name in NAMES[:3]]
    minted = re.fullmatch("[0-9a-f]{32}", request_id) is not None
    assert minted or any(request_id.encode() in value for value in sent)
    for span in wire.spans:
        assert (span.attributes or {})["request_id"] == request_id
    for value in sent:
        if len(value) > 8 and parse(value) is None:
            assert not [line for line in lines.lines if repr(value)[2:-1] in line]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(headers=HEADERS)
def test_any_headers_of_a_websocket(
    shared: tuple[Wire, FastAPI, list[Request], Lines], headers: list[tuple[bytes, bytes]]
) -> None:
    """
    A WebSocket's handshake is no weaker.
    """
    _, app, _, _ = shared
    scope = websocket_scope("/nowhere")
    scope["headers"] = list(headers)
    reply = asyncio.run(talk(app, scope))
    assert reply.error is None
    assert parse(reply.request_id.encode("latin-1")) is not None


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.text(min_size=1, max_size=20),
    path=st.text(max_size=40),
    client=st.sampled_from([None, ("", None), ["::1", 0]]),
)
def test_any_request_line(
    shared: tuple[Wire, FastAPI, list[Request], Lines], method: str, path: str, client: Any
) -> None:
    """
    No method, path or peer breaks a request, and none becomes a span's name.
    """
    wire, app, _, _ = shared
    wire.spans.clear()
    scope = http_scope("GET", "/")
    scope.update(method=method, path="/" + path, client=client)
    reply = asyncio.run(exchange(app, scope))
    assert reply.error is None
    assert reply.status in (200, 307, 404, 405)
    assert reply.request_id
    for span in wire.spans:
        assert span.name.split(" ")[0] in {
            "HTTP",
            "GET",
            "POST",
            "PUT",
            "DELETE",
            "PATCH",
            "HEAD",
            "OPTIONS",
            "TRACE",
            "CONNECT",
            "QUERY",
        }
