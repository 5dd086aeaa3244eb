"""
Spans and logs against a real receiver that is away, busy, slow, rude or fine.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk.trace import TracerProvider

from otel_correlation import export, guard, settings
from otel_correlation._version import __version__
from otel_correlation.export import sending
from otel_correlation.export.transport import Direct
from tests.integration.otlp_sink import Answer, OtlpSink

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE_MS = 20_000


@pytest.fixture
def sink() -> Iterator[OtlpSink]:
    """
    A receiver that takes everything until it is told otherwise.
    """
    with OtlpSink() as found:
        yield found


@pytest.fixture(autouse=True)
def fast_and_said_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """
    Short pauses between attempts; the line that is said once in a process can be said in each test.
    """
    monkeypatch.setattr(sending, "_FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(sending, "_LAST_BACKOFF_S", 0.05)
    monkeypatch.setattr(sending, "_hinted", False)
    yield
    while _started:
        _started.pop().shutdown(0.01)


_started: list[Any] = []


def started(endpoint: str, **more: str) -> tuple[export.SpanPipeline, Any]:
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, **more}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        read = settings.from_environment()
        problems: list[str] = []
        pipeline = export.SpanPipeline(
            export.span_exporters(read, problems),
            schedule_delay_ms=read.schedule_delay_ms,
            max_queue_size=read.max_queue_size,
            max_batch_size=read.max_batch_size,
        )
    assert not problems
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(pipeline)
    _started.extend(pipeline.batchers)
    return pipeline, provider.get_tracer("test")


def unused_endpoint() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("otel_correlation")]


def test_spans_arrive_whole(sink: OtlpSink) -> None:
    """
    What a span holds arrives; the request names us and the stock exporter.
    """
    pipeline, tracer = started(sink.endpoint)
    with tracer.start_as_current_span("parent", attributes={"k": [1, 2]}) as parent:
        tracer.start_span("child").end()
    assert pipeline.force_flush(PATIENCE_MS)
    child, root = sink.wait_for_spans(2)
    assert root.attributes == {"k": [1, 2]}
    assert child.parent_span_id == root.span_id == f"{parent.get_span_context().span_id:016x}"
    agent = sink.requests[0].headers["user-agent"]
    assert agent.startswith(f"otel-correlation/{__version__} OTel-OTLP-Exporter-Python/")
    assert guard.counters() == {"spans.exported": 2}


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_compressed_bodies_arrive(sink: OtlpSink, compression: str) -> None:
    """
    A compressed body is decoded by the receiver to the same spans.
    """
    pipeline, tracer = started(sink.endpoint, OTEL_EXPORTER_OTLP_COMPRESSION=compression)
    tracer.start_span("a").end()
    assert pipeline.force_flush(PATIENCE_MS)
    assert [span.name for span in sink.spans] == ["a"]
    assert sink.requests[0].headers["content-encoding"] == compression


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_collector_gets_the_batch_again(sink: OtlpSink, status: int) -> None:
    """
    A retryable status is tried again until the batch is taken; nothing is lost or doubled.
    """
    sink.answers = [Answer(status)] * 4
    pipeline, tracer = started(sink.endpoint)
    tracer.start_span("a").end()
    assert pipeline.force_flush(PATIENCE_MS)
    assert [request.status for request in sink.requests] == [status] * 4 + [200]
    assert [span.name for span in sink.spans] == ["a"]
    assert guard.counters() == {"spans.exported": 1, "spans.retried": 4}


@pytest.mark.parametrize("status", [301, 400, 401, 404, 413, 500])
def test_a_refused_batch_is_dropped_and_counted(sink: OtlpSink, status: int, caplog: pytest.LogCaptureFixture) -> None:
    """
    Any other status is final: dropped, counted by status, said in one line, and the next batch is sent.
    """
    sink.answers = [Answer(status)]
    pipeline, tracer = started(sink.endpoint)
    tracer.start_span("lost").end()
    assert pipeline.force_flush(PATIENCE_MS)
    tracer.start_span("kept").end()
    assert pipeline.force_flush(PATIENCE_MS)
    assert [span.name for span in sink.spans] == ["kept"]
    assert guard.counters() == {"spans.exported": 1, f"spans.dropped.http_{status}": 1}
    assert len(lines(caplog)) == 1
    assert str(status) in lines(caplog)[0]


def test_retry_after_is_honoured(sink: OtlpSink) -> None:
    """
    The pause that the collector asks for is kept, also when somebody flushes.
    """
    sink.answers = [Answer(503, headers={"retry-after": "1"})]
    pipeline, tracer = started(sink.endpoint)
    tracer.start_span("a").end()
    begun = time.monotonic()
    assert not pipeline.force_flush(100)
    assert pipeline.force_flush(PATIENCE_MS)
    assert time.monotonic() - begun >= 0.9
    assert [request.status for request in sink.requests] == [503, 200]


def test_a_pause_that_outlasts_the_exit_is_not_waited_for(sink: OtlpSink, caplog: pytest.LogCaptureFixture) -> None:
    """
    At exit, a collector that asks for more time than there is gets no further request; the loss is counted and said.
    """
    sink.answer = Answer(503, headers={"retry-after": "3600"})
    pipeline, tracer = started(sink.endpoint)
    tracer.start_span("a").end()
    assert not pipeline.force_flush(200)
    pipeline.shutdown()  # returns, long before the hour is over
    assert len(sink.requests) == 1
    assert guard.counters()["spans.dropped.shutdown"] == 1
    assert lines(caplog)[-1] == "1 spans were lost at exit: HTTP status 503"


@pytest.mark.parametrize("body", [b"OK", b"\xff\xff\xff"])
def test_an_answer_that_is_not_otlp_is_still_an_acknowledgement(sink: OtlpSink, body: bytes) -> None:
    """
    The status decides, whatever a proxy writes into the body.
    """
    sink.answer = Answer(body=body)
    pipeline, tracer = started(sink.endpoint)
    tracer.start_span("a").end()
    assert pipeline.force_flush(PATIENCE_MS)
    assert guard.counters() == {"spans.exported": 1}


def test_a_batch_that_is_too_large_is_split(sink: OtlpSink, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A request beyond the limit becomes several; only a span that is too large by itself is dropped and counted.
    """
    monkeypatch.setattr(sending, "_MAX_REQUEST_BYTES", 3000)
    pipeline, tracer = started(sink.endpoint)
    for number in range(10):
        tracer.start_span(f"{number}", attributes={"text": "x" * (5000 if number == 4 else 500)}).end()
    assert pipeline.force_flush(PATIENCE_MS)
    assert [span.name for span in sink.spans] == [f"{number}" for number in range(10) if number != 4]
    assert all(request.size <= 3000 for request in sink.requests)
    assert guard.counters() == {"spans.exported": 9, "spans.dropped.too_large": 1}


