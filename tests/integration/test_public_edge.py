"""
A front gate as an operator runs it: variables only, real sockets, and a service behind it.
"""

from __future__ import annotations

import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.contract.wire import CALLER, PARENT, TRACE, UUID
from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import Service, clean_environment

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping
    from pathlib import Path

GATE = """
import logging, os
import httpx, httpx2
from fastapi import FastAPI, Request

log = logging.getLogger("gate")
app = FastAPI()
NAMES = ("x-request-id", "traceparent", "tracestate", "baggage")

@app.get("/got")
async def got(request: Request):
    log.info("asked")
    return {name: request.headers[name] for name in NAMES if name in request.headers}

@app.get("/health")
@app.get("/healthy")
@app.get("/fetch")
async def fetch(url: str, library: str = "httpx", proxy: str | None = None):
    log.info("fetching")
    module = {"httpx": httpx, "httpx2": httpx2}[library]
    async with module.AsyncClient(proxy=proxy, follow_redirects=True, trust_env=False) as client:
        return (await client.get(url)).json()

# What a gateway does: the caller's headers go on.
@app.get("/pass-on")
async def pass_on(request: Request, url: str, library: str = "httpx", proxy: str | None = None):
    module = {"httpx": httpx, "httpx2": httpx2}[library]
    async with module.AsyncClient(proxy=proxy, follow_redirects=True, trust_env=False) as client:
        return (await client.get(url, headers=request.headers)).json()

@app.get("/pass-on-sync")
def pass_on_sync(request: Request, url: str, library: str = "httpx", proxy: str | None = None):
    module = {"httpx": httpx, "httpx2": httpx2}[library]
    with module.Client(proxy=proxy, follow_redirects=True, trust_env=False, headers=dict(request.headers)) as client:
        return client.get(url).json()

@app.get("/fetch-sync")
def fetch_sync(url: str, library: str = "httpx", proxy: str | None = None):
    module = {"httpx": httpx, "httpx2": httpx2}[library]
    with module.Client(proxy=proxy, follow_redirects=True, trust_env=False) as client:
        return client.get(url).json()
"""

# What comes behind: no telemetry; tells which headers arrived, and sends on to wherever it is told.
BEHIND = """
import json
from urllib.parse import unquote

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    names = ("x-request-id", "traceparent", "tracestate", "baggage", "x-correlation-id")
    body = json.dumps({name: headers[name] for name in names if name in headers}).encode()
    query = unquote(scope["query_string"].decode())
    start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
    if query.startswith("to="):
        start |= {"status": 302, "headers": [(b"location", query[3:].encode())]}
    await send(start)
    await send({"type": "http.response.body", "body": body})
"""

ALL = ["baggage", "traceparent", "tracestate", "x-request-id"]
SENT = {
    "x-request-id": UUID,
    "traceparent": PARENT.decode(),
    "tracestate": "vendor=theirs",
    "baggage": "tier=gold",
}


class Gate:
    """
    A gate with a service behind it and a sink for its spans.
    """

    def __init__(self, gate: Service, behind: Service, sink: OtlpSink) -> None:
        self.service = gate
        self.behind = behind
        self.sink = sink

    def get(self, path: str, headers: Mapping[str, str] | None = None, **query: str) -> httpx.Response:
        """
        Ask the gate.
        """
        response = httpx.get(self.service.url + path, params=query, headers=dict(headers or {}), trust_env=False)
        assert response.status_code == 200, response.text
        return response

    def spans(self, kind: str, count: int) -> list[Any]:
        """
        Return the spans of one kind, once there are so many.
        """

        def found() -> list[Any]:
            return [span for span in self.sink.spans if span.kind == kind]

        assert self.sink.wait(lambda: len(found()) >= count), self.service.output()
        return found()

    def lines(self, logger: str) -> list[dict[str, Any]]:
        """
        Return the gate's JSON lines of one logger.
        """
        return self.service.lines(logger=logger)


