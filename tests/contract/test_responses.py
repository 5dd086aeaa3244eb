"""
Contract point 5: every response that the application makes carries the request id, exactly once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from fastapi import APIRouter, FastAPI, HTTPException
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from tests.contract.wire import UUID, Headers, call

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.contract.wire import Wire

SENT: Headers = [(b"x-request-id", UUID.encode())]


def application(directory: Path) -> FastAPI:
    """
    Return an application with one of everything.
    """
    app = FastAPI()
    sub = FastAPI()

    @app.get("/ok")
    async def ok() -> dict[str, str]:
        return {}

    @app.get("/own")
    async def own() -> JSONResponse:
        return JSONResponse({}, headers={"X-Request-ID": "the application's own"})

    @app.get("/boom")
    async def boom() -> None:
        message = "boom"
        raise ValueError(message)

    @app.get("/teapot")
    async def teapot() -> None:
        raise HTTPException(418)

    @app.get("/int/{number}")
    async def number(number: int) -> int:
        return number

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            for part in "abc":
                yield part

        return StreamingResponse(parts())

    @sub.get("/boom")
    async def sub_boom() -> None:
        message = "sub"
        raise ValueError(message)

    async def plain(request: Any) -> PlainTextResponse:
        return PlainTextResponse("x")

    (directory / "a.txt").write_text("a")
    app.mount("/sub", sub)
    app.mount("/star", Starlette(routes=[Route("/x", plain)]))
    app.mount("/static", StaticFiles(directory=directory))
    return app


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/ok", 200),
        ("HEAD", "/ok", 405),
        ("HEAD", "/star/x", 200),
        ("OPTIONS", "/ok", 405),
        ("POST", "/ok", 405),
        ("GET", "/ok/", 307),
        ("GET", "/none", 404),
        ("GET", "/int/x", 422),
        ("GET", "/teapot", 418),
        ("GET", "/boom", 500),
        ("GET", "/own", 200),
        ("GET", "/stream", 200),
        ("GET", "/sub/boom", 500),
        ("GET", "/sub/none", 404),
        ("GET", "/star/x", 200),
        ("GET", "/star/none", 404),
        ("GET", "/static/a.txt", 200),
        ("GET", "/static/none", 404),
        ("GET", "/docs", 200),
        ("GET", "/openapi.json", 200),
    ],
)
def test_every_response_has_the_id(wire: Wire, tmp_path: Path, method: str, path: str, status: int) -> None:
    """
    Whatever the answer is, it names the request, and its span has its status.
    """
    reply = call(application(tmp_path), method, path, SENT)
    assert reply.status == status
    assert reply.all("x-request-id") == [UUID]
    span = wire.server
    assert span.attributes is not None
    assert span.attributes["http.response.status_code"] == status
    assert span.status.is_ok is (status < 500)


@pytest.mark.parametrize("middleware", [GZipMiddleware, BaseHTTPMiddleware])
def test_below_middleware(wire: Wire, tmp_path: Path, middleware: Any) -> None:
    """
    Middleware that rewrites messages or runs the application in another task loses nothing.
    """
    app = application(tmp_path)
    if middleware is BaseHTTPMiddleware:

        async def dispatch(request: Any, call_next: Any) -> Any:
            return await call_next(request)

        app.add_middleware(middleware, dispatch=dispatch)
    else:
        app.add_middleware(middleware)
    for path in ("/ok", "/none", "/boom", "/stream", "/sub/boom"):
        assert call(app, path=path, headers=SENT).all("x-request-id") == [UUID]
    assert len(wire.servers) == 5


def test_excluded_route_has_the_id(wire: Wire, tmp_path: Path) -> None:
    """
    A route without a span answers with the id all the same.
    """
    wire.configure(excluded_server="ok")
    assert call(application(tmp_path), path="/ok", headers=SENT).request_id == UUID
    assert wire.spans == []


ORIGIN: Headers = [(b"origin", b"https://shop.example")]
PREFLIGHT: Headers = [*ORIGIN, (b"access-control-request-method", b"GET")]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["X-Request-ID"]),
        ({"expose_headers": ["ETag"]}, ["ETag, X-Request-ID"]),
        ({"expose_headers": ["ETag", "x-request-id"]}, ["ETag, x-request-id"]),
        ({"expose_headers": ["*"]}, ["*"]),
        ({"expose_headers": ["*"], "allow_credentials": True}, ["*, X-Request-ID"]),
    ],
)
def test_cors_exposes_the_id(wire: Wire, tmp_path: Path, options: dict[str, Any], expected: list[str]) -> None:
    """
    A script of another origin may read the id: the header is named once beside what the application exposes.
    """
    app = application(tmp_path)
    app.add_middleware(CORSMiddleware, allow_origins=["https://shop.example"], **options)
    reply = call(app, path="/ok", headers=SENT + ORIGIN)
    assert reply.all("access-control-expose-headers") == expected
    assert reply.all("x-request-id") == [UUID]
    preflight = call(app, "OPTIONS", "/ok", SENT + PREFLIGHT)
    assert (preflight.status, preflight.all("x-request-id")) == (200, [UUID])
    same_origin = call(app, path="/ok", headers=SENT)
    assert "X-Request-ID" not in ",".join(same_origin.all("access-control-expose-headers")) or options


def test_no_cors_no_expose(wire: Wire, tmp_path: Path) -> None:
    """
    A response without CORS headers gets none.
    """
    assert call(application(tmp_path), path="/ok").all("access-control-expose-headers") == []


def test_one_response_object_for_all(wire: Wire) -> None:
    """
    An application that answers every request with one and the same object leaks no id from one to the next.
    """
    app = FastAPI()
    shared = PlainTextResponse("x")
    message = {"type": "http.response.start", "status": 200, "headers": []}

    async def raw(scope: Any, receive: Any, send: Any) -> None:
        await send(message)
        await send({"type": "http.response.body", "body": b"x"})

    async def endpoint(request: Any) -> PlainTextResponse:
        return shared

    app.add_route("/shared", endpoint)
    app.mount("/raw", raw)
    for path in ("/shared", "/raw"):
        first, second = call(app, path=path), call(app, path=path)
        assert first.request_id != second.request_id
    assert message["headers"] == []
    assert "x-request-id" not in shared.headers


def test_router_dependency_failure(wire: Wire) -> None:
    """
    A response that an exception handler makes carries the id, too.
    """
    app = FastAPI()
    router = APIRouter()

    @router.get("/x")
    async def x() -> None:
        raise KeyError("x")

    @app.exception_handler(KeyError)
    async def handler(request: Any, error: Exception) -> JSONResponse:
        return JSONResponse({}, status_code=409)

    app.include_router(router, prefix="/r")
    reply = call(app, path="/r/x", headers=SENT)
    assert (reply.status, reply.all("x-request-id")) == (409, [UUID])
