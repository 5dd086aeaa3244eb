"""
A service with asgi-correlation-id, as its documentation says to use it; no OpenTelemetry.
"""

from __future__ import annotations

import logging
import os
from uuid import UUID

import httpx
from asgi_correlation_id import CorrelationIdFilter, CorrelationIdMiddleware, correlation_id
from asgi_correlation_id.middleware import is_valid_uuid4
from fastapi import FastAPI, Request

console = logging.StreamHandler()
console.addFilter(CorrelationIdFilter(default_value="-"))
logging.basicConfig(
    level=logging.INFO, format="%(levelname)s %(name)s [%(correlation_id)s] %(message)s", handlers=[console]
)
logging.getLogger("httpx").setLevel(logging.WARNING)
log = logging.getLogger("chain.billing")


def is_uuid4(value: str) -> bool:
    """
    What the default validator was in version 4.3.4, and what many a service wrote itself.
    """
    try:
        return UUID(value).version == 4
    except ValueError:
        return False


# The default of version 5 takes everything that UUID() reads, None takes everything.
VALIDATORS = {"default": is_valid_uuid4, "uuid4": is_uuid4, "none": None}

ledger = httpx.AsyncClient(base_url=os.environ.get("LEDGER_URL", "http://127.0.0.1:8004"))

app = FastAPI(title="billing")
app.add_middleware(CorrelationIdMiddleware, validator=VALIDATORS[os.environ.get("VALIDATOR", "default")])


@app.post("/orders")
async def bill(request: Request) -> list[dict[str, str]]:
    request_id = correlation_id.get() or ""
    log.info("an invoice")
    response = await ledger.post("/orders", json=await request.json(), headers={"X-Request-ID": request_id})
    response.raise_for_status()
    return [{"service": "billing", "request_id": request_id}, *response.json()]
