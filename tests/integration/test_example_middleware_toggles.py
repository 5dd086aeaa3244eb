"""
The example ``middleware-toggles``, started as its README says: every switch, both orders of its middleware.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import Service, clean_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.otlp_sink import SinkSpan

EXAMPLE = Path(__file__).parents[2] / "examples/middleware-toggles"
COMMAND = ("opentelemetry-instrument", "uvicorn", "main:app", "--port", "{port}")
SHOP = "https://shop.example"
ALICE = {"Authorization": "Bearer t-alice"}
PREFLIGHT = {"Origin": SHOP, "Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "x-request-id"}
QUOTED = "order-7781-customer-quote"
QUOTED_TRACE = hashlib.blake2b(QUOTED.encode(), digest_size=16).hexdigest()

pytestmark = pytest.mark.slow


class Mailer:
    """
    The service that the example calls; it keeps the headers of what came.
    """

    def __init__(self) -> None:
        self.received: list[dict[str, str]] = []
        mailer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                mailer.received.append({name.lower(): value for name, value in self.headers.items()})
                self.send_response(202)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclass
class Toggles:
    """
    The running example, with what it calls and where its spans go.
    """

    service: Service
    mailer: Mailer
    sink: OtlpSink

    def get(self, path: str, **headers: str) -> httpx.Response:
        """
        Ask as Alice.
        """
        return httpx.get(self.service.url + path, headers={**ALICE, **headers})

    def stop(self) -> None:
        """
        End the service as an operator does; then all its lines and spans are there.
        """
        self.service.stop()

    def lines(self, logger: str) -> list[dict[str, Any]]:
        """
        Return what one logger said.
        """
        return self.service.lines(logger=logger)

    def about_orders(self) -> list[dict[str, Any]]:
        """
        Return what requests for orders said, three lines each.
        """
        return [line for line in self.lines("toggles") if re.search("order [0-9]|mailer", line["message"])]

    def spans(self, kind: str) -> list[SinkSpan]:
        """
        Return the spans of a kind, without those of the probe that waits for the start.
        """
        return [
            span for span in self.sink.spans if span.kind == kind and span.attributes.get("url.path") != "/openapi.json"
        ]


class Start:
    """
    Starts the example with variables, and ends it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        shutil.copy(EXAMPLE / "main.py", directory)

    def __call__(self, **variables: str) -> Iterator[Toggles]:
        with OtlpSink() as sink, Mailer() as mailer:
            environment = clean_environment(
                OTEL_SERVICE_NAME="toggles",
                OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint,
                MAILER_URL=mailer.url,
                **variables,
            )
            with Service(COMMAND, self._directory, environment) as service:
                yield Toggles(service, mailer, sink)


@pytest.fixture
def toggles(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Toggles]:
    """
    The example, started with the variables of the test's parameter.
    """
    yield from Start(tmp_path)(**getattr(request, "param", {}))


@pytest.fixture(scope="module")
def as_it_comes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toggles]:
    """
    One example without any switch, for tests that only ask it something.
    """
    yield from Start(tmp_path_factory.mktemp("toggles"))()


