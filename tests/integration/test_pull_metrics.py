"""
A process exports metrics of its own when it serves or measures: a parent that starts workers takes nothing from them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import DEADLINE_S, Service, clean_environment, free_port

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

# As the exporter of Prometheus: a reader that listens on a port from the moment when it is made.
PULL = """
import json, os, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from opentelemetry.sdk.metrics.export import MetricReader

class Pull(MetricReader):
    def __init__(self):
        super().__init__()
        reader = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                reader.data = None
                reader.collect()
                found = {}
                for group in (reader.data.resource_metrics if reader.data else ()):
                    for scope in group.scope_metrics:
                        for metric in scope.metrics:
                            found[metric.name] = sum(
                                getattr(point, "count", None) or getattr(point, "value", 0) for point in metric.data.data_points
                            )
                body = json.dumps({"pid": os.getpid(), "parent": os.getppid(), "metrics": found}).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                return

        server = ThreadingHTTPServer(("127.0.0.1", int(os.environ["PULL_PORT"])), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def _receive_metrics(self, metrics_data, timeout_millis=10_000, **kwargs):
        self.data = metrics_data

    def shutdown(self, timeout_millis=30_000, **kwargs):
        return
"""
APPLICATION = """
import os
from fastapi import FastAPI
from opentelemetry import metrics
app = FastAPI()
metrics.get_meter("app").create_counter("imports").add(1)

@app.get("/pid")
def pid(): return os.getpid()
"""


@pytest.fixture
def pulled(tmp_path: Path) -> dict[str, str]:
    """
    The variables of a service with a pull exporter, which is installed beside its application.
    """
    installed = tmp_path / "pull_exporter-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: pull-exporter\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[opentelemetry_metrics_exporter]\npull = pull_exporter:Pull\n")
    (tmp_path / "pull_exporter.py").write_text(PULL)
    (tmp_path / "pulled_app.py").write_text(APPLICATION)
    return clean_environment(
        PYTHONPATH=str(tmp_path),
        PULL_PORT=str(free_port()),
        OTEL_METRICS_EXPORTER="pull",
        OTEL_TRACES_EXPORTER="none",
    )


def what_is_pulled(environment: dict[str, str]) -> dict[str, object]:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            found: dict[str, object] = httpx.get(f"http://127.0.0.1:{environment['PULL_PORT']}/", timeout=5).json()
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return found


SERVERS = {
    "one worker": ["uvicorn", "pulled_app:app", "--port", "{port}"],
    "workers": ["uvicorn", "pulled_app:app", "--port", "{port}", "--workers", "2"],
    "reload": ["uvicorn", "pulled_app:app", "--port", "{port}", "--reload"],
    "gunicorn": [
        "gunicorn",
        "-w",
        "2",
        "-k",
        "uvicorn_worker.UvicornWorker",
        "-b",
        "127.0.0.1:{port}",
        "pulled_app:app",
    ],
    "gunicorn, preloaded": [
        *("gunicorn", "--preload", "-w", "2", "-k", "uvicorn_worker.UvicornWorker", "-b", "127.0.0.1:{port}"),
        "pulled_app:app",
    ],
}


@pytest.mark.parametrize("server", SERVERS)
def test_a_process_that_serves_has_the_port(server: str, tmp_path: Path, pulled: dict[str, str]) -> None:
    """
    The port of a pull exporter is a worker's, and what is pulled are its requests; the parent takes none.
    """
    with Service(["opentelemetry-instrument", *SERVERS[server]], tmp_path, pulled) as service:
        pid = what_is_pulled(pulled)["pid"]
        assert (pid == service.process.pid) is (server == "one worker")
        with httpx.Client(base_url=service.url) as client:
            # Each request on a connection of its own, until the worker with the port has answered one.
            deadline = time.monotonic() + DEADLINE_S
            while httpx.get(f"{service.url}/pid").json() != pid:
                assert time.monotonic() < deadline
            assert client.get("/pid").status_code == 200
        metrics = what_is_pulled(pulled)["metrics"]
        assert isinstance(metrics, dict)
        assert metrics["http.server.request.duration"] >= 1


def output_of(script: str, directory: Path, variables: dict[str, str]) -> str:
    """
    Run a script under ``opentelemetry-instrument``, and return what it printed.
    """
    done = subprocess.run(
        [*("opentelemetry-instrument", sys.executable, "-c"), script],
        env=variables,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    return done.stdout


def test_pythons_own_helper_exports_nothing(tmp_path: Path, pulled: dict[str, str]) -> None:
    """
    The process that ``multiprocessing`` starts to look after its resources is no service, however long it lives.
    """
    script = (
        "from multiprocessing.resource_tracker import main\n"
        "from otel_correlation.bootstrap import _state\n"
        "print('enabled', _state.settings.enabled, _state.readers)\n"
    )
    assert "enabled False None" in output_of(script, tmp_path, pulled)


def test_a_script_that_measures_exports(tmp_path: Path, pulled: dict[str, str]) -> None:
    """
    A process that serves nothing and supervises nobody has the port from its first measurement on.
    """
    script = (
        "from opentelemetry import metrics\n"
        "metrics.get_meter('m').create_counter('c').add(5)\n"
        "import os, urllib.request\n"
        "print(urllib.request.urlopen('http://127.0.0.1:' + os.environ['PULL_PORT']).read().decode())\n"
    )
    assert '"c": 5' in output_of(script, tmp_path, pulled)


def test_a_script_that_only_observes_exports(tmp_path: Path, pulled: dict[str, str]) -> None:
    """
    Without any measurement, a long-lived process that is no server has the port after a few seconds.
    """
    process = subprocess.Popen(
        ["opentelemetry-instrument", sys.executable, "-c", "input()"], env=pulled, cwd=tmp_path, stdin=subprocess.PIPE
    )
    try:
        assert what_is_pulled(pulled)["pid"] == process.pid
    finally:
        process.communicate(b"\n", timeout=DEADLINE_S)


def test_a_short_script_pushes_what_it_measured(tmp_path: Path) -> None:
    """
    A push exporter sends what was measured before anything else happened, at the process's end.
    """
    with OtlpSink() as sink:
        subprocess.run(
            [
                *("opentelemetry-instrument", sys.executable, "-c"),
                "from opentelemetry import metrics; metrics.get_meter('m').create_counter('first').add(1)",
            ],
            env=clean_environment(OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint, OTEL_METRICS_EXPORTER="otlp"),
            cwd=tmp_path,
            timeout=DEADLINE_S,
            check=True,
        )
        names = {
            metric.name
            for request in sink.metrics
            for group in request.resource_metrics
            for scope in group.scope_metrics
            for metric in scope.metrics
        }
    assert "first" in names


def test_a_port_that_is_taken_is_one_line(tmp_path: Path, pulled: dict[str, str]) -> None:
    """
    The second worker cannot have the port: one line says so, and it serves.
    """
    (tmp_path / "taken.py").write_text(
        "import os, socket\nsock = socket.socket()\nsock.bind(('127.0.0.1', int(os.environ['PULL_PORT'])))\nsock.listen()\n"
        + APPLICATION.replace('metrics.get_meter("app").create_counter("imports").add(1)\n', "")
    )
    command = ["opentelemetry-instrument", "uvicorn", "taken:app", "--port", "{port}"]
    with Service(command, tmp_path, pulled) as service:
        assert httpx.get(f"{service.url}/pid").status_code == 200
        service.stop()
        said = [line for line in service.output().splitlines() if "OTEL_METRICS_EXPORTER" in line]
    assert len(said) == 1
    assert "Address already in use" in said[0]
