"""
A carrier that is read inside of a request: the trace is the carrier's, the request id stays what is current.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from otel_correlation import request_id, tasks, work
from otel_correlation.export.batching import SpanPipeline
from otel_correlation.identity import log_ids
from tests.contract.wire import CALLER, TRACE, wired

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.contract.wire import Wire

PARENT = f"00-{TRACE}-{CALLER}-01"
RID = "the-request-that-runs-now"


@pytest.fixture(params=["light", "plain"])
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    """
    A process that is set up, with light spans and with the SDK's.
    """
    with wired(request.param, instrument=False) as found:
        pipeline = SpanPipeline([InMemorySpanExporter()])
        found.provider.add_span_processor(pipeline)
        tasks.activate(lambda: found.settings)
        yield found
        tasks.deactivate()
        pipeline.shutdown()


def by_global(carrier: dict[str, Any]) -> Context:
    """
    As MCP servers read ``_meta``.
    """
    return propagate.extract(carrier)


def by_stock(carrier: dict[str, Any]) -> Context:
    """
    As the documentation of OpenTelemetry shows it.
    """
    return TraceContextTextMapPropagator().extract(carrier)


def into_nothing(carrier: dict[str, Any]) -> Context:
    """
    As consumers of queues do that are careful about what is current.
    """
    return propagate.extract(carrier, Context())


@pytest.mark.parametrize("extract", [by_global, by_stock, into_nothing])
def test_a_span_in_an_extracted_context_has_the_request_id(
    wire: Wire, extract: Callable[[dict[str, Any]], Context]
) -> None:
    """
    A span that is started in the context of a carrier belongs to the carrier's trace and to the request that runs.
    """
    with work("request", request_id=RID):
        context = extract({"traceparent": PARENT})
        with trace.get_tracer("mcp").start_as_current_span("tools/call", context=context) as span:
            assert request_id() == RID
            with trace.get_tracer("mcp").start_as_current_span("inner"):
                pass
        assert f"{span.get_span_context().trace_id:032x}" == TRACE
    found = {span.name: span for span in wire.spans}
    assert {name: (span.attributes or {})["request_id"] for name, span in found.items()} == {
        "tools/call": RID,
        "inner": RID,
        "request": RID,
    }


def test_an_extracted_context_that_is_attached(wire: Wire) -> None:
    """
    Lines and calls inside of an attached carrier have its trace and the request id that was current.
    """
    del wire
    with work("request", request_id=RID):
        token = otel_context.attach(propagate.extract({"traceparent": PARENT}))
        try:
            assert (request_id(), f"{trace.get_current_span().get_span_context().trace_id:032x}") == (RID, TRACE)
            carrier: dict[str, str] = {}
            propagate.inject(carrier)
            assert carrier == {"traceparent": PARENT, "X-Request-ID": RID}
            assert log_ids() == (TRACE, CALLER, "01", RID)
        finally:
            otel_context.detach(token)


def test_a_carrier_with_a_request_id_of_its_own(wire: Wire) -> None:
    """
    A carrier that has a valid request id names other work: spans in its context have that one.
    """
    with work("request", request_id=RID):
        context = propagate.extract({"traceparent": PARENT, "x-request-id": "the-message-itself-1"})
        trace.get_tracer("queue").start_span("handle", context).end()
        wrong = propagate.extract({"traceparent": PARENT, "x-request-id": "two words"})
        trace.get_tracer("queue").start_span("wrong", wrong).end()
    found = {span.name: (span.attributes or {})["request_id"] for span in wire.spans}
    assert found == {"handle": "the-message-itself-1", "wrong": RID, "request": RID}


def test_outside_of_a_request_nothing_is_added(wire: Wire) -> None:
    """
    Where no request runs a carrier without a request id gives none, and a context that was given is kept.
    """
    trace.get_tracer("queue").start_span("handle", propagate.extract({"traceparent": PARENT})).end()
    (span,) = wire.spans
    assert "request_id" not in (span.attributes or {})
    key = otel_context.create_key("own")
    given = otel_context.set_value(key, 1, Context())
    assert propagate.extract({}, given) == given
    assert propagate.extract({}) == {}


def test_a_carrier_that_names_nothing_gives_an_empty_context(wire: Wire) -> None:
    """
    Instrumentations attach what they extract ``or None``: a task that runs in place stays below the span of its caller.
    """
    with work("request", request_id=RID):
        here = log_ids()
        context = propagate.extract({}) or None
        assert context is None
        with trace.get_tracer("celery").start_as_current_span("run/tell", context=context) as span:
            assert request_id() == RID
            assert f"{span.get_span_context().trace_id:032x}" == here[0]
