"""
One hostile header on a real server: the request is answered, the next one too, and the server can still be stopped.
"""

from __future__ import annotations

import socket
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from tests.integration.services import DEADLINE_S, Service, clean_environment

if TYPE_CHECKING:
    from pathlib import Path

APP = """
from fastapi import FastAPI, WebSocket
from opentelemetry.propagate import extract
from otel_correlation import continue_from

app = FastAPI()

@app.get("/")
@app.get("/health")
async def answer():
    return {}

@app.post("/consume")
async def consume(message: dict[str, str]):
    with continue_from(message):
        return {}

@app.websocket("/ws")
async def chat(websocket: WebSocket):
    await websocket.accept()
    await websocket.close()
"""

# 164 bytes: each property doubled the time of a pattern with two adjacent runs of whitespace.
PROPERTIES = "a=b" + ";p= " * 40 + '"'
# And this one was quadratic.
SPACES = "a=" + " " * 16_000 + '"'

UPGRADE = (
    "GET /ws HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nbaggage: {value}\r\n\r\n"
)
REQUEST = "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nbaggage: {value}\r\n\r\n"


def first_line(port: int, text: str) -> str:
    """
    Send one request as it is; return the response's first line.
    """
    with closing(socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)) as connection:
        connection.sendall(text.encode("latin-1"))
        return connection.makefile("rb").readline().decode().strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [{}, {"OTEL_CORRELATION_EDGE": "public"}, {"OTEL_TRACES_SAMPLER_ARG": "0"}],
    ids=["open", "public", "ratio-0"],
)
def test_one_header_stops_no_worker(tmp_path: Path, variables: dict[str, str]) -> None:
    """
    On routes, excluded routes, WebSockets and in ``continue_from``: a hostile baggage is answered, and SIGTERM heard.
    """
    (tmp_path / "main.py").write_text(APP)
    environment = clean_environment(
        OTEL_TRACES_EXPORTER="none", OTEL_PYTHON_FASTAPI_EXCLUDED_URLS="health", **variables
    )
    command = ["opentelemetry-instrument", "uvicorn", "main:app", "--port", "{port}"]
    with Service(command, tmp_path, environment) as service:
        for value in (PROPERTIES, SPACES):
            for path in ("/", "/health", "/nowhere"):
                status = 404 if path == "/nowhere" else 200
                assert f" {status} " in first_line(service.port, REQUEST.format(path=path, value=value))
            body = f'{{"baggage": "{value[:-1]}\\""}}'
            message = (
                f"POST /consume HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\n\r\n{body}"
            )
            assert " 200 " in first_line(service.port, message)
        # Not with the spaces: websockets itself refuses a header line of more than 8 kB.
        assert " 101 " in first_line(service.port, UPGRADE.format(value=PROPERTIES))
        assert service.stop() == -15
