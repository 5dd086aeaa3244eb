"""
loguru's records carry the ids in ``extra``, with nothing to change in the application and nothing taken from it.
"""

from __future__ import annotations

import inspect
import io
import json
import logging
import logging.handlers
import queue
import re
import subprocess
import sys
import textwrap
import threading
from typing import TYPE_CHECKING, Any

import pytest
from loguru import logger

from otel_correlation import guard, identity, logs
from otel_correlation.settings import Settings
from tests.unit.logs_planted import PASSWORD, fail
from tests.unit.logs_pristine import IDS, SPAN_TEXT, TRACE_TEXT, Keep, pristine, request

if TYPE_CHECKING:
    from collections.abc import Iterator

SETTINGS = Settings(service_name="orders")
EMPTY = {**dict.fromkeys(IDS, ""), "service_name": "orders"}


class Sink:
    """
    What a loguru sink got.
    """

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def __call__(self, message: Any) -> None:
        self.messages.append(message)

    @property
    def extras(self) -> list[dict[str, Any]]:
        return [dict(message.record["extra"]) for message in self.messages]


@pytest.fixture(autouse=True)
def sink() -> Iterator[Sink]:
    with pristine():
        logs.install(SETTINGS)
        logger.remove()
        found = Sink()
        logger.add(found, format="{extra[request_id]}|{extra[trace_id]}|{message}", diagnose=False)
        yield found
        logger.remove()
        core: Any = logger
        core._core.extra = {}
        core._core.patcher = None


def test_a_line_has_the_ids(sink: Sink) -> None:
    """
    ``{extra[request_id]}`` works in a format, and every record's ``extra`` has the five fields.
    """
    with request():
        logger.info("hello {}", 1)
    assert [str(message) for message in sink.messages] == [f"order-7|{TRACE_TEXT}|hello 1\n"]
    assert sink.extras == [IDS]


def test_outside_of_a_request_the_fields_are_there_and_empty(sink: Sink) -> None:
    """
    A format that names a field never fails: outside of a request it is empty.
    """
    logger.info("hello")
    assert [str(message) for message in sink.messages] == ["||hello\n"]
    assert sink.extras == [EMPTY]


def test_serialized_lines_have_the_ids() -> None:
    """
    ``serialize=True`` shows the ids in ``record.extra``, once.
    """
    out = io.StringIO()
    logger.add(out, serialize=True)
    with request():
        logger.info("hello")
    assert out.getvalue().count(SPAN_TEXT) == 1
    assert json.loads(out.getvalue())["record"]["extra"] == IDS


@pytest.mark.parametrize("how", ["bind", "contextualize", "patch", "patcher", "argument", "assigned"])
def test_a_value_that_the_user_set_wins(how: str, sink: Sink) -> None:
    """
    ``bind``, ``contextualize``, ``patch``, ``configure(patcher=...)`` and arguments keep their ``request_id``.
    """

    def mine(record: Any) -> None:
        assert record["extra"]["trace_id"] == TRACE_TEXT, "a patcher of the user's sees the ids"
        record["extra"]["request_id"] = "mine"

    if how == "patcher":
        logger.configure(patcher=mine)
    with request():
        if how == "contextualize":
            with logger.contextualize(request_id="mine"):
                logger.info("hello")
        elif how == "bind":
            logger.bind(request_id="mine").info("hello")
        elif how == "patch":
            logger.patch(mine).info("hello")
        elif how == "argument":
            logger.info("hello", request_id="mine")
        elif how == "assigned":
            logger.patch(lambda record: record["extra"].update(request_id="mine")).info("hello")
        else:
            logger.info("hello")
    assert sink.extras == [{**IDS, "request_id": "mine"}]