def test_a_request_that_cannot_be_made_is_dropped_and_counted(sink: OtlpSink, caplog: pytest.LogCaptureFixture) -> None:
    """
    What can never be sent is not tried for ever.
    """
    made = Direct(sink.endpoint)
    sender = sending.Sender("logs", "http://127.0.0.1:1/", headers={"bad": "a\nb"}, transport=lambda: made)
    assert not sender.send(b"", 2)
    assert guard.counters() == {"logs.dropped.not_sendable": 2}
    assert "ValueError" in lines(caplog)[0]


def test_a_partial_success_is_not_sent_again(sink: OtlpSink, caplog: pytest.LogCaptureFixture) -> None:
    """
    Rejected spans of a taken batch are counted and the collector's message is shown; nothing is sent twice.
    """
    sink.answers = [Answer(rejected=2, message="too old\nforged line")]
    pipeline, tracer = started(sink.endpoint)
    for _ in range(3):
        tracer.start_span("a").end()
    assert pipeline.force_flush(PATIENCE_MS)
    assert len(sink.requests) == 1
    assert guard.counters() == {"spans.exported": 1, "spans.dropped.rejected_by_collector": 2}
    (line,) = lines(caplog)
    assert "rejected 2 of 3" in line
    assert "too old\\nforged line" in line


