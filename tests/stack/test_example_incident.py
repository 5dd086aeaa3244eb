"""
The engineer on call, with one id: which layer answered, which service waited for which connection, and for how long.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from otel_correlation.stores import Trace, cause, entry
from otel_correlation.stores.model import trace_from_json
from tests.stack.conftest import MACHINE
from tests.stack.harness import ROOT, Collector, Jaeger, Machine, eventually, get

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.needs("collector", "jaeger", "servers")

EXAMPLE = ROOT / "examples" / "incident"
SERVICES = ("checkout", "payments", "ledger")
# What no log and no span may hold. Each is sent in every request, or raised in an exception.
SECRETS = {
    "query": "token-in-a-query",
    "authorization": "token-in-a-header",
    "cookie": "session-in-a-cookie",
    "referrer": "token-in-a-referrer",
    "body": "password-in-a-body",
    "parameters": "card-number-among-the-parameters-of-a-statement",
    "input_value": "odd-card-number-as-an-input-value",
}


@dataclass(slots=True)
class Incident:
    """
    The example as its run.py starts it, and what an engineer on call has: curl, two kinds of logs, and ``find``.
    """

    machine: Machine
    programs: Path
    ports: dict[str, int]
    environment: dict[str, str]

    @property
    def directory(self) -> Path:
        """
        The folder with all logs of all processes.
        """
        return self.machine.directory / "incident"

    @property
    def shop(self) -> str:
        """
        Where customers are.
        """
        return f"http://127.0.0.1:{self.ports['nginx']}"

    @contextlib.contextmanager
    def running(self) -> Iterator[Incident]:
        """
        Start it, and end it as Ctrl-C does; nothing of it may be left.
        """
        self.directory.mkdir()
        command = [self.programs / "python", EXAMPLE / "run.py"]
        process = self.machine.start("incident", command, self.environment)
        try:
            eventually("the shop", lambda: "The incident:" in process.log.read_text(), while_running=[process])
            pids = [int(path.read_text()) for path in self.directory.glob("*.pid")]
            yield self
        finally:
            assert process.stop() == 0
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    def end(self, name: str, number: signal.Signals) -> None:
        """
        Send a signal to one of its programs, and return when nothing listens at its port.
        """
        os.kill(int((self.directory / f"{name}.pid").read_text()), number)

        def gone() -> bool:
            with socket.socket() as probe:
                return bool(probe.connect_ex(("127.0.0.1", self.ports[name])))

        eventually(f"the end of {name}", gone)

    def ask(
        self,
        method: str,
        path: str,
        order: object = None,
        *,
        content: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        """
        Send one request with a secret in each place where requests have secrets.
        """
        secret = {
            "Authorization": f"Bearer {SECRETS['authorization']}",
            "Cookie": f"session={SECRETS['cookie']}",
            "Referer": f"http://shop.example/?token={SECRETS['referrer']}",
            "Content-Type": "application/json",
        }
        body = json.dumps(order).encode() if content is None and order is not None else content
        with httpx.Client(trust_env=False, timeout=90) as client:
            response = client.request(
                method,
                f"{self.shop}{path}",
                params={"token": SECRETS["query"]},
                headers=secret | (headers or {}),
                content=body,
            )
        assert len(response.headers.get_list("x-request-id")) == 1
        return response

    def access_line(self, request_id: str) -> dict[str, Any]:
        """
        Return the one line of nginx's access log that has this request id.
        """

        def lines() -> list[dict[str, Any]]:
            every = (json.loads(line) for line in (self.directory / "nginx-access.log").read_text().splitlines())
            return [line for line in every if line["request_id"] == request_id]

        (line,) = eventually(f"nginx's line of {request_id}", lines)
        return line

    def lines(self, service: str, request_id: str) -> list[dict[str, Any]]:
        """
        Return the JSON lines of a service's own log that have this request id.
        """
        every = (self.directory / f"{service}.log").read_text().splitlines()
        parsed = (json.loads(line) for line in every if line.startswith("{"))
        return [line for line in parsed if line.get("request_id") == request_id]

    def find(self, request_id: str, *options: str) -> str:
        """
        Return what ``otel-correlation find`` prints, empty while it finds nothing.
        """
        command = [str(self.programs / "otel-correlation"), "find", *options, request_id]
        environment = {**os.environ, **self.environment, "COLUMNS": "120"}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
        assert ended.returncode in (0, 1), ended.stderr
        return ended.stdout if ended.returncode == 0 else ""

    def told(self, request_id: str, *parts: str) -> str:
        """
        Return what ``find`` prints once all of ``parts`` are in it.
        """

        def answer() -> str:
            text = self.find(request_id)
            return text if all(part in text for part in parts) else ""

        try:
            return eventually(f"{parts} of {request_id}", answer)
        except AssertionError as error:
            raise AssertionError(f"{error}; find says:\n{self.find(request_id)}") from None

    def story(self, request_id: str, complete: Callable[[Trace], bool]) -> Trace:
        """
        Return the one trace that ``find --json`` tells, once it is complete.
        """

        def trace() -> Trace | None:
            found = [
                trace_from_json(one) for one in json.loads(self.find(request_id, "--json") or "{}").get("traces", [])
            ]
            return found[0] if found and complete(found[0]) else None

        return eventually(f"the trace of {request_id}", trace)

    def logs(self) -> dict[str, str]:
        """
        Return everything that any process wrote, by file.
        """
        files = [path for path in self.directory.rglob("*") if path.is_file()]
        return {path.name: path.read_text(errors="replace") for path in [*files, *self.machine.directory.glob("*.log")]}


def build(machine: Machine, programs: Path, **environment: str) -> Incident:
    """
    Return the example with ports of its own, not started.
    """
    names = ("nginx", *SERVICES, "postgres", "viewer")
    ports = {name: machine.port() for name in names}
    variables = {f"{name.upper()}_PORT": str(port) for name, port in ports.items()}
    variables["INCIDENT_DIRECTORY"] = str(machine.directory / "incident")
    variables["OTEL_CORRELATION_STORES"] = f"http://127.0.0.1:{ports['viewer']}"
    # The environment of the other libraries, not that of the tests.
    variables["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return Incident(machine, programs, ports, variables | environment)


@pytest.fixture(scope="module")
def incident(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, libraries: Path
) -> Iterator[Incident]:
    """
    One running example for the tests of this module.
    """
    machine = request.node.stash[MACHINE] = Machine(tmp_path_factory.mktemp("incident"))
    try:
        with build(machine, libraries).running() as incident:
            yield incident
    finally:
        machine.clean_up()


def quoted_by_a_customer(incident: Incident) -> str:
    """
    Return the id that load.py's customer reads aloud: it runs until an order is refused.
    """
    command = [incident.programs / "python", EXAMPLE / "load.py"]
    environment = {**os.environ, **incident.environment}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    quoted = re.search(r'"I got a 503, it says (\S+)"', ended.stdout)
    assert quoted, ended.stdout + ended.stderr
    return quoted[1]


WAITED = re.compile(
    r"pool (\w+): waited (\d+\.\d+) s, (\d+) of (\d+) connections in use; held by (\w+) for (\d+\.\d+) s"
)


def test_one_id_says_which_service_waited_for_which_connection_and_for_how_long(incident: Incident) -> None:
    """
    From the id alone: the ledger waited a second for one of two connections, and its statements held both.
    """
    request_id = quoted_by_a_customer(incident)
    answer = incident.told(request_id, "Cause", *SERVICES, "POST /orders 503")
    why = answer.partition("Cause")[2].partition("Waterfall")[0]
    assert why.split()[0] == "ledger"
    assert "database.py" in why
    found = WAITED.search(" ".join(why.split()))
    assert found, why
    pool, waited, in_use, size, holder, held = found.groups()
    assert (pool, in_use, size) == ("ledger", "2", "2")
    assert float(waited) >= 1.0
    assert float(held) > float(waited) - 0.1  # Rounded to a tenth.
    assert re.search(r"ledger +wait for a connection of pool ledger .* \d\.\d\d s +failed", answer)
    # And who had it: the id of the holder is the next one to ask for.
    story = incident.story(holder, is_complete)
    begin = entry(story)
    assert begin is not None
    assert begin.name == "GET /statements/{month}"
    assert begin.end_ns - begin.start_ns > float(held) * 1e9
    assert "making the PDF" in incident.find(holder)
    trace = incident.story(request_id, is_complete)
    line = incident.access_line(request_id)
    assert who_answered(line, trace) == "database"
    assert_written(row("POST", "/orders", line, "database", trace))


def test_jaeger_tells_the_same_with_the_official_instrumentation(
    machine: Machine, collector: Collector, jaeger: Jaeger, libraries: Path
) -> None:
    """
    Over the shipped collector, from Jaeger: SQLAlchemy's "connect" span is as long as the wait, and says how large the pool is.
    """
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collector.http}",
        "OTEL_CORRELATION_STORES": f"jaeger=http://{jaeger.query}",
        "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "asyncpg",
    }
    with build(machine, libraries, **environment).running() as incident:
        answer = incident.told(quoted_by_a_customer(incident), "Cause", *SERVICES, "POST /orders 503")
        broken = incident.ask("POST", "/orders", an_order(card=SECRETS["parameters"])).headers["x-request-id"]
        incident.told(broken, "Cause", "CheckViolationError", "POST /orders 500")
    assert_no_secret(incident, jaeger.raw(broken))
    why = " ".join(answer.partition("Cause")[2].partition("Waterfall")[0].split())
    assert why.startswith("ledger ")
    assert "database.py" in why
    assert "QueuePool limit of size 2 overflow 0 reached, connection timed out, timeout 1.00" in why
    assert re.search(r"ledger +connect .* \d\.\d\d s +failed", answer)


@dataclass(frozen=True, slots=True)
class Case:
    """
    One request and who must have answered it.
    """

    method: str
    path: str
    status: int
    layer: str
    order: object = None
    content: bytes | None = None


def an_order(**more: object) -> dict[str, object]:
    """
    Return an order with a number that nobody has used.
    """
    return {"number": uuid.uuid4().int % 2**31, "sku": "lamp", "cents": 4900, "card": "card-1", **more}


BROKEN = {"number": SECRETS["body"], "password": SECRETS["body"]}
CASES = {
    "413 of nginx": Case("POST", "/orders", 413, "proxy", content=b"x" * 70_000),
    "404 of nginx": Case("GET", "/static/nothing.css", 404, "proxy"),
    "405 of nginx": Case("POST", "/static/shop.css", 405, "proxy"),
    "504 of nginx": Case("GET", "/orders/7/tracking", 504, "proxy, the service is slow"),
    "502 of nginx": Case("GET", "/labels/7/barcode", 502, "proxy, the service hung up"),
    "413 of a middleware": Case("POST", "/orders", 413, "middleware", content=b"x" * 6_000),
    "404 of the router": Case("GET", "/orders/7/invoice", 404, "router"),
    "405 of the router": Case("DELETE", "/orders/7", 405, "router"),
    "422 of validation": Case("POST", "/orders", 422, "validation", BROKEN),
    "404 of a handler": Case("GET", "/orders/2147483647", 404, "handler"),
    "500 of a handler": Case("GET", "/labels/7", 500, "handler"),
    "502 of a handler": Case("POST", "/orders", 502, "handler", an_order(card=SECRETS["input_value"])),
    "504 of a handler": Case("POST", "/orders", 504, "handler", an_order(card="slow-card")),
    "500 of the database": Case("POST", "/orders", 500, "database", an_order(card=SECRETS["parameters"])),
}


def is_complete(trace: Trace) -> bool:
    """
    Tell whether the request has ended and every hop that answered is there.
    """
    begin = entry(trace)
    parents = {span.parent_id for span in trace.spans if span.kind == "SERVER"}
    hops = [span for span in trace.spans if span.kind == "CLIENT" and "http.response.status_code" in span.attributes]
    summaries = {line.service for line in trace.logs if line.logger == "otel_correlation.request"}
    return (
        begin is not None
        and begin.kind == "SERVER"
        and begin.name not in ("POST /payments", "POST /entries")  # Later hops, whose spans may come first.
        and begin.service in summaries
        and all(span.span_id in parents for span in hops)
    )


def who_answered(line: dict[str, Any], trace: Trace | None) -> str:
    """
    Return the layer, from nginx's line and what ``find`` tells of the id on it: the rules of docs/how-to/on-call.md.
    """
    if line["answered_by"] == "proxy":
        if not line["upstream"]:
            return "proxy"
        if line["upstream_connect_s"] == "-":
            return "proxy, the service is gone"
        return "proxy, the service is slow" if line["status"] == 504 else "proxy, the service hung up"
    begin = entry(trace) if trace else None
    if trace is None or begin is None:
        return "server"
    if "http.route" not in begin.attributes or line["status"] == 405:
        return "router"
    if line["status"] == 422:
        return "validation"
    if any(span.failed and ("db.system" in span.attributes or "pool.size" in span.attributes) for span in trace.spans):
        return "database"
    loggers = {log.logger for log in trace.logs if log.service == begin.service} - {"otel_correlation.request"}
    return "middleware" if len(trace.spans) == 1 and loggers == {"shop.checkout.bodies"} else "handler"


def row(method: str, path: str, line: dict[str, Any], layer: str, trace: Trace | None) -> str:
    """
    Return the line of the documents' table that says what was seen.
    """
    begin = entry(trace) if trace else None
    why = cause(trace) if trace else None
    upstream = line["upstream_status"] or "none"
    span = f"`{begin.name}`" if begin else "none"
    told = f"{why.service}: {why.type.rpartition('.')[2]}" if why else ""
    return f"| `{method} {path}` | {line['status']} | {layer} | {line['answered_by']}, {upstream} | {span} | {told} |"


def assert_written(seen: str) -> None:
    """
    The example's README and the how-to have this row.
    """
    for page in (EXAMPLE / "README.md", ROOT / "docs" / "how-to" / "on-call.md"):
        assert seen in page.read_text().splitlines(), f"{page.name} lacks:\n{seen}"


def assert_no_secret(incident: Incident, *texts: str) -> None:
    """
    No log of any process, and none of ``texts``, holds one of the secrets.
    """
    for where, text in [*incident.logs().items(), *(("the store", text) for text in texts)]:
        for place, secret in SECRETS.items():
            assert secret not in text, f"{where} has the secret of the {place}: {excerpt(text, secret)}"


def excerpt(text: str, secret: str) -> str:
    """
    Return where it stands.
    """
    at = text.index(secret)
    return text[max(0, at - 300) : at + 100]


@pytest.mark.parametrize("name", CASES)
def test_the_layer_that_answered_is_known_from_the_id(incident: Incident, name: str) -> None:
    """
    The id on the response is in nginx's access log, on the service's lines and on its spans, and together they name the layer.
    """
    case = CASES[name]
    response = incident.ask(case.method, case.path, case.order, content=case.content)
    assert response.status_code == case.status, response.text
    request_id = response.headers["x-request-id"]
    line = incident.access_line(request_id)
    assert (line["status"], line["method"], line["path"]) == (case.status, case.method, case.path)
    assert line["trace_id"] == line["response_id"] == request_id
    answered_by_a_service = line["answered_by"] == "upstream"
    assert ("answered" in response.text and request_id in response.text) is not answered_by_a_service
    # A slow handler goes on after nginx has given up: its span comes late. One that was killed leaves its line.
    slow = case.layer == "proxy, the service is slow"
    trace = incident.story(request_id, is_complete) if answered_by_a_service or slow else None
    if line["upstream"]:
        eventually(f"a line of {request_id}", lambda: incident.lines("checkout", request_id))
    if trace is not None:
        begin = entry(trace)
        assert begin is not None
        assert slow or begin.attributes["http.response.status_code"] == case.status
        assert {part.request_id for part in trace.parts} == {request_id}
        for service in {span.service for span in trace.spans}:
            lines = eventually(f"lines of {service}", lambda service=service: incident.lines(service, request_id))  # type: ignore[misc]
            assert {one["trace_id"] for one in lines} == {trace.trace_id}
    assert who_answered(line, trace) == case.layer, str(trace)
    assert_no_secret(incident, str(trace))
    assert_written(row(case.method, case.path, line, case.layer, trace))


def test_a_503_of_the_server_has_an_id_and_nothing_else(incident: Incident) -> None:
    """
    What uvicorn refuses by itself no code of a service sees: nginx's line says that a service answered, and no line or span does.
    """
    held: list[socket.socket] = []

    def refused() -> httpx.Response | None:
        held.extend(socket.create_connection(("127.0.0.1", incident.ports["checkout"]), 5) for _ in range(10))
        response = incident.ask("GET", "/orders/7")
        return response if response.status_code == 503 else None

    try:
        response = eventually("a 503", refused)
    finally:
        for connection in held:
            connection.close()
    line = incident.access_line(response.headers["x-request-id"])
    served = eventually("room", lambda: one if (one := incident.ask("GET", "/orders/7")).status_code != 503 else None)
    incident.story(served.headers["x-request-id"], is_complete)  # So this one would be there too by now.
    assert incident.find(line["request_id"]) == ""
    assert incident.lines("checkout", line["request_id"]) == []
    assert who_answered(line, None) == "server"
    assert_written(row("GET", "/orders/7", line, "server", None))


def test_a_service_and_a_database_that_are_gone(machine: Machine, libraries: Path) -> None:
    """
    With the checkout stopped nginx answers 502 with an id; with PostgreSQL killed, the ledger's own 500 says that it cannot connect.
    """
    with build(machine, libraries).running() as incident:
        incident.end("checkout", signal.SIGTERM)
        response = incident.ask("POST", "/orders", an_order())
        assert response.status_code == 502
        assert response.json()["request_id"] == response.headers["x-request-id"]
        line = incident.access_line(response.headers["x-request-id"])
        assert who_answered(line, None) == "proxy, the service is gone"
        assert_written(row("POST", "/orders", line, "proxy, the service is gone", None))

        incident.end("postgres", signal.SIGKILL)
        response = incident.ask("GET", "/statements/2026-11")
        assert response.status_code == 500
        line = incident.access_line(response.headers["x-request-id"])
        trace = incident.story(line["request_id"], is_complete)
        assert who_answered(line, trace) == "database"
        assert_written(row("GET", "/statements/2026-11", line, "database", trace))
    assert_no_secret(incident, str(trace))


def test_no_secret_is_in_any_log_or_span(incident: Incident) -> None:
    """
    Bodies, queries, credentials, cookies, parameters of statements and quoted input are in no file and nowhere in the store.
    """
    sent = [
        incident.ask("POST", "/orders", order)
        for order in (
            an_order(card=SECRETS["body"]),
            an_order(card=SECRETS["parameters"]),
            an_order(card=SECRETS["input_value"]),
            BROKEN,
        )
    ]
    assert [response.status_code for response in sent] == [201, 500, 502, 422]
    ids = [response.headers["x-request-id"] for response in sent]
    for request_id in ids:
        incident.story(request_id, is_complete)
    store = f"http://127.0.0.1:{incident.ports['viewer']}/api/traces"
    listed = get(store).json()["traces"]
    everything = [get(f"{store}/{one['trace_id']}").text for one in listed]
    assert {one["trace_id"] for one in listed} >= set(ids)
    assert_no_secret(incident, *everything)
    # They were not left out by saying nothing: the exceptions are there.
    for told in ("IntegrityError", "CheckViolationError", "ValidationError"):
        assert any(told in text for text in everything)
        eventually(told, lambda told=told: told in "".join(incident.logs().values()))  # type: ignore[misc]


@pytest.mark.parametrize(
    "unsafe",
    ["two words", "<script>alert(1)</script>", 'a"b\\c', "x" * 201, "ada@example.com", "%0d%0aSet-Cookie:a=b"],
    ids=["space", "script", "quotes", "201", "address", "encoded"],
)
def test_an_unsafe_id_is_replaced_before_anything_sees_it(incident: Incident, unsafe: str) -> None:
    """
    Nginx replaces what the contract refuses, so all parties agree on the new id, and the value is in no log.
    """
    response = incident.ask("GET", "/orders/7", headers={"X-Request-ID": unsafe})
    request_id = response.headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", request_id)
    trace = incident.story(request_id, is_complete)
    assert {part.request_id for part in trace.parts} == {request_id}
    eventually("its line", lambda: incident.lines("checkout", request_id))
    assert not [name for name, text in incident.logs().items() if unsafe in text or json.dumps(unsafe)[1:-1] in text]


@pytest.mark.parametrize("traceparent", [False, True])
@pytest.mark.parametrize("form", ["text", "uuid", "hex"])
def test_a_callers_id_reaches_every_log_and_leads_to_its_trace(
    incident: Incident, form: str, *, traceparent: bool
) -> None:
    """
    The caller's id stays as it is, and the trace id in nginx's line is the one that the services used.
    """
    number, caller = uuid.uuid4(), uuid.uuid4().hex
    request_id = {"text": f"ticket/{number}#7", "uuid": str(number), "hex": number.hex}[form]
    headers = {"traceparent": f"00-{caller}-{caller[:16]}-01"} if traceparent else {}
    response = incident.ask("GET", "/orders/7", headers={"X-Request-ID": request_id, **headers})
    assert response.headers.get_list("x-request-id") == [request_id]
    trace = incident.story(request_id, is_complete)
    assert {part.request_id for part in trace.parts} == {request_id}
    line = incident.access_line(request_id)
    # nginx cannot compute the hash that other ids lead to; ``find`` can.
    assert line["trace_id"] == (trace.trace_id if traceparent or form != "text" else "")
    assert not traceparent or trace.trace_id == caller


def test_the_how_to_shows_the_examples_own_code() -> None:
    """
    Every line of Python in the how-to stands in the example, in this order.
    """
    page = (ROOT / "docs" / "how-to" / "on-call.md").read_text()
    source = {path.name: path.read_text().splitlines() for path in EXAMPLE.glob("*.py")}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    for block, name in zip(blocks, ("database.py", "gunicorn.conf.py"), strict=True):
        lines = iter([line.strip() for line in source[name]])
        assert all(line.strip() in lines for line in block.splitlines()), name
    raising = next(n for n, line in enumerate(source["database.py"], 1) if "raise NoConnectionError" in line)
    assert f"database.py:{raising} in transaction" in (EXAMPLE / "README.md").read_text()
