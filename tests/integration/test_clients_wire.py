"""
Outbound attempts over real sockets: what a server receives is what the span says.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import h2.config
import h2.connection
import h2.events
import pytest
import uvicorn
from opentelemetry import context as otel_context
from opentelemetry.trace import NonRecordingSpan, SpanContext, StatusCode, TraceFlags, set_span_in_context

from otel_correlation import identity
from tests.clients_probe import REQUEST_ID, SIDES, Probe, Side, attempts, request, traceparent
from tests.http_answers import running

if TYPE_CHECKING:
    from collections.abc import Iterator

DEADLINE_S = 30.0


@pytest.fixture(params=SIDES, ids=repr)
def side(request: pytest.FixtureRequest) -> Side:
    """
    Each of the four ways to send.
    """
    found: Side = request.param
    return found


@pytest.fixture
def probe() -> Iterator[Probe]:
    """
    Every client is traced.
    """
    with attempts(Probe()) as found:
        yield found


class Origin(ThreadingHTTPServer):
    """
    A small HTTP/1.1 server that keeps the headers of what it was asked.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: list[list[tuple[str, str]]] = []
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Origin

    def do_GET(self) -> None:
        """
        Answer by path.
        """
        self.server.received.append([(name.lower(), value) for name, value in self.headers.items()])
        if self.path == "/redirect":
            self.send_response(307)
            self.send_header("Location", "/ok")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path == "/cut":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"only this")
            self.close_connection = True
        elif self.path == "/slow":
            self.server.release.wait(DEADLINE_S)
            self.close_connection = True
        elif self.path == "/stream":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"5\r\nfirst\r\n")
            self.wfile.flush()
            self.server.release.wait(DEADLINE_S)
            self.wfile.write(b"4\r\nlast\r\n0\r\n\r\n")
        else:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

    do_POST = do_GET  # noqa: N815 - the name that the base calls

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """
        Say nothing.
        """


@pytest.fixture
def origin() -> Iterator[Origin]:
    """
    A running server.
    """
    with running(Origin()) as server:
        yield server
        server.release.set()


