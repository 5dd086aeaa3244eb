"""
The queue between the application and its exporters.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import context as otel_context
from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, Context
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from otel_correlation import export, guard, identity, policy
from otel_correlation.export.batching import Batcher

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PATIENCE_S = 20.0
_started: list[export.SpanPipeline] = []


@pytest.fixture(autouse=True)
def no_thread_outlives_its_test() -> Iterator[None]:
    """
    Every pipeline is shut down, so that nothing is counted during another test.
    """
    yield
    while _started:
        _started.pop().shutdown()


class Gate(SpanExporter):
    """
    Holds every batch until it is opened.
    """

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()
        self.batches: list[list[str]] = []
        self.at_once = 0
        self.most_at_once = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.entered.set()
        assert self.opened.wait(PATIENCE_S)
        self.batches.append([span.name for span in spans])
        self.at_once -= 1
        return SpanExportResult.SUCCESS


def traced(pipeline: export.SpanPipeline, **options: Any) -> Any:
    provider = TracerProvider(shutdown_on_exit=False, **options)
    provider.add_span_processor(pipeline)
    _started.append(pipeline)
    return provider.get_tracer("test")


def test_a_full_queue_drops_and_counts_the_newest() -> None:
    """
    While an exporter is stuck, the queue keeps the oldest spans up to its bound, and says how many it dropped.
    """
    gate = Gate()
    pipeline = export.SpanPipeline([gate], schedule_delay_ms=1, max_queue_size=5, max_batch_size=5)
    tracer = traced(pipeline)
    tracer.start_span("stuck").end()
    assert gate.entered.wait(PATIENCE_S)
    for number in range(8):
        tracer.start_span(f"{number}").end()
    gate.opened.set()
    assert pipeline.force_flush()
    assert gate.batches == [["stuck"], ["0", "1", "2", "3", "4"]]
    assert guard.counters() == {"spans.exported": 6, "spans.dropped.queue_full": 3}


def test_a_queue_is_bounded_in_bytes(caplog: pytest.LogCaptureFixture) -> None:
    """
    While an exporter is stuck, spans beyond the queue's bytes are dropped, counted by a reason of their own, and said once.
    """
    gate = Gate()
    pipeline = export.SpanPipeline([gate], schedule_delay_ms=1, queue_bytes=1_000_000)
    tracer = traced(pipeline)
    tracer.start_span("stuck").end()
    assert gate.entered.wait(PATIENCE_S)
    for number in range(8):
        tracer.start_span(f"{number}", attributes={"text": "x" * 300_000}).end()
    tracer.start_span("small").end()
    batcher = pipeline.batchers[0]
    assert 900_000 < batcher.held_bytes() < 1_000_000
    gate.opened.set()
    assert pipeline.force_flush()
    assert sorted(name for batch in gate.batches for name in batch) == ["0", "1", "2", "small", "stuck"]
    assert guard.counters() == {"spans.exported": 5, "spans.dropped.queue_bytes": 5}
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("The queue of 1000000 bytes of spans is full; the newest are dropped until it drains. ")
    assert batcher.held_bytes() == 0


def test_a_request_holds_no_more_bytes_than_a_collector_takes() -> None:
    """
    Large items go out in several requests, in their order, each below the bound; one that is larger goes alone.
    """
    batches: list[list[int]] = []
    batcher: Batcher[int] = Batcher(
        "spans",
        batches.append,
        delay_ms=3_600_000,
        max_queue_size=1000,
        max_batch_size=100,
        size_of=lambda item: item,
    )
    sizes = [3_000_000, 1_000_000, 500_000, 5_000_000, 10, 10]
    for size in sizes:
        batcher.put(size)
    assert batcher.flush(PATIENCE_S)
    assert [size for batch in batches for size in batch] == sizes
    assert all(sum(batch) <= policy.BATCH_BYTES or len(batch) == 1 for batch in batches)
    batcher.shutdown()


def test_a_queue_that_holds_a_request_in_bytes_leaves_before_the_delay() -> None:
    """
    Bytes wake the exporting thread as a full batch does, so that large items are not dropped while nobody is away.
    """
    left = threading.Event()
    batcher: Batcher[int] = Batcher(
        "spans",
        lambda _batch: left.set(),
        delay_ms=3_600_000,
        max_queue_size=1000,
        max_batch_size=100,
        size_of=lambda item: item,
    )
    batcher.put(policy.BATCH_BYTES - 1)
    assert not left.is_set()
    batcher.put(1)
    assert left.wait(PATIENCE_S)
    batcher.shutdown()


def test_the_account_of_bytes_is_exact() -> None:
    """
    However many threads put, and signal handlers between them, nothing is left on the account when the queue is empty.
    """
    exported: list[int] = []
    batcher: Batcher[int] = Batcher(
        "logs", exported.extend, delay_ms=1, max_queue_size=1_000_000, max_batch_size=7, size_of=lambda item: item
    )

    def work(first: int) -> None:
        for number in range(first, first + 3_000):
            batcher.put(number % 1000 + 1)

    def interrupt(_number: int, _frame: object) -> None:
        for _ in range(3):
            batcher.put(500)

    before = signal.signal(signal.SIGALRM, interrupt)
    interval = sys.getswitchinterval()
    threads = [threading.Thread(target=work, args=(number * 17,)) for number in range(4)]
    try:
        sys.setswitchinterval(1e-5)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        for thread in threads:
            thread.start()
        work(0)
        for thread in threads:
            thread.join()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.setswitchinterval(interval)
    assert batcher.flush(PATIENCE_S)
    assert batcher.held_bytes() == 0
    assert exported
    batcher.shutdown()


def test_a_failed_export_and_a_shutdown_give_their_bytes_back() -> None:
    """
    What an exporter raises on, and what a shutdown leaves, is held no longer.
    """

    def fail(_batch: list[int]) -> None:
        raise ValueError

    batcher: Batcher[int] = Batcher(
        "spans", fail, delay_ms=3_600_000, max_queue_size=10, max_batch_size=10, size_of=lambda item: item
    )
    batcher.put(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(guard.STRICT_ENV, raising=False)
        assert batcher.flush(PATIENCE_S)
    assert batcher.held_bytes() == 0
    assert guard.counters()["spans.dropped.exporter_raised"] == 1
    batcher.shutdown()


def in_memory_logs() -> InMemoryLogRecordExporter:
    return InMemoryLogRecordExporter()  # type: ignore[no-untyped-call]


def test_ending_a_span_never_waits_for_the_exporter() -> None:
    """
    Spans end at once while the exporter is stuck.
    """
    gate = Gate()
    pipeline = export.SpanPipeline([gate], schedule_delay_ms=1, max_queue_size=10)
    tracer = traced(pipeline)
    for number in range(1000):
        tracer.start_span(f"{number}").end()  # would never return if it waited
    gate.opened.set()
    assert pipeline.force_flush()


def test_a_flush_honours_its_timeout() -> None:
    """
    A flush returns False at its timeout although the exporter is stuck, and True once everything went out.
    """
    gate = Gate()
    pipeline = export.SpanPipeline([gate])
    traced(pipeline).start_span("a").end()
    assert not pipeline.force_flush(50)
    gate.opened.set()
    assert pipeline.force_flush()
    assert gate.batches == [["a"]]


def test_a_span_leaves_after_the_delay_without_a_flush() -> None:
    """
    One single span is exported although its batch never fills.
    """
    gate = Gate()
    gate.opened.set()
    traced(export.SpanPipeline([gate], schedule_delay_ms=20)).start_span("a").end()
    assert gate.entered.wait(PATIENCE_S)


@pytest.mark.parametrize(("size", "delay_ms"), [(3, 3_600_000), (512, 0)])
def test_a_batch_leaves_when_it_is_full(size: int, delay_ms: int) -> None:
    """
    A full batch does not wait for the delay; with a delay of 0 nothing waits.
    """
    gate = Gate()
    gate.opened.set()
    tracer = traced(export.SpanPipeline([gate], schedule_delay_ms=delay_ms, max_batch_size=size))
    for _ in range(3):
        tracer.start_span("a").end()
    assert gate.entered.wait(PATIENCE_S)


def test_exports_never_overlap() -> None:
    """
    Flushes from many threads, while spans end on many threads, lose nothing and never export two batches at once.
    """
    gate = Gate()
    gate.opened.set()
    pipeline = export.SpanPipeline([gate], schedule_delay_ms=1, max_batch_size=7, max_queue_size=100_000)
    tracer = traced(pipeline)

    def work() -> None:
        for number in range(300):
            tracer.start_span("a").end()
            if number % 50 == 0:
                assert pipeline.force_flush()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pipeline.force_flush()
    assert (sum(map(len, gate.batches)), gate.most_at_once) == (2400, 1)
    assert max(map(len, gate.batches)) <= 7


def test_a_shutdown_exports_what_is_left_and_counts_what_comes_later() -> None:
    """
    Shutdown flushes; later spans are dropped and counted; a second shutdown does nothing.
    """
    gate = Gate()
    gate.opened.set()
    pipeline = export.SpanPipeline([gate])
    tracer = traced(pipeline)
    tracer.start_span("a").end()
    pipeline.shutdown()
    pipeline.shutdown()
    tracer.start_span("late").end()
    assert gate.batches == [["a"]]
    assert guard.counters() == {"spans.exported": 1, "spans.dropped.after_shutdown": 1}


def test_what_a_shutdown_cannot_export_is_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """
    With an exporter that is stuck, shutdown ends in time and says in one line how many spans were lost.
    """
    gate = Gate()
    pipeline = export.SpanPipeline([gate])
    tracer = traced(pipeline)
    tracer.start_span("a").end()
    assert not pipeline.force_flush(10)
    tracer.start_span("b").end()
    working = pipeline.batchers[0]._thread
    pipeline.batchers[0].shutdown(0.05)
    gate.opened.set()
    assert working is not None
    working.join(PATIENCE_S)
    assert guard.counters()["spans.dropped.shutdown"] == 2
    assert [record.getMessage() for record in caplog.records] == ["2 spans were lost at exit: no time left"]


def test_the_exporting_thread_is_not_observed_itself() -> None:
    """
    While a batch is exported, instrumentation is suppressed and ``in_export`` is true; elsewhere it is false.
    """
    seen: list[tuple[object, bool]] = []

    class Look(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            seen.append((otel_context.get_value(_SUPPRESS_INSTRUMENTATION_KEY), export.in_export()))
            return SpanExportResult.SUCCESS

    pipeline = export.SpanPipeline([Look()])
    traced(pipeline).start_span("a").end()
    assert pipeline.force_flush()
    assert seen == [(True, True)]
    assert not export.in_export()
    assert otel_context.get_value(_SUPPRESS_INSTRUMENTATION_KEY) is None


def test_an_exporter_that_raises_is_counted_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    An exception of an exporter costs its batch only.
    """
    monkeypatch.delenv(guard.STRICT_ENV)
    fails = [True]

    class Sometimes(InMemorySpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            if fails.pop():
                raise RuntimeError
            return super().export(spans)

    exporter = Sometimes()
    pipeline = export.SpanPipeline([exporter])
    tracer = traced(pipeline)
    tracer.start_span("lost").end()
    assert pipeline.force_flush()
    fails.append(False)
    tracer.start_span("kept").end()
    assert pipeline.force_flush()
    assert [span.name for span in exporter.get_finished_spans()] == ["kept"]
    assert guard.counters()["spans.dropped.exporter_raised"] == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ended_is_replaced() -> None:
    """
    An exporter that ends its thread costs its batch; the next span starts another thread.
    """
    ended: list[threading.Thread] = []

    class Ends(InMemorySpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            if not ended:
                ended.append(threading.current_thread())
                raise SystemExit
            return super().export(spans)

    exporter = Ends()
    pipeline = export.SpanPipeline([exporter])
    tracer = traced(pipeline)
    tracer.start_span("lost").end()
    assert pipeline.force_flush()
    ended[0].join(PATIENCE_S)
    tracer.start_span("kept").end()
    assert pipeline.force_flush()
    assert [span.name for span in exporter.get_finished_spans()] == ["kept"]
    assert guard.counters() == {"spans.dropped.exporter_raised": 1, "spans.exported": 1}


def test_an_exporter_that_flushes_does_not_wait_for_itself() -> None:
    """
    A flush from inside an export returns False at once.
    """
    answers: list[bool] = []

    class Flushes(InMemorySpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            answers.append(pipeline.force_flush())
            return super().export(spans)

    pipeline = export.SpanPipeline([Flushes()])
    traced(pipeline).start_span("a").end()
    assert pipeline.force_flush()
    assert answers == [False]


def test_a_failed_export_of_a_third_party_is_counted() -> None:
    """
    A batch that somebody's exporter reports as failed is counted as dropped.
    """

    class Fails(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            return SpanExportResult.FAILURE

    pipeline = export.SpanPipeline([Fails()])
    traced(pipeline).start_span("a").end()
    assert pipeline.force_flush()
    assert guard.counters() == {"spans.dropped.exporter_failed": 1}


def test_a_stuck_exporter_does_not_hold_up_another() -> None:
    """
    With two exporters, each gets every span at its own pace.
    """
    gate, memory = Gate(), InMemorySpanExporter()
    pipeline = export.SpanPipeline([gate, memory], schedule_delay_ms=1)
    traced(pipeline).start_span("a").end()
    assert gate.entered.wait(PATIENCE_S)
    assert pipeline.batchers[1].flush(PATIENCE_S)
    assert [span.name for span in memory.get_finished_spans()] == ["a"]
    gate.opened.set()
    assert pipeline.force_flush()


def test_unsampled_spans_are_not_exported() -> None:
    """
    A span that is not sampled is never queued.
    """
    memory = InMemorySpanExporter()
    pipeline = export.SpanPipeline([memory])
    traced(pipeline, sampler=ALWAYS_OFF).start_span("a").end()
    assert pipeline.force_flush()
    assert not memory.get_finished_spans()


def test_every_local_span_carries_the_request_id() -> None:
    """
    The identity of the parent context, or of the current one, is on the span; a value that is there is kept.
    """
    memory = InMemorySpanExporter()
    pipeline = export.SpanPipeline([memory])
    tracer = traced(pipeline)
    given = identity.set_in(Context(), identity.Identity("given-in-context"))
    token = otel_context.attach(identity.set_in(Context(), identity.Identity("current-one")))
    try:
        tracer.start_span("current").end()
        tracer.start_span("given", context=given).end()
        tracer.start_span("own", attributes={"request_id": "own"}).end()
        tracer.start_span("outside", context=Context()).end()
    finally:
        otel_context.detach(token)
    assert pipeline.force_flush()
    found = {span.name: (span.attributes or {}).get("request_id") for span in memory.get_finished_spans()}
    assert found == {"current": "current-one", "given": "given-in-context", "own": "own", "outside": None}


def test_translate_is_applied_while_exporting() -> None:
    """
    The translation sees every span before its exporter does.
    """
    memory = InMemorySpanExporter()
    pipeline = export.SpanPipeline(
        [memory], translate=lambda span: ReadableSpan(span.name + "!", span.get_span_context())
    )
    traced(pipeline).start_span("a").end()
    assert pipeline.force_flush()
    assert [span.name for span in memory.get_finished_spans()] == ["a!"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_exports_its_own_spans_only() -> None:
    """
    After a fork the child starts its own thread and drops what its parent had queued; the parent exports it.
    """
    memory = InMemorySpanExporter()
    pipeline = export.SpanPipeline([memory], schedule_delay_ms=3_600_000)
    tracer = traced(pipeline)
    tracer.start_span("first").end()
    assert pipeline.force_flush()
    tracer.start_span("parent's").end()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        tracer.start_span("child's").end()
        pipeline.force_flush()
        os.write(writing, ",".join(span.name for span in memory.get_finished_spans()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "first,child's"
    assert pipeline.force_flush()
    assert [span.name for span in memory.get_finished_spans()] == ["first", "parent's"]


def test_items_are_exported_by_the_caller_when_no_thread_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    When the interpreter starts no more threads, a flush exports on the calling thread.
    """
    seen: list[int] = []
    batcher: Batcher[int] = Batcher("logs", seen.extend, delay_ms=500, max_queue_size=10, max_batch_size=10)

    def refuse(thread: threading.Thread) -> None:
        message = "can't create new thread at interpreter shutdown"
        raise RuntimeError(message)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    batcher.put(1)
    assert batcher.flush(1.0)
    assert seen == [1]


def test_log_records_reach_every_kind_of_exporter() -> None:
    """
    A record from the SDK's logger reaches a third-party exporter as a readable record; flush and shutdown work.
    """
    memory = in_memory_logs()
    pipeline = export.LogPipeline([memory])
    provider = LoggerProvider(shutdown_on_exit=False)
    provider.add_log_record_processor(pipeline)
    provider.get_logger("test").emit(body="hello", timestamp=time.time_ns())
    assert pipeline.force_flush()
    pipeline.shutdown()
    assert [record.log_record.body for record in memory.get_finished_logs()] == ["hello"]
    assert guard.counters() == {"logs.exported": 1}


def test_records_made_while_exporting_are_not_queued() -> None:
    """
    What an exporter logs about itself does not feed the next batch.
    """
    memory = in_memory_logs()
    pipeline = export.LogPipeline([memory])
    provider = LoggerProvider(shutdown_on_exit=False)
    provider.add_log_record_processor(pipeline)
    logger = provider.get_logger("test")

    class Chatty(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            logger.emit(body="about myself")
            return SpanExportResult.SUCCESS

    spans = export.SpanPipeline([Chatty()])
    traced(spans).start_span("a").end()
    assert spans.force_flush()
    assert pipeline.force_flush()
    pipeline.shutdown()
    assert not memory.get_finished_logs()


def test_spans_of_other_instrumentations_lose_what_a_user_sent() -> None:
    """
    The exception event and the status of an SDK span keep nothing that the database quoted; other events stay.
    """
    memory = InMemorySpanExporter()
    pipeline = export.SpanPipeline([memory])
    tracer = traced(pipeline)
    sent = f"hunter{1 + 1}"  # not a literal: a traceback shows source lines

    def insert() -> None:
        with tracer.start_as_current_span("INSERT") as span:
            span.add_event("query", {"rows": 2})
            message = f"duplicate key\nDETAIL:  Key (password)=({sent}) already exists."
            raise ValueError(message)

    with pytest.raises(ValueError, match="duplicate"):
        insert()
    assert pipeline.force_flush()
    (exported,) = memory.get_finished_spans()
    assert sent not in exported.to_json()
    assert exported.status.description == "ValueError: duplicate key\nDETAIL:  REDACTED"
    query, error = exported.events
    assert query.attributes == {"rows": 2}
    assert error.attributes is not None
    assert error.attributes["exception.type"] == "ValueError"
    assert error.attributes["exception.message"] == "duplicate key\nDETAIL:  REDACTED"
