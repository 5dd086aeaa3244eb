"""
The service of the soak: each request logs its own token from every place where a service runs code.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated

from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi.responses import StreamingResponse

from otel_correlation import bind, request_id, trace_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LINES_PER_REQUEST = 21  # What one request logs below; its summary line comes on top.

log = logging.getLogger("soak")
pool = ThreadPoolExecutor(8, thread_name_prefix="soak")


class Gauge:
    """
    How many requests run in this process, and how many did at most.
    """

    running = 0
    peak = 0


@contextlib.asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """
    Tell the most requests that ran at once when the process ends.
    """
    yield
    log.info("peak %d", Gauge.peak)


app = FastAPI(lifespan=lifespan)


def say(token: str, place: str) -> None:
    """
    Log one line that says which request it belongs to.
    """
    log.info("soak %s %s", token, place)


async def pause() -> None:
    """
    Let other requests run.
    """
    await asyncio.sleep(random.random() * 0.05)


async def dependency(token: str) -> AsyncIterator[str]:
    """
    Log before and after the endpoint.
    """
    Gauge.running += 1
    Gauge.peak = max(Gauge.peak, Gauge.running)
    bind(token=token)  # The summary line names the route only.
    say(token, "dependency")
    yield token
    say(token, "dependency after")


def sync_dependency(token: str) -> str:
    """
    Log from the thread pool of the framework.
    """
    say(token, "sync dependency")
    return token


async def part(token: str, place: str) -> None:
    """
    Log from a task of its own, before and after others ran.
    """
    await pause()
    say(token, place)


@app.get("/soak/{token}")
async def soak(
    token: Annotated[str, Depends(dependency)],
    _sync: Annotated[str, Depends(sync_dependency)],
    seen: Annotated[str | None, Depends(request_id)],
    background: BackgroundTasks,
) -> StreamingResponse:
    """
    Log from everywhere; the body is the token and both ids as the handler saw them.
    """
    say(token, "endpoint")
    task = asyncio.create_task(part(token, "task"))
    await pause()
    say(token, "endpoint later")
    await asyncio.gather(*(part(token, f"gather {number}") for number in range(3)))
    await asyncio.to_thread(say, token, "to_thread")
    loop = asyncio.get_running_loop()
    await asyncio.gather(*(loop.run_in_executor(pool, say, token, f"executor {number}") for number in range(2)))
    called = asyncio.Event()

    def call() -> None:
        say(token, "call_later")
        called.set()

    loop.call_later(0.01, call)
    await asyncio.wrap_future(pool.submit(say, token, "submit"))
    thread = threading.Thread(target=say, args=(token, "thread"))
    thread.start()
    async with asyncio.TaskGroup() as group:
        group.create_task(part(token, "group 1"))
        group.create_task(part(token, "group 2"))
    await called.wait()
    await task
    await asyncio.to_thread(thread.join)
    background.add_task(part, token, "background")
    background.add_task(say, token, "sync background")
    ids = f"{token} {seen} {trace_id()}"

    async def body() -> AsyncIterator[str]:
        for piece in ids.partition(" "):
            await pause()
            yield piece
        say(token, "stream")
        Gauge.running -= 1

    say(token, "endpoint end")
    return StreamingResponse(body(), background=background)
