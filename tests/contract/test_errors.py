"""
Errors and exceptions, each exactly once, wherever in the request they happen.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from opentelemetry import trace
from opentelemetry.trace import StatusCode
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from otel_correlation import identity
from tests.contract.wire import call, exchange, http_scope

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.contract.wire import Wire


class OutOfStockError(Exception):
    """
    Somebody's own exception.
    """


async def fail() -> None:
    """
    Raise.
    """
    raise OutOfStockError("seven left")


async def passthrough(request: Any, call_next: Any) -> Any:
    """
    Forward, as a BaseHTTPMiddleware does.
    """
    return await call_next(request)


async def raising(request: Any, call_next: Any) -> Any:
    """
    Raise in the middleware itself.
    """
    raise OutOfStockError("middleware")


async def ok() -> dict[str, str]:
    """
    Answer.
    """
    return {}


async def in_endpoint(request: Request) -> None:
    """
    Raise below a plain route.
    """
    raise OutOfStockError("endpoint")


async def mid_stream() -> StreamingResponse:
    """
    Raise when half of the body was sent.
    """

    async def parts() -> AsyncIterator[str]:
        yield "a"
        raise OutOfStockError("stream")

    return StreamingResponse(parts())


async def in_background(tasks: BackgroundTasks) -> dict[str, str]:
    """
    Raise after the response.
    """
    tasks.add_task(fail)
    return {}


def build(where: str) -> FastAPI:
    """
    Return an application that fails at one place.
    """
    app = FastAPI()
    if where == "handler":
        app.add_api_route("/x", fail)
    elif where == "dependency":
        app.add_api_route("/x", ok, dependencies=[Depends(fail)])
    elif where == "middleware":
        app.add_api_route("/x", ok)
        app.add_middleware(BaseHTTPMiddleware, dispatch=raising)
    elif where == "stream":
        app.add_api_route("/x", mid_stream)
    elif where == "background":
        app.add_api_route("/x", in_background)
    elif where == "fastapi":
        sub = FastAPI()
        sub.add_api_route("/x", fail)
        app.mount("/sub", sub)
    elif where == "starlette":
        app.mount("/sub", Starlette(routes=[Route("/x", in_endpoint)]))
    elif where == "handled":
        app.add_api_route("/x", fail)

        @app.exception_handler(Exception)
        async def handler(request: Any, error: Exception) -> JSONResponse:
            return JSONResponse({"handled": True}, status_code=503)

    return app


PLACES = {
    "handler": 500,
    "dependency": 500,
    "middleware": 500,
    "stream": 200,
    "background": 200,
    "fastapi": 500,
    "starlette": 500,
    "handled": 503,
}


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("where", PLACES)
def test_exception_is_recorded_once(wire: Wire, where: str, behind: bool) -> None:
    """
    Whatever raises, and behind whatever middleware: one exception event, ERROR, the type, the status that was sent.
    """
    app = build(where)
    if behind:
        app.add_middleware(BaseHTTPMiddleware, dispatch=passthrough)
    reply = call(app, path="/sub/x" if where in ("fastapi", "starlette") else "/x")
    assert isinstance(reply.error, OutOfStockError)
    span = wire.server
    assert span.attributes is not None
    assert [event.name for event in span.events] == ["exception"]
    attributes = span.events[0].attributes
    assert attributes is not None
    assert attributes["exception.type"] == f"{__name__}.OutOfStockError"
    assert "in " in str(attributes["exception.stacktrace"])
    assert span.attributes["error.type"] == f"{__name__}.OutOfStockError"
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description is None
    assert span.attributes["http.response.status_code"] == PLACES[where] == reply.status
    assert len(wire.spans) == 1


def test_ids_travel_on_the_exception(wire: Wire) -> None:
    """
    A line that the server logs after the request, with the exception, can name the request.
    """
    reply = call(build("handler"), path="/x", headers=[(b"x-request-id", b"42")])
    found = identity.stashed(reply.error)
    context = wire.server.context
    assert context is not None
    assert found == (f"{context.trace_id:032x}", f"{context.span_id:016x}", "03", "42")


def test_handled_http_exception(wire: Wire) -> None:
    """
    An ``HTTPException(500)`` is an answer: ERROR with the status as its type, and no exception event.
    """
    app = FastAPI()

    @app.get("/x")
    async def x() -> None:
        raise HTTPException(500)

    call(app, path="/x")
    span = wire.server
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "500"
    assert span.events == ()


def test_exception_that_user_code_recorded(wire: Wire) -> None:
    """
    What user code records on the span stays, and a client error is none of ours.
    """
    app = FastAPI()

    @app.get("/x")
    async def x() -> None:
        trace.get_current_span().record_exception(ValueError("seen"))
        raise HTTPException(409)

    call(app, path="/x")
    assert [event.name for event in wire.server.events] == ["exception"]
    assert wire.server.status.status_code is StatusCode.UNSET
    assert "error.type" not in (wire.server.attributes or {})


def test_base_exception_passes(wire: Wire) -> None:
    """
    Cancellation passes through, is visible, and has no traceback.
    """
    app = FastAPI()

    @app.get("/x")
    async def x() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        call(app, path="/x")
    assert (wire.server.attributes or {})["error.type"] == "CancelledError"
    assert wire.server.events == ()


async def disconnecting(app: Any, after: int) -> None:
    """
    Request ``/x`` as a client that goes away after ``after`` body messages.
    """
    gone = asyncio.Event()
    seen = 0
    if not after:
        gone.set()

    async def receive() -> Any:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal seen
        if message["type"] == "http.response.body":
            seen += 1
            if seen >= after:
                gone.set()

    await app(http_scope("POST", "/x"), receive, send)


async def endless() -> StreamingResponse:
    """
    Stream until somebody stops it.
    """

    async def parts() -> AsyncIterator[str]:
        while True:
            yield "a"
            await asyncio.sleep(0)

    return StreamingResponse(parts())


async def reads_body(request: Request) -> dict[str, int]:
    """
    Wait for a body that never comes.
    """
    return {"size": len(await request.body())}


async def polls(request: Request) -> dict[str, bool]:
    """
    Ask whether the client is still there, and answer nobody.
    """
    return {"gone": await request.is_disconnected()}


@pytest.mark.parametrize("endpoint", [endless, reads_body, polls])
def test_client_disconnect(wire: Wire, endpoint: Callable[..., Any]) -> None:
    """
    A client that went away is visible, is no 200, and is nobody's exception.
    """
    app = FastAPI()
    app.add_api_route("/x", endpoint, methods=["POST"])

    async def run() -> None:
        with contextlib.suppress(ClientDisconnect):
            await disconnecting(app, 1 if endpoint is endless else 0)

    asyncio.run(run())
    attributes = wire.server.attributes or {}
    assert attributes["otel_correlation.client_disconnected"] is True
    assert attributes["error.type"] == "client_disconnected"
    assert "http.response.status_code" not in attributes
    assert wire.server.events == ()


def test_finished_response_is_no_disconnect(wire: Wire) -> None:
    """
    A client that goes away after the last byte was served.
    """
    app = FastAPI()
    order: list[str] = []

    @app.get("/x")
    async def x(tasks: BackgroundTasks, request: Request) -> dict[str, str]:
        async def later() -> None:
            order.extend([(await request.receive())["type"], (await request.receive())["type"]])

        tasks.add_task(later)
        return {}

    asyncio.run(exchange(app, http_scope("GET", "/x")))
    assert order == ["http.request", "http.disconnect"]
    assert "otel_correlation.client_disconnected" not in (wire.server.attributes or {})
    assert (wire.server.attributes or {})["http.response.status_code"] == 200
