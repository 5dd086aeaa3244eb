"""
The edge behind real servers: pipelining, clients that go away, refusals on the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn
from fastapi import FastAPI, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse

from otel_correlation import identity
from otel_correlation.identity import log_ids
from tests.contract.wire import UUID, Wire, wired
from tests.integration.services import wait_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

DEADLINE_S = 20.0


@contextlib.contextmanager
def serving(app: Any, **options: Any) -> Iterator[int]:
    """
    Serve an application with uvicorn in a thread; give its port.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, lifespan="on", **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)
        listener.close()
    assert not thread.is_alive()


def read_responses(connection: socket.socket, count: int) -> list[tuple[dict[str, str], bytes]]:
    """
    Read so many responses with a Content-Length from one connection.
    """
    stream = connection.makefile("rb")
    found = []
    for _ in range(count):
        status = stream.readline().decode()
        headers = {":status": status.split()[1]}
        while line := stream.readline().decode().strip():
            name, _, value = line.partition(":")
            assert name.lower() not in headers or name.lower() == "set-cookie"
            headers[name.lower()] = value.strip()
        found.append((headers, stream.read(int(headers.get("content-length", 0)))))
    return found


@pytest.fixture
def wire() -> Iterator[Wire]:
    """
    A wired process.
    """
    with wired() as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("http", ["httptools", "h11"])
def test_pipelined_requests(wire: Wire, http: Any) -> None:
    """
    Requests pipelined on one connection are each their own: trace, request id, ids in lines, children.
    """
    app = FastAPI()
    release = threading.Event()

    @app.get("/slow/{number}")
    async def slow(number: int) -> list[str]:
        if number == 0:
            await asyncio.to_thread(release.wait, DEADLINE_S)
        return list(log_ids())

    with serving(app, http=http) as port, socket.create_connection(("127.0.0.1", port), DEADLINE_S) as connection:
        wanted = [f"GET /slow/{n} HTTP/1.1\r\nhost: x\r\nx-request-id: pipelined-request-{n}\r\n\r\n" for n in range(3)]
        no_id = "GET /slow/9 HTTP/1.1\r\nhost: x\r\n\r\n"
        connection.sendall("".join([*wanted, no_id]).encode())
        release.set()
        responses = read_responses(connection, 4)
    ids = [json.loads(body) for _, body in responses]
    assert [headers["x-request-id"] for headers, _ in responses] == [entry[3] for entry in ids]
    assert [entry[3] for entry in ids[:3]] == [f"pipelined-request-{n}" for n in range(3)]
    assert ids[3][3] == ids[3][0]
    assert len({entry[0] for entry in ids}) == 4
    wait_for(lambda: len(wire.servers) == 4)
    assert len(wire.spans) == 4
    assert all(span.parent is None for span in wire.spans)
    assert {span.name for span in wire.spans} == {"GET /slow/{number}"}


