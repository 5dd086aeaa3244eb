"""
The front door: takes a customer's checkout and passes it on as an order.
"""

from __future__ import annotations

import logging
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx
from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel, PositiveInt

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

log = logging.getLogger("shop.gateway")


class Checkout(BaseModel):
    sku: str
    quantity: PositiveInt = 1


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
    async with httpx.AsyncClient(base_url=os.environ.get("ORDERS_URL", "http://127.0.0.1:8002")) as orders:
        yield {"orders": orders}


app = FastAPI(title="gateway", lifespan=lifespan)


@app.post("/checkout", status_code=201)
async def check_out(checkout: Checkout, request: Request) -> dict[str, object]:
    log.info("checkout of %d x %s", checkout.quantity, checkout.sku)
    response = await request.state.orders.post("/orders", json=checkout.model_dump())
    if response.is_error:
        log.error("no order was made: orders answered %d", response.status_code)
        raise HTTPException(502, "The order could not be made. Please quote the X-Request-ID of this response.")
    order: dict[str, object] = response.json()
    return order
