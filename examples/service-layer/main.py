"""
The routes, and how the layers are put together.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Literal

from fastapi import Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel
from repositories import AuditRepository, OrderRepository, StockRepository
from services import OrderService, PricingService

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

log = logging.getLogger("layers.main")


class Order(BaseModel):
    sku: Literal["lamp", "desk"]
    reference: str


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, OrderService]]:
    path = os.environ.get("DATABASE", "orders.db")
    orders = OrderRepository(path)
    orders.create_tables()
    with ThreadPoolExecutor(max_workers=8) as pool:
        yield {
            "service": OrderService(orders, StockRepository(path), AuditRepository(path), PricingService(pool), pool)
        }


async def order_service(request: Request) -> OrderService:
    service: OrderService = request.state.service
    return service


Service = Annotated[OrderService, Depends(order_service)]

app = FastAPI(title="layers", lifespan=lifespan)


@app.post("/orders", status_code=201)
async def place(order: Order, service: Service) -> dict[str, int]:
    number = await service.place(order.sku, order.reference)
    if number is None:
        raise HTTPException(409, "nothing left")
    log.info("order %d is %s", number, order.reference)
    return {"number": number}


# Not async: FastAPI runs it, and the layers below it, on a thread of its own pool.
@app.get("/orders/{number}")
def look_up(number: int, service: Service) -> dict[str, object]:
    order = service.find(number)
    if order is None:
        raise HTTPException(404, "no such order")
    log.info("showing %s", order["reference"])
    return order
