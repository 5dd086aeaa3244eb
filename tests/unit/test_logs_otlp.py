"""
Records over OTLP: all of them, once, and never those that the export makes.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import logging
import logging.config
import logging.handlers
import pickle
import queue
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import loguru
import pytest
import structlog
from opentelemetry import context as otel_context
from opentelemetry._logs import SeverityNumber
from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY
from opentelemetry.sdk._logs import LoggerProvider, LoggingHandler, LogRecordProcessor
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
from uvicorn.config import LOGGING_CONFIG

from otel_correlation import guard, identity, logs
from otel_correlation.export.sizes import record_bytes
from otel_correlation.policy import DEFAULT
from otel_correlation.settings import Settings
from tests.unit.logs_pristine import SPAN_ID, TRACE_ID, Keep, pristine, request

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.sdk._logs import ReadableLogRecord, ReadWriteLogRecord

SETTINGS = Settings(service_name="orders", logs_exporters=("otlp",))


class Exported:
    """
    A provider whose exporter is a list.
    """

    def __init__(self, settings: Settings = SETTINGS) -> None:
        self.exporter = InMemoryLogRecordExporter()  # type: ignore[no-untyped-call]
        self.provider = LoggerProvider(shutdown_on_exit=False)
        self.provider.add_log_record_processor(SimpleLogRecordProcessor(self.exporter))
        logs.install(settings)
        logs.otlp_handler(self.provider, settings)

    def records(self) -> list[ReadableLogRecord]:
        return list(self.exporter.get_finished_logs())

    def bodies(self) -> list[Any]:
        return [found.log_record.body for found in self.records()]


@pytest.fixture
def exported() -> Iterator[Exported]:
    with pristine():
        found = Exported()
        logging.root.setLevel(logging.INFO)
        yield found


def test_a_record_arrives_whole(exported: Exported) -> None:
    """
    Body, severity, time, scope, ids, request id, bound fields, extras and the place in the code.
    """
    with request():
        identity.bind(customer=42)
        logging.getLogger("app.orders").warning("%s left", 3, extra={"shelf": {"row": (1, None)}})
    (found,) = exported.records()
    record = found.log_record
    assert (record.body, record.severity_text, record.severity_number) == ("3 left", "WARN", SeverityNumber.WARN)
    assert (record.trace_id, record.span_id, record.trace_flags) == (TRACE_ID, SPAN_ID, 1)
    assert found.instrumentation_scope is not None
    assert found.instrumentation_scope.name == "app.orders"
    assert record.timestamp is not None
    assert record.observed_timestamp is not None
    assert 0 <= record.observed_timestamp - record.timestamp < 10**9
    attributes = dict(record.attributes or {})
    assert attributes.pop("code.file.path") == __file__
    assert attributes.pop("code.function.name") == "test_a_record_arrives_whole"
    assert isinstance(attributes.pop("code.line.number"), int)
    assert attributes == {"request_id": "order-7", "customer": 42, "shelf": {"row": [1, None]}}


def test_an_exception_arrives_with_the_stable_names(exported: Exported) -> None:
    """
    ``exception.type``, ``exception.message`` and ``exception.stacktrace``, without what a user sent.
    """
    try:
        with request():
            try:
                raise queue.Full("bad input_value='ada@example.com', input_type=str]")
            except queue.Full as error:
                identity.stash(error)
                raise
    except queue.Full:
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
    record = exported.records()[0].log_record
    attributes = dict(record.attributes or {})
    assert attributes["exception.type"] == "_queue.Full" or attributes["exception.type"] == "queue.Full"
    assert attributes["exception.message"] == "bad input_value=REDACTED, input_type=str]"
    assert "test_an_exception_arrives" in str(attributes["exception.stacktrace"])
    assert (record.trace_id, attributes["request_id"]) == (TRACE_ID, "order-7")


@pytest.mark.parametrize("configured", [False, True])
def test_every_logger_arrives_once(configured: bool) -> None:
    """
    Uvicorn's loggers, which do not propagate, and the application's, with or without handlers of its own: each once.
    """
    with pristine() as out:
        exported = Exported()
        logging.config.dictConfig(copy.deepcopy(LOGGING_CONFIG))
        if configured:
            logging.basicConfig(stream=out, level=logging.INFO)
            logging.getLogger("app").addHandler(logging.StreamHandler(io.StringIO()))
        logs.settle()
        names = ["app", "app.part", "uvicorn.error", "uvicorn.asgi", "other"]
        for name in names:
            logging.getLogger(name).info("hello")
    arrived = [found for found in exported.records() if found.log_record.body == "hello"]
    assert [found.instrumentation_scope and found.instrumentation_scope.name for found in arrived] == names


def test_a_record_that_is_handled_again_is_not_exported_again(exported: Exported) -> None:
    """
    What a queue's or a socket's listener hands to a logger a second time was exported the first time.
    """
    kept = Keep()
    logger = logging.getLogger("app")
    logger.addHandler(kept)
    records: queue.Queue[Any] = queue.Queue()
    logger.addHandler(logging.handlers.QueueHandler(records))
    with request():
        logger.info("hello")
        logger.info("hello")
    for copied in (records.get(), records.get()):
        logger.handle(copied)
    logger.handle(logging.makeLogRecord(pickle.loads(pickle.dumps(kept.records[0].__dict__))))
    foreign = logging.makeLogRecord({**kept.records[0].__dict__, "process": 1, "created": 1.0})
    logger.handle(foreign)
    assert exported.bodies() == ["hello", "hello"]


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """
    Keep the garbage collector away from ``dictConfig``.

    It flushes every handler while it holds logging's lock, and the SDK's handler starts a thread to flush and waits for it. If
    that thread's first steps collect a handler, its removal wants the same lock, and both wait for ever.
    """
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("when", ["before", "after"])
def test_opentelemetrys_own_handler_doubles_nothing(when: str) -> None:
    """
    Beside contrib's logging instrumentation, which puts a handler on the root logger, records go out once, lines too.
    """
    with warnings.catch_warnings(), no_collection():
        warnings.simplefilter("ignore", DeprecationWarning)
        handler_class = LoggingHandler
        with pristine() as out:
            if when == "before":
                exporter = InMemoryLogRecordExporter()  # type: ignore[no-untyped-call]
                provider = LoggerProvider(shutdown_on_exit=False)
                provider.add_log_record_processor(SimpleLogRecordProcessor(exporter))
                logging.root.addHandler(handler_class(logger_provider=provider))
                logs.install(SETTINGS)
                logs.otlp_handler(provider, SETTINGS)
            else:
                exported = Exported()
                exporter = exported.exporter
                logging.root.addHandler(handler_class(logger_provider=exported.provider))
            logging.config.dictConfig(copy.deepcopy(LOGGING_CONFIG))
            logs.settle()
            logging.getLogger("app").info("hello")
            logging.getLogger("uvicorn.error").info("hello")
            assert logs.active()
    assert len(exporter.get_finished_logs()) == 2
    assert out.getvalue().count('"message": "hello"') == 2


def test_a_handler_of_another_provider_keeps_its_records(exported: Exported) -> None:
    """
    Who sends records to a second place by OpenTelemetry's handler still does.
    """
    exporter = InMemoryLogRecordExporter()  # type: ignore[no-untyped-call]
    provider = LoggerProvider(shutdown_on_exit=False)
    provider.add_log_record_processor(SimpleLogRecordProcessor(exporter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        logging.root.addHandler(LoggingHandler(logger_provider=provider))
    logging.getLogger("app").info("hello")
    assert (len(exported.bodies()), len(exporter.get_finished_logs())) == (1, 1)


def test_levels_and_filters_of_loggers_count(exported: Exported) -> None:
    """
    What a logger does not let through is not exported.
    """
    logger = logging.getLogger("app")
    logger.debug("below")
    logger.addFilter(lambda record: "secret" not in record.getMessage())
    logger.info("secret")
    logger.info("shown")
    logger.filters.clear()
    assert exported.bodies() == ["shown"]


def test_what_the_export_logs_is_not_exported() -> None:
    """
    No feedback: records of the exporter's thread, of libraries that it uses, and of OpenTelemetry itself stay local.
    """

    class Chatty(LogRecordProcessor):
        def __init__(self) -> None:
            self.seen: list[str] = []

        def on_emit(self, log_record: ReadWriteLogRecord) -> None:
            self.seen.append(str(log_record.log_record.body))
            logging.getLogger("urllib3.connectionpool").warning("Retrying after %s", log_record.log_record.body)

        def shutdown(self) -> None: ...

        def force_flush(self, timeout_millis: int = 30000) -> bool:
            return True

    with pristine():
        chatty = Chatty()
        provider = LoggerProvider(shutdown_on_exit=False)
        provider.add_log_record_processor(chatty)
        logs.install(SETTINGS)
        logs.otlp_handler(provider, SETTINGS)
        logging.getLogger("app").warning("hello")
        logging.getLogger("opentelemetry.sdk").warning("Failed to export")
        token = otel_context.attach(otel_context.set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))
        logging.getLogger("grpc").warning("from an exporter's thread")
        otel_context.detach(token)
    assert chatty.seen == ["hello"]


def test_user_code_that_suppresses_instrumentation_still_logs(exported: Exported) -> None:
    """
    A request that switches instrumentation off for a while keeps its log lines.
    """
    with request():
        token = otel_context.attach(otel_context.set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))
        logging.getLogger("app").info("hello")
        otel_context.detach(token)
    assert exported.bodies() == ["hello"]


def test_sampled_means_that_unsampled_traces_stay_local() -> None:
    """
    With ``OTEL_CORRELATION_LOGS_EXPORT=sampled`` records of unsampled traces are not exported; all others are.
    """
    with pristine():
        exported = Exported(Settings(logs_exporters=("otlp",), logs_export="sampled"))
        logger = logging.getLogger("app")
        logger.warning("outside")
        with request():
            logger.warning("sampled")
        with request(sampled=False):
            logger.warning("unsampled")
            logger.warning("unsampled", extra={"trace_id": "mine"})
    assert exported.bodies() == ["outside", "sampled"]


def test_nothing_is_exported_without_an_exporter() -> None:
    """
    With ``OTEL_LOGS_EXPORTER`` unset no record goes to OTLP.
    """
    with pristine():
        exported = Exported(Settings())
        logging.getLogger("app").warning("hello")
    assert exported.bodies() == []


def test_info_records_arrive_where_nothing_is_configured_and_lines_are_off() -> None:
    """
    With lines off and nothing configured, INFO records still go to OTLP.
    """
    with pristine() as out:
        exported = Exported(Settings(log_format="none", logs_exporters=("otlp",)))
        logs.settle()
        logging.getLogger("app").info("hello")
    assert (exported.bodies(), out.getvalue()) == (["hello"], "")


def test_the_users_own_ids_are_kept_as_attributes(exported: Exported) -> None:
    """
    ``extra={"trace_id": ...}`` stays as an attribute; the record belongs to the real trace.
    """
    with request():
        logging.getLogger("app").info("hello", extra={"trace_id": "mine", "request_id": "theirs"})
    record = exported.records()[0].log_record
    attributes = dict(record.attributes or {})
    assert (record.trace_id, attributes["trace_id"], attributes["request_id"]) == (TRACE_ID, "mine", "theirs")


@pytest.mark.parametrize("value", ["\ud800", 10**30, float("nan"), object(), {1: {2}}, b"\xff", None, ["\ud800"]])
def test_a_strange_value_does_not_spoil_the_batch(value: object, exported: Exported) -> None:
    """
    Values that OTLP cannot carry become text; a lone surrogate would make the encoding of its whole batch fail.
    """
    from otel_correlation.export.encoding import encode_logs

    logging.getLogger("app").info("it is %s", value, extra={"thing": value})
    found = exported.records()
    assert len(found) == 1
    assert encode_logs(found)[0]
    assert "thing" in (found[0].log_record.attributes or {}) or value is None


def test_secrets_in_an_access_line_are_not_exported() -> None:
    """
    Uvicorn's access line, which an application with logging of its own keeps, is exported without sensitive values.
    """
    with pristine() as out:
        exported = Exported()
        logging.basicConfig(stream=out, level=logging.INFO)
        line = '%s - "%s %s HTTP/%s" %d'
        logging.getLogger("uvicorn.access").info(line, "127.0.0.1:1", "GET", "/?email=a@b.example&n=2", "1.1", 200)
    assert exported.bodies() == ['127.0.0.1:1 - "GET /?email=REDACTED&n=2 HTTP/1.1" 200']


def test_the_standard_limits_of_attributes_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    ``OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT`` cuts long values, and a record with endless fields is cut, counted.
    """
    monkeypatch.setenv("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "3")
    with pristine():
        exported = Exported()
        logging.getLogger("app").warning("hello", extra={"field": "abcdef"})
        logging.getLogger("app").warning("hello", extra={f"f{number}": 1 for number in range(500)})
    first, second = exported.records()
    assert dict(first.log_record.attributes or {})["field"] == "abc"
    assert len(second.log_record.attributes or {}) == 128
    assert guard.counters()["log_attributes_dropped"] == second.dropped_attributes == 500 + 3 - 128


def test_long_texts_are_cut_in_what_is_exported(exported: Exported) -> None:
    """
    Body, extras (with all that a list or dict holds), names and exception texts are cut and marked; short ones stay.
    """
    many = {"k" * 1000: ["v" * 10_000] * 100, "short": "s"}
    extra = {
        "text": "x" * 100_000,
        "nested": many,
        "raw": b"b" * 1_000_000,
        "n" * 1000: 1,
        "short": "s",
        "count": 2**80,
    }
    with request():
        try:
            raise ValueError("e" * 1_000_000)
        except ValueError:
            logging.getLogger("app").exception("m%s", "y" * 5_000_000, extra=extra)
    (found,) = exported.records()
    body: Any = found.log_record.body
    assert len(body) == DEFAULT.body
    assert body.startswith("my")
    assert body.endswith("y...[cut from 5000001 characters]")
    attributes = dict(found.log_record.attributes or {})
    assert attributes["text"] == "x" * 16_353 + "...[cut from 100000 characters]"
    assert attributes["short"] == "s"
    assert attributes["count"] == str(2**80)
    assert attributes["n" * 227 + "...[cut from 1000 characters]"] == 1
    nested: Any = attributes["nested"]
    assert len(repr(nested)) < DEFAULT.value + 100 * 100
    raw: Any = attributes["raw"]
    assert len(raw) <= DEFAULT.value
    message: Any = attributes["exception.message"]
    assert message.endswith("\n...[cut from 1000000 characters]")
    assert record_bytes(found) < 200_000


def test_a_limit_of_the_users_wins_over_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    With a longer limit of the user's nothing is cut before it; bodies, too, may be as long.
    """
    monkeypatch.setenv("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "200000")
    with pristine():
        exported = Exported()
        logging.getLogger("app").warning("m" * 300_000, extra={"a": "x" * 150_000, "b": "y" * 300_000})
    (found,) = exported.records()
    assert found.log_record.body == "m" * 200_000
    attributes = dict(found.log_record.attributes or {})
    assert (attributes["a"], attributes["b"]) == ("x" * 150_000, "y" * 200_000)


def test_a_record_that_waits_keeps_nothing_of_its_request_alive(exported: Exported) -> None:
    """
    What is queued has no context, which would hold the request, its span and what the application put there.
    """

    class Kept:
        pass

    kept = Kept()
    alive = weakref.ref(kept)
    token = otel_context.attach(otel_context.set_value("kept", kept))
    logging.getLogger("app").warning("hello")
    otel_context.detach(token)
    del kept, token
    gc.collect()
    assert exported.bodies() == ["hello"]
    assert alive() is None


def test_a_failing_provider_never_reaches_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    An export that raises is counted; the log call returns and the line is written.
    """

    class Broken(LoggerProvider):
        def get_logger(self, *args: Any, **kwargs: Any) -> Any:
            raise OSError

    monkeypatch.delenv(guard.STRICT_ENV)
    with pristine() as out:
        logs.install(SETTINGS)
        logs.otlp_handler(Broken(shutdown_on_exit=False), SETTINGS)
        logs.settle()
        logging.getLogger("app").info("hello")
    assert "hello" in out.getvalue()
    assert guard.counters()["internal_error.logs.export"] == 1


# -- structlog and loguru


def attributes_of(found: ReadableLogRecord) -> dict[str, Any]:
    hidden = ("code.", "exception.stacktrace")
    attributes = found.log_record.attributes or {}
    return {name: value for name, value in attributes.items() if not name.startswith(hidden)}


@pytest.fixture
def printed() -> Iterator[io.StringIO]:
    structlog.reset_defaults()
    out = io.StringIO()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(out),
    )
    yield out
    structlog.reset_defaults()


