"""
Lines of ours appear only where the application configured no logging, and never twice.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import logging.config
import logging.handlers
import queue
import subprocess
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from _pytest.logging import LogCaptureHandler
from opentelemetry._logs import NoOpLoggerProvider
from uvicorn.config import LOGGING_CONFIG

from otel_correlation import guard, logs
from otel_correlation.settings import Settings, from_environment
from tests.unit.logs_pristine import TRACE_TEXT, Keep, pristine, request

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = Settings(service_name="orders")


def uvicorn_starts(**changes: Any) -> None:
    """
    Configure logging as uvicorn does at its start.
    """
    logging.config.dictConfig({**copy.deepcopy(LOGGING_CONFIG), **changes})


def lines(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def messages(out: io.StringIO) -> list[str]:
    return [line["message"] for line in lines(out)]


def access_line() -> None:
    logging.getLogger("uvicorn.access").info('%s - "%s %s HTTP/%s" %d', "127.0.0.1:1", "GET", "/?q=1", "1.1", 200)


def test_info_lines_of_an_application_without_logging_are_visible() -> None:
    """
    An application that configured nothing sees its INFO lines, as JSON with its ids, on a stdout that is no terminal.
    """
    with pristine() as out:
        logs.install(SETTINGS)
        logs.settle()
        with request():
            logging.getLogger("app").info("hello", extra={"customer": 42})
        logging.getLogger("app").debug("too much")
    (line,) = lines(out)
    assert (line["message"], line["trace_id"], line["request_id"], line["customer"]) == (
        "hello",
        TRACE_TEXT,
        "order-7",
        42,
    )


def test_a_terminal_gets_readable_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Where stdout is a terminal the lines are for eyes, coloured unless ``NO_COLOR`` says otherwise.
    """

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    shown = []
    for _ in range(2):
        with pristine():
            monkeypatch.setattr(sys, "stdout", terminal := Terminal())
            logs.install(SETTINGS)
            logs.settle()
            logging.getLogger("app").warning("hello")
            shown.append(terminal.getvalue())
            monkeypatch.undo()
            monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[33mWARNING" in shown[0]
    assert "hello" in shown[0]
    assert "\x1b" not in shown[1]
    assert "WARNING" in shown[1]


@pytest.mark.parametrize(("fmt", "start"), [("json", "{"), ("text", "0"), ("none", "")])
def test_the_format_can_be_set(fmt: Any, start: str) -> None:
    """
    ``OTEL_CORRELATION_LOG_FORMAT`` names the format; ``none`` leaves logging alone.
    """
    with pristine() as out:
        last = logging.lastResort
        logs.install(Settings(log_format=fmt))
        logs.settle()
        logging.getLogger("app").info("hello")
        if fmt == "none":
            assert (out.getvalue(), logging.root.level, logging.lastResort) == ("", logging.WARNING, last)
    text = out.getvalue()
    assert "hello" in text or fmt == "none"
    assert text[:1] == start or (start == "0" and text[:1].isdigit())


def test_before_the_decision_logging_is_as_without_us(capsys: pytest.CaptureFixture[str]) -> None:
    """
    While the application is imported, nothing of ours is written: its ``basicConfig`` may still come.
    """
    with pristine() as out:
        last = logging.lastResort
        logs.install(SETTINGS)
        logging.getLogger("app").info("importing")
        assert logging.lastResort is last
        logging.basicConfig(stream=out, format="%(message)s %(request_id)s|")
        logs.settle()
        logging.getLogger("app").info("dropped by the application's own level")
        logging.getLogger("app").warning("hello")
    assert out.getvalue() == "hello |\n"


@pytest.mark.parametrize("level", [None, logging.INFO, logging.DEBUG])
def test_basic_config_after_the_decision_takes_over(level: int | None) -> None:
    """
    ``basicConfig()`` in a start-up handler works as without us: its format, its level, each line once.
    """
    with pristine() as out:
        logs.install(SETTINGS)
        logs.settle()
        logging.getLogger("app").info("ours")
        theirs = io.StringIO()
        logging.basicConfig(stream=theirs, format="%(levelname)s %(message)s", level=level)
        for name in ("debug", "info", "warning"):
            getattr(logging.getLogger("app"), name)("theirs")
    shown = {None: ["WARNING"], logging.INFO: ["INFO", "WARNING"], logging.DEBUG: ["DEBUG", "INFO", "WARNING"]}[level]
    assert theirs.getvalue().splitlines() == [f"{name} theirs" for name in shown]
    assert messages(out) == ["ours"]


def test_basic_config_takes_over_where_lines_are_off() -> None:
    """
    With lines off and logs over OTLP, the level that we set is given back to the application's ``basicConfig()``.
    """
    settings = Settings(log_format="none", logs_exporters=("otlp",))
    with pristine() as out:
        logs.install(settings)
        logs.otlp_handler(NoOpLoggerProvider(), settings)
        logs.settle()
        assert logging.root.level == logging.INFO
        logging.basicConfig(stream=out, format="%(message)s")
        logging.getLogger("app").info("below the level that Python has")
        logging.getLogger("app").warning("theirs")
    assert out.getvalue() == "theirs\n"


def test_configuring_and_deciding_at_once_never_deadlocks() -> None:
    """
    A thread in ``dictConfig()`` and a request that decides do not wait for each other.
    """
    with pristine():
        logs.install(SETTINGS)
        holds, decided = threading.Event(), threading.Event()

        class Handler(logging.StreamHandler[io.StringIO]):
            def __init__(self) -> None:  # dictConfig() holds logging's lock while it makes handlers
                super().__init__(io.StringIO())
                holds.set()
                decided.wait(0.1)

        def configure() -> None:
            config = {"handlers": {"app": {"()": Handler}}, "root": {"handlers": ["app"]}}
            logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, **config})

        def decide() -> None:
            holds.wait(30)
            logs.settle()
            decided.set()

        threads = [threading.Thread(target=run, daemon=True) for run in (configure, decide)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
        assert not logs.active()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_configuration_of_one_logger_keeps_that_loggers_lines(when: str) -> None:
    """
    A logger with a handler of its own writes what it wrote without us, and all other lines are ours.
    """
    with pristine() as out:
        theirs = io.StringIO()

        def configure() -> None:
            loggers = {"app": {"handlers": ["own"]}}
            handlers = {"own": {"class": "logging.StreamHandler", "stream": theirs}}
            logging.config.dictConfig(
                {"version": 1, "disable_existing_loggers": False, "handlers": handlers, "loggers": loggers}
            )

        logs.install(SETTINGS)
        uvicorn_starts()
        if when == "before":
            configure()
        logs.settle()
        if when == "after":
            configure()
        logging.getLogger("app.items").info("Python has no INFO here")
        logging.getLogger("app.items").warning("theirs")
        logging.getLogger("other").info("ours")
        access_line()
        logs.summary("GET", "/", "/", 200, 1.0)
    assert theirs.getvalue() == "theirs\n"
    assert messages(out) == ["ours", "GET / 200 1.0 ms"]


def test_handlers_put_on_the_root_logger_by_assignment_take_over() -> None:
    """
    ``logging.root.handlers = [...]``, which no method call shows, is seen with the next record.
    """
    with pristine() as out:
        logs.install(SETTINGS)
        logs.settle()
        kept = Keep()
        logging.root.handlers = [kept]
        logging.getLogger("app").info("below the level that Python has")
        logging.getLogger("app").warning("theirs")
        assert not logs.active()
    assert [record.getMessage() for record in kept.records] == ["theirs"]
    assert out.getvalue() == ""


LIBRARIES = (
    *("urllib3", "sqlalchemy.engine.Engine", "push_response", "arq"),
    *("sentry_sdk.errors", "newrelic", "langfuse", "LiteLLM Router", "transformers", "made.up.sdk"),
)


class Renamed(logging.NullHandler):
    """
    A library's subclass of a handler that writes nothing.
    """


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", [logging.NullHandler, Renamed, logging.StreamHandler])
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_librarys_handler_is_no_configuration(name: str, kind: type[logging.Handler], when: str) -> None:
    """
    A handler that a library puts on its own logger, at its import or in the middle, does not take our lines away.
    """
    with pristine() as out:
        own = io.StringIO()
        handler = logging.StreamHandler(own) if kind is logging.StreamHandler else kind()
        logs.install(SETTINGS)
        if when == "before":
            logging.getLogger(name).addHandler(handler)
        logs.settle()
        if when == "after":
            logging.getLogger("app").info("first")
            logging.getLogger(name).addHandler(handler)
        logging.getLogger("app").info("hello")
        logging.getLogger(name).info("as much as a handler on the root logger would show")
        logging.getLogger(name).warning("careful")
        logs.summary("GET", "/", "/", 200, 1.0)
    shown = [line["logger"] for line in lines(out) if line["message"] != "first"]
    summary = ["otel_correlation.request"]
    if kind is logging.StreamHandler:
        assert shown == ["app", *summary]
        assert own.getvalue() == "careful\n"
    else:
        assert shown == ["app", name, name, *summary]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_null_handler_on_the_root_logger_is_no_configuration(when: str) -> None:
    """
    Who put a ``NullHandler`` on the root logger has configured nothing that shows a line.
    """
    with pristine() as out:
        logs.install(SETTINGS)
        if when == "before":
            logging.root.addHandler(Renamed())
        logs.settle()
        if when == "after":
            logging.root.addHandler(logging.NullHandler())
        logging.getLogger("app").info("hello")
    assert messages(out) == ["hello"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_call_of_logging_warning_is_no_configuration(when: str, capsys: pytest.CaptureFixture[str]) -> None:
    """
    ``logging.warning()``, which gives the root logger a handler where it has none, is a line and no configuration.
    """
    with pristine() as out:
        logs.install(SETTINGS)
        if when == "before":
            logging.warning("careless")  # noqa: LOG015
        logs.settle()
        if when == "after":
            logging.warning("careless")  # noqa: LOG015
        assert logging.root.handlers
        kept = Keep()
        logging.getLogger("other").addHandler(kept)
        logging.getLogger("app").info("hello")
        logging.getLogger("other").warning("its own, and ours in place of the root logger's")
        logs.summary("GET", "/", "/", 200, 1.0)
        logging.basicConfig(force=True, stream=out, format="theirs %(message)s")
        logging.getLogger("app").warning("bye")
    shown = out.getvalue().splitlines()
    assert shown.pop() == "theirs bye"
    found = [json.loads(line)["message"] for line in shown]
    own = "its own, and ours in place of the root logger's"
    assert found == [*(["careless"] if when == "after" else []), "hello", own, "GET / 200 1.0 ms"]
    assert [record.getMessage() for record in kept.records] == [own]
    assert ("careless" in capsys.readouterr().err) == (when == "before")


def test_captured_warnings_are_no_configuration() -> None:
    """
    ``logging.captureWarnings()``, which puts a handler on ``py.warnings``, leaves our lines, and warnings are among them.
    """
    with pristine() as out:
        logs.install(SETTINGS)
        logs.settle()
        before = warnings.showwarning
        logging.captureWarnings(True)
        try:
            warnings.showwarning("old", DeprecationWarning, "lib.py", 1)
        finally:
            logging.captureWarnings(False)
            warnings.showwarning = before
        logging.getLogger("app").info("hello")
    assert [line["logger"] for line in lines(out)] == ["py.warnings", "app"]


def test_handlers_that_pytest_has_on_the_root_logger_get_what_they_get_without_us() -> None:
    """
    A capturing handler on the root logger, as pytest's ``caplog`` has, is reached by every line: nothing is ours then.
    """
    with pristine() as out:
        logs.install(SETTINGS)
        logs.settle()
        captured = LogCaptureHandler()
        logging.root.addHandler(captured)
        logging.getLogger("app").info("below the level that Python has")
        logging.getLogger("app").warning("seen")
        assert not logs.active()
    assert [record.getMessage() for record in captured.records] == ["seen"]
    assert out.getvalue() == ""


@pytest.mark.parametrize("name", ["uvicorn", "uvicorn.error", "uvicorn.access"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_librarys_handler_on_the_servers_logger_gets_its_records_beside_us(name: str, when: str) -> None:
    """
    A handler that a library adds to uvicorn's loggers gets uvicorn's records; the console's lines stay ours, once.
    """
    with pristine() as out:
        kept = Keep()
        logs.install(SETTINGS)
        uvicorn_starts()
        if when == "before":
            logging.getLogger(name).addHandler(kept)
        logs.settle()
        if when == "after":
            logging.getLogger(name).addHandler(kept)
        logging.getLogger("uvicorn.error").info("started")
        access_line()
        logs.summary("GET", "/", "/", 200, 1.0)
    assert messages(out) == ["started", "GET / 200 1.0 ms"]
    access = '127.0.0.1:1 - "GET /?q=1 HTTP/1.1" 200'
    expected = {"uvicorn": ["started"], "uvicorn.error": ["started"], "uvicorn.access": [access]}[name]
    assert [record.getMessage() for record in kept.records] == expected


def test_a_server_that_configures_no_logging_has_one_line_a_request() -> None:
    """
    With ``uvicorn.run(log_config=None)`` the summary is the one line of a request, too.
    """
    with pristine() as out:
        logs.install(SETTINGS)
        logs.settle()
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
        access_line()
        logs.summary("GET", "/", "/", 200, 1.0)
    assert messages(out) == ["GET / 200 1.0 ms"]


EXPLICIT = Settings(service_name="orders", log_format="json")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("level", [None, logging.INFO])
def test_a_format_that_was_asked_for_is_used_whatever_else_there_is(
    level: int | None, stream: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    ``OTEL_CORRELATION_LOG_FORMAT=json`` beside ``basicConfig()``: each line once on the console, ours, at its level.

    A request has its summary and no access line.
    """
    with pristine() as out:
        monkeypatch.setattr(sys, "stderr", other := io.StringIO())
        logs.install(EXPLICIT)
        uvicorn_starts()
        streams = {"stdout": sys.stdout, "stderr": sys.stderr}
        if when == "after":
            logs.settle()
        logging.basicConfig(level=level, stream=streams[stream], format="theirs %(message)s")
        logs.startup_line("banner")
        logs.settle()
        logging.getLogger("app").info("info")
        logging.getLogger("app").warning("warning")
        logging.getLogger("uvicorn.error").info("started")
        access_line()
        logs.summary("GET", "/", "/", 200, 1.0)
        monkeypatch.undo()
    info = [] if level is None else ["info"]
    assert messages(out) == ["banner", *info, "warning", "started", "GET / 200 1.0 ms"]
    assert other.getvalue() == ""


def test_other_handlers_get_their_records_beside_a_format_that_was_asked_for(tmp_path: Path) -> None:
    """
    Files and services of the application's handlers get what they got; what is on no console is not brought there.
    """
    with pristine() as out:
        logs.install(EXPLICIT)
        uvicorn_starts()
        file, audit = logging.FileHandler(tmp_path / "app.log"), logging.FileHandler(tmp_path / "audit.log")
        kept = Keep()
        logging.basicConfig(level=logging.INFO, handlers=[logging.StreamHandler(sys.stdout), file, kept])
        logging.getLogger("audit").addHandler(audit)
        logging.getLogger("audit").propagate = False
        logging.getLogger("uvicorn.access").addHandler(kept)
        private = logging.getLogger("private")
        private.propagate = False
        private.addHandler(logging.StreamHandler(sys.stdout))
        logs.settle()
        logging.getLogger("app").info("hello")
        logging.getLogger("audit").info("secret")
        private.info("shown")
        access_line()
        logs.summary("GET", "/", "/", 200, 1.0)
        for handler in (file, audit):
            handler.close()
    assert messages(out) == ["hello", "shown", "GET / 200 1.0 ms"]
    assert (tmp_path / "app.log").read_text() == "INFO:app:hello\n"
    assert (tmp_path / "audit.log").read_text() == "secret\n"
    access = '127.0.0.1:1 - "GET /?q=1 HTTP/1.1" 200'
    assert [record.getMessage() for record in kept.records] == ["hello", access]


def test_a_queue_listener_prints_no_line_a_second_time() -> None:
    """
    A listener of this process that ends on the console leaves it to the lines that were asked for; its file gets all.
    """
    with pristine() as out:
        logs.install(EXPLICIT)
        waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        kept = Keep()
        listener = logging.handlers.QueueListener(waiting, logging.StreamHandler(sys.stdout), kept)
        logging.basicConfig(level=logging.INFO, handlers=[logging.handlers.QueueHandler(waiting)])
        logs.settle()
        logging.getLogger("app").info("hello")
        foreign = logging.makeLogRecord({"msg": "of a child process", "process": 1})
        waiting.put(foreign)
        listener.start()
        listener.stop()
    first, second = out.getvalue().splitlines()
    assert json.loads(first)["message"] == "hello"
    assert second == "of a child process"
    assert [record.getMessage() for record in kept.records] == ["INFO:app:hello", "of a child process"]


def test_a_file_that_is_the_console_gets_no_line_a_second_time(tmp_path: Path) -> None:
    """
    ``FileHandler("/dev/stdout")`` is the console: beside lines that were asked for it prints nothing.
    """
    program = """
import logging
from otel_correlation import logs
from otel_correlation.settings import Settings

logs.install(Settings(log_format="json"))
logging.basicConfig(level="INFO", handlers=[logging.FileHandler("/dev/stdout"), logging.FileHandler("app.log")])
logs.settle()
logging.getLogger("app").info("hello")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["message"] == "hello"
    assert (tmp_path / "app.log").read_text() == "INFO:app:hello\n"


def test_an_application_without_a_line_of_last_resort_gets_the_format_that_it_asked_for() -> None:
    """
    ``logging.lastResort = None`` switches our lines off, and a format that was asked for brings them back.
    """
    with pristine() as out:
        logging.lastResort = None
        logs.install(SETTINGS)
        logs.settle()
        logging.getLogger("app").warning("nowhere")
        logs.uninstall()
        logs.install(EXPLICIT)
        logs.settle()
        logging.getLogger("app").warning("hello")
    assert messages(out) == ["hello"]


def test_a_level_that_the_application_set_stays() -> None:
    """
    An application that set only the root logger's level gets that level.
    """
    with pristine() as out:
        logs.install(SETTINGS)
        logging.root.setLevel(logging.ERROR)
        logs.settle()
        logging.getLogger("app").warning("hidden")
        logging.getLogger("app").error("shown")
    assert messages(out) == ["shown"]


@pytest.mark.parametrize(("value", "shown"), [("debug", 3), ("WARNING", 1), ("", 2)])
def test_the_standard_level_variable_is_respected(value: str, shown: int) -> None:
    """
    ``OTEL_PYTHON_LOG_LEVEL`` sets the level from which on lines are shown.
    """
    with pristine() as out:
        logs.install(from_environment({"OTEL_PYTHON_LOG_LEVEL": value}))
        logs.settle()
        for name in ("debug", "info", "warning"):
            getattr(logging.getLogger("app"), name)("hello")
    assert messages(out) == ["hello"] * shown


def test_uvicorns_lines_are_ours_and_its_access_line_is_replaced() -> None:
    """
    Uvicorn's own configuration does not count: its lines come once, in our format, and one summary per request.
    """
    with pristine() as out:
        logs.install(SETTINGS)
        uvicorn_starts()
        logging.getLogger("uvicorn.error").info(
            "Started server process [%d]", 7, extra={"color_message": "Started \x1b[36m%d\x1b[0m"}
        )
        with request():
            access_line()
            logs.summary("GET", "/items/{id}", "/items/7", 200, 12.3456, extra={"bytes": 3})
            logs.summary("POST", None, "/no\nwhere", 503, 1.0)
    first, second, third = lines(out)
    assert (first["logger"], first["message"]) == ("uvicorn.error", "Started server process [7]")
    assert "color_message" not in first
    assert second["logger"] == "otel_correlation.request"
    assert second["message"] == "GET /items/{id} 200 12.3 ms"
    assert {name: second[name] for name in ("method", "route", "status", "duration_ms", "bytes", "level")} == {
        "method": "GET",
        "route": "/items/{id}",
        "status": 200,
        "duration_ms": 12.346,
        "bytes": 3,
        "level": "INFO",
    }
    assert (third["level"], third["message"]) == ("ERROR", "POST /no\nwhere 503 1.0 ms")


def test_gunicorns_worker_is_no_configuration_either() -> None:
    """
    Handlers that gunicorn's uvicorn worker gives to uvicorn's loggers are taken over like uvicorn's own.
    """
    with pristine() as out:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(
            logging.Formatter("%(asctime)s [%(process)d] [%(levelname)s] %(message)s", "[%Y-%m-%d %H:%M:%S %z]")
        )
        gunicorn = logging.getLogger("gunicorn.error")
        gunicorn.propagate = False
        gunicorn.addHandler(handler)
        logs.install(SETTINGS)
        for name, handlers in (("error", gunicorn.handlers), ("access", logging.getLogger("gunicorn.access").handlers)):
            logger = logging.getLogger(f"uvicorn.{name}")
            logger.handlers, logger.propagate = handlers, False
            logger.setLevel(logging.INFO)
        logs.settle()
        logging.getLogger("uvicorn.error").info("worker")
        logs.summary("GET", "/", "/", 200, 1.0)
    assert messages(out) == ["worker", "GET / 200 1.0 ms"]


def test_the_fastapi_command_is_no_configuration_either() -> None:
    """
    Started by ``fastapi run`` on a terminal, which formats uvicorn's lines itself, the lines are ours all the same.
    """
    cli = type("CustomFormatter", (logging.Formatter,), {"__module__": "fastapi_cli.utils.cli"})
    formatters = {name: {"()": cli, "format": "%(message)s"} for name in ("default", "access")}
    with pristine() as out:
        logs.install(SETTINGS)
        logging.getLogger("fastapi_cli").addHandler(logging.StreamHandler(io.StringIO()))
        uvicorn_starts(formatters=formatters)
        logs.settle()
        logging.getLogger("uvicorn.error").info("served")
        access_line()
        logs.summary("GET", "/", "/", 200, 1.0)
    assert messages(out) == ["served", "GET / 200 1.0 ms"]


def test_a_servers_log_that_the_user_configured_stays() -> None:
    """
    A format or a file that the user gave to uvicorn's loggers is left alone, and no summary line doubles it.
    """
    formatters = copy.deepcopy(LOGGING_CONFIG["formatters"])
    formatters["access"]["fmt"] = "%(client_addr)s %(status_code)s %(request_id)s mine"
    with pristine() as out:
        logs.install(SETTINGS)
        uvicorn_starts(formatters=formatters)
        logs.settle()
        with request():
            access_line()
            logs.summary("GET", "/", "/", 200, 1.0)
    assert out.getvalue() == "127.0.0.1:1 200 OK order-7 mine\n"


@pytest.mark.parametrize("how", ["--no-access-log", "--log-level warning"])
def test_who_told_the_server_to_log_no_access_gets_no_summary(how: str) -> None:
    """
    ``--no-access-log`` and ``--log-level warning`` mean the summary line, too; a 5xx is an ERROR all the same.
    """
    with pristine() as out:
        logs.install(SETTINGS)
        uvicorn_starts()
        access = logging.getLogger("uvicorn.access")
        if how == "--no-access-log":
            access.handlers, access.propagate = [], False
        else:
            access.setLevel(logging.WARNING)
        logs.settle()
        logs.summary("GET", "/", "/", 200, 1.0)
        logs.summary("GET", "/", "/", 500, 1.0)
    assert messages(out) == ([] if how == "--no-access-log" else ["GET / 500 1.0 ms"])


def test_there_is_no_summary_where_the_application_configured_logging() -> None:
    """
    An application with logging of its own keeps its server's access line and gets no line of ours.
    """
    with pristine() as out:
        logs.install(SETTINGS)
        uvicorn_starts()
        logging.basicConfig(stream=out, level=logging.DEBUG, format="app %(message)s")
        logs.settle()
        logs.summary("GET", "/", "/", 200, 1.0)
        access_line()
        assert not logging.getLogger("uvicorn.access").disabled
    assert "ms" not in out.getvalue()
    assert out.getvalue().count('"GET /?q=1 HTTP/1.1" 200') == 1


def test_secrets_in_a_websockets_query_do_not_reach_a_line() -> None:
    """
    Uvicorn's line about a WebSocket shows the query; values of sensitive keys are replaced in ours.
    """
    with pristine() as out:
        logs.install(SETTINGS)
        uvicorn_starts()
        logs.settle()
        logging.getLogger("uvicorn.error").info(
            '%s - "WebSocket %s" [accepted]', "127.0.0.1:1", "/ws?token=s3cr3t&room=4"
        )
    assert messages(out) == ['127.0.0.1:1 - "WebSocket /ws?token=REDACTED&room=4" [accepted]']


@pytest.mark.parametrize("name", ["httpx", "httpx2", "httpcore"])
def test_clients_do_not_print_whole_urls(name: str) -> None:
    """
    INFO lines of httpx, which hold whole URLs, are off unless the application sets their level.
    """
    with pristine() as out:
        logs.install(SETTINGS)
        logs.settle()
        logging.getLogger(name).info("HTTP Request: GET http://host/?token=secret")
        logging.getLogger(name).warning("kept")
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).info("asked for")
    assert messages(out) == ["kept", "asked for"]


def test_a_level_that_the_application_gave_to_httpx_stays() -> None:
    """
    Who set httpx's level before us keeps it, also after we are gone.
    """
    with pristine():
        logging.getLogger("httpx").setLevel(logging.DEBUG)
        logs.install(SETTINGS)
        assert logging.getLogger("httpx").level == logging.DEBUG
        logs.uninstall()
        assert logging.getLogger("httpx").level == logging.DEBUG


@pytest.mark.parametrize("configured", [False, True])
def test_the_start_up_line_is_said_once(configured: bool) -> None:
    """
    The start-up line waits for the decision and then appears once, in whatever format lines have.
    """
    with pristine() as out:
        logs.install(SETTINGS)
        logs.startup_line("otel-correlation 1.0: service orders")
        assert out.getvalue() == ""
        if configured:
            logging.basicConfig(stream=out, level=logging.INFO, format="{%(message)s}")
        logs.settle()
        logs.settle()
        logs.startup_line("again")
    if configured:
        assert out.getvalue() == "{otel-correlation 1.0: service orders}\n{again}\n"
    else:
        assert messages(out) == ["otel-correlation 1.0: service orders", "again"]


@pytest.mark.parametrize("settled", [False, True])
def test_a_problem_of_ours_is_always_visible(settled: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """
    A warning of ours is seen before the decision (on stderr), after it, and after a ``dictConfig`` that disables loggers.
    """
    with pristine() as out:
        logs.install(SETTINGS)
        logging.config.dictConfig({"version": 1})
        assert guard.logger.disabled
        if settled:
            logs.settle()
        else:
            guard.logger.disabled = False
        guard.logger.warning("OTEL_X=1 is not usable")
    if settled:
        assert messages(out) == ["OTEL_X=1 is not usable"]
    else:
        assert capsys.readouterr().err == "OTEL_X=1 is not usable\n"


def test_a_closed_stdout_never_reaches_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A reader of stdout that went away costs lines, which are counted, and nothing else.
    """
    with pristine():
        logs.install(SETTINGS)
        logs.settle()
        closed = io.StringIO()
        closed.close()
        monkeypatch.setattr(sys, "stdout", closed)
        logging.getLogger("app").error("lost")
        monkeypatch.setattr(sys, "stdout", None)
        logging.getLogger("app").error("lost")
        monkeypatch.undo()
    assert guard.counters()["log_line_lost"] == 1


def test_a_stdout_that_is_not_utf_8_gets_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    With ``LANG=C`` a line with other alphabets is written, still valid JSON.
    """
    with pristine():
        logs.install(SETTINGS)
        logs.settle()
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
        logging.getLogger("app").error("Zürich 東京 🚂")
        written = raw.getvalue()
        monkeypatch.undo()
    assert json.loads(written)["message"] == "Zürich 東京 🚂"
