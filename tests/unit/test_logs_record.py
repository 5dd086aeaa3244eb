"""
Every record has the five fields, whoever made it and wherever it goes (contract point 6).
"""

from __future__ import annotations

import importlib.util
import logging
import logging.config
import logging.handlers
import pickle
import queue
import subprocess
import sys
import textwrap
import threading
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import context as otel_context
from opentelemetry.trace import INVALID_SPAN_CONTEXT, NonRecordingSpan, SpanContext, set_span_in_context

from otel_correlation import guard, identity, logs
from otel_correlation.settings import Settings
from tests.unit.logs_pristine import SPAN_TEXT, TRACE_TEXT, Keep, pristine, request

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SETTINGS = Settings(service_name="orders")
FORMATS = [
    ("%", "%(trace_id)s %(span_id)s %(trace_flags)s %(request_id)s %(service_name)s %(message)s"),
    ("{", "{trace_id} {span_id} {trace_flags} {request_id} {service_name} {message}"),
    ("$", "$trace_id $span_id ${trace_flags} $request_id $service_name $message"),
]
LINE = f"{TRACE_TEXT} {SPAN_TEXT} 01 order-7 orders hello"


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    found = logging.getLogger("tests.logs.record")
    found.propagate = False
    found.setLevel(logging.DEBUG)
    logs.install(SETTINGS)
    yield found
    logs.uninstall()
    found.handlers.clear()
    found.filters.clear()


def keep(logger: logging.Logger, formatter: logging.Formatter | None = None) -> Keep:
    handler = Keep(formatter)
    logger.addHandler(handler)
    return handler


def fields(record: logging.LogRecord) -> tuple[Any, ...]:
    found = record.__dict__
    return tuple(found[name] for name in ("trace_id", "span_id", "trace_flags", "request_id", "service_name"))


@pytest.mark.parametrize(("style", "fmt"), FORMATS)
def test_every_format_style_reads_the_fields(style: Any, fmt: str, logger: logging.Logger) -> None:
    """
    ``%``, ``{`` and ``$`` formats show trace id, span id, flags, request id and service.
    """
    kept = keep(logger, logging.Formatter(fmt, style=style))
    with request():
        logger.info("hello")
    assert kept.lines == [LINE]


def test_outside_of_a_request_the_fields_are_empty(logger: logging.Logger) -> None:
    """
    A line that no request caused has the fields, empty: a format that names them never fails.
    """
    kept = keep(logger, logging.Formatter(FORMATS[0][1]))
    thread = threading.Thread(target=logger.info, args=("hello",))
    thread.start()
    thread.join()
    assert kept.lines == ["    orders hello"]


def test_an_unsampled_trace_has_ids_in_lines(logger: logging.Logger) -> None:
    """
    Ids are on the lines of traces that are not sampled, with the flag that says so.
    """
    kept = keep(logger)
    with request(sampled=False):
        logger.info("hello")
    assert fields(kept.records[0]) == (TRACE_TEXT, SPAN_TEXT, "00", "order-7", "orders")


@pytest.mark.parametrize("name", ["request_id", "trace_id", "span_id", "trace_flags", "service_name"])
def test_the_users_own_extra_wins_and_never_raises(name: str, logger: logging.Logger) -> None:
    """
    ``extra={"request_id": ...}`` (or any of the five) in user code does not raise, and its value stays.
    """
    kept = keep(logger)
    with request():
        logger.info("hello", extra={name: "mine"})
    assert kept.records[0].__dict__[name] == "mine"


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_applications_record_factory_keeps_working(when: str) -> None:
    """
    A record factory that the application sets, before or after us, still adds its fields, and ours are there too.
    """
    plain = logging.getLogRecordFactory()

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = plain(*args, **kwargs)
        record.tenant = "acme"
        return record

    with pristine():
        if when == "before":
            logging.setLogRecordFactory(factory)
        logs.install(SETTINGS)
        if when == "after":
            logging.setLogRecordFactory(factory)
        kept = keep(logging.getLogger())
        with request():
            logging.getLogger("app").warning("hello", extra={"request_id": "mine"})
    assert kept.records[0].__dict__["tenant"] == "acme"
    assert fields(kept.records[0]) == (TRACE_TEXT, SPAN_TEXT, "01", "mine", "orders")