def test_the_users_patcher_is_kept(sink: Sink) -> None:
    """
    ``configure(patcher=...)`` before us, after us and once more works as ever, and what is read can be set again.
    """
    core: Any = logger
    logs.uninstall()
    logger.configure(patcher=lambda record: record["extra"].update(first=1))
    logs.install(SETTINGS)
    logger.add(sink, format="{message}")
    with request():
        logger.info("one")
        core._core.patcher = core._core.patcher
        logger.info("two")
        logger.configure(patcher=lambda record: record["extra"].update(second=2))
        logger.info("three")
    shown = [extra for extra, message in zip(sink.extras, sink.messages, strict=True) if "|" not in message]
    assert shown == [{**IDS, "first": 1}, {**IDS, "first": 1}, {**IDS, "second": 2}]
    logs.uninstall()
    logger.info("four")
    assert sink.extras[-1] == {"second": 2}


def test_defaults_of_configure_give_way_to_ids(sink: Sink) -> None:
    """
    ``configure(extra={"request_id": "-"})`` is what lines without a request show; inside of one the id is shown.
    """
    logger.configure(extra={"request_id": "-", "tenant": "acme"})
    logger.info("outside")
    with request():
        logger.info("inside")
    assert [extra["request_id"] for extra in sink.extras] == ["-", "order-7"]
    assert [extra["tenant"] for extra in sink.extras] == ["acme", "acme"]


def test_bound_fields_of_the_request_are_there(sink: Sink) -> None:
    """
    ``otel_correlation.bind`` reaches loguru's records and replaces nothing in them.
    """
    with request():
        identity.bind(tenant="acme", plan="gold")
        logger.bind(plan="free").info("hello")
    assert sink.extras == [{**IDS, "tenant": "acme", "plan": "free"}]


def test_a_queue_keeps_the_ids_of_the_call() -> None:
    """
    With ``enqueue=True`` the worker thread writes the ids of the call, under a preset, too.
    """
    for preset, key in (("otel", "request_id"), ("ecs", "http.request.id")):
        logs.install(Settings(service_name="orders", log_preset=preset))  # type: ignore[arg-type]
        threads: set[int] = set()
        found: list[Any] = []

        def write(message: Any, found: list[Any] = found, threads: set[int] = threads) -> None:
            threads.add(threading.get_ident())
            found.append(message.record["extra"])

        added = logger.add(write, format="{extra[request_id]} {message}", enqueue=True)
        for number in range(5):
            with request(f"order-{number}"):
                logger.info("hello")
        logger.complete()
        logger.remove(added)
        assert [extra[key] for extra in found] == [f"order-{number}" for number in range(5)]
        assert threads.isdisjoint({threading.get_ident()})


def test_the_callers_place_in_the_code_stays(sink: Sink) -> None:
    """
    Name, function and line of a record are the user's; ``opt(depth=...)`` counts as ever.
    """
    logger.info("hello")
    logger.opt(depth=0).info("hello")
    names = {(message.record["function"], message.record["name"]) for message in sink.messages}
    assert names == {("test_the_callers_place_in_the_code_stays", __name__)}


def test_catch_logs_with_the_ids(sink: Sink) -> None:
    """
    ``logger.catch()`` as decorator and as context logs with the ids, and says where.
    """

    @logger.catch
    def broken() -> None:
        raise ValueError("boom")

    with request():
        broken()
        with logger.catch(message="caught"):
            raise ValueError("boom")
    assert sink.extras == [IDS, IDS]
    assert "ValueError: boom" in str(sink.messages[0])


def test_an_escaped_exception_has_the_ids_of_its_request(sink: Sink) -> None:
    """
    An exception that left its request is logged with that request's ids.
    """
    try:
        with request():
            try:
                raise ValueError("boom")
            except ValueError as error:
                identity.stash(error)
                raise
    except ValueError:
        logger.exception("later")
    assert sink.extras == [IDS]


# -- between loguru and logging


class InterceptHandler(logging.Handler):
    """
    Gives logging's records to loguru, finding the caller as loguru's documentation does.
    """

    def emit(self, record: logging.LogRecord) -> None:
        level: str | int
        try:
            level = logger.level(record.levelname).name
        except ValueError:
            level = record.levelno
        frame, depth = inspect.currentframe(), 0
        while frame and (depth == 0 or frame.f_code.co_filename == logging.__file__):
            frame = frame.f_back
            depth += 1
        logger.opt(depth=depth, exception=record.exc_info).log(level, record.getMessage())


