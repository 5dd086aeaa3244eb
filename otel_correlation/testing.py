"""
A pytest plugin: the ``telemetry`` fixture has the spans and log records of one test.

Nothing global is reset: the first test that asks for it sets the process up (exporting nothing), each test sees its
own.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest

import otel_correlation
from otel_correlation import upstream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.sdk.trace import ReadableSpan


class Telemetry(logging.Handler):
    """
    What one test caused.

    Attributes:
        spans: Ended spans that were sampled, in the order of their end.
        records: Log records that reached the root logger, with ``trace_id``, ``span_id`` and ``request_id``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[ReadableSpan] = []
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """
        Keep a record.
        """
        self.records.append(record)

    def span(self, name: str) -> ReadableSpan:
        """
        Return the one span of this name.

        Raises:
            AssertionError: There is none, or more than one.
        """
        __tracebackhide__ = True  # the report points at the test's line
        found = [span for span in self.spans if span.name == name]
        if len(found) != 1:
            message = f"{len(found)} spans are called {name!r}; there are {[span.name for span in self.spans]}"
            raise AssertionError(message)
        return found[0]


class _Taps:
    """
    Hands ended spans to the test that runs.
    """

    accepts_light_spans = True

    def __init__(self) -> None:
        self.telemetry: Telemetry | None = None
        self.provider: Any = None

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        """
        Do nothing: the pipeline stamps the request id.
        """

    def _on_ending(self, span: Any) -> None:
        """
        Do nothing.
        """

    def on_end(self, span: ReadableSpan) -> None:
        """
        Keep a sampled span.
        """
        context = span.get_span_context()
        if self.telemetry is not None and context is not None and context.trace_flags.sampled:
            self.telemetry.spans.append(span)

    def shutdown(self) -> None:
        """
        Do nothing.
        """

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """
        Nothing waits here.
        """
        del timeout_millis
        return True


_taps = _Taps()


def _set_up(home: Any) -> None:
    from opentelemetry import trace  # noqa: PLC0415 - a test run that never asks for it pays nothing

    if not home.started():
        home.bootstrap(traces_exporters=(), logs_exporters=(), metrics_exporters=())
    provider: Any = trace.get_tracer_provider()
    if _taps.provider is not provider:
        provider.add_span_processor(_taps)
        _taps.provider = provider


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    """
    The spans and log records of this test; the process is set up as in production, and exports nothing.
    """
    home = upstream.import_ours("otel_correlation.bootstrap")
    if home is None:
        otel_correlation.bootstrap()  # says why there will be no spans
    else:
        _set_up(home)
    found = Telemetry()
    _taps.telemetry = found
    root = logging.getLogger()
    root.addHandler(found)
    try:
        yield found
    finally:
        root.removeHandler(found)
        _taps.telemetry = None
