"""
The books: every payment is an entry, and accounting asks for statements at the end of the month.
"""

from __future__ import annotations

import asyncio
import logging

from database import answer_503, transaction
from fastapi import FastAPI
from pydantic import BaseModel
from sqlalchemy import text

log = logging.getLogger("shop.ledger")
RENDER_S = 5.0


class Entry(BaseModel):
    order: int
    cents: int


app = FastAPI(title="ledger")
answer_503(app)


@app.post("/entries", status_code=201)
async def book(entry: Entry) -> dict[str, int]:
    async with transaction() as database:
        await database.execute(
            text("INSERT INTO entries (order_number, cents) VALUES (:order, :cents)"), entry.model_dump()
        )
    return {"order": entry.order}


@app.get("/statements/{month}")
async def statement(month: str) -> dict[str, object]:
    async with transaction() as database:
        total = (await database.execute(text("SELECT coalesce(sum(cents), 0) FROM entries"))).scalar_one()
        log.info("statement of %s: making the PDF", month)
        # The mistake of this service: the connection is kept while something else than the database is busy.
        await asyncio.sleep(RENDER_S)
    return {"month": month, "cents": total}
