"""
From an ended span to the collector: batching, encoding, sending, and leaving without losing anything.
"""

from __future__ import annotations

from otel_correlation.export.batching import EXIT_BUDGET_S, LogPipeline, SpanPipeline, in_export, leave
from otel_correlation.export.exporters import arguments_of_metrics, log_exporters, log_pipeline, span_exporters
from otel_correlation.export.metrics import observe
from otel_correlation.export.old_names import with_old_names
from otel_correlation.export.readers import Readers

__all__ = [
    "EXIT_BUDGET_S",
    "LogPipeline",
    "Readers",
    "SpanPipeline",
    "arguments_of_metrics",
    "in_export",
    "leave",
    "log_exporters",
    "log_pipeline",
    "observe",
    "span_exporters",
    "with_old_names",
]
