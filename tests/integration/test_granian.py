"""
The real Granian: ids on its lines, peers as it shows them, spans that survive its stop.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import BIN, DEADLINE_S, Service, clean_environment

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("granian")
pytestmark = pytest.mark.slow

APP = """
import logging
import os

from fastapi import FastAPI, WebSocket

log = logging.getLogger("shop")
app = FastAPI()


@app.get("/items/{item_id}")
async def item(item_id: int) -> dict[str, int]:
    log.info("looking up %s", item_id)
    return {"pid": os.getpid()}


@app.get("/boom")
async def boom() -> None:
    raise ValueError("boom")


@app.websocket("/ws")
async def ws(socket: WebSocket) -> None:
    await socket.accept()
    log.info("accepted")
    await socket.close()
"""
BOOT = """
import otel_correlation

otel_correlation.bootstrap()
"""
BASIC = """
logging.basicConfig(level="INFO", format="THEIRS %(message)s")
"""
GRANIAN = ("granian", "--interface", "asgi", "--port", "{port}", "--access-log", "main:app")
ZERO = ("opentelemetry-instrument", *GRANIAN)


def start(source: str, command: tuple[str, ...], directory: Path, sink: OtlpSink | None = None, **more: str) -> Service:
    (directory / "main.py").write_text(source)
    exporter = {"OTEL_TRACES_EXPORTER": "none"} if sink is None else {"OTEL_EXPORTER_OTLP_ENDPOINT": sink.endpoint}
    return Service(command, directory, clean_environment(OTEL_SERVICE_NAME="shop", **exporter, **more))


def ask(service: Service) -> None:
    httpx.get(service.url + "/items/3", headers={"X-Request-ID": "order-7"})
    httpx.get(service.url + "/boom", headers={"X-Request-ID": "order-8"})


def parsed(text: str) -> list[dict[str, Any]]:
    """
    Return the lines that are JSON: those of the process that only starts others are Granian's own.
    """
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    ("source", "command"),
    [(APP, ZERO), (APP, (*ZERO, "--workers", "2")), (BOOT + APP, GRANIAN)],
    ids=["zero-code", "two workers", "bootstrap"],
)
def test_every_line_of_a_request_has_its_ids(source: str, command: tuple[str, ...], tmp_path: Path) -> None:
    """
    The application's lines, Granian's access lines and its traceback have the ids of their request, and all spans arrive.
    """
    with OtlpSink() as sink:
        with start(source, command, tmp_path, sink) as service:
            ask(service)
            assert service.stop() == 0
        spans = [span for span in sink.spans if span.attributes.get("request_id") in ("order-7", "order-8")]
    lines = parsed(service.stdout())
    trace_ids = {span.attributes["request_id"]: span.trace_id for span in spans}
    assert set(trace_ids) == {"order-7", "order-8"}
    of = {
        request_id: sorted(line["logger"] for line in lines if line.get("request_id") == request_id)
        for request_id in trace_ids
    }
    assert of == {
        "order-7": ["granian.access", "otel_correlation.request", "shop"],
        "order-8": ["_granian.utils", "granian.access", "otel_correlation.request"],
    }
    assert all(line["trace_id"] == trace_ids[line["request_id"]] for line in lines if line.get("request_id") in of)
    for span in spans:
        for name in ("client.port", "server.port"):
            assert type(span.attributes[name]) is int
        assert span.attributes["client.address"] == "127.0.0.1"
    # What runs without a request has none.
    assert all("request_id" not in line for line in lines if line["logger"] == "_granian.serve")


def test_the_next_request_of_a_connection_has_its_own_ids(tmp_path: Path) -> None:
    """
    The access lines of one connection's requests never show the ids of another one.
    """
    with start(APP, ZERO, tmp_path) as service:
        with httpx.Client(base_url=service.url) as client:
            for number in range(50):
                client.get(f"/items/{number}", headers={"X-Request-ID": f"order-{number}"})
            client.get("/nowhere")
        service.stop()
    lines = [line for line in parsed(service.stdout()) if line["logger"] == "granian.access"]
    seen = [line["request_id"] for line in lines if "/items/" in line["message"]]
    assert seen == [f"order-{number}" for number in range(50)]
    assert all(f"/items/{line['request_id'][6:]} " in line["message"] for line in lines if "/items/" in line["message"])
    assert all(line["request_id"] == line["trace_id"] for line in lines if "/items/" not in line["message"])


def test_a_unix_socket(tmp_path: Path) -> None:
    """
    On a Unix socket no peer is made up, the request is served, and ``unix`` trusts it; other networks do not.
    """
    path = tmp_path / "g.sock"
    command = ("opentelemetry-instrument", "granian", "--interface", "asgi", "--uds", str(path), "main:app")
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    for networks, trusted in (("unix", True), ("10.0.0.0/8", False)):
        (tmp_path / "main.py").write_text(APP)
        with OtlpSink() as sink:
            environment = clean_environment(
                OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint, OTEL_CORRELATION_TRUSTED_NETWORKS=networks
            )
            with Service(command, tmp_path, environment, ready=None) as service:
                wait_for(service, path)
                with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
                    reply = client.get("http://shop/items/3", headers={"traceparent": traceparent})
                assert reply.status_code == 200
                assert service.stop() == 0
            (span,) = [span for span in sink.spans if span.attributes.get("url.path") == "/items/3"]
        assert "client.address" not in span.attributes
        assert "client.port" not in span.attributes
        assert (span.trace_id == "0af7651916cd43dd8448eb211c80319c") is trusted


def wait_for(service: Service, path: Path) -> None:
    """
    Wait until somebody listens on the socket; a request that comes early waits there for its worker.
    """
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        assert service.process.poll() is None, service.output()
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(str(path))
            return
        time.sleep(0.05)
    raise AssertionError(service.output())


PROXIED = (
    APP
    + """