def test_filters_see_the_fields(logger: logging.Logger) -> None:
    """
    Filters of loggers and handlers can decide by the ids.
    """
    kept = keep(logger)
    logger.addFilter(lambda record: record.__dict__["request_id"] == "order-7")
    kept.addFilter(lambda record: record.__dict__["trace_id"] == TRACE_TEXT)
    logger.info("hello")
    with request():
        logger.info("hello")
    assert len(kept.records) == 1


def test_a_queue_keeps_the_ids_of_where_the_line_was_written(logger: logging.Logger) -> None:
    """
    Behind ``QueueHandler`` and ``QueueListener`` a line has the ids of the request that wrote it.
    """
    kept = Keep(logging.Formatter(FORMATS[0][1]))
    records: queue.Queue[logging.LogRecord] = queue.Queue()
    listener = logging.handlers.QueueListener(records, kept)
    logger.addHandler(logging.handlers.QueueHandler(records))
    with request():
        logger.info("hello")
    with request("another", trace_id=5):
        listener.start()
        listener.stop()
    assert kept.lines == [LINE]


def test_another_process_sees_the_original_ids(logger: logging.Logger) -> None:
    """
    A record pickled to another correlated process (``SocketHandler``) keeps its ids when that process handles it.
    """
    kept = keep(logger)
    with request():
        logger.info("hello")
    script = """
        import logging, pickle, sys
        from otel_correlation import logs
        from otel_correlation.settings import Settings
        logs.install(Settings(service_name="sink"))
        logging.basicConfig(stream=sys.stdout, format=sys.argv[1], level=0)
        record = logging.makeLogRecord(pickle.load(sys.stdin.buffer))
        logging.getLogger(record.name).handle(record)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), FORMATS[0][1]],
        input=pickle.dumps(kept.records[0].__dict__),
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode().splitlines() == [LINE]


def test_a_logger_class_of_the_application_is_covered() -> None:
    """
    Loggers of a custom class have the fields, with a ``handle`` of their own, too.
    """

    class Calling(logging.Logger):
        def handle(self, record: logging.LogRecord) -> None:
            record.seen = True
            super().handle(record)

    class Replacing(logging.Logger):
        def handle(self, record: logging.LogRecord) -> None:
            self.callHandlers(record)

    for kind in (Calling, Replacing):
        with pristine():
            logs.install(SETTINGS)
            logger = kind("app")
            kept = keep(logger)
            with request():
                logger.warning("hello")
        assert fields(kept.records[0])[0] == TRACE_TEXT, kind


@pytest.mark.parametrize("way", ["handle", "emit", "format"])
def test_a_record_made_by_hand_has_the_fields(way: str, logger: logging.Logger) -> None:
    """
    A record that no logger made can be given to a handler or a formatter that names the fields.
    """
    kept = Keep(logging.Formatter(FORMATS[0][1]))
    record = logging.makeLogRecord({"msg": "hello"})
    with request():
        line = kept.format(record) if way == "format" else getattr(kept, way)(record) and ""
    assert line == LINE or kept.lines == [LINE]


def test_the_line_of_an_escaped_exception_has_the_ids_of_its_request(logger: logging.Logger) -> None:
    """
    What the server logs about an exception after the request's context is gone names the request that raised it.
    """
    kept = keep(logger)
    try:
        with request():
            try:
                raise ValueError("inner")
            except ValueError as error:
                identity.stash(error)
                raise
    except ValueError as error:
        logger.exception("Exception in ASGI application")
        wrapped = RuntimeError("outer")
        wrapped.__cause__ = error
    logger.error("later", exc_info=wrapped)
    with request("another", trace_id=5):
        logger.error("elsewhere", exc_info=wrapped)
    expected = (TRACE_TEXT, SPAN_TEXT, "01", "order-7", "orders")
    assert [fields(record) for record in kept.records[:2]] == [expected, expected]
    assert fields(kept.records[2])[3] == "another"


def test_a_traceback_that_a_server_writes_as_text_has_the_ids_of_its_request(logger: logging.Logger) -> None:
    """
    A server that logs an escaped exception without ``exc_info`` (Granian) is understood while it handles the exception.
    """
    kept = keep(logger)
    try:
        with request():
            try:
                raise ValueError("inner")
            except ValueError as error:
                identity.stash(error)
                raise
    except ValueError:
        logger.error("Application callable raised an exception\nTraceback ...")
        logger.info("what else is done then tells of no failure")
        with request("another", trace_id=5):
            logger.error("elsewhere")
    logger.error("later")
    shown = [(found[0], found[3]) for found in map(fields, kept.records)]
    assert shown == [(TRACE_TEXT, "order-7"), ("", ""), (f"{5:032x}", "another"), ("", "")]


def test_bound_fields_are_on_every_later_record_of_the_request(logger: logging.Logger) -> None:
    """
    ``bind`` puts fields on later records and replaces nothing that a record has.
    """
    kept = keep(logger)
    with request():
        logger.info("before")
        identity.bind(customer=42, name="not the logger's", trace_id="no", asked="bound")
        logger.info("after", extra={"asked": "extra"})
    logger.info("outside")
    before, after, outside = kept.records
    assert "customer" not in before.__dict__
    assert "customer" not in outside.__dict__
    found = after.__dict__
    assert (found["customer"], found["name"], found["asked"]) == (42, logger.name, "extra")
    assert found["trace_id"] == TRACE_TEXT


def test_contribs_names_are_there_when_asked_for(logger: logging.Logger) -> None:
    """
    With ``OTEL_PYTHON_LOG_CORRELATION=true`` format strings written for contrib's fields show contrib's values.
    """
    logs.install(Settings(service_name="orders", log_correlation=True))
    fmt = "%(otelTraceID)s %(otelSpanID)s %(otelTraceSampled)s %(otelServiceName)s"
    kept = keep(logger, logging.Formatter(fmt))
    with request():
        logger.info("hello")
    with request(sampled=False):
        logger.info("hello")
    logger.info("hello")
    assert kept.lines == [
        f"{TRACE_TEXT} {SPAN_TEXT} True orders",
        f"{TRACE_TEXT} {SPAN_TEXT} False orders",
        "0 0 False orders",
    ]


def test_contribs_names_are_not_there_otherwise(logger: logging.Logger) -> None:
    """
    Records are not filled with names that nobody asked for.
    """
    kept = keep(logger)
    logger.info("hello")
    assert not [name for name in kept.records[0].__dict__ if name.startswith("otel")]


@pytest.mark.parametrize("installed", [True, False])
def test_formats_of_asgi_correlation_id_keep_working(
    installed: bool, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    ``%(correlation_id)s`` shows the request id where asgi-correlation-id is installed, and only there.
    """
    find = importlib.util.find_spec

    def found(name: str, *rest: Any) -> Any:
        return (object() if installed else None) if name == "asgi_correlation_id" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    logs.install(SETTINGS)
    kept = keep(logger, logging.Formatter("%(correlation_id)s") if installed else None)
    with request():
        logger.info("hello")
    logger.info("hello")
    assert [record.__dict__.get("correlation_id", "none") for record in kept.records] == (
        ["order-7", None] if installed else ["none", "none"]
    )
    assert kept.lines == (["order-7", "None"] if installed else ["hello", "hello"])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["basicConfig", "dictConfig", "fileConfig", "handlers"])