def test_an_outage_loses_nothing_that_the_queue_can_hold(sink: OtlpSink, caplog: pytest.LogCaptureFixture) -> None:
    """
    Spans that end while the collector is away arrive when it is back, each once.
    """
    pipeline, tracer = started(sink.endpoint, OTEL_BSP_SCHEDULE_DELAY="10")
    tracer.start_span("before").end()
    sink.wait_for_spans(1)
    sink.close()
    for number in range(200):
        tracer.start_span(f"during {number}").end()
    assert not pipeline.force_flush(300)
    sink.start()
    tracer.start_span("after").end()
    assert pipeline.force_flush(PATIENCE_MS)
    names = [span.name for span in sink.spans]
    assert sorted(names) == sorted(["before", "after", *(f"during {number}" for number in range(200))])
    assert guard.counters()["spans.exported"] == 202
    assert "cannot be reached" in lines(caplog)[0]


def test_beyond_the_queue_the_newest_are_dropped_and_counted(sink: OtlpSink) -> None:
    """
    In an outage memory is bounded: exported, dropped and nothing else adds up to what was made.
    """
    sink.close()
    pipeline, tracer = started(
        sink.endpoint, OTEL_BSP_MAX_QUEUE_SIZE="50", OTEL_BSP_MAX_EXPORT_BATCH_SIZE="10", OTEL_BSP_SCHEDULE_DELAY="1"
    )
    for number in range(200):
        tracer.start_span(f"{number}").end()
    sink.start()
    assert pipeline.force_flush(PATIENCE_MS)
    counters = guard.counters()
    assert counters["spans.exported"] == len(sink.spans) <= 70
    assert counters["spans.exported"] + counters["spans.dropped.queue_full"] == 200
    assert sink.spans[0].name == "0"


def test_a_cut_acknowledgement_is_a_possible_duplicate(sink: OtlpSink) -> None:
    """
    A batch whose answer was cut off is sent again, and counted as a possible duplicate.
    """
    sink.answers = [Answer(drop=True)]
    pipeline, tracer = started(sink.endpoint)
    tracer.start_span("a").end()
    assert pipeline.force_flush(PATIENCE_MS)
    assert [span.name for span in sink.spans] == ["a", "a"]
    assert guard.counters() == {"spans.exported": 1, "spans.retried": 1, "spans.possible_duplicates": 1}


def test_a_collector_that_hangs_is_tried_again_after_the_timeout(sink: OtlpSink) -> None:
    """
    No answer within the timeout is a failure like any other; the application has not waited.
    """
    sink.answers = [Answer(hang_s=60)]
    pipeline, tracer = started(sink.endpoint, OTEL_EXPORTER_OTLP_TIMEOUT="0.2")
    tracer.start_span("a").end()
    assert pipeline.force_flush(PATIENCE_MS)
    assert [span.name for span in sink.spans] == ["a"]
    assert guard.counters()["spans.possible_duplicates"] == 1


def test_leaving_an_unreachable_collector_counts_what_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    """
    At exit an absent collector is not tried for ever; what is lost is counted and said in one line.
    """
    pipeline, tracer = started(unused_endpoint())
    for _ in range(3):
        tracer.start_span("a").end()
    pipeline.shutdown()
    assert guard.counters()["spans.dropped.shutdown"] == 3
    assert lines(caplog)[-1] == "3 spans were lost at exit: Connection refused"


def test_leaving_for_good_and_then_ending_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    """
    After one vain ``leave`` the next one, and a shutdown, end too, and the line is said once.
    """
    pipeline, tracer = started(unused_endpoint())
    tracer.start_span("a").end()
    assert not export.leave(pipeline.batchers)
    assert not export.leave(pipeline.batchers)
    pipeline.shutdown()
    assert [line for line in lines(caplog) if line.startswith("Not delivered")] == [
        "Not delivered, and lost if the process ends now: 1 spans (Connection refused)"
    ]


