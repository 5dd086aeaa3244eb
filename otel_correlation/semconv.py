"""
Every header, attribute, log field and environment name that this package spells itself.

Names of the stable OpenTelemetry semantic conventions come from ``opentelemetry.semconv``; what stands here is ours or
has no stable constant. The ``OTEL_CORRELATION_*`` constants double as the flags of ``opentelemetry-instrument``
(entry point ``opentelemetry_environment_variables``).
"""

from __future__ import annotations

from typing import Final

DISTRO_NAME: Final = "otel-correlation"

# Headers, as they are emitted; matching is case-insensitive.
X_REQUEST_ID: Final = "X-Request-ID"
X_AMZN_TRACE_ID: Final = "X-Amzn-Trace-Id"
TRACEPARENT: Final = "traceparent"
TRACESTATE: Final = "tracestate"
BAGGAGE: Final = "baggage"
TRACERESPONSE: Final = "traceresponse"
SERVER_TIMING: Final = "server-timing"
EXPOSE_HEADERS: Final = "access-control-expose-headers"

# The one name of the request id: log field, OTLP log attribute and span attribute (design: contract, "One name").
REQUEST_ID: Final = "request_id"

# Log fields (OpenTelemetry compatibility/logging_trace_context.md, Stable).
TRACE_ID: Final = "trace_id"
SPAN_ID: Final = "span_id"
TRACE_FLAGS: Final = "trace_flags"
SERVICE_NAME: Final = "service_name"

# What a line of ours is made of, beside ``extra`` and bound fields, and how each platform calls it.
LOG_FIELDS: Final = (
    "timestamp",
    "level",
    "logger",
    "message",
    TRACE_ID,
    SPAN_ID,
    TRACE_FLAGS,
    REQUEST_ID,
    SERVICE_NAME,
    "exception",
    "stack",
)
LOG_PRESETS: Final[dict[str, dict[str, str]]] = {
    "otel": {},
    # Elastic Common Schema, fields of base, log, tracing, http, service and error (elastic.co/docs/reference/ecs), with
    # the dots in the names as the ECS logging libraries write them (github.com/elastic/ecs-logging, spec.json).
    "ecs": {
        "timestamp": "@timestamp",
        "level": "log.level",
        "logger": "log.logger",
        TRACE_ID: "trace.id",
        SPAN_ID: "span.id",
        REQUEST_ID: "http.request.id",
        SERVICE_NAME: "service.name",
        "exception": "error.stack_trace",
    },
    # docs.cloud.google.com/logging/docs/structured-logging, "Special fields in structured payloads"; Error Reporting
    # looks for a stack trace in ``stack_trace`` first.
    "gcp": {
        "timestamp": "time",
        "level": "severity",
        TRACE_ID: "logging.googleapis.com/trace",
        SPAN_ID: "logging.googleapis.com/spanId",
        TRACE_FLAGS: "logging.googleapis.com/trace_sampled",
        "exception": "stack_trace",
    },
    # docs.datadoghq.com/opentelemetry/correlate/logs_and_traces and logs/log_configuration/attributes_naming_convention
    # (reserved: status; standard: logger.name, error.stack, http.request_id).
    "datadog": {
        "level": "status",
        "logger": "logger.name",
        TRACE_ID: "dd.trace_id",
        SPAN_ID: "dd.span_id",
        REQUEST_ID: "http.request_id",
        SERVICE_NAME: "dd.service",
        "exception": "error.stack",
    },
}

# Attributes of ours.
REUSED_REQUEST_ID: Final = "otel_correlation.request_id.reused"
REFUSED_REQUEST_ID: Final = "otel_correlation.request_id.refused"
CALLER_REQUEST_ID: Final = "otel_correlation.caller.request_id"  # of a caller that is not trusted
FORCED: Final = "otel_correlation.forced"  # collector/sampler.yaml keeps these traces, too
CLIENT_DISCONNECTED: Final = "otel_correlation.client_disconnected"
WEBSOCKET_CLOSE_CODE: Final = "otel_correlation.websocket.close_code"
WEBSOCKET_DURATION: Final = "otel_correlation.websocket.duration"  # seconds
VALIDATION_ERRORS: Final = "otel_correlation.validation_errors"

