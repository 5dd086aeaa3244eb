"""
Log lines of real servers, started as a team starts them.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import Service, clean_environment

if TYPE_CHECKING:
    from pathlib import Path

APP = """
import logging
from fastapi import FastAPI, WebSocket

log = logging.getLogger("shop")
app = FastAPI()

@app.get("/items/{item_id}")
async def item(item_id: int) -> dict[str, int]:
    log.info("looking up %s", item_id, extra={"request_id_seen": "yes"})
    return {"item": item_id}

@app.get("/boom")
async def boom() -> None:
    raise ValueError("boom")
"""
BASIC = 'logging.basicConfig(level="INFO", format="APP %(name)s %(request_id)s %(trace_id)s %(message)s")\n'
IN_LIFESPAN = """
import contextlib

@contextlib.asynccontextmanager
async def lifespan(app):
    __CONFIGURE__
    yield

app.router.lifespan_context = lifespan
""".replace("__CONFIGURE__", BASIC.strip())

ZERO = "opentelemetry-instrument"
UVICORN = (ZERO, "uvicorn", "main:app", "--port", "{port}")
GUNICORN = (ZERO, "gunicorn", "main:app", "--bind", "127.0.0.1:{port}", "-k", "uvicorn_worker.UvicornWorker", "-w", "1")

pytestmark = pytest.mark.slow


def start(source: str, command: tuple[str, ...], directory: Path, **variables: str) -> Service:
    (directory / "main.py").write_text(source)
    environment = {"OTEL_TRACES_EXPORTER": "none", "OTEL_SERVICE_NAME": "shop", **variables}
    return Service(command, directory, clean_environment(**environment))


def by_logger(text: str) -> dict[str, list[dict[str, Any]]]:
    """
    Return the lines of ``text``, which must all be JSON, by logger.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for line in text.splitlines():
        parsed = json.loads(line)
        found.setdefault(parsed["logger"], []).append(parsed)
    return found


@pytest.mark.parametrize(
    "command", [UVICORN, GUNICORN, (*GUNICORN, "--preload")], ids=["uvicorn", "gunicorn", "preload"]
)
def test_a_service_without_logging_gets_json_lines_with_its_ids(command: tuple[str, ...], tmp_path: Path) -> None:
    """
    Nothing configured: every line on stdout is JSON, the access line is one summary, the traceback knows its request.
    """
    with start(APP, command, tmp_path) as service:
        httpx.get(service.url + "/items/3?email=a@b.example", headers={"X-Request-ID": "order-7"})
        httpx.get(service.url + "/boom", headers={"X-Request-ID": "order-8"})
        service.stop()
    lines = by_logger(service.stdout())
    (item,) = lines["shop"]
    assert (item["message"], item["request_id"], item["service_name"]) == ("looking up 3", "order-7", "shop")
    requests = {line.get("request_id"): line for line in lines["otel_correlation.request"]}
    summary = requests["order-7"]
    assert (summary["method"], summary["route"], summary["status"]) == ("GET", "/items/{item_id}", 200)
    assert (summary["trace_id"], summary["level"]) == (item["trace_id"], "INFO")
    assert requests["order-8"]["level"] == "ERROR"
    (error,) = [line for line in lines["uvicorn.error"] if "exception" in line]
    assert (error["request_id"], error["trace_id"]) == ("order-8", requests["order-8"]["trace_id"])
    assert "uvicorn.access" not in lines
    (banner,) = lines["otel_correlation"]
    assert banner["message"].startswith("otel-correlation ")
    everything = service.output()
    assert "a@b.example" not in everything
    assert everything.count("Started server process") == 1
    assert everything.count("looking up 3") == 1


@pytest.mark.parametrize("source", [APP + BASIC, APP + IN_LIFESPAN], ids=["import", "lifespan"])
@pytest.mark.parametrize("command", [UVICORN, GUNICORN], ids=["uvicorn", "gunicorn"])
def test_an_applications_logging_stays_its_own(source: str, command: tuple[str, ...], tmp_path: Path) -> None:
    """
    ``basicConfig`` at import or at start-up: the application's lines in its format with the ids, the server's as ever.
    """
    with start(source, command, tmp_path) as service:
        httpx.get(service.url + "/items/3", headers={"X-Request-ID": "order-7"})
        service.stop()
    text = service.output()
    (line,) = [line for line in text.splitlines() if "looking up 3" in line]
    assert line.startswith("APP shop order-7 ")
    assert len(line.split()[3]) == 32
    assert "otel_correlation.request" not in text
    access = [line for line in service.stdout().splitlines() if '"GET /items/3 HTTP/1.1" 200' in line]
    assert len(access) == (1 if command is UVICORN else 0)
    assert text.count("uvicorn's lines go out without ids, because ") == 1
    if source == APP + BASIC:
        assert '"timestamp"' not in text
        assert text.count("APP otel_correlation ") == 2


@pytest.mark.parametrize("configured", [False, True])
def test_every_record_goes_to_otlp_once(configured: bool, tmp_path: Path) -> None:
    """
    With ``OTEL_LOGS_EXPORTER=otlp`` the application's and uvicorn's records arrive, none twice, with their ids.
    """
    with OtlpSink() as sink:
        source = APP + (BASIC if configured else "")
        variables = {"OTEL_LOGS_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_ENDPOINT": sink.endpoint}
        with start(source, UVICORN, tmp_path, **variables) as service:
            httpx.get(service.url + "/items/3", headers={"X-Request-ID": "order-7"})
            httpx.get(service.url + "/boom", headers={"X-Request-ID": "order-8"})
            assert service.stop() in {0, -15, 143}
        records = list(sink.logs)
    bodies = Counter(record.body for record in records)
    assert not [body for body, count in bodies.items() if count > 1]
    (item,) = [record for record in records if record.body == "looking up 3"]
    assert item.attributes["request_id"] == "order-7"
    assert len(item.trace_id) == 32
    assert "Application startup complete." in bodies
    (error,) = [record for record in records if "exception.type" in record.attributes]
    assert (error.attributes["exception.type"], error.attributes["request_id"]) == ("ValueError", "order-8")


def test_no_access_log_means_no_summary(tmp_path: Path) -> None:
    """
    ``uvicorn --no-access-log`` gets no line per request; the application's own lines stay.
    """
    with start(APP, (*UVICORN, "--no-access-log"), tmp_path) as service:
        httpx.get(service.url + "/items/3")
        service.stop()
    lines = by_logger(service.stdout())
    assert "otel_correlation.request" not in lines
    assert len(lines["shop"]) == 1
