"""
structlog, loguru and asgi-correlation-id in real services, started as a team starts them, with nothing added to them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import Service, clean_environment

ROOT = Path(__file__).parents[2]
UVICORN = ("opentelemetry-instrument", "uvicorn", "main:app", "--port", "{port}")
UUID = "f4a2b3c1-dead-beef-0000-aabbccddeeff"

APP = """
import logging
import sys

import structlog
from fastapi import FastAPI
from loguru import logger
from pydantic import BaseModel

import otel_correlation

structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(),
    ],
    cache_logger_on_first_use=True,
)
logger.remove()
logger.add(sys.stdout, format="{message}", serialize=True, diagnose=False, enqueue=True)
events = structlog.get_logger()
app = FastAPI()


class Card(BaseModel):
    number: int


@app.get("/items/{number}")
def item(number: int) -> dict[str, int]:
    otel_correlation.bind(item=number)
    events.info("structlog says", n=number)
    logger.bind(n=number).info("loguru says")
    logging.getLogger("shop").info("logging says", extra={"n": number})
    return {"item": number}


@app.get("/async/{number}")
async def later(number: int) -> dict[str, int]:
    await events.ainfo("structlog says", n=number)
    logger.bind(n=number).info("loguru says")
    return {"item": number}


@app.get("/card")
def card() -> None:
    secret = "-".join(["4111", "1111", "1111"])
    try:
        Card.model_validate({"number": secret})
    except ValueError:
        events.exception("structlog failed")
        logger.exception("loguru failed")
        logging.getLogger("shop").exception("logging failed")
