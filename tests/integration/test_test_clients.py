"""
An application's own tests: what they see of spans, and where a failure of theirs points.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.integration.services import clean_environment

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

APP = """
import httpx
import pytest
from fastapi import FastAPI, WebSocket
from fastapi.testclient import TestClient
from opentelemetry import trace
from otel_correlation import work
from starlette.applications import Starlette
from starlette.testclient import TestClient as StarlettesClient

app = FastAPI()

@app.get("/orders/{number}")
async def order(number: int) -> dict:
    async with httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(200))) as client:
        await client.get("http://stock/")
    return {"order": number}

@app.get("/boom")
def boom() -> None:
    raise ValueError("boom")

@app.websocket("/ws")
async def ws(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_text("a")
    await socket.close()

class Authorised(TestClient):
    def __init__(self, app):
        super().__init__(app, headers={"authorization": "Bearer x"})

def kinds(telemetry):
    return [(span.kind.name, span.name) for span in telemetry.spans]

"""

GOOD = (
    APP
    + """
@pytest.mark.parametrize("client", [TestClient, StarlettesClient, Authorised])
def test_no_span_of_its_own(client, telemetry):
    answer = client(app).get("/orders/7")
    assert kinds(telemetry) == [("CLIENT", "GET"), ("SERVER", "GET /orders/{number}")]
    server = telemetry.span("GET /orders/{number}")
    assert server.parent is None
    assert answer.headers["x-request-id"] == f"{server.context.trace_id:032x}"
    assert "traceparent" not in answer.request.headers and "x-request-id" not in answer.request.headers

def test_none_for_a_stream_a_redirect_and_a_websocket(telemetry):
    with TestClient(app) as client:
        with client.stream("GET", "/orders/7") as answer:
            answer.read()
        client.get("/orders/7/", follow_redirects=True)
        with client.websocket_connect("/ws") as socket:
            assert socket.receive_text() == "a"
    assert [name for kind, name in kinds(telemetry) if kind == "CLIENT"] == ["GET", "GET"], "the application's own"
    assert not [span for span in telemetry.spans if span.attributes.get("error.type")]

def test_its_own_headers_are_sent(telemetry):
    sent = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "x-request-id": "quoted-by-a-customer"}
    answer = TestClient(app).get("/orders/7", headers=sent)
    server = telemetry.span("GET /orders/{number}")
    assert (server.context.trace_id, server.attributes["request_id"]) == (0x0AF7651916CD43DD8448EB211C80319C, "quoted-by-a-customer")
    assert answer.headers["x-request-id"] == "quoted-by-a-customer"

def test_what_is_current_in_the_test_goes_on(telemetry):
    with work("test", request_id="an-id-of-the-tests-own") as span:
        answer = TestClient(app).get("/orders/7")
    server = telemetry.span("GET /orders/{number}")
    assert server.parent.span_id == span.get_span_context().span_id
    assert answer.headers["x-request-id"] == "an-id-of-the-tests-own"

async def in_process():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.get("/orders/7")

def test_asgi_transport_is_a_client(telemetry):
    import anyio
    answer = anyio.run(in_process)
    assert kinds(telemetry) == [("CLIENT", "GET"), ("SERVER", "GET /orders/{number}"), ("CLIENT", "GET")]
    assert telemetry.span("GET /orders/{number}").parent.span_id == telemetry.spans[-1].context.span_id
"""
)

BAD = (
    APP
    + """
def test_no_such_span(telemetry):
    TestClient(app).get("/orders/7")
    telemetry.span("GET /nothing")  # here: a name that no span has

def test_what_a_handler_raised(telemetry):
    TestClient(app).get("/boom")  # passes through

def test_in_a_websocket(telemetry):
    with TestClient(app).websocket_connect("/ws") as socket:
        assert socket.receive_text() == "b"  # here: another text

def test_refused(telemetry):
    with TestClient(app).websocket_connect("/nothing"):
        pass

def test_a_transport(telemetry):
    def fails(request):
        raise httpx.ConnectError("down")
    httpx.Client(transport=httpx.MockTransport(fails)).get("http://stock/")
"""
)


def run_tests(source: str, directory: Path, *options: str) -> str:
    """
    Run an application's tests as a team does; return what pytest printed.
    """
    (directory / "test_orders.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", *options, "."]
    done = subprocess.run(
        command, cwd=directory, env=clean_environment(), capture_output=True, text=True, timeout=120, check=False
    )
    return done.stdout + done.stderr


def test_a_test_client_is_no_client(tmp_path: Path) -> None:
    """
    Starlette's test client makes no span and sends no header of ours; what a test sends, or makes current, goes on.
    """
    assert "7 passed" in (output := run_tests(GOOD, tmp_path)), output


@pytest.mark.parametrize("style", ["long", "short"])
def test_failures_point_at_the_test(style: str, tmp_path: Path) -> None:
    """
    The report of a test that failed names the test's line and the application's, and no file of ours.
    """
    output = run_tests(BAD, tmp_path, f"--tb={style}")
    assert "5 failed" in output
    assert "here: a name that no span has" in output
    assert "here: another text" in output
    assert 'raise ValueError("boom")' in output
    assert "otel_correlation/" not in output
    line = BAD.splitlines().index('    telemetry.span("GET /nothing")  # here: a name that no span has') + 1
    assert f"test_orders.py:{line}: " in output
