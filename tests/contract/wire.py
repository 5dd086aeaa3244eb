"""
ASGI messages by hand, and a process that is wired as bootstrap does it, without exporters.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from otel_correlation import guard, ids, propagators
from otel_correlation.edge import _fastapi as plug
from otel_correlation.ids import CorrelationIdGenerator
from otel_correlation.sampling import RatioSampler
from otel_correlation.settings import Settings, with_overrides

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from opentelemetry.sdk.trace.sampling import Sampler

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{CALLER}-01".encode()
UUID = "f4a2b3c1-dead-beef-0000-aabbccddeeff"

Headers = list[tuple[bytes, bytes]]


class LightProcessor(SpanProcessor):
    """
    A processor of ours: it takes light spans.
    """

    accepts_light_spans = True

    def __init__(self, spans: list[ReadableSpan]) -> None:
        self._spans = spans

    def on_end(self, span: ReadableSpan) -> None:
        self._spans.append(span)


class _ListExporter(InMemorySpanExporter):
    def __init__(self, spans: list[ReadableSpan]) -> None:
        super().__init__()
        self._spans = spans

    def export(self, spans: Sequence[ReadableSpan]) -> Any:
        self._spans.extend(spans)
        return super().export(spans)


class Wire:
    """
    A process with our edge under FastAPI, and every span that ended in it.
    """

    def __init__(self, kind: str, **settings: Any) -> None:
        self.kind = kind
        self.settings = with_overrides(Settings(), settings)
        self.spans: list[ReadableSpan] = []
        self.provider = self.new_provider(self.spans, RatioSampler(self.settings.ratio))

    def new_provider(self, spans: list[ReadableSpan], sampler: Sampler | None = None) -> TracerProvider:
        """
        Return a provider whose spans end in ``spans``, with light spans or with the SDK's.
        """
        provider = TracerProvider(
            sampler=sampler or RatioSampler(1.0), id_generator=CorrelationIdGenerator(), shutdown_on_exit=False
        )
        light = self.kind == "light"
        provider.add_span_processor(LightProcessor(spans) if light else SimpleSpanProcessor(_ListExporter(spans)))
        return provider

    def configure(self, **settings: Any) -> None:
        """
        Change settings, as a second ``bootstrap(...)`` does.
        """
        ratio = self.settings.ratio
        self.settings = with_overrides(self.settings, settings)
        if self.settings.ratio != ratio:
            self.provider.sampler = RatioSampler(self.settings.ratio)
            for tracer in self.provider._tracers.values():
                tracer.sampler = self.provider.sampler
        textmap = propagators.build(self.settings)
        propagate.set_global_textmap(textmap)
        plug.activate(lambda: self.settings, textmap=textmap)
        plug.refresh()

    @property
    def servers(self) -> list[ReadableSpan]:
        """
        The SERVER spans, in the order of their ends.
        """
        return [span for span in self.spans if span.kind is SpanKind.SERVER]

    @property
    def server(self) -> ReadableSpan:
        """
        The only SERVER span.
        """
        (span,) = self.servers
        return span

    def clear(self) -> None:
        """
        Forget the spans so far.
        """
        self.spans.clear()


@contextlib.contextmanager
def wired(kind: str = "light", *, instrument: bool = True, **settings: Any) -> Iterator[Wire]:
    """
    Set a process up, and put it back as it was.
    """
    provider, textmap = trace._TRACER_PROVIDER, propagate.get_global_textmap()
    reuse = ids.reuse_guard
    wire = Wire(kind, **settings)
    trace._TRACER_PROVIDER = wire.provider
    ids.reuse_guard = ids.ReuseGuard()
    guard.reset()
    try:
        wire.configure()
        if instrument:
            plug.instrument_everything()
        yield wire
    finally:
        plug.deactivate()
        trace._TRACER_PROVIDER = provider
        propagate.set_global_textmap(textmap)
        ids.reuse_guard = reuse


@dataclass
class Reply:
    """
    What an application sent for one request.
    """

    status: int = 0
    headers: Headers = field(default_factory=list)
    body: bytes = b""
    messages: list[Any] = field(default_factory=list)
    error: BaseException | None = None

    def all(self, name: str) -> list[str]:
        """
        Return every value of one header.
        """
        return [value.decode("latin-1") for key, value in self.headers if key.lower() == name.encode()]

    @property
    def request_id(self) -> str:
        """
        The one request id of the response.
        """
        (value,) = self.all("x-request-id")
        return value


def http_scope(method: str = "GET", path: str = "/", headers: Headers | None = None, **more: Any) -> dict[str, Any]:
    """
    Return an HTTP scope as uvicorn makes it.
    """
    path, _, query = path.partition("?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 50000),
        "scheme": "http",
        "method": method,
        "root_path": "",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(b"host", b"shop.example:8080"), (b"user-agent", b"test/1"), *(headers or [])],
        "state": {},
        **more,
    }


async def exchange(app: Any, scope: dict[str, Any], body: bytes = b"") -> Reply:
    """
    Send one request and collect what comes back; an exception of the application is kept in the reply.
    """
    reply = Reply()
    sent = False
    done = asyncio.Event()

    async def receive() -> Any:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        await done.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        reply.messages.append(message)
        if message["type"] == "http.response.start":
            reply.status, reply.headers = message["status"], list(message.get("headers", []))
        elif message["type"] == "http.response.body":
            reply.body += message.get("body", b"")
            if not message.get("more_body"):
                done.set()

    try:
        await app(scope, receive, send)
    except Exception as error:
        reply.error = error
    return reply


def call(app: Any, method: str = "GET", path: str = "/", headers: Headers | None = None, **more: Any) -> Reply:
    """
    Make one request, in an event loop of its own.
    """
    body = more.pop("body", b"")
    return asyncio.run(exchange(app, http_scope(method, path, headers, **more), body))


def websocket_scope(path: str = "/ws", headers: Headers | None = None, *, denial: bool = True) -> dict[str, Any]:
    """
    Return a WebSocket scope as uvicorn makes it.
    """
    scope = http_scope("GET", path, headers, scheme="ws", subprotocols=[])
    scope.update(type="websocket", extensions={"websocket.http.response": {}} if denial else {})
    del scope["method"]
    return scope


async def talk(app: Any, scope: dict[str, Any], messages: Sequence[Any] = ()) -> Reply:
    """
    Open a WebSocket, send ``messages`` after the handshake, and collect what comes back.
    """
    reply = Reply()
    waiting = [{"type": "websocket.connect"}, *messages]

    async def receive() -> Any:
        return waiting.pop(0) if waiting else {"type": "websocket.disconnect", "code": 1006}

    async def send(message: Any) -> None:
        reply.messages.append(message)
        if "headers" in message:
            reply.headers = list(message["headers"])
        reply.status = message.get("status", reply.status)

    try:
        await app(scope, receive, send)
    except Exception as error:
        reply.error = error
    return reply


def open_socket(
    app: Any, *messages: Any, path: str = "/ws", headers: Headers | None = None, denial: bool = True
) -> Reply:
    """
    Hold one WebSocket conversation, in an event loop of its own.
    """
    return asyncio.run(talk(app, websocket_scope(path, headers, denial=denial), messages))
