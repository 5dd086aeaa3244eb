"""
The service's own database: one small pool, and a span for the time that a request waits for one of its connections.
"""

from __future__ import annotations

import os
import time
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

from fastapi.responses import JSONResponse
from opentelemetry import trace
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

import otel_correlation

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import FastAPI, Request

POOL = os.environ["OTEL_SERVICE_NAME"]
SIZE = int(os.environ.get("POOL_SIZE", "2"))

engine = create_async_engine(os.environ["DATABASE_URL"], pool_size=SIZE, max_overflow=0, pool_timeout=1.0)
tracer = trace.get_tracer("incident.database")
# Who has a connection, by request id, and since when. Never more entries than connections.
holders: dict[object, tuple[str, float]] = {}


class NoConnectionError(Exception):
    """
    All connections of the pool stayed in use for as long as a request may wait.
    """


@asynccontextmanager
async def transaction() -> AsyncIterator[AsyncConnection]:
    """
    Lend a connection in a transaction, which is committed at the end.
    """
    begun = time.monotonic()
    in_use = {"db.client.connection.pool.name": POOL, "pool.size": SIZE, "pool.in_use": len(holders)}
    with tracer.start_as_current_span(f"wait for a connection of pool {POOL}", attributes=in_use) as span:
        try:
            connection = await engine.connect()
        except PoolTimeoutError as error:
            now = time.monotonic()
            held = ", ".join(f"{request} for {now - since:.1f} s" for request, since in holders.values())
            raise NoConnectionError(
                f"pool {POOL}: waited {now - begun:.2f} s, {SIZE} of {SIZE} connections in use; held by {held}"
            ) from error
        finally:
            span.set_attribute("pool.waited_ms", round((time.monotonic() - begun) * 1000))
    holders[connection] = (otel_correlation.request_id() or "no request", time.monotonic())
    try:
        async with aclosing(connection), connection.begin():
            yield connection
    finally:
        del holders[connection]


def answer_503(app: FastAPI) -> None:
    """
    Let a request that got no connection end as a 503 that says when to try again.
    """

    @app.exception_handler(NoConnectionError)
    async def busy(_request: Request, _error: Exception) -> JSONResponse:
        return JSONResponse({"detail": "busy, please try again"}, 503, {"Retry-After": "1"})
