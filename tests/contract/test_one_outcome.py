"""
How work ended is decided once: a request, a call and ``work`` say the same of the same end.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.trace import SpanKind, StatusCode

from otel_correlation import clients, tasks
from tests.contract.wire import http_scope, wired

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.contract.wire import Wire

ENDS = [
    (asyncio.CancelledError(), "asyncio.exceptions.CancelledError", 0),
    (BaseExceptionGroup("both", [asyncio.CancelledError()]), "BaseExceptionGroup", 0),
    (KeyboardInterrupt(), "KeyboardInterrupt", 0),
    (TimeoutError("late"), "TimeoutError", 1),
    (httpx.ReadTimeout("late"), "httpx.ReadTimeout", 1),
    (ExceptionGroup("two", [ValueError("x")]), "ExceptionGroup", 1),
    (BaseExceptionGroup("both", [asyncio.CancelledError(), ValueError("x")]), "BaseExceptionGroup", 1),
]


@pytest.fixture
def quiet() -> Iterator[Wire]:
    """
    A wired process with clients and tasks.
    """
    with wired(instrument=False) as wire:
        clients.activate(lambda: wire.settings)
        clients.instrument_everything()
        tasks.activate(lambda: wire.settings)
        try:
            yield wire
        finally:
            tasks.deactivate()
            clients.deactivate()


@pytest.mark.parametrize(("error", "kind", "events"), ENDS, ids=lambda value: str(value)[:40] or None)
def test_one_rule(quiet: Wire, error: BaseException, kind: str, events: int) -> None:
    """
    The request, its call, its work and the request's metric have one ``error.type``; who cancels leaves no traceback.
    """
    app = FastAPI()
    reader = InMemoryMetricReader()

    def answer(request: Any) -> Any:
        raise error

    @app.get("/x")
    async def x() -> None:
        with tasks.work("tick"):
            async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
                await client.get("http://orders/")

    async def main() -> None:
        # A task would take an interruption for its own end.
        with contextlib.suppress(BaseException):
            await app(http_scope("GET", "/x"), receive, ignored)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def ignored(message: Any) -> None: ...

    FastAPIInstrumentor.instrument_app(app, meter_provider=MeterProvider([reader], shutdown_on_exit=False))
    asyncio.run(main())
    by_kind = {span.kind: span for span in quiet.spans}
    assert set(by_kind) == {SpanKind.SERVER, SpanKind.CLIENT, SpanKind.INTERNAL}
    for span in by_kind.values():
        assert (span.attributes or {})["error.type"] == kind
        assert len(span.events) == events
        assert span.status.status_code is StatusCode.ERROR
    data: Any = reader.get_metrics_data()
    found = {metric.name: metric for metric in data.resource_metrics[0].scope_metrics[0].metrics}
    (point,) = found["http.server.request.duration"].data.data_points
    assert point.attributes["error.type"] == kind