def test_an_applications_configuration_shows_the_fields(how: str, when: str, tmp_path: Path) -> None:
    """
    ``basicConfig``, ``dictConfig``, ``fileConfig`` or handlers, before or after us, do what they do without us.
    """
    fmt = "%(levelname)s %(request_id)s %(message)s"
    target = tmp_path / "app.log"

    def configure() -> None:
        if how == "basicConfig":
            logging.basicConfig(filename=target, format=fmt, level=logging.DEBUG)
        elif how == "dictConfig":
            logging.config.dictConfig(
                {
                    "version": 1,
                    "formatters": {"app": {"format": fmt}},
                    "handlers": {"app": {"class": "logging.FileHandler", "filename": str(target), "formatter": "app"}},
                    "root": {"level": "DEBUG", "handlers": ["app"]},
                }
            )
        elif how == "fileConfig":
            config = tmp_path / "logging.ini"
            config.write_text(
                "[loggers]\nkeys=root\n[handlers]\nkeys=app\n[formatters]\nkeys=app\n"
                "[logger_root]\nlevel=DEBUG\nhandlers=app\n"
                f"[handler_app]\nclass=FileHandler\nargs=({str(target)!r},)\nformatter=app\n"
                f"[formatter_app]\nformat={fmt}\n"
            )
            logging.config.fileConfig(config)
        else:
            handler = logging.FileHandler(target)
            handler.setFormatter(logging.Formatter(fmt))
            logging.root.addHandler(handler)
            logging.root.setLevel(logging.DEBUG)

    with pristine() as out:
        if when == "before":
            configure()
        logs.install(SETTINGS)
        if when == "after":
            logs.settle()
            configure()
        logs.settle()
        with request():
            logging.getLogger(f"made.later.{tmp_path.name}").debug("hello")
        for handler in logging.root.handlers:
            handler.close()
    assert target.read_text().splitlines() == ["DEBUG order-7 hello"]
    assert out.getvalue() == ""


