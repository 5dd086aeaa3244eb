"""
What users write; it must type-check under mypy and pyright strict. Nothing here is run.
"""

from __future__ import annotations

import logging
from typing import Annotated

from fastapi import Depends, FastAPI

import otel_correlation
from otel_correlation import (
    ConfigError,
    IdsFilter,
    IdsFormatter,
    bind,
    bootstrap,
    carried,
    continue_from,
    detached,
    edge,
    flush,
    inject,
    log_config,
    request_id,
    stats,
    trace_id,
    work,
)
from otel_correlation.testing import Telemetry

app = FastAPI()
bootstrap(app)
bootstrap(app, ratio=0.1, response_header="X-Correlation-ID")
wrapped = edge(app)
version: str = otel_correlation.__version__


@app.get("/")
async def read(
    rid: Annotated[str | None, Depends(request_id)], tid: Annotated[str | None, Depends(trace_id)]
) -> dict[str, str | None]:
    """
    Use the ids as dependencies.
    """
    bind(user_id=7, plan="gold")
    return {"request_id": rid, "trace_id": tid, "same": otel_correlation.request_id()}


def counted() -> int:
    """
    Read a counter, and handle a wrong setting.
    """
    try:
        bootstrap(ratio=2.0)
    except ConfigError as error:
        print(error)
    return stats().get("request_id.refused", 0)


def start() -> None:
    """
    Start what is for all requests.
    """
    with detached():
        print(request_id())
    sent: bool = flush(timeout_s=2)
    print(sent, flush(2))


@work("tick", attributes={"job": 7})
async def tick(number: int) -> str:
    """
    Run with an identity of its own.
    """
    with work("step", request_id="order-4711") as span:
        span.set_attribute("number", number)
    async with work("other"):
        return str(number)


def render(page: int, *, wide: bool = False) -> bytes:
    """
    Run in another process.
    """
    return f"{page} {wide}".encode()


def messages() -> bytes:
    """
    Send, receive, and call another process.
    """
    headers: dict[str, str] = inject()
    mine: dict[str, str] = inject({"content-type": "json"})
    with continue_from(headers, "consume", link=True), continue_from([("traceparent", b"00")]):
        pass
    with continue_from(None), continue_from({b"traceparent": b"00"}), continue_from(mine):
        pass
    return carried(render)(7, wide=True)


def lines() -> dict[str, object]:
    """
    Name the ids in a format.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(IdsFormatter("{request_id} {message}", style="{", defaults={"tenant": "-"}))
    handler.addFilter(IdsFilter())
    return {**log_config(), **log_config("text", level="WARNING")}


def test_my_service(telemetry: Telemetry) -> None:
    """
    Use the pytest fixture.
    """
    assert telemetry.span("GET /").name == "GET /"
    assert [record.getMessage() for record in telemetry.records] == []
