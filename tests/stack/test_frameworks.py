"""
Frameworks on Starlette, and Litestar, started as their users start them, beside contrib's instrumentation of Starlette.
"""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.integration.otlp_sink import OtlpSink, SinkSpan
from tests.integration.services import Service, clean_environment

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.needs()

ID = "ticket-2026-000123"
SENT = {"x-request-id": ID}

PLAIN = """
import logging
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

async def item(request):
    logging.getLogger("shop").info("looking up")
    return JSONResponse({})

app = Starlette(routes=[Mount("/shop", routes=[Route("/items/{item_id}", item)])])
"""
FASTMCP = """
import logging
from fastmcp import FastMCP

server = FastMCP("shop")

@server.tool
async def add(a: int, b: int) -> int:
    return a + b

app = server.http_app()
"""
CALL_TOOL = """
import asyncio, sys
from fastmcp import Client

async def main():
    async with Client(sys.argv[1]) as client:
        assert (await client.call_tool("add", {"a": 1, "b": 2})).data == 3

asyncio.run(main())
"""
GRADIO = """
import gradio
from starlette.applications import Starlette
from starlette.routing import Mount

demo = gradio.Interface(fn=lambda name: "hello " + name, inputs="text", outputs="text", api_name="greet")
inner = gradio.routes.App.create_app(demo)
app = Starlette(routes=[Mount("/demo", app=inner)])
"""
LITESTAR = """
import logging
from litestar import Litestar, WebSocket, get, websocket
from litestar.plugins.opentelemetry import OpenTelemetryConfig, OpenTelemetryPlugin
from opentelemetry import trace
from otel_correlation import edge

@get("/items/{item_id:int}")
async def item(item_id: int) -> dict[str, int]:
    logging.getLogger("shop").info("looking up")
    return {"item": item_id}

@get("/boom")
async def boom() -> None:
    raise LookupError("x")

@websocket("/ws/{room:str}")
async def chat(socket: WebSocket, room: str) -> None:
    await socket.accept()
    await socket.send_text(room)
    await socket.close()

async def record(exception, scope):
    if getattr(exception, "status_code", 500) >= 500:
        trace.get_current_span().record_exception(exception)

plugin = OpenTelemetryPlugin(OpenTelemetryConfig())
app = edge(Litestar([item, boom, chat], logging_config=None, plugins=[plugin], after_exception=[record]))
"""


def serve(source: str, directory: Path, libraries: Path, ask: Any) -> tuple[list[SinkSpan], str]:
    """
    Serve an application without code of ours, ask it something, and return the SERVER spans of ours and its output.
    """
    (directory / "main.py").write_text(source)
    command = (str(libraries / "opentelemetry-instrument"), str(libraries / "uvicorn"), "main:app", "--port", "{port}")
    with OtlpSink() as sink:
        environment = clean_environment(
            OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint, GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1"
        )
        with Service(command, directory, environment, ready="/ready") as service:
            ask(service)
            service.stop()
            output = service.output()
        found = [span for span in sink.spans if "url.path" in span.attributes and span.kind == "SERVER"]
    return [span for span in found if span.attributes["url.path"] != "/ready"], output


def lines(output: str) -> list[dict[str, Any]]:
    """
    Return the JSON lines of an output.
    """
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def test_plain_starlette_beside_contribs_instrumentation(libraries: Path, tmp_path: Path) -> None:
    """
    With contrib's instrumentation of Starlette installed there is one SERVER span, with the whole route and our ids.
    """

    def ask(service: Service) -> None:
        assert httpx.get(service.url + "/shop/items/3", headers=SENT).headers["x-request-id"] == ID

    (span,), output = serve(PLAIN, tmp_path, libraries, ask)
    assert (span.name, span.attributes["http.route"]) == ("GET /shop/items/{item_id}", "/shop/items/{item_id}")
    (line,) = [line for line in lines(output) if line["logger"] == "shop"]
    assert (line["request_id"], line["trace_id"]) == (ID, span.trace_id)


def test_fastmcp(libraries: Path, tmp_path: Path) -> None:
    """
    A FastMCP server is covered: each request of its client is one SERVER span of the route.
    """

    def ask(service: Service) -> None:
        command = [str(libraries / "python"), "-c", CALL_TOOL, service.url + "/mcp"]
        subprocess.run(command, env=clean_environment(), check=True, timeout=120, capture_output=True)
        answer = httpx.post(service.url + "/mcp", json={}, headers=SENT)
        assert answer.headers["x-request-id"] == ID

    spans, _ = serve(FASTMCP, tmp_path, libraries, ask)
    assert {span.name for span in spans} <= {"POST /mcp", "GET /mcp", "DELETE /mcp"}
    assert len({span.span_id for span in spans}) == len(spans) >= 3
    (ours,) = [span for span in spans if span.attributes["request_id"] == ID]
    assert ours.name == "POST /mcp"


def test_gradio_behind_starlette(libraries: Path, tmp_path: Path) -> None:
    """
    A Gradio application, mounted in one of Starlette, has its routes below the mount.
    """

    def ask(service: Service) -> None:
        answer = httpx.post(service.url + "/demo/gradio_api/call/greet", json={"data": ["x"]}, headers=SENT, timeout=60)
        assert (answer.status_code, answer.headers["x-request-id"]) == (200, ID)

    spans, _ = serve(GRADIO, tmp_path, libraries, ask)
    (span,) = [span for span in spans if span.attributes.get("request_id") == ID]
    assert span.name == "POST /demo/gradio_api/call/{api_name}"


def test_litestar_in_an_edge(libraries: Path, tmp_path: Path) -> None:
    """
    ``edge(app)`` gives a Litestar application what the page promises, once beside its own plugin for OpenTelemetry.
    """

    def ask(service: Service) -> None:
        with httpx.Client(base_url=service.url, headers=SENT) as client:
            for path, status in (("/items/3", 200), ("/boom", 500), ("/nothing", 404)):
                answer = client.get(path)
                assert (answer.status_code, answer.headers["x-request-id"]) == (status, ID)

    spans, output = serve(LITESTAR, tmp_path, libraries, ask)
    by_path = {span.attributes["url.path"]: span for span in spans}
    assert len(spans) == len(by_path) == 3
    assert by_path["/items/3"].name == "GET /items/{item_id}"
    assert by_path["/boom"].name == "GET /boom"
    assert by_path["/boom"].attributes["error.type"] == "500"
    assert [event.attributes["exception.type"] for event in by_path["/boom"].events] == ["LookupError"]
    assert by_path["/nothing"].name == "GET"
    (line,) = [line for line in lines(output) if line["logger"] == "shop"]
    assert line["request_id"] == ID
    assert "Telemetry failed" not in output