@contextmanager
def gate(directory: Path, *options: str, **variables: str) -> Generator[Gate]:
    """
    Run a gate with these variables.
    """
    (directory / "gate.py").write_text(GATE)
    (directory / "behind.py").write_text(BEHIND)
    run = ("uvicorn", "--port", "{port}")
    with OtlpSink() as sink:
        environment = clean_environment(
            OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint,
            OTEL_SERVICE_NAME="gate",
            OTEL_PYTHON_FASTAPI_EXCLUDED_URLS="health,openapi.json",
            **variables,
        )
        with (
            Service((*run, "behind:app"), directory, clean_environment(), ready="/") as behind,
            Service(("opentelemetry-instrument", *run, "gate:app", *options), directory, environment) as service,
        ):
            yield Gate(service, behind, sink)


@pytest.mark.slow
def test_the_preset(tmp_path: Path) -> None:
    """
    ``OTEL_CORRELATION_EDGE=public`` alone: new ids for everybody, ids for the service behind, none for the world.
    """
    # The header forces nothing where nobody is declared, and the log says so.
    forces = {"OTEL_CORRELATION_FORCE_SAMPLE_HEADER": "X-Force-Sample"}
    with gate(tmp_path, OTEL_CORRELATION_EDGE="public", **forces) as running:
        running.service.wait_for(
            lambda: [line for line in running.lines("otel_correlation") if "has no effect" in line["message"]]
        )
        answered = running.get("/got", SENT)
        (span,) = running.spans("SERVER", 1)
        new = answered.headers["x-request-id"]
        assert answered.json() == {"x-request-id": new}
        assert new == span.trace_id
        assert span.trace_id not in (TRACE, UUID.replace("-", ""))
        assert (span.parent_span_id, span.links) == ("", [(TRACE, CALLER)])
        assert span.attributes["request_id"] == new
        assert span.attributes["otel_correlation.caller.request_id"] == UUID
        running.service.wait_for_line(logger="otel_correlation.request", request_id=new)
        (line,) = running.lines("gate")
        assert (line["trace_id"], line["request_id"]) == (new, new)
        assert UUID not in running.service.stdout()

        inside = running.get("/fetch", SENT, url=running.behind.url)
        assert sorted(inside.json()) == ["traceparent", "tracestate", "x-request-id"]
        assert inside.json()["x-request-id"] == inside.headers["x-request-id"]
        # A name of the world, reached over a proxy that stands behind, too.
        for library in ("httpx", "httpx2"):
            for path in ("/fetch", "/fetch-sync"):
                world = running.get(
                    path, SENT, url="http://api.example.com/", proxy=running.behind.url, library=library
                )
                assert world.json() == {}
        assert len(running.spans("CLIENT", 5)) == 5


@pytest.mark.slow
def test_declared_callers_and_hosts(tmp_path: Path) -> None:
    """
    Declared networks are continued; a redirect to a host that is not declared loses what it may not have.
    """
    with gate(
        tmp_path,
        OTEL_CORRELATION_TRUSTED_NETWORKS="127.0.0.0/8, ::1",
        OTEL_CORRELATION_OUTBOUND_TRACEPARENT="127.0.0.1",
        OTEL_CORRELATION_OUTBOUND_BAGGAGE="127.0.0.1",
        OTEL_CORRELATION_OUTBOUND_REQUEST_ID="localhost",
    ) as running:
        assert running.get("/got", SENT).json() == SENT
        here = running.behind.url
        there = here.replace("127.0.0.1", "localhost")
        for library in ("httpx", "httpx2"):
            for path in ("/fetch", "/fetch-sync"):
                assert sorted(running.get(path, SENT, url=here, library=library).json()) == [
                    "baggage",
                    "traceparent",
                    "tracestate",
                ]
                assert sorted(running.get(path, SENT, url=there, library=library).json()) == ["x-request-id"]
                gone = running.get(path, SENT, url=f"{here}/?to={there}/", library=library)
                assert sorted(gone.json()) == ["x-request-id"]
                back = running.get(path, SENT, url=f"{there}/?to={here}/", library=library)
                assert sorted(back.json()) == ["baggage", "traceparent", "tracestate"]
        clients = running.spans("CLIENT", 4 * 6)
        assert {span.trace_id for span in clients} == {TRACE}
        assert sum(span.attributes.get("http.request.resend_count", 0) for span in clients) == 8


