"""
What the shipped collector promises, with spans and records that the SDK's own exporters send: clean, and never lost.
"""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import SimpleLogRecordProcessor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Status, StatusCode, format_trace_id

from tests.stack.harness import Collector, Jaeger, Machine, eventually, get

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.util.types import AttributeValue

pytestmark = pytest.mark.needs("collector", "jaeger")

CARD = "4111111111111111"
CARD_LIKE_ID = "5500005555555559"
PLANTED: dict[str, AttributeValue] = {
    "http.request.header.authorization": ["Bearer planted-1"],
    "http.request.header.cookie": ["session=planted-2"],
    "http.response.header.set-cookie": ["session=planted-3"],
    "db.password": "planted-4",
    "clientSecret": "planted-5",
    "access_token": "planted-6",
    "x-api-key": "planted-7",
    "payment.card": CARD,
    "payment.card.spaced": "card 4111 1111 1111 1111, thank you",
    "payment.amex": "3782-822463-10005",
    "payment.number": int(CARD),
    "customer": "jane.planted@example.com",
    "url.query": "page=2&access_token=planted-8&mail=jane.planted%40example.com",
    "url.full": "https://jane:planted-9@shop.example/orders",
    "db.query.text": "SELECT 1 WHERE password = 'planted 10' AND x = 2",
    "note": 'sent {"api_key": "planted-11"} with Authorization: Basic planted-12',
    "redis.url": "redis://:planted-16@cache:6379/0",
    "broker.url": "amqp://app:planted/17@broker/%2f",
    "http.request.header.x-passphrase": ["planted-18"],
    "card_number": "planted-19",
    "user_otp": "planted-20",
    "connect.sid": "planted-21",
    "cvv": 9274,
    "note.pairs": "csrftoken=planted-22; JSESSIONID=planted-23; Server=db;Password=planted-24",
    "note.query": "GET /cb?code=planted-25&next=https%3A%2F%2Fjane%3Aplanted-26%40h%2F",
    "jwt": "got eyJhbGciOiJub25lIn0.eyJzdWIiOiJwbGFudGVkIn0.c2ln",
}
SECRETS = ("planted", "9274", CARD, "4111 1111", "822463", "eyJhbGci")
KEPT: dict[str, AttributeValue] = {
    "request_id": CARD_LIKE_ID,  # An id is for finding, whatever it looks like.
    "http.request.header.x-request-id": [CARD_LIKE_ID],
    "http.route": "/tokens/{token}",
    "url.path": "/customers/00000000-4111-1111-1111-111111111111/orders",
    "http.response.status_code": 500,
    "error.type": "builtins.ValueError",
    "session.id": "f4a2b3c1-dead-beef-0000-aabbccddeeff",
    "gen_ai.usage.input_tokens": 4111,
    "gen_ai.token.type": "input",
    "token_count": 30,
    "session.timeout": "30m",
    "password_required": True,
    "exit": "exit code=1, status code: 500, author=ada, shipping=fast",
    "cdn": "https://cdn.example/react@17/index.js",
    "messaging.kafka.message.offset": 1763700000000,
    "started_ns": "1763700000123456789",
    "db.query.text.kept": "SELECT id FROM secrets WHERE token_count > 3",
}


def spans(
    names: list[str], attributes: Mapping[str, AttributeValue], resource: Mapping[str, AttributeValue]
) -> list[ReadableSpan]:
    """
    Return one finished root span for each name, made by a provider that is nobody's global.
    """
    memory = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource(resource), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    for name in names:
        with provider.get_tracer("stack").start_as_current_span(name, attributes=attributes) as span:
            span.add_event("exception", {"exception.message": f"no mail to jane.planted@example.com, card {CARD}"})
            span.set_status(Status(StatusCode.ERROR, "ValueError: password=planted-13 of jane.planted@example.com"))
    return list(memory.get_finished_spans())


def trace_id(span: ReadableSpan) -> str:
    """
    Return the span's trace id as 32 hex digits.
    """
    assert span.context is not None
    return format_trace_id(span.context.trace_id)


def send(collector: Collector, batch: list[ReadableSpan]) -> None:
    """
    Hand the batch over; when this returns the collector has acknowledged it.
    """
    exporter = OTLPSpanExporter(endpoint=f"http://{collector.http}/v1/traces")
    try:
        assert exporter.export(batch) is SpanExportResult.SUCCESS
    finally:
        exporter.shutdown()  # type: ignore[no-untyped-call]  # the SDK's signature has no return type


