"""
A pytest plugin for contrib's suites: writes every outcome to a file and, when asked, puts our hot path under the suite.

It runs in the suite's own process (``-p contrib_suite_plugin``), whose ``tests`` package is contrib's, so it imports nothing
from this project's tests.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

WORST_FIRST = ("error", "failed", "skipped", "passed")
outcomes: dict[str, str] = {}


def pytest_configure(config: pytest.Config) -> None:
    """
    Activate ours, set up as a user does who depends on two of contrib's old defaults.

    Most of the suite's tests count contrib's internal spans or look for the attribute names of before the stable
    conventions. Both are off by default with us, and one setting away: ``exclude_spans=[]``, and
    ``OTEL_SEMCONV_STABILITY_OPT_IN=http/dup``, which adds the old names while exporting. With both set, the suite tests
    everything else.
    """
    if os.environ["CONTRIB_SUITE_RUNS"] != "ours":
        return
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from otel_correlation.bootstrap import activate
    from otel_correlation.export import with_old_names

    activate()
    instrument_app, instrument = FastAPIInstrumentor.instrument_app, FastAPIInstrumentor.instrument

    def app_with_internal_spans(app: Any, **options: Any) -> None:
        instrument_app(app, **{"exclude_spans": [], **options})

    def with_internal_spans(self: FastAPIInstrumentor, **options: Any) -> None:
        instrument(self, **{"exclude_spans": [], **options})

    patch: Any = FastAPIInstrumentor
    patch.instrument_app, patch.instrument = staticmethod(app_with_internal_spans), with_internal_spans
    export = InMemorySpanExporter.export

    def export_translated(self: InMemorySpanExporter, spans: Any) -> Any:
        only_new = (
            os.environ.get("OTEL_SEMCONV_STABILITY_OPT_IN") == "http"
        )  # This test looks for the stable names only.
        return export(self, spans if only_new else [with_old_names(span) for span in spans])

    exporter: Any = InMemorySpanExporter
    exporter.export = export_translated


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
