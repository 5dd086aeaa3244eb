"""
The server edge: every request starts clean, gets its identity and its one SERVER span here.
"""

from __future__ import annotations

from otel_correlation.edge._asgi import Edge, edge, serve
from otel_correlation.edge._fastapi import activate, deactivate
from otel_correlation.edge._record import ServerConfig

__all__ = ["Edge", "ServerConfig", "activate", "deactivate", "edge", "serve"]
