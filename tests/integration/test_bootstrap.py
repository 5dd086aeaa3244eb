"""
Set-up as users meet it: bad configuration, switches, other distributions, and an application's own providers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import DEADLINE_S, Service, clean_environment
from tests.integration.test_zero_code import APP, UVICORN, ZERO

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

WRONG = [
    ("OTEL_PROPAGATORS", "bogus", "tracecontext,baggage,xrequestid"),
    ("OTEL_TRACES_SAMPLER_ARG", "1.5", "1.0"),
    ("OTEL_TRACES_SAMPLER_ARG", "abc", "1.0"),
    ("OTEL_TRACES_SAMPLER", "sometimes", "parentbased_traceidratio"),
    ("OTEL_EXPORTER_OTLP_ENDPOINT", "::nonsense::", "http://localhost:4318"),
    ("OTEL_EXPORTER_OTLP_PROTOCOL", "carrier-pigeon", "http/protobuf"),
    ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon", "10"),
    ("OTEL_EXPORTER_OTLP_COMPRESSION", "brotli", "none"),
    ("OTEL_TRACES_EXPORTER", "jager", "otlp"),
    ("OTEL_LOGS_EXPORTER", "lok", "none"),
    ("OTEL_METRICS_EXPORTER", "prom", "none"),
    ("OTEL_BSP_SCHEDULE_DELAY", "-1", "500"),
    ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "many", "default"),
    ("OTEL_SPAN_LINK_COUNT_LIMIT", "-1", "default"),
    ("OTEL_LOGRECORD_ATTRIBUTE_COUNT_LIMIT", "many", "default"),
    ("OTEL_PYTHON_DISTRO", "bogus", "otel_correlation"),
    ("OTEL_EXPERIMENTAL_RESOURCE_DETECTORS", "bogus", "other detectors"),
    ("OTEL_SEMCONV_STABILITY_OPT_IN", "htpp/dup", "http"),
    ("OTEL_CORRELATION_STORES", "lala", "no store"),
    ("OTEL_CORRELATION_REQUEST_ID_HEADERS", "X Request Id", "X-Request-ID"),
    ("OTEL_CORRELATION_RESPONSE_HEADER", "a\nb", "X-Request-ID"),
    ("OTEL_CORRELATION_MINT", "ulid", "hex"),
    ("OTEL_CORRELATION_LOG_FORMAT", "xml", "auto"),
    ("OTEL_CORRELATION_ENABLED", "perhaps", "true"),
    ("OTEL_CORRELATION_QUERY_VALUES", "\udcff\udcfe", "default"),
]


def warnings_of(output: str) -> list[str]:
    """
    Return the messages of our own warnings.
    """
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return [line["message"] for line in lines if line["logger"] == "otel_correlation" and line["level"] == "WARNING"]


@pytest.mark.parametrize(("name", "value", "used"), WRONG, ids=[f"{name}={value!a}" for name, value, _ in WRONG])
def test_a_wrong_value_is_one_line_and_the_service_serves(name: str, value: str, used: str, tmp_path: Path) -> None:
    """
    A wrong value in the environment gives one line with the variable and what is used instead, and requests are served.
    """
    (tmp_path / "main.py").write_text(APP)
    with OtlpSink() as sink:
        environment = clean_environment(**{"OTEL_EXPORTER_OTLP_ENDPOINT": sink.endpoint, name: value})
        with Service((ZERO, *UVICORN), tmp_path, environment) as service:
            response = httpx.get(f"{service.url}/items/7")
            service.stop()
            output = service.stdout()
            errors = service.stderr()
    assert response.status_code == 200
    assert len(response.headers["x-request-id"]) == 32
    # Without the value, where that should be an address and is none.
    named = [message for message in warnings_of(output) if message.startswith((f"{name}=", f"{name} "))]
    assert len(named) == 1, output + errors
    assert f"using {used}" in named[0] or f"using the {used}" in named[0]
    assert "Traceback" not in output + errors


@pytest.mark.parametrize(
    ("own", "used", "told"),
    [({}, ("baggage",), 1), ({"OTEL_PROPAGATORS": "tracecontext"}, ("tracecontext",), 0)],
    ids=["the parent's", "its own"],
)
def test_a_child_process_has_its_own_values(own: dict[str, str], used: tuple[str, ...], told: int) -> None:
    """
    A child hears of the wrong values that it inherits; one that it was given a good value for has that.
    """
    child = """
