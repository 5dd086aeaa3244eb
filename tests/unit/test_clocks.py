"""
Clocks of durations and deadlines: bound where nobody replaces them, and used by everything that runs in a service.
"""

from __future__ import annotations

import importlib
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import freezegun
import pytest
import time_machine

import otel_correlation
from otel_correlation import clocks

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = ("monotonic", "perf_counter", "perf_counter_ns")
# The commands and the viewer are processes of their own, with nobody else's code in them.
OWN_PROCESSES = ("cli", "local", "stores")


def moves(name: str) -> bool:
    """
    Tell whether a clock of ours goes on; waits for its next tick.
    """
    clock = getattr(clocks, name)
    begun = clock()
    return any(clock() > begun for _ in range(100_000_000))


@pytest.mark.parametrize("name", NAMES)
def test_clocks_move_whatever_holds_the_time(name: str) -> None:
    """
    Under freezegun, time-machine and mocks of ``time`` the clocks of durations go on.
    """
    with freezegun.freeze_time("2020-01-01"):
        assert moves(name)
    with time_machine.travel(0, tick=False):
        assert moves(name)
    with mock.patch.object(time, name, return_value=1):
        assert moves(name)


@pytest.fixture
def reloaded() -> Iterator[None]:
    yield
    importlib.reload(clocks)


@pytest.mark.usefixtures("reloaded")
@pytest.mark.parametrize("name", NAMES)
def test_clocks_that_were_bound_while_the_time_was_held_move(name: str) -> None:
    """
    The package may be imported for the first time where a clock is held already; afterwards the clock is the same one.
    """
    with freezegun.freeze_time("2020-01-01"):
        importlib.reload(clocks)
        assert moves(name)
    assert moves(name)
    unit = 10**9 if name.endswith("_ns") else 1
    assert abs(getattr(clocks, name)() - getattr(time, name)()) < 60 * unit


def test_everything_in_a_service_uses_them() -> None:
    """
    No module that runs in a service reads a clock of durations, or sleeps, by the functions that user code replaces.
    """
    root = Path(otel_correlation.__file__).parent
    replaced = re.compile(r"\btime\.(monotonic|perf_counter|sleep)|from time import .*(monotonic|perf_counter|sleep)")
    found = [
        f"{path.relative_to(root)}: {line.strip()}"
        for path in sorted(root.rglob("*.py"))
        if path.relative_to(root).parts[0] not in OWN_PROCESSES and path.name != "clocks.py"
        for line in path.read_text().splitlines()
        if replaced.search(line)
    ]
    assert found == []
