"""
Export over gRPC, with a real server.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from otel_correlation import export, guard, settings
from otel_correlation._version import __version__
from tests.integration.grpc_sink import GrpcSink

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE_MS = 20_000


@pytest.fixture
def collector() -> Iterator[GrpcSink]:
    """
    A gRPC receiver on a loopback port.
    """
    with GrpcSink() as found:
        yield found


def test_spans_and_logs_arrive_over_grpc(collector: GrpcSink, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    With protocol ``grpc`` both signals arrive, also beside a compression that the stock exporter refuses.
    """
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk.trace import TracerProvider

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=secret")
    monkeypatch.setenv("OTEL_LOGS_EXPORTER", "otlp")
    read = settings.from_environment()
    problems: list[str] = []
    spans = export.SpanPipeline(export.span_exporters(read, problems))
    logs = export.log_pipeline(read, problems)
    assert problems == []
    tracer_provider, logger_provider = TracerProvider(shutdown_on_exit=False), LoggerProvider(shutdown_on_exit=False)
    tracer_provider.add_span_processor(spans)
    logger_provider.add_log_record_processor(logs)
    tracer_provider.get_tracer("t").start_span("a", attributes={"k": 1}).end()
    logger_provider.get_logger("l").emit(body="hello")
    assert spans.force_flush(PATIENCE_MS)
    assert logs.force_flush(PATIENCE_MS)
    spans.shutdown()
    logs.shutdown()
    assert [(span.name, span.attributes) for span in collector.spans] == [("a", {"k": 1})]
    assert collector.metadata["api-key"] == "secret"
    assert collector.metadata["user-agent"].startswith(f"otel-correlation/{__version__} OTel-OTLP-Exporter-Python/")
    assert [record.body for record in collector.logs] == ["hello"]
    assert guard.counters() == {"spans.exported": 1, "logs.exported": 1}
    assert os.environ["OTEL_EXPORTER_OTLP_COMPRESSION"] == "none"


def test_grpc_is_imported_only_when_asked_for() -> None:
    """
    A service that exports over HTTP loads neither gRPC nor the generated messages.
    """
    script = (
        "import sys\n"
        "from otel_correlation import export, settings\n"
        "read = settings.from_environment({})\n"
        "export.SpanPipeline(export.span_exporters(read, []))\n"
        "print([name for name in ('grpc', 'google.protobuf') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
