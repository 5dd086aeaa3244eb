"""
The main job on the real stack: three services, the shipped collector, Jaeger; each request is one trace under one id.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.stack.conftest import MACHINE
from tests.stack.harness import BIN, SHOP, Collector, Jaeger, Machine, Process, Span, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.needs("collector", "jaeger")

SERVICES = ("gateway", "orders", "inventory")
SOLD = {"sku": "lamp"}
FAILS = {"sku": "chair-2027"}  # Its line of the inventory divides by zero.


UVICORN = ("uvicorn", "{name}:app", "--port={port}")
GUNICORN = (
    "gunicorn",
    "{name}:app",
    "--bind=127.0.0.1:{port}",
    "--worker-class=uvicorn_worker.UvicornWorker",
    "--no-control-socket",
)


def launch(
    machine: Machine, name: str, environment: dict[str, str], server: tuple[str, ...] = UVICORN
) -> tuple[Process, str]:
    """
    Start one shop service under ``opentelemetry-instrument``; return it and its address when it accepts connections.
    """
    port = machine.port()
    arguments = [argument.format(name=name, port=port) for argument in server]
    command = [str(BIN / "opentelemetry-instrument"), str(BIN / arguments[0]), *arguments[1:]]
    process = machine.start(name, command, environment, SHOP)

    def accepts() -> bool:
        with socket.create_connection(("127.0.0.1", port), 5):
            return True

    eventually(name, accepts, while_running=[process])
    return process, f"http://127.0.0.1:{port}"


@dataclass(slots=True)
class Shop:
    """
    The three services, each its own process.
    """

    jaeger: Jaeger
    collector: Process
    processes: dict[str, Process]
    gateway: str

    def check_out(self, order: dict[str, str], **headers: str) -> httpx.Response:
        """
        Send one checkout to the gateway.
        """
        with httpx.Client(trust_env=False, timeout=60) as client:
            return client.post(f"{self.gateway}/checkout", json=order, headers=headers)

    def story(self, trace_id: str) -> list[Span]:
        """
        Return the trace once its five spans are in Jaeger.
        """

        def complete() -> list[Span] | None:
            spans = self.jaeger.trace(trace_id)
            return spans if len(spans) >= 5 else None

        return eventually(f"trace {trace_id}", complete)


def open_shop(machine: Machine, protocol: str = "http/protobuf") -> Shop:
    """
    Start Jaeger, the collector and the services.
    """
    jaeger = Jaeger(machine)
    collector = Collector(machine, jaeger)
    jaeger.start()
    process = collector.start()
    inventory, inventory_url = launch(machine, "inventory", collector.exports("inventory", protocol))
    orders, orders_url = launch(
        machine, "orders", collector.exports("orders", protocol) | {"INVENTORY_URL": inventory_url}
    )
    gateway, url = launch(machine, "gateway", collector.exports("gateway", protocol) | {"ORDERS_URL": orders_url})
    return Shop(jaeger, process, {"gateway": gateway, "orders": orders, "inventory": inventory}, url)


@pytest.fixture(scope="module")
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """
    One shop for the tests of this module, closed by pid afterwards.
    """
    machine = request.node.stash[MACHINE] = Machine(tmp_path_factory.mktemp("shop"))
    try:
        yield open_shop(machine)
    finally:
        machine.clean_up()


def assert_one_trace(spans: list[Span], request_id: str) -> None:
    """
    Exactly three SERVER and two CLIENT spans, each below the one that caused it, each with the request id.
    """
    kinds = sorted((span.service, span.kind) for span in spans)
    assert kinds == sorted(
        [
            ("gateway", "server"),
            ("gateway", "client"),
            ("orders", "server"),
            ("orders", "client"),
            ("inventory", "server"),
        ]
    )
    at = {(span.service, span.kind): span for span in spans}
    assert [at[service, "server"].name for service in SERVICES] == [
        "POST /checkout",
        "POST /orders",
        "POST /reservations",
    ]
    assert at["gateway", "server"].parent_id is None
    assert at["gateway", "client"].parent_id == at["gateway", "server"].span_id
    assert at["orders", "server"].parent_id == at["gateway", "client"].span_id
    assert at["orders", "client"].parent_id == at["orders", "server"].span_id
    assert at["inventory", "server"].parent_id == at["orders", "client"].span_id
    assert {span.tags.get("request_id") for span in spans} == {request_id}


def from_blake2b(request_id: str) -> str:
    """
    What ``printf ID | b2sum -l 128`` prints.
    """
    return hashlib.blake2b(request_id.encode(), digest_size=16).hexdigest()


@pytest.mark.parametrize(
    ("request_id", "mapping"),
    [
        pytest.param(f"ticket:{uuid.uuid4().hex[:12]}/eu", from_blake2b, id="long-customer-id"),
        pytest.param(str(uuid.uuid4()), lambda value: value.replace("-", ""), id="uuid"),
        pytest.param(str(uuid.uuid4()).upper(), lambda value: value.replace("-", "").lower(), id="uuid-in-capitals"),
    ],
)
def test_an_id_leads_to_its_trace_without_a_lookup(shop: Shop, request_id: str, mapping: Callable[[str], str]) -> None:
    """
    The trace id is the request id's image under the bridge contract, in all three services, and the response echoes the id.
    """
    response = shop.check_out(SOLD, **{"X-Request-ID": request_id})
    assert response.status_code == 201
    assert response.headers.get_list("x-request-id") == [request_id]
    assert_one_trace(shop.story(mapping(request_id)), request_id)


def test_a_request_without_an_id_gets_the_trace_id(shop: Shop) -> None:
    """
    The response's X-Request-ID is the 32-hex id of the trace that is in Jaeger.
    """
    request_id = shop.check_out(SOLD).headers["x-request-id"]
    assert_one_trace(shop.story(request_id), request_id)


def test_a_short_id_is_found_by_jaegers_search(shop: Shop) -> None:
    """
    An id of fewer than 16 characters names no trace, but the request_id tag finds it, on every service's spans.
    """
    request_id = uuid.uuid4().hex[:8]
    assert shop.check_out(SOLD, **{"X-Request-ID": request_id}).headers["x-request-id"] == request_id
    for service in SERVICES:

        def found(service: str = service) -> list[Span] | None:
            spans = shop.jaeger.search(service, request_id=request_id)
            return spans if len(spans) >= 5 else None

        assert_one_trace(eventually(f"{request_id} in {service}", found), request_id)
    assert shop.jaeger.trace(from_blake2b(request_id)) == []


def test_a_callers_trace_is_continued_with_the_callers_id(shop: Shop) -> None:
    """
    With a traceparent the trace id is the caller's, the gateway's span is its child, and the request id stays as received.
    """
    trace_id, parent, request_id = uuid.uuid4().hex, uuid.uuid4().hex[:16], f"order-{uuid.uuid4()}"
    shop.check_out(SOLD, traceparent=f"00-{trace_id}-{parent}-01", **{"X-Request-ID": request_id})
    spans = shop.story(trace_id)
    assert {span.tags["request_id"] for span in spans} == {request_id}
    (gateway,) = (span for span in spans if (span.service, span.kind) == ("gateway", "server"))
    assert gateway.parent_id == parent


def test_a_failure_shows_its_cause_in_the_service_that_failed(shop: Shop) -> None:
    """
    The customer sees a 502 with an id; its trace has the ZeroDivisionError once, in the inventory, and an error in all three.
    """
    request_id = f"failing-{uuid.uuid4()}"
    response = shop.check_out(FAILS, **{"X-Request-ID": request_id})
    assert (response.status_code, response.headers["x-request-id"]) == (502, request_id)
    spans = shop.story(from_blake2b(request_id))
    assert_one_trace(spans, request_id)
    assert {span.tags.get("error") for span in spans} == {True}
    causes = [
        (span.service, event["exception.type"])
        for span in spans
        for event in span.events
        if event.get("exception.type", "").endswith("ZeroDivisionError")
    ]
    assert causes == [("inventory", "ZeroDivisionError")]


def test_find_tells_the_story_from_jaeger(shop: Shop) -> None:
    """
    ``otel-correlation find`` with Jaeger as its store names the cause, the service and the line for the id alone.
    """
    request_id = f"found-{uuid.uuid4()}"
    shop.check_out(FAILS, **{"X-Request-ID": request_id})
    shop.story(from_blake2b(request_id))
    environment = {**os.environ, "OTEL_CORRELATION_STORES": f"jaeger=http://{shop.jaeger.query}"}
    command = [str(BIN / "otel-correlation"), "find", request_id]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert answer.returncode == 0, answer.stderr
    line = next(
        n for n, text in enumerate((SHOP / "inventory.py").read_text().splitlines(), 1) if "// self.sold" in text
    )
    for part in (request_id, from_blake2b(request_id), "ZeroDivisionError", f"inventory.py:{line}", *SERVICES):
        assert part in answer.stdout


def test_every_services_log_lines_carry_both_ids(shop: Shop) -> None:
    """
    The JSON lines on stdout of all three services have the trace id and the request id of the request that they tell of.
    """
    request_id = f"logged-{uuid.uuid4()}"
    shop.check_out(SOLD, **{"X-Request-ID": request_id})
    for service, process in shop.processes.items():

        def told(process: Process = process) -> list[dict[str, Any]]:
            lines = [json.loads(line) for line in process.log.read_text().splitlines() if line.startswith("{")]
            return [line for line in lines if line.get("request_id") == request_id]

        lines = eventually(f"lines of {service}", told)
        assert {line["trace_id"] for line in lines} == {from_blake2b(request_id)}
        assert {line["service_name"] for line in lines} == {service}


def assert_records_arrive(shop: Shop, request_id: str) -> None:
    """
    The collector's output, where a laptop's log records go, has the records of all three services under the id.
    """

    def lines() -> list[str]:
        return [line for line in shop.collector.log.read_text().splitlines() if f"request_id={request_id}" in line]

    for part in ("checkout of 1 x lamp", "is made", "reserving 1 of"):
        eventually(f"the record {part!r}", lambda part=part: [line for line in lines() if part in line])  # type: ignore[misc]


def test_log_records_reach_the_collector_under_the_same_id(shop: Shop) -> None:
    """
    With OTEL_LOGS_EXPORTER=otlp the records of all three services pass the collector's logs pipeline with the request id.
    """
    request_id = f"records-{uuid.uuid4()}"
    shop.check_out(SOLD, **{"X-Request-ID": request_id})
    assert_records_arrive(shop, request_id)


def test_grpc_delivers_the_same_story(machine: Machine) -> None:
    """
    OTEL_EXPORTER_OTLP_PROTOCOL=grpc is all that changes, for spans and for log records.
    """
    shop = open_shop(machine, protocol="grpc")
    request_id = shop.check_out(SOLD).headers["x-request-id"]
    assert_one_trace(shop.story(request_id), request_id)
    assert_records_arrive(shop, request_id)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize(
    "server",
    [
        pytest.param(UVICORN, id="uvicorn"),
        pytest.param((*UVICORN, "--workers=2"), id="uvicorn-2-workers"),
        pytest.param((*GUNICORN, "--workers=2"), id="gunicorn"),
        pytest.param((*GUNICORN, "--workers=2", "--preload"), id="gunicorn-preload"),
    ],
)
def test_a_stopped_server_delivers_what_it_has(
    machine: Machine, jaeger: Jaeger, collector: Collector, server: tuple[str, ...], number: signal.Signals
) -> None:
    """
    All spans of 20 responses are in Jaeger after a signal, although the exporter's own schedule is ten minutes away.
    """
    process, url = launch(
        machine, "inventory", collector.exports("inventory") | {"OTEL_BSP_SCHEDULE_DELAY": "600000"}, server
    )
    with httpx.Client(trust_env=False, timeout=60) as client:
        responses = [client.post(f"{url}/reservations", json={"sku": "lamp", "quantity": 1}) for _ in range(20)]
    process.stop(number)
    assert {response.status_code for response in responses} == {201}
    missing = {response.headers["x-request-id"] for response in responses}

    def arrived() -> bool:
        missing.difference_update({one for one in missing if jaeger.trace(one)})
        return not missing

    eventually("20 spans", arrived)
