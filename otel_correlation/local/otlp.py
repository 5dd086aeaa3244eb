"""
OTLP requests into spans and log lines: protobuf and OTLP/JSON, plain and gzip, each step bounded.

See: OTLP specification 1.x, sections "OTLP/HTTP Request", "JSON Protobuf Encoding" and "Partial Success".
"""

from __future__ import annotations

import base64
import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from google.protobuf import json_format
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from otel_correlation.local import wire
from otel_correlation.stores.bounded import Gunzip, MalformedError, TooBigError, read_json
from otel_correlation.stores.model import Event, LogLine, Span

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TypeVar

    from google.protobuf.message import Message
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
    from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
    from opentelemetry.proto.resource.v1.resource_pb2 import Resource
    from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan

    from otel_correlation.stores.model import Json

    M = TypeVar("M", bound=Message)

PROTOBUF: Final = "application/x-protobuf"
JSON: Final = "application/json"

# What one request may hold: a collector's batch of 8,192 spans with forty attributes each, several times over.
MAX_FIELDS: Final = 2_000_000
# The same, of a body in JSON: an attribute has four values.
MAX_VALUES: Final = 500_000
# Spans, log records, events, links and what they are in. Each becomes some hundred bytes.
MAX_RECORDS: Final = 100_000
# A body may inflate to this many times its size, and to the next number in any case.
MAX_RATIO: Final = 200
_ANY_RATIO_BYTES: Final = 1024 * 1024

_TRACES: Final = wire.Shape(ExportTraceServiceRequest.DESCRIPTOR)
_LOGS: Final = wire.Shape(ExportLogsServiceRequest.DESCRIPTOR)
_METRICS: Final = wire.Shape(ExportMetricsServiceRequest.DESCRIPTOR)
_LISTS_OF_ATTRIBUTES: Final = frozenset({"attributes", "values"})

_KINDS: Final = ("INTERNAL", "INTERNAL", "SERVER", "CLIENT", "PRODUCER", "CONSUMER")
_ID_KEYS: Final = frozenset({"traceId", "spanId", "parentSpanId"})
_BYTES_KEYS: Final = frozenset({"bytesValue", "bytes_value"})
# protobuf decodes the URL-safe alphabet, and Python will stop to take the other one for it.
_URL_SAFE: Final = str.maketrans("+/", "-_")
_HEX: Final = re.compile(r"(?:[0-9A-Fa-f]{2})*")
_TRACE_ID_BYTES: Final = 16
_SPAN_ID_BYTES: Final = 8
# SQLite's and JavaScript's largest exact integers.
_MAX_TIME_NS: Final = 2**63 - 1
_MAX_EXACT: Final = 2**53
# Upper bounds of the severity number ranges, logs data model "Displaying Severity".
_SEVERITIES: Final = ((0, ""), (4, "TRACE"), (8, "DEBUG"), (12, "INFO"), (16, "WARN"), (20, "ERROR"), (24, "FATAL"))


@dataclass(frozen=True, slots=True)
class Batch:
    """
    What one request held: the parts that are kept, and how many were not and why.
    """

    spans: tuple[Span, ...] = ()
    logs: tuple[LogLine, ...] = ()
    rejected: int = 0
    reason: str = ""
    # Log records that name no trace (start-up lines): taken, but nothing can be found by them.
    without_trace: int = 0


def decompress(body: bytes, limit: int) -> bytes:
    """
    Return the content of a gzip body (at most 1,000 members) of at most ``limit`` bytes.

    Beyond 1 MiB it may be 200 times as large as the body. Telemetry is 5 to 50 times; zlib can be 1,032 times.

    Raises:
        MalformedError: Not gzip, or cut off.
        TooBigError: More comes out.
    """
    inflate = Gunzip(min(limit, max(_ANY_RATIO_BYTES, MAX_RATIO * len(body))))
    inflate.feed(body)
    return inflate.finish()


