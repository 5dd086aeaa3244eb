"""
The end of the month: accounting asks for one statement after the other, while customers go on ordering.

Prints what one customer quotes: the request id of a response that was a 503.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from pathlib import Path

import httpx

SHOP = f"http://127.0.0.1:{os.environ.get('NGINX_PORT', '8080')}"
ACCOUNTANTS = 4


async def ask_for_statements(shop: httpx.AsyncClient, over: asyncio.Event) -> None:
    while not over.is_set():
        await shop.get(f"/statements/2026-{random.randrange(1, 13):02}")


async def order_until_refused(shop: httpx.AsyncClient) -> httpx.Response:
    while True:
        number = random.randrange(1, 2**31)
        order = {"number": number, "sku": "lamp", "cents": 4900, "card": f"card-{number}"}
        response = await shop.post("/orders", json=order)
        print(f"order {number}: {response.status_code}")
        if response.status_code == 503:
            return response


async def main() -> None:
    over = asyncio.Event()
    async with httpx.AsyncClient(base_url=SHOP, timeout=30, trust_env=False) as shop, asyncio.TaskGroup() as group:
        for _ in range(ACCOUNTANTS):
            group.create_task(ask_for_statements(shop, over))
        refused = await order_until_refused(shop)
        over.set()
        request_id = refused.headers["x-request-id"]
        print(f'\nThe customer:   "I got a {refused.status_code}, it says {request_id}"')
        print(f"Who is on call: {Path(sys.executable).with_name('otel-correlation')} find {request_id}", flush=True)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except* httpx.TransportError as errors:
        raise SystemExit(
            f"no answer from {SHOP} ({errors.exceptions[0]!r}): is examples/incident/run.py running?"
        ) from None
