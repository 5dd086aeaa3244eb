"""
The service of the hostile soak: it answers anything, and says what it holds.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from otel_correlation import request_id, stats

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

log = logging.getLogger("soak")

app = FastAPI()


@app.get("/state")
async def state() -> dict[str, Any]:
    """
    Return how many tasks and objects there are, and the counters of what was dropped.
    """
    gc.collect()
    return {
        "tasks": len(asyncio.all_tasks()),
        "objects": len(gc.get_objects()),
        "blocks": sys.getallocatedblocks(),
        "stats": stats(),
    }


@app.post("/body")
async def body(request: Request) -> dict[str, int]:
    """
    Read the whole body; the client may leave first.
    """
    try:
        return {"bytes": len(await request.body())}
    except ClientDisconnect:
        return {"bytes": -1}


@app.get("/stream")
async def stream() -> StreamingResponse:
    """
    Send some pieces, a moment apart.
    """

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(8):
            yield b"x" * 4096
            await asyncio.sleep(0.001)

    return StreamingResponse(pieces())


@app.get("/slow")
async def slow() -> dict[str, str | None]:
    """
    Answer a moment later.
    """
    await asyncio.sleep(0.005)
    return {"id": request_id()}


@app.get("/{rest:path}")
async def anything(rest: str, request: Request) -> dict[str, str | None]:
    """
    Answer with the request id that the handler sees; log what the caller sent.
    """
    log.info(
        "asked for %s with %s",
        rest[:200],
        request.url.query[:200],
        extra={"agent": request.headers.get("user-agent", "")[:200]},
    )
    return {"id": request_id()}
