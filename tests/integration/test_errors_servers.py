"""
Errors behind real servers: each on its span once, each line under its request, and no password anywhere.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import DEADLINE_S, Service, clean_environment

if TYPE_CHECKING:
    from pathlib import Path

APP = """
import asyncio
import logging

import pydantic
from fastapi import BackgroundTasks, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

log = logging.getLogger("shop")
app = FastAPI()
inner = FastAPI()
app.mount("/inner", inner)


class Pin(pydantic.BaseModel):
    pin: int


class Busy(Exception):
    pass


@app.exception_handler(Busy)
async def busy(request, error):
    return JSONResponse({}, status_code=503)


def sql(secret):
    return RuntimeError(
        "(sqlite3.IntegrityError) UNIQUE constraint failed\\n[SQL: INSERT INTO pins VALUES (?)]\\n"
        f"[parameters: ('{secret}',)]\\n(Background on this error at: https://sqlalche.me/e/20/gkpj)"
    )


def secret_of(request: Request):
    return request.headers["x-pin"]


@app.get("/pydantic")
async def invalid(request: Request):
    Pin.model_validate({"pin": secret_of(request)})


@app.get("/chained")
def chained(request: Request):
    try:
        raise sql(secret_of(request))
    except RuntimeError as error:
        raise LookupError("no pin") from error


@app.get("/response", response_model=Pin)
async def response(request: Request):
    return {"pin": secret_of(request)}


@app.get("/group")
async def group(request: Request):
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(invalid(request))


@app.get("/stream")
async def stream(request: Request):
    async def parts():
        yield "a"
        raise sql(secret_of(request))

    return StreamingResponse(parts())


@app.get("/background")
async def background(request: Request, tasks: BackgroundTasks):
    tasks.add_task(invalid, request)
    return {}


@inner.get("/boom")
async def boom(request: Request):
    raise sql(secret_of(request))


@app.get("/handled")
async def handled(request: Request):
    raise Busy(str(sql(secret_of(request))))


@app.get("/refused")
async def refused(request: Request):
    try:
        await invalid(request)
    except ValueError as error:
        log.warning("refused: %s", error)
        log.exception("and again")
    return {}


@app.get("/task")
async def task(request: Request):
    asyncio.create_task(invalid(request))
    return {}


@app.get("/callback")
async def callback(request: Request):
    def fail():
        raise sql(secret_of(request))

    asyncio.get_running_loop().call_soon(fail)
    return {}


@app.post("/pins")
async def pins(pin: Pin):
    return {}