def start_with(**variables: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("toggles", [variables], indirect=True, ids=[",".join(variables) or "defaults"])


def exposed(response: httpx.Response) -> set[str]:
    names = response.headers.get("access-control-expose-headers", "")
    return {name.strip() for name in names.split(",") if name.strip()}


@start_with()
def test_the_id_is_the_same_in_every_place(toggles: Toggles) -> None:
    """
    Dependency, ``request.state``, headers, background task, outbound call, lines and spans tell one id.
    """
    response = toggles.get("/orders/7", **{"X-Request-ID": QUOTED})
    toggles.stop()
    assert response.headers["x-request-id"] == QUOTED
    assert response.json() == {"order": 7, "dependency": QUOTED, "state": QUOTED, "header": QUOTED}
    summaries = [line for line in toggles.lines("otel_correlation.request") if line["route"] == "/orders/{number}"]
    about_it = [*toggles.about_orders(), *summaries]
    assert [line["message"] for line in about_it[:3]] == [
        "order 7 is looked up",
        f"the receipt of order 7 is for {QUOTED}",
        "the mailer answered 202",
    ]
    assert [(line["request_id"], line["trace_id"], line["customer"]) for line in about_it] == [
        (QUOTED, QUOTED_TRACE, "alice")
    ] * 4
    (server,) = toggles.spans("SERVER")
    (client,) = toggles.spans("CLIENT")
    assert (server.name, client.name) == ("GET /orders/{number}", "POST")
    assert {server.trace_id, client.trace_id} == {QUOTED_TRACE}
    assert client.parent_span_id == server.span_id
    assert {server.attributes["request_id"], client.attributes["request_id"]} == {QUOTED}
    assert server.attributes["customer"] == "alice"
    (call,) = toggles.mailer.received
    assert call["x-request-id"] == QUOTED
    assert call["traceparent"] == f"00-{QUOTED_TRACE}-{client.span_id}-01"
    # Outside of any request there is none.
    (before,) = [line for line in toggles.lines("toggles") if line["message"] == "no request yet: None"]
    assert not {"request_id", "trace_id", "span_id"} & before.keys()


@start_with(OTEL_TRACES_EXPORTER="none")
def test_without_an_exporter_only_the_export_is_off(toggles: Toggles) -> None:
    """
    Exporter ``none``: no span leaves, the ids are where they were.
    """
    response = toggles.get("/orders/7", **{"X-Request-ID": QUOTED})
    toggles.stop()
    assert response.headers["x-request-id"] == response.json()["dependency"] == QUOTED
    lines = toggles.about_orders()
    assert [(line["request_id"], line["trace_id"]) for line in lines] == [(QUOTED, QUOTED_TRACE)] * 3
    (call,) = toggles.mailer.received
    assert (call["x-request-id"], call["traceparent"][3:35]) == (QUOTED, QUOTED_TRACE)
    assert not toggles.sink.requests


def is_kept(request_id: str, ratio: float) -> bool:
    """
    Tell, from an id alone, whether its trace is sampled: the rule of docs/reference/bridge.md, written once more.
    """
    trace_id = hashlib.blake2b(request_id.encode(), digest_size=16).digest()
    randomness = int.from_bytes(hashlib.blake2b(trace_id, digest_size=7).digest(), "big")
    return randomness >= 2**56 - round(ratio * 2**56)


@start_with(OTEL_TRACES_SAMPLER_ARG="0.25")
def test_the_ratio_decides_by_the_id_and_the_ids_stay(toggles: Toggles) -> None:
    """
    At 0.25 exactly the traces are kept that the documented rule names; the other requests have their ids all the same.
    """
    ids = [f"sampled-request-{number:04}" for number in range(40)]
    kept = {request_id for request_id in ids if is_kept(request_id, 0.25)}
    assert 0 < len(kept) < len(ids)
    for request_id in ids:
        assert toggles.get("/orders/7", **{"X-Request-ID": request_id}).headers["x-request-id"] == request_id
    toggles.stop()
    spans = [*toggles.spans("SERVER"), *toggles.spans("CLIENT")]
    assert {span.attributes["request_id"] for span in spans} == kept
    assert len(spans) == 2 * len(kept)
    flags = {line["request_id"]: line["trace_flags"] for line in toggles.about_orders()}
    assert flags == {request_id: "01" if request_id in kept else "00" for request_id in ids}
    called = {call["x-request-id"]: call["traceparent"][-2:] for call in toggles.mailer.received}
    assert called == flags


@start_with(OTEL_SDK_DISABLED="true")
def test_a_disabled_sdk_keeps_the_request_id(toggles: Toggles) -> None:
    """
    ``OTEL_SDK_DISABLED``: no spans and no trace ids anywhere, but the request id in lines, response and calls.
    """
    response = toggles.get("/orders/7", **{"X-Request-ID": QUOTED})
    toggles.stop()
    assert response.headers["x-request-id"] == QUOTED
    assert response.json() == {"order": 7, "dependency": QUOTED, "state": QUOTED, "header": QUOTED}
    lines = toggles.about_orders()
    assert [line["request_id"] for line in lines] == [QUOTED] * 3
    assert not [line for line in lines if "trace_id" in line or "span_id" in line]
    (call,) = toggles.mailer.received
    assert call["x-request-id"] == QUOTED
    assert "traceparent" not in call
    assert not toggles.sink.requests


@start_with(OTEL_CORRELATION_ENABLED="false")
def test_off_is_off(toggles: Toggles) -> None:
    """
    ``OTEL_CORRELATION_ENABLED=false``: the service as if we were not installed.
    """
    response = toggles.get("/orders/7", **{"X-Request-ID": QUOTED})
    toggles.stop()
    assert response.status_code == 200
    assert "x-request-id" not in response.headers
    # The header is the caller's own, unchecked.
    assert response.json() == {"order": 7, "dependency": None, "state": None, "header": QUOTED}
    (call,) = toggles.mailer.received
    assert not {"x-request-id", "traceparent"} & call.keys()
    # FastAPI 0.142 exports by itself wherever there is an endpoint.
    assert {span.scope for span in toggles.sink.spans} <= {"fastapi"}
    output = toggles.service.output()
    assert "request_id" not in output
    assert re.search(r'^INFO: .*"GET /orders/7 HTTP/1.1" 200 OK$', output, re.MULTILINE), "uvicorn's own access line"


@start_with(
    OTEL_CORRELATION_REQUEST_ID_HEADERS="X-Correlation-ID,X-Request-ID",
    OTEL_CORRELATION_RESPONSE_HEADER="X-Correlation-ID",
)
def test_the_header_has_the_name_that_was_chosen(toggles: Toggles) -> None:
    """
    Two inbound names, the first present one wins; the chosen name goes out, is exposed, and is forwarded.
    """
    both = toggles.get("/orders/7", **{"X-Request-ID": "of-no-interest", "X-Correlation-ID": QUOTED, "Origin": SHOP})
    other = toggles.get("/orders/8", **{"X-Request-ID": QUOTED + "-8"})
    toggles.stop()
    assert both.headers["x-correlation-id"] == QUOTED
    assert "x-request-id" not in both.headers
    assert exposed(both) == {"Retry-After", "X-Correlation-ID"}
    assert other.headers["x-correlation-id"] == other.json()["dependency"] == QUOTED + "-8"
    assert [call["x-correlation-id"] for call in toggles.mailer.received] == [QUOTED, QUOTED + "-8"]


def test_cors_outside_every_answer_has_an_id_that_scripts_can_read(as_it_comes: Toggles) -> None:
    """
    CORS outside authentication: preflight, 401 and 200 carry the id, and name it for scripts of the other origin.
    """
    url = as_it_comes.service.url + "/orders/7"
    preflight = httpx.options(url, headers=PREFLIGHT)
    refused = httpx.get(url, headers={"Origin": SHOP, "X-Request-ID": "refused-request-0001"})
    allowed = httpx.get(url, headers={"Origin": SHOP, **ALICE})
    assert [response.status_code for response in (preflight, refused, allowed)] == [200, 401, 200]
    for response in (preflight, refused, allowed):
        assert response.headers["access-control-allow-origin"] == SHOP
        assert len(response.headers.get_list("x-request-id")) == 1
        assert "X-Request-ID" in exposed(response)
    assert exposed(refused) == exposed(allowed) == {"Retry-After", "X-Request-ID"}
    assert refused.headers["x-request-id"] == "refused-request-0001"


@start_with(OUTSIDE="authentication")
def test_authentication_outside_every_answer_has_an_id(toggles: Toggles) -> None:
    """
    Authentication outside CORS: its 401s, of preflights too, have no CORS headers, but the id and its line.
    """
    url = toggles.service.url + "/orders/7"
    preflight = httpx.options(url, headers=PREFLIGHT)
    refused = httpx.get(url, headers={"Origin": SHOP, "X-Request-ID": "refused-request-0001"})
    allowed = httpx.get(url, headers={"Origin": SHOP, **ALICE})
    toggles.stop()
    assert [response.status_code for response in (preflight, refused, allowed)] == [401, 401, 200]
    for response in (preflight, refused):
        assert "access-control-allow-origin" not in response.headers
        assert not exposed(response)
    assert exposed(allowed) == {"Retry-After", "X-Request-ID"}
    ids = [response.headers["x-request-id"] for response in (preflight, refused, allowed)]
    assert len(set(ids)) == 3
    assert ids[1] == "refused-request-0001"
    nobody = [line["request_id"] for line in toggles.lines("toggles") if line["message"] == "nobody we know"]
    assert nobody[-2:] == ids[:2]
    assert [span.attributes["request_id"] for span in toggles.spans("SERVER")] == ids


def test_an_unhandled_500_has_the_id(as_it_comes: Toggles) -> None:
    """
    The response of an unhandled exception and uvicorn's traceback carry the id.
    """
    response = as_it_comes.get("/boom", **{"X-Request-ID": "failed-request-0001"})
    assert (response.status_code, response.headers["x-request-id"]) == (500, "failed-request-0001")

    def spans() -> list[SinkSpan]:
        return [span for span in as_it_comes.sink.spans if span.attributes["request_id"] == "failed-request-0001"]

    assert as_it_comes.sink.wait(lambda: len(spans()) == 1)
    (event,) = spans()[0].events
    assert (event.name, event.attributes["exception.message"]) == ("exception", "nobody caught this")
    # The server writes it after the answer.
    traceback = as_it_comes.service.wait_for_line(logger="uvicorn.error", request_id="failed-request-0001")
    assert "nobody caught this" in traceback["exception"]


def test_a_websocket_tells_its_id_in_header_and_first_message(as_it_comes: Toggles) -> None:
    """
    The handshake's response and every message have the id that the connection came with.
    """
    headers = {**ALICE, "X-Request-ID": "watched-prices-0001"}
    url = as_it_comes.service.url.replace("http", "ws") + "/prices"
    with connect(url, additional_headers=headers) as socket:
        assert socket.response is not None
        assert socket.response.headers["x-request-id"] == "watched-prices-0001"
        assert json.loads(socket.recv()) == {"request_id": "watched-prices-0001"}
        socket.send("lamp")
        assert json.loads(socket.recv()) == {"sku": "lamp", "request_id": "watched-prices-0001"}
    with pytest.raises(InvalidStatus) as refused:
        connect(url, additional_headers={"X-Request-ID": "refused-socket-0001"})
    response = refused.value.response
    assert (response.status_code, response.headers["x-request-id"]) == (403, "refused-socket-0001")
