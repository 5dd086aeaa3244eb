"""
Contract point 8: WebSockets.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI, WebSocket, WebSocketDisconnect, WebSocketException
from opentelemetry.trace import SpanKind, StatusCode
from starlette.responses import JSONResponse
from starlette.testclient import TestClient

from otel_correlation import guard
from otel_correlation.edge._websocket import _waiting
from otel_correlation.identity import log_ids
from tests.contract.wire import PARENT, TRACE, UUID, open_socket, talk, websocket_scope

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from tests.contract.wire import Wire

TEXT = {"type": "websocket.receive", "text": "hi"}
SENT = [(b"x-request-id", UUID.encode())]


def leaving(code: int | None = 1000) -> dict[str, Any]:
    """
    Return the message of a client that leaves.
    """
    return {"type": "websocket.disconnect", "code": code}


def application(seen: list[Any] | None = None) -> FastAPI:
    """
    Return an application whose sockets end in every way.
    """
    app = FastAPI()

    @app.websocket("/echo/{room}")
    async def echo(websocket: WebSocket, room: str) -> None:
        await websocket.accept(headers=[(b"x-request-id", b"own")])
        while True:
            text = await websocket.receive_text()
            if seen is not None:
                seen.append(log_ids())
            if text == "boom":
                raise ValueError(text)
            if text.isdigit():
                await websocket.close(int(text))
                return
            await websocket.send_text(text)

    @app.websocket("/refuse")
    async def refuse(websocket: WebSocket) -> None:
        await websocket.close(1008)

    @app.websocket("/deny")
    async def deny(websocket: WebSocket) -> None:
        await websocket.send_denial_response(JSONResponse({}, status_code=429))

    @app.websocket("/raises")
    async def raises(websocket: WebSocket) -> None:
        raise ValueError("early")

    @app.websocket("/policy")
    async def policy(websocket: WebSocket) -> None:
        raise WebSocketException(4003)

    @app.websocket("/silent")
    async def silent(websocket: WebSocket) -> None:
        return

    @app.websocket("/waits")
    async def waits(websocket: WebSocket) -> None:
        await websocket.receive()
        await websocket.receive()

    return app


def handshake_and_close(wire: Wire) -> tuple[ReadableSpan, ReadableSpan]:
    """
    Return the two spans of a connection.
    """
    handshake, close = wire.spans
    assert (handshake.kind, close.kind) == (SpanKind.SERVER, SpanKind.INTERNAL)
    assert handshake.context is not None
    assert close.parent is not None
    assert close.parent.span_id == handshake.context.span_id
    return handshake, close


@pytest.mark.parametrize(
    ("messages", "code", "error"),
    [
        ([TEXT, leaving(1000)], 1000, None),
        ([TEXT, leaving(1001)], 1001, None),
        ([TEXT, leaving(None)], 1005, None),
        ([leaving(1006)], 1006, None),
        ([leaving(4001)], 4001, None),
        ([{"type": "websocket.receive", "text": "1008"}], 1008, None),
        ([{"type": "websocket.receive", "text": "4321"}], 4321, None),
        ([{"type": "websocket.receive", "text": "boom"}], 1006, "ValueError"),
    ],
)
def test_connection(wire: Wire, messages: list[Any], code: int, error: str | None) -> None:
    """
    The SERVER span ends at accept; a short span tells code and duration; only what the handler raises is an error.
    """
    reply = open_socket(application(), *messages, path="/echo/1", headers=[*SENT, (b"traceparent", PARENT)])
    handshake, close = handshake_and_close(wire)
    assert handshake.name == "GET /echo/{room}"
    assert handshake.context is not None
    assert f"{handshake.context.trace_id:032x}" == TRACE
    values = handshake.attributes or {}
    assert values["http.response.status_code"] == 101
    assert values["url.scheme"] == "ws"
    assert values["request_id"] == UUID
    assert handshake.status.status_code is StatusCode.UNSET
    assert handshake.end_time is not None
    assert close.start_time is not None
    assert handshake.end_time <= close.start_time
    assert close.name == "GET /echo/{room} close"
    closing = close.attributes or {}
    assert closing["otel_correlation.websocket.close_code"] == code
    assert isinstance(closing["otel_correlation.websocket.duration"], float)
    assert closing.get("error.type") == error
    assert close.status.status_code is (StatusCode.ERROR if error else StatusCode.UNSET)
    assert [event.name for event in close.events] == (["exception"] if error else [])
    assert reply.all("x-request-id") == [UUID]
    assert reply.messages[0]["type"] == "websocket.accept"


def test_context_stays_current(wire: Wire) -> None:
    """
    The handler's lines carry the handshake's ids for as long as it runs.
    """
    seen: list[Any] = []
    open_socket(application(seen), TEXT, TEXT, leaving(), path="/echo/1", headers=SENT)
    context = wire.server.context
    assert context is not None
    assert seen == [(f"{context.trace_id:032x}", f"{context.span_id:016x}", "01", UUID)] * 2


@pytest.mark.parametrize(
    ("path", "status", "error"),
    [
        ("/refuse", 403, None),
        ("/policy", 403, None),
        ("/deny", 429, None),
        ("/nowhere", 403, None),
        ("/raises", 500, "ValueError"),
        ("/silent", 500, "500"),
    ],
)
@pytest.mark.parametrize("denial", [True, False])
def test_refused(wire: Wire, path: str, status: int, error: str | None, denial: bool) -> None:
    """
    A refused handshake is one span with its status; where the server can, the refusal carries the request id.
    """
    reply = open_socket(application(), path=path, headers=SENT, denial=denial)
    (span,) = wire.spans
    if path == "/deny" and not denial:
        return  # Starlette refuses to deny without the extension
    assert (span.attributes or {})["http.response.status_code"] == status
    assert (span.attributes or {}).get("error.type") == error
    assert span.status.status_code is (StatusCode.ERROR if error else StatusCode.UNSET)
    kinds = [message["type"] for message in reply.messages]
    if error:
        assert kinds == []
    elif denial:
        assert kinds == ["websocket.http.response.start", "websocket.http.response.body"]
        assert (reply.status, reply.all("x-request-id")) == (status, [UUID])
    else:
        assert kinds == ["websocket.close"]


def test_disconnect_before_accept(wire: Wire) -> None:
    """
    A client that goes away before the answer is visible and no error of the application.
    """
    open_socket(application(), leaving(1001), path="/waits")
    (span,) = wire.spans
    assert (span.attributes or {})["otel_correlation.client_disconnected"] is True
    assert "http.response.status_code" not in (span.attributes or {})
    assert span.events == ()


def test_test_client_keeps_the_close_code(wire: Wire) -> None:
    """
    An application's own tests find the close code of a refusal, as without us.
    """
    with pytest.raises(WebSocketDisconnect) as caught, TestClient(application()).websocket_connect("/refuse"):
        raise AssertionError
    assert caught.value.code == 1008


def test_no_event_loop_of_asyncio() -> None:
    """
    Under another kind of event loop nothing is looked for, and nothing fails.
    """
    assert _waiting() is None


def waiting(seen: list[Any]) -> FastAPI:
    """
    Return an application that waits for messages with a time limit.
    """
    app = FastAPI()

    @app.websocket("/ws")
    async def handle(websocket: WebSocket) -> None:
        await websocket.accept()
        handshake = log_ids()
        while True:
            try:
                text = await asyncio.wait_for(websocket.receive_text(), 60)
            except WebSocketDisconnect:
                break
            seen.append(log_ids())
            if text == "aside":
                # Still the message's: the limit of something else changes nothing.
                await asyncio.wait_for(asyncio.sleep(0), 60)
                seen.append(log_ids())
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(asyncio.Event().wait(), 0.001)
                seen.append(log_ids())
            if text == "last":
                return
        seen.append(log_ids())
        assert log_ids() == handshake

    return app


@pytest.mark.parametrize("end", [leaving(), {"type": "websocket.receive", "text": "last"}])
def test_message_mode_with_a_time_limit(wire: Wire, end: dict[str, Any]) -> None:
    """
    A message that ``asyncio.wait_for`` received, which before Python 3.12 is in another task, is current in the handler.
    """
    wire.configure(websocket="message")
    seen: list[Any] = []
    aside = {"type": "websocket.receive", "text": "aside"}
    open_socket(waiting(seen), aside, TEXT, end)
    handshake, *messages, _ = wire.spans
    expected = [messages[0]] * 3 + [messages[1]]
    expected.append(handshake if end["type"] == "websocket.disconnect" else messages[2])
    contexts = [span.context for span in expected if span.context is not None]
    assert [(entry[0], entry[1]) for entry in seen] == [
        (f"{context.trace_id:032x}", f"{context.span_id:016x}") for context in contexts
    ]
    assert "context.detach_failed" not in guard.counters()


def test_message_mode(wire: Wire) -> None:
    """
    The switch gives every received message its own trace, linked to the handshake, with ids of its own in the handler.
    """
    wire.configure(websocket="message")
    seen: list[Any] = []
    boom = {"type": "websocket.receive", "text": "boom"}
    open_socket(application(seen), TEXT, TEXT, boom, path="/echo/1", headers=SENT)
    handshake, *messages, close = wire.spans
    assert [span.name for span in messages] == ["GET /echo/{room} message"] * 3
    contexts = [span.context for span in messages if span.context is not None]
    assert handshake.context is not None
    assert len({handshake.context.trace_id, *(context.trace_id for context in contexts)}) == 4
    for span in messages:
        assert span.parent is None
        assert [link.context.span_id for link in span.links] == [handshake.context.span_id]
        assert (span.attributes or {})["request_id"] == UUID
    assert [ids[:2] for ids in seen] == [
        (f"{context.trace_id:032x}", f"{context.span_id:016x}") for context in contexts
    ]
    assert [event.name for event in messages[2].events] == ["exception"]
    assert close.events == ()
    assert (close.attributes or {})["otel_correlation.websocket.close_code"] == 1006


def test_concurrent_sockets(wire: Wire) -> None:
    """
    Sockets that are open at once keep apart.
    """
    seen: list[Any] = []
    app = application(seen)

    async def run() -> None:
        scopes = [websocket_scope("/echo/1", [(b"x-request-id", f"socket-number-{n:06}".encode())]) for n in range(30)]
        await asyncio.gather(*(talk(app, scope, [TEXT, leaving()]) for scope in scopes))

    asyncio.run(run())
    assert sorted(ids[3] for ids in seen) == [f"socket-number-{n:06}" for n in range(30)]
    assert len({ids[0] for ids in seen}) == 30


async def to_a_vanished_client(app: FastAPI, path: str) -> None:
    """
    Hold a connection whose client is gone without a word: every ``send`` after the handshake raises.
    """
    scope = websocket_scope(path)
    waiting = [{"type": "websocket.connect"}, TEXT]

    async def receive() -> Any:
        if waiting:
            return waiting.pop(0)
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "websocket.send":
            raise OSError("the client is gone")

    await app(scope, receive, send)


@pytest.mark.parametrize("whose", ["own", "other", "farewell"])
def test_a_vanished_client_is_the_failure_of_who_did_not_expect_it(wire: Wire, whose: str) -> None:
    """
    The end of its own connection is no failure of a handler; that of another, to which it sent, is what ended it.
    """
    app = FastAPI()
    joined: asyncio.Queue[WebSocket] = asyncio.Queue()

    @app.websocket("/own")
    async def own(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())

    @app.websocket("/waits")
    async def waits(websocket: WebSocket) -> None:
        await websocket.accept()
        await joined.put(websocket)
        await asyncio.Event().wait()

    @app.websocket("/other")
    async def broadcasts(websocket: WebSocket) -> None:
        await websocket.accept()
        await (await joined.get()).send_text(await websocket.receive_text())

    @app.websocket("/farewell")
    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()
        other = await joined.get()
        try:
            await websocket.send_text(await websocket.receive_text())
        except WebSocketDisconnect:
            await other.send_text("left")

    async def run() -> None:
        waiter = asyncio.create_task(to_a_vanished_client(app, "/waits"))
        with pytest.raises(WebSocketDisconnect):
            await to_a_vanished_client(app, f"/{whose}")
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)

    asyncio.run(run())
    (close,) = [span for span in wire.spans if span.name == f"GET /{whose} close"]
    assert [event.name for event in close.events] == ([] if whose == "own" else ["exception"])
    assert close.status.status_code is (StatusCode.UNSET if whose == "own" else StatusCode.ERROR)
    assert (close.attributes or {})["otel_correlation.websocket.close_code"] == 1006


def test_disabled_sdk_has_no_socket_spans(wire: Wire) -> None:
    """
    Without the SDK a socket works and carries its request id.
    """
    wire.configure(sdk_disabled=True, websocket="message")
    reply = open_socket(application(), TEXT, leaving(), path="/echo/1", headers=SENT)
    assert reply.all("x-request-id") == [UUID]
    assert wire.spans == []
