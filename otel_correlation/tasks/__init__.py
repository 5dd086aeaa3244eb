"""
Code that outlives its request or never had one: work of the service's own, messages, threads and processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from otel_correlation.tasks import carriers, garbage, processes, threads, timers
from otel_correlation.tasks.carriers import continue_from, inject, work
from otel_correlation.tasks.processes import carried

if TYPE_CHECKING:
    from collections.abc import Callable

    from otel_correlation.settings import Settings

__all__ = ["activate", "carried", "continue_from", "deactivate", "inject", "work"]


def activate(settings: Callable[[], Settings], start: Callable[[Settings], None] | None = None) -> None:
    """
    Switch everything here on.

    Args:
        settings: Where settings are found.
        start: Sets up another process as this one was; a function that pickle finds by its name.
    """
    carriers.switch(settings)
    processes.switch(settings, start)
    garbage.activate()
    if settings().patch_threads:
        threads.activate()
        timers.activate()
    else:
        threads.deactivate()
        timers.deactivate()


def deactivate() -> None:
    """
    Switch everything off, and leave threads and event loops as they were found.
    """
    carriers.switch(None)
    processes.switch(None)
    garbage.deactivate()
    threads.deactivate()
    timers.deactivate()
