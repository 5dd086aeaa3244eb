"""
One request through everything: three services, agent, router, two samplers, Jaeger and Tempo for its spans, Loki for its lines.
"""

from __future__ import annotations

import os
import subprocess
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.stack import parts
from tests.stack.conftest import MACHINE
from tests.stack.engines import Jaeger, Loki, Tempo, Tier
from tests.stack.harness import BIN, SHOP, Machine, eventually
from tests.stack.test_shop import FAILS, SERVICES, SOLD, Shop, assert_one_trace, from_blake2b, launch

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.needs("collector", "jaeger", "loki")

WAIT_S = 2
LINES = {"gateway": "checkout of 1 x lamp", "orders": "is made", "inventory": "reserving 1 of"}


@dataclass(slots=True)
class Path:
    """
    The shop in front, the stores at the end.
    """

    shop: Shop
    samplers: list[Tier]
    loki: Loki
    tempo: Tempo | None

    def find(self, id_: str, stores: str) -> str:
        """
        Return what ``otel-correlation find`` says of the id.
        """
        command = [str(BIN / "otel-correlation"), "find", id_]
        environment = {**os.environ, "OTEL_CORRELATION_STORES": stores}
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout

    def lines(self, service: str, **wanted: str) -> list[tuple[str, dict[str, str]]]:
        """
        Return the service's lines with these ids, once there are any, from Loki.
        """
        query = " ".join([f'{{service_name="{service}"}}', *(f'| {key}="{value}"' for key, value in wanted.items())])
        return eventually(f"lines of {service}", lambda: self.loki.lines(query))


@pytest.fixture(scope="module")
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """
    All of it, from the shipped files, for the tests of this module.
    """
    machine = request.node.stash[MACHINE] = Machine(tmp_path_factory.mktemp("path"))
    try:
        yield open_path(machine)
    finally:
        machine.clean_up()


def open_path(machine: Machine) -> Path:
    """
    Start the stores, then each part before the one that sends to it.
    """
    jaeger, loki = Jaeger(machine), Loki(machine)
    tempo = None if parts.reason({"tempo"}, parts.skipped()) else Tempo(machine)
    stores = [store for store in (jaeger, loki, tempo) if store is not None]
    for store in stores:
        store.launch()
    for store in stores:
        store.wait()
    samplers = [
        Tier(
            machine,
            "sampler",
            {
                "JAEGER_OTLP_ENDPOINT": jaeger.otlp,
                "SAMPLER_RATIO": "1.0",
                "SAMPLER_DECISION_WAIT": f"{WAIT_S}s",
            }
            | (
                {"TEMPO_OTLP_ENDPOINT": tempo.otlp, "TRACES_EXPORTERS": "[otlp_grpc/jaeger, otlp_grpc/tempo]"}
                if tempo
                else {}
            ),
            name=f"sampler-{number}",
        )
        for number in range(2)
    ]
    addresses = ", ".join(sampler.grpc for sampler in samplers)
    router = Tier(machine, "router", {"ROUTER_SAMPLERS": f"[{addresses}]", "LOGS_OTLP_ENDPOINT": loki.otlp})
    agent = Tier(machine, "agent", {"NEXT_OTLP_ENDPOINT": router.grpc})
    for tier in (*samplers, router, agent):
        tier.start()
    inventory, inventory_url = launch(machine, "inventory", agent.exports("inventory"))
    orders, orders_url = launch(machine, "orders", agent.exports("orders") | {"INVENTORY_URL": inventory_url})
    gateway, url = launch(machine, "gateway", agent.exports("gateway") | {"ORDERS_URL": orders_url})
    services = {"gateway": gateway, "orders": orders, "inventory": inventory}
    return Path(Shop(jaeger.asked, agent.running(), services, url), samplers, loki, tempo)


