"""
The migration pages against reality: one set of requests under stock, FastAPI's own telemetry and ours, and their blocks.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastapi.applications
import httpx
import pytest
from opentelemetry.util.http import parse_excluded_urls

from otel_correlation.policy import Patterns
from otel_correlation.settings import from_environment
from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import DEADLINE_S, Service, clean_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGES = Path(__file__).parents[2] / "docs/how-to"
CONTRIB = (PAGES / "migrate-from-contrib.md").read_text()
NATIVE = (PAGES / "migrate-from-fastapi-native.md").read_text()
ASGI_CORRELATION_ID = (PAGES / "migrate-from-asgi-correlation-id.md").read_text()
TUTORIAL = (PAGES / "migrate-from-tutorial-middleware.md").read_text()
FASTAPI = Path(fastapi.applications.__file__).read_text()
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
ITEM, MAIL, MOUNTED, BOOM, INVALID, SOCKET = "/items/3?q=x", "/mail", "/sub/items/3", "/boom", "/items/none", "/ws"
ALL = (ITEM, MAIL, MOUNTED, BOOM, INVALID, SOCKET)
ZERO = ("opentelemetry-instrument",)
UVICORN = ("uvicorn", "main:app", "--port", "{port}")
COLLECT = """
from fastapi.telemetry import get_telemetry_data
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

memory = InMemorySpanExporter()
trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(memory))


def seen(exporter=memory):
    found = [span for span in exporter.get_finished_spans() if span.kind is not trace.SpanKind.CLIENT]
    exporter.clear()
    return [span.name for span in found]
