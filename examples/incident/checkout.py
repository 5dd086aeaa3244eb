"""
The front door: takes a customer's order, has it paid, and keeps it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx
from database import answer_503, transaction
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, PositiveInt
from sqlalchemy import text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import ASGIApp, Receive, Scope, Send

log = logging.getLogger("shop.checkout")
CARRIER_S = 9.0
PRINTER_S = 60.0


class SmallBodies:
    """
    Refuse bodies of more than 4 kB before anything reads them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = int(dict(scope.get("headers", ())).get(b"content-length", b"0"))
        if length > 4096:
            log.getChild("bodies").warning("refused a body of %d bytes", length)
            await JSONResponse({"detail": "an order is not that long"}, 413)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class Order(BaseModel):
    number: PositiveInt
    sku: str
    cents: PositiveInt
    card: str


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
    async with httpx.AsyncClient(base_url=os.environ["PAYMENTS_URL"], timeout=4) as payments:
        yield {"payments": payments}


app = FastAPI(title="checkout", lifespan=lifespan)
app.add_middleware(SmallBodies)
answer_503(app)


@app.post("/orders", status_code=201)
async def make_order(order: Order, request: Request) -> dict[str, object]:
    log.info("order %d: %s for %d cents", order.number, order.sku, order.cents)
    payment = {"order": order.number, "cents": order.cents, "card": order.card}
    try:
        response = await request.state.payments.post("/payments", json=payment)
    except httpx.TimeoutException:
        log.exception("order %d: payments did not answer in time", order.number)
        raise HTTPException(504, "The payment takes too long.") from None
    except httpx.TransportError:
        log.exception("order %d: payments cannot be reached", order.number)
        raise HTTPException(502, "Payments cannot be reached.") from None
    if response.status_code == 503:
        raise HTTPException(503, "busy, please try again", {"Retry-After": "1"})
    if response.is_error:
        log.error("order %d: payments answered %d", order.number, response.status_code)
        raise HTTPException(502, "The payment failed.")
    async with transaction() as database:
        await database.execute(
            text("INSERT INTO orders (number, sku, card) VALUES (:number, :sku, :card)"),
            order.model_dump(include={"number", "sku", "card"}),
        )
    return {"number": order.number, "payment": response.json()["payment"]}


@app.get("/orders/{number}")
async def get_order(number: int) -> dict[str, object]:
    async with transaction() as database:
        found = (await database.execute(text("SELECT sku FROM orders WHERE number = :n"), {"n": number})).scalar()
    if found is None:
        raise HTTPException(404, "no such order")
    return {"number": number, "sku": found}


@app.get("/orders/{number}/tracking")
async def track(number: int) -> dict[str, object]:
    log.info("order %d: asking the carrier", number)
    await asyncio.sleep(CARRIER_S)
    return {"number": number, "where": "at sea"}


@app.get("/labels/{number}")
async def print_label(number: int) -> dict[str, object]:
    log.info("label %d: waiting for the printer", number)
    # The mistake of this service: a printer's library that blocks, called in a coroutine.
    time.sleep(PRINTER_S)  # noqa: ASYNC251
    return {"number": number}


@app.get("/labels/{number}/barcode")
async def draw_barcode(number: int) -> dict[str, object]:
    log.info("label %d: drawing the barcode", number)
    # The same in native code, which not even a signal interrupts.
    return {"number": number, "checksum": sum(range(10**12))}