def test_a_request_is_one_trace_behind_all_tiers(path: Path) -> None:
    """
    Twenty requests arrive as twenty whole traces, five spans each, from both samplers, whichever of them had the trace.
    """
    ids = [f"path-{uuid.uuid4()}" for _ in range(20)]
    for request_id in ids:
        assert path.shop.check_out(SOLD, **{"X-Request-ID": request_id}).status_code == 201
    for request_id in ids:
        assert_one_trace(path.shop.story(from_blake2b(request_id)), request_id)
    taken = [sampler.metrics().total("otelcol_receiver_accepted_spans") for sampler in path.samplers]
    assert min(taken) > 0
    assert {count % 5 for count in taken} == {0}


def test_the_lines_of_a_request_are_in_loki_by_either_id(path: Path) -> None:
    """
    ``{service_name="..."} | trace_id="..."`` selects the lines of that request in each service, and so does ``request_id``.
    """
    request_id = f"lines-{uuid.uuid4()}"
    path.shop.check_out(SOLD, **{"X-Request-ID": request_id})
    for service, text in LINES.items():

        def told(service: str = service, text: str = text) -> bool:
            return any(text in line for line, _ in path.lines(service, trace_id=from_blake2b(request_id)))

        eventually(f"{text!r} in Loki", told)
        lines = path.lines(service, trace_id=from_blake2b(request_id))
        assert {labels["request_id"] for _, labels in lines} == {request_id}
        assert sorted(lines) == sorted(path.lines(service, request_id=request_id))


def assert_the_whole_story(path: Path, stores: str) -> None:
    """
    The same story for either id: each service, the cause with its line, and the log lines of all three.
    """
    request_id = f"story-{uuid.uuid4()}"
    trace_id = from_blake2b(request_id)
    assert path.shop.check_out(FAILS, **{"X-Request-ID": request_id}).status_code == 502
    path.shop.story(trace_id)
    where = next(
        n for n, text in enumerate((SHOP / "inventory.py").read_text().splitlines(), 1) if "// self.sold" in text
    )
    said = (
        request_id,
        trace_id,
        *SERVICES,
        "ZeroDivisionError",
        f"inventory.py:{where}",
        "checkout of 1 x chair-2027",
        "reserving 1 of 25 x chair-2027",
        "no order was made",
    )

    def complete() -> bool:
        answer = path.find(request_id, stores)
        return all(part in answer for part in said)

    eventually(f"the story of {request_id}", complete)
    answer = path.find(trace_id, stores)
    assert [part for part in said if part not in answer] == []


def test_find_tells_the_story_from_jaeger_and_loki(path: Path) -> None:
    """
    ``find`` over ``jaeger=...,loki=...`` puts the spans of one and the lines of the other into one story.
    """
    assert_the_whole_story(path, f"jaeger=http://{path.shop.jaeger.query},loki=http://{path.loki.http}")


@pytest.mark.needs("tempo")
def test_find_tells_the_story_from_tempo_and_loki(path: Path) -> None:
    """
    The same over ``tempo=...,loki=...``.
    """
    assert path.tempo is not None
    assert_the_whole_story(path, f"tempo=http://{path.tempo.http},loki=http://{path.loki.http}")


@pytest.mark.needs("tempo")
def test_tempo_has_the_same_trace_and_finds_it_by_request_id(path: Path) -> None:
    """
    The samplers give each trace to both stores; TraceQL selects it by the attribute ``request_id``.
    """
    assert path.tempo is not None
    request_id = f"tempo-{uuid.uuid4()}"
    trace_id = from_blake2b(request_id)
    path.shop.check_out(SOLD, **{"X-Request-ID": request_id})
    tempo = path.tempo

    def spans() -> int:
        trace = tempo.trace(trace_id) or {"batches": []}
        return sum(len(scope["spans"]) for batch in trace["batches"] for scope in batch["scopeSpans"])

    eventually("five spans in Tempo", lambda: spans() == 5)
    found = eventually("the trace by its request id", lambda: tempo.search(f'{{ span.request_id = "{request_id}" }}'))
    assert found == [trace_id]
