"""
The front door: takes an order and passes it on. Under otel-correlation, without a line about ids.
"""

from __future__ import annotations

import logging
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx
from fastapi import FastAPI, Request
from pydantic import BaseModel, PositiveInt

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

log = logging.getLogger("chain.gateway")


class Order(BaseModel):
    sku: str
    quantity: PositiveInt = 1


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
    async with httpx.AsyncClient(base_url=os.environ.get("WAREHOUSE_URL", "http://127.0.0.1:8002")) as warehouse:
        yield {"warehouse": warehouse}


app = FastAPI(title="gateway", lifespan=lifespan)


@app.post("/orders", status_code=201)
async def take_order(order: Order, request: Request) -> list[dict[str, str]]:
    log.info("an order of %d x %s", order.quantity, order.sku)
    response = await request.state.warehouse.post("/orders", json=order.model_dump())
    # What is behind us failed: an unhandled 500, whose response has the id all the same.
    response.raise_for_status()
    seen: list[dict[str, str]] = response.json()
    return [{"service": "gateway", "request_id": request.headers.get("x-request-id", "")}, *seen]
