"""
Knows what is in stock, and for how many days it will last.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

log = logging.getLogger("shop.inventory")


@dataclass
class Item:
    on_hand: int
    sold_last_30_days: int

    def days_left(self) -> int:
        return self.on_hand * 30 // self.sold_last_30_days


# The chair is new in the catalogue: nobody has bought one yet.
STOCK = {"lamp": Item(120, 60), "desk": Item(8, 12), "chair-2027": Item(25, 0)}


class Reservation(BaseModel):
    sku: str
    quantity: int


app = FastAPI(title="inventory")


@app.post("/reservations", status_code=201)
def reserve(reservation: Reservation) -> dict[str, object]:
    item = STOCK.get(reservation.sku)
    if item is None or item.on_hand < reservation.quantity:
        raise HTTPException(409, "not in stock")
    log.info("reserving %d of %d x %s", reservation.quantity, item.on_hand, reservation.sku)
    days = item.days_left()
    item.on_hand -= reservation.quantity
    return {"sku": reservation.sku, "reserved": reservation.quantity, "days_left": days}
