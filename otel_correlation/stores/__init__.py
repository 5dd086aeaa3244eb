"""
What ``find`` asks: the stores that hold traces and log lines, and the shape in which they answer.
"""

from __future__ import annotations

from otel_correlation.stores.client import Store, StoreError
from otel_correlation.stores.model import Event, Json, LogLine, Span, Trace
from otel_correlation.stores.search import configured, find
from otel_correlation.stores.story import Cause, as_json, cause, entry, waterfall

__all__ = [
    "Cause",
    "Event",
    "Json",
    "LogLine",
    "Span",
    "Store",
    "StoreError",
    "Trace",
    "as_json",
    "cause",
    "configured",
    "entry",
    "find",
    "waterfall",
]