def decode_traces(body: bytes, media: str) -> Batch:
    """
    Read an ExportTraceServiceRequest; a span with an invalid id is rejected alone.

    Raises:
        MalformedError: The body as a whole cannot be read.
        TooBigError: It holds more than ``MAX_FIELDS``, ``MAX_VALUES`` or ``MAX_RECORDS``.
    """
    request = _parse(ExportTraceServiceRequest(), _TRACES, body, media)
    spans: list[Span] = []
    rejected = 0
    for resource_spans in request.resource_spans:
        service = _service(resource_spans.resource)
        for scope_spans in resource_spans.scope_spans:
            for proto in scope_spans.spans:
                if _is_id(proto.trace_id, _TRACE_ID_BYTES) and _is_id(proto.span_id, _SPAN_ID_BYTES):
                    spans.append(_span(proto, service))
                else:
                    rejected += 1
    return Batch(
        spans=tuple(spans), rejected=rejected, reason="spans with an invalid trace or span id" if rejected else ""
    )


def decode_logs(body: bytes, media: str) -> Batch:
    """
    Read an ExportLogsServiceRequest; a record whose trace id has a wrong length is rejected alone.

    Raises:
        MalformedError: The body as a whole cannot be read.
        TooBigError: It holds more than ``MAX_FIELDS``, ``MAX_VALUES`` or ``MAX_RECORDS``.
    """
    request = _parse(ExportLogsServiceRequest(), _LOGS, body, media)
    logs: list[LogLine] = []
    rejected = without_trace = 0
    for resource_logs in request.resource_logs:
        service = _service(resource_logs.resource)
        for scope_logs in resource_logs.scope_logs:
            for record in scope_logs.log_records:
                if _is_id(record.trace_id, _TRACE_ID_BYTES):
                    logs.append(_log(record, service, scope_logs.scope.name))
                elif any(record.trace_id) or len(record.trace_id) not in (0, _TRACE_ID_BYTES):
                    rejected += 1
                else:
                    without_trace += 1
    reason = "log records with an invalid trace id" if rejected else ""
    return Batch(logs=tuple(logs), rejected=rejected, reason=reason, without_trace=without_trace)


def check_metrics(body: bytes, media: str) -> Batch:
    """
    Check that the body is an ExportMetricsServiceRequest; its content is not kept.

    Raises:
        MalformedError: It is none.
        TooBigError: It holds more than ``MAX_FIELDS``, ``MAX_VALUES`` or ``MAX_RECORDS``.
    """
    if media == JSON:
        _parse(ExportMetricsServiceRequest(), _METRICS, body, media)
    else:
        wire.check(body, _METRICS, max_fields=MAX_FIELDS, max_records=MAX_RECORDS)
    return Batch()


def trace_response(batch: Batch, media: str) -> bytes:
    """
    Return the encoded answer to a trace export.
    """
    response = ExportTraceServiceResponse()
    if batch.rejected:
        response.partial_success.rejected_spans = batch.rejected
        response.partial_success.error_message = batch.reason
    return encode(response, media)


def log_response(batch: Batch, media: str) -> bytes:
    """
    Return the encoded answer to a log export.
    """
    response = ExportLogsServiceResponse()
    if batch.rejected:
        response.partial_success.rejected_log_records = batch.rejected
        response.partial_success.error_message = batch.reason
    return encode(response, media)


def metric_response(_batch: Batch, media: str) -> bytes:
    """
    Return the encoded answer to a metric export.
    """
    return encode(ExportMetricsServiceResponse(), media)


def encode(message: Message, media: str) -> bytes:
    """
    Return ``message`` in the encoding that the sender used.
    """
    if media == JSON:
        text: str = json_format.MessageToJson(message, indent=None)
        return text.encode()
    data: bytes = message.SerializeToString()
    return data