# Messaging conventions, which have no stable constants (semantic conventions 1.44, messaging spans).
MESSAGING_SYSTEM: Final = "messaging.system"
MESSAGING_OPERATION_NAME: Final = "messaging.operation.name"
MESSAGING_OPERATION_TYPE: Final = "messaging.operation.type"
MESSAGING_DESTINATION_NAME: Final = "messaging.destination.name"
MESSAGING_DESTINATION_TEMPLATE: Final = "messaging.destination.template"
MESSAGING_MESSAGE_BODY_SIZE: Final = "messaging.message.body.size"
MESSAGING_MESSAGE_ID: Final = "messaging.message.id"
# Which try of an arq job it is, from 1, and whether it asked for another.
ARQ_TRY: Final = "otel_correlation.arq.try"
ARQ_RETRY: Final = "otel_correlation.arq.retry"
# How many subscribers Redis handed a published message to.
REDIS_RECEIVERS: Final = "otel_correlation.redis.receivers"

# Key in the ASGI scope that tells an edge that this very request already has one (contract point 7).
SCOPE_KEY: Final = "otel_correlation"
# Key in the ASGI scope under which the socket's peer stands, where the server replaced "client" by a forwarded address.
SCOPE_PEER: Final = "otel_correlation.peer"
# Key in the ASGI scope under which a request that is over stands, for a server that logs its access line only then.
SCOPE_LEFT: Final = "otel_correlation.left"
# Key in the ASGI scope under which the templates of the mounts on the way stand.
SCOPE_MOUNT: Final = "otel_correlation.mount"

OTEL_CORRELATION_ENABLED: Final = "OTEL_CORRELATION_ENABLED"
OTEL_CORRELATION_REQUEST_ID_HEADERS: Final = "OTEL_CORRELATION_REQUEST_ID_HEADERS"
OTEL_CORRELATION_RESPONSE_HEADER: Final = "OTEL_CORRELATION_RESPONSE_HEADER"
OTEL_CORRELATION_MINT: Final = "OTEL_CORRELATION_MINT"
OTEL_CORRELATION_TRACERESPONSE: Final = "OTEL_CORRELATION_TRACERESPONSE"
OTEL_CORRELATION_LOG_FORMAT: Final = "OTEL_CORRELATION_LOG_FORMAT"
OTEL_CORRELATION_LOG_PRESET: Final = "OTEL_CORRELATION_LOG_PRESET"
OTEL_CORRELATION_LOG_FIELDS: Final = "OTEL_CORRELATION_LOG_FIELDS"
OTEL_CORRELATION_LOGS_EXPORT: Final = "OTEL_CORRELATION_LOGS_EXPORT"
OTEL_CORRELATION_QUERY_VALUES: Final = "OTEL_CORRELATION_QUERY_VALUES"
OTEL_CORRELATION_WEBSOCKET: Final = "OTEL_CORRELATION_WEBSOCKET"
OTEL_CORRELATION_SQL_COMMENTS: Final = "OTEL_CORRELATION_SQL_COMMENTS"
OTEL_CORRELATION_PATCH_THREADS: Final = "OTEL_CORRELATION_PATCH_THREADS"
OTEL_CORRELATION_MESSAGES: Final = "OTEL_CORRELATION_MESSAGES"
OTEL_CORRELATION_QUEUE_BYTES: Final = "OTEL_CORRELATION_QUEUE_BYTES"
OTEL_CORRELATION_STORES: Final = "OTEL_CORRELATION_STORES"
OTEL_CORRELATION_EDGE: Final = "OTEL_CORRELATION_EDGE"
OTEL_CORRELATION_TRUSTED_NETWORKS: Final = "OTEL_CORRELATION_TRUSTED_NETWORKS"
OTEL_CORRELATION_TRUSTED_PROXIES: Final = "OTEL_CORRELATION_TRUSTED_PROXIES"
OTEL_CORRELATION_FORCE_SAMPLE_HEADER: Final = "OTEL_CORRELATION_FORCE_SAMPLE_HEADER"
OTEL_CORRELATION_OUTBOUND_TRACEPARENT: Final = "OTEL_CORRELATION_OUTBOUND_TRACEPARENT"
OTEL_CORRELATION_OUTBOUND_BAGGAGE: Final = "OTEL_CORRELATION_OUTBOUND_BAGGAGE"
OTEL_CORRELATION_OUTBOUND_REQUEST_ID: Final = "OTEL_CORRELATION_OUTBOUND_REQUEST_ID"
