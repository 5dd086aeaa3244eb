"""
What users write; it must type-check under mypy and pyright strict. Nothing here is run.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, FastAPI

import otel_correlation
from otel_correlation import ConfigError, bind, bootstrap, edge, request_id, stats, trace_id
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


def test_my_service(telemetry: Telemetry) -> None:
    """
    Use the pytest fixture.
    """
    assert telemetry.span("GET /").name == "GET /"
    assert [record.getMessage() for record in telemetry.records] == []