@pytest.mark.parametrize("preset", ["otel", "ecs", "datadog"])
def test_printed_events_of_structlog_arrive_once(preset: Any, exported: Exported, printed: io.StringIO) -> None:
    """
    An event that structlog prints by itself is exported once, with its fields, as it is after the user's processors.
    """
    logs.install(Settings(service_name="orders", log_preset=preset))
    with request():
        identity.bind(tenant="acme")
        structlog.get_logger().warning("hello", customer=42, name="bob")
    (found,) = exported.records()
    record = found.log_record
    assert (record.body, record.severity_number, record.trace_id) == ("hello", SeverityNumber.WARN, TRACE_ID)
    attributes = attributes_of(found)
    assert attributes == {"request_id": "order-7", "customer": 42, "name": "bob", "tenant": "acme"}
    assert printed.getvalue().count("\n") == 1


def test_the_users_own_ids_in_structlog_and_loguru_arrive(exported: Exported, printed: io.StringIO) -> None:
    """
    A ``request_id`` that the user gave is the attribute of what is exported.
    """
    loguru.logger.remove()
    loguru.logger.add(lambda _: None)
    with request():
        structlog.get_logger().info("hello", request_id="mine")
        loguru.logger.bind(request_id="mine").info("hello")
    loguru.logger.remove()
    assert [attributes_of(found) for found in exported.records()] == [{"request_id": "mine"}] * 2


