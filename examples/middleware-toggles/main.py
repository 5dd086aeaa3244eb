"""
One service behind authentication and CORS. Its tracing is switched by the environment alone; no line here does it.
"""

from __future__ import annotations

import logging
import os
import secrets
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated

import httpx
from fastapi import BackgroundTasks, Depends, FastAPI, Request, WebSocket
from fastapi.middleware.cors import CORSMiddleware
from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, SimpleUser
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.responses import JSONResponse

from otel_correlation import bind, request_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import HTTPConnection

log = logging.getLogger("toggles")

TOKENS = {"t-alice": "alice", "t-bob": "bob"}
# The scripts of this page may call us from a browser.
SHOP = "https://shop.example"


class BearerToken(AuthenticationBackend):
    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser]:
        scheme, _, token = conn.headers.get("authorization", "").partition(" ")
        for known, customer in TOKENS.items():
            if scheme.lower() == "bearer" and secrets.compare_digest(token.encode(), known.encode()):
                bind(customer=customer)
                return AuthCredentials(["customer"]), SimpleUser(customer)
        log.warning("nobody we know")
        raise AuthenticationError("a bearer token is needed")


def refuse(_conn: HTTPConnection, error: AuthenticationError) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 401, {"WWW-Authenticate": "Bearer"})


cors = Middleware(
    CORSMiddleware,
    allow_origins=[SHOP],
    allow_headers=["Authorization", "X-Request-ID"],
    expose_headers=["Retry-After"],
)
authentication = Middleware(AuthenticationMiddleware, backend=BearerToken(), on_error=refuse)
# The first one is the outermost. Authentication outside of CORS refuses the browser's preflights, which carry no token.
outside_in = [authentication, cors] if os.environ.get("OUTSIDE") == "authentication" else [cors, authentication]


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
    log.info("no request yet: %s", request_id())
    async with httpx.AsyncClient(base_url=os.environ.get("MAILER_URL", "http://127.0.0.1:8000")) as mailer:
        yield {"mailer": mailer}


app = FastAPI(title="toggles", lifespan=lifespan, middleware=outside_in)

RequestId = Annotated[str | None, Depends(request_id)]


async def send_receipt(mailer: httpx.AsyncClient, number: int, authorization: str) -> None:
    """
    Run when the response is out; this line, this call and the span around it still belong to the request.
    """
    log.info("the receipt of order %d is for %s", number, request_id())
    try:
        response = await mailer.post("/receipts", json={"order": number}, headers={"Authorization": authorization})
    except httpx.TransportError:
        log.exception("no receipt for order %d", number)
    else:
        log.info("the mailer answered %d", response.status_code)


@app.get("/orders/{number}")
async def order(number: int, rid: RequestId, request: Request, background: BackgroundTasks) -> dict[str, object]:
    log.info("order %d is looked up", number)
    background.add_task(send_receipt, request.state.mailer, number, request.headers["authorization"])
    return {
        "order": number,
        "dependency": rid,
        # For code that has nothing but the request, such as middleware:
        "state": getattr(request.state, "request_id", None),
        "header": request.headers.get("x-request-id"),
    }


@app.post("/receipts", status_code=202)
async def receipt() -> dict[str, str]:
    log.info("a receipt is on its way")
    return {}


@app.get("/boom")
async def boom() -> None:
    raise RuntimeError("nobody caught this")


@app.websocket("/prices")
async def prices(socket: WebSocket, rid: RequestId) -> None:
    """
    The first message tells the id, because a browser's script cannot read the headers of the handshake.
    """
    await socket.accept()
    await socket.send_json({"request_id": rid})
    async for sku in socket.iter_text():
        log.info("a price is asked for")
        await socket.send_json({"sku": sku, "request_id": request_id()})
    log.info("the watcher left")
