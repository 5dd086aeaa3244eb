"""
The soak in small, on both HTTP implementations and loops; ``make soak`` is the whole of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.integration import soak
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
