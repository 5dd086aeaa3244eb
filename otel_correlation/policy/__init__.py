"""
What is decided by rule: what is left out of spans, whose ids are continued, and which hosts get ours.
"""

from __future__ import annotations

from otel_correlation.policy.outbound import ALL, Outbound, host_pattern, outbound_for
from otel_correlation.policy.recording import (
    REDACTED,
    HeaderCapture,
    Patterns,
    redact_query,
    redact_url,
)
from otel_correlation.policy.scrubbing import hide_quoted, scrub
from otel_correlation.policy.trust import FORWARDING, NONE, Trust, peers, trust_for

__all__ = [
    "ALL",
    "FORWARDING",
    "NONE",
    "REDACTED",
    "HeaderCapture",
    "Outbound",
    "Patterns",
    "Trust",
    "hide_quoted",
    "host_pattern",
    "outbound_for",
    "peers",
    "redact_query",
    "redact_url",
    "scrub",
    "trust_for",
]
