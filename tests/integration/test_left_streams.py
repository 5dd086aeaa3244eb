"""
Clients that leave a response, or leave before it, behind real servers: span, line and metric say the same.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

import pytest

from tests.integration.otlp_sink import OtlpSink, attributes
from tests.integration.services import DEADLINE_S, Service, clean_environment

pytestmark = pytest.mark.slow

APP = """
import asyncio
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, StreamingResponse

app = FastAPI()

async def events():
    while True:
        yield b"data: tick\\n\\n"
        await asyncio.sleep(0.005)

@app.get("/sse")
async def sse():
    return StreamingResponse(events(), media_type="text/event-stream")

@app.get("/polls")
async def polls(request: Request):
    async def tokens():
        while not await request.is_disconnected():
            yield b"token "
            await asyncio.sleep(0.005)
    return StreamingResponse(tokens())

def blocks():
    while True:
        yield b"x" * 1024

@app.get("/blocking")
def blocking():
    return StreamingResponse(blocks())

@app.get("/file")
async def file():
    return FileResponse("large.bin")

async def bad_clean_up():
    try:
        async for event in events():
            yield event
    finally:
        raise RuntimeError("the clean-up failed")

@app.get("/raises")
async def raises():
    return StreamingResponse(bad_clean_up())

@app.get("/early")
async def early(request: Request):
    while not await request.is_disconnected():
        await asyncio.sleep(0.005)
    return "nobody reads it"

@app.post("/half")
async def half(request: Request):
    return len(await request.body())
"""
ZERO = "opentelemetry-instrument"
SERVERS = {
    "h11": (ZERO, "uvicorn", "main:app", "--port", "{port}", "--http", "h11"),
    "httptools": (ZERO, "uvicorn", "main:app", "--port", "{port}", "--http", "httptools"),
    "hypercorn": (ZERO, "hypercorn", "main:app", "--bind", "127.0.0.1:{port}"),
}


STREAMS = ("/sse", "/polls", "/blocking", "/file")
UNANSWERED = ("/early", "/half")

Told = dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]


def leave(port: int, path: str) -> None:
    """
    Ask for a path and leave: before the response, or in its middle by a reset, as a phone that loses its network may.
    """
    method = "POST" if path == "/half" else "GET"
    length = "content-length: 1000\r\n" if path == "/half" else ""
    with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as connection:
        connection.sendall(f"{method} {path} HTTP/1.1\r\nhost: x\r\n{length}\r\n".encode())
        if path in UNANSWERED:
            return
        seen = b""
        while b"\r\n\r\n" not in seen or len(seen) < 400:
            seen += connection.recv(4096)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.fixture(scope="module", params=SERVERS)
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """
    What a service told of one client that left for each path: span, line, and the metric's attributes.
    """
    directory = tmp_path_factory.mktemp("left")
    paths = (*STREAMS, *UNANSWERED, "/raises")
    (directory / "main.py").write_text(APP)
    (directory / "large.bin").write_bytes(bytes(16 << 20))
    with OtlpSink() as sink:
        environment = clean_environment(
            OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint,
            OTEL_BSP_SCHEDULE_DELAY="20",
            OTEL_METRICS_EXPORTER="otlp",
            OTEL_METRIC_EXPORT_INTERVAL="3600000",
        )
        with Service(SERVERS[request.param], directory, environment) as service:
            for path in paths:
                leave(service.port, path)
            assert sink.wait(lambda: set(paths) <= {span.attributes["url.path"] for span in sink.spans}), (
                service.output()
            )
            service.stop()
            output = service.stdout()
        spans = {span.attributes["url.path"]: span for span in sink.spans}
        points = {
            found.get("http.route"): found
            for request_ in sink.metrics
            for resource in request_.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == "http.server.request.duration"
            for point in metric.histogram.data_points
            if (found := attributes(point.attributes))
        }
    lines = {
        found["route"]: found
        for text in output.splitlines()
        if text.startswith("{") and "route" in (found := json.loads(text))
    }
    return {path: (spans[path], lines[path], points[path]) for path in paths}


@pytest.mark.parametrize("path", STREAMS)
def test_a_status_that_was_sent_stays(path: str, told: Told) -> None:
    """
    Leaving is the only end that an event stream has: its 200 stays in span, line and metric, and nothing failed.
    """
    span, line, point = told[path]
    assert span.attributes["http.response.status_code"] == 200
    assert line["status"] == 200
    assert point["http.response.status_code"] == 200
    assert (span.status_code, span.events) == (0, [])
    assert [found.get("error.type") for found in (span.attributes, point)] == [None, None]
    if path != "/file":  # a handler that sends and never receives is told of it by uvicorn alone
        assert span.attributes["otel_correlation.client_disconnected"] is True
        assert line["client_disconnected"] is True


def test_a_stream_that_failed_has_failed(told: Told) -> None:
    """
    What a stream raises when it is left is the handler's own error, beside the status that was sent.
    """
    span, line, point = told["/raises"]
    assert (span.attributes["http.response.status_code"], line["status"]) == (200, 200)
    assert span.attributes["otel_correlation.client_disconnected"] is True
    assert span.status_code == 2
    assert span.attributes["error.type"] == point["error.type"] == line["error_type"]
    assert [event.name for event in span.events] == ["exception"]


@pytest.mark.parametrize("path", UNANSWERED)
def test_a_client_that_was_sent_nothing(path: str, told: Told) -> None:
    """
    A client that left before anything was sent is a 499 on its line, and has no status on span and metric.
    """
    span, line, point = told[path]
    assert line["status"] == 499
    for found in (span.attributes, point):
        assert "http.response.status_code" not in found
        assert found["error.type"] == "client_disconnected"
    assert span.attributes["otel_correlation.client_disconnected"] is True
    assert (span.status_code, span.events) == (0, [])