class PropagateHandler(logging.Handler):
    """
    Gives loguru's records to logging.
    """

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger(record.name).handle(record)


def test_intercepted_records_have_ids_and_their_own_place(sink: Sink) -> None:
    """
    A record of logging that loguru writes has the ids once, and the function that logged it, not one of ours.
    """
    logging.basicConfig(handlers=[InterceptHandler()], level=0, force=True)
    with request():
        logging.getLogger("app").warning("plain %s", 1)
    (message,) = sink.messages
    assert message.record["function"] == "test_intercepted_records_have_ids_and_their_own_place"
    assert message.record["name"] == __name__
    assert sink.extras == [IDS]


def test_intercepted_records_behind_a_queue_keep_their_ids(sink: Sink) -> None:
    """
    A record that reaches loguru in another thread has the ids of where it was written.
    """
    records: queue.Queue[logging.LogRecord] = queue.Queue()
    listener = logging.handlers.QueueListener(records, InterceptHandler())
    logging.getLogger("app").addHandler(logging.handlers.QueueHandler(records))
    with request():
        logging.getLogger("app").warning("plain")
    listener.start()
    listener.stop()
    assert sink.extras == [IDS]


@pytest.mark.parametrize("enqueue", [True, False])
@pytest.mark.parametrize("preset", ["otel", "ecs", "gcp", "datadog"])
def test_propagated_records_have_the_ids_once(preset: Any, enqueue: bool) -> None:
    """
    A line of loguru's that logging writes is a record with the five fields, those of the call, each once in our lines.
    """
    logs.install(Settings(service_name="orders", log_preset=preset))
    kept = Keep(logs.JsonLines())
    logging.getLogger().addHandler(kept)
    added = logger.add(PropagateHandler(), format="{message}", enqueue=enqueue)
    with request():
        logger.bind(customer=42).warning("hello")
    logger.complete()
    logger.remove(added)
    (record,) = kept.records
    assert {name: record.__dict__[name] for name in IDS} == IDS
    assert kept.lines[0].count("order-7") == 1
    assert json.loads(kept.lines[0])["customer"] == 42
    assert "extra" not in json.loads(kept.lines[0])


# -- exceptions


@pytest.mark.parametrize("kind", ["pydantic", "sqlalchemy", "cause"])
@pytest.mark.parametrize("serialize", [True, False])
def test_exceptions_lose_what_a_user_sent(kind: str, serialize: bool, sink: Sink) -> None:
    """
    A planted password is in no traceback that loguru writes; the exception itself is untouched.
    """
    out = io.StringIO()
    logger.add(out, serialize=serialize, diagnose=False, backtrace=True)
    try:
        fail(kind)
    except Exception:
        logger.exception("failed")
    text = out.getvalue()
    assert PASSWORD not in text
    assert "REDACTED" in text
    if serialize:
        json.loads(text)
    assert PASSWORD not in "".join(sink.messages)
    value = sink.messages[0].record["exception"].value
    assert PASSWORD in str(value.__cause__ or value)


def test_texts_of_exceptions_in_warnings_lose_what_a_user_sent(sink: Sink) -> None:
    """
    ``logger.error(f"failed: {e}")`` and an exception among its fields show no password; what was bound stays as it is.
    """
    out = io.StringIO()
    logger.add(out, serialize=True)
    bound: dict[str, Any] = {}
    try:
        fail("pydantic")
    except ValueError as error:
        bound.update(error=error, text=str(error))
        logger.bind(**bound).error(f"failed: {error}", again=str(error))
    assert PASSWORD not in out.getvalue() + "".join(sink.messages)
    assert out.getvalue().count("input_value=REDACTED") == 5  # the text, the message, three fields
    assert PASSWORD in str(bound["error"])
    assert PASSWORD in bound["text"]


