"""
Errors and exceptions, each exactly once, wherever in the request they happen.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import weakref
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from opentelemetry import trace
from opentelemetry.trace import StatusCode
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from otel_correlation import identity
from tests.contract.wire import call, exchange, http_scope

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

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


async def sync_mid_stream() -> StreamingResponse:
    """
    Raise in a generator that runs in a thread.
    """

    def parts() -> Iterator[str]:
        yield "a"
        raise OutOfStockError("stream")

    return StreamingResponse(parts())


async def with_background() -> JSONResponse:
    """
    Raise in the task of a response.
    """
    return JSONResponse({}, background=BackgroundTask(fail))


async def before_yield() -> AsyncIterator[None]:
    """
    Raise while the dependency is set up.
    """
    await fail()
    yield


async def after_yield() -> AsyncIterator[None]:
    """
    Raise while the dependency is cleaned up.
    """
    yield
    await fail()


def in_thread() -> None:
    """
    Raise in an endpoint that runs in a thread.
    """
    raise OutOfStockError("thread")


async def late_http_exception() -> StreamingResponse:
    """
    Raise what has a handler when the response has begun.
    """

    async def parts() -> AsyncIterator[str]:
        yield "a"
        raise HTTPException(404)

    return StreamingResponse(parts())


def build(where: str) -> FastAPI:
    """
    Return an application that fails at one place.
    """
    app = FastAPI()
    if where == "handler":
        app.add_api_route("/x", fail)
    elif where == "dependency":
        app.add_api_route("/x", ok, dependencies=[Depends(fail)])
    elif where == "before yield":
        app.add_api_route("/x", ok, dependencies=[Depends(before_yield)])
    elif where == "after yield":
        app.add_api_route("/x", ok, dependencies=[Depends(after_yield)])
    elif where == "thread":
        app.add_api_route("/x", in_thread)
    elif where == "sync stream":
        app.add_api_route("/x", sync_mid_stream)
    elif where == "background=":
        app.add_api_route("/x", with_background)
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
    "thread": 500,
    "dependency": 500,
    "before yield": 500,
    "after yield": 200,
    "sync stream": 200,
    "background=": 200,
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


class BrokenError(Exception):
    """
    An exception that the application has a handler for.
    """


async def breaks() -> None:
    """
    Raise what is handled.
    """
    raise BrokenError("disk full")


async def answers_instead() -> None:
    """
    Answer with a status in place of an exception, as an endpoint that waited for a connection does.
    """
    try:
        await breaks()
    except BrokenError as error:
        raise HTTPException(503, "try again") from error


def handled_app(endpoint: Callable[..., Any], status: int, *, behind: bool) -> FastAPI:
    """
    Return an application that answers ``BrokenError`` with a status of its choice.
    """
    app = FastAPI()
    app.add_api_route("/x", endpoint)

    @app.exception_handler(BrokenError)
    def handler(_request: Any, _error: Any) -> JSONResponse:
        return JSONResponse({}, status_code=status)

    if behind:
        app.add_middleware(BaseHTTPMiddleware, dispatch=passthrough)
    return app


@pytest.mark.parametrize("behind", [False, True])
def test_exception_behind_a_handled_5xx_is_recorded_once(wire: Wire, behind: bool) -> None:
    """
    A handler for a class of exceptions that answers 503: the on-call finds the exception, with its traceback, once.
    """
    reply = call(handled_app(breaks, 503, behind=behind), path="/x")
    assert (reply.status, reply.error) == (503, None)
    span = wire.server
    (event,) = span.events
    assert (event.attributes or {})["exception.message"] == "disk full"
    assert "in breaks" in str((event.attributes or {})["exception.stacktrace"])
    assert (span.attributes or {})["error.type"] == f"{__name__}.BrokenError"
    assert (span.attributes or {})["http.response.status_code"] == 503
    assert span.status.status_code is StatusCode.ERROR


def test_handled_4xx_is_no_error(wire: Wire) -> None:
    """
    The same handler that answers 409: the client's error, and no exception on the span.
    """
    call(handled_app(breaks, 409, behind=False), path="/x")
    assert wire.server.events == ()
    assert wire.server.status.status_code is StatusCode.UNSET
    assert "error.type" not in (wire.server.attributes or {})


def test_http_exception_in_place_of_another(wire: Wire) -> None:
    """
    ``raise HTTPException(503) from error``: the status is the type, and the traceback tells of what was behind it.
    """
    call(handled_app(answers_instead, 503, behind=False), path="/x")
    span = wire.server
    assert (span.attributes or {})["error.type"] == "503"
    (event,) = span.events
    attributes = event.attributes or {}
    assert attributes["exception.type"] == "fastapi.exceptions.HTTPException"
    assert "BrokenError: disk full" in str(attributes["exception.stacktrace"])


def test_exception_that_middleware_answers(wire: Wire) -> None:
    """
    Middleware that turns every exception into a 500 of its own does not hide which one it was.
    """
    app = FastAPI()
    app.add_api_route("/x", fail)

    async def catching(request: Any, call_next: Any) -> Any:
        try:
            return await call_next(request)
        except OutOfStockError:
            return JSONResponse({}, status_code=500)

    app.add_middleware(BaseHTTPMiddleware, dispatch=catching)
    reply = call(app, path="/x")
    assert (reply.status, reply.error) == (500, None)
    assert [event.name for event in wire.server.events] == ["exception"]
    assert (wire.server.attributes or {})["error.type"] == f"{__name__}.OutOfStockError"


def test_an_answer_is_not_the_next_requests(wire: Wire) -> None:
    """
    What one request's handler answered is forgotten with the request.
    """
    app = handled_app(breaks, 503, behind=False)

    @app.get("/teapot")
    async def teapot() -> JSONResponse:
        return JSONResponse({}, status_code=500)

    call(app, path="/x")
    call(app, path="/teapot")
    assert wire.servers[1].events == ()
    assert (wire.servers[1].attributes or {})["error.type"] == "500"


def test_http_exception_when_the_response_has_begun(wire: Wire) -> None:
    """
    An ``HTTPException`` that comes too late is an error of the server, recorded once, with the exception behind it.
    """
    app = FastAPI()
    app.add_api_route("/x", late_http_exception)
    call(app, path="/x")
    (event,) = wire.server.events
    assert (event.attributes or {})["exception.type"] == "RuntimeError"
    assert "HTTPException: 404" in str((event.attributes or {})["exception.stacktrace"])
    assert (wire.server.attributes or {})["error.type"] == "RuntimeError"


async def in_task_group() -> None:
    """
    Raise in two tasks of a group.
    """
    async with asyncio.TaskGroup() as group:
        group.create_task(fail())
        group.create_task(breaks())


async def in_anyio_group() -> None:
    """
    The same with anyio.
    """
    async with anyio.create_task_group() as group:
        group.start_soon(fail)
        group.start_soon(breaks)


async def base_group() -> None:
    """
    Raise a group that is no ``Exception``.
    """
    raise BaseExceptionGroup("both", [OutOfStockError("seven left"), SystemExit(3), BrokenError("disk full")])


class OddGroupError(ExceptionGroup[Exception]):
    """
    A group that cannot be split.
    """

    def derive(self, excs: Any) -> Any:
        """
        Fail.
        """
        raise OutOfStockError("cannot derive")


def test_a_group_that_cannot_be_split_is_recorded(wire: Wire) -> None:
    """
    Whatever a group's class does when it is split, the request has its span and its error.
    """
    app = FastAPI()

    @app.get("/x")
    async def x() -> None:
        raise OddGroupError("odd", [BrokenError("disk full"), ClientDisconnect()])

    call(app, path="/x")
    assert (wire.server.attributes or {})["error.type"] == f"{__name__}.OddGroupError"


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("endpoint", [in_task_group, in_anyio_group, base_group])
def test_exception_group_is_recorded_once(wire: Wire, endpoint: Callable[..., Any], behind: bool) -> None:
    """
    A group is one exception: its type, and a traceback with each of its members.
    """
    app = FastAPI()
    app.add_api_route("/x", endpoint)
    if behind:
        app.add_middleware(BaseHTTPMiddleware, dispatch=passthrough)
    with contextlib.suppress(BaseExceptionGroup):
        call(app, path="/x")
    span = wire.server
    (event,) = span.events
    attributes = event.attributes or {}
    assert attributes["exception.type"] == ("BaseExceptionGroup" if endpoint is base_group else "ExceptionGroup")
    assert "sub-exception" in str(attributes["exception.message"])
    assert "OutOfStockError: seven left" in str(attributes["exception.stacktrace"])
    assert "BrokenError: disk full" in str(attributes["exception.stacktrace"])
    assert (span.attributes or {})["error.type"] == attributes["exception.type"]
    assert span.status.status_code is StatusCode.ERROR


def test_system_exit_in_a_handler(wire: Wire) -> None:
    """
    ``sys.exit()`` in a handler is somebody's bug: recorded with its traceback; it passes through.
    """
    app = FastAPI()

    @app.get("/x")
    async def x() -> None:
        sys.exit(3)

    with pytest.raises(SystemExit):
        call(app, path="/x")
    assert [event.name for event in wire.server.events] == ["exception"]
    assert (wire.server.attributes or {})["error.type"] == "SystemExit"


@pytest.mark.parametrize("status", [400, 401, 404, 405, 422, 499])
def test_http_exception_below_500_is_no_error(wire: Wire, status: int) -> None:
    """
    An ``HTTPException`` below 500 is an answer to the client, even in place of another exception.
    """
    app = FastAPI()

    @app.get("/x")
    async def x() -> None:
        try:
            await breaks()
        except BrokenError as error:
            raise HTTPException(status) from error

    call(app, path="/x")
    assert wire.server.events == ()
    assert wire.server.status.status_code is StatusCode.UNSET
    assert "error.type" not in (wire.server.attributes or {})


def test_nothing_of_a_handled_exception_is_kept(wire: Wire) -> None:
    """
    An exception that was answered is gone with its request: no frame of a handler stays alive.
    """
    held: list[weakref.ref[BrokenError]] = []
    app = FastAPI()

    @app.get("/x")
    async def x() -> None:
        error = BrokenError("disk full")
        held.append(weakref.ref(error))
        raise error

    @app.exception_handler(BrokenError)
    async def handler(_request: Any, _error: Any) -> JSONResponse:
        return JSONResponse({}, status_code=503)

    call(app, path="/x")
    gc.collect()
    assert wire.server.events
    assert [reference() for reference in held] == [None]


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


@pytest.mark.parametrize("handled", [False, True])
def test_exception_that_user_code_recorded_is_not_recorded_again(wire: Wire, handled: bool) -> None:
    """
    An endpoint, or a handler that answers 500, may record the exception itself: there is one event, the user's.
    """
    app = FastAPI()

    @app.get("/x")
    async def x() -> None:
        try:
            await breaks()
        except BrokenError as error:
            if not handled:
                trace.get_current_span().record_exception(error, {"shop.disk": 7})
            raise

    if handled:

        @app.exception_handler(BrokenError)
        async def handler(_request: Any, error: Exception) -> JSONResponse:
            span = trace.get_current_span()
            span.record_exception(error, {"shop.disk": 7})
            span.set_status(StatusCode.ERROR, "broken")
            return JSONResponse({}, status_code=500)

    call(app, path="/x")
    (event,) = wire.server.events
    assert (event.attributes or {})["shop.disk"] == 7
    assert (event.attributes or {})["exception.type"] == f"{__name__}.BrokenError"
    assert (wire.server.attributes or {})["error.type"] == f"{__name__}.BrokenError"
    assert wire.server.status.status_code is StatusCode.ERROR


def test_another_exception_that_user_code_recorded(wire: Wire) -> None:
    """
    What user code recorded of an attempt that failed before does not stand for the exception that ended the request.
    """
    app = FastAPI()

    @app.get("/x")
    async def x() -> None:
        trace.get_current_span().record_exception(ValueError("first attempt"))
        await breaks()

    call(app, path="/x")
    messages = [(event.attributes or {})["exception.message"] for event in wire.server.events]
    assert messages == ["first attempt", "disk full"]


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
    assert (wire.server.attributes or {})["error.type"] == "asyncio.exceptions.CancelledError"
    assert wire.server.events == ()


async def disconnecting(app: Any, after: int, spec: str, *, half: bool) -> None:
    """
    Request ``/x`` as a client that goes away after ``after`` body messages, or in the middle of its own body.
    """
    gone = asyncio.Event()
    seen = 0
    waiting = [{"type": "http.request", "body": b"half", "more_body": True}] if half else []
    if not after:
        gone.set()

    async def receive() -> Any:
        if waiting:
            return waiting.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal seen
        if gone.is_set() and spec == "2.4":
            raise OSError("the client is gone")  # ASGI 2.4: what a server may do from then on
        if message["type"] == "http.response.body":
            seen += 1
            if seen >= after:
                gone.set()

    await app(http_scope("POST", "/x", asgi={"version": "3.0", "spec_version": spec}), receive, send)


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


async def reads_body_in_a_group(request: Request) -> None:
    """
    Wait for a body that never comes, beside other work.
    """
    async with asyncio.TaskGroup() as group:
        group.create_task(request.body())


async def declares_body(body: dict[str, Any]) -> None:
    """
    Let FastAPI wait for a body that never comes.
    """


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("spec", ["2.3", "2.4"])
@pytest.mark.parametrize("endpoint", [endless, reads_body, reads_body_in_a_group, polls, declares_body])
def test_client_disconnect(wire: Wire, endpoint: Callable[..., Any], spec: str, behind: bool) -> None:
    """
    A client that went away is visible and nobody's exception, whichever way the server tells; what was sent stays.
    """
    app = FastAPI()
    app.add_api_route("/x", endpoint, methods=["POST"])
    if behind:
        app.add_middleware(BaseHTTPMiddleware, dispatch=passthrough)

    async def run() -> None:
        half = endpoint in (reads_body, reads_body_in_a_group, declares_body)
        try:
            await disconnecting(app, 1 if endpoint is endless else 0, spec, half=half)
        except* (ClientDisconnect, OSError):
            pass

    asyncio.run(run())
    attributes = wire.server.attributes or {}
    assert attributes["otel_correlation.client_disconnected"] is True
    sent = endpoint is endless
    assert attributes.get("error.type") == (None if sent else "client_disconnected")
    assert attributes.get("http.response.status_code") == (200 if sent else None)
    assert wire.server.status.status_code is StatusCode.UNSET
    assert wire.server.events == ()


@pytest.mark.parametrize("sent", [False, True])
def test_cancelled_because_the_client_left(wire: Wire, sent: bool) -> None:
    """
    A server that cancels what it runs for a client that is gone makes no error of it (Daphne does after ten seconds).
    """
    app = FastAPI()

    @app.get("/x")
    async def x(request: Request) -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            yield "a"
            assert await request.is_disconnected()
            raise asyncio.CancelledError

        if not sent:
            assert await request.is_disconnected()
            raise asyncio.CancelledError
        return StreamingResponse(parts())

    async def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await app(http_scope("GET", "/x", asgi={"version": "3.0", "spec_version": "2.4"}), gone, ignored)

    async def gone() -> Any:
        return {"type": "http.disconnect"}

    async def ignored(message: Any) -> None: ...

    asyncio.run(run())
    attributes = wire.server.attributes or {}
    assert attributes.get("http.response.status_code") == (200 if sent else None)
    assert attributes.get("error.type") == (None if sent else "client_disconnected")
    assert wire.server.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("spec", ["2.3", "2.4"])
def test_a_head_that_could_not_be_sent(wire: Wire, spec: str) -> None:
    """
    A client that left before the head of a stream was sent nothing, whether the server refuses the head or is asked.
    """
    app = FastAPI()
    app.add_api_route("/x", endless, methods=["POST"])
    with contextlib.suppress(ClientDisconnect, OSError):
        asyncio.run(disconnecting(app, 0, spec, half=False))
    attributes = wire.server.attributes or {}
    assert "http.response.status_code" not in attributes
    assert attributes["error.type"] == "client_disconnected"


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


def test_an_os_error_of_the_application_is_its_own(wire: Wire) -> None:
    """
    An ``OSError`` that the server's ``send`` did not raise is no disconnect.
    """
    app = FastAPI()

    @app.get("/x")
    async def x() -> None:
        raise FileNotFoundError("report.csv")

    call(app, path="/x", asgi={"version": "3.0", "spec_version": "2.4"})
    assert (wire.server.attributes or {})["error.type"] == "FileNotFoundError"
    assert "otel_correlation.client_disconnected" not in (wire.server.attributes or {})
    assert len(wire.server.events) == 1