@pytest.mark.slow
@pytest.mark.parametrize("believed", ["127.0.0.1", "*"])
def test_behind_a_proxy(tmp_path: Path, believed: str) -> None:
    """
    The caller behind a declared proxy counts, whatever uvicorn makes of X-Forwarded-For.
    """
    with gate(
        tmp_path,
        "--forwarded-allow-ips",
        believed,
        OTEL_CORRELATION_EDGE="public",
        OTEL_CORRELATION_TRUSTED_NETWORKS="10.0.0.0/8",
        OTEL_CORRELATION_TRUSTED_PROXIES="127.0.0.1",
    ) as running:
        for forwarded, continued in (
            ("10.1.2.3", True),
            ("203.0.113.9, 10.1.2.3", True),
            ("203.0.113.9", False),
            ("10.1.2.3, 203.0.113.9", False),
            ("unknown", False),
        ):
            answered = running.get("/got", {**SENT, "X-Forwarded-For": forwarded})
            assert (answered.headers["x-request-id"] == UUID) is continued, forwarded
        assert running.get("/got", SENT).headers["x-request-id"] != UUID


@pytest.mark.slow
def test_without_a_declared_proxy(tmp_path: Path) -> None:
    """
    What uvicorn took from X-Forwarded-For makes nobody trusted: the socket's peer is the caller.
    """
    with gate(tmp_path, "--forwarded-allow-ips", "*", OTEL_CORRELATION_TRUSTED_NETWORKS="10.0.0.0/8") as running:
        answered = running.get("/got", {**SENT, "X-Forwarded-For": "10.1.2.3"})
        assert answered.headers["x-request-id"] != UUID


@pytest.mark.slow
def test_a_unix_socket(tmp_path: Path) -> None:
    """
    Over a Unix socket the peer is ``unix``: declared as a proxy, its header tells who calls.
    """
    (tmp_path / "gate.py").write_text(GATE)
    path = str(tmp_path / "gate.sock")
    environment = clean_environment(
        OTEL_TRACES_EXPORTER="none",
        OTEL_CORRELATION_TRUSTED_NETWORKS="10.0.0.0/8",
        OTEL_CORRELATION_TRUSTED_PROXIES="unix",
    )
    command = ("opentelemetry-instrument", "uvicorn", "--uds", path, "gate:app")
    with Service(command, tmp_path, environment, ready=None) as service:
        wait_for_socket(path, service)
        with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://gate") as client:
            for forwarded, continued in (("10.1.2.3", True), ("203.0.113.9", False)):
                answered = client.get("/got", headers={**SENT, "X-Forwarded-For": forwarded})
                assert (answered.headers["x-request-id"] == UUID) is continued
            assert client.get("/got", headers=SENT).headers["x-request-id"] != UUID


def wait_for_socket(path: str, service: Service) -> None:
    """
    Wait until somebody listens.
    """

    def listens() -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(path) == 0

    service.wait_for(listens)


@pytest.mark.slow
def test_forced_sampling(tmp_path: Path) -> None:
    """
    At ratio 0 one request of a declared caller is traced because it asks for it, with everything below it.
    """
    with gate(
        tmp_path,
        OTEL_TRACES_SAMPLER_ARG="0",
        OTEL_CORRELATION_TRUSTED_NETWORKS="127.0.0.1",
        OTEL_CORRELATION_FORCE_SAMPLE_HEADER="X-Force-Sample",
    ) as running:
        running.get("/fetch", url=running.behind.url)
        forced = running.get("/fetch", {"X-Force-Sample": "1"}, url=running.behind.url)
        running.get("/fetch", url=running.behind.url)
        trace_id = forced.headers["x-request-id"]
        assert forced.json()["traceparent"].startswith(f"00-{trace_id}-")
        assert forced.json()["traceparent"].endswith("-03")
        assert "th:" not in forced.json()["tracestate"]
        running.spans("SERVER", 1)
        running.spans("CLIENT", 1)
        running.service.stop()
        assert {span.trace_id for span in running.sink.spans} == {trace_id}
        assert len(running.sink.spans) == 2