def test_exceptions_without_secrets_are_shown_as_they_are() -> None:
    """
    A traceback that quotes nothing is the very text that loguru makes without us.
    """

    def shown() -> str:
        out = io.StringIO()
        added = logger.add(out, format="{message}", diagnose=False, backtrace=True, colorize=True)
        try:
            raise KeyError("a")
        except KeyError:
            logger.exception("failed")
        logger.remove(added)
        return out.getvalue()

    logger.remove()
    made = []
    for install in (True, False):
        if not install:
            logs.uninstall()
        made.append(shown())
    ours, theirs = made
    assert re.sub(r"\d+", "", ours) == re.sub(r"\d+", "", theirs)


# -- presets, bad luck, start


@pytest.mark.parametrize("preset", ["ecs", "gcp", "datadog"])
def test_presets_rename_what_is_shown_and_keep_formats(preset: Any) -> None:
    """
    Under a preset ``serialize`` shows its names, once, and ``{extra[request_id]}`` goes on to work.
    """
    logs.install(Settings(service_name="orders", log_preset=preset))
    lines, formatted = io.StringIO(), io.StringIO()
    logger.remove()
    logger.add(lines, serialize=True, format="-")
    logger.add(formatted, format="{extra[request_id]} {extra[trace_id]} {message}")
    with request():
        logger.info("hello")
    logger.info("outside")
    extra = json.loads(lines.getvalue().splitlines()[0])["record"]["extra"]
    assert "trace_id" not in extra
    assert lines.getvalue().count("order-7") == 1
    assert formatted.getvalue().splitlines() == [f"order-7 {TRACE_TEXT} hello", "  outside"]
    logger.remove()
    logger.add(lambda message: message.record["extra"]["no such"], catch=False)
    with pytest.raises(KeyError):
        logger.info("hello")


def test_renames_are_used(sink: Sink) -> None:
    """
    ``OTEL_CORRELATION_LOG_FIELDS`` renames what loguru's records get.
    """
    logs.install(Settings(service_name="orders", log_fields=("request_id=req", "trace_id=traceId")))
    with request():
        logger.info("hello")
    assert (sink.extras[0]["req"], sink.extras[0]["traceId"]) == ("order-7", TRACE_TEXT)
    assert "request_id" not in sink.extras[0]


def test_a_failure_of_ours_costs_the_fields_only(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Whatever goes wrong in our patcher, the line is written.
    """
    monkeypatch.delenv("OTEL_CORRELATION_STRICT", raising=False)
    before = guard.counters().get("internal_error.logs.loguru", 0)
    logger.add(sink, format="{message}")

    class Odd(dict[str, Any]):
        def __contains__(self, key: object) -> bool:
            raise RuntimeError("odd")

    core: Any = logger
    core._core.extra = Odd(request_id="-")
    with request():
        logger.info("hello")
    assert "hello\n" in [str(message) for message in sink.messages]
    assert guard.counters()["internal_error.logs.loguru"] > before


def test_uninstalling_leaves_loguru_as_it_was(sink: Sink) -> None:
    """
    After ``uninstall`` a line has nothing of ours, and ``serialize`` works as before.
    """
    logs.uninstall()
    out = io.StringIO()
    logger.add(out, serialize=True)
    with request():
        logger.opt(exception=ValueError("x")).info("hello")
    assert json.loads(out.getvalue())["record"]["extra"] == {}
    assert json.loads(out.getvalue())["record"]["exception"]["value"] == "x"


@pytest.mark.parametrize("first", ["loguru", "ours"])
def test_the_order_of_imports_does_not_matter(first: str) -> None:
    """
    Imported before or after we are installed, loguru is covered, and costs nothing where it is not imported.
    """
    script = f"""
        import sys
        from otel_correlation import logs
        from otel_correlation.settings import Settings
        if {first == "loguru"!r}:
            import loguru
        logs.install(Settings(service_name="orders"))
        assert ("otel_correlation.logs.loguru" in sys.modules) is {first == "loguru"!r}
        assert "structlog" not in sys.modules
        from loguru import logger
        logger.remove()
        logger.add(sys.stdout, format="{{extra[service_name]}} {{message}}")
        logger.info("hello")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, check=True)
    assert done.stdout.decode().splitlines() == ["orders hello"]