def _parse(message: M, shape: wire.Shape, body: bytes, media: str) -> M:
    try:
        if media == JSON:
            document = read_json(body, max_values=MAX_VALUES)
            json_format.ParseDict(_with_base64_ids(document), message, ignore_unknown_fields=True)
        else:
            wire.check(body, shape, max_fields=MAX_FIELDS, max_records=MAX_RECORDS)
            message.ParseFromString(body)
    except TooBigError:
        raise
    except (DecodeError, json_format.ParseError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise MalformedError(f"the body is no {type(message).__name__} as {media} ({type(error).__name__})") from None
    return message


def _with_base64_ids(document: Any) -> Any:
    """
    Turn the ids from hex, as OTLP/JSON writes them, into base64, as protobuf's JSON mapping does; in place.

    Attribute keys are values in OTLP, never member names, so a member of that name is an id.

    Raises:
        TooBigError: There are more than ``MAX_RECORDS`` objects in lists that are no part of an attribute.
    """
    stack: list[Any] = [document]
    records = 0
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack.extend(node)
        elif isinstance(node, dict):
            for key, value in node.items():
                if key in _ID_KEYS and isinstance(value, str):
                    # What is no hex becomes one byte, an id of a wrong length: that span is rejected, not the batch.
                    raw = bytes.fromhex(value) if _HEX.fullmatch(value) else b"\0"
                    node[key] = base64.urlsafe_b64encode(raw).decode()
                elif key in _BYTES_KEYS and isinstance(value, str):
                    node[key] = value.translate(_URL_SAFE)
                elif isinstance(value, list | dict):
                    stack.append(value)
                    records += len(value) if isinstance(value, list) and key not in _LISTS_OF_ATTRIBUTES else 0
            if records > MAX_RECORDS:
                raise TooBigError(f"the body has more than {MAX_RECORDS} spans, events, records and the like")
    return document


def _is_id(value: bytes, length: int) -> bool:
    return len(value) == length and any(value)


def _service(resource: Resource) -> str:
    name = _attributes(resource.attributes).get("service.name")
    return name if isinstance(name, str) and name else "unknown_service"


def _span(proto: ProtoSpan, service: str) -> Span:
    parent = proto.parent_span_id
    return Span(
        trace_id=proto.trace_id.hex(),
        span_id=proto.span_id.hex(),
        parent_id=parent.hex() if _is_id(parent, _SPAN_ID_BYTES) else "",
        service=service,
        name=proto.name,
        kind=_KINDS[proto.kind] if 0 <= proto.kind < len(_KINDS) else "INTERNAL",
        start_ns=min(proto.start_time_unix_nano, _MAX_TIME_NS),
        end_ns=min(max(proto.end_time_unix_nano, proto.start_time_unix_nano), _MAX_TIME_NS),
        failed=proto.status.code == Status.STATUS_CODE_ERROR,
        status_message=proto.status.message,
        attributes=_attributes(proto.attributes),
        events=tuple(
            Event(event.name, min(event.time_unix_nano, _MAX_TIME_NS), _attributes(event.attributes))
            for event in proto.events
        ),
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in proto.links),
    )


def _log(record: LogRecord, service: str, logger: str) -> LogLine:
    body = _value(record.body)
    return LogLine(
        trace_id=record.trace_id.hex(),
        span_id=record.span_id.hex() if _is_id(record.span_id, _SPAN_ID_BYTES) else "",
        time_ns=min(record.time_unix_nano or record.observed_time_unix_nano, _MAX_TIME_NS),
        severity=record.severity_text or _severity(record.severity_number),
        service=service,
        logger=logger,
        body=body if isinstance(body, str) else "" if body is None else json.dumps(body, ensure_ascii=False),
        attributes=_attributes(record.attributes),
    )


def _severity(number: int) -> str:
    return next((name for bound, name in _SEVERITIES if number <= bound), "")


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Json]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Json:
    """
    Return ``value`` as JSON can carry it: bytes as base64, and as text what JSON or JavaScript would not keep exactly.
    """
    match value.WhichOneof("value"):
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "int_value":
            return value.int_value if -_MAX_EXACT <= value.int_value <= _MAX_EXACT else str(value.int_value)
        case "double_value":
            return value.double_value if math.isfinite(value.double_value) else str(value.double_value)
        case "array_value":
            return [_value(item) for item in value.array_value.values]
        case "kvlist_value":
            return _attributes(value.kvlist_value.values)
        case "bytes_value":
            return base64.b64encode(value.bytes_value).decode()
        case _:
            return None