"""


def table(page: str, *header: str) -> list[list[str]]:
    """
    Return the rows of the table whose header starts with these cells; an escaped bar is none.
    """

    def cells(line: str) -> list[str]:
        return [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]

    lines = iter(page.splitlines())
    for line in lines:
        if line.startswith("|") and cells(line)[: len(header)] == list(header):
            next(lines)
            rows: list[list[str]] = []
            for row in lines:
                if not row.startswith("|"):
                    break
                rows.append(cells(row))
            return rows
    raise AssertionError(f"no table {header}")


def names(cell: str) -> list[str]:
    """
    Return what stands in backticks.
    """
    return re.findall(r"`([^`]+)`", cell)


def python(script: str, *arguments: str, **variables: str) -> str:
    """
    Run Python in a process of its own; return what it printed.
    """
    ended = subprocess.run(
        [sys.executable, *(("-c", script) if "\n" in script else (script,)), *arguments],
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
        check=False,
        env=clean_environment(**variables),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@cache
def traffic(variant: str) -> dict[str, Any]:
    """
    Return what the requests of migration_traffic.py left behind under ``stock``, ``native`` or ``ours``.
    """
    printed = python(
        str(Path(__file__).with_name("migration_traffic.py")),
        variant,
        OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_SERVER_REQUEST="x-tenant",
        OTEL_PYTHON_LOG_CORRELATION="true",
        OTEL_SERVICE_NAME="shop",
    )
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def spans(variant: str, path: str, kind: str) -> list[dict[str, Any]]:
    return [span for span in traffic(variant)["spans"][path] if span["kind"] == kind]


def one(variant: str, path: str, kind: str) -> dict[str, Any]:
    (span,) = spans(variant, path, kind)
    return span


def span_names(variant: str) -> set[str]:
    return {span["name"] for path in ALL for span in traffic(variant)["spans"][path]}


# Contrib


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "header"), [("SERVER", "SERVER span, there"), ("CLIENT", "CLIENT span, there")])
def test_contribs_names_and_ours_are_as_the_table_says(kind: str, header: str) -> None:
    """
    Each old name is on stock's span, each new one on ours with the same value; no attribute of stock's is left out.
    """
    stock, ours = one("stock", ITEM, kind)["attributes"], one("ours", ITEM, kind)["attributes"]
    rows = [(names(there), names(here)) for there, here in table(CONTRIB, header, "here")]
    assert sorted(name for there, _ in rows for name in there) == sorted(stock)
    for there, here in rows:
        for name in there:
            assert name in here or name not in ours
        assert set(here) <= ours.keys(), here
        if len(here) == 1:
            assert {json.dumps(stock[name]) for name in there} == {json.dumps(ours[here[0]])}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SERVER", "CLIENT"])
def test_http_dup_adds_stocks_names_with_stocks_values(kind: str) -> None:
    """
    With ``http/dup`` every attribute of stock's span is on ours, with the same value; captured headers excepted.
    """
    stock, both = one("stock", ITEM, kind)["attributes"], one("ours", ITEM, kind)["with_old_names"]
    wanted = {name: value for name, value in stock.items() if not name.startswith("http.request.header.")}
    assert {name: both.get(name) for name in wanted} == wanted


@pytest.mark.slow
def test_the_numbers_of_spans_are_as_the_page_says() -> None:
    """
    Spans of a request under stock and under ours, and every name that the page shows was seen.
    """

    def kinds(variant: str, path: str) -> list[str]:
        return sorted(span["kind"] for span in traffic(variant)["spans"][path] if span["kind"] != "CLIENT")

    assert {path: kinds("ours", path) for path in ALL} == {
        **{path: ["SERVER"] for path in (ITEM, MAIL, MOUNTED, BOOM, INVALID)},
        SOCKET: ["INTERNAL", "SERVER"],
    }
    counts = {path: len(kinds("stock", path)) for path in ALL}
    # connect, accept, receive, send, close
    assert counts == {ITEM: 3, MAIL: 4, MOUNTED: 6, BOOM: 3, INVALID: 3, SOCKET: 6}
    for _, there, here in table(CONTRIB, "request", "there", "here"):
        assert set(names(there)) <= span_names("stock")
        assert set(names(here)) <= span_names("ours")
    assert {span["scope"] for span in traffic("ours")["spans"][ITEM]} == {
        "otel_correlation.server",
        "otel_correlation.client",
    }


@pytest.mark.parametrize("row", table(CONTRIB, "`health` and", "there", "here"), ids=lambda row: row[0])
def test_exclusions_match_as_the_page_says(row: list[str]) -> None:
    """
    The pattern ``health`` against each URL, by contrib's matcher and by ours.
    """
    (url,) = names(row[0])
    words = {True: "excluded", False: "traced"}
    assert words[parse_excluded_urls("health").url_disabled(url)] == row[1]
    assert words[Patterns("health").match(httpx.URL(url).path, url)] == row[2]


@pytest.mark.slow
def test_log_fields_are_as_the_table_says() -> None:
    """
    Records have our fields, and with the switch contrib's beside them, with the same values.
    """
    record = traffic("ours")["record"]
    rows = [
        (names(there), names(here)) for there, here in table(CONTRIB, "there", "here") if "otel" in there or not there
    ]
    assert [here[0] for _, here in rows] == ["trace_id", "span_id", "trace_flags", "service_name", "request_id"]
    for there, here in rows:
        assert record[here[0]]
        if there and here[0] != "trace_flags":
            assert record[there[0]] == record[here[0]]
    assert (record["otelTraceSampled"], record["trace_flags"]) == (True, "03")
    assert record["request_id"] == traffic("ours")["responses"][ITEM]["request_id"]


@pytest.mark.slow
def test_metrics_are_as_the_table_says() -> None:
    """
    Metric names and units under stock and under ours; none is left out.
    """
    rows = table(CONTRIB[CONTRIB.index("## Metrics") :], "there", "here")
    assert sorted(name for there, _ in rows for name in names(there)) == sorted(traffic("stock")["metrics"])
    assert sorted(name for _, here in rows for name in names(here)) == sorted(traffic("ours")["metrics"])
    units = {"milliseconds": "ms", "seconds": "s"}
    for variant, cells in (("stock", [row[0] for row in rows]), ("ours", [row[1] for row in rows])):
        for cell in cells:
            name, _, unit = cell.rpartition(", ")
            if unit in units:
                assert traffic(variant)["metrics"][names(name)[0]] == units[unit]


def test_queries_use_the_names_of_the_tables() -> None:
    """
    What the queries ask for before and after stands in the tables on the same sides.
    """
    there, here = set[str](), set[str]()
    for header in ("SERVER span, there", "CLIENT span, there", "there"):
        for row in table(CONTRIB, header, "here"):
            there |= set(names(row[0]))
            here |= set(names(row[1]))
    for _, before, after in table(CONTRIB, "", "before", "after"):
        for query, known in ((before, there), (after, here)):
            asked = {name.removeprefix("span.") for name in re.findall(r"[a-z_]+(?:\.[a-z_]+)+", query)}
            asked |= set(re.findall(r"json \| (\w+)=", query))
            assert asked <= known, query
    prometheus = next(row for row in table(CONTRIB, "", "before", "after") if row[0] == "Prometheus")
    assert "http_server_duration_milliseconds_bucket" in prometheus[1]
    assert "http_server_request_duration_seconds_bucket" in prometheus[2]


def test_the_defaults_are_as_the_table_says() -> None:
    """
    What an empty environment gives, and what the page says it gives; the values that keep contrib's are taken.
    """
    rows = {names(row[0])[0]: row for row in table(CONTRIB, "variable", "there", "here")}
    ours = from_environment({})
    assert names(rows["OTEL_EXPORTER_OTLP_PROTOCOL"][2]) == [ours.traces_protocol]
    assert ours.traces_endpoint.startswith("http://localhost:4318")
    assert (ours.logs_exporters, ours.metrics_exporters) == ((), ())
    assert names(rows["OTEL_BSP_SCHEDULE_DELAY"][2]) == [str(ours.schedule_delay_ms)]
    kept = from_environment({variable: names(row[3])[0] for variable, row in rows.items()})
    assert not kept.problems
    assert (kept.traces_protocol, kept.logs_exporters, kept.metrics_exporters) == ("grpc", ("otlp",), ("otlp",))
    assert kept.schedule_delay_ms == 5000
    package = Path(__file__).parents[2] / "otel_correlation"
    assert not [path for path in package.rglob("*.py") if "OTEL_PYTHON_LOG_FORMAT" in path.read_text()]


@pytest.mark.slow
def test_contribs_code_runs_as_it_is() -> None:
    """
    Hooks, exclusion, header capture and the service's name of the page's block, below ``bootstrap()``.
    """
    (block,) = PYTHON.findall(CONTRIB)
    check = """