from otel_correlation.settings import from_environment
settings = from_environment()
print((settings.propagators, sum("bogus" in problem for problem in settings.problems)))
"""
    code = f"""
import os, subprocess, sys
import otel_correlation.bootstrap
subprocess.run([sys.executable, "-c", {child!r}], env={{**os.environ, **{own!r}}}, check=True)
"""
    ended = run(code, OTEL_PROPAGATORS="bogus,baggage")
    assert ended.stdout.strip() == str((used, told)), ended.stderr


def test_no_propagators_is_no_error(tmp_path: Path) -> None:
    """
    With OTEL_PROPAGATORS=none requests are served with an id of their own, and no warning.
    """
    (tmp_path / "main.py").write_text(APP)
    environment = clean_environment(OTEL_PROPAGATORS="none", OTEL_TRACES_EXPORTER="none")
    with Service((ZERO, *UVICORN), tmp_path, environment) as service:
        headers = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
        response = httpx.get(f"{service.url}/items/7", headers=headers)
        service.stop()
        output = service.stdout()
    assert response.status_code == 200
    assert response.headers["x-request-id"] != "a" * 32
    assert not warnings_of(output)


STATES = {
    "exporter none": ({"OTEL_TRACES_EXPORTER": "none"}, {"spans": False, "ids": True, "trace": True}),
    "not sampled": ({"OTEL_TRACES_SAMPLER_ARG": "0"}, {"spans": False, "ids": True, "trace": True}),
    "sdk disabled": ({"OTEL_SDK_DISABLED": "true"}, {"spans": False, "ids": True, "trace": False}),
    "disabled": ({"OTEL_CORRELATION_ENABLED": "false"}, {"spans": False, "ids": False, "trace": False}),
}
STATE_APP = """
import logging
from fastapi import FastAPI
import otel_correlation

logging.basicConfig(format="%(message)s", level="INFO")
app = FastAPI(telemetry={"auto_configure": False})  # FastAPI 0.142 exports by itself where an endpoint is named

@app.get("/id")
async def read_id() -> dict[str, str | None]:
    record = logging.getLogger("x").makeRecord("x", 20, "", 0, "m", (), None)
    seen = {}
    class Keep(logging.Handler):
        def emit(self, record):
            seen.update(record.__dict__)
    keep = Keep()
    logging.getLogger("x").addHandler(keep)
    logging.getLogger("x").info("line")
    logging.getLogger("x").removeHandler(keep)
    return {
        "request_id": otel_correlation.request_id(),
        "trace_id": otel_correlation.trace_id(),
        "line_request_id": seen.get("request_id"),
        "line_trace_id": seen.get("trace_id"),
    }