"""
BASIC = 'logging.basicConfig(level="INFO", format="APP %(name)s %(request_id)s %(message)s")\n'

SECRET = "hunter2-hunter2"
# Path -> how the request must end, the type of the exception on its span, and whose line tells of it.
FAILURES: dict[str, tuple[int, str | None, str | None]] = {
    "/pydantic": (500, "pydantic_core._pydantic_core.ValidationError", "uvicorn.error"),
    "/chained": (500, "LookupError", "uvicorn.error"),
    "/response": (500, "fastapi.exceptions.ResponseValidationError", "uvicorn.error"),
    "/group": (500, "ExceptionGroup", "uvicorn.error"),
    "/stream": (200, "RuntimeError", "uvicorn.error"),
    "/background": (200, "pydantic_core._pydantic_core.ValidationError", "uvicorn.error"),
    "/inner/boom": (500, "RuntimeError", "uvicorn.error"),
    "/handled": (503, "main.Busy", None),
    "/refused": (200, None, "shop"),
    "/task": (200, None, "asyncio"),
    "/callback": (200, None, "asyncio"),
    "/pins": (422, None, None),
}

ZERO = "opentelemetry-instrument"
UVICORN = (ZERO, "uvicorn", "main:app", "--port", "{port}", "--loop")
GUNICORN = (ZERO, "gunicorn", "main:app", "--bind", "127.0.0.1:{port}", "-w", "1", "-k", "uvicorn_worker.UvicornWorker")
COMMANDS = {"asyncio": (*UVICORN, "asyncio"), "uvloop": (*UVICORN, "uvloop"), "gunicorn": GUNICORN}

pytestmark = pytest.mark.slow


def ask(service: Service) -> None:
    """
    Fail in every way, each request under the id of its path.
    """
    for path, (status, _, _) in FAILURES.items():
        headers = {"X-Request-ID": "id-of" + path.replace("/", "-"), "X-Pin": SECRET}
        body = {"pin": SECRET, SECRET: SECRET} if path == "/pins" else None
        try:
            # A connection for each: a server closes one on which something failed after the response began.
            answer = httpx.request(
                "POST" if body else "GET", service.url + path, json=body, headers=headers, timeout=DEADLINE_S
            )
        except httpx.TransportError:
            assert path in ("/stream", "/background")
        else:
            assert (path, answer.status_code) == (path, status)
            assert answer.headers["x-request-id"] == headers["X-Request-ID"]


def run(command: tuple[str, ...], source: str, directory: Path, sink: OtlpSink, **variables: str) -> str:
    """
    Serve, fail in every way, stop; return all that was written.
    """
    (directory / "main.py").write_text(source)
    environment = clean_environment(
        OTEL_SERVICE_NAME="shop",
        OTEL_LOGS_EXPORTER="otlp",
        OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint,
        OTEL_EXPORTER_OTLP_COMPRESSION="none",
        **variables,
    )
    with Service(command, directory, environment) as service:
        ask(service)
        service.wait_for(lambda: service.output().count("Exception in callback") == 1)
        service.wait_for(lambda: service.output().count("never retrieved") == 1)
        service.stop()
        return service.output()


def by_path(sink: OtlpSink) -> dict[str, Any]:
    """
    Return the SERVER spans by the path that their request id names; one for each request.
    """
    spans = [span for span in sink.spans if str(span.attributes.get("request_id", "")).startswith("id-of")]
    found = {path: [s for s in spans if s.attributes["url.path"] == path] for path in FAILURES}
    assert {path: len(spans) for path, spans in found.items()} == dict.fromkeys(FAILURES, 1)
    return {path: spans[0] for path, spans in found.items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_failure_is_told_once_and_quotes_nobody(command: str, tmp_path: Path) -> None:
    """
    Spans, JSON lines and log records of every failure: under its request, once on its span, without the password.
    """
    with OtlpSink() as sink:
        output = run(COMMANDS[command], APP, tmp_path, sink)
        spans = by_path(sink)
        records = list(sink.logs)
    for path, (_, kind, _) in FAILURES.items():
        events = [event for event in spans[path].events if event.name == "exception"]
        assert [event.attributes["exception.type"] for event in events] == ([kind] if kind else []), path
        assert spans[path].attributes.get("error.type") == kind, path
    assert spans["/pins"].attributes["otel_correlation.validation_errors"] == ["body.pin: int_parsing"]
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    for path, (_, kind, logger) in FAILURES.items():
        own = [line for line in lines if line.get("request_id") == "id-of" + path.replace("/", "-")]
        told = [line["logger"] for line in own if "exception" in line]
        assert told == ([logger] if logger else []), (path, own)
        assert [line.get("error_type") for line in own if line["logger"] == "otel_correlation.request"] == [kind], path
        exported = [r for r in records if r.attributes.get("request_id") == own[0]["request_id"]]
        assert len([r for r in exported if "exception.stacktrace" in r.attributes]) == len(told)
    (summary,) = [line for line in lines if line.get("route") == "/pins"]
    assert (summary["status"], summary["validation_errors"]) == (422, ["body.pin: int_parsing"])
    assert output.count("REDACTED") >= 9
    assert SECRET not in output
    assert SECRET not in repr(spans) + repr(records)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_servers_and_the_applications_own_formats_quote_nobody(command: str, tmp_path: Path) -> None:
    """
    With the application's own logging the tracebacks are the server's and the application's to format: the same holds.
    """
    with OtlpSink() as sink:
        output = run(COMMANDS[command], APP + BASIC, tmp_path, sink)
    assert SECRET not in output
    assert output.count("Exception in ASGI application") == 7
    assert output.count("REDACTED") >= 9
    told = re.findall(r"^APP asyncio (\S+) (?:Task|Exception)", output, re.MULTILINE)
    assert sorted(told) == ["id-of-callback", "id-of-task"]
    (refused,) = re.findall(r"^APP shop (\S+) refused", output, re.MULTILINE)
    assert refused == "id-of-refused"


def test_readable_lines_name_the_fields(tmp_path: Path) -> None:
    """
    On a terminal's kind of line, too, a 422 says which fields failed.
    """
    with OtlpSink() as sink:
        output = run(COMMANDS["uvloop"], APP, tmp_path, sink, OTEL_CORRELATION_LOG_FORMAT="text")
    (line,) = [line for line in output.splitlines() if "POST /pins 422" in line]
    assert "body.pin: int_parsing" in line
    assert SECRET not in output
