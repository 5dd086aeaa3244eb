"""
A service that enqueues jobs, whose identity they carry.
"""

from __future__ import annotations

import os
import pickle
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from arq import create_pool
from arq.connections import RedisSettings
from arq_app import ids
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from otel_correlation import request_id
from otel_correlation.tasks.arq import serializers

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

REDIS = RedisSettings.from_dsn(os.environ["REDIS_URL"])
FORGED: dict[str, Any] = {
    "traceparent": {"traceparent": "00-" + "0" * 32 + "-00f067aa0ba902b7-01"},
    "request_id": {"X-Request-ID": "forged\r\nid: 1"},
    "oversized": {"traceparent": "x" * 1_000_000, "X-Request-ID": "y" * 1_000_000},
    "no_mapping": 7,
}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    """
    Keep one pool whose jobs carry identities and one whose jobs do not.
    """
    app.state.carrying = await create_pool(REDIS, **serializers())
    app.state.plain = await create_pool(REDIS)
    yield
    await app.state.carrying.aclose()
    await app.state.plain.aclose()


app = FastAPI(lifespan=lifespan)


@app.exception_handler(Exception)
async def failed(_request: Request, error: Exception) -> JSONResponse:
    """
    Answer as this application answers every failure.
    """
    return JSONResponse({"error": type(error).__name__, "request_id": request_id()}, 500)


async def both(job: Any) -> dict[str, Any]:
    """
    Return the identity here and the job's result.
    """
    try:
        there = await job.result(timeout=60, poll_delay=0.05)
    except Exception as error:
        there = type(error).__name__
    return {"here": ids(), "there": there}


@app.get("/run/{function}")
async def run(function: str, *, plain: bool = False) -> dict[str, Any]:
    """
    Enqueue a job.
    """
    arguments = ["hunter2-planted"] if function == "fail" else []
    pool = app.state.plain if plain else app.state.carrying
    return await both(await pool.enqueue_job(function, *arguments))


@app.get("/forged/{kind}")
async def forged(kind: str) -> dict[str, Any]:
    """
    Enqueue a job that somebody else wrote.
    """
    pool = await create_pool(
        REDIS, job_serializer=lambda data: pickle.dumps({**data, "otel_correlation": FORGED[kind]})
    )
    try:
        return await both(await pool.enqueue_job("tell"))
    finally:
        await pool.aclose()