from granian.utils.proxies import wrap_asgi_with_proxy_headers

app = wrap_asgi_with_proxy_headers(app, trusted_hosts="*")
"""
)


def test_an_address_from_a_header_is_not_the_sockets(tmp_path: Path) -> None:
    """
    Behind Granian's own proxy wrapper a caller that writes a trusted address into a header is not trusted.
    """
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with OtlpSink() as sink:
        with start(PROXIED, ZERO, tmp_path, sink, OTEL_CORRELATION_TRUSTED_NETWORKS="10.0.0.0/8") as service:
            headers = {"traceparent": traceparent, "x-forwarded-for": "10.1.2.3"}
            assert httpx.get(service.url + "/items/3", headers=headers).status_code == 200
            service.stop()
        (span,) = [span for span in sink.spans if span.attributes.get("url.path") == "/items/3"]
    assert span.attributes["client.address"] == "10.1.2.3"
    assert span.trace_id != "0af7651916cd43dd8448eb211c80319c"


def test_a_websocket(tmp_path: Path) -> None:
    """
    A WebSocket is served, and the application's lines have its ids.
    """
    with start(APP, ZERO, tmp_path) as service:
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.sendall(
                b"GET /ws HTTP/1.1\r\nHost: shop\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\nX-Request-ID: order-9\r\n\r\n"
            )
            head = connection.recv(4096)
        service.stop()
    assert head.startswith(b"HTTP/1.1 101")
    (line,) = [line for line in parsed(service.stdout()) if line["logger"] == "shop"]
    assert line["request_id"] == "order-9"


def test_a_log_config_and_what_is_said_without_it(tmp_path: Path) -> None:
    """
    Beside ``basicConfig()`` Granian's lines have no ids, which is said; with the printed ``--log-config`` they have them.
    """
    with start(APP + BASIC, ZERO, tmp_path) as service:
        ask(service)
        service.stop()
    assert "THEIRS granian's lines go out without ids, because " in service.output()
    command = [str(BIN / "otel-correlation"), "log-config", "json"]
    (tmp_path / "log-config.json").write_text(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )
    with start(APP + BASIC, (*ZERO, "--log-config", "log-config.json"), tmp_path) as service:
        ask(service)
        service.stop()
    assert "go out without ids" not in service.output()
    lines = parsed(service.stdout())
    assert {line["logger"] for line in lines if line.get("request_id") == "order-7"} == {"shop", "granian.access"}
    assert {line["logger"] for line in lines if line.get("request_id") == "order-8"} == {
        "_granian.utils",
        "granian.access",
    }
