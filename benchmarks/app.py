"""
The service under load: the same file for every variant, and nothing in it knows of telemetry.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx
from fastapi import FastAPI, Request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

if os.environ.get("BENCH_LOGGING") != "none":
    logging.basicConfig(level="INFO", stream=sys.stdout, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel("WARNING")

log = logging.getLogger("bench")


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
    async with httpx.AsyncClient(base_url=os.environ["BENCH_UPSTREAM"]) as upstream:
        yield {"upstream": upstream}


app = FastAPI(lifespan=lifespan)


@app.get("/hello/{name}")
async def hello(name: str) -> dict[str, str]:
    log.info("hello begins")
    log.info("hello %s", name)
    return {"hello": name}


@app.get("/hop")
async def hop(request: Request) -> dict[str, int]:
    response = await request.state.upstream.get("/stock/4711")
    return {"status": response.status_code}
