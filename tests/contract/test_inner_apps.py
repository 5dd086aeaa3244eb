"""
An application that is mounted inside another one keeps what it was instrumented with, on the one SERVER span.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import FastAPI, WebSocket
from opentelemetry import trace
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.trace import SpanKind
from opentelemetry.util.http import parse_excluded_urls
from starlette.applications import Starlette
from starlette.routing import Mount

from otel_correlation import clients, edge
from otel_correlation.identity import log_ids
from tests.contract.wire import PARENT, TRACE, call, open_socket

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.contract.wire import Wire


def inner_app() -> FastAPI:
    """
    Return an application that answers with its ids and calls another service.
    """
    app = FastAPI()

    @app.get("/items/{x}")
    async def item(x: str) -> list[str]:
        with trace.get_tracer("shop").start_as_current_span("looked up"):
            return list(log_ids())

    @app.get("/health")
    async def health() -> list[str]:
        async with httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(200))) as client:
            await client.get("http://database/")
        with trace.get_tracer("shop").start_as_current_span("looked up"):
            return list(log_ids())

    @app.websocket("/ws")
    async def ws(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    return app


def by_mount(inner: Any) -> Any:
    outer = FastAPI()
    outer.mount("/sub", inner)
    return outer


def by_mount_twice(inner: Any) -> Any:
    outer, middle = FastAPI(), FastAPI()
    middle.mount("/b", inner)
    outer.mount("/a", middle)
    return outer


def by_edge(inner: Any) -> Any:
    return edge(inner)


def by_starlette(inner: Any) -> Any:
    return edge(Starlette(routes=[Mount("/sub", app=inner)]))


PREFIXES = {by_mount: "/sub", by_mount_twice: "/a/b", by_edge: "", by_starlette: "/sub"}


@pytest.fixture
def with_clients(wire: Wire) -> Iterator[Wire]:
    """
    A wired process that traces its calls, too.
    """
    clients.activate(lambda: wire.settings)
    clients.instrument_everything()
    yield wire
    clients.deactivate()


@pytest.mark.parametrize("outer", PREFIXES)
def test_the_hooks_of_an_inner_application(wire: Wire, outer: Any) -> None:
    """
    Its server hook gets the SERVER span before its handler runs, its other hooks the spans of its messages.
    """
    inner = inner_app()
    seen: list[Any] = []

    def hook(span: Any, scope: Any) -> None:
        seen.append(scope["path"])
        span.set_attribute("tenant", "acme")

    FastAPIInstrumentor.instrument_app(
        inner,
        server_request_hook=hook,
        client_request_hook=lambda span, scope, message: seen.append(message["type"]),
        client_response_hook=lambda span, scope, message: seen.append(message["type"]),
    )
    prefix = PREFIXES[outer]
    reply = call(outer(inner), path=f"{prefix}/items/1")
    assert reply.status == 200
    assert seen[0] == f"{prefix}/items/1"
    assert "http.response.start" in seen
    assert wire.server.name == f"GET {prefix}/items/{{x}}"
    assert (wire.server.attributes or {})["tenant"] == "acme"


def test_the_hook_of_an_inner_websocket(wire: Wire) -> None:
    """
    The hook is called for a handshake, too; what it raises stays on the span.
    """
    inner = inner_app()

    def hook(span: Any, scope: Any) -> None:
        span.set_attribute("tenant", "acme")
        raise ValueError("x")

    FastAPIInstrumentor.instrument_app(inner, server_request_hook=hook)
    open_socket(by_mount(inner), path="/sub/ws")
    assert (wire.server.attributes or {})["tenant"] == "acme"
    assert [event.name for event in wire.server.events] == ["exception"]


@pytest.mark.parametrize("outer", PREFIXES)
@pytest.mark.parametrize("parent", [False, True])
def test_the_excluded_urls_of_an_inner_application(with_clients: Wire, outer: Any, parent: bool) -> None:
    """
    A path that it excludes makes no span, its calls neither; ids stay, and a caller's trace goes on, as at the edge.
    """
    wire = with_clients
    inner = inner_app()
    FastAPIInstrumentor.instrument_app(inner, excluded_urls="health")
    app, prefix = outer(inner), PREFIXES[outer]
    reply = call(app, path=f"{prefix}/health", headers=[(b"traceparent", PARENT)] if parent else [])
    ids = reply.body.decode()
    assert reply.request_id in ids
    if parent:
        assert TRACE in ids
        assert {span.context.trace_id for span in wire.spans if span.context} == {int(TRACE, 16)}
        assert {span.kind for span in wire.spans if is_sampled(span)} == {SpanKind.CLIENT, SpanKind.INTERNAL}
    else:
        assert '"00"' in ids or '"02"' in ids
        assert not [span.name for span in wire.spans if is_sampled(span)]
    wire.clear()
    call(app, path=f"{prefix}/items/1")
    assert wire.server.name == f"GET {prefix}/items/{{x}}"


def is_sampled(span: Any) -> bool:
    """
    Tell whether an exporter would see this span.
    """
    return bool(span.context.trace_flags.sampled)


def test_the_captured_headers_of_an_inner_application(wire: Wire) -> None:
    """
    Headers that it captures are on the SERVER span, those of its responses, too; its own rules hide secrets.
    """
    inner = inner_app()
    FastAPIInstrumentor.instrument_app(
        inner,
        http_capture_headers_server_request=["x-tenant", "x-card"],
        http_capture_headers_server_response=["content-type"],
        http_capture_headers_sanitize_fields=["x-card"],
    )
    call(by_mount(inner), path="/sub/items/1", headers=[(b"x-tenant", b"acme"), (b"x-card", b"4111")])
    attributes = wire.server.attributes or {}
    assert attributes["http.request.header.x-tenant"] == ("acme",)
    assert attributes["http.request.header.x-card"] == ("[REDACTED]",)
    assert attributes["http.response.header.content-type"] == ("application/json",)


def test_an_inner_application_without_options_costs_nothing(wire: Wire) -> None:
    """
    One span, and the inner application's name for it, where both were instrumented without options.
    """
    inner = inner_app()
    FastAPIInstrumentor.instrument_app(inner)
    outer = by_mount(inner)
    FastAPIInstrumentor.instrument_app(outer)
    call(outer, path="/sub/items/1")
    assert [span.name for span in wire.servers] == ["GET /sub/items/{x}"]


def test_hooks_and_exclusions_of_middleware_by_hand(wire: Wire) -> None:
    """
    Contrib's middleware inside of an edge keeps its hooks and its excluded URLs.
    """
    app = FastAPI()
    seen: list[str] = []

    @app.get("/items/{x}")
    async def item(x: str) -> None: ...

    @app.get("/health")
    async def health() -> None: ...

    app.add_middleware(
        OpenTelemetryMiddleware,
        excluded_urls=parse_excluded_urls("health"),
        server_request_hook=lambda span, scope: seen.append("server"),
        client_response_hook=lambda span, scope, message: seen.append(message["type"]),
    )
    call(app, path="/health")
    assert not [span for span in wire.spans if is_sampled(span)]
    wire.clear()
    call(app, path="/items/1")
    assert wire.server.name == "GET /items/{x}"
    assert seen == ["server", "http.response.start", "http.response.body"]
