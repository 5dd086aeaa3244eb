"""
Lines of real servers whose application, or a library of it, does something with ``logging``: each line has its ids.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.integration.services import BIN, Service, clean_environment

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

APP = """
import logging

from fastapi import FastAPI

log = logging.getLogger("shop")
app = FastAPI()


@app.get("/items/{item_id}")
async def item(item_id: int) -> dict[str, int]:
    log.info("looking up %s", item_id)
    log.warning("careful")
    return {"item": item_id}


@app.get("/boom")
async def boom() -> None:
    raise ValueError("boom")
"""
SENTRY = """
import sentry_sdk

sentry_sdk.init(dsn="http://key@127.0.0.1:9/1", shutdown_timeout=0, auto_session_tracking=False, DEBUG)
"""
# What newrelic, langfuse, litellm and transformers do at their import, and what a careless one does in a request.
LIKE_THEM = """
logging.getLogger("newrelic").addHandler(logging.NullHandler())
for name in ("langfuse", "LiteLLM", "LiteLLM Router", "transformers"):
    logging.getLogger(name).addHandler(logging.StreamHandler())
    logging.getLogger(name).propagate = name != "transformers"
logging.captureWarnings(True)


@app.get("/lazy")
async def lazy() -> None:
    logging.getLogger("made.up.sdk").addHandler(logging.StreamHandler())
    logging.getLogger("uvicorn.error").addHandler(logging.FileHandler("sdk.log"))
    logging.warning("careless")
"""
BASIC = """
logging.basicConfig(level="INFO", format="THEIRS %(message)s")
"""
DICT = """
import logging.config

logging.config.dictConfig(
    {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"own": {"class": "logging.Formatter", "format": "THEIRS %(message)s"}},
        "handlers": {"own": {"class": "logging.StreamHandler", "formatter": "own", "stream": "ext://sys.stdout"}},
        "root": {"handlers": ["own"], "level": "INFO"},
        "loggers": {"shop": {"handlers": ["own"], "level": "INFO", "propagate": False}},
    }
)
"""
UVICORN = ("uvicorn", "main:app", "--port", "{port}")
ZERO = ("opentelemetry-instrument", *UVICORN)


def serve(source: str, command: tuple[str, ...], directory: Path, *more: str, **variables: str) -> tuple[str, str]:
    """
    Ask for an item as ``order-7`` and for a failure as ``order-8``; return what went to stdout and stderr.
    """
    (directory / "main.py").write_text(source)
    environment = {"OTEL_TRACES_EXPORTER": "none", "OTEL_SERVICE_NAME": "shop", **variables}
    with Service(command, directory, clean_environment(**environment)) as service:
        for path in more:
            httpx.get(service.url + path)
        httpx.get(service.url + "/items/3", headers={"X-Request-ID": "order-7"})
        httpx.get(service.url + "/boom", headers={"X-Request-ID": "order-8"})
        service.stop()
    return service.stdout(), service.stderr()


def of_request(text: str, request_id: str) -> list[tuple[str, str]]:
    """
    Return logger and level of each line of one request; every line must be JSON.
    """
    found: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    return [(line["logger"], line["level"]) for line in found if line.get("request_id") == request_id]


def log_config(lines: str, directory: Path) -> str:
    """
    Write what the command prints, and return the file's name.
    """
    command = [str(BIN / "otel-correlation"), "log-config", lines]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    (directory / "log-config.json").write_text(printed.stdout)
    return "log-config.json"


ITEM = [("shop", "INFO"), ("shop", "WARNING"), ("otel_correlation.request", "INFO")]
BOOM = [("otel_correlation.request", "ERROR"), ("uvicorn.error", "ERROR")]


@pytest.mark.parametrize("debug", ["debug=False", "debug=True"])
def test_sentry_leaves_our_lines(debug: str, tmp_path: Path) -> None:
    """
    ``sentry_sdk.init()``, which puts a handler on its own logger, takes no line away, and none of its ids.
    """
    stdout, _ = serve(SENTRY.replace("DEBUG", debug) + APP, ZERO, tmp_path)
    assert of_request(stdout, "order-7") == ITEM
    assert of_request(stdout, "order-8") == BOOM


def test_libraries_leave_our_lines_also_in_the_middle(tmp_path: Path) -> None:
    """
    Handlers of libraries, at their import or in a request, and ``logging.warning()`` take no line away.
    """
    stdout, stderr = serve(APP + LIKE_THEM, ZERO, tmp_path, "/lazy")
    assert of_request(stdout, "order-7") == ITEM
    assert of_request(stdout, "order-8") == BOOM
    assert "careless" in stdout
    assert stderr == ""
    assert "Exception in ASGI application" in (tmp_path / "sdk.log").read_text()


@pytest.mark.parametrize("configure", [BASIC, DICT], ids=["basicConfig", "dictConfig"])
def test_json_that_was_asked_for_is_all_there_is(configure: str, tmp_path: Path) -> None:
    """
    With ``OTEL_CORRELATION_LOG_FORMAT=json`` an application's own set-up takes no line of ours away and doubles none.
    """
    stdout, stderr = serve(APP + configure, ZERO, tmp_path, OTEL_CORRELATION_LOG_FORMAT="json")
    assert of_request(stdout, "order-7") == ITEM
    assert of_request(stdout, "order-8") == BOOM
    # Before the server begins to serve, logging is the server's.
    assert "THEIRS" not in stdout
    assert "THEIRS" not in stderr


@pytest.mark.parametrize(
    ("lines", "configure"),
    [("json", ""), ("json", BASIC), ("text", BASIC), ("OWN %(levelname)s %(request_id)s %(message)s", BASIC)],
    ids=["json", "json-basicConfig", "text-basicConfig", "own-basicConfig"],
)
def test_a_log_config_shows_the_ids_on_every_line_of_the_server(lines: str, configure: str, tmp_path: Path) -> None:
    """
    With the file that ``otel-correlation log-config`` prints, access line and traceback have the ids.

    ``basicConfig()`` does nothing then, as in every process whose root logger has a handler.
    """
    stdout, stderr = serve(APP + configure, (*ZERO, "--log-config", log_config(lines, tmp_path)), tmp_path)
    assert "go out without ids" not in stdout
    assert stderr == ""
    (access,) = [line for line in stdout.splitlines() if "/items/3 HTTP/1.1" in line]
    (failed,) = [line for line in stdout.splitlines() if "Exception in ASGI application" in line]
    assert "order-7" in access
    assert "order-8" in failed
    if lines == "json":
        assert of_request(stdout, "order-7") == [*ITEM[:2], ("uvicorn.access", "INFO")]


def test_what_uvicorn_prints_without_ids_is_said_with_what_to_do(tmp_path: Path) -> None:
    """
    Beside an application's own set-up uvicorn's own lines have no ids; one line at the start says so, and how to mend it.
    """
    stdout, stderr = serve(APP + BASIC, ZERO, tmp_path)
    (said,) = [line for line in stderr.splitlines() if "go out without ids" in line]
    assert said == (
        "THEIRS uvicorn's lines go out without ids, because their format names none: set OTEL_CORRELATION_LOG_FORMAT=json, "
        "or start it with --log-config and the file that `otel-correlation log-config json` prints"
    )
    (failed,) = [line for line in (stdout + stderr).splitlines() if "Exception in ASGI application" in line]
    assert "order-8" not in failed


@pytest.mark.parametrize("variables", [{"OTEL_CORRELATION_LOG_FORMAT": "none"}, {"OTEL_CORRELATION_ENABLED": "false"}])
def test_who_wants_logging_left_alone_is_told_nothing(variables: dict[str, str], tmp_path: Path) -> None:
    """
    With ``OTEL_CORRELATION_LOG_FORMAT=none``, or switched off, nothing is said about the server's lines.
    """
    stdout, stderr = serve(APP + BASIC, ZERO, tmp_path, **variables)
    assert "go out without ids" not in stdout + stderr


NAMED = """
import logging

