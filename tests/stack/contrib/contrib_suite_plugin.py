"""
A pytest plugin for contrib's suites: writes every outcome to a file and, when asked, puts our hot path under the suite.

It runs in the suite's own process (``-p contrib_suite_plugin``), whose ``tests`` package is contrib's, so it imports nothing
from this project's tests.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

WORST_FIRST = ("error", "failed", "skipped", "passed")
outcomes: dict[str, str] = {}


def pytest_configure(config: pytest.Config) -> None:
    """
    Activate ours, with the one setting that a user of contrib's internal spans has to write with us.
    """
    if os.environ["CONTRIB_SUITE_RUNS"] != "ours":
        return
    from otel_correlation.bootstrap import activate

    activate()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """
    Keep the worst outcome that any phase or subtest of a test had.
    """
    outcome = "error" if report.failed and report.when != "call" else report.outcome
    name = report.nodeid.partition("/")[2]
    if report.when == "call" or outcome != "passed":
        outcomes[name] = min(outcome, outcomes.get(name, "passed"), key=WORST_FIRST.index)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """
    Hand the outcomes to the test that started this run.
    """
    Path(os.environ["CONTRIB_SUITE_OUTCOMES"]).write_text(json.dumps(outcomes, indent=1, sort_keys=True))
