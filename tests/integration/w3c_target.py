"""
The service that the W3C trace-context harness talks to: it posts on whatever it is told to, and knows no tracing.
"""

from __future__ import annotations

from typing import Any

import httpx
from fastapi import FastAPI

app = FastAPI()


@app.post("/test")
async def post_on(actions: list[dict[str, Any]]) -> dict[str, int]:
    """
    Post each action's arguments to its URL, in order.
    """
    async with httpx.AsyncClient(trust_env=False) as client:
        for action in actions:
            await client.post(action["url"], json=action["arguments"])
    return {"posted": len(actions)}
