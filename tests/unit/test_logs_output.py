"""
Lines of ours appear only where the application configured no logging, and never twice.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import logging.config
import sys
import threading
from typing import Any

import pytest
from opentelemetry._logs import NoOpLoggerProvider
from uvicorn.config import LOGGING_CONFIG

from otel_correlation import guard, logs
from otel_correlation.settings import Settings, from_environment
from tests.unit.logs_pristine import TRACE_TEXT, Keep, pristine, request

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
            config = {"handlers": {"app": {"()": Handler}}, "loggers": {"app": {"handlers": ["app"]}}}
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


def test_dict_config_of_one_logger_takes_over() -> None:
    """
    A configuration that names only the application's own logger is a configuration.
    """
    with pristine() as out:
        logs.install(SETTINGS)
        uvicorn_starts()
        logs.settle()
        assert logs.active()
        handlers = {"app": {"class": "logging.NullHandler"}, "out": {"class": "logging.StreamHandler", "stream": out}}
        loggers = {"app": {"handlers": ["app", "out"], "level": "INFO"}}
        logging.config.dictConfig(
            {"version": 1, "disable_existing_loggers": False, "handlers": handlers, "loggers": loggers}
        )
        assert not logs.active()
        logging.getLogger("app").info("theirs")
        logging.getLogger("other").info("not asked for")
        access_line()
    assert out.getvalue().splitlines()[0] == "theirs"
    assert "not asked for" not in out.getvalue()
    assert not logging.getLogger("uvicorn.access").disabled


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


@pytest.mark.parametrize("name", ["urllib3", "sqlalchemy.engine.Engine", "push_response", "arq"])
def test_a_librarys_handler_is_no_configuration(name: str) -> None:
    """
    A ``NullHandler`` of a library, or SQLAlchemy's own for ``echo=True``, does not take the lines away.
    """
    with pristine() as out:
        logs.install(SETTINGS)
        handler = logging.NullHandler() if name == "urllib3" else logging.StreamHandler(io.StringIO())
        logging.getLogger(name).addHandler(handler)
        logs.settle()
        logging.getLogger(name).addHandler(handler)
        logging.getLogger("app").info("hello")
        logging.getLogger(name).info("as much as a handler on the root logger would show")
    assert [line["logger"] for line in lines(out)] == (["app", name] if name == "urllib3" else ["app"])


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