import httpx
from opentelemetry import trace
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

memory = InMemorySpanExporter()
trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(memory))


@app.get("/items")
def items():
    httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(200))).get("http://stock.example/lamp")
    return {}


@app.get("/health")
def health():
    return {}


client = TestClient(app)
assert client.get("/items", headers={"x-tenant": "acme"}).headers["x-request-id"]
assert client.get("/health").headers["x-request-id"]
(server,) = [span for span in memory.get_finished_spans() if span.kind is trace.SpanKind.SERVER]
assert server.name == "GET /items"
assert server.attributes["tenant"] == "acme"
assert server.attributes["http.request.header.x-tenant"] == ("acme",)
assert server.resource.attributes["service.name"] == "shop"
calls = [span for span in memory.get_finished_spans() if span.attributes.get("server.address") == "stock.example"]
assert [span.attributes["peer.service"] for span in calls] == ["stock.example"]
"""
    python(block + check, OTEL_TRACES_EXPORTER="none")


@pytest.mark.slow
def test_contribs_message_spans_can_be_had_back() -> None:
    """
    ``exclude_spans=[]`` and a ``client_response_hook`` bring the INTERNAL spans of messages back, as the page says.
    """
    script = f"""
from fastapi import FastAPI
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from otel_correlation import bootstrap
bootstrap()
{COLLECT}


def spans(**options):
    app = FastAPI()
    FastAPIInstrumentor.instrument_app(app, **options)
    app.add_api_route("/data", lambda: {{}})
    TestClient(app).get("/data")
    return sorted(seen())


