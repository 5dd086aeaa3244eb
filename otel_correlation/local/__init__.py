"""
The embedded collector and viewer: OTLP over HTTP in, a bounded SQLite store, a query API and one page.
"""

from __future__ import annotations

from otel_correlation.local.server import LocalServer
from otel_correlation.local.store import LocalStore

__all__ = ["LocalServer", "LocalStore"]