def ours(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """
    Return the headers that we wrote, as they came over the wire.
    """
    return [pair for pair in headers if pair[0] in ("traceparent", "tracestate", "baggage", "x-request-id")]


def test_a_request_over_a_socket(side: Side, probe: Probe, origin: Origin) -> None:
    """
    The server gets the span's own traceparent and the request id; the span says where it went and what it spoke.
    """
    with request():
        response = side.fetch(None, f"{origin.url}/ok?token=secret")
    assert response.text == "ok"
    assert dict(probe.span.attributes) == {
        "http.request.method": "GET",
        "url.full": f"{origin.url}/ok?token=REDACTED",
        "server.address": "127.0.0.1",
        "server.port": origin.server_address[1],
        "http.response.status_code": 200,
        "network.protocol.version": "1.1",
        "request_id": REQUEST_ID,
    }
    assert ours(origin.received[0]) == [("traceparent", traceparent(probe.span)), ("x-request-id", REQUEST_ID)]


def test_redirects_over_a_socket(side: Side, probe: Probe, origin: Origin) -> None:
    """
    Each hop has its span and its own traceparent, on one connection.
    """
    with request():
        side.fetch(None, f"{origin.url}/redirect", follow_redirects=True)
    assert [ours(each) for each in origin.received] == [
        [("traceparent", traceparent(span)), ("x-request-id", REQUEST_ID)] for span in probe.spans
    ]
    assert [span.attributes.get("http.request.resend_count") for span in probe.spans] == [None, 1]


def test_a_stream_over_a_socket(side: Side, probe: Probe, origin: Origin) -> None:
    """
    The span is open while the server still sends, and ends with the last chunk.
    """
    seen: list[int] = []

    async def read_async(client: Any) -> None:
        async with client.stream("GET", f"{origin.url}/stream") as response:
            async for _ in response.aiter_raw():
                seen.append(len(probe.spans))
                origin.release.set()

    def read(client: Any) -> None:
        with client.stream("GET", f"{origin.url}/stream") as response:
            for _ in response.iter_raw():
                seen.append(len(probe.spans))
                origin.release.set()

    side.run(side.client(), read_async if side.is_async else read)
    assert seen == [0, 0]
    assert probe.span.status.status_code is StatusCode.UNSET


def test_a_body_that_is_cut_off(side: Side, probe: Probe, origin: Origin) -> None:
    """
    A connection that ends too early is the span's error, with the status that had come.
    """
    with pytest.raises(side.library.RemoteProtocolError):
        side.fetch(None, f"{origin.url}/cut")
    assert probe.span.attributes["http.response.status_code"] == 200
    assert probe.span.attributes["error.type"] == f"{side.library.__name__}.RemoteProtocolError"
    assert probe.span.status.status_code is StatusCode.ERROR


def test_a_timeout(side: Side, probe: Probe, origin: Origin) -> None:
    """
    A server that does not answer in time is the span's error, before any response.
    """
    with pytest.raises(side.library.ReadTimeout):
        side.fetch(None, f"{origin.url}/slow", timeout=0.05)
    origin.release.set()
    assert probe.span.attributes["error.type"] == f"{side.library.__name__}.ReadTimeout"
    assert "http.response.status_code" not in probe.span.attributes


@pytest.mark.parametrize("retries", [0, 1])
def test_a_refused_connection(side: Side, probe: Probe, retries: int) -> None:
    """
    Nobody listens: one span, also where httpx itself tries to connect again, because nothing was sent before.
    """
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        kind = side.library.AsyncHTTPTransport if side.is_async else side.library.HTTPTransport
        with pytest.raises(side.library.ConnectError):
            side.fetch(kind(retries=retries, trust_env=False), f"http://127.0.0.1:{taken.getsockname()[1]}/")
    assert probe.span.attributes["error.type"] == f"{side.library.__name__}.ConnectError"
    assert probe.span.attributes["server.address"] == "127.0.0.1"


def test_module_functions(probe: Probe, origin: Origin) -> None:
    """
    ``httpx.get`` and its siblings are attempts like any other.
    """
    for library in (SIDES[0].library, SIDES[2].library):
        library.get(f"{origin.url}/ok", trust_env=False)
        library.post(f"{origin.url}/ok", content=b"x", trust_env=False)
        with library.stream("GET", f"{origin.url}/ok", trust_env=False) as response:
            response.read()
    assert [span.name for span in probe.spans] == ["GET", "POST", "GET"] * 2


def test_many_requests_at_once(side: Side, probe: Probe, origin: Origin) -> None:
    """
    200 interleaved requests of as many callers: no header of one leaves with another's ids.
    """

    def context(index: int) -> Any:
        parent = SpanContext(index + 1, index + 1, is_remote=False, trace_flags=TraceFlags(1))
        found = identity.set_in(otel_context.Context(), identity.Identity(f"request-{index:08}"))
        return set_span_in_context(NonRecordingSpan(parent), found)

    async def one_async(client: Any, index: int) -> None:
        otel_context.attach(context(index))
        await client.get(f"{origin.url}/ok", headers={"x-index": str(index)})

    async def all_async(client: Any) -> None:
        await asyncio.gather(*(one_async(client, index) for index in range(200)))

    def one(client: Any, index: int) -> None:
        token = otel_context.attach(context(index))
        client.get(f"{origin.url}/ok", headers={"x-index": str(index)})
        otel_context.detach(token)

    def all_sync(client: Any) -> None:
        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(one, client, index) for index in range(200)]:
                future.result()

    client = side.client(limits=side.library.Limits(max_connections=8), timeout=DEADLINE_S)
    side.run(client, all_async if side.is_async else all_sync)
    by_trace = {span.get_span_context().trace_id: span for span in probe.spans}
    assert len(by_trace) == len(origin.received) == 200
    for headers in map(dict, origin.received):
        index = int(headers["x-index"])
        assert headers["x-request-id"] == f"request-{index:08}"
        assert headers["traceparent"] == traceparent(by_trace[index + 1])
        assert by_trace[index + 1].parent.span_id == index + 1


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


