"""
The built wheel in a fresh virtual environment, as a team installs it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import Service, clean_environment
from tests.integration.test_zero_code import APP
from tests.stack.harness import ROOT, eventually

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.needs()


def run(*command: object, **options: object) -> str:
    """
    Run a command and return what it printed; its output is the failure's text.
    """
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return str(ended.stdout)


PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")
PINNED = ("--no-cache-dir", "--no-deps")


def environment(folder: Path, requirements: str) -> Path:
    """
    Return the Python of a new virtual environment with the packages of a file of hashes.
    """
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin/python"
    run(python, *PIP, "install", *PINNED, "--require-hashes", "--requirement", ROOT / "requirements" / requirements)
    return python


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    A virtual environment with the wheel and uvicorn, nothing else of ours.
    """
    folder = tmp_path_factory.mktemp("wheel")
    # As examples/shop/Dockerfile does: what builds and what runs, each file by its hash.
    builder = environment(folder / "builder", "build.txt")
    run(builder, *PIP, "wheel", *PINNED, "--no-build-isolation", "--wheel-dir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    python = environment(folder / "venv", "service.txt")
    run(python, *PIP, "install", *PINNED, "--no-index", wheel, cwd=folder)
    run(python, *PIP, "check", cwd=folder)
    return folder / "venv"


def test_zero_code_with_the_wheel_and_no_setting(installed: Path, tmp_path: Path) -> None:
    """
    `opentelemetry-instrument uvicorn main:app` sends spans to port 4318 and prints lines with ids, with no variable set.
    """
    (tmp_path / "main.py").write_text(APP)
    binaries = installed / "bin"
    variables = clean_environment()
    variables["PATH"] = f"{binaries}{os.pathsep}{variables['PATH']}"
    command = (str(binaries / "opentelemetry-instrument"), "uvicorn", "main:app", "--port", "{port}")
    # The port is the default's, so it cannot be a free one: wait for whoever has it.
    with contextlib.closing(eventually("port 4318", OtlpSink(port=4318).start)) as sink:
        with Service(command, tmp_path, variables) as service:
            response = httpx.get(f"{service.url}/items/7", headers={"x-request-id": "order-7781-customer-quote"})
            service.stop()
        spans = [span for span in sink.spans if span.attributes.get("http.route") == "/items/{item_id}"]
    assert response.headers["x-request-id"] == "order-7781-customer-quote"
    assert [(span.name, span.kind) for span in spans] == [("GET /items/{item_id}", "SERVER")]
    assert spans[0].resource["telemetry.distro.name"] == "otel-correlation"
    lines = [json.loads(line) for line in service.stdout().splitlines() if line.startswith("{")]
    mine = [line for line in lines if line.get("request_id") == "order-7781-customer-quote"]
    assert {line["trace_id"] for line in mine} == {spans[0].trace_id}


def test_a_missing_extra_is_one_clear_line(installed: Path) -> None:
    """
    Without the extra [local], `otel-correlation serve` names the pip command and ends with status 2.
    """
    ended = subprocess.run(
        [installed / "bin/otel-correlation", "serve"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=clean_environment(),
    )
    assert ended.returncode == 2
    assert "otel-correlation[local]" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_unknown_propagator_does_not_stop_the_start(installed: Path, tmp_path: Path) -> None:
    """
    With the wheel, OTEL_PROPAGATORS=bogus leaves the service running, and one line says so.
    """
    (tmp_path / "main.py").write_text(APP)
    variables = clean_environment(OTEL_PROPAGATORS="bogus", OTEL_TRACES_EXPORTER="none")
    variables["PATH"] = f"{installed / 'bin'}{os.pathsep}{variables['PATH']}"
    command = (str(installed / "bin/opentelemetry-instrument"), "uvicorn", "main:app", "--port", "{port}")
    with Service(command, tmp_path, variables) as service:
        response = httpx.get(f"{service.url}/items/7")
        service.stop()
    assert len(response.headers["x-request-id"]) == 32
    assert service.stdout().count("OTEL_PROPAGATORS='bogus'") == 1
