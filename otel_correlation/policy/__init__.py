"""
What is decided by rule: what is left out of spans, whose ids are continued, and which hosts get ours.
"""

from __future__ import annotations

from otel_correlation.policy.recording import (
    REDACTED,
    HeaderCapture,
    Patterns,
    redact_query,
    redact_url,
    scrub,
)

__all__ = ["REDACTED", "HeaderCapture", "Patterns", "redact_query", "redact_url", "scrub"]
