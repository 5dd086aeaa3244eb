"""
RQ: what a job carries, and what a worker makes of it; with classes in place of RQ's (the real ones: tests/stack).
"""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.trace import SpanKind, StatusCode

from otel_correlation import guard, request_id, work
from otel_correlation.tasks import carriers
from tests.contract.wire import wired

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.contract.wire import Wire

RID = "order-7781-customer-quote"


class TheirQueue:
    """
    RQ's, as far as it matters.
    """

    name = "mail"

    def create_job(self, function: str, meta: dict[str, Any] | None = None) -> Any:
        return SimpleNamespace(id="7", func_name=function, meta=meta or {})


class TheirWorker:
    """
    The same; its job is what the test puts into ``call``.
    """

    is_horse = False
    served = 0

    def __init__(self, call: Any = None) -> None:
        self.call = call
        self.seen: list[Any] = []

    def bootstrap(self) -> None:
        self.served += 1

    def execute_job(self, job: Any, queue: Any) -> None:
        self.seen.append(request_id())
        self.perform_job(job, queue, "execution")

    def perform_job(self, job: Any, queue: Any, execution: Any) -> bool:
        try:
            self.seen.append(self.call())
        except BaseException:
            self.handle_exception(job, *sys.exc_info())
            return False
        return True

    def handle_exception(self, job: Any, *exc_info: Any) -> None:
        self.seen.append(exc_info[0])


@pytest.fixture
def rq(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """
    The module, made with their classes.
    """
    theirs = ModuleType("rq")
    vars(theirs).update(Queue=TheirQueue, Worker=TheirWorker, SimpleWorker=TheirWorker)
    monkeypatch.setitem(sys.modules, "rq", theirs)
    monkeypatch.delitem(sys.modules, "otel_correlation.tasks.rq", raising=False)
    yield importlib.import_module("otel_correlation.tasks.rq")
    sys.modules.pop("otel_correlation.tasks.rq", None)
    for name in ("rq.worker", "rq.job"):
        logging.getLogger(name).filters.clear()


@pytest.fixture(params=["light", "plain"])
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    """
    A process that is set up.
    """
    with wired(request.param, instrument=False) as found:
        carriers.switch(lambda: found.settings)
        yield found
        carriers.switch(None)


def test_a_job_carries_the_identity_beside_the_callers_meta(rq: Any, wire: Wire) -> None:
    """
    The header is in the job's meta, from a PRODUCER span; the caller's own dict is as it was.
    """
    mine = {"tenant": "acme"}
    with work("a request", request_id=RID):
        job = rq.Queue().create_job("mailer.send", meta=mine)
    assert mine == {"tenant": "acme"}
    assert job.meta["tenant"] == "acme"
    assert job.meta["otel_correlation"]["X-Request-ID"] == RID
    producer = next(span for span in wire.spans if span.kind is SpanKind.PRODUCER)
    assert producer.name == "enqueue mailer.send"
    assert producer.context is not None
    assert job.meta["otel_correlation"]["traceparent"].split("-")[2] == f"{producer.context.span_id:016x}"


def test_a_job_runs_inside_and_so_do_the_workers_own_lines(rq: Any, wire: Wire) -> None:
    """
    The worker's process and the job's see the request, the span is the producer's child, and afterwards nothing is left.
    """
    with work("a request", request_id=RID):
        job = rq.Queue().create_job("mailer.send")
    worker = rq.Worker(request_id)
    worker.execute_job(job, TheirQueue())
    assert worker.seen == [RID, RID]
    assert request_id() is None
    spans: dict[str, Any] = {span.name: span for span in wire.spans}
    assert spans["run mailer.send"].kind is SpanKind.CONSUMER
    assert spans["run mailer.send"].parent.span_id == spans["enqueue mailer.send"].context.span_id


def test_a_failed_job_says_why(rq: Any, wire: Wire) -> None:
    """
    What RQ caught is on the span, once; the next job of the same worker is not failed by it.
    """

    def fail() -> None:
        raise LookupError("no")

    worker = rq.SimpleWorker(fail)
    job = SimpleNamespace(id="7", func_name="mailer.send", meta={})
    assert worker.perform_job(job, TheirQueue(), None) is False
    worker.call = request_id
    assert worker.perform_job(job, TheirQueue(), None) is True
    failed, fine = wire.spans
    assert (failed.status.status_code, len(failed.events)) == (StatusCode.ERROR, 1)
    assert (fine.status.status_code, len(fine.events)) == (StatusCode.UNSET, 0)
    assert guard.counters() == {}


def test_a_work_horse_flushes_and_a_worker_does_not(rq: Any, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Only the process that ends after its job sends what it has then.
    """
    flushed: list[int] = []
    monkeypatch.setattr(rq.exits, "flush_now", lambda: flushed.append(len(wire.spans)))
    worker = rq.Worker(request_id)
    job = SimpleNamespace(id="7", func_name="mailer.send", meta={})
    worker.perform_job(job, TheirQueue(), None)
    assert flushed == []
    worker.is_horse = True
    worker.perform_job(job, TheirQueue(), None)
    assert flushed == [2]


def test_a_start_of_a_worker_is_told(rq: Any, wire: Wire) -> None:
    """
    The start-up line is said where a worker starts, and RQ's own start goes on.
    """
    said: list[str] = []
    carriers.serving(lambda: said.append("ours"))
    try:
        worker = rq.Worker()
        worker.bootstrap()
    finally:
        carriers.serving(lambda: None)
    assert (said, worker.served) == (["ours"], 1)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=40) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=8,
)


@given(anything | st.fixed_dictionaries({}, optional={"traceparent": anything, "X-Request-ID": anything}))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_job_runs_whatever_it_claims_to_carry(rq: Any, wire: Wire, carrier: Any) -> None:
    """
    Nothing that somebody else wrote keeps a job from running, or leaves it without ids.
    """
    logging.getLogger("otel_correlation").setLevel(logging.CRITICAL)
    worker = rq.Worker(request_id)
    worker.execute_job(SimpleNamespace(id="7", func_name="f", meta={"otel_correlation": carrier}), TheirQueue())
    assert worker.seen[-1]
    worker.execute_job(SimpleNamespace(id="7", func_name="f", meta=carrier), TheirQueue())
    assert worker.seen[-1]


def test_a_job_whose_function_nobody_can_read(rq: Any, wire: Wire) -> None:
    """
    Bytes that the serializer refuses are RQ's own matter; the span is there without the name.
    """

    class Unreadable(SimpleNamespace):
        @property
        def func_name(self) -> str:
            raise ValueError("not a pickle")

    assert rq.Worker(request_id).perform_job(Unreadable(id="7", meta={}), TheirQueue(), None) is True
    assert [span.name for span in wire.spans] == ["run unknown"]


def test_without_a_set_up_nothing_is_added(rq: Any) -> None:
    """
    In a process that nobody set up, a job is what RQ made of it, and runs.
    """
    job = rq.Queue().create_job("mailer.send")
    assert job.meta == {}
    worker = rq.Worker(request_id)
    worker.execute_job(job, TheirQueue())
    assert worker.seen == [None, None]
