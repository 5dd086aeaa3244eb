"""
What a service's own output shows of its credentials, whatever fails and whoever logs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest

from tests.integration.otlp_sink import Answer, OtlpSink
from tests.integration.services import Service, clean_environment, free_port
from tests.integration.test_zero_code import APP, UVICORN, ZERO

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

SECRET = f"hunter{1 + 1}"
# Every exporter that there is, each sending at once.
EVERYTHING = {
    "OTEL_TRACES_EXPORTER": "otlp",
    "OTEL_LOGS_EXPORTER": "otlp",
    "OTEL_METRICS_EXPORTER": "otlp",
    "OTEL_METRIC_EXPORT_INTERVAL": "200",
    "OTEL_METRIC_EXPORT_TIMEOUT": "1000",
    "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
}


def output_of(tmp_path: Path, **variables: str) -> str:
    """
    Return all that a service prints that serves a request and ends.
    """
    (tmp_path / "main.py").write_text(APP)
    with Service((ZERO, *UVICORN), tmp_path, clean_environment(**EVERYTHING, **variables)) as service:
        httpx.get(f"{service.url}/items/7")
        service.stop()
        return service.output()


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_collector_that_is_not_there_costs_no_credential(protocol: str, tmp_path: Path) -> None:
    """
    Neither our exporters nor the stock ones, of metrics and of gRPC, name a user, a key in the query or one in the path.
    """
    port = free_port()
    rest = "" if protocol == "grpc" else f"/{SECRET}?api_key={SECRET}&{SECRET}"
    output = output_of(
        tmp_path,
        OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://user:{SECRET}@127.0.0.1:{port}{rest}",
        OTEL_EXPORTER_OTLP_HEADERS=f"x-team={SECRET}",
    )
    assert SECRET not in output
    assert f"127.0.0.1:{port}" in output


def test_a_collector_that_refuses_costs_no_credential(tmp_path: Path) -> None:
    """
    The address of a collector that answers 401 is shown without what is secret in it.
    """
    with OtlpSink(answer=Answer(401)) as sink:
        output = output_of(
            tmp_path,
            OTEL_EXPORTER_OTLP_ENDPOINT=f"{sink.endpoint}/{SECRET}?api_key={SECRET}",
            OTEL_EXPORTER_OTLP_HEADERS=f"x-team={SECRET}",
        )
    assert SECRET not in output
    assert f"http://127.0.0.1:{sink.port}/***" in output
    assert "HTTP status 401" in output


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_headers_that_cannot_be_read_are_in_no_line(protocol: str, tmp_path: Path) -> None:
    """
    The usual mistake is told once, with the right spelling; OpenTelemetry's own parser, too, shows nothing of it.
    """
    output = output_of(
        tmp_path,
        OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{free_port()}",
        OTEL_EXPORTER_OTLP_HEADERS=f"Authorization: Bearer {SECRET}",
    )
    assert SECRET not in output
    ours = [line for line in output.splitlines() if "OTEL_EXPORTER_OTLP_HEADERS is not usable" in line]
    assert len(ours) == 1, output
    assert "Authorization=Bearer%20KEY" in ours[0]


@pytest.mark.parametrize(
    "text",
    [
        f'file_format: "1.0"\ntracer_provider:\n  processors: "{SECRET}"\n',
        f'file_format: "1.0"\ntracer_provider:\n  password: {SECRET}: {SECRET}\n',
        f'"{SECRET}"\n',
    ],
)
def test_a_configuration_file_that_is_wrong_is_not_quoted(text: str, tmp_path: Path) -> None:
    """
    What is wrong is told by its place in the file, not by what stands there.
    """
    (tmp_path / "otel.yaml").write_text(text)
    output = output_of(tmp_path, OTEL_CONFIG_FILE="otel.yaml", OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1")
    assert SECRET not in output
    assert "OTEL_CONFIG_FILE" in output
