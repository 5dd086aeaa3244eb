"""
Load for ``tiers.py``: OTLP batches, encoded once, sent again and again under new trace ids, as fast as they are taken.
"""

from __future__ import annotations

import gzip
import os
import random
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import SEVERITY_NUMBER_INFO, LogRecord
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

if TYPE_CHECKING:
    from collections.abc import Iterator

# The end of each template's trace ids, which a sending replaces. Not their beginning: tail sampling remembers decisions
# by the second half. And no more of them: the ratio's 56 bits, which end there, too, must differ within one batch.
MARK = b"\xf0\x0d\xfe\xed"
SPANS_PER_TRACE = 8
FAILED = 0.01  # Share of traces with an error: they are kept whatever the ratio.
ROUTES = ("/orders/{number}", "/customers/{customer}/orders", "/inventory/{item}", "/payments")
WORDS = (
    "select",
    "from",
    "orders",
    "where",
    "customer",
    "join",
    "items",
    "on",
    "left",
    "and",
    "between",
    "limit",
    "offset",
)


@dataclass(frozen=True, slots=True)
class Template:
    """
    One encoded batch, uncompressed.
    """

    body: bytes
    items: int
    traces: int

    def renewed(self) -> bytes:
        """
        Return the batch with trace ids that were never sent.
        """
        return self.body.replace(MARK, os.urandom(len(MARK)))


@dataclass(frozen=True, slots=True)
class Sent:
    """
    What one sending came to.
    """

    items: int
    traces: int
    refused: int
    seconds: float


def text(key: str, value: str) -> KeyValue:
    return KeyValue(key=key, value=AnyValue(string_value=value))


def number(key: str, value: int) -> KeyValue:
    return KeyValue(key=key, value=AnyValue(int_value=value))


def span(chance: random.Random, trace_id: bytes, request_id: str, now: int, size: int, *, failed: bool) -> Span:
    """
    Return a span like those of an HTTP service, of about ``size`` encoded bytes.
    """
    route, start = chance.choice(ROUTES), now - chance.randrange(1_000_000, 900_000_000)
    made = Span(
        trace_id=trace_id,
        span_id=chance.randbytes(8),
        parent_span_id=chance.randbytes(8),
        trace_state="ot=th:0",
        flags=0x101,
        name=f"GET {route}",
        kind=Span.SPAN_KIND_SERVER,
        start_time_unix_nano=start,
        end_time_unix_nano=start + chance.randrange(200_000, 60_000_000),
        status=Status(code=Status.STATUS_CODE_ERROR, message="stock service did not answer") if failed else None,
        attributes=[
            text("http.request.method", "GET"),
            text("http.route", route),
            text("url.scheme", "https"),
            text("url.path", route.partition("{")[0] + str(chance.randrange(10**6))),
            text("server.address", "orders.shop.internal"),
            number("server.port", 8443),
            number("http.response.status_code", 500 if failed else 200),
            text("network.protocol.version", "1.1"),
            text("client.address", f"10.{chance.randrange(256)}.{chance.randrange(256)}.{chance.randrange(256)}"),
            text("request_id", request_id),
        ],
    )
    # What makes real spans long is text of an application's own: statements, addresses, user agents.
    at = 0
    while (missing := size - made.ByteSize()) > 24:
        words: list[str] = []
        length = 0
        while length < min(missing - 24, 260):
            words.append(chance.choice(WORDS) if chance.random() < 0.8 else str(chance.randrange(10**5)))
            length += len(words[-1]) + 1
        made.attributes.append(text(f"shop.detail.{at}", " ".join(words)[: max(1, missing - 24)]))
        at += 1
    return made


def spans(size: int, per_batch: int, seed: int) -> Template:
    """
    Return a batch of spans of about ``size`` bytes, ``SPANS_PER_TRACE`` to a trace, from one service.
    """
    chance = random.Random(f"{size} {per_batch} {seed}")
    request = ExportTraceServiceRequest()
    of_service = request.resource_spans.add()
    of_service.resource.attributes.extend(resource(seed))
    scope = of_service.scope_spans.add()
    scope.scope.name, scope.scope.version = "otel_correlation", "0.1.0"
    now, traces = time.time_ns(), per_batch // SPANS_PER_TRACE
    for _ in range(traces):
        trace_id, failed = chance.randbytes(12) + MARK, chance.random() < FAILED
        request_id = chance.randbytes(16).hex()
        scope.spans.extend(
            span(chance, trace_id, request_id, now, size, failed=failed and index == 0)
            for index in range(SPANS_PER_TRACE)
        )
    return Template(request.SerializeToString(), traces * SPANS_PER_TRACE, traces)