import otel_correlation

handler = logging.StreamHandler()
handler.setFormatter(otel_correlation.IdsFormatter("%(levelname)s [%(request_id)s] [%(trace_id)s] %(message)s"))
logging.basicConfig(level="INFO", handlers=[handler])
"""


def test_a_format_that_names_the_fields_works_with_us_and_without(tmp_path: Path) -> None:
    """
    The same application with ``IdsFormatter`` shows the ids under ``opentelemetry-instrument``, and loses no line without.
    """
    for command, shown in ((ZERO, "INFO [order-7] ["), (UVICORN, "INFO [] [] looking up 3")):
        _, stderr = serve(NAMED + APP, command, tmp_path)
        assert shown in stderr
        assert "Logging error" not in stderr
        assert "KeyError" not in stderr


@pytest.mark.parametrize("lines", ["json", "text", "%(request_id)s|%(message)s"])
def test_a_log_config_works_where_we_are_not_active(lines: str, tmp_path: Path) -> None:
    """
    A server that starts with the printed file and without ``opentelemetry-instrument`` loses no line.
    """
    stdout, stderr = serve(APP, (*UVICORN, "--log-config", log_config(lines, tmp_path)), tmp_path)
    assert stderr == ""
    for text in ("looking up 3", "GET /items/3", "Exception in ASGI application", "ValueError"):
        assert text in stdout


SCRIPT = """
import logging.config
import sys

logging.config.fileConfig("alembic.ini", disable_existing_loggers=False)
logging.getLogger("alembic.runtime").info("Running upgrade")
plain = logging.StreamHandler(sys.stdout)
plain.setFormatter(logging.Formatter("{request_id}|{service_name}|{message}", style="{"))
import otel_correlation
plain.addFilter(otel_correlation.IdsFilter())
logging.getLogger("alembic").addHandler(plain)
logging.getLogger("alembic").warning("filtered")
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
ALEMBIC = """
[loggers]
keys = root
[handlers]
keys = console
[formatters]
keys = generic
[logger_root]
level = INFO
handlers = console
[handler_console]
class = StreamHandler
args = (sys.stdout,)
formatter = generic
[formatter_generic]
class = otel_correlation.IdsFormatter
format = %(levelname)-5.5s [%(name)s] [%(request_id)s] %(message)s
"""


def test_a_migration_script_with_the_services_format_loses_no_line(tmp_path: Path) -> None:
    """
    ``fileConfig`` (alembic's way) with ``IdsFormatter``, and another package's formatter behind ``IdsFilter``.

    They work in a process that nobody has set up, and import nothing of OpenTelemetry.
    """
    (tmp_path / "alembic.ini").write_text(ALEMBIC)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "INFO  [alembic.runtime] [] Running upgrade",
        "||filtered",
        "WARNI [alembic] [] filtered",
        "[]",
    ]