message = "GET /data http send"
assert spans() == ["GET /data"]
assert spans(exclude_spans=[]).count(message) == 2
assert spans(client_response_hook=lambda span, scope, message: None) == ["GET /data", message, message]
"""
    python(script, OTEL_TRACES_EXPORTER="none")


# FastAPI's own telemetry


@pytest.mark.slow
def test_what_fastapi_puts_on_a_request_stands_on_ours() -> None:
    """
    Each attribute of FastAPI's SERVER span is on ours with the same value; the page names what is added.
    """
    (row,) = [row for row in table(NATIVE, "", "FastAPI", "here") if row[0] == "added to SERVER"]
    for path in (ITEM, MAIL, MOUNTED, BOOM, INVALID):
        native, ours = one("native", path, "SERVER")["attributes"], one("ours", path, "SERVER")["attributes"]
        assert {name: ours.get(name) for name in native} == native
        assert set(names(row[2])) <= ours.keys() - native.keys()
        assert one("native", path, "SERVER")["name"] == one("ours", path, "SERVER")["name"]


@pytest.mark.slow
def test_the_differences_to_fastapi_are_as_the_table_says() -> None:
    """
    Scopes, spans, events and metrics of both, by the names that the page shows.
    """
    rows = {row[0]: row[1:] for row in table(NATIVE, "", "FastAPI", "here")}
    scopes = [{span["scope"] for span in spans(variant, ITEM, "SERVER")} for variant in ("native", "ours")]
    assert scopes == [set(names(cell)) for cell in rows["scope"]]
    operations = {span["name"] for path in ALL for span in spans("native", path, "INTERNAL")}
    assert set(names(rows["spans of a request"][0])) == operations
    assert not [path for path in (ITEM, MAIL, MOUNTED, BOOM, INVALID) if spans("ours", path, "INTERNAL")]
    for variant, cell in zip(("native", "ours"), rows["a WebSocket"], strict=True):
        found = {span["name"] for span in traffic(variant)["spans"][SOCKET]}
        assert found - operations == set(names(cell))
    assert [one(variant, BOOM, "SERVER")["events"] for variant in ("native", "ours")] == [[], ["exception"]]
    assert one("ours", INVALID, "SERVER")["attributes"]["otel_correlation.validation_errors"] == [
        "path.item_id: int_parsing"
    ]
    assert [len(spans(variant, ITEM, "CLIENT")) for variant in ("native", "ours")] == [0, 1]
    assert sorted(names(rows["metrics"][0])) == sorted(traffic("native")["metrics"])
    assert sorted([*names(rows["metrics"][0]), *names(rows["metrics"][1])]) == sorted(traffic("ours")["metrics"])


def test_every_option_of_fastapis_telemetry_is_on_the_page() -> None:
    """
    The table of options has each key that ``FastAPI(telemetry={...})`` takes.
    """
    from fastapi.telemetry import TelemetryConfig

    listed = {name for row in table(NATIVE, "`FastAPI(telemetry={...})`", "here") for name in names(row[0])}
    assert listed >= TelemetryConfig.__annotations__.keys()


def test_every_argument_of_asgi_correlation_id_is_on_the_page() -> None:
    """
    The tables have each argument that the installed middleware and filter take.
    """
    installed = pytest.importorskip("asgi_correlation_id")  # not among the oldest versions
    for theirs in ("CorrelationIdMiddleware", "CorrelationIdFilter"):
        rows = table(ASGI_CORRELATION_ID, f"`{theirs}`", "here")
        listed = {name.partition("=")[0] for row in rows for name in names(row[0])}
        assert listed | {"app"} >= inspect.signature(getattr(installed, theirs)).parameters.keys()


@pytest.mark.slow
def test_the_pages_own_span_takes_an_operations_place() -> None:
    """
    The first block: its span is the request's only child, and its answer has both ids.
    """
    block, _ = PYTHON.findall(NATIVE)
    check = """
response = TestClient(app).get("/quotes/lamp")
answer = response.json()
assert answer["request_id"] == response.headers["x-request-id"]
spans = {span.name: span for span in memory.get_finished_spans()}
server, price = spans["GET /quotes/{sku}"], spans["quote.price"]
assert price.parent.span_id == server.context.span_id
assert f"{server.context.trace_id:032x}" == answer["trace_id"]
assert not [name for name in spans if name.startswith("fastapi.")]
"""
    python(block + COLLECT + check, OTEL_TRACES_EXPORTER="none")


@pytest.mark.slow
def test_an_application_can_be_left_out_of_both() -> None:
    """
    The second block: its application has no span of either kind and no header; others have.
    """
    _, block = PYTHON.findall(NATIVE)
    check = """
