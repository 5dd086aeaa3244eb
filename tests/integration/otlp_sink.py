"""
A real OTLP/HTTP receiver for tests: takes spans, logs and metrics, decodes them, and can misbehave on request.

    with OtlpSink() as sink:
        start_service(OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint)
        spans = sink.wait_for_spans(3)
"""

from __future__ import annotations

import gzip
import threading
import time
import zlib
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

KINDS = ("", "INTERNAL", "SERVER", "CLIENT", "PRODUCER", "CONSUMER")


def any_value(value: AnyValue) -> Any:
    """
    Return the Python value of an OTLP value; None for an empty one.
    """
    kind = value.WhichOneof("value")
    if kind is None:
        return None
    if kind == "array_value":
        return [any_value(entry) for entry in value.array_value.values]
    if kind == "kvlist_value":
        return attributes(value.kvlist_value.values)
    return getattr(value, kind)


def attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    """
    Return OTLP attributes as a dict.
    """
    return {pair.key: any_value(pair.value) for pair in pairs}


@dataclass(frozen=True)
class SinkEvent:
    """
    An event of a received span.
    """

    name: str
    attributes: dict[str, Any]


@dataclass(frozen=True)
class SinkSpan:
    """
    A received span; ids are lower-case hex, an absent parent is the empty string.
    """

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_span_id: str
    trace_state: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    events: list[SinkEvent]
    links: list[tuple[str, str]]
    status_code: int
    status_message: str
    resource: dict[str, Any]
    scope: str


@dataclass(frozen=True)
class SinkLog:
    """
    A received log record; ids are lower-case hex, empty if there is none.
    """

    body: Any
    severity_text: str
    severity_number: int
    trace_id: str
    span_id: str
    flags: int
    attributes: dict[str, Any]
    resource: dict[str, Any]
    scope: str


@dataclass(frozen=True)
class SinkRequest:
    """
    One HTTP request as it came, with the status that it was answered.
    """

    path: str
    headers: dict[str, str]
    size: int
    status: int
    connection: int


