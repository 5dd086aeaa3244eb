"""
OTEL_CONFIG_FILE: what the file says is what runs, log records included, and the start-up line says so.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import Service, clean_environment

if TYPE_CHECKING:
    from pathlib import Path

APP = """
import logging
from fastapi import FastAPI

app = FastAPI()
log = logging.getLogger("app")


@app.get("/items/{item_id}")
async def item(item_id: int) -> dict[str, int]:
    log.info({"item": item_id})
    return {"item": item_id}
"""
IN_CODE = "import otel_correlation\notel_correlation.bootstrap()\n"
UVICORN = ("uvicorn", "main:app", "--port", "{port}")
REQUEST_ID = "order-7781-customer-quote"

RESOURCE = """
resource:
  attributes:
    - name: service.name
      value: orders-of-the-file
"""
TRACES = """
tracer_provider:
  processors:
    - batch:
        schedule_delay: 60000
        exporter:
          otlp_http:
            endpoint: {url}/v1/traces
"""
LOGS = """
logger_provider:
  processors:
    - batch:
        schedule_delay: 60000
        exporter:
          otlp_http:
            endpoint: {url}/v1/logs
"""


def start(
    tmp_path: Path, *parts: str, url: str = "", in_code: bool = False, variables: dict[str, str] | None = None
) -> Service:
    """
    Return a service with a configuration file of these parts.
    """
    (tmp_path / "main.py").write_text((IN_CODE if in_code else "") + APP)
    (tmp_path / "otel.yaml").write_text('file_format: "1.0"\n' + "".join(parts).replace("{url}", url))
    environment = clean_environment(
        OTEL_CONFIG_FILE="otel.yaml", OTEL_CORRELATION_LOG_FORMAT="json", **(variables or {})
    )
    command = UVICORN if in_code else ("opentelemetry-instrument", *UVICORN)
    return Service(command, tmp_path, environment)


def start_up_line(service: Service) -> str:
    """
    Return the one line that says what runs.
    """
    lines = [json.loads(line)["message"] for line in service.stdout().splitlines() if '"otel_correlation"' in line]
    (found,) = [line for line in lines if line.startswith("otel-correlation ")]
    return str(found)


@pytest.mark.parametrize("in_code", [False, True])
def test_log_records_of_a_files_logger_provider_arrive(in_code: bool, tmp_path: Path) -> None:
    """
    With a ``logger_provider`` in the file every record goes there once, with its ids, also what waits when the server ends.
    """
    with OtlpSink() as sink:
        with start(tmp_path, RESOURCE, TRACES, LOGS, url=sink.endpoint, in_code=in_code) as service:
            httpx.get(f"{service.url}/items/7", headers={"x-request-id": REQUEST_ID})
            service.stop()
        (span,) = [found for found in sink.spans if found.attributes.get("http.route") == "/items/{item_id}"]
        records = [found for found in sink.logs if found.scope == "app"]
    assert [found.attributes["request_id"] for found in records] == [REQUEST_ID], service.output()
    assert records[0].trace_id == span.trace_id
    assert records[0].body == {"item": 7}
    assert records[0].resource["service.name"] == "orders-of-the-file"
    # The probe's and ours.
    assert [found.scope for found in sink.logs].count("otel_correlation.request") == 2
    (line,) = [json.loads(line) for line in service.stdout().splitlines() if '"app"' in line]
    assert line["service_name"] == "orders-of-the-file"


@pytest.mark.parametrize("logs", [True, False])
def test_the_variables_say_nothing_beside_a_file(logs: bool, tmp_path: Path) -> None:
    """
    ``OTEL_LOGS_EXPORTER=otlp`` beside a file exports nothing of its own: neither twice, nor where the file has no logs.
    """
    with OtlpSink() as sink:
        parts = (TRACES, LOGS) if logs else (TRACES,)
        variables = {"OTEL_LOGS_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_ENDPOINT": sink.endpoint}
        with start(tmp_path, *parts, url=sink.endpoint, variables=variables) as service:
            httpx.get(f"{service.url}/items/7")
            service.stop()
    assert len([found for found in sink.logs if found.scope == "app"]) == (1 if logs else 0)


def test_the_start_up_line_says_what_the_file_says(tmp_path: Path) -> None:
    """
    It names the file's service and endpoint, without a password in it, and not those of the variables.
    """
    with OtlpSink() as sink:
        url = sink.endpoint.replace("http://", "http://me:secret@")
        variables = {"OTEL_SERVICE_NAME": "other", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
        with start(tmp_path, RESOURCE, TRACES, url=url, variables=variables) as service:
            httpx.get(f"{service.url}/items/7")
            service.stop()
    line = start_up_line(service)
    assert "service orders-of-the-file," in line
    assert f"{sink.endpoint.removeprefix('http://')}/v1/traces (http/protobuf)" in line
    assert "otel.yaml" in line
    assert "secret" not in line
    assert "127.0.0.1:9/" not in line


@pytest.mark.parametrize(
    ("exporters", "said"),
    [
        ("otlp_grpc: {endpoint: 'http://127.0.0.1:9'}", "spans to http://127.0.0.1:9 (grpc)"),
        ("otlp_http: {}", "spans to http://localhost:4318/v1/traces (http/protobuf)"),
        ("console:", "spans to console"),
        ("", "spans are not exported"),
    ],
)
def test_the_start_up_line_names_every_kind_of_exporter(exporters: str, said: str, tmp_path: Path) -> None:
    """
    gRPC, the default endpoint, the console, and a file without a tracer provider.
    """
    traces = f"\ntracer_provider:\n  processors:\n    - batch:\n        exporter:\n          {exporters}\n"
    with start(tmp_path, RESOURCE, traces if exporters else "") as service:
        service.stop()
    assert said in start_up_line(service), service.output()
