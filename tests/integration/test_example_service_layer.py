"""
The example ``service-layer``, started as its README says: 200 requests at once through threads of every kind.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import Service, clean_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.otlp_sink import SinkSpan

EXAMPLE = Path(__file__).parents[2] / "examples/service-layer"
COMMAND = ("opentelemetry-instrument", "uvicorn", "main:app", "--port", "{port}")
COUNT = 200
# How many lines each order has in which logger.
LINES = Counter(
    {
        "layers.services.OrderService": 1,
        "layers.services.PricingService": 3,
        "layers.repositories.StockRepository": 1,
        "layers.repositories.OrderRepository": 1,
        "layers.repositories.AuditRepository": 1,
        "layers.main": 1,
    }
)

pytestmark = pytest.mark.slow


@pytest.fixture
def sink() -> Iterator[OtlpSink]:
    """
    Where the spans go.
    """
    with OtlpSink() as started:
        yield started


@pytest.fixture
def service(request: pytest.FixtureRequest, sink: OtlpSink, tmp_path: Path) -> Iterator[Service]:
    """
    The example, started with the parameter's variables.
    """
    for module in EXAMPLE.glob("*.py"):
        shutil.copy(module, tmp_path)
    variables = getattr(request, "param", {})
    environment = clean_environment(
        OTEL_SERVICE_NAME="layers", OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint, DATABASE="orders.db", **variables
    )
    with Service(COMMAND, tmp_path, environment) as started:
        yield started


def request_id_of(reference: str) -> str:
    return f"request-about-{reference}"


def trace_id_of(reference: str) -> str:
    return hashlib.blake2b(request_id_of(reference).encode(), digest_size=16).hexdigest()


def place_all(url: str, references: list[str]) -> list[httpx.Response]:
    """
    Place an order for each reference, all at once, under an id that is made of it.
    """

    async def run() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=len(references))
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            return await asyncio.gather(
                *(
                    client.post(
                        "/orders",
                        json={"sku": "lamp", "reference": reference},
                        headers={"X-Request-ID": request_id_of(reference)},
                    )
                    for reference in references
                )
            )

    return asyncio.run(run())


def lines(service: Service) -> list[dict[str, Any]]:
    """
    Return what the example's own loggers said.
    """
    parsed = [json.loads(line) for line in service.stdout().splitlines()]
    return [line for line in parsed if line["logger"].startswith("layers.")]


def reference_in(message: str, references: set[str]) -> str:
    (found,) = references & set(message.split())
    return found


def test_no_id_crosses_in_200_concurrent_requests(service: Service, sink: OtlpSink, tmp_path: Path) -> None:
    """
    Each line, span and stored row of 200 orders at once has the ids of the order that it is about: 0 foreign, 0 without.
    """
    references = [f"lot-{number:04}" for number in range(COUNT)]
    known = set(references)
    for reference, response in zip(references, place_all(service.url, references), strict=True):
        assert response.status_code == 201
        assert response.headers["x-request-id"] == request_id_of(reference)
    service.stop()

    said: dict[str, Counter[str]] = {reference: Counter() for reference in references}
    foreign = []
    for line in lines(service):
        reference = reference_in(line["message"], known)
        said[reference][line["logger"]] += 1
        if (line.get("request_id"), line.get("trace_id")) != (request_id_of(reference), trace_id_of(reference)):
            foreign.append(line)
    assert not foreign, f"{len(foreign)} lines, such as {foreign[0]}"
    assert all(counted == LINES for counted in said.values())

    trees: dict[str, dict[str, SinkSpan]] = {}
    for span in sink.spans:
        if "reference" in span.attributes or span.name == "POST /orders":
            assert span.name not in trees.setdefault(span.trace_id, {}), "a span came twice"
            trees[span.trace_id][span.name] = span
    assert trees.keys() == {trace_id_of(reference) for reference in references}
    for reference in references:
        tree = trees[trace_id_of(reference)]
        assert tree.keys() == {"POST /orders", "stock.take", "pricing.price", "orders.add", "audit.add"}
        server = tree.pop("POST /orders")
        assert (server.parent_span_id, server.kind) == ("", "SERVER")
        for span in tree.values():
            assert span.parent_span_id == server.span_id, span.name
            assert span.attributes["reference"] == reference
            assert span.attributes["request_id"] == request_id_of(reference)

    with closing(sqlite3.connect(tmp_path / "orders.db")) as database:
        for table in ("orders", "audit"):
            rows = database.execute(f"SELECT reference, request_id FROM {table}").fetchall()
            assert sorted(rows) == [(reference, request_id_of(reference)) for reference in references]


def test_a_sync_endpoint_and_its_layers_have_the_ids(service: Service, sink: OtlpSink) -> None:
    """
    A ``def`` endpoint runs on FastAPI's threads; its service, repository and span belong to the request all the same.
    """
    place_all(service.url, ["sofa-1"])
    response = httpx.get(service.url + "/orders/1", headers={"X-Request-ID": "who-ordered-the-sofa"})
    assert response.json() == {
        "number": 1,
        "reference": "sofa-1",
        "sku": "lamp",
        "price": 4250,
        "request_id": request_id_of("sofa-1"),
    }
    service.stop()
    mine = [line["logger"] for line in lines(service) if line.get("request_id") == "who-ordered-the-sofa"]
    assert mine == ["layers.repositories.OrderRepository", "layers.main"]
    spans = {span.name: span for span in sink.spans if span.attributes["request_id"] == "who-ordered-the-sofa"}
    assert spans["orders.find"].parent_span_id == spans["GET /orders/{number}"].span_id


@pytest.mark.parametrize("service", [{"OTEL_CORRELATION_PATCH_THREADS": "false"}], indirect=True, ids=["off"])
def test_without_the_patching_pools_lose_the_ids_and_never_take_others(service: Service) -> None:
    """
    Switched off, what executors run has no request id, as in stock Python; what asyncio carries keeps it.
    """
    references = [f"lot-{number:04}" for number in range(20)]
    known = set(references)
    assert {response.status_code for response in place_all(service.url, references)} == {201}
    service.stop()
    lost = {"layers.services.PricingService", "layers.repositories.AuditRepository"}
    for line in lines(service):
        expected = None if line["logger"] in lost else request_id_of(reference_in(line["message"], known))
        assert line.get("request_id") == expected, line
