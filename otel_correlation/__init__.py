"""
One identity per request: an OpenTelemetry tracing distribution for FastAPI and httpx.
"""

from __future__ import annotations
