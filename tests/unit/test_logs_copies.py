"""
Which records are copies of one that was exported: what the record object carries decides, never its values.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import logging.handlers
import multiprocessing
import pickle
import queue
import time
from typing import TYPE_CHECKING, Any

import freezegun
import loguru
import pytest
import structlog
import time_machine
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor

from otel_correlation import logs
from otel_correlation.export import batching
from otel_correlation.settings import Settings
from tests.unit.logs_pristine import Keep, pristine, request

if TYPE_CHECKING:
    from collections.abc import Iterator

SETTINGS = Settings(service_name="orders", logs_exporters=("otlp",))
COUNT = 100


class Exported:
    """
    A provider whose exporter is a list.
    """

    def __init__(self, settings: Settings = SETTINGS) -> None:
        self.exporter = InMemoryLogRecordExporter()  # type: ignore[no-untyped-call]
        provider = LoggerProvider(shutdown_on_exit=False)
        provider.add_log_record_processor(SimpleLogRecordProcessor(self.exporter))
        logs.install(settings)
        logs.otlp_handler(provider, settings)

    def bodies(self) -> list[Any]:
        return [found.log_record.body for found in self.exporter.get_finished_logs()]


@pytest.fixture
def exported() -> Iterator[Exported]:
    with pristine():
        found = Exported()
        logging.root.setLevel(logging.INFO)
        yield found


def rows() -> list[str]:
    return [f"row {number} failed" for number in range(COUNT)]


def log_rows() -> None:
    logger = logging.getLogger("app")
    for number in range(COUNT):
        logger.info("row %d failed", number)


def test_all_records_of_a_frozen_clock_are_exported(exported: Exported) -> None:
    """
    A hundred records of one line of code, made while freezegun holds the clock, are a hundred records.
    """
    with freezegun.freeze_time("2026-01-01"):
        log_rows()
    assert exported.bodies() == rows()


def test_all_records_of_a_clock_that_a_library_in_c_holds_are_exported(exported: Exported) -> None:
    """
    As with freezegun, so with time-machine, which replaces the functions themselves.
    """
    with time_machine.travel("2026-01-01T00:00:00+00:00", tick=False):
        log_rows()
    assert exported.bodies() == rows()


def test_all_records_of_a_coarse_clock_are_exported(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Records of one tick of a clock that moves 64 times a second, as on Windows, are all exported, equal ones too.
    """
    real, real_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: real() // 0.0156 * 0.0156)
    monkeypatch.setattr(time, "time_ns", lambda: real_ns() // 15_600_000 * 15_600_000)
    log_rows()
    for _ in range(COUNT):
        logging.getLogger("app").info("the same")
    assert exported.bodies() == rows() + ["the same"] * COUNT


def test_all_records_with_times_of_somebody_else_are_exported(exported: Exported) -> None:
    """
    Records made of what another system logged, with whole seconds, are told apart, although nothing but the text differs.
    """
    logger = logging.getLogger("app")
    for number in range(COUNT):
        values = {
            "name": "browser",
            "levelno": 20,
            "levelname": "INFO",
            "msg": f"event {number}",
            "created": 1767225600.0,
        }
        logger.handle(logging.makeLogRecord({**values, "relativeCreated": 0, "msecs": 0.0}))
    assert exported.bodies() == [f"event {number}" for number in range(COUNT)]


def test_records_of_another_process_that_did_not_export_them_are_exported(exported: Exported) -> None:
    """
    What a process without an exporter logged and sent here arrives, whether or not that process has the ids.
    """
    logger = logging.getLogger("app")
    values = {"name": "worker", "levelno": 20, "levelname": "INFO", "process": 1, "created": 1.0}
    logger.handle(logging.makeLogRecord({**values, "msg": "plain"}))
    ids = {"trace_id": "", "span_id": "", "trace_flags": "", "request_id": "order-7", "service_name": "worker"}
    logger.handle(logging.makeLogRecord({**values, **ids, "msg": "with ids"}))
    assert exported.bodies() == ["plain", "with ids"]


@pytest.mark.parametrize("times", [1, 3])
def test_one_record_is_exported_once_however_many_loggers_and_handlers_see_it(times: int, exported: Exported) -> None:
    """
    The same record, handed on to other loggers by handlers on two levels, is exported once.
    """

    class Onward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            for number in range(times):
                logging.getLogger(f"other{number}").handle(record)

    logging.getLogger("app").addHandler(Onward())
    logging.getLogger("app.part").addHandler(Onward())
    logging.root.addHandler(Keep())
    logging.getLogger("app.part").info("hello")
    assert exported.bodies() == ["hello"]


@pytest.mark.parametrize(
    "how", ["a queue", "a queue of processes", "two queues", "copy", "deepcopy", "dict", "pickle", "socket"]
)
def test_a_copy_is_not_exported_again(how: str, exported: Exported) -> None:
    """
    Whatever copies a record, the copy says that it was exported; at a frozen instant, too, where all of them are equal.
    """
    kept = Keep()
    logger = logging.getLogger("app")
    logger.addHandler(kept)
    first: Any = multiprocessing.get_context("spawn").Queue() if how == "a queue of processes" else queue.Queue()
    if "queue" in how:
        logger.addHandler(logging.handlers.QueueHandler(first))
    with freezegun.freeze_time("2026-01-01"), request():
        for _ in range(3):
            logger.info("hello %d", 1)
    copies: list[logging.LogRecord]
    if "queue" in how:
        copies = [first.get(timeout=60) for _ in range(3)]
        if how == "two queues":
            handler = logging.handlers.QueueHandler(first)
            for found in copies:
                handler.handle(found)
            copies = [first.get(timeout=60) for _ in range(3)]
    elif how == "copy":
        copies = [copy.copy(found) for found in kept.records]
    elif how == "deepcopy":
        copies = [copy.deepcopy(found) for found in kept.records]
    elif how == "dict":
        copies = [logging.makeLogRecord(found.__dict__) for found in kept.records]
    elif how == "pickle":
        copies = [pickle.loads(pickle.dumps(found)) for found in kept.records]
    else:
        sender = logging.handlers.SocketHandler("127.0.0.1", 9)
        copies = [logging.makeLogRecord(pickle.loads(sender.makePickle(found)[4:])) for found in kept.records]
    logger.removeHandler(kept)
    for found in copies:
        logging.getLogger("forwarded").handle(found)
    assert exported.bodies() == ["hello 1"] * 3


def test_a_listener_that_hands_records_to_a_logger_exports_them_once(exported: Exported) -> None:
    """
    The recipe of the logging cookbook, a listener whose handler calls the record's own logger, doubles nothing.
    """

    class ToLogger(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logging.getLogger("worker." + record.name).handle(record)

    records: queue.Queue[Any] = queue.Queue()
    logging.getLogger("app").addHandler(logging.handlers.QueueHandler(records))
    listener = logging.handlers.QueueListener(records, ToLogger())
    listener.start()
    with freezegun.freeze_time("2026-01-01"):
        log_rows()
    listener.stop()
    assert exported.bodies() == rows()


def test_records_that_a_memory_handler_holds_back_are_exported_once(exported: Exported) -> None:
    """
    What a buffer gives to its target later was exported when it was logged, and is not exported again.
    """

    class ToLogger(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logging.getLogger("late").handle(record)

    memory = logging.handlers.MemoryHandler(1000, target=ToLogger())
    logger = logging.getLogger("app")
    logger.addHandler(memory)
    with freezegun.freeze_time("2026-01-01"):
        log_rows()
        memory.flush()
    assert exported.bodies() == rows()


def test_lines_that_loguru_intercepts_at_a_frozen_instant_are_exported_once(exported: Exported) -> None:
    """
    Equal lines that cross from logging to loguru, and from loguru to logging, are all exported, each once.
    """

    class Intercept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            loguru.logger.log(record.levelname, record.getMessage())

    class Propagate(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logging.getLogger("from.loguru").handle(record)

    loguru.logger.remove()
    loguru.logger.add(Propagate(), format="{message}")
    logging.getLogger("app").addHandler(Intercept())
    with freezegun.freeze_time("2026-01-01"):
        for _ in range(5):
            logging.getLogger("app").info("std")
            loguru.logger.info("loguru")
    loguru.logger.remove()
    assert exported.bodies() == ["std", "loguru"] * 5


def test_equal_events_of_structlog_at_a_frozen_instant_are_all_exported(exported: Exported) -> None:
    """
    Events that structlog prints, and events that it hands to logging, are exported each once, equal or not.
    """
    for factory in (structlog.PrintLoggerFactory(io.StringIO()), structlog.stdlib.LoggerFactory()):
        structlog.configure(processors=[structlog.processors.JSONRenderer()], logger_factory=factory)
        with freezegun.freeze_time("2026-01-01"):
            for _ in range(5):
                structlog.get_logger("app").info("hello")
    structlog.reset_defaults()
    assert len(exported.bodies()) == 10


def test_what_was_logged_while_exporting_is_not_exported_by_a_queues_listener(exported: Exported) -> None:
    """
    A copy of what the export itself logged would feed the next batch: it is not exported either.
    """
    records: queue.Queue[Any] = queue.Queue()
    handler = logging.handlers.QueueHandler(records)
    logging.root.addHandler(handler)
    exporting = batching._exporting.set(True)
    logging.getLogger("urllib3.connectionpool").warning("Retrying")
    batching._exporting.reset(exporting)
    logging.root.removeHandler(handler)
    logging.getLogger("listened").handle(records.get_nowait())
    assert exported.bodies() == []


def test_the_mark_of_a_record_shows_in_no_line() -> None:
    """
    What says that a record was exported is in no JSON line of ours and in no event that structlog makes of the record.
    """
    with pristine() as out:
        Exported()
        logs.settle()
        logging.getLogger("app").info("hello", extra={"shelf": 1})
        line = json.loads(out.getvalue().splitlines()[-1])
        own = io.StringIO()
        handler = logging.StreamHandler(own)
        handler.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                foreign_pre_chain=[structlog.stdlib.ExtraAdder()], processor=structlog.processors.JSONRenderer()
            )
        )
        logging.getLogger("own").addHandler(handler)
        logging.getLogger("own").warning("hello", extra={"shelf": 1})
    assert set(line) == {"timestamp", "level", "logger", "message", "service_name", "shelf"}
    assert {name for name in json.loads(own.getvalue()) if "otel" in name} == set()
