"""
The soak in small, on both HTTP implementations and loops; ``make soak`` is the whole of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.integration import soak, soak_hostile
from tests.integration.soak_app import LINES_PER_REQUEST

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("http", "loop"), [("h11", "asyncio"), ("httptools", "uvloop")])
def test_no_line_and_no_span_carries_another_requests_ids(tmp_path: Path, http: str, loop: str) -> None:
    """
    Pipelined requests on many connections to two processes: every record and span is there, with its own ids.
    """
    report = soak.run(tmp_path, records=12_000, connections=120, workers=2, http=http, loop=loop)
    assert report.clean, str(report)
    assert sum(report.peaks) > 10, str(report)


def test_a_crossed_id_would_be_seen() -> None:
    """
    A line that names one request and carries another's ids is foreign; one without ids and one that is missing count, too.
    """
    one, other = soak.plan(0), soak.plan(1)
    report = soak.Report()
    line = '{{"logger": "soak", "message": "soak {0} endpoint"{1}}}'
    ids = f', "request_id": "{other.request_id}", "trace_id": "{other.trace_id}"'
    soak.check_lines([line.format(one.token, ids), line.format(one.token, "")], {one.token: one}, report)
    assert (len(report.foreign), len(report.without_ids)) == (1, 1)
    assert report.missing_records == LINES_PER_REQUEST - 2 + 1
    assert not report.clean


@pytest.mark.parametrize(
    ("load", "count", "http"),
    [("heads", 1_500, "httptools"), ("unique", 1_500, "h11"), ("aborted", 500, "h11"), ("aborted", 500, "httptools")],
)
def test_hostile_callers_change_nothing(tmp_path: Path, load: str, count: int, http: str) -> None:
    """
    Any request head, everything unique, and clients that leave: answers, lines, memory, descriptors and tasks are as usual.
    """
    report = soak_hostile.run(tmp_path, load, count=count, http=http)
    assert report.faults == [], str(report)
    assert report.requests == count


def test_a_leak_and_a_wrong_answer_would_be_seen() -> None:
    """
    Memory that still grows when the tables are full is a fault; before that, and where it is flat, it is none.
    """
    report = soak_hostile.Report("heads", "h11", requests=1_000_000, rss_mb=[80.0, 120.0, 125.0, 200.0])
    assert soak_hostile._growth(report)
    assert not soak_hostile._growth(
        soak_hostile.Report("heads", "h11", requests=1_000_000, rss_mb=[80.0, 120.0, 125.0])
    )
    assert not soak_hostile._growth(soak_hostile.Report("unique", "h11", requests=2_000, rss_mb=[80.0, 120.0, 130.0]))
