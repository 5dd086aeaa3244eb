"""
A service that asks PostgreSQL, Redis and another service in every way that has an official instrumentation.

It knows nothing of tracing: ``opentelemetry-instrument uvicorn databases:app`` does.
"""

from __future__ import annotations

import logging
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
import asyncpg
import psycopg
import redis
import redis.asyncio
import requests
import sqlalchemy
import sqlalchemy.ext.asyncio
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy import text

from otel_correlation import request_id

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

POSTGRES = os.environ["POSTGRES_URL"]
REDIS = os.environ["REDIS_URL"]
# What is asked over HTTP: this service itself, unless the test says otherwise.
PEER = os.environ["PEER_URL"]

log = logging.getLogger("databases")
engine = sqlalchemy.create_engine(POSTGRES.replace("postgresql:", "postgresql+psycopg:"))
async_engine = sqlalchemy.ext.asyncio.create_async_engine(POSTGRES.replace("postgresql:", "postgresql+asyncpg:"))
cache = redis.asyncio.from_url(REDIS)
sync_cache = redis.from_url(REDIS)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
    """
    Make the table that holds a secret.
    """
    with psycopg.connect(POSTGRES) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS account (password text PRIMARY KEY, age integer)")
    yield
    await cache.aclose()
    await async_engine.dispose()


app = FastAPI(lifespan=lifespan)


@app.exception_handler(Exception)
async def failed(_request: Request, error: Exception) -> JSONResponse:
    """
    Answer as this application answers every failure.
    """
    return JSONResponse({"error": type(error).__name__, "request_id": request_id()}, 500)


@app.get("/echo")
async def echo(request: Request) -> dict[str, str]:
    """
    Return the headers that came.
    """
    return dict(request.headers)


@app.get("/sqlalchemy")
def by_sqlalchemy(token: str = "seven") -> Any:
    """
    Ask through SQLAlchemy and psycopg.
    """
    log.info("asking")
    with engine.connect() as connection:
        return connection.execute(text("SELECT CAST(:value AS text)"), {"value": token}).scalar()


@app.get("/sqlalchemy-async")
async def by_sqlalchemy_async(token: str = "seven") -> Any:
    """
    Ask through SQLAlchemy and asyncpg.
    """
    log.info("asking")
    async with async_engine.connect() as connection:
        return (await connection.execute(text("SELECT CAST(:value AS text)"), {"value": token})).scalar()


@app.get("/asyncpg")
async def by_asyncpg(token: str = "seven") -> Any:
    """
    Ask through asyncpg.
    """
    log.info("asking")
    connection = await asyncpg.connect(POSTGRES)
    try:
        return await connection.fetchval("SELECT $1::text", token)
    finally:
        await connection.close()


@app.get("/psycopg")
async def by_psycopg(token: str = "seven") -> Any:
    """
    Ask through psycopg.
    """
    log.info("asking")
    async with await psycopg.AsyncConnection.connect(POSTGRES) as connection:
        found = await (await connection.execute("SELECT %s::text", (token,))).fetchone()
        return found and found[0]


@app.get("/redis")
async def by_redis(token: str = "seven") -> Any:
    """
    Ask Redis.
    """
    log.info("asking")
    await cache.set("answer", token)
    found: bytes = await cache.get("answer")
    return found.decode()


@app.get("/redis-sync")
def by_redis_sync(token: str = "seven") -> Any:
    """
    Ask Redis from a thread.
    """
    log.info("asking")
    sync_cache.set("answer", token)
    found: Any = sync_cache.get("answer")
    return found.decode()


@app.get("/requests")
def by_requests() -> Any:
    """
    Ask another service through requests.
    """
    log.info("asking")
    return requests.get(f"{PEER}/echo", timeout=30).json()


@app.get("/aiohttp")
async def by_aiohttp() -> Any:
    """
    Ask another service through aiohttp.
    """
    log.info("asking")
    async with aiohttp.ClientSession() as session, session.get(f"{PEER}/echo") as response:
        return await response.json()


@app.get("/leak/sqlalchemy")
def leak_by_sqlalchemy(password: str) -> None:
    """
    Fail on a duplicate key; the database quotes it in its error.
    """
    with engine.begin() as connection:
        for _ in range(2):
            connection.execute(text("INSERT INTO account VALUES (:password, 1)"), {"password": password})


@app.get("/leak/sqlalchemy-async")
async def leak_by_sqlalchemy_async(password: str) -> None:
    """
    Fail on a value of the wrong type; the driver quotes it in its error.
    """
    async with async_engine.begin() as connection:
        await connection.execute(text("INSERT INTO account VALUES ('x', :age)"), {"age": password})


@app.get("/leak/asyncpg")
async def leak_by_asyncpg(password: str) -> None:
    """
    Fail on a duplicate key.
    """
    connection = await asyncpg.connect(POSTGRES)
    try:
        async with connection.transaction():
            for _ in range(2):
                await connection.execute("INSERT INTO account VALUES ($1, 1)", password)
    finally:
        await connection.close()


@app.get("/leak/psycopg")
async def leak_by_psycopg(password: str) -> None:
    """
    Fail on a value that is no number; the database quotes it in its error.
    """
    async with await psycopg.AsyncConnection.connect(POSTGRES) as connection:
        await connection.execute("SELECT %s::text::integer", (password,))


@app.get("/leak/null")
async def leak_by_null(password: str) -> None:
    """
    Fail on a missing value; the database quotes the whole row in its error.
    """
    async with await psycopg.AsyncConnection.connect(POSTGRES) as connection:
        await connection.execute("CREATE TEMPORARY TABLE pair (a text, b text NOT NULL)")
        await connection.execute("INSERT INTO pair VALUES (%s, NULL)", (password,))


@app.get("/leak/redis")
async def leak_by_redis(password: str) -> None:
    """
    Fail in a pipeline; the client quotes the command in its error.
    """
    async with cache.pipeline() as pipeline:
        pipeline.set("text", "x")
        pipeline.lpush("text", password)
        await pipeline.execute()