class Http2(threading.Thread):
    """
    A server of one HTTP/2 connection with prior knowledge, which answers everything with ``ok``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.received: list[list[tuple[str, str]]] = []

    def run(self) -> None:
        """
        Serve until the client closes.
        """
        peer, _ = self.listener.accept()
        with peer:
            connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=False))
            connection.initiate_connection()
            peer.sendall(connection.data_to_send())
            with contextlib.suppress(ConnectionError):
                while data := peer.recv(65_536):
                    for event in connection.receive_data(data):
                        if isinstance(event, h2.events.RequestReceived):
                            self.received.append([(_text(name), _text(value)) for name, value in event.headers or []])
                        if isinstance(event, h2.events.StreamEnded):
                            connection.send_headers(event.stream_id, [(":status", "200")])
                            connection.send_data(event.stream_id, b"ok", end_stream=True)
                    peer.sendall(connection.data_to_send())


def test_http2_on_the_wire(side: Side, probe: Probe) -> None:
    """
    Two requests over one HTTP/2 connection: each its span with version 2, and the span's own headers in its frames.
    """
    server = Http2()
    server.start()
    kind = side.library.AsyncHTTPTransport if side.is_async else side.library.HTTPTransport
    client = side.client(kind(http1=False, http2=True, trust_env=False))
    try:
        with request():
            first, second = side.send(
                client, client.build_request("GET", server.url), client.build_request("POST", server.url, content=b"x")
            )
    finally:
        server.join(DEADLINE_S)
        server.listener.close()
    assert (first.http_version, second.text) == ("HTTP/2", "ok")
    assert [span.attributes["network.protocol.version"] for span in probe.spans] == ["2", "2"]
    assert [span.name for span in probe.spans] == ["GET", "POST"]
    assert [ours(each) for each in server.received] == [
        [("traceparent", traceparent(span)), ("x-request-id", REQUEST_ID)] for span in probe.spans
    ]


@pytest.mark.parametrize("side", [side for side in SIDES if side.is_async], ids=repr)
def test_an_application_in_the_same_process(side: Side, probe: Probe) -> None:
    """
    ``ASGITransport`` is a hop like any other; inside of it a client's span is a child of what the application sees.
    """
    received: list[list[tuple[bytes, bytes]]] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        del receive
        received.append(scope["headers"])
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b"no"})

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        async with side.client(side.library.ASGITransport(inner)) as client:
            await client.get("http://inner/")
        await inner(scope, receive, send)

    with request():
        side.fetch(side.library.ASGITransport(outer), "http://outer/")
    within, around = probe.spans
    assert [span.attributes["server.address"] for span in probe.spans] == ["inner", "outer"]
    assert within.parent.span_id == around.get_span_context().span_id
    names = [dict(headers)[b"traceparent"].decode() for headers in received]
    assert names == [traceparent(within), traceparent(around)]
    assert around.attributes["error.type"] == "404"


@pytest.mark.parametrize("side", [side for side in SIDES if not side.is_async], ids=repr)
def test_a_wsgi_application_in_the_same_process(side: Side, probe: Probe) -> None:
    """
    ``WSGITransport`` is a hop like any other.
    """
    received: list[str] = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        received.append(environ["HTTP_TRACEPARENT"])
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"ok"]

    assert side.fetch(side.library.WSGITransport(app)).text == "ok"
    assert received == [traceparent(probe.span)]


class _Uvicorn(uvicorn.Server):
    """
    A uvicorn server in a thread, ready when ``listening`` is set.
    """

    def __init__(self, app: Any) -> None:
        super().__init__(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
        self.listening = threading.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.listening.set()


def test_against_uvicorn(side: Side, probe: Probe) -> None:
    """
    A real ASGI server reads exactly one field of each of our names.
    """
    received: list[list[tuple[bytes, bytes]]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        del receive
        received.append(scope["headers"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    server = _Uvicorn(app)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert server.listening.wait(DEADLINE_S)
        port = server.servers[0].sockets[0].getsockname()[1]
        with request():
            side.fetch(None, f"http://127.0.0.1:{port}/", headers={"X-Request-Id": "the-callers-own"})
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)
    decoded = [(name.decode(), value.decode()) for name, value in received[0]]
    # httpx puts the caller's headers first.
    assert sorted(ours(decoded)) == [("traceparent", traceparent(probe.span)), ("x-request-id", "the-callers-own")]