def test_leaving_tries_once_more_after_a_long_outage(sink: OtlpSink, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A collector that came back while we paused between two attempts gets everything at exit.
    """
    sink.close()
    monkeypatch.setattr(sending, "_FIRST_BACKOFF_S", 3600.0)
    monkeypatch.setattr(sending, "_LAST_BACKOFF_S", 3600.0)
    pipeline, tracer = started(sink.endpoint, OTEL_BSP_SCHEDULE_DELAY="1")
    sender: Any = pipeline.batchers[0]._sender
    tracer.start_span("a").end()
    deadline = time.monotonic() + 20
    while not sender.attempts and time.monotonic() < deadline:
        time.sleep(0.01)
    monkeypatch.setattr(sender, "_unreachable_since", time.monotonic() - 60)
    sink.start()
    assert export.leave(pipeline.batchers)
    assert [span.name for span in sink.spans] == ["a"]


def test_a_shutdown_waits_out_a_short_restart(sink: OtlpSink) -> None:
    """
    A collector that is back within the exit's time gets what was buffered.
    """
    sink.close()
    pipeline, tracer = started(sink.endpoint)
    tracer.start_span("a").end()
    starting = threading.Timer(0.5, sink.start)
    starting.start()
    pipeline.shutdown()
    starting.join()
    assert [span.name for span in sink.spans] == ["a"]


def test_the_default_endpoint_without_a_listener_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """
    Nobody on the default endpoint: one line with the ways out, then only counters.
    """
    endpoint = unused_endpoint()
    read = settings.from_environment({})
    pipeline = export.SpanPipeline(
        [
            sending.HttpSpanExporter(
                sending.Sender(
                    "spans",
                    endpoint + "/v1/traces",
                    headers={},
                    transport=lambda: Direct(endpoint + "/v1/traces"),
                    is_default=read.endpoint_is_default,
                )
            )
        ],
        schedule_delay_ms=1,
        max_queue_size=5,
    )
    _started.extend(pipeline.batchers)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(pipeline)
    tracer = provider.get_tracer("test")
    assert read.endpoint_is_default
    for _ in range(5):
        for _ in range(20):
            tracer.start_span("a").end()
        assert not pipeline.force_flush(50)
    assert not export.leave(pipeline.batchers)
    pipeline.shutdown()
    (line,) = lines(caplog)
    assert "otel-correlation serve" in line
    assert guard.counters()["spans.dropped.queue_full"] > 0


def test_a_password_in_the_endpoint_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """
    Credentials of the endpoint's URL never reach a log line.
    """
    pipeline, tracer = started(unused_endpoint().replace("http://", "http://user:hunter2@"))
    tracer.start_span("a").end()
    assert not pipeline.force_flush(200)
    assert lines(caplog)
    assert "hunter2" not in caplog.text


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_uses_its_own_connection(sink: OtlpSink) -> None:
    """
    Parent and child export over different connections after a fork, and each span arrives once.
    """
    pipeline, tracer = started(sink.endpoint)
    tracer.start_span("before").end()
    assert pipeline.force_flush(PATIENCE_MS)
    tracer.start_span("queued").end()
    child = os.fork()
    if child == 0:
        tracer.start_span("child").end()
        os._exit(0 if pipeline.force_flush(PATIENCE_MS) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pipeline.force_flush(PATIENCE_MS)
    assert sorted(span.name for span in sink.spans) == ["before", "child", "queued"]
    ports = [request.connection for request in sink.requests]
    assert ports[0] == ports[2] != ports[1]


def test_logs_arrive_whole(sink: OtlpSink, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A log record arrives with body, severity and attributes; a partial success of logs is counted as theirs.
    """
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.endpoint)
    monkeypatch.setenv("OTEL_LOGS_EXPORTER", "otlp")
    pipeline = export.log_pipeline(settings.from_environment(), [])
    _started.extend(pipeline.batchers)
    provider = LoggerProvider(shutdown_on_exit=False)
    provider.add_log_record_processor(pipeline)
    provider.get_logger("scope").emit(body="hello", attributes={"request_id": "r", "n": 1}, severity_text="INFO")
    assert pipeline.force_flush(PATIENCE_MS)
    (record,) = sink.logs
    assert (record.body, record.severity_text, record.scope) == ("hello", "INFO", "scope")
    assert record.attributes == {"request_id": "r", "n": 1}
    sink.answers = [Answer(rejected=1, message="no")]
    provider.get_logger("scope").emit(body="again")
    assert pipeline.force_flush(PATIENCE_MS)
    assert guard.counters() == {"logs.exported": 1, "logs.dropped.rejected_by_collector": 1}