def test_an_exception_of_structlog_arrives_with_the_stable_names(exported: Exported, printed: io.StringIO) -> None:
    """
    ``exception.type`` and ``exception.message`` are there although a processor has rendered the traceback.
    """
    try:
        raise queue.Full("bad input_value='ada@example.com', input_type=str]")
    except queue.Full as error:
        structlog.get_logger().exception("failed")
        raised = error
    structlog.get_logger().error("later", exc_info=raised)
    for found in exported.records():
        assert attributes_of(found)["exception.message"] == "bad input_value=REDACTED, input_type=str]"
        stacktrace = (found.log_record.attributes or {})["exception.stacktrace"]
        assert "ada@example.com" not in str(stacktrace).replace("raise queue.Full", "").partition("queue.Full:")[2]
    assert len(exported.records()) == 2


@pytest.mark.parametrize("renderer", ["kwargs", "formatter", "text"])
def test_events_of_structlog_that_logging_writes_arrive_once(renderer: str, exported: Exported) -> None:
    """
    An event that becomes a record of logging is exported once, with its text as body and its keys as attributes.
    """
    wrap = structlog.stdlib.ProcessorFormatter.wrap_for_formatter
    last: dict[str, Any] = {
        "kwargs": structlog.stdlib.render_to_log_kwargs,
        "formatter": wrap,
        "text": structlog.processors.LogfmtRenderer(),
    }
    structlog.configure(
        processors=[structlog.stdlib.add_log_level, last[renderer]],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=structlog.processors.JSONRenderer()))
    logging.getLogger("app").addHandler(handler)
    try:
        raise ValueError("boom")
    except ValueError:
        with request():
            structlog.get_logger("app").warning("hello", customer=42, exc_info=renderer == "formatter")
    structlog.reset_defaults()
    (found,) = exported.records()
    assert found.log_record.trace_id == TRACE_ID
    if renderer != "text":
        assert found.log_record.body == "hello"
        attributes = attributes_of(found)
        assert (attributes["customer"], attributes["request_id"]) == (42, "order-7")
        assert not [name for name in attributes if name.startswith("_")]
        assert attributes.get("exception.type") == ("ValueError" if renderer == "formatter" else None)


