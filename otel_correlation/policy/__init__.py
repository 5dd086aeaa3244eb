"""
What is decided by rule: what is left out of spans and lines, whose ids are continued, and which hosts get ours.
"""

from __future__ import annotations

from otel_correlation.policy.bounds import (
    BATCH_BYTES,
    CUT,
    DEFAULT,
    LINE_FIELD,
    LINE_MESSAGE,
    LINES,
    QUEUE_BYTES,
    Bounds,
    bounds_for,
)
from otel_correlation.policy.exceptions import class_name, scrubbed, scrubbed_stack, stack_of, text_of
from otel_correlation.policy.outbound import ALL, Outbound, host_pattern, outbound_for
from otel_correlation.policy.recording import (
    REDACTED,
    HeaderCapture,
    Patterns,
    redact_query,
    redact_url,
)
from otel_correlation.policy.scrubbing import hide_quoted, scrub
from otel_correlation.policy.showing import (
    HEADERS_HINT,
    file_problem,
    mask_stock_lines,
    quoted,
    reason_of,
    shown_store,
    shown_text,
    shown_url,
    shown_variable,
)
from otel_correlation.policy.trust import FORWARDING, NONE, Trust, end_of, peers, trust_for

__all__ = [
    "ALL",
    "BATCH_BYTES",
    "CUT",
    "DEFAULT",
    "FORWARDING",
    "HEADERS_HINT",
    "LINES",
    "LINE_FIELD",
    "LINE_MESSAGE",
    "NONE",
    "QUEUE_BYTES",
    "REDACTED",
    "Bounds",
    "HeaderCapture",
    "Outbound",
    "Patterns",
    "Trust",
    "bounds_for",
    "class_name",
    "end_of",
    "file_problem",
    "hide_quoted",
    "host_pattern",
    "mask_stock_lines",
    "outbound_for",
    "peers",
    "quoted",
    "reason_of",
    "redact_query",
    "redact_url",
    "scrub",
    "scrubbed",
    "scrubbed_stack",
    "shown_store",
    "shown_text",
    "shown_url",
    "shown_variable",
    "stack_of",
    "text_of",
    "trust_for",
]
