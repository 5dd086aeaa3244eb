"""
A service with everything that arms itself again: schedulers, chains of timers, a refresher that a request starts.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.schedulers.background import BackgroundScheduler
from fastapi import BackgroundTasks, FastAPI, Request
from opentelemetry import trace

from otel_correlation import detached, request_id, trace_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

EVERY_S = 0.02
log = logging.getLogger("jobs")
tracer = trace.get_tracer("jobs")
inside = AsyncIOScheduler()
beside = BackgroundScheduler()
seen: dict[str, list[tuple[str | None, str | None]]] = defaultdict(list)
running: set[asyncio.Task[None]] = set()
lazy: list[asyncio.Task[None]] = []


def note(name: str) -> None:
    seen[name].append((request_id(), trace_id()))
    log.info("%s", name)


async def tick(url: str = "") -> None:
    note("tick")
    with tracer.start_as_current_span("tick"):
        if url:
            async with httpx.AsyncClient() as client:
                await client.get(f"{url}/called")


async def remind() -> None:
    note("remind")


def chain() -> None:
    note("call_later")
    asyncio.get_running_loop().call_later(EVERY_S, chain)


def chain_at() -> None:
    loop = asyncio.get_running_loop()
    note("call_at")
    loop.call_at(loop.time() + EVERY_S, chain_at)


def woken() -> None:
    note("call_soon_threadsafe")
    loop = asyncio.get_running_loop()
    loop.call_later(EVERY_S, loop.call_soon_threadsafe, woken)


async def refresh() -> None:
    await asyncio.sleep(0)
    note("task")
    asyncio.get_running_loop().call_later(EVERY_S, refresh_soon)


def refresh_soon() -> None:
    running.add(task := asyncio.create_task(refresh()))
    task.add_done_callback(running.discard)


def rearm() -> None:
    note("Timer")
    timer = threading.Timer(EVERY_S, rearm)
    timer.daemon = True
    timer.start()


async def forever(name: str) -> None:
    while True:
        note(name)
        await asyncio.sleep(EVERY_S)


async def after() -> None:
    for _ in range(3):
        await asyncio.sleep(EVERY_S)
    note("after")
    asyncio.get_running_loop().call_later(EVERY_S, note, "after, armed once")


@asynccontextmanager
async def life(_app: FastAPI) -> AsyncIterator[None]:
    inside.add_job(tick, "interval", seconds=EVERY_S)
    inside.start()
    beside.add_job(note, "interval", ["beside"], seconds=EVERY_S)
    beside.start()
    yield
    inside.shutdown(wait=False)
    beside.shutdown(wait=False)


app = FastAPI(lifespan=life)


@app.get("/seen")
def read_seen() -> Any:
    return seen


@app.get("/called")
def called(request: Request) -> Any:
    seen["called"].append((request.headers.get("x-request-id"), request.headers.get("traceparent", "--").split("-")[1]))


@app.get("/remind")
async def add(request: Request) -> None:
    inside.add_job(tick, "interval", [str(request.base_url).rstrip("/")], seconds=EVERY_S)
    inside.add_job(remind)
    beside.add_job(note, "interval", ["beside"], seconds=EVERY_S)


@app.get("/chains")
async def chains() -> None:
    loop = asyncio.get_running_loop()
    loop.call_later(EVERY_S, chain)
    loop.call_at(loop.time() + EVERY_S, chain_at)
    loop.call_soon_threadsafe(woken)
    loop.call_later(EVERY_S, refresh_soon)
    timer = threading.Timer(EVERY_S, rearm)
    timer.daemon = True
    timer.start()


@app.get("/once")
async def once(background: BackgroundTasks) -> None:
    loop = asyncio.get_running_loop()
    loop.call_later(3 * EVERY_S, note, "call_later")
    threading.Timer(3 * EVERY_S, note, ["Timer"]).start()
    running.add(asyncio.create_task(after()))
    background.add_task(loop.call_later, EVERY_S, note, "background")


@app.get("/lazy")
async def start_lazily() -> None:
    if not lazy:
        with detached():
            lazy.append(asyncio.create_task(forever("lazy")))