@dataclass
class Answer:
    """
    How the sink answers: 2xx stores what came; anything else forgets it.

    Attributes:
        status: HTTP status.
        headers: Extra response headers.
        rejected: If set, a partial success that rejects so many.
        message: The message of the partial success.
        hang_s: Wait so long (or until the sink closes) before answering.
        body: Answer with this, as text, instead of an OTLP response.
        drop: Store, then cut the connection without an answer.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    rejected: int = 0
    message: str = ""
    hang_s: float = 0.0
    body: bytes = b""
    drop: bool = False


def decode_spans(body: bytes) -> list[SinkSpan]:
    """
    Return the spans of a serialized export request.
    """
    request = ExportTraceServiceRequest.FromString(body)
    return [
        SinkSpan(
            name=span.name,
            kind=KINDS[span.kind],
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_span_id=span.parent_span_id.hex(),
            trace_state=span.trace_state,
            start_ns=span.start_time_unix_nano,
            end_ns=span.end_time_unix_nano,
            attributes=attributes(span.attributes),
            events=[SinkEvent(event.name, attributes(event.attributes)) for event in span.events],
            links=[(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
            status_code=span.status.code,
            status_message=span.status.message,
            resource=attributes(group.resource.attributes),
            scope=scope.scope.name,
        )
        for group in request.resource_spans
        for scope in group.scope_spans
        for span in scope.spans
    ]


def decode_logs(body: bytes) -> list[SinkLog]:
    """
    Return the log records of a serialized export request.
    """
    request = ExportLogsServiceRequest.FromString(body)
    return [
        SinkLog(
            body=any_value(record.body),
            severity_text=record.severity_text,
            severity_number=record.severity_number,
            trace_id=record.trace_id.hex(),
            span_id=record.span_id.hex(),
            flags=record.flags,
            attributes=attributes(record.attributes),
            resource=attributes(group.resource.attributes),
            scope=scope.scope.name,
        )
        for group in request.resource_logs
        for scope in group.scope_logs
        for record in scope.log_records
    ]


class OtlpSink:
    """
    Receives on a loopback port of its own from ``start`` until ``close``; may be started again on the same port.

    Attributes:
        spans: Every span stored so far.
        logs: Every log record stored so far.
        metrics: Every request with metrics stored so far.
        requests: Every request so far, refused ones too.
        answers: Answers for the next requests, first one first; then ``answer``.
        answer: What requests get by default.
    """

    def __init__(self, port: int = 0, answer: Answer | None = None) -> None:
        self.spans: list[SinkSpan] = []
        self.logs: list[SinkLog] = []
        self.metrics: list[ExportMetricsServiceRequest] = []
        self.requests: list[SinkRequest] = []
        self.answers: list[Answer] = []
        self.answer = answer or Answer()
        self._port = port
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._server: ThreadingHTTPServer | None = None
        self._connections: set[Any] = set()

    @property
    def endpoint(self) -> str:
        """
        The value for ``OTEL_EXPORTER_OTLP_ENDPOINT``; known once the sink was started.
        """
        assert self._port, "start the sink first"
        return f"http://127.0.0.1:{self._port}"

    @property
    def port(self) -> int:
        """
        The port, known once the sink was started.
        """
        return self._port

    def start(self) -> Self:
        """
        Listen; the first time on a free port, then on the same one again.
        """
        sink = self
        self._closing.clear()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                sink._connections.add(self.connection)

            def finish(self) -> None:
                sink._connections.discard(self.connection)
                super().finish()

            def do_POST(self) -> None:
                sink._handle(self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
                return

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: Any, client_address: Any) -> None:
                return  # a client that went away is what some tests are about

        self._server = Server(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def close(self) -> None:
        """
        Stop listening and cut every connection, as a killed collector does.
        """
        self._closing.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        for connection in list(self._connections):
            try:
                connection.shutdown(2)
                connection.close()
            except OSError:
                continue

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self, condition: Callable[[], bool], *, timeout_s: float = 20.0) -> bool:
        """
        Wait until ``condition`` holds (looked at whenever something arrives); tell whether it does.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not condition():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
        return True

    def wait_for_spans(self, count: int, *, timeout_s: float = 20.0) -> list[SinkSpan]:
        """
        Return all spans once there are ``count`` of them.

        Raises:
            AssertionError: There are fewer after ``timeout_s``.
        """
        arrived = self.wait(lambda: len(self.spans) >= count, timeout_s=timeout_s)
        assert arrived, f"{len(self.spans)} of {count} spans: {[span.name for span in self.spans]}"
        return list(self.spans)

    def wait_for_logs(self, count: int, *, timeout_s: float = 20.0) -> list[SinkLog]:
        """
        Return all log records once there are ``count`` of them.

        Raises:
            AssertionError: There are fewer after ``timeout_s``.
        """
        arrived = self.wait(lambda: len(self.logs) >= count, timeout_s=timeout_s)
        assert arrived, f"{len(self.logs)} of {count} records: {[record.body for record in self.logs]}"
        return list(self.logs)

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers.get("content-length", "0")))
        encoding = handler.headers.get("content-encoding", "")
        body = gzip.decompress(raw) if encoding == "gzip" else zlib.decompress(raw) if encoding == "deflate" else raw
        is_logs = handler.path.endswith("/logs")
        with self._changed:
            answer = self.answers.pop(0) if self.answers else self.answer
            if 200 <= answer.status < 300 and not answer.hang_s:
                self._store(handler.path, body)
            self.requests.append(
                SinkRequest(
                    handler.path,
                    {name.lower(): value for name, value in handler.headers.items()},
                    len(raw),
                    answer.status,
                    handler.client_address[1],
                )
            )
            self._changed.notify_all()
        if answer.hang_s and self._closing.wait(answer.hang_s):
            handler.close_connection = True
            return
        if answer.drop:
            handler.close_connection = True
            return
        if answer.hang_s:
            with self._changed:
                self._store(handler.path, body)
                self._changed.notify_all()
        self._respond(handler, answer, is_logs=is_logs)

    def _store(self, path: str, body: bytes) -> None:
        if path.endswith("/metrics"):
            self.metrics.append(ExportMetricsServiceRequest.FromString(body))
        elif path.endswith("/logs"):
            self.logs.extend(decode_logs(body))
        else:
            self.spans.extend(decode_spans(body))

    @staticmethod
    def _respond(handler: BaseHTTPRequestHandler, answer: Answer, *, is_logs: bool) -> None:
        payload = answer.body
        if answer.rejected or answer.message:
            if is_logs:
                logs = ExportLogsServiceResponse()
                logs.partial_success.rejected_log_records = answer.rejected
                logs.partial_success.error_message = answer.message
                payload = logs.SerializeToString()
            else:
                traces = ExportTraceServiceResponse()
                traces.partial_success.rejected_spans = answer.rejected
                traces.partial_success.error_message = answer.message
                payload = traces.SerializeToString()
        handler.send_response(answer.status)
        handler.send_header("content-type", "text/plain" if answer.body else "application/x-protobuf")
        handler.send_header("content-length", str(len(payload)))
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(payload)
