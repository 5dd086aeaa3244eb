"""
Routes whose class answers itself: the span has their template as any other's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute, APIWebSocketRoute
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute, Match, Mount, Route

from otel_correlation import edge
from tests.contract.wire import call, open_socket

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.contract.wire import Wire


class TooLarge(APIRoute):
    """
    Answers a large body before anything reads it.
    """

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        if any(name == b"content-length" and int(value) > 10 for name, value in scope["headers"]):
            await PlainTextResponse("too large", 413)(scope, receive, send)
            return
        await super().handle(scope, receive, send)


class NotModified(APIRoute):
    """
    Answers 304 without the handler, from ``get_route_handler``.
    """

    def get_route_handler(self) -> Callable[..., Any]:
        async def answer(request: Any) -> Any:
            return PlainTextResponse("", 304)

        return answer


class Fails(APIRoute):
    """
    Raises before anything else does.
    """

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        raise LookupError("x")


class Closed(APIWebSocketRoute):
    """
    Refuses a handshake by itself.
    """

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.close", "code": 1008})


class Plain(Route):
    """
    Starlette's own, with an answer of its own.
    """

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("early", 413)(scope, receive, send)


class Own(BaseRoute):
    """
    A route that shares nothing with Starlette's.
    """

    def matches(self, scope: Any) -> Any:
        return Match.FULL, {}

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("own", 200)(scope, receive, send)


async def upload(number: int = 0) -> None:
    """
    Take an upload.
    """


def on_application(kind: Any) -> tuple[Any, str]:
    app = FastAPI()
    app.router.route_class = kind
    app.add_api_route("/upload/{number}", upload, methods=["POST"])
    return app, "/upload/{number}"


def on_included_router(kind: Any) -> tuple[Any, str]:
    app, router, nested = FastAPI(), APIRouter(prefix="/v1"), APIRouter(prefix="/files", route_class=kind)
    nested.add_api_route("/upload/{number}", upload, methods=["POST"])
    router.include_router(nested)
    app.include_router(router, prefix="/api")
    return app, "/api/v1/files/upload/{number}"


def on_mounted_application(kind: Any) -> tuple[Any, str]:
    outer = FastAPI()
    app, path = on_included_router(kind)
    outer.mount("/tenants/{tenant}", app)
    return outer, "/tenants/{tenant}" + path


@pytest.mark.parametrize("kind", [TooLarge, NotModified, Fails])
@pytest.mark.parametrize("place", [on_application, on_included_router, on_mounted_application])
def test_a_route_class_that_answers_itself(wire: Wire, kind: Any, place: Any) -> None:
    """
    An early 413, a 304 and a failure of the class itself have the route of the request, with every prefix.
    """
    app, route = place(kind)
    path = route.format(number=1, tenant="acme")
    reply = call(app, "POST", path, headers=[(b"content-length", b"1000")])
    assert reply.status == {TooLarge: 413, NotModified: 304, Fails: 500}[kind]
    assert wire.server.name == f"POST {route}"
    assert (wire.server.attributes or {})["http.route"] == route


def test_a_websocket_route_that_refuses_itself(wire: Wire) -> None:
    """
    A handshake that the route's class refuses has its route.
    """
    app = FastAPI()
    app.router.routes.append(Closed("/ws/{room}", upload))
    open_socket(app, path="/ws/1")
    assert wire.server.name == "GET /ws/{room}"


@pytest.mark.parametrize("kind", [Route, Plain])
def test_a_plain_route_that_answers_itself(wire: Wire, kind: Any) -> None:
    """
    Starlette's routes, under FastAPI and in a mounted router, do as FastAPI's.
    """

    async def endpoint(request: Any) -> Any:
        return PlainTextResponse("late")

    for app in (
        FastAPI(routes=[Mount("/in", routes=[kind("/x/{y}", endpoint)])]),
        edge(Starlette(routes=[Mount("/in", routes=[kind("/x/{y}", endpoint)])])),
    ):
        wire.clear()
        call(app, path="/in/x/1")
        assert wire.server.name == "GET /in/x/{y}"


def test_a_route_without_a_path(wire: Wire) -> None:
    """
    A route of another kind names nothing, and nothing fails.
    """
    assert call(FastAPI(routes=[Own()]), path="/x").status == 200
    assert wire.server.name == "GET"


def test_unmatched_stays_unmatched(wire: Wire) -> None:
    """
    A 404 inside a mounted application is not the mount's route.
    """
    outer = FastAPI()
    outer.mount("/sub", FastAPI())
    assert call(outer, path="/sub/nothing").status == 404
    assert wire.server.name == "GET"