@pytest.fixture
def sink() -> Iterator[io.StringIO]:
    loguru.logger.remove()
    out = io.StringIO()
    loguru.logger.add(out, format="{message}", level="INFO")
    yield out
    loguru.logger.remove()


@pytest.mark.parametrize("preset", ["otel", "ecs", "gcp", "datadog"])
def test_lines_of_loguru_arrive_once(preset: Any, exported: Exported, sink: io.StringIO) -> None:
    """
    A line of loguru's is exported once, however many sinks there are, as it is after the user's patchers.
    """
    logs.install(Settings(service_name="orders", log_preset=preset))
    loguru.logger.add(lambda _: None, level="DEBUG")
    logger = loguru.logger.patch(lambda record: record["extra"].update(card="hidden"))
    with request():
        identity.bind(tenant="acme")
        logger.bind(customer=42, card="4111").success("hello {}", 1)
    (found,) = exported.records()
    record = found.log_record
    assert (record.body, record.severity_text, record.trace_id) == ("hello 1", "SUCCESS", TRACE_ID)
    assert attributes_of(found) == {"request_id": "order-7", "customer": 42, "card": "hidden", "tenant": "acme"}
    assert (record.attributes or {})["code.function.name"] == "test_lines_of_loguru_arrive_once"
    assert sink.getvalue() == "hello 1\n"


