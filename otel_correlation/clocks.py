"""
The clocks of durations and deadlines, which nobody can stop.

User code holds clocks in its tests: freezegun replaces the functions of ``time`` in every module that has them as
attributes, others mock ``time.monotonic``. A deadline on such a clock never comes. What is bound here is called inside
of an object, where none of them looks. The time of day (``time.time_ns``, of spans and log records) is the one that the
application sees, held or not: its log lines have it, too.
"""

from __future__ import annotations

import time
from functools import partial
from types import BuiltinFunctionType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable


def _bound(name: str, fallback: str) -> Callable[[], Any]:
    found = getattr(time, name)
    if not isinstance(found, BuiltinFunctionType) and hasattr(time, "CLOCK_MONOTONIC"):
        # Imported while a clock is held: this one is left alone, and costs a little more.
        return partial(getattr(time, fallback), time.CLOCK_MONOTONIC)
    return partial(found)


# As those of ``time``.
monotonic: Final[Callable[[], float]] = _bound("monotonic", "clock_gettime")
perf_counter: Final[Callable[[], float]] = _bound("perf_counter", "clock_gettime")
perf_counter_ns: Final[Callable[[], int]] = _bound("perf_counter_ns", "clock_gettime_ns")
