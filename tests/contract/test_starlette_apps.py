"""
Applications of Starlette without FastAPI: the same contract, and never a second SERVER span.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.trace import StatusCode
from opentelemetry.util.http import parse_excluded_urls
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Host, Mount, Route, Router, WebSocketRoute
from starlette.staticfiles import StaticFiles

from otel_correlation import edge
from otel_correlation.edge import _fastapi as plug
from otel_correlation.identity import log_ids
from tests.contract.wire import PARENT, TRACE, UUID, call, open_socket, wired

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from tests.contract.wire import Wire


async def ids(request: Any) -> JSONResponse:
    """
    Answer with the ids that a line would have.
    """
    return JSONResponse(list(log_ids()))


async def boom(request: Any) -> None:
    """
    Fail.
    """
    raise LookupError("x")


async def refuse(request: Any) -> None:
    """
    Answer by an exception.
    """
    raise HTTPException(409)


async def stream(request: Any) -> StreamingResponse:
    """
    Fail in the middle of a response.
    """

    async def parts() -> AsyncIterator[str]:
        yield "a"
        raise LookupError("x")

    return StreamingResponse(parts())


async def chat(socket: Any) -> None:
    """
    Say one word.
    """
    await socket.accept()
    await socket.send_text("a")
    await socket.close()


def inner() -> FastAPI:
    """
    Return a FastAPI application to mount.
    """
    app = FastAPI()

    @app.get("/orders/{number}")
    async def order(number: int) -> list[str]:
        return list(log_ids())

    return app


def application(**options: Any) -> Starlette:
    """
    Return an application with every kind of route.
    """
    return Starlette(
        routes=[
            Route("/items/{x:int}", ids),
            Route("/boom", boom),
            Route("/refuse", refuse),
            Route("/stream", stream),
            WebSocketRoute("/ws/{room}", chat),
            Mount("/api", routes=[Mount("/v1", app=Router([Route("/users/{name}", ids)]))]),
            Mount("/shop", app=inner()),
            Mount("/deep", app=Starlette(routes=[Mount("/er", app=Starlette(routes=[Route("/x", ids)]))])),
        ],
        **options,
    )


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/items/3", "/items/{x:int}"),
        ("/api/v1/users/ann", "/api/v1/users/{name}"),
        ("/shop/orders/7", "/shop/orders/{number}"),
        ("/deep/er/x", "/deep/er/x"),
    ],
)
def test_one_identity(wire: Wire, path: str, route: str) -> None:
    """
    A request has one SERVER span with its whole route, its ids in the handler, and the id on the response.
    """
    reply = call(application(), path=path, headers=[(b"traceparent", PARENT), (b"x-request-id", UUID.encode())])
    assert (reply.status, reply.request_id) == (200, UUID)
    assert TRACE.encode() in reply.body
    assert UUID.encode() in reply.body
    assert len(wire.spans) == 1
    assert (wire.server.name, (wire.server.attributes or {})["http.route"]) == (f"GET {route}", route)


def test_by_host(wire: Wire) -> None:
    """
    A route below a host has its own template.
    """
    app = Starlette(routes=[Host("shop.example", app=Router([Route("/who", ids)]))])
    assert call(app, path="/who").status == 200
    assert [span.name for span in wire.spans] == ["GET /who"]


@pytest.mark.parametrize(
    ("path", "status", "error", "sent"),
    [
        ("/boom", 500, "LookupError", 500),
        ("/refuse", 409, None, 409),
        ("/stream", 200, "LookupError", 200),
        ("/nothing", 404, None, 404),
        ("/api/v1/nothing", 404, None, 404),
    ],
)
def test_failures(wire: Wire, path: str, status: int, error: str | None, sent: int) -> None:
    """
    Errors are recorded once, as under FastAPI, and each answer carries the id.
    """
    reply = call(application(), path=path)
    assert (reply.status, len(reply.all("x-request-id"))) == (sent, 1)
    attributes = wire.server.attributes or {}
    assert attributes["http.response.status_code"] == status
    assert attributes.get("error.type") == error
    assert len(wire.server.events) == (1 if error else 0)
    assert wire.server.status.status_code is (StatusCode.ERROR if error else StatusCode.UNSET)


def test_wrong_method(wire: Wire) -> None:
    """
    A 405 has the route that it is about.
    """
    assert call(application(), "DELETE", "/items/3").status == 405
    assert wire.server.name == "DELETE /items/{x:int}"


def test_a_websocket(wire: Wire) -> None:
    """
    A handshake has its span, its id and its route, and its end a short span.
    """
    reply = open_socket(application(), path="/ws/tea", headers=[(b"x-request-id", UUID.encode())])
    assert reply.request_id == UUID
    assert [span.name for span in wire.spans] == ["GET /ws/{room}", "GET /ws/{room} close"]


def test_what_middleware_answers(wire: Wire) -> None:
    """
    Middleware is inside of the edge: what it answers carries the id and has the route that it kept from running.
    """

    async def closed(request: Any, call_next: Any) -> Any:
        return PlainTextResponse(log_ids()[3], 503)

    app = application(middleware=[Middleware(BaseHTTPMiddleware, dispatch=closed)])
    reply = call(app, path="/items/3")
    assert (reply.status, reply.body.decode()) == (503, reply.request_id)
    assert wire.server.name == "GET /items/{x:int}"
    wire.clear()
    cors = application(middleware=[Middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"])])
    preflight = [(b"origin", b"https://shop"), (b"access-control-request-method", b"GET")]
    assert call(cors, "OPTIONS", "/items/3", preflight).request_id
    assert len(wire.servers) == 1


def behind_fastapi(app: Any) -> FastAPI:
    """
    Mount an application in one of FastAPI.
    """
    return FastAPI(routes=[Mount("/", app=app)])


@pytest.mark.parametrize("outside", [edge, OpenTelemetryMiddleware, behind_fastapi])
def test_never_two(wire: Wire, outside: Any) -> None:
    """
    An edge, contrib's middleware or a FastAPI application around it make no second span.
    """
    assert call(outside(application()), path="/items/3").status == 200
    assert [span.name for span in wire.spans] == ["GET /items/{x:int}"]


def test_contribs_own_instrumentation_beside_ours(wire: Wire) -> None:
    """
    What contrib's instrumentation of Starlette puts into an application keeps its hooks and its exclusions.
    """
    seen: list[str] = []
    added = Middleware(
        OpenTelemetryMiddleware,
        excluded_urls=parse_excluded_urls("health"),
        server_request_hook=lambda span, scope: span.set_attribute("tenant", "acme"),
        client_response_hook=lambda span, scope, message: seen.append(message["type"]),
    )
    app = Starlette(routes=[Route("/items/{x}", ids), Route("/health", ids)], middleware=[added])
    call(app, path="/items/1")
    assert wire.server.name == "GET /items/{x}"
    assert (wire.server.attributes or {})["tenant"] == "acme"
    assert seen == ["http.response.start", "http.response.body"]
    wire.clear()
    assert call(app, path="/health").request_id
    assert not [span for span in wire.spans if span.context and span.context.trace_flags.sampled]


def test_excluded_paths(wire: Wire) -> None:
    """
    The variable for excluded paths holds here, too, and the ids stay.
    """
    wire.configure(excluded_server="items")
    assert call(application(), path="/items/3").request_id
    assert not wire.spans


def test_static_files(wire: Wire, tmp_path: Path) -> None:
    """
    Below a mount without routes that we know, the route is the mount's.
    """
    (tmp_path / "a.css").write_text("a {}")
    app = Starlette(routes=[Mount("/static", app=StaticFiles(directory=tmp_path))])
    assert call(app, path="/static/a.css").status == 200
    assert wire.server.name == "GET /static/{path}"


class Derived(Starlette):
    """
    An application class of a library's own, as FastMCP's is.
    """

    def build_middleware_stack(self) -> Any:
        """
        Add what the library wants.
        """
        stack = super().build_middleware_stack()

        async def outer(scope: Any, receive: Any, send: Any) -> None:
            await stack(scope, receive, send)

        return outer


def test_a_class_of_a_librarys_own(wire: Wire) -> None:
    """
    A subclass that builds its own stack is covered once.
    """
    assert call(Derived(routes=[Route("/items/{x}", ids)]), path="/items/1").request_id
    assert [span.name for span in wire.spans] == ["GET /items/{x}"]


def test_an_application_that_was_built_before(wire: Wire) -> None:
    """
    ``bootstrap(app)`` reaches an application whose middleware stands already, and a second call changes nothing.
    """
    plug.deactivate()
    app = application()
    assert call(app, path="/items/3").all("x-request-id") == []
    wire.configure()
    plug.instrument_everything()
    plug.switch_on(app)
    plug.switch_on(app)
    assert call(app, path="/items/3").request_id
    assert [span.name for span in wire.spans] == ["GET /items/{x:int}"]


def test_switched_off() -> None:
    """
    After the end of ours an application that was built under it serves as it did before.
    """
    app = application()
    with wired() as wire:
        assert call(app, path="/items/3").request_id
    assert call(app, path="/items/3").all("x-request-id") == []
    assert len(wire.spans) == 1
    assert call(application(), path="/items/3").all("x-request-id") == []


@pytest.mark.parametrize("kind", [Starlette, FastAPI])
def test_lifespan_begins_to_serve(wire: Wire, kind: Any) -> None:
    """
    The start of either kind of application counts as the begin of serving, once.
    """
    served: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncGenerator[None]:
        served.append("up")
        yield

    app = kind(lifespan=lifespan)
    plug.on_serving(lambda: served.append("serving"))

    async def main() -> None:
        messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

        async def receive() -> Any:
            return messages.pop(0)

        async def send(message: Any) -> None: ...

        await app({"type": "lifespan", "asgi": {}, "state": {}}, receive, send)

    asyncio.run(main())
    assert served == ["serving", "up"]


def test_the_page_about_other_frameworks(wire: Wire) -> None:
    """
    The example for any ASGI application does what its page says.
    """
    page = (Path(__file__).parents[2] / "docs/how-to/other-frameworks.md").read_text()
    block = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(block, names)
    reply = call(names["app"], path="/x")
    assert (reply.status, reply.body) == (200, b"hello")
    assert reply.request_id
    assert (wire.server.name, "http.route" in (wire.server.attributes or {})) == ("GET", False)
