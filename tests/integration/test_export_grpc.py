"""
Export over gRPC, with a real server.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc  # type: ignore[import-untyped]
import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.logs.v1.logs_service_pb2_grpc import (
    LogsServiceServicer,
    add_LogsServiceServicer_to_server,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

from otel_correlation import export, guard, settings
from otel_correlation._version import __version__
from tests.integration.otlp_sink import decode_logs, decode_spans

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.otlp_sink import SinkLog, SinkSpan

PATIENCE_MS = 20_000


class Collector:
    """
    Stores what it gets.
    """

    def __init__(self) -> None:
        self.spans: list[SinkSpan] = []
        self.logs: list[SinkLog] = []
        self.endpoint = ""
        self.metadata: dict[str, str] = {}


class _Traces(TraceServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(self, request: Any, context: Any) -> ExportTraceServiceResponse:  # noqa: N802 - the service's name
        self._collector.metadata = dict(context.invocation_metadata())
        self._collector.spans += decode_spans(request.SerializeToString())
        return ExportTraceServiceResponse()


class _Logs(LogsServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(self, request: Any, context: Any) -> ExportLogsServiceResponse:  # noqa: N802 - the service's name
        self._collector.logs += decode_logs(request.SerializeToString())
        return ExportLogsServiceResponse()


@pytest.fixture
def collector() -> Iterator[Collector]:
    """
    A gRPC receiver on a loopback port.
    """
    found = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(_Traces(found), server)  # type: ignore[no-untyped-call]
    add_LogsServiceServicer_to_server(_Logs(found), server)  # type: ignore[no-untyped-call]
    found.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield found
    server.stop(None).wait()


def test_spans_and_logs_arrive_over_grpc(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
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