"""


@pytest.mark.parametrize("state", STATES)
def test_what_stays_on_when_something_is_off(state: str, tmp_path: Path) -> None:
    """
    The table "What stays on when something is off" of the design holds row by row.
    """
    variables, expected = STATES[state]
    (tmp_path / "main.py").write_text(STATE_APP)
    with OtlpSink() as sink:
        environment = clean_environment(OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint, **variables)
        with Service((ZERO, *UVICORN), tmp_path, environment) as service:
            response = httpx.get(f"{service.url}/id", headers={"x-request-id": "order-4711-customer-quote"})
            service.stop()
    body = response.json()
    wanted = "order-4711-customer-quote" if expected["ids"] else None
    assert bool(sink.spans) is expected["spans"]
    assert response.headers.get("x-request-id") == wanted
    assert body["request_id"] == wanted
    assert body["line_request_id"] == wanted
    assert bool(body["trace_id"]) is expected["trace"]
    assert bool(body["line_trace_id"]) is expected["trace"]


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """
    Run a script with a clean environment.
    """
    return subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code],
        env=clean_environment(OTEL_TRACES_EXPORTER="none", **variables),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@pytest.mark.parametrize(
    "call",
    ["bootstrap(ratio=1.5)", "bootstrap(ratio='0.1')", "bootstrap(mint='ulid')", "bootstrap(colour='red')"],
)
def test_a_wrong_argument_in_code_is_a_config_error(call: str) -> None:
    """
    A wrong value that code passes raises ConfigError, which names it.
    """
    ended = run(
        f"from otel_correlation import bootstrap, ConfigError\ntry:\n    {call}\nexcept ConfigError as e:\n    print(e)"
    )
    assert ended.returncode == 0, ended.stderr
    assert call.partition("(")[2].partition("=")[0] in ended.stdout


def test_an_applications_own_provider_is_kept() -> None:
    """
    A tracer provider that the application made before us stays, with its exporter; ours adds none, and ids bridge on it.
    """
    code = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
memory = InMemorySpanExporter()
own = TracerProvider(); own.add_span_processor(SimpleSpanProcessor(memory)); trace.set_tracer_provider(own)
from fastapi import FastAPI
from starlette.testclient import TestClient
from opentelemetry.instrumentation.utils import suppress_http_instrumentation
import otel_correlation
app = FastAPI()
otel_correlation.bootstrap(app)
assert trace.get_tracer_provider() is own
with suppress_http_instrumentation():
    TestClient(app).get("/", headers={"x-request-id": "f4a2b3c1-dead-beef-0000-aabbccddeeff"})
(span,) = memory.get_finished_spans()
assert span.context.trace_id == 0xf4a2b3c1deadbeef0000aabbccddeeff
assert span.attributes["request_id"] == "f4a2b3c1-dead-beef-0000-aabbccddeeff"
assert not span.context.trace_flags.random_trace_id
"""
    ended = run(code)
    assert ended.returncode == 0, ended.stderr


def test_settings_in_code_win_over_the_start_command() -> None:
    """
    bootstrap(ratio=0) in an application that opentelemetry-instrument started samples nothing from then on.
    """
    code = """
from opentelemetry.instrumentation import auto_instrumentation
auto_instrumentation.initialize()
import otel_correlation
from opentelemetry import trace
assert trace.get_tracer("mine").start_span("before").is_recording()
otel_correlation.bootstrap(ratio=0.0, response_header="X-Correlation-ID")
assert not trace.get_tracer("mine").start_span("after").is_recording()
from fastapi import FastAPI
from starlette.testclient import TestClient
assert "x-correlation-id" in TestClient(FastAPI()).get("/").headers
"""
    ended = run(code)
    assert ended.returncode == 0, ended.stderr


SEND = """
import httpx
sent = []
def answer(request):
    sent.append(request.headers)
    return httpx.Response(200)
with otel_correlation.work("tick", request_id="order-4711"):
    httpx.Client(transport=httpx.MockTransport(answer)).get("http://shop.example")
"""


def test_later_settings_hold_for_what_is_sent() -> None:
    """
    A later ``bootstrap`` names the header of outgoing requests and messages, too, and which propagators they pass.
    """
    code = """
import otel_correlation
from opentelemetry import baggage, context
otel_correlation.bootstrap()
otel_correlation.bootstrap(response_header="X-Correlation-ID", propagators=["tracecontext", "xrequestid"])
context.attach(baggage.set_baggage("tier", "gold"))
"""
    ended = run(f"""{code}{SEND}
    written = otel_correlation.inject()
assert sent[0]["x-correlation-id"] == written["X-Correlation-ID"] == "order-4711"
assert not {{"x-request-id", "baggage"}} & {{*sent[0], *map(str.lower, written)}}
""")
    assert ended.returncode == 0, ended.stderr


