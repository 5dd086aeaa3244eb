"""
A gateway that passes its caller's headers on: a real service, real sockets, and what arrived behind it.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.http_answers import running
from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import DEADLINE_S, Service, clean_environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GATEWAY = """
import asyncio
import httpx, httpx2, websockets
from fastapi import BackgroundTasks, FastAPI, Request
from opentelemetry import propagate
from otel_correlation import inject

app = FastAPI()
tasks = set()

@app.get("/whole")
async def whole(request: Request, to: str):
    async with httpx.AsyncClient(trust_env=False) as client:
        await client.get(to, headers=request.headers)

@app.get("/pairs")
async def pairs(request: Request, to: str):
    async with httpx2.AsyncClient(trust_env=False, headers=request.headers.raw) as client:
        await client.get(to)

@app.get("/thread")
def thread(request: Request, to: str):
    wanted = ("traceparent", "tracestate", "baggage", "x-request-id")
    with httpx.Client(trust_env=False) as client:
        client.get(to, headers={name: request.headers[name] for name in wanted if name in request.headers})

@app.get("/redirected")
async def redirected(request: Request, to: str):
    async with httpx.AsyncClient(trust_env=False, follow_redirects=True) as client:
        await client.get(to + "/redirect", headers=request.headers)

@app.get("/background")
async def background(request: Request, to: str, jobs: BackgroundTasks):
    async def job():
        async with httpx.AsyncClient(trust_env=False) as client:
            await client.get(to, headers=request.headers)
    jobs.add_task(job)

@app.get("/outlives")
async def outlives(request: Request, to: str):
    async def job():
        while request.scope.get("otel_correlation") is not None:
            await asyncio.sleep(0.01)
        async with httpx.AsyncClient(trust_env=False) as client:
            await client.get(to, headers=request.headers)
    tasks.add(asyncio.create_task(job()))

@app.get("/chosen")
async def chosen(request: Request, to: str):
    headers = {**request.headers, "traceparent": "00-" + "c" * 32 + "-" + "d" * 16 + "-01"}
    async with httpx.AsyncClient(trust_env=False) as client:
        await client.get(to, headers=headers)

@app.get("/injected")
async def injected(request: Request, to: str):
    async with httpx.AsyncClient(trust_env=False) as client:
        await client.get(to, headers=inject(dict(request.headers)))

@app.get("/websocket")
async def websocket(request: Request, to: str):
    headers = {name.title(): value for name, value in request.headers.items() if "socket" not in name}
    wanted = ("Traceparent", "Tracestate", "Baggage", "X-Request-Id")
    headers = {name: headers[name] for name in wanted if name in headers}
    propagate.inject(headers)
    try:
        await websockets.connect(to.replace("http", "ws"), additional_headers=headers)
    except websockets.InvalidStatus:
        pass
"""

TRACE, CALLER, ID = "a" * 32, "b" * 16, "order-4711-of-the-caller"
SENT = {
    "traceparent": f"00-{TRACE}-{CALLER}-01",
    "tracestate": "vendor=theirs",
    "baggage": "tier=gold;p=1,user=alice",
    "x-request-id": ID,
}


class Upstream(ThreadingHTTPServer):
    """
    Keeps every field of every request by path.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seen: defaultdict[str, list[dict[str, list[str]]]] = defaultdict(list)
        self.arrived = threading.Condition()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"

    def wait(self, path: str) -> dict[str, list[str]]:
        """
        Return the propagation fields of the only request for a path, once it is there.
        """
        with self.arrived:
            assert self.arrived.wait_for(lambda: self.seen[path], DEADLINE_S), f"nothing came for {path}"
            (found,) = self.seen[path]
            return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def do_GET(self) -> None:
        """
        Keep what came; send on what ends in "redirect".
        """
        names = ("traceparent", "tracestate", "baggage", "x-request-id")
        with self.server.arrived:
            fields = {name: self.headers.get_all(name) or [] for name in names}
            self.server.seen[self.path.strip("/")].append(fields)
            self.server.arrived.notify_all()
        redirect = self.path.endswith("/redirect")
        self.send_response(307 if redirect else 200)
        if redirect:
            self.send_header("Location", "/second")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """
        Say nothing.
        """


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    """
    A running server.
    """
    with running(Upstream()) as server:
        yield server