response = TestClient(admin).get("/docs")
assert (response.status_code, response.headers.get("x-request-id"), seen()) == (200, None, [])
assert TestClient(FastAPI()).get("/docs").headers["x-request-id"]
assert seen() == ["GET /docs"]
"""
    python(block + COLLECT + check, OTEL_TRACES_EXPORTER="none")


@pytest.mark.slow
def test_fastapis_options_do_under_us_what_the_page_says() -> None:
    """
    ``exclude``, ``tracing`` and ``tracer_provider`` change nothing, there is no data, ``instrument_app`` takes the provider.
    """
    script = f"""
from fastapi import FastAPI
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from otel_correlation import bootstrap
bootstrap()
{COLLECT}
own = InMemorySpanExporter()
provider = TracerProvider(shutdown_on_exit=False)
provider.add_span_processor(SimpleSpanProcessor(own))


def get(**telemetry):
    app = FastAPI(telemetry=telemetry)
    if "instrumented" in telemetry:
        app = FastAPI()
        FastAPIInstrumentor.instrument_app(app, tracer_provider=provider)
    app.add_api_route("/data", lambda: {{"data": get_telemetry_data()}})
    assert TestClient(app).get("/data").json() == {{"data": None}}
    return seen(), seen(own)


def exclude(scope):
    raise AssertionError("called")


ours = (["GET /data"], [])
assert get() == get(exclude=exclude) == get(tracing=False) == get(tracer_provider=provider) == ours
assert get(operation_spans=True) == ours
assert get(instrumented=True) == ([], ["GET /data"])
"""
    python(script, OTEL_TRACES_EXPORTER="none")


@pytest.mark.slow
@pytest.mark.parametrize("disabled", ["", "fastapi"])
def test_fastapis_variable_is_left_out_and_it_can_have_the_requests(disabled: str, tmp_path: Path) -> None:
    """
    A line says that ``FASTAPI_OTEL_AUTO_CONFIGURE`` is left out; without our edge its spans come, once, and no header.
    """
    (tmp_path / "main.py").write_text("from fastapi import FastAPI\napp = FastAPI()\n")
    with OtlpSink() as sink:
        environment = clean_environment(
            OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint,
            OTEL_PYTHON_DISABLED_INSTRUMENTATIONS=disabled,
            FASTAPI_OTEL_AUTO_CONFIGURE="false" if disabled else "true",
        )
        with Service((*ZERO, *UVICORN), tmp_path, environment) as service:
            header = httpx.get(service.url + "/docs").headers.get("x-request-id")
            service.stop()
            output = service.output()
        scopes = [span.scope for span in sink.spans if span.name == "GET /docs"]
    # FastAPI 0.142 cannot be told by a variable, and exports a second time.
    assert set(scopes) == {"fastapi" if disabled else "otel_correlation.server"}
    assert len(scopes) == 1 or (disabled and "FASTAPI_OTEL_AUTO_CONFIGURE" not in FASTAPI)
    assert (header is None) is bool(disabled)
    assert ("FASTAPI_OTEL_AUTO_CONFIGURE is left out" in output) is not bool(disabled)


# A tutorial's middleware

MORE = """

import asyncio
import fastapi


@app.get("/stock")
async def stock(request: Request) -> dict[str, str]:
    log.info("stock is asked for with %s", request.headers.get("x-request-id"))
    return {}


@app.get("/executor")
async def executor() -> dict[str, str]:
    await asyncio.get_running_loop().run_in_executor(None, log.info, "on a thread")
    return {}


@app.get("/boom")
async def boom() -> None:
    raise ValueError("boom")


@app.websocket("/ws")
async def socket(socket: fastapi.WebSocket) -> None:
    log.info("a socket")
    await socket.accept()
    await socket.close()
