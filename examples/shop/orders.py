"""
Makes an order once the inventory has reserved its items.
"""

from __future__ import annotations

import itertools
import logging
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx
from fastapi import FastAPI, Request
from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

log = logging.getLogger("shop.orders")
numbers = itertools.count(1001)


class Order(BaseModel):
    sku: str
    quantity: int


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
    async with httpx.AsyncClient(base_url=os.environ.get("INVENTORY_URL", "http://127.0.0.1:8003")) as inventory:
        yield {"inventory": inventory}


app = FastAPI(title="orders", lifespan=lifespan)


@app.post("/orders", status_code=201)
async def make_order(order: Order, request: Request) -> dict[str, object]:
    response = await request.state.inventory.post("/reservations", json=order.model_dump())
    response.raise_for_status()
    number = next(numbers)
    log.info("order %d is made", number)
    return {"order": number, **response.json()}
