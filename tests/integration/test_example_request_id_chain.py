"""
The example ``request-id-chain``, started as its README says: gateway, legacy, asgi-correlation-id, ledger, one trace.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import shutil
import subprocess
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import BIN, DEADLINE_S, Service, clean_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.otlp_sink import SinkSpan

EXAMPLE = Path(__file__).parents[2] / "examples/request-id-chain"
HOPS = ["gateway", "warehouse", "billing", "ledger"]
LAMP = {"sku": "lamp"}
CHAIR = {"sku": "chair"}  # It has no price, so the ledger fails.
HEX = re.compile("[0-9a-f]{32}")

pytestmark = pytest.mark.slow


@dataclass
class Chain:
    """
    The four running services.
    """

    services: dict[str, Service]
    sink: OtlpSink

    def order(self, item: dict[str, str], **headers: str) -> httpx.Response:
        """
        Send one order to the gateway.
        """
        return httpx.post(self.services["gateway"].url + "/orders", json=item, headers=headers, timeout=60)

    def stop(self) -> None:
        """
        End all services; then all lines and spans are there.
        """
        for service in self.services.values():
            service.stop()

    def ids(self, name: str) -> list[str]:
        """
        Return the request id of each line about an order that one service wrote, "" where there is none.
        """
        service = self.services[name]
        if name in ("gateway", "ledger"):
            return [line.get("request_id", "") for line in self.lines(name)]
        return re.findall(rf"^INFO chain\.{name} \[(.*?)\]", service.output(), re.MULTILINE)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """
        Return the lines about orders of a service of ours: its own and the summaries.
        """
        return [
            line
            for line in self.services[name].lines()
            if line["logger"].startswith("chain.") or line.get("route") == "/orders"
        ]

    def spans(self, service: str) -> list[SinkSpan]:
        """
        Return the spans of orders in one service, the SERVER span before the CLIENT span.
        """
        found = [
            span
            for span in self.sink.spans
            if span.resource["service.name"] == service and span.attributes.get("url.path") != "/openapi.json"
        ]
        return sorted(found, key=lambda span: (span.kind != "SERVER", span.start_ns))


def start(directory: Path, *, validator: str = "default", **variables: str) -> Iterator[Chain]:
    """
    Start all services at once, each in a directory of its own, and wait for them.
    """
    with OtlpSink() as sink, ExitStack() as stack:
        services: dict[str, Service] = {}

        def launch(name: str, command: tuple[str, ...], **more: str) -> Service:
            (directory / name).mkdir()
            shutil.copy(EXAMPLE / f"{name}.py", directory / name)
            arguments = (*command, "uvicorn", f"{name}:app", "--port", "{port}")
            services[name] = Service(arguments, directory / name, clean_environment(**more))
            return services[name]

        ours = ("opentelemetry-instrument",)
        exports = {"OTEL_EXPORTER_OTLP_ENDPOINT": sink.endpoint, **variables}
        ledger = launch("ledger", ours, OTEL_SERVICE_NAME="ledger", **exports)
        billing = launch("billing", (), LEDGER_URL=ledger.url, VALIDATOR=validator)
        warehouse = launch("warehouse", (), BILLING_URL=billing.url)
        launch("gateway", ours, OTEL_SERVICE_NAME="gateway", WAREHOUSE_URL=warehouse.url, **exports)
        for service in services.values():
            stack.callback(service.close)
        for service in services.values():
            service.wait_ready()
        yield Chain(services, sink)


@pytest.fixture
def chain(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Chain]:
    """
    The example, started with the parameter's variables.
    """
    yield from start(tmp_path, **getattr(request, "param", {}))


@pytest.fixture(scope="module")
def as_it_comes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """
    One example without any variable, for tests that only send it orders.
    """
    yield from start(tmp_path_factory.mktemp("chain"))


def start_with(**variables: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("chain", [variables], indirect=True, ids=[",".join(variables) or "defaults"])


def seen(response: httpx.Response) -> dict[str, str]:
    """
    Return which service saw which request id.
    """
    return {hop["service"]: hop["request_id"] for hop in response.json()}


@start_with()
def test_a_uuid_is_one_id_and_one_trace_from_end_to_end(chain: Chain) -> None:
    """
    Every hop sees the caller's UUID, every line has it, and both ends write into the trace that its bits name.
    """
    given = [str(uuid.uuid4()), str(uuid.uuid4()).upper()]
    for request_id in given:
        response = chain.order(LAMP, **{"X-Request-ID": request_id})
        assert response.status_code == 201
        assert response.headers.get_list("x-request-id") == [request_id]
        assert seen(response) == dict.fromkeys(HOPS, request_id)
    chain.stop()
    for name, count in {"gateway": 2, "warehouse": 2, "billing": 1, "ledger": 2}.items():
        assert chain.ids(name) == [request_id for request_id in given for _ in range(count)], name
    traces = [request_id.replace("-", "").lower() for request_id in given]
    for name in ("gateway", "ledger"):
        assert [line["trace_id"] for line in chain.lines(name)] == [trace for trace in traces for _ in range(2)]
    gateway, ledger = chain.spans("gateway"), chain.spans("ledger")
    assert [(span.kind, span.trace_id) for span in gateway] == [
        *(("SERVER", trace) for trace in traces),
        *(("CLIENT", trace) for trace in traces),
    ]
    # The legacy hop lost the traceparent, so the ledger's span is a second root of the same trace.
    assert [(span.kind, span.trace_id, span.parent_span_id) for span in ledger] == [
        ("SERVER", trace, "") for trace in traces
    ]
    assert {span.attributes["request_id"] for span in (*gateway, *ledger)} == set(given)


def test_an_order_without_an_id_gets_one(as_it_comes: Chain) -> None:
    """
    The gateway mints 32 hex digits, which version 5 of asgi-correlation-id takes, and everybody sees them.
    """
    response = as_it_comes.order(LAMP)
    (minted,) = response.headers.get_list("x-request-id")
    assert HEX.fullmatch(minted)
    assert seen(response) == dict.fromkeys(HOPS, minted)


@pytest.mark.parametrize(
    "unsafe",
    [
        ["no spaces, please"],
        ["a" * 201],
        ["caf\u00e9-caf\u00e9-caf\u00e9-caf\u00e9"],
        ["planted@example.com"],
        ["one-id-0123456789", "two-id-0123456789"],
    ],
    ids=["space", "long", "not-ascii", "address", "two"],
)
def test_an_unsafe_id_is_replaced_and_leaves_no_trace(as_it_comes: Chain, unsafe: list[str]) -> None:
    """
    What is not valid never reaches a hop, a line or the response; a minted id takes its place everywhere.
    """
    service = as_it_comes.services["gateway"]
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    connection.putrequest("POST", "/orders")
    body = json.dumps(LAMP).encode()
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", str(len(body)))
    for value in unsafe:
        connection.putheader("X-Request-ID", value.encode())
    connection.endheaders(body)
    response = connection.getresponse()
    hops = json.loads(response.read())
    connection.close()
    (minted,) = response.headers.get_all("x-request-id") or []
    assert HEX.fullmatch(minted)
    assert {hop["service"]: hop["request_id"] for hop in hops} == dict.fromkeys(HOPS, minted)
    for name in ("gateway", "ledger"):
        # Its last line about the order: what is in none by then is in none.
        as_it_comes.services[name].wait_for_line(logger="otel_correlation.request", request_id=minted)
    for service in as_it_comes.services.values():
        assert not [value for value in unsafe if value in service.output()]


def test_a_500_has_the_id_and_both_ends_tell_why(as_it_comes: Chain) -> None:
    """
    The ledger fails, everybody on the way back does, and the response of the unhandled 500 carries the caller's id.
    """
    request_id = str(uuid.uuid4())
    response = as_it_comes.order(CHAIR, **{"X-Request-ID": request_id})
    assert (response.status_code, response.headers["x-request-id"]) == (500, request_id)

    def failed() -> list[SinkSpan]:
        spans = [*as_it_comes.spans("gateway"), *as_it_comes.spans("ledger")]
        return [span for span in spans if span.kind == "SERVER" and span.attributes["request_id"] == request_id]

    assert as_it_comes.sink.wait(lambda: len(failed()) == 2)
    gateway, ledger = failed()
    assert gateway.trace_id == ledger.trace_id == request_id.replace("-", "")
    assert [span.attributes["error.type"] for span in (gateway, ledger)] == ["httpx.HTTPStatusError", "KeyError"]
    for name in ("gateway", "ledger"):
        service = as_it_comes.services[name]
        # The server's own line is the last, and later than the answer.
        service.wait_for_line(logger="uvicorn.error", request_id=request_id)
        errors = [line["logger"] for line in service.lines(level="ERROR", request_id=request_id)]
        assert errors == ["otel_correlation.request", "uvicorn.error"]


def test_find_names_the_cause_behind_the_services_that_know_nothing(tmp_path: Path) -> None:
    """
    From the id of the 500 alone, ``find`` shows the ledger's line as the cause, though no traceparent reached it.
    """
    request_id = str(uuid.uuid4())
    with Service(("otel-correlation", "serve", "--port", "{port}"), tmp_path, clean_environment(), ready="/") as viewer:
        for chain in start(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=viewer.url, OTEL_LOGS_EXPORTER="otlp"):
            assert chain.order(CHAIR, **{"X-Request-ID": request_id}).status_code == 500
            chain.stop()
        found = subprocess.run(
            [BIN / "otel-correlation", "find", request_id],
            env=clean_environment(OTEL_CORRELATION_STORES=viewer.url),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=True,
        ).stdout
    cause, _, rest = found.partition("Cause\n")[2].partition("\n\n")
    place, why = cause.splitlines()
    assert re.fullmatch(r" *ledger +.*/ledger\.py:\d+ in book", place)
    assert why.strip() == "KeyError: 'chair'"
    for service, line in (("gateway", "an order of 1 x chair"), ("ledger", "POST /orders 500")):
        assert re.search(rf"{service} +{line}", rest), rest


@start_with(validator="uuid4")
def test_a_service_that_takes_uuids_only_breaks_the_chain_of_hex_ids(chain: Chain) -> None:
    """
    Why the switch exists, first half: of minted hex ids a strict validator replaces nearly all, and two ids are left.
    """
    # One in 64 random ids happens to be a UUIDv4; eight at once do not.
    halves = [seen(chain.order(LAMP)) for _ in range(8)]
    broken = [hops for hops in halves if hops["gateway"] != hops["ledger"]]
    assert broken
    for hops in broken:
        assert hops["warehouse"] == hops["gateway"]
        assert hops["billing"] == hops["ledger"]


@start_with(validator="uuid4", OTEL_CORRELATION_MINT="uuid")
def test_minted_uuids_pass_such_a_service(chain: Chain) -> None:
    """
    Why the switch exists, second half: with ``OTEL_CORRELATION_MINT=uuid`` it is one id and one trace again.
    """
    for _ in range(4):
        response = chain.order(LAMP)
        minted = response.headers["x-request-id"]
        assert uuid.UUID(minted).version == 4
        assert seen(response) == dict.fromkeys(HOPS, minted)
    chain.stop()
    gateway = [span.trace_id for span in chain.spans("gateway") if span.kind == "SERVER"]
    assert gateway == [span.trace_id for span in chain.spans("ledger")]
    assert len(set(gateway)) == 4


@start_with(validator="none", OTEL_TRACES_SAMPLER_ARG="0.5")
def test_any_long_id_names_its_trace_and_both_ends_keep_the_same_half(chain: Chain) -> None:
    """
    Ids that are no UUIDs: the trace is what ``b2sum -l 128`` prints, and both ends sample the same ones of them.
    """
    given = [f"order-{number}-customer-quote" for number in range(7780, 7796)]
    for request_id in given:
        assert seen(chain.order(LAMP, **{"X-Request-ID": request_id})) == dict.fromkeys(HOPS, request_id)
    chain.stop()
    traces = [hashlib.blake2b(request_id.encode(), digest_size=16).hexdigest() for request_id in given]
    for name in ("gateway", "ledger"):
        assert [line["trace_id"] for line in chain.lines(name)] == [trace for trace in traces for _ in range(2)]
    kept = {span.trace_id for span in chain.spans("gateway")}
    assert kept == {span.trace_id for span in chain.spans("ledger")}
    assert set() < kept < set(traces)
