"""
``bind`` from wherever a request's code runs reaches its summary line and its SERVER span.
"""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import Service, clean_environment

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

APP = """
import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

from fastapi import Depends, FastAPI, Request
from starlette.middleware.base import BaseHTTPMiddleware

from otel_correlation import bind

pool = ThreadPoolExecutor(4)
log = logging.getLogger("accounts")


class Authentication:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            bind(user_id=scope["path"].rpartition("/")[2])
        await self.app(scope, receive, send)


async def tenant(request: Request, call_next):
    bind(tenant="t-" + request.url.path.rpartition("/")[2])
    return await call_next(request)


async def by_dependency(number: int):
    bind(dependency=number)


def by_sync_dependency(number: int):
    bind(sync_dependency=number)


async def by_yield_dependency(number: int):
    yield
    bind(after_yield=number)


app = FastAPI(dependencies=[Depends(by_dependency), Depends(by_sync_dependency), Depends(by_yield_dependency)])
app.add_middleware(BaseHTTPMiddleware, dispatch=tenant)
app.add_middleware(Authentication)


async def by_task(number: int):
    bind(task=number)


@app.get("/accounts/{number}")
async def account(number: int):
    thread = threading.Thread(target=bind, kwargs={"by_thread": number})
    thread.start()
    await asyncio.create_task(by_task(number))
    await asyncio.to_thread(bind, to_thread=number)
    await asyncio.wrap_future(pool.submit(bind, pooled=number))
    await asyncio.gather(*[asyncio.to_thread(bind, **{f"many_{part}": number}) for part in range(8)])
    await asyncio.to_thread(thread.join)
    log.info("looked up")
"""


def test_bound_fields_reach_the_summary_line_and_the_server_span(tmp_path: Path) -> None:
    """
    Fields bound in authentication middleware, dependencies, tasks and threads are on the request's own line and span.
    """
    (tmp_path / "main.py").write_text(APP)
    with OtlpSink() as sink:
        environment = clean_environment(OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint, OTEL_CORRELATION_LOG_FORMAT="json")
        command = ("opentelemetry-instrument", "uvicorn", "main:app", "--port", "{port}")
        with Service(command, tmp_path, environment) as service:
            with httpx.Client(base_url=service.url) as client:
                ids = {number: str(uuid.uuid4()) for number in range(20)}
                for number, rid in ids.items():
                    reply = client.get(f"/accounts/{number}", headers={"x-request-id": rid})
                    assert reply.status_code == 200, service.output()
            service.stop()
            lines = [json.loads(line) for line in service.stdout().splitlines() if line.startswith("{")]
        spans = {span.attributes["request_id"]: span for span in sink.spans if span.kind == "SERVER"}
    names = ("dependency", "sync_dependency", "after_yield", "task", "by_thread", "to_thread", "pooled")
    for number, rid in ids.items():
        expected = {
            "user_id": str(number),
            "tenant": f"t-{number}",
            **dict.fromkeys((*names, *[f"many_{part}" for part in range(8)]), number),
        }
        (summary,) = [line for line in lines if line.get("request_id") == rid and line.get("status") == 200]
        assert {name: summary.get(name) for name in expected} == expected
        attributes = spans[rid].attributes
        assert {name: attributes.get(name) for name in expected} == expected
        (line,) = [line for line in lines if line.get("request_id") == rid and line["logger"] == "accounts"]
        del expected["after_yield"]
        assert {name: line.get(name) for name in expected} == expected
        assert "after_yield" not in line
