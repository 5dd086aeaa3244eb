"""
Folders ahead of ours on PYTHONPATH: another OpenTelemetry, an old protobuf, another wrapt, as operators inject them.

Each is made by pip, or copied from what is installed and changed, once in a session.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from otel_correlation import log_config
from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import Service, clean_environment

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
SITE = Path(sysconfig.get_path("purelib"))
UVICORN = ("uvicorn", "main:app", "--port", "{port}")
ZERO = ("opentelemetry-instrument", *UVICORN)
HANDLERS = """
import asyncio, logging
from fastapi import FastAPI
from otel_correlation import (
    ConfigError, __version__, bind, bootstrap, carried, continue_from, edge, inject, request_id, stats, trace_id, work
)
import otel_correlation.logs, otel_correlation.logs.structlog, otel_correlation.tasks.arq, otel_correlation.tasks.redis
import otel_correlation.testing
{start}
app = FastAPI()

@app.get("/")
async def read():
    bind(tenant="acme")
    with work("tick"):
        pass
    async with continue_from(inject({{}}), "message"):
        pass
    doubled = work("double")(carried(abs))(-2)
    logging.getLogger("shop").warning("looked up")
    return {{"id": request_id(), "trace": trace_id(), "doubled": doubled, "stats": type(stats()).__name__}}

@app.get("/sync")
def sync():
    return request_id()

