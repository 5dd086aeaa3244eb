"""
Outbound requests of httpx and httpx2: one CLIENT span for each physical attempt, and the headers that name it.
"""

from __future__ import annotations

from otel_correlation.clients._attempt import end_dropped
from otel_correlation.clients._contrib import activate, deactivate, instrument, instrument_everything, refresh

__all__ = ["activate", "deactivate", "end_dropped", "instrument", "instrument_everything", "refresh"]