def test_secrets_do_not_reach_jaeger_and_ids_do(collector: Collector, jaeger: Jaeger) -> None:
    """
    Planted credentials, cards and addresses are masked wherever a span can carry them; what traces are found by stays exact.
    """
    resource = {"service.name": "redaction", "owner": "jane.planted@example.com", "deploy.token": "planted-14"}
    (span,) = spans([f"GET /mail/jane.planted@example.com/{CARD}"], PLANTED | KEPT, resource)
    send(collector, [span])
    (stored,) = eventually("the span", lambda: jaeger.trace(trace_id(span)))
    text = jaeger.raw(trace_id(span))
    assert [secret for secret in SECRETS if secret in text] == []
    assert json.loads(str(stored.tags["http.request.header.x-request-id"])) == [CARD_LIKE_ID]
    assert {key: stored.tags[key] for key in KEPT if "header" not in key} == {
        key: KEPT[key] for key in KEPT if "header" not in key
    }
    assert stored.name == "GET /mail/****/****"
    assert stored.tags["otel.status_description"] == "ValueError: **** of ****"
    assert stored.tags["url.query"] == "page=2&access_********"
    assert stored.tags["url.full"] == "https:****shop.example/orders"
    assert stored.tags["payment.card.spaced"] == "card ****, thank you"
    assert not [key for key in stored.tags if "lent" in key]
    assert jaeger.search("redaction", request_id=CARD_LIKE_ID)


def test_an_acknowledged_span_survives_an_outage_and_a_kill(machine: Machine) -> None:
    """
    200 spans accepted while Jaeger is down, a collector killed with -9: all 200 are in Jaeger after the restart.
    """
    jaeger = Jaeger(machine)
    collector = Collector(machine, jaeger)
    first = collector.start()
    sent = spans([f"span {number}" for number in range(200)], {}, {"service.name": "queue"})
    for start in range(0, len(sent), 20):
        send(collector, sent[start : start + 20])
    first.clean_up()
    jaeger.start()
    collector.start()
    missing = {trace_id(span) for span in sent}

    def arrived() -> bool:
        missing.difference_update({one for one in missing if jaeger.trace(one)})
        return not missing

    eventually("200 spans", arrived)


class Sink(BaseHTTPRequestHandler):
    """
    A log store that keeps the bodies it is sent.
    """

    def do_POST(self) -> None:
        """
        Keep the request for the test and acknowledge it.
        """
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        assert isinstance(self.server, LogStore)
        self.server.received.append((self.path, ExportLogsServiceRequest.FromString(body)))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
        """
        Stay quiet.
        """


class LogStore(ThreadingHTTPServer):
    """
    The server of ``Sink``, on a port of the kernel's choice.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Sink)
        self.received: list[tuple[str, ExportLogsServiceRequest]] = []


@pytest.fixture
def log_store() -> Iterator[LogStore]:
    """
    A place to send logs to, gone after the test.
    """
    with LogStore() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def emit(collector: Collector) -> None:
    """
    Send one record with a planted address in its body and a planted secret among its attributes.
    """
    provider = LoggerProvider(resource=Resource({"service.name": "logs"}), shutdown_on_exit=False)
    provider.add_log_record_processor(
        SimpleLogRecordProcessor(OTLPLogExporter(endpoint=f"http://{collector.http}/v1/logs"))
    )
    attributes = {"request_id": CARD_LIKE_ID, "password": "planted-1"}
    body = "mail to jane.planted@example.com failed"
    provider.get_logger("stack").emit(LogRecord(body=body, severity_number=SeverityNumber.WARN, attributes=attributes))
    provider.shutdown()


def test_logs_go_clean_to_the_configured_store(machine: Machine, log_store: LogStore) -> None:
    """
    With COLLECTOR_LOGS_EXPORTER=otlp_http/logs records reach the store below its OTLP address, redacted, request id intact.
    """
    collector = Collector(machine, Jaeger(machine))
    place = f"http://127.0.0.1:{log_store.server_port}/otlp"
    collector.start(COLLECTOR_LOGS_EXPORTER="otlp_http/logs", LOGS_OTLP_ENDPOINT=place)
    emit(collector)
    path, request = eventually("the record", lambda: log_store.received[:1])[0]
    assert path == "/otlp/v1/logs"
    record = request.resource_logs[0].scope_logs[0].log_records[0]
    assert record.body.string_value == "mail to **** failed"
    assert {item.key: item.value.string_value for item in record.attributes} == {
        "request_id": CARD_LIKE_ID,
        "password": "****",
    }


def test_logs_show_in_the_collectors_output_by_default(machine: Machine) -> None:
    """
    Without a log store a record is printed, one line, redacted, so that a laptop needs nothing else.
    """
    collector = Collector(machine, Jaeger(machine))
    process = collector.start()
    emit(collector)
    eventually("the record", lambda: "mail to **** failed" in process.log.read_text())
    assert "planted" not in process.log.read_text()


def test_the_collectors_own_metrics_can_be_switched_on(machine: Machine) -> None:
    """
    COLLECTOR_METRICS_LEVEL and _PORT serve the queue's size to Prometheus; by default nothing listens.
    """
    collector = Collector(machine, Jaeger(machine))
    port = machine.port()
    collector.start(COLLECTOR_METRICS_LEVEL="normal", COLLECTOR_METRICS_PORT=str(port))
    send(collector, spans(["waiting"], {}, {"service.name": "metrics"}))
    page = f"http://127.0.0.1:{port}/metrics"
    eventually("the queue's size", lambda: "otelcol_exporter_queue_size" in get(page).text)