"""


def start(source: str, directory: Path, **variables: str) -> Service:
    (directory / "main.py").write_text(source)
    environment = {"OTEL_TRACES_EXPORTER": "none", "OTEL_SERVICE_NAME": "shop", **variables}
    return Service(UVICORN, directory, clean_environment(**environment))


def lines_of(text: str) -> list[dict[str, Any]]:
    """
    Return what each line says: its fields, and loguru's ``extra`` as fields.
    """
    found: list[dict[str, Any]] = []
    decoder, at = json.JSONDecoder(), 0
    while text := text[at:].lstrip():
        # Not by line: structlog's print() writes a line and its end apart, and another thread may write in between.
        parsed, at = decoder.raw_decode(text)
        if "record" in parsed:
            record = parsed["record"]
            parsed = {**record["extra"], "message": record["message"], "exception": parsed["text"]}
        found.append({**parsed, "message": parsed.get("message", parsed.get("event"))})
    return found


@pytest.mark.slow
def test_lines_of_all_three_have_the_ids_of_their_request(tmp_path: Path) -> None:
    """
    Under load, every line of structlog, loguru and logging has the request id, trace id and bound field of its request.
    """

    def get(number: int) -> None:
        kind = "items" if number % 2 else "async"
        client.get(f"/{kind}/{number}", headers={"X-Request-ID": f"a-long-enough-id-{number}"}).raise_for_status()

    with start(APP, tmp_path) as service:
        with httpx.Client(base_url=service.url, timeout=60) as client, ThreadPoolExecutor(16) as pool:
            list(pool.map(get, range(60)))
        service.stop()
    said = [line for line in lines_of(service.stdout()) if str(line["message"]).endswith(" says")]
    assert Counter(line["message"] for line in said) == {"structlog says": 60, "loguru says": 60, "logging says": 30}
    traces: dict[int, set[str]] = {}
    for line in said:
        assert line["request_id"] == f"a-long-enough-id-{line['n']}"
        assert line["service_name"] == "shop"
        assert line.get("item") == (line["n"] if line["n"] % 2 else None)
        traces.setdefault(line["n"], set()).add(line["trace_id"])
    assert all(len(found) == 1 for found in traces.values())
    assert len({trace for found in traces.values() for trace in found}) == 60


@pytest.mark.slow
def test_lines_of_all_three_arrive_over_otlp_once(tmp_path: Path) -> None:
    """
    With ``OTEL_LOGS_EXPORTER=otlp`` each line of all three is exported once, with its ids, and no planted secret is in any.
    """
    with OtlpSink() as sink:
        variables = {"OTEL_LOGS_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_ENDPOINT": sink.endpoint}
        with start(APP, tmp_path, **variables) as service:
            httpx.get(service.url + "/items/3", headers={"X-Request-ID": "order-3"})
            httpx.get(service.url + "/card", headers={"X-Request-ID": "order-4"})
            assert service.stop() in {0, -15, 143}
        records = list(sink.logs)
    ours = [record for record in records if str(record.body).endswith((" says", " failed"))]
    names = ("structlog", "loguru", "logging")
    assert Counter(str(record.body) for record in ours) == {
        f"{name} {end}": 1 for name in names for end in ("says", "failed")
    }
    for record in ours:
        says = str(record.body).endswith(" says")
        assert record.attributes["request_id"] == ("order-3" if says else "order-4")
        assert len(record.trace_id) == 32
        if not says:
            assert record.attributes["exception.type"].endswith("ValidationError")
    assert "4111-1111-1111" not in service.output() + repr([record.attributes for record in ours])
    assert service.stdout().count("input_value=REDACTED") >= 3


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["ecs", "gcp", "datadog"])
def test_a_preset_names_the_lines_of_all_three(preset: str, tmp_path: Path) -> None:
    """
    One variable renames the ids in the lines of all three and in the summary of the request.
    """
    key = {"ecs": "trace.id", "gcp": "logging.googleapis.com/trace", "datadog": "dd.trace_id"}[preset]
    request_key = {"ecs": "http.request.id", "gcp": "request_id", "datadog": "http.request_id"}[preset]
    with start(APP, tmp_path, OTEL_CORRELATION_LOG_PRESET=preset) as service:
        httpx.get(service.url + "/items/3", headers={"X-Request-ID": "order-3"})
        service.stop()
    lines = [line for line in lines_of(service.stdout()) if line.get(request_key) == "order-3"]
    assert len(lines) == 4
    assert len({line[key] for line in lines}) == 1
    assert not [line for line in lines if "trace_id" in line]
    assert {line["item"] for line in lines} == {3}


@pytest.mark.slow
def test_a_wrong_preset_and_a_wrong_rename_are_one_line_each(tmp_path: Path) -> None:
    """
    The service serves, says once what is wrong, and uses the default.
    """
    variables = {"OTEL_CORRELATION_LOG_PRESET": "splunk", "OTEL_CORRELATION_LOG_FIELDS": "trace=t,request_id=req"}
    with start(APP, tmp_path, **variables) as service:
        httpx.get(service.url + "/items/3", headers={"X-Request-ID": "order-3"})
        service.stop()
    lines = lines_of(service.stdout())
    problems = [str(line["message"]) for line in lines if "is not usable" in str(line["message"])]
    assert len(problems) == 2
    assert any(line.startswith("OTEL_CORRELATION_LOG_PRESET='splunk' is not usable") for line in problems)
    assert any(line.startswith("OTEL_CORRELATION_LOG_FIELDS='trace=t' is not usable") for line in problems)
    assert len([line for line in lines if line.get("req") == "order-3"]) == 4


def test_code_can_name_the_preset_after_the_start(tmp_path: Path) -> None:
    """
    ``bootstrap(log_preset=...)`` in code that ``opentelemetry-instrument`` started is applied.
    """
    script = """
import logging
import otel_correlation
from otel_correlation.logs import JsonLines
otel_correlation.bootstrap(log_preset="ecs", log_fields=["level=severity"])
print(JsonLines().format(logging.makeLogRecord({"msg": "hello"})))
"""
    command = [str(Path(sys.executable).parent / "opentelemetry-instrument"), sys.executable, "-c", script]
    ended = subprocess.run(
        command, env=clean_environment(OTEL_TRACES_EXPORTER="none"), cwd=tmp_path, capture_output=True, check=True
    )
    line = json.loads(ended.stdout.splitlines()[0])
    assert list(line)[:2] == ["@timestamp", "severity"]


# -- asgi-correlation-id


BESIDE = """
import logging
import sys

from asgi_correlation_id import CorrelationIdFilter, CorrelationIdMiddleware, correlation_id
from fastapi import FastAPI, Request

import otel_correlation

handler = logging.StreamHandler(sys.stdout)
handler.addFilter(CorrelationIdFilter(uuid_length=100, default_value="-"))
logging.basicConfig(handlers=[handler], level="INFO", format="LINE %(correlation_id)s %(request_id)s %(message)s")


def make(**arguments):
    app = FastAPI()

    @app.get("/")
    def read(request: Request) -> dict[str, str | None]:
        logging.getLogger("shop").info("hello")
        return {
            "theirs": correlation_id.get(),
            "ours": otel_correlation.request_id(),
            "header": request.headers.get("x-request-id"),
            "trace": otel_correlation.trace_id(),
        }

    return app, arguments