def test_a_propagator_that_the_application_set_stays() -> None:
    """
    A later ``bootstrap`` leaves the propagator alone that the application has made the global one since.
    """
    ended = run("""
import otel_correlation
from opentelemetry import propagate
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
otel_correlation.bootstrap()
propagate.set_global_textmap(own := TraceContextTextMapPropagator())
otel_correlation.bootstrap(response_header="X-Correlation-ID")
assert propagate.get_global_textmap() is own
""")
    assert ended.returncode == 0, ended.stderr


def test_code_switches_on_what_the_environment_switched_off() -> None:
    """
    Under ``OTEL_CORRELATION_ENABLED=false``, ``bootstrap(enabled=True)`` starts everything, as the first call does.
    """
    code = """
from opentelemetry.instrumentation import auto_instrumentation
auto_instrumentation.initialize()
import otel_correlation
assert otel_correlation.inject() == {}
otel_correlation.bootstrap(enabled=True)
from fastapi import FastAPI
from starlette.testclient import TestClient
app = FastAPI()
app.get("/")(otel_correlation.request_id)
reply = TestClient(app).get("/", headers={"x-request-id": "order-4711"})
assert reply.json() == reply.headers["x-request-id"] == "order-4711"
from opentelemetry import trace
assert trace.get_tracer("mine").start_span("own").is_recording()
"""
    ended = run(code + SEND + "assert sent[0]['x-request-id'] == 'order-4711'", OTEL_CORRELATION_ENABLED="false")
    assert ended.returncode == 0, ended.stderr


def test_what_runs_is_not_switched_off_by_half() -> None:
    """
    ``bootstrap(enabled=False)`` after the start says how to switch off, and everything goes on.
    """
    ended = run(
        "import otel_correlation\notel_correlation.bootstrap()\n"
        + SEND.replace(
            "with",
            """
otel_correlation.bootstrap(enabled=False, response_header="X-Correlation-ID")
with""",
            1,
        )
        + "assert sent[0]['x-correlation-id'] == 'order-4711'"
    )
    assert ended.returncode == 0, ended.stderr
    assert "bootstrap(enabled=...) came after the start and is left out" in ended.stdout + ended.stderr


@pytest.mark.parametrize("first", ["", "otel_correlation.bootstrap()"], ids=["first call", "later call"])
def test_proxies_without_networks_are_told_of(first: str) -> None:
    """
    Whoever declares proxies and no networks learns, once, that callers are told apart by neither.
    """
    code = f"""
import otel_correlation
{first}
otel_correlation.bootstrap(trusted_proxies=["10.0.7.0/24"])
otel_correlation.bootstrap(ratio=0.5)
"""
    ended = run(code)
    assert ended.returncode == 0, ended.stderr
    line = "OTEL_CORRELATION_TRUSTED_PROXIES=10.0.7.0/24 has no effect: OTEL_CORRELATION_TRUSTED_NETWORKS names nobody"
    assert (ended.stdout + ended.stderr).count(line) == 1


def test_a_service_name_in_code_is_the_resources() -> None:
    """
    ``bootstrap(service_name=...)`` names the service on its spans, not only in its lines.
    """
    script = """
import otel_correlation
otel_correlation.bootstrap(service_name="shop", traces_exporters=())
from opentelemetry import trace
print(trace.get_tracer_provider().resource.attributes["service.name"])
"""
    environment = clean_environment(OTEL_SERVICE_NAME="of-the-environment")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=DEADLINE_S, check=True, env=environment
    )
    assert done.stdout.splitlines()[-1] == "shop", done.stdout + done.stderr


def test_a_random_seed_of_the_application_repeats_no_trace_id() -> None:
    """
    random.seed(42) in the application does not make two processes mint the same ids.
    """
    code = """
import random, otel_correlation
otel_correlation.bootstrap(); random.seed(42)
from opentelemetry import trace
print(trace.get_tracer("x").start_span("y").get_span_context().trace_id)
"""
    assert run(code).stdout != run(code).stdout


