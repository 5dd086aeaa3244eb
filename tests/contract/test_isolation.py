"""
Contract point 7, and one SERVER span a request: no other request's ids, no second span, whoever else instruments.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from typing import TYPE_CHECKING, Any

import fastapi
import pytest
from fastapi import FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags

from otel_correlation import bind, edge, identity, request_id
from otel_correlation.identity import log_ids
from tests.contract.wire import UUID, Wire, call, exchange, http_scope, open_socket, wired

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


def hello() -> FastAPI:
    """
    Return a small application.
    """
    app = FastAPI()

    @app.get("/hello")
    async def hello() -> list[str]:
        return list(log_ids())

    return app


def test_interleaved_requests(wire: Wire) -> None:
    """
    Two hundred requests at once: each sees its own ids in the handler, its threads, its stream and its header only.
    """
    app = FastAPI()
    seed = random.Random(7)

    @app.get("/mixed/{number}")
    async def mixed(number: int) -> StreamingResponse:
        first = log_ids()
        bind(number=number)
        await asyncio.sleep(seed.random() / 50)
        assert log_ids() == first
        assert await asyncio.to_thread(log_ids) == first
        assert await asyncio.create_task(task()) == first

        async def parts() -> AsyncIterator[str]:
            for _ in range(3):
                await asyncio.sleep(seed.random() / 100)
                yield f"{log_ids()[0]} {log_ids()[3]}\n"

        return StreamingResponse(parts(), status_code=200 + number % 5, headers={"x-number": str(number)})

    async def task() -> tuple[str, str, str, str]:
        await asyncio.sleep(0)
        return log_ids()

    @app.get("/sync/{number}")
    def sync(number: int) -> str:
        bind(number=number)
        return " ".join(log_ids())

    async def run() -> list[Any]:
        def scope(number: int) -> dict[str, Any]:
            path = f"/{'sync' if number % 4 == 0 else 'mixed'}/{number}"
            return http_scope("GET", path, [(b"x-request-id", f"interleaved-request-{number}".encode())])

        return await asyncio.gather(*(exchange(app, scope(number)) for number in range(200)))

    replies = asyncio.run(run())
    by_id = {str((span.attributes or {})["request_id"]): span for span in wire.servers}
    assert len(by_id) == len(wire.spans) == 200
    for number, reply in enumerate(replies):
        assert reply.error is None
        own = f"interleaved-request-{number}"
        assert reply.request_id == own
        span = by_id[own]
        assert span.context is not None
        assert span.attributes is not None
        assert span.attributes["number"] == number
        assert span.attributes["http.response.status_code"] == reply.status
        trace_text = f"{span.context.trace_id:032x}"
        if number % 4 == 0:
            assert reply.body.decode().strip('"').split() == [trace_text, f"{span.context.span_id:016x}", "01", own]
        else:
            assert reply.body.decode().split("\n")[:3] == [f"{trace_text} {own}"] * 3


def test_leaked_context_is_never_used(wire: Wire) -> None:
    """
    A context that a server left in the request's task names no parent, no trace and no request id, and is back afterwards.
    """
    leaked = SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=TraceFlags(1))
    context = trace.set_span_in_context(
        NonRecordingSpan(leaked), identity.set_in(otel_context.Context({"a": 1}), identity.Identity("leaked"))
    )

    async def run() -> Any:
        token = otel_context.attach(context)
        try:
            reply = await exchange(hello(), http_scope("GET", "/hello"))
            assert otel_context.get_current() is context
            return reply
        finally:
            otel_context.detach(token)

    reply = asyncio.run(run())
    span = wire.server
    assert span.parent is None
    assert span.context is not None
    assert span.context.trace_id != 0xABC
    assert reply.request_id != "leaked"
    assert request_id() is None


def test_state_of_lifespan_is_not_shared(wire: Wire) -> None:
    """
    A state dict that the server hands to every request gets nobody's id.
    """
    shared = {"pool": "db"}
    call(hello(), path="/hello", state=shared)
    assert shared == {"pool": "db"}


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """
    Set variables for a block.
    """
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


async def start_up(app: Any) -> list[str]:
    """
    Run an application's lifespan from start to end; return what it answered.
    """
    waiting = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent: list[str] = []

    async def receive() -> Any:
        return waiting.pop(0)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)
    return sent


def test_lifespan_passes_through(wire: Wire) -> None:
    """
    Start-up and shutdown run, unchanged and without a span.
    """
    ran: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        ran.append("up")
        yield {"pool": "db"}
        ran.append("down")

    app = FastAPI(lifespan=lifespan)
    for target in (app, edge(app)):
        assert asyncio.run(start_up(target)) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert ran == ["up", "down"] * 2
    assert wire.spans == []


def test_native_telemetry_steps_aside(wire: Wire) -> None:
    """
    FastAPI's own telemetry makes no second SERVER span and no operation spans, mounted applications included.
    """
    app, sub = hello(), hello()
    app.mount("/sub", sub)
    assert "telemetry" in FastAPI.__init__.__annotations__
    call(app, path="/hello")
    call(app, path="/sub/hello")
    call(app, path="/sub/none")
    assert [span.kind for span in wire.spans] == [SpanKind.SERVER] * 3


def test_native_auto_configure_adds_no_exporter(wire: Wire) -> None:
    """
    ``FASTAPI_OTEL_AUTO_CONFIGURE=true`` puts no second exporter behind the provider.
    """
    processors = wire.provider._active_span_processor._span_processors
    with environment(FASTAPI_OTEL_AUTO_CONFIGURE="true", OTEL_TRACES_EXPORTER="otlp"):
        app = hello()
        assert asyncio.run(start_up(app))[0] == "lifespan.startup.complete"
    assert wire.provider._active_span_processor._span_processors == processors


def inside(app: FastAPI) -> Any:
    """
    Add contrib's middleware to the application.
    """
    app.add_middleware(OpenTelemetryMiddleware)
    return app


def outside(app: FastAPI) -> Any:
    """
    Put contrib's middleware around the application.
    """
    return OpenTelemetryMiddleware(app)


def by_edge(app: FastAPI) -> Any:
    """
    Put the public edge around the application.
    """
    return edge(app)


def both(app: FastAPI) -> Any:
    """
    Put everything everywhere.
    """
    return OpenTelemetryMiddleware(edge(inside(app)))


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("wrap", [inside, outside, by_edge, both])
def test_one_server_span(kind_of_span: str, wrap: Any, explicit: bool) -> None:
    """
    Whoever puts which middleware where, and however the application was instrumented: one SERVER span, one id, one route.
    """
    with wired(kind_of_span, instrument=not explicit) as wire:
        app = hello()
        sub = hello()
        app.mount("/sub", sub)
        if explicit:
            FastAPIInstrumentor.instrument_app(app)
        wrapped = wrap(app)
        for path in ("/hello", "/sub/hello", "/none"):
            reply = call(wrapped, path=path, headers=[(b"x-request-id", UUID.encode())])
            assert reply.all("x-request-id") == [UUID]
        assert [span.name for span in wire.spans] == ["GET /hello", "GET /sub/hello", "GET"]
        open_socket(wrapped)
        assert len(wire.servers) == 4


@pytest.fixture(params=["light", "plain"])
def kind_of_span(request: pytest.FixtureRequest) -> str:
    """
    The kind of span.
    """
    return str(request.param)


def test_public_edge_covers_wrappers(wire: Wire) -> None:
    """
    What stands around FastAPI is inside the request where ``edge()`` stands around both; its own answers carry the id.
    """
    seen: list[str | None] = []
    app = hello()

    async def wrapper(scope: Any, receive: Any, send: Any) -> None:
        seen.append(request_id())
        if scope["path"] == "/early":
            await send({"type": "http.response.start", "status": 503, "headers": []})
            await send({"type": "http.response.body"})
        else:
            await app(scope, receive, send)

    wrapped = edge(wrapper)
    assert call(wrapped, path="/early", headers=[(b"x-request-id", b"42")]).request_id == "42"
    assert call(wrapped, path="/hello", headers=[(b"x-request-id", b"43")]).request_id == "43"
    assert seen == ["42", "43"]
    assert [span.name for span in wire.servers] == ["GET", "GET /hello"]


def test_application_that_overrides_call(wire: Wire) -> None:
    """
    A FastAPI subclass with a ``__call__`` of its own is behind the edge like any other.
    """

    class Own(fastapi.FastAPI):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await super().__call__(scope, receive, send)

    app = Own()

    @app.get("/x")
    async def x() -> None: ...

    assert call(app, path="/x", headers=[(b"x-request-id", b"42")]).request_id == "42"
    assert wire.server.name == "GET /x"


def test_users_own_roots_are_new_traces(wire: Wire) -> None:
    """
    A root that user code starts in a request has a random trace id of its own, and the request's id as an attribute.
    """
    app = FastAPI()

    @app.get("/x")
    async def x() -> None:
        with trace.get_tracer("user").start_as_current_span("own root", context=otel_context.Context()):
            pass

    @app.websocket("/ws")
    async def ws(websocket: WebSocket) -> None: ...

    call(app, path="/x", headers=[(b"x-request-id", UUID.encode())])
    root = next(span for span in wire.spans if span.name == "own root")
    assert root.context is not None
    assert f"{root.context.trace_id:032x}" != UUID.replace("-", "")
