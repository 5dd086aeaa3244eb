"""
RQ over a real Redis: jobs continue the request that enqueued them, and work horses that end by ``os._exit`` lose nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.stack.test_queues import CONSUMER, ERROR, PLANTED, PRODUCER, Stack, by_name, request_id, stack

if TYPE_CHECKING:
    from tests.integration.otlp_sink import SinkLog

__all__ = ["stack"]

pytestmark = pytest.mark.needs("servers")
# Longer than any test: what arrives was flushed.
NEVER = {"OTEL_BSP_SCHEDULE_DELAY": "600000", "OTEL_BLRP_SCHEDULE_DELAY": "600000"}


def rq(stack: Stack, worker: str = "otel_correlation.tasks.rq.Worker") -> tuple[str, ...]:
    """
    Return the command of a worker.
    """
    return ("rq", "worker", "--url", stack.redis.url, "--worker-class", worker, "--disable-job-desc-logging")


@pytest.mark.parametrize("worker", ["Worker", "SimpleWorker"])
def test_a_job_has_the_identity_of_the_request_that_enqueued_it(stack: Stack, worker: str) -> None:
    """
    Jobs, coroutines too, and the jobs that they enqueue stay in the trace under the request id; so do RQ's own lines.
    """
    stack.start("rq_web", rq(stack, f"otel_correlation.tasks.rq.{worker}"))
    for path in ("run/tell", "run/awaited"):
        answer = stack.ask(path).json()
        assert answer["there"] == answer["here"]
        assert answer["here"]["request_id"] == request_id(path)
    assert isinstance(stack.ask("run/passed_on").json()["there"], str)
    for path, names in {
        "run/tell": ["enqueue rq_app.tell", "run rq_app.tell"],
        "run/passed_on": ["enqueue rq_app.passed_on", "run rq_app.passed_on", "enqueue rq_app.tell", "run rq_app.tell"],
    }.items():
        spans = stack.spans(path, "GET /run/{function}", *names)
        known = {span.span_id: span for span in spans}
        assert len({span.trace_id for span in spans}) == 1
        for span in spans:
            if span.name.startswith("run "):
                assert (span.kind, known[span.parent_span_id].kind) == (CONSUMER, PRODUCER)
                assert span.attributes["messaging.system"] == "rq"
                assert span.status_code != ERROR
    assert by_name(stack.spans("run/tell"), "run rq_app.tell").attributes["user"] == "ada"
    ids = {"request_id": request_id("run/tell"), "trace_id": stack.spans("run/tell")[0].trace_id}
    assert stack.line(stack.worker, "telling", **ids)["user"] == "ada"
    stack.line(stack.worker, "Job OK", **ids)
    assert {there["request_id"] for there in stack.ask("many").json()} == {request_id("many")}


def test_a_work_horse_loses_nothing(stack: Stack) -> None:
    """
    Each job's span and lines, RQ's last ones too, are with the collector although its process ends by ``os._exit``.
    """
    stack.start("rq_web", rq(stack), OTEL_LOGS_EXPORTER="otlp", **NEVER)
    for _ in range(5):
        stack.ask("run/tell")
    assert stack.ask("run/fail").json()["there"] == "failed"

    def runs() -> list[str]:
        return [span.name for span in list(stack.sink.spans) if span.kind == CONSUMER]

    def lines(text: str) -> list[SinkLog]:
        return [record for record in list(stack.sink.logs) if text in str(record.body)]

    # The job is finished for the service before its work horse has ended.
    assert stack.sink.wait(lambda: len(runs()) == 6), runs()
    assert stack.sink.wait(lambda: (len(lines("telling")), len(lines("Job OK"))) == (5, 5))
    assert stack.sink.wait(lambda: len(lines("exception raised")) == 1)
    assert PLANTED not in repr(stack.sink.logs)
    assert PLANTED not in repr(stack.sink.spans)


def test_a_failed_job_says_why_once(stack: Stack) -> None:
    """
    A job that raises has one exception, scrubbed, on the span of each try, and RQ's line about it has the ids.
    """
    stack.start("rq_web", rq(stack))
    assert stack.ask("run/fail?retries=1").json()["there"] == "failed"
    tries = [span for span in stack.spans("run/fail", "run rq_app.fail", "run rq_app.fail") if span.kind == CONSUMER]
    for failed in tries:
        assert (failed.status_code, failed.attributes["error.type"]) == (ERROR, "ValueError")
        assert [event.attributes["exception.message"] for event in failed.events] == [
            "duplicate key\nDETAIL:  REDACTED"
        ]
    line = stack.line(stack.worker, "exception raised", request_id=request_id("run/fail"), trace_id=tries[0].trace_id)
    assert PLANTED not in str(line)


def test_a_work_horse_that_is_killed_has_a_line_with_its_ids(stack: Stack) -> None:
    """
    Of a job whose process is lost, what the worker's main process says has the ids; the next job is not inside of it.
    """
    stack.start("rq_web", rq(stack))
    answer = stack.ask("run/killed").json()
    assert answer["there"] == "failed"
    stack.line(stack.worker, "Work-horse terminated unexpectedly", **answer["here"])
    after = stack.ask("run/tell").json()
    assert after["there"] == after["here"]
    assert after["here"]["request_id"] == request_id("run/tell")


def test_where_only_one_side_knows_of_ids(stack: Stack) -> None:
    """
    A job without headers, and one with what nobody can use, starts fresh; RQ's own worker runs ours as before.
    """
    stack.start("rq_web", rq(stack))
    for path in ("run/tell?without=1", "forged/traceparent", "forged/request_id", "forged/no_mapping"):
        there = stack.ask(path).json()["there"]
        assert there["request_id"] == there["trace_id"]
    stack.stop_worker()
    warnings = [line["message"] for line in stack.lines(stack.worker) if line["level"] == "WARNING"]
    assert not [text for text in warnings if "without trace headers" in text]
    # Each job has a process of its own, which says it once.
    assert len([text for text in warnings if "could not be used" in text]) == 3


def test_rqs_own_worker_runs_our_jobs(stack: Stack) -> None:
    """
    A worker that knows nothing of identities does its work as before.
    """
    stack.start("rq_web", rq(stack, "rq.Worker"))
    answer = stack.ask("run/tell").json()
    assert answer["there"] == {"trace_id": None, "request_id": None}
