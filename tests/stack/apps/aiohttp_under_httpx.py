"""
Requests of httpx that aiohttp sends, with the official instrumentation of aiohttp beside ours; prints what was seen.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import httpx
from aiohttp import web
from httpx_aiohttp import AiohttpTransport, HttpxAiohttpClient
from opentelemetry import trace
from opentelemetry.instrumentation.aiohttp_client import AioHttpClientInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from otel_correlation import bootstrap, work

exported = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exported))
trace.set_tracer_provider(provider)
bootstrap()
AioHttpClientInstrumentor().instrument()

received: list[list[str]] = []


class Once(httpx.AsyncBaseTransport):
    """
    A cache around aiohttp's transport.
    """

    def __init__(self, inner: httpx.AsyncBaseTransport) -> None:
        self._inner = inner
        self._kept: bytes | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """
        Ask once.
        """
        if self._kept is None:
            response = await self._inner.handle_async_request(request)
            self._kept = await response.aread()
        return httpx.Response(200, content=self._kept)

    async def aclose(self) -> None:
        """
        Close the inner one.
        """
        await self._inner.aclose()


async def answer(request: web.Request) -> web.Response:
    """
    Keep the traceparents of a request.
    """
    received.append(request.headers.getall("traceparent", []))
    return web.Response(text="ok")


async def main() -> dict[str, Any]:
    """
    Send by each way.
    """
    app = web.Application()
    app.router.add_get("/{way}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    url = f"http://127.0.0.1:{port}"
    with work("ways", request_id="the-way-of-the-request"):
        async with HttpxAiohttpClient() as client:
            await client.get(f"{url}/client")
        async with httpx.AsyncClient(transport=Once(AiohttpTransport())) as client:
            await client.get(f"{url}/cached")
            await client.get(f"{url}/cached")
        # Not under httpx: the official instrumentation's own.
        async with aiohttp.ClientSession() as session, session.get(f"{url}/alone"):
            pass
    await runner.cleanup()
    spans = [span for span in exported.get_finished_spans() if span.kind is trace.SpanKind.CLIENT]
    return {
        "received": received,
        "spans": [f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}" for span in spans],
        "scopes": [span.instrumentation_scope.name for span in spans],
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main())))
