"""
A download that its client leaves, on a real server: its end has nobody else's ids, whenever Python gets to it.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import httpx

from tests.integration.services import Service, clean_environment

if TYPE_CHECKING:
    from pathlib import Path

APP = """
import gc, logging

from fastapi import FastAPI
from fastapi.responses import StreamingResponse

app = FastAPI()
log = logging.getLogger("app")


def rows():
    try:
        while True:
            yield b"x" * 65536
    finally:
        log.warning("closed")


@app.get("/download")
def download() -> StreamingResponse:
    return StreamingResponse(rows())


@app.get("/other")
async def other() -> int:
    collected = gc.collect()
    log.warning("collected")
    return collected
"""


def test_a_download_that_was_left_ends_without_another_requests_ids(tmp_path: Path) -> None:
    """
    Collected inside another request, the ``finally`` of a left download logs no foreign ids; that request keeps its own.
    """
    (tmp_path / "main.py").write_text(APP)
    command = ("opentelemetry-instrument", "uvicorn", "main:app", "--port", "{port}")
    with Service(command, tmp_path, clean_environment(OTEL_TRACES_EXPORTER="none")) as service:
        with socket.create_connection(("127.0.0.1", service.port)) as client:
            client.sendall(b"GET /download HTTP/1.1\r\nHost: a\r\nX-Request-ID: left-by-its-client-01\r\n\r\n")
            assert client.recv(65536)
        service.wait_for_line(logger="otel_correlation.request", request_id="left-by-its-client-01")

        def closed_lines() -> list[dict[str, Any]]:
            # What anyio's worker did last may hold the generator a little longer.
            httpx.get(f"{service.url}/other", headers={"x-request-id": "another-request-0001"})
            return service.lines(message="closed")

        closed = service.wait_for(closed_lines)
        collected = service.wait_for(lambda: service.lines(message="collected"))
    assert [line.get("request_id") in (None, "left-by-its-client-01") for line in closed] == [True]
    assert {line["request_id"] for line in collected} == {"another-request-0001"}