def records(size: int, per_batch: int, seed: int) -> Template:
    """
    Return a batch of log records of about ``size`` bytes each, with the ids that ours carry.
    """
    chance = random.Random(f"{size} {per_batch} {seed}")
    request = ExportLogsServiceRequest()
    of_service = request.resource_logs.add()
    of_service.resource.attributes.extend(resource(seed))
    scope = of_service.scope_logs.add()
    now = time.time_ns()
    for index in range(per_batch):
        record = LogRecord(
            time_unix_nano=now + index * 1000,  # Loki takes equal lines of one instant for one.
            observed_time_unix_nano=now + index * 1000,
            severity_number=SEVERITY_NUMBER_INFO,
            severity_text="INFO",
            trace_id=chance.randbytes(12) + MARK,
            span_id=chance.randbytes(8),
            flags=1,
            attributes=[text("request_id", chance.randbytes(16).hex()), text("code.function.name", "orders.place")],
        )
        line = [f"order {chance.randrange(10**7)} placed"]
        while record.ByteSize() + sum(map(len, line)) + len(line) < size - 8:
            line.append(chance.choice(WORDS))
        record.body.string_value = " ".join(line)
        scope.log_records.append(record)
    return Template(request.SerializeToString(), per_batch, per_batch)


def resource(seed: int) -> list[KeyValue]:
    return [
        text("service.name", f"orders-{seed % 4}"),
        text("service.version", "2026.11.21"),
        text("service.instance.id", f"7d7a2c5e-0000-4000-8000-{seed:012d}"),
        text("deployment.environment.name", "production"),
        text("telemetry.sdk.language", "python"),
        text("telemetry.sdk.name", "opentelemetry"),
        text("telemetry.distro.name", "otel-correlation"),
    ]


class Load:
    """
    Sends batches of one kind to one address over a few connections, one request at a time on each.

    Args:
        address: host:port.
        signal: ``spans`` or ``logs``.
        protocol: ``http`` as our SDK sends (protobuf, not compressed), ``gzip`` (the same, compressed), or ``grpc`` as
            collectors do (compressed).
        prefix: In front of ``/v1/logs``, for a store that has OTLP under a path of its own.
    """

    def __init__(
        self, address: str, signal: str, protocol: str, templates: list[Template], connections: int, prefix: str = ""
    ) -> None:
        service = {"spans": ("trace", "Trace", "traces"), "logs": ("logs", "Logs", "logs")}[signal]
        self.grpc = protocol == "grpc"
        self.compress = protocol != "http"
        if self.grpc:
            path = f"/opentelemetry.proto.collector.{service[0]}.v1.{service[1]}Service/Export"
            self.headers = {"content-type": "application/grpc", "te": "trailers", "grpc-encoding": "gzip"}
        else:
            path = f"{prefix}/v1/{service[2]}"
            self.headers = {"content-type": "application/x-protobuf"}
            if self.compress:
                self.headers["content-encoding"] = "gzip"
        self.url = f"http://{address}{path}"
        self.templates = templates
        self.connections = connections

    def send(self, seconds: float, batches: int | None = None) -> Sent:
        """
        Send for so long, at least one batch on each connection, or so many if that is sooner; wait for every answer.
        """
        started = time.monotonic()
        lock = threading.Lock()
        items = traces = refused = 0
        limit = batches if batches is not None else 1 << 60

        def next_batches() -> Iterator[Template]:
            nonlocal limit
            while limit > 0:
                with lock:
                    limit -= 1
                yield self.templates[limit % len(self.templates)]
                if time.monotonic() - started >= seconds:
                    return

        def run() -> None:
            nonlocal items, traces, refused
            with httpx.Client(
                http1=not self.grpc, http2=self.grpc, trust_env=False, timeout=60, verify=False
            ) as client:
                for template in next_batches():
                    body = self._encoded(template)
                    good = self._accepted(client.post(self.url, content=body, headers=self.headers))
                    with lock:
                        items, traces = items + template.items * good, traces + template.traces * good
                        refused += template.items * (not good)

        threads = [threading.Thread(target=run, daemon=True) for _ in range(self.connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return Sent(items, traces, refused, time.monotonic() - started)

    def _encoded(self, template: Template) -> bytes:
        body = template.renewed()
        if self.compress:
            body = gzip.compress(body, 1)
        # A gRPC message: one byte for "compressed", four for its length.
        return b"\1" + len(body).to_bytes(4, "big") + body if self.grpc else body

    def _accepted(self, answer: httpx.Response) -> bool:
        if self.grpc:  # httpx shows no trailers; a refusal has its status among the headers, and no message.
            return (
                answer.status_code == 200 and answer.headers.get("grpc-status", "0") == "0" and len(answer.content) >= 5
            )
        return answer.is_success
