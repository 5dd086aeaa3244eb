"""
Code that outlives its request or never had one: work of the service's own, messages, threads and processes.
"""

from __future__ import annotations

from otel_correlation.tasks.carriers import continue_from, inject, switch, work

__all__ = ["continue_from", "inject", "switch", "work"]