def test_an_exception_of_loguru_arrives_with_the_stable_names(exported: Exported, sink: io.StringIO) -> None:
    """
    ``exception.type`` and ``exception.message``, without what a user sent.
    """
    try:
        raise queue.Full("bad input_value='ada@example.com', input_type=str]")
    except queue.Full:
        loguru.logger.exception("failed")
    (found,) = exported.records()
    assert attributes_of(found)["exception.message"] == "bad input_value=REDACTED, input_type=str]"


class Propagate(logging.Handler):
    """
    loguru's recipe for lines that logging writes.
    """

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger(record.name).handle(record)


class Intercept(logging.Handler):
    """
    loguru's recipe for records that it writes.
    """

    def emit(self, record: logging.LogRecord) -> None:
        loguru.logger.log(record.levelname, record.getMessage())


@pytest.mark.parametrize("enqueue", [True, False])
def test_lines_that_cross_from_loguru_to_logging_arrive_once(enqueue: bool, exported: Exported) -> None:
    """
    What loguru's sink for handlers gives to logging was exported, and is not exported again.
    """
    loguru.logger.remove()
    loguru.logger.add(Propagate(), format="{message}", enqueue=enqueue)
    with request():
        loguru.logger.warning("hello")
    loguru.logger.complete()
    loguru.logger.remove()
    assert exported.bodies() == ["hello"]
    assert exported.records()[0].log_record.trace_id == TRACE_ID