def test_a_broken_span_never_reaches_user_code(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A span of somebody else that raises costs the ids of one line, which is counted, and nothing else.
    """

    class Broken(NonRecordingSpan):
        def get_span_context(self) -> SpanContext:
            raise OSError

    monkeypatch.delenv(guard.STRICT_ENV)
    kept = keep(logger, logging.Formatter(FORMATS[0][1]))
    token = otel_context.attach(set_span_in_context(Broken(INVALID_SPAN_CONTEXT)))
    logger.info("hello", extra={"request_id": "mine"})
    otel_context.detach(token)
    assert kept.lines == ["   mine  hello"]
    assert guard.counters()["internal_error.logs.fields"] == 1


def test_ids_of_many_spans_do_not_mix(logger: logging.Logger) -> None:
    """
    However many requests log in turns, each line has the ids of its own; what is remembered for speed is bounded.
    """
    kept = keep(logger)
    for number in [*range(1, 300), *range(1, 300)]:
        with request(f"order-{number}", trace_id=number):
            logger.info("hello")
    ids = [(int(record.__dict__["trace_id"], 16), record.__dict__["request_id"]) for record in kept.records]
    assert ids == [(number, f"order-{number}") for number in [*range(1, 300), *range(1, 300)]]


def test_uninstall_restores_logging() -> None:
    """
    After ``uninstall`` the classes of ``logging`` are as they were found, however often we were installed.
    """
    names = ((logging.Logger, ("handle", "callHandlers", "addHandler")), (logging.Handler, ("handle",)))
    before = [getattr(owner, name) for owner, attributes in names for name in attributes]
    with pristine():
        level, last = logging.root.level, logging.lastResort
        logs.install(SETTINGS)
        logs.install(SETTINGS)
        logs.settle()
        logs.uninstall()
        assert (logging.root.level, logging.lastResort) == (level, last)
        assert logging.getLogger("httpx").level == logging.NOTSET
    assert [getattr(owner, name) for owner, attributes in names for name in attributes] == before
    record = logging.makeLogRecord({"levelno": logging.INFO})
    logging.getLogger("nobody").handle(record)
    assert "trace_id" not in record.__dict__


def test_a_wrapper_that_somebody_put_around_ours_stays_harmless() -> None:
    """
    Another library that wrapped ``callHandlers`` after us keeps its wrapper, and nothing happens twice after a new start.
    """
    with pristine():
        plain = logging.Logger.callHandlers
        logs.install(SETTINGS)
        ours = logging.Logger.callHandlers
        calls: list[str] = []

        def theirs(self: logging.Logger, record: logging.LogRecord) -> None:
            calls.append(record.getMessage())
            ours(self, record)

        logging.Logger.callHandlers = theirs  # type: ignore[method-assign]  # what such a library does
        logs.uninstall()
        logs.install(SETTINGS)
        kept = keep(logging.getLogger("app"))
        logging.getLogger("app").warning("hello")
        assert (calls, len(kept.records)) == (["hello"], 1)
        logging.Logger.callHandlers = ours  # type: ignore[method-assign]
        logs.uninstall()
        assert logging.Logger.callHandlers is plain
