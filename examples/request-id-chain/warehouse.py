"""
A legacy service: plain Starlette, no OpenTelemetry. Somebody taught it to log X-Request-ID and to send it on, no more.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import httpx
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

if TYPE_CHECKING:
    from starlette.requests import Request

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
logging.getLogger("httpx").setLevel(logging.WARNING)
log = logging.getLogger("chain.warehouse")

billing = httpx.AsyncClient(base_url=os.environ.get("BILLING_URL", "http://127.0.0.1:8003"))


async def order(request: Request) -> JSONResponse:
    request_id = request.headers.get("x-request-id", "-")
    log.info("[%s] packing", request_id)
    response = await billing.post("/orders", json=await request.json(), headers={"X-Request-ID": request_id})
    log.info("[%s] billing answered %d", request_id, response.status_code)
    response.raise_for_status()
    return JSONResponse([{"service": "warehouse", "request_id": request_id}, *response.json()])


app = Starlette(routes=[Route("/orders", order, methods=["POST"])])
