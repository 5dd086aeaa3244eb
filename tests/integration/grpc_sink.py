"""
A real OTLP/gRPC receiver for tests: takes spans and logs, and decodes them.

with GrpcSink() as sink:
    start_service(OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint, OTEL_EXPORTER_OTLP_PROTOCOL="grpc")
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import grpc  # type: ignore[import-untyped]
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

from tests.integration.otlp_sink import decode_logs, decode_spans

if TYPE_CHECKING:
    from tests.integration.otlp_sink import SinkLog, SinkSpan


class GrpcSink:
    """
    Receives on a loopback port of its own inside a ``with`` block.

    Attributes:
        spans: Every span so far.
        logs: Every log record so far.
        metadata: What the last request with spans carried.
        endpoint: The value for ``OTEL_EXPORTER_OTLP_ENDPOINT``, known inside the block.
    """

    def __init__(self) -> None:
        self.spans: list[SinkSpan] = []
        self.logs: list[SinkLog] = []
        self.metadata: dict[str, str] = {}
        self.endpoint = ""
        self._server: Any = None

    def __enter__(self) -> Self:
        self._server = grpc.server(ThreadPoolExecutor(4))
        add_TraceServiceServicer_to_server(_Traces(self), self._server)  # type: ignore[no-untyped-call]
        add_LogsServiceServicer_to_server(_Logs(self), self._server)  # type: ignore[no-untyped-call]
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()


class _Traces(TraceServiceServicer):
    def __init__(self, sink: GrpcSink) -> None:
        self._sink = sink

    def Export(self, request: Any, context: Any) -> ExportTraceServiceResponse:  # noqa: N802 - the service's name
        self._sink.metadata = dict(context.invocation_metadata())
        self._sink.spans += decode_spans(request.SerializeToString())
        return ExportTraceServiceResponse()


class _Logs(LogsServiceServicer):
    def __init__(self, sink: GrpcSink) -> None:
        self._sink = sink

    def Export(self, request: Any, context: Any) -> ExportLogsServiceResponse:  # noqa: N802 - the service's name
        self._sink.logs += decode_logs(request.SerializeToString())
        return ExportLogsServiceResponse()