WAYS = ("whole", "pairs", "thread", "redirected", "background", "outlives")


@pytest.mark.slow
def test_what_a_gateway_passes_on(tmp_path: Path, upstream: Upstream) -> None:
    """
    However a request's own headers are passed on, the upstream gets one of each: the CLIENT span's, and not the caller's.
    """
    (tmp_path / "gateway.py").write_text(GATEWAY)
    command = ("opentelemetry-instrument", "uvicorn", "--port", "{port}", "gateway:app")
    with OtlpSink() as sink:
        environment = clean_environment(OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint)
        with Service(command, tmp_path, environment) as service:

            def ask(way: str) -> None:
                answer = httpx.get(f"{service.url}/{way}", params={"to": upstream.url(way)}, headers=SENT)
                assert answer.status_code == 200, service.output()

            def client_span(url: str) -> Any:
                def found() -> list[Any]:
                    return [span for span in sink.spans if span.attributes.get("url.full") == url]

                assert sink.wait(lambda: bool(found())), service.output()
                (span,) = found()
                return span

            for way in WAYS:
                ask(way)
            for path in ("whole", "pairs", "thread", "redirected/redirect", "second", "background", "outlives"):
                got, span = upstream.wait(path), client_span(upstream.url(path))
                assert (span.kind, span.trace_id, span.links) == ("CLIENT", TRACE, []), path
                assert got == {
                    "traceparent": [f"00-{TRACE}-{span.span_id}-01"],
                    "tracestate": ["vendor=theirs"],
                    "baggage": [SENT["baggage"]],
                    "x-request-id": [ID],
                }, path
            # A traceparent that is not the caller's was chosen.
            ask("chosen")
            got, span = upstream.wait("chosen"), client_span(upstream.url("chosen"))
            assert got["traceparent"] == [f"00-{'c' * 32}-{'d' * 16}-01"]
            assert span.links == [("c" * 32, "d" * 16)]
            # Two more ways to carry them on: a carrier that is a copy, and a client of another protocol.
            ask("injected")
            assert upstream.wait("injected")["traceparent"] != [SENT["traceparent"]]
            ask("websocket")
            got = upstream.wait("websocket")
            assert [len(values) for values in got.values()] == [1, 1, 1, 1]
            assert got["traceparent"] != [SENT["traceparent"]]


@pytest.mark.slow
def test_the_caller_of_a_public_gate_is_not_passed_on(tmp_path: Path, upstream: Upstream) -> None:
    """
    What the edge threw away does not come back by a wrapper that kept the caller's raw headers.
    """
    wrapper = """
from gateway import app as inner

async def app(scope, receive, send):
    if scope["type"] == "http":
        scope["state"] = {**scope.get("state", {}), "raw": list(scope["headers"])}
    await inner(scope, receive, send)
"""
    raw = GATEWAY.replace("headers=request.headers)", "headers=request.state.raw)")
    (tmp_path / "gateway.py").write_text(raw)
    (tmp_path / "wrapper.py").write_text(wrapper)
    command = ("opentelemetry-instrument", "uvicorn", "--port", "{port}", "wrapper:app")
    environment = clean_environment(OTEL_CORRELATION_EDGE="public", OTEL_TRACES_EXPORTER="none")
    with Service(command, tmp_path, environment) as service:
        for way in ("whole", "background", "outlives"):
            answer = httpx.get(f"{service.url}/{way}", params={"to": upstream.url(way)}, headers=SENT)
            got = upstream.wait(way)
            assert len(got["traceparent"]) == 1
            assert answer.headers["x-request-id"] in got["traceparent"][0]
            assert got["x-request-id"] == [answer.headers["x-request-id"]]
            assert "vendor" not in "".join(got["tracestate"])