@pytest.mark.parametrize("queued", [True, False])
def test_records_that_cross_from_logging_to_loguru_arrive_once(
    queued: bool, exported: Exported, sink: io.StringIO
) -> None:
    """
    What loguru writes for logging was exported as the record that it is, and is not exported again.
    """
    records: queue.Queue[logging.LogRecord] = queue.Queue()
    listener = logging.handlers.QueueListener(records, Intercept())
    logging.getLogger("app").addHandler(logging.handlers.QueueHandler(records) if queued else Intercept())
    with request():
        logging.getLogger("app").warning("hello")
    listener.start()
    listener.stop()
    loguru.logger.info("own")
    assert exported.bodies() == ["hello", "own"]
    assert sink.getvalue() == "hello\nown\n"


def test_lines_of_others_obey_the_sampled_switch(sink: io.StringIO, printed: io.StringIO) -> None:
    """
    With ``sampled``, lines of structlog and loguru in unsampled traces stay local, too.
    """
    with pristine():
        exported = Exported(Settings(service_name="orders", logs_exporters=("otlp",), logs_export="sampled"))
        with request(sampled=False):
            loguru.logger.info("no")
            structlog.get_logger().info("no")
        with request():
            loguru.logger.info("yes")
            structlog.get_logger().info("yes")
        assert exported.bodies() == ["yes", "yes"]
