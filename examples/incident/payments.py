"""
Takes money from cards, and books it in the ledger.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx
from database import answer_503, transaction
from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel
from sqlalchemy import text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

log = logging.getLogger("shop.payments")


class Payment(BaseModel):
    order: int
    cents: int
    card: str


class Answer(BaseModel):
    """
    What the card network says.
    """

    card: str
    charged: bool


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
    async with httpx.AsyncClient(base_url=os.environ["LEDGER_URL"], timeout=3) as ledger:
        yield {"ledger": ledger}


app = FastAPI(title="payments", lifespan=lifespan)
answer_503(app)


async def charge(payment: Payment) -> None:
    """
    Charge a card, as the test mode of a card network does: some cards are slow, and some break things.
    """
    if payment.card.startswith("slow-"):
        await asyncio.sleep(8)
    answer = {"card": payment.card, "charged": payment.card if payment.card.startswith("odd-") else True}
    if not Answer.model_validate(answer).charged:
        raise HTTPException(402, "the card was declined")


@app.post("/payments", status_code=201)
async def pay(payment: Payment, request: Request) -> dict[str, object]:
    await charge(payment)
    response = await request.state.ledger.post("/entries", json={"order": payment.order, "cents": payment.cents})
    if response.status_code == 503:
        raise HTTPException(503, "busy, please try again", {"Retry-After": "1"})
    response.raise_for_status()
    async with transaction() as database:
        statement = text("INSERT INTO payments (order_number, cents) VALUES (:order, :cents) RETURNING id")
        number = (await database.execute(statement, payment.model_dump(include={"order", "cents"}))).scalar_one()
    log.info("payment %d of %d cents", number, payment.cents)
    return {"payment": number}
