"""
What the tests of the clients share: our attempts switched on for one test, and the four ways to send a request.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import httpx2
from opentelemetry import context as otel_context
from opentelemetry import propagate
from opentelemetry.instrumentation.httpx import HTTPX2ClientInstrumentor, HTTPXClientInstrumentor
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from otel_correlation import clients, identity, propagators
from otel_correlation.ids import CorrelationIdGenerator
from otel_correlation.propagators import TraceState
from otel_correlation.sampling import RatioSampler
from otel_correlation.settings import from_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import ModuleType

    from opentelemetry.sdk.trace import ReadableSpan

TRACE_ID = 0x0AF7651916CD43DD8448EB211C80319C
SPAN_ID = 0xB7AD6B7169203331
REQUEST_ID = "0af7651916cd43dd8448eb211c80319c"
INSTRUMENTORS = {"httpx": HTTPXClientInstrumentor, "httpx2": HTTPX2ClientInstrumentor}


class Spans(SpanProcessor):
    """
    Keeps ended spans; takes light ones, as our own pipeline does.
    """

    accepts_light_spans = True

    def __init__(self) -> None:
        self.ended: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        """
        Keep the span.
        """
        self.ended.append(span)


class Probe:
    """
    One test's provider, and what came out of it.
    """

    def __init__(self, *, light: bool = True) -> None:
        self._sink = Spans()
        # Without our id generator the SDK makes the span itself.
        generator = CorrelationIdGenerator() if light else None
        self.provider = TracerProvider(sampler=RatioSampler(1.0), id_generator=generator, shutdown_on_exit=False)
        self.provider.add_span_processor(self._sink)

    @property
    def spans(self) -> list[Any]:
        """
        The ended spans, in the order of their end.
        """
        return list(self._sink.ended)

    @property
    def span(self) -> Any:
        """
        The only span.
        """
        (found,) = self._sink.ended
        return found


def traceparent(span: Any) -> str:
    """
    Return the header that names this span.
    """
    found: SpanContext = span.get_span_context()
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}"


@contextmanager
def attempts(probe: Probe, *, environ: dict[str, str] | None = None, **options: Any) -> Iterator[Probe]:
    """
    Trace every client of both libraries inside the block, and leave everything as it was.
    """
    settings = from_environment(environ or {})
    before = propagate.get_global_textmap()
    propagate.set_global_textmap(propagators.build(settings))
    clients.activate(lambda: settings)
    try:
        for instrumentor in INSTRUMENTORS.values():
            instrumentor().instrument(tracer_provider=probe.provider, skip_dep_check=True, **options)
        yield probe
    finally:
        clients.deactivate()
        propagate.set_global_textmap(before)


@contextmanager
def request(*, sampled: bool = True, traced: bool = True, state: Sequence[tuple[str, str]] = ()) -> Iterator[None]:
    """
    Run the block as inside of a request, with or without a trace.
    """
    context = identity.set_in(otel_context.Context(), identity.Identity(REQUEST_ID))
    if traced:
        parent = SpanContext(
            TRACE_ID, SPAN_ID, is_remote=False, trace_flags=TraceFlags(int(sampled)), trace_state=TraceState(state)
        )
        context = set_span_in_context(NonRecordingSpan(parent), context)
    token = otel_context.attach(context)
    try:
        yield
    finally:
        otel_context.detach(token)


class Side:
    """
    One of the four ways to send: a library, synchronously or not.
    """

    def __init__(self, library: ModuleType, *, is_async: bool) -> None:
        self.library: Any = library
        self.is_async = is_async

    def __repr__(self) -> str:
        return f"{self.library.__name__}-{'async' if self.is_async else 'sync'}"

    def mock(self, handler: Callable[[Any], Any]) -> Any:
        """
        Return a transport that answers by this function.
        """
        return self.library.MockTransport(handler)

    def client(self, transport: Any = None, **options: Any) -> Any:
        """
        Return a client of this side.
        """
        kind = self.library.AsyncClient if self.is_async else self.library.Client
        return kind(transport=transport, trust_env=False, **options)

    def fetch(
        self, transport: Any, url: str = "http://orders:8001/items/3", *, method: str = "GET", **options: Any
    ) -> Any:
        """
        Send one request with a client of its own; return the response, read.
        """
        sending = {
            name: options.pop(name) for name in ("headers", "content", "auth", "follow_redirects") if name in options
        }
        with_client = self.client(transport, **options)
        return self.run(with_client, lambda client: client.request(method, url, **sending))

    def send(self, client: Any, *requests: Any, **options: Any) -> list[Any]:
        """
        Send these request objects in order, in one client.
        """
        if self.is_async:

            async def job() -> list[Any]:
                async with client:
                    return [await client.send(each, **options) for each in requests]

            return asyncio.run(job())
        with client:
            return [client.send(each, **options) for each in requests]

    def run(self, client: Any, job: Callable[[Any], Any]) -> Any:
        """
        Run a job with an open client; its awaitable result is awaited.
        """
        if self.is_async:

            async def inside() -> Any:
                async with client:
                    return await job(client)

            return asyncio.run(inside())
        with client:
            return job(client)


SIDES = [Side(library, is_async=is_async) for library in (httpx, httpx2) for is_async in (False, True)]