@pytest.mark.slow
def test_wrong_values_close(tmp_path: Path) -> None:
    """
    A wrong word, network or pattern is one line each, and the service serves and trusts nobody by it.
    """
    with gate(
        tmp_path,
        OTEL_CORRELATION_EDGE="pubic",
        OTEL_CORRELATION_TRUSTED_NETWORKS="127.0.0.1/8",
        OTEL_CORRELATION_OUTBOUND_BAGGAGE="http://behind",
        OTEL_CORRELATION_FORCE_SAMPLE_HEADER="X-Force-Sample",
    ) as running:
        assert running.get("/got", SENT).headers["x-request-id"] != UUID
        running.service.stop()
        lines = [line["message"] for line in running.lines("otel_correlation") if "not usable" in line["message"]]
    closed = (
        "OTEL_CORRELATION_EDGE='pubic' is not usable (one of open, public); using public instead",
        "OTEL_CORRELATION_TRUSTED_NETWORKS='127.0.0.1/8' is not usable (127.0.0.1/8 has host bits set); using an entry that matches nothing",
        "OTEL_CORRELATION_OUTBOUND_BAGGAGE='http://behind' is not usable (not a host such as api.example.com,",
    )
    assert len(lines) == len(closed)
    for line, wanted in zip(lines, closed, strict=True):
        assert line.startswith(wanted)


@pytest.mark.slow
def test_excluded_routes_keep_the_callers_trace(tmp_path: Path) -> None:
    """
    An excluded route makes no span; its line, its response and its call onward stay in the caller's trace.
    """
    with gate(tmp_path) as running:
        answered = running.get("/health", SENT, url=running.behind.url)
        assert answered.headers["x-request-id"] == UUID
        onward = answered.json()
        assert onward["x-request-id"] == UUID
        assert onward["baggage"] == "tier=gold"
        assert onward["traceparent"].startswith(f"00-{TRACE}-")
        line = running.service.wait_for_line(logger="gate")
        assert (line["trace_id"], line["span_id"], line["request_id"]) == (TRACE, CALLER, UUID)
        # Without a caller's trace there is none below it either; anchored, the pattern leaves /healthy alone.
        running.get("/health", url=running.behind.url)
        running.get("/healthy", url=running.behind.url)
        running.service.stop()
        spans = running.sink.spans
    (call,) = [span for span in spans if span.trace_id == TRACE]
    assert (call.kind, call.parent_span_id, call.span_id) == ("CLIENT", CALLER, onward["traceparent"][36:52])
    others = [(span.name, span.kind) for span in spans if span is not call]
    assert sorted(others) == [("GET", "CLIENT"), ("GET /healthy", "SERVER")]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/pass-on", "/pass-on-sync"])
def test_a_gateway_that_passes_headers_on(path: str, tmp_path: Path) -> None:
    """
    ``headers=request.headers`` takes nothing to the world: not what a trusted caller sent, and not the id that the edge shows.
    """
    with gate(tmp_path, OTEL_CORRELATION_EDGE="public", OTEL_CORRELATION_TRUSTED_NETWORKS="none") as running:
        for library in ("httpx", "httpx2"):
            world = {"url": "http://api.example.com/", "proxy": running.behind.url, "library": library}
            # The stranger's own id, which is on the span, under a name that the edge leaves alone.
            assert running.get(path, {**SENT, "X-Correlation-ID": UUID}, **world).json() == {}
            inside = running.get(path, SENT, url=running.behind.url, library=library)
            assert inside.json()["x-request-id"] == inside.headers["x-request-id"]
    with gate(
        tmp_path,
        OTEL_CORRELATION_EDGE="public",
        OTEL_CORRELATION_TRUSTED_NETWORKS="127.0.0.0/8",
        OTEL_CORRELATION_REQUEST_ID_HEADERS="X-Request-ID,X-Correlation-ID",
    ) as running:
        sent = {**SENT, "X-Correlation-ID": "the-callers-second-id"}
        for library in ("httpx", "httpx2"):
            world = {"url": "http://api.example.com/", "proxy": running.behind.url, "library": library}
            assert running.get(path, sent, **world).json() == {}
            assert running.get(path, SENT, url=running.behind.url, library=library).json() == SENT
        assert running.get(path, {}, url="http://api.example.com/", proxy=running.behind.url).json() == {}
