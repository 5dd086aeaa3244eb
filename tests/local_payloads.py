"""
Spans and log lines as OTLP requests, and one failed checkout over three services, for tests of what receives and finds.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan

from otel_correlation.stores import Event, LogLine, Span, Trace

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from otel_correlation.stores import Json

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
REQUEST_ID = "customer-quote/2026#000123"
START_NS = 1_795_000_000_000_000_000
MS = 1_000_000
STACK = """Traceback (most recent call last):
  File "/venv/lib/python3.11/site-packages/fastapi/routing.py", line 101, in app
    return await run(values)
  File "/srv/inventory.py", line 42, in reserve
    days = item.days_left()
  File "/srv/inventory.py", line 24, in days_left
    return self.on_hand * 30 // self.sold_last_30_days
           ~~~~~~~~~~~~~~~~~~^^~~~~~~~~~~~~~~~~~~~~~~~
ZeroDivisionError: integer division or modulo by zero
"""


def any_value(value: Json) -> AnyValue:
    match value:
        case bool():
            return AnyValue(bool_value=value)
        case int():
            return AnyValue(int_value=value)
        case float():
            return AnyValue(double_value=value)
        case str():
            return AnyValue(string_value=value)
        case list():
            result = AnyValue()
            result.array_value.values.extend(map(any_value, value))
            return result
        case dict():
            result = AnyValue()
            result.kvlist_value.values.extend(pairs(value))
            return result
        case None:
            return AnyValue()


def pairs(attributes: Mapping[str, Json]) -> list[KeyValue]:
    return [KeyValue(key=key, value=any_value(value)) for key, value in attributes.items()]


def traces(spans: Iterable[Span]) -> ExportTraceServiceRequest:
    request = ExportTraceServiceRequest()
    for span in spans:
        resource = request.resource_spans.add()
        resource.resource.attributes.extend(pairs({"service.name": span.service}))
        proto = resource.scope_spans.add().spans.add(
            trace_id=bytes.fromhex(span.trace_id),
            span_id=bytes.fromhex(span.span_id),
            parent_span_id=bytes.fromhex(span.parent_id),
            name=span.name,
            kind=ProtoSpan.SpanKind.Value(f"SPAN_KIND_{span.kind}"),
            start_time_unix_nano=span.start_ns,
            end_time_unix_nano=span.end_ns,
            attributes=pairs(span.attributes),
        )
        proto.status.message = span.status_message
        if span.failed:
            proto.status.code = 2
        for event in span.events:
            proto.events.add(name=event.name, time_unix_nano=event.time_ns, attributes=pairs(event.attributes))
        for trace_id, span_id in span.links:
            proto.links.add(trace_id=bytes.fromhex(trace_id), span_id=bytes.fromhex(span_id))
    return request


def logs(lines: Iterable[LogLine]) -> ExportLogsServiceRequest:
    request = ExportLogsServiceRequest()
    for line in lines:
        resource = request.resource_logs.add()
        resource.resource.attributes.extend(pairs({"service.name": line.service}))
        scope = resource.scope_logs.add()
        scope.scope.name = line.logger
        scope.log_records.add(
            trace_id=bytes.fromhex(line.trace_id),
            span_id=bytes.fromhex(line.span_id),
            time_unix_nano=line.time_ns,
            severity_text=line.severity,
            body=any_value(line.body),
            attributes=pairs(line.attributes),
        )
    return request


def as_otlp_json(message: ExportTraceServiceRequest | ExportLogsServiceRequest) -> dict[str, Any]:
    """
    Return ``message`` as OTLP/JSON: protobuf's JSON mapping, but ids in hex.
    """

    def with_hex(node: Any) -> Any:
        if isinstance(node, list):
            return [with_hex(item) for item in node]
        if isinstance(node, dict):
            return {
                key: base64.b64decode(value).hex() if key in ("traceId", "spanId", "parentSpanId") else with_hex(value)
                for key, value in node.items()
            }
        return node

    document: dict[str, Any] = with_hex(json_format.MessageToDict(message))
    return document


def span(span_id: str, parent_id: str, service: str, name: str, kind: str, at: tuple[int, int], **more: Any) -> Span:
    """
    Return a span of the checkout; ``at`` is its start and end in milliseconds.
    """
    attributes = {"request_id": REQUEST_ID, **more.pop("attributes", {})}
    return Span(
        trace_id=more.pop("trace_id", TRACE_ID),
        span_id=span_id * 16,
        parent_id=parent_id * 16,
        service=service,
        name=name,
        kind=kind,
        start_ns=START_NS + at[0] * MS,
        end_ns=START_NS + at[1] * MS,
        attributes=attributes,
        **more,
    )


def exception(at_ms: int, kind: str, message: str, stack: str = "") -> Event:
    attributes: dict[str, Json] = {"exception.type": kind, "exception.message": message, "exception.stacktrace": stack}
    return Event("exception", START_NS + at_ms * MS, attributes)


def log(at_ms: int, service: str, body: str, severity: str = "INFO", **more: Any) -> LogLine:
    return LogLine(
        trace_id=more.pop("trace_id", TRACE_ID),
        span_id=more.pop("span_id", "a" * 16),
        time_ns=START_NS + at_ms * MS,
        severity=severity,
        service=service,
        logger=f"shop.{service}",
        body=body,
        attributes={"request_id": REQUEST_ID, **more.pop("attributes", {})},
    )


def checkout() -> Trace:
    """
    Return a checkout that failed in the inventory: three SERVER and two CLIENT spans, log lines of all services.
    """

    def http(method: str, route: str, status: int) -> dict[str, Json]:
        return {"http.request.method": method, "http.route": route, "http.response.status_code": status}

    upstream = exception(70, "httpx.HTTPStatusError", "Server error '500 Internal Server Error'", STACK)
    return Trace.of(
        TRACE_ID,
        [
            span(
                "a",
                "",
                "gateway",
                "POST /checkout",
                "SERVER",
                (0, 100),
                attributes=http("POST", "/checkout", 502),
                failed=True,
            ),
            span(
                "b",
                "a",
                "gateway",
                "POST",
                "CLIENT",
                (10, 90),
                attributes={"http.response.status_code": 500},
                failed=True,
            ),
            span(
                "c",
                "b",
                "orders",
                "POST /orders",
                "SERVER",
                (20, 80),
                attributes=http("POST", "/orders", 500),
                failed=True,
                events=(upstream,),
            ),
            span(
                "d",
                "c",
                "orders",
                "POST",
                "CLIENT",
                (30, 70),
                attributes={"http.response.status_code": 500},
                failed=True,
            ),
            span(
                "e",
                "d",
                "inventory",
                "POST /reservations",
                "SERVER",
                (40, 60),
                attributes=http("POST", "/reservations", 500),
                failed=True,
                events=(exception(55, "ZeroDivisionError", "integer division or modulo by zero", STACK),),
            ),
        ],
        [
            log(1, "gateway", "checkout of 1 x chair"),
            log(45, "inventory", "reserving 1 of 25 x chair"),
            log(95, "gateway", "no order was made", "ERROR"),
        ],
    )