wrapped = edge(app)
"""
IN_CODE = HANDLERS.format(start="bootstrap(ratio=1.0)\nbootstrap()")
ZERO_CODE = HANDLERS.format(start="")
OPERATORS = ("distro", "instrumentation-fastapi", "instrumentation-httpx")
# What pip brings besides is what an operator's image brings besides.
PACKAGES = {
    "sdk-1.30": ("opentelemetry-api==1.30.0", "opentelemetry-sdk==1.30.0"),
    "all-1.30": tuple(f"opentelemetry-{name}==0.51b0" for name in OPERATORS),
    "all-1.39": tuple(f"opentelemetry-{name}==0.60b1" for name in OPERATORS),
    "protobuf-3": ("protobuf==3.20.3",),
    "protobuf-4": ("protobuf==4.25.8",),
    "wrapt-1": ("wrapt==1.17.3",),
    "wrapt-2": ("wrapt==2.0.0",),
}
# Private names that we read, by what a release could call them instead.
RENAMED = {
    "_SPAN_KEY": "_SPAN_SLOT",
    "_BAGGAGE_KEY": "_BAGGAGE_SLOT",
    "_RUNTIME_CONTEXT": "_HELD_CONTEXT",
    "_SUPPRESS_INSTRUMENTATION_KEY": "_SUPPRESSED",
    "_SUPPRESS_HTTP_INSTRUMENTATION_KEY": "_SUPPRESSED_HTTP",
    "_TRACER_PROVIDER": "_ONE_TRACER_PROVIDER",
    "_METER_PROVIDER": "_ONE_METER_PROVIDER",
    "_ProxyMeterProvider": "_LateMeterProvider",
    "ProxyLoggerProvider": "LateLoggerProvider",
    "NoOpTracerMetrics": "SilentTracerMetrics",
    "_extract_retry_after": "_wait_of",
    "std_to_otel": "severity_of",
    "_tracer_config": "_configured",
    "_tracers": "_made_tracers",
    "_OTLP_HTTP_HEADERS": "_STOCK_HEADERS",
    "_load_session_from_envvar": "_session_of",
    "_import_sampler": "_sampler_of",
}


def copied(target: Path, version: str, renamed: dict[str, str]) -> Path:
    """
    Copy the OpenTelemetry that is installed, with another version and other private names.
    """
    pattern = re.compile(rf"\b({'|'.join(renamed)})\b") if renamed else None
    shutil.copytree(SITE / "opentelemetry", target / "opentelemetry", ignore=shutil.ignore_patterns("__pycache__"))
    for file in (target / "opentelemetry").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if pattern is not None:
            text = pattern.sub(lambda found: renamed[found[1]], text)
        if version and file.parts[-2] == "version":
            text = re.sub(r'__version__ = "1\.[^"]+"', f'__version__ = "{version}"', text)
        file.write_text(text, encoding="utf-8")
    return target


@pytest.fixture(scope="session")
def ahead(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """
    Makes the folder of a name, once.
    """
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            target = tmp_path_factory.mktemp(name)
            if name == "newer-1.46":
                copied(target, "1.46.0", {"_SPAN_KEY": "_SPAN_SLOT"})
            elif name == "newer-2.0":
                copied(target, "2.0.0", {"BoundedAttributes": "LimitedAttributes"})
            elif name == "renamed":
                copied(target, "1.45.9", RENAMED)
            elif name == "removed":
                copied(target, "", {"get_global_response_propagator": "response_propagator"})
            else:
                pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
                done = subprocess.run(
                    [*pip, "--target", str(target), *PACKAGES[name]], capture_output=True, text=True, check=False
                )
                if done.returncode:
                    pytest.skip(f"pip cannot install {PACKAGES[name]}: {done.stderr[-200:]}")
            made[name] = target
        return made[name]

    return folder


def lines_of_ours(output: str) -> list[str]:
    """
    Return the lines that say we are off.
    """
    return [line for line in output.splitlines() if "otel-correlation" in line]


OFF = [
    ("sdk-1.30", "code", "opentelemetry-api >=1.45.1,<1.46 is needed, and 1.30.0 comes first"),
    ("all-1.30", "zero", "1.30.0 comes first"),
    ("all-1.39", "code", "1.39.1 comes first"),
    ("all-1.39", "zero", "1.39.1 comes first"),
    ("all-1.39", "zero, chosen", "1.39.1 comes first"),
    ("newer-1.46", "zero", "1.46.0 comes first"),
    ("newer-2.0", "code", "2.0.0 comes first"),
    ("removed", "code", "cannot import name 'get_global_response_propagator'"),
    ("removed", "zero", "cannot import name 'get_global_response_propagator'"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "start", "says"), OFF, ids=[f"{name} {start}" for name, start, _ in OFF])
def test_where_we_cannot_work_one_line_says_so_and_the_service_serves(
    name: str, start: str, says: str, ahead: Callable[[str], Path], tmp_path: Path
) -> None:
    """
    The service answers 200 and every public function returns; one line names package, versions and folder.
    """
    folder = ahead(name)
    (tmp_path / "main.py").write_text(IN_CODE if start == "code" else ZERO_CODE)
    environment = clean_environment(
        PYTHONPATH=str(folder), OTEL_TRACES_EXPORTER="none", OTEL_METRICS_EXPORTER="none", OTEL_LOGS_EXPORTER="none"
    )
    if start == "zero, chosen":
        environment["OTEL_PYTHON_DISTRO"] = environment["OTEL_PYTHON_CONFIGURATOR"] = "otel_correlation"
    with Service(UVICORN if start == "code" else ZERO, tmp_path, environment) as service:
        answer = httpx.get(service.url, headers={"X-Request-ID": "order-4711-of-today"})
        sync = httpx.get(service.url + "/sync", headers={"X-Request-ID": "order-4712-of-today"})
        minted = httpx.get(service.url, headers={"X-Request-ID": "not valid"})
        service.stop()
        output = service.output()
    assert answer.status_code == 200, output
    assert answer.json()["id"] == answer.headers["x-request-id"] == "order-4711-of-today"
    assert sync.json() == "order-4712-of-today"
    assert re.fullmatch("[0-9a-f]{32}", minted.headers["x-request-id"])
    assert "Traceback" not in output
    said = lines_of_ours(output)
    assert len(said) == 1, output
    assert says in said[0]
    assert str(folder) in said[0]


@pytest.mark.slow
def test_a_log_config_of_ours_is_usable_where_we_cannot_work(ahead: Callable[[str], Path], tmp_path: Path) -> None:
    """
    A server that was given our ``--log-config`` starts and writes its lines, with an empty request id.
    """
    (tmp_path / "main.py").write_text(IN_CODE)
    (tmp_path / "lines.json").write_text(json.dumps(log_config("json")))
    environment = clean_environment(PYTHONPATH=str(ahead("newer-2.0")))
    with Service((*UVICORN, "--log-config", "lines.json"), tmp_path, environment) as service:
        answer = httpx.get(service.url)
        service.wait_for(lambda: "GET / HTTP/1.1" in service.output())
        service.stop()
        output = service.output()
    assert answer.status_code == 200, output
    assert "Traceback" not in output
    assert len(lines_of_ours(output)) == 1, output


ON = [
    ("protobuf-3", "code"),
    ("protobuf-4", "zero"),
    ("wrapt-1", "zero"),
    ("wrapt-2", "code"),
    ("renamed", "code"),
    ("renamed", "zero"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "start"), ON)
def test_what_can_be_done_without_is_done_without(
    name: str, start: str, ahead: Callable[[str], Path], tmp_path: Path
) -> None:
    """
    Other releases of what we hardly use, and private names that are gone, cost nothing: spans, ids and lines are there.
    """
    (tmp_path / "main.py").write_text(IN_CODE if start == "code" else ZERO_CODE)
    with OtlpSink() as sink:
        environment = clean_environment(
            PYTHONPATH=str(ahead(name)), OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint, OTEL_LOGS_EXPORTER="otlp"
        )
        with Service(UVICORN if start == "code" else ZERO, tmp_path, environment) as service:
            answer = httpx.get(service.url)
            service.stop()
            output = service.output()
        (span,) = [span for span in sink.spans if span.kind == "SERVER" and span.attributes["url.path"] == "/"]
    assert answer.json()["trace"] == span.trace_id
    assert answer.headers["x-request-id"] == span.attributes["request_id"] == answer.json()["id"]
    assert span.attributes["tenant"] == "acme"
    assert "Traceback" not in output
    assert " is off" not in output
    assert span.trace_id in next(line for line in output.splitlines() if "looked up" in line)


@pytest.mark.slow
def test_switched_off_says_nothing(ahead: Callable[[str], Path], tmp_path: Path) -> None:
    """
    With OTEL_CORRELATION_ENABLED=false nobody is told of packages that nobody uses.
    """
    (tmp_path / "main.py").write_text(IN_CODE)
    environment = clean_environment(PYTHONPATH=str(ahead("newer-2.0")), OTEL_CORRELATION_ENABLED="false")
    with Service(UVICORN, tmp_path, environment) as service:
        answer = httpx.get(service.url)
        output = service.output()
    assert answer.json()["id"] is None
    assert lines_of_ours(output) == []
