"""
The end of the month: accounting asks for all its statements at once, while customers go on ordering.

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
STATEMENTS = 6


async def order_until_refused(shop: httpx.AsyncClient) -> httpx.Response:
    while True:
        number = random.randrange(1, 2**31)
        order = {"number": number, "sku": "lamp", "cents": 4900, "card": f"card-{number}"}
        response = await shop.post("/orders", json=order)
        print(f"order {number}: {response.status_code}")
        if response.is_error:
            return response


async def main() -> None:
    async with httpx.AsyncClient(base_url=SHOP, timeout=30, trust_env=False) as shop:
        statements = [
            asyncio.create_task(shop.get(f"/statements/2026-{month:02}")) for month in range(1, STATEMENTS + 1)
        ]
        try:
            refused = await order_until_refused(shop)
        except httpx.ConnectError:
            raise SystemExit(f"nobody listens at {SHOP}: start examples/incident/run.py first") from None
        finally:
            await asyncio.gather(*statements, return_exceptions=True)
    print(f'\nThe customer:   "I got a {refused.status_code}, it says {refused.headers["x-request-id"]}"')
    print(
        f"Who is on call: {Path(sys.executable).with_name('otel-correlation')} find {refused.headers['x-request-id']}"
    )


if __name__ == "__main__":
    asyncio.run(main())
