"""
A signal handler that logs, traces, binds and flushes, a thousand times a second for ten seconds, with queues that are full.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.integration.test_signal_handlers import interrupted_for

if TYPE_CHECKING:
    from pathlib import Path


def test_ten_seconds_of_interrupts(tmp_path: Path) -> None:
    """
    The process does not hang, and each span is exported or counted.
    """
    interrupted_for(10.0, tmp_path)