def inside(**arguments):
    app, arguments = make(**arguments)
    app.add_middleware(CorrelationIdMiddleware, **arguments)
    return app


def outside(**arguments):
    app, arguments = make(**arguments)
    return CorrelationIdMiddleware(app, **arguments)


apps = {
    "/inside": inside(),
    "/inside-any": inside(validator=None),
    "/outside": outside(),
    "/edge": otel_correlation.edge(outside(validator=None)),
}


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await apps["/inside"](scope, receive, send)
        return
    await apps[scope["path"].rstrip("/")]({**scope, "path": "/", "raw_path": b"/"}, receive, send)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mint", ["hex", "uuid"])
def test_asgi_correlation_id_beside_us(mint: str, tmp_path: Path) -> None:
    """
    Side by side, inside and outside, both packages tell of one id, except where its validator refuses what ours accepts.
    """
    service = Service(
        UVICORN,
        tmp_path,
        clean_environment(OTEL_TRACES_EXPORTER="none", OTEL_CORRELATION_MINT=mint),
        ready="/inside",
    )
    (tmp_path / "main.py").write_text(BESIDE)
    with service, httpx.Client(base_url=service.url) as client:
        seen: dict[tuple[str, str], tuple[dict[str, str], list[str]]] = {}
        for path in ("inside", "inside-any", "outside", "edge"):
            for given in ("", "order-7", UUID, UUID.replace("-", "")):
                answer = client.get(f"/{path}", headers={"X-Request-ID": given} if given else {})
                seen[path, given] = answer.json(), answer.headers.get_list("x-request-id")
        service.stop()
    for (path, given), (body, header) in seen.items():
        one = {body["theirs"], body["ours"], body["header"], *header}
        if (path, given) == ("inside", "order-7"):
            # Its validator takes what uuid.UUID() can read; its own id is in its variable and the request's headers.
            assert (body["ours"], header) == ("order-7", ["order-7"])
            assert body["theirs"] == body["header"] != "order-7"
            continue
        assert len(one) == 1, (path, given)
        assert len(header) == (2 if path == "outside" else 1), (path, given)
        if (path, given) != ("outside", "order-7"):
            assert one == {given or body["ours"]}
        if given == UUID:
            assert body["trace"] == UUID.replace("-", "")
        if not given and path != "outside":
            assert (len(body["ours"]), body["trace"]) == (
                36 if mint == "uuid" else 32,
                body["ours"].replace("-", ""),
            )
    lines = [
        line.split() for line in service.stdout().splitlines() if line.startswith("LINE ") and line.endswith("hello")
    ]
    assert len(lines) >= len(seen)
    different = [line for line in lines if line[1] != line[2]]
    assert [line[2] for line in different] == ["order-7"]


# -- the documents


def blocks() -> list[Any]:
    pages = ("logs", "structlog-loguru", "migrate-from-asgi-correlation-id")
    found: list[Any] = []
    for page in pages:
        text = (ROOT / f"docs/how-to/{page}.md").read_text()
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
            found.append(pytest.param(block, id=f"{page}-{number}"))
    return found


@pytest.mark.parametrize("block", blocks())
def test_examples_of_the_documents_run(block: str, tmp_path: Path) -> None:
    """
    Every Python block of the pages about logs runs as it stands, under ``opentelemetry-instrument``, and says nothing wrong.
    """
    (tmp_path / "block.py").write_text(block)
    ended = subprocess.run(
        [str(Path(sys.executable).parent / "opentelemetry-instrument"), sys.executable, "block.py"],
        cwd=tmp_path,
        env=clean_environment(OTEL_TRACES_EXPORTER="none", OTEL_SERVICE_NAME="orders"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Logging error" not in ended.stderr


def test_the_line_in_the_document_is_the_line() -> None:
    """
    What the page shows as structlog's line in a request is what its example prints in one.
    """
    text = (ROOT / "docs/how-to/structlog-loguru.md").read_text()
    (shown,) = re.findall(r"```json\n(.*?)\n```", text)
    block = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    script = f"""
from otel_correlation import logs
from otel_correlation.settings import Settings
from tests.unit.logs_pristine import request
logs.install(Settings(service_name="orders"))
with request():
    exec({block!r})
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == shown