@pytest.mark.slow
@pytest.mark.parametrize("http", ["httptools", "h11"])
@pytest.mark.parametrize("status", [200, 404, 503])
@pytest.mark.parametrize("threaded", [False, True], ids=["async", "thread"])
def test_client_that_does_not_wait(wire: Wire, http: Any, status: int, threaded: bool) -> None:
    """
    A client that gave up before a handler answered is visible and is no 200; a failure of the server stays one.
    """
    app = FastAPI()
    gone = threading.Event()

    def waiting() -> JSONResponse:
        assert gone.wait(DEADLINE_S)
        return JSONResponse({}, status)

    async def waiting_async() -> JSONResponse:
        return await asyncio.to_thread(waiting)

    app.add_api_route("/report", waiting if threaded else waiting_async)

    @app.get("/release")
    async def release() -> None:
        gone.set()

    with serving(app, http=http) as port:
        with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as connection:
            connection.sendall(b"GET /report HTTP/1.1\r\nhost: x\r\n\r\n")
        # The server reads this connection after it has seen the end of the other one.
        with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as connection:
            connection.sendall(b"GET /release HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            while connection.recv(4096):
                pass
        wait_for(lambda: len(wire.servers) == 2)
    attributes = next(dict(span.attributes or {}) for span in wire.servers if span.name == "GET /report")
    released = next(dict(span.attributes or {}) for span in wire.servers if span.name == "GET /release")
    assert attributes["otel_correlation.client_disconnected"] is True
    assert attributes["error.type"] == ("503" if status == 503 else "client_disconnected")
    assert attributes.get("http.response.status_code") == (503 if status == 503 else None)
    assert "otel_correlation.client_disconnected" not in released
    assert released["http.response.status_code"] == 200


@pytest.mark.slow
@pytest.mark.parametrize("http", ["httptools", "h11"])
def test_client_that_goes_away(wire: Wire, http: Any) -> None:
    """
    A client that closes in the middle of a stream is visible and no exception; the status that it was sent stays.
    """
    app = FastAPI()

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            while True:
                yield b"x" * 1024
                await asyncio.sleep(0.001)

        return StreamingResponse(parts())

    with serving(app, http=http) as port:
        with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as connection:
            connection.sendall(b"GET /stream HTTP/1.1\r\nhost: x\r\nx-request-id: 42\r\n\r\n")
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(4096)
            assert head.lower().count(b"x-request-id: 42") == 1
        wait_for(lambda: wire.servers)
    attributes = wire.server.attributes or {}
    assert attributes["otel_correlation.client_disconnected"] is True
    assert "error.type" not in attributes
    assert attributes["http.response.status_code"] == 200
    assert wire.server.events == ()


class Keep(logging.Handler):
    """
    Keeps every record.
    """

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.mark.slow
@pytest.mark.parametrize("http", ["httptools", "h11"])
def test_servers_own_line_about_an_exception(wire: Wire, http: Any) -> None:
    """
    The server's line about an unhandled exception can name the request, although its context is gone by then.
    """
    app = FastAPI()

    @app.get("/boom")
    async def boom() -> None:
        raise ValueError("boom")

    keep = Keep()
    logger = logging.getLogger("uvicorn.error")
    logger.addHandler(keep)
    try:
        with serving(app, http=http) as port, socket.create_connection(("127.0.0.1", port), DEADLINE_S) as connection:
            connection.sendall(b"GET /boom HTTP/1.1\r\nhost: x\r\nx-request-id: 42\r\n\r\n")
            ((headers, _),) = read_responses(connection, 1)
            assert (headers[":status"], headers["x-request-id"]) == ("500", "42")
            wait_for(lambda: [record for record in keep.records if record.exc_info])
    finally:
        logger.removeHandler(keep)
    (line,) = [record for record in keep.records if record.exc_info]
    assert line.exc_info
    stashed = identity.stashed(line.exc_info[1])
    assert wire.server.context is not None
    assert stashed is not None
    assert (stashed[0], stashed[3]) == (f"{wire.server.context.trace_id:032x}", "42")
    assert len(wire.server.events) == 1


HANDSHAKE = (
    "GET {path} HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: Upgrade\r\nx-request-id: {id}\r\n"
    "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "status"), [("/refuse", "403"), ("/accept", "101"), ("/none", "403")])
def test_websocket_answers_carry_the_id(wire: Wire, path: str, status: str) -> None:
    """
    On the wire, too, an accepted and a refused handshake carry the request id.
    """
    app = FastAPI()

    @app.websocket("/refuse")
    async def refuse(websocket: WebSocket) -> None:
        await websocket.close(1008)

    @app.websocket("/accept")
    async def accept(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close(4001)

    with (
        serving(app, ws="websockets-sansio") as port,
        socket.create_connection(("127.0.0.1", port), DEADLINE_S) as connection,
    ):
        connection.sendall(HANDSHAKE.format(path=path, id=UUID).encode())
        ((headers, _),) = read_responses(connection, 1)
    assert (headers[":status"], headers["x-request-id"]) == (status, UUID)
    wait_for(lambda: len(wire.spans) == (2 if status == "101" else 1))
    assert (wire.server.attributes or {})["http.response.status_code"] == int(status)
    if status == "101":
        assert (wire.spans[1].attributes or {})["otel_correlation.websocket.close_code"] == 4001


@pytest.mark.slow
def test_a_refused_websocket_is_no_error_of_the_server(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    """
    A refusal by close() is no ERROR in the server's log, although a denial response carries it; as without us.
    """
    app = FastAPI()

    @app.websocket("/refuse")
    async def refuse(websocket: WebSocket) -> None:
        await websocket.close(1008)

    with (
        caplog.at_level(logging.INFO, "uvicorn.error"),
        serving(app, ws="websockets-sansio") as port,
        socket.create_connection(("127.0.0.1", port), DEADLINE_S) as connection,
    ):
        connection.sendall(HANDSHAKE.format(path="/refuse", id=UUID).encode())
        ((headers, _),) = read_responses(connection, 1)
    assert (headers[":status"], headers["x-request-id"]) == ("403", UUID)
    said = [record.getMessage() for record in caplog.records if record.name == "uvicorn.error"]
    assert "connection rejected (403 Forbidden)" in said
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
