"""
The entry points of installed packages, as OpenTelemetry reads them: one scan for all of a process's questions.
"""

from __future__ import annotations

try:
    from opentelemetry.util._importlib_metadata import entry_points
except ImportError:
    from importlib.metadata import entry_points  # type: ignore[assignment]

__all__ = ["entry_points"]