@pytest.mark.parametrize("chosen", [None, "otel_correlation", "other"])
def test_another_distribution_beside_ours_is_said_once(chosen: str | None, tmp_path: Path) -> None:
    """
    With two distributions installed, one line says which one runs; ours runs when the standard variable chooses it.
    """
    other = tmp_path / "other_distro-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other-distro\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text(
        "[opentelemetry_distro]\nother = other_distro:Distro\n[opentelemetry_configurator]\nother = other_distro:Config\n"
    )
    (tmp_path / "other_distro.py").write_text(
        "from opentelemetry.instrumentation.distro import BaseDistro\n"
        "class Distro(BaseDistro):\n    def _configure(self, **kwargs): print('OTHER DISTRO RUNS')\n"
        "class Config:\n    def configure(self, **kwargs): print('OTHER CONFIGURATOR RUNS')\n"
    )
    code = (
        "from opentelemetry.instrumentation import auto_instrumentation\n"
        "auto_instrumentation.initialize()\n"
        "from fastapi import FastAPI\n"
        "from starlette.testclient import TestClient\n"
        "print('HEADER', TestClient(FastAPI()).get('/').headers.get('x-request-id'))\n"
    )
    variables = {"PYTHONPATH": str(tmp_path)}
    if chosen:
        variables["OTEL_PYTHON_DISTRO"] = chosen
    ended = run(code, **variables)
    output = ended.stdout + ended.stderr
    assert ended.returncode == 0, output
    if chosen == "other":
        assert "OTHER DISTRO RUNS" in output
        assert "OTHER CONFIGURATOR RUNS" in output
        assert output.count("so otel-correlation is off") <= 1
        assert "HEADER None" in output
    elif chosen:
        assert "OTHER" not in output
        assert "HEADER None" not in output
        assert output.count("distributions are installed") == 1
    else:
        # The first one found runs; whichever that is, exactly one line names it.
        assert output.count("distributions are installed") + output.count("OTHER DISTRO RUNS") >= 1


def test_a_configuration_file_is_followed(tmp_path: Path) -> None:
    """
    With OTEL_CONFIG_FILE the file's provider and exporter run, once, and requests have their ids all the same.
    """
    (tmp_path / "main.py").write_text(APP)
    with OtlpSink() as sink:
        (tmp_path / "otel.yaml").write_text(
            'file_format: "1.0"\n'
            "propagator:\n  composite_list: tracecontext,baggage,xrequestid\n"
            "tracer_provider:\n  processors:\n    - batch:\n        exporter:\n          otlp_http:\n"
            f"            endpoint: {sink.endpoint}/v1/traces\n"
        )
        environment = clean_environment(OTEL_CONFIG_FILE=str(tmp_path / "otel.yaml"))
        with Service((ZERO, *UVICORN), tmp_path, environment) as service:
            response = httpx.get(f"{service.url}/items/7", headers={"x-request-id": "order-7781-customer-quote"})
            service.stop()
        spans = [span for span in sink.spans if span.attributes.get("http.route") == "/items/{item_id}"]
    assert response.headers["x-request-id"] == "order-7781-customer-quote"
    assert [span.attributes["request_id"] for span in spans] == ["order-7781-customer-quote"], service.output()


def test_a_wrong_configuration_file_is_one_line(tmp_path: Path) -> None:
    """
    A configuration file that cannot be read gives one line, and the environment is used.
    """
    (tmp_path / "main.py").write_text(APP)
    with OtlpSink() as sink:
        environment = clean_environment(OTEL_CONFIG_FILE="missing.yaml", OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint)
        with Service((ZERO, *UVICORN), tmp_path, environment) as service:
            httpx.get(f"{service.url}/items/7")
            service.stop()
    assert len([message for message in warnings_of(service.stdout()) if "OTEL_CONFIG_FILE" in message]) == 1
    assert any(span.name == "GET /items/{item_id}" for span in sink.spans)
