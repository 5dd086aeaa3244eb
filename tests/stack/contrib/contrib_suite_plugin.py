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
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

WORST_FIRST = ("error", "failed", "skipped", "passed")
outcomes: dict[str, str] = {}
convention = ""  # What the running test's name asks for: new names, old and new, or contrib's default, the old ones.


def pytest_configure(config: pytest.Config) -> None:
    """
    Activate ours, set up as a user does who depends on contrib's old defaults, and read in contrib's spelling.

    Most of the suites' tests count contrib's internal spans, look for the attribute names of before the stable conventions,
    for header names with ``_``, or for contrib's scope. The first two are one setting away with us, and the others are only
    spelling: with ``exclude_spans=[]``, the old names that ``OTEL_SEMCONV_STABILITY_OPT_IN=http/dup`` adds while exporting,
    and keys and scopes translated, the suites test everything else, too.
    """
    if os.environ["CONTRIB_SUITE_RUNS"] != "ours":
        return
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from opentelemetry.test.test_base import TestBase  # type: ignore[import-not-found]  # only the suites have it

    from otel_correlation.bootstrap import activate

    activate()
    instrument_app, instrument = FastAPIInstrumentor.instrument_app, FastAPIInstrumentor.instrument
    export, get_sorted_metrics = InMemorySpanExporter.export, TestBase.get_sorted_metrics
    fastapi: Any = FastAPIInstrumentor
    fastapi.instrument_app = staticmethod(
        lambda app, **options: instrument_app(app, **{"exclude_spans": [], **options})
    )
    fastapi.instrument = lambda self, **options: instrument(self, **{"exclude_spans": [], **options})
    exporter: Any = InMemorySpanExporter
    exporter.export = lambda self, spans: export(self, [spelled_as_contrib(span) for span in spans])
    theirs = {scope.name: name for name, scope in scopes().items()}
    base: Any = TestBase
    base.get_sorted_metrics = lambda self, scope=None: get_sorted_metrics(self, theirs.get(scope, scope))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """
    Note the naming convention as the suites do, by the test's name; their environment has it only while they instrument.
    """
    global convention  # noqa: PLW0603 - hooks are functions
    convention = "http" if "new_semconv" in item.name else "http/dup" if "both_semconv" in item.name else ""


def scopes() -> dict[str, InstrumentationScope]:
    """
    Return contrib's scope for each of ours, with the schema that contrib names in the mode of this test.
    """
    from opentelemetry.instrumentation import fastapi, httpx
    from opentelemetry.instrumentation._semconv import _get_schema_url, _StabilityMode
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    schema = _get_schema_url(_StabilityMode(convention) if convention else _StabilityMode.DEFAULT)
    return {
        "otel_correlation.server": InstrumentationScope(fastapi.__name__, fastapi.version.__version__, schema),
        "otel_correlation.client": InstrumentationScope(httpx.__name__, httpx.version.__version__, schema),
    }


def spelled_as_contrib(span: ReadableSpan) -> ReadableSpan:
    """
    Return the span under contrib's scope, with contrib's header keys and, unless the test wants new names only, the old ones.
    """
    from opentelemetry.sdk.trace import ReadableSpan

    from otel_correlation.export import with_old_names

    if convention != "http":
        span = with_old_names(span)
    scope = span.instrumentation_scope
    return ReadableSpan(
        name=span.name,
        context=span.get_span_context(),
        parent=span.parent,
        resource=span.resource,
        attributes={
            key.replace("-", "_") if ".header." in key else key: value for key, value in (span.attributes or {}).items()
        },
        events=span.events,
        links=span.links,
        kind=span.kind,
        status=span.status,
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=scopes().get(scope.name, scope) if scope else None,
    )


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