"""
QUOTED = "order-7781-customer-quote"


class Tutorial:
    """
    The page's service, before or after.
    """

    def __init__(self, service: Service) -> None:
        self.service = service

    def get(self, path: str, request_id: str = QUOTED) -> httpx.Response:
        return httpx.get(self.service.url + path, headers={"X-Request-ID": request_id}, timeout=DEADLINE_S)

    def line(self, text: str) -> str:
        """
        Return the one line that says ``text``.
        """
        (found,) = [line for line in self.service.output().splitlines() if text in line]
        return found


def serve(directory: Path, source: str, *command: str) -> Iterator[Tutorial]:
    (directory / "main.py").write_text(source + MORE)
    environment = clean_environment(OTEL_TRACES_EXPORTER="none")
    with Service((*command, *UVICORN), directory, environment) as service:
        yield Tutorial(service)


@pytest.fixture(scope="module")
def tutorial(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tutorial]:
    """
    The first block without us, the second under us, the first under us.
    """
    before, after = PYTHON.findall(TUTORIAL)
    source, command = {"before": (before, ()), "after": (after, ZERO), "both": (before, ZERO)}[request.param]
    yield from serve(tmp_path_factory.mktemp(request.param), source, *command)


@pytest.mark.slow
@pytest.mark.parametrize("tutorial", ["before", "after", "both"], indirect=True)
def test_lines_answer_and_the_next_hop_stay_the_same(tutorial: Tutorial) -> None:
    """
    Before, after and while both run: the same line, the same answer, the same header, here and at the next hop.
    """
    response = tutorial.get("/orders/7")
    assert response.headers.get_list("x-request-id") == [QUOTED]
    assert response.json() == {"order": 7, "request_id": QUOTED}
    assert tutorial.line("order 7").endswith(f"INFO shop [{QUOTED}] order 7")
    assert tutorial.line("stock is asked").endswith(f"INFO shop [{QUOTED}] stock is asked for with {QUOTED}")
    minted = tutorial.get("/orders/8", "").headers["x-request-id"]
    assert tutorial.line("order 8").endswith(f"INFO shop [{minted}] order 8")


@pytest.mark.slow
@pytest.mark.parametrize(("tutorial", "after"), [("before", False), ("after", True)], indirect=["tutorial"])
def test_what_changes_for_callers_is_as_the_page_says(tutorial: Tutorial, after: bool) -> None:
    """
    Unhandled 500s, unsafe ids, executors, WebSockets and httpx's own lines, before and after.
    """
    from websockets.sync.client import connect

    failed = tutorial.get("/boom")
    assert (failed.status_code, failed.headers.get("x-request-id")) == (500, QUOTED if after else None)
    unsafe = tutorial.get("/stock", "no spaces, please")
    assert (unsafe.headers["x-request-id"] == "no spaces, please") is not after
    assert ("[no spaces, please]" in tutorial.service.output()) is not after
    assert (tutorial.get("/stock", "a" * 10_000).headers["x-request-id"] == "a" * 10_000) is not after
    tutorial.get("/executor")
    assert tutorial.line("on a thread").endswith(f"[{QUOTED if after else '-'}] on a thread")
    url = tutorial.service.url.replace("http", "ws") + "/ws"
    with connect(url, additional_headers={"X-Request-ID": QUOTED}) as socket:
        assert socket.response is not None
        assert socket.response.headers.get("x-request-id") == (QUOTED if after else None)
    assert tutorial.line("a socket").endswith(f"[{QUOTED if after else '-'}] a socket")
    tutorial.get("/orders/9")
    assert ("HTTP Request: GET" in tutorial.service.output()) is not after


@pytest.mark.slow
def test_uvicorns_traceback_line_has_the_id_afterwards(tmp_path: Path) -> None:
    """
    The server's line of an unhandled exception, in the application's own format: ``-`` before, the id after.
    """
    before, after = PYTHON.findall(TUTORIAL)
    show = '\nlogging.getLogger("uvicorn.error").propagate = True\nlogging.getLogger("uvicorn").propagate = True\n'
    for name, source, command, expected in (("before", before, (), "-"), ("after", after, ZERO, QUOTED)):
        (tmp_path / name).mkdir()
        for tutorial in serve(tmp_path / name, source + show, *command):
            tutorial.get("/boom")
            tutorial.service.stop()
            assert f"ERROR uvicorn.error [{expected}] Exception in ASGI" in tutorial.service.output()


@pytest.mark.slow
def test_the_filter_alone_would_hide_the_id(tmp_path: Path) -> None:
    """
    Without its middleware the filter puts its default over our value, which is why both go together.
    """
    before, _ = PYTHON.findall(TUTORIAL)
    line = "app.add_middleware(RequestIdMiddleware)\n"
    assert line in before
    for tutorial in serve(tmp_path, before.replace(line, ""), *ZERO):
        assert tutorial.get("/stock").headers["x-request-id"] == QUOTED
        assert "[-] stock is asked" in tutorial.line("stock is asked")
