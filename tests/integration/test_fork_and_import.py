"""
A process may fork at any moment: no thread of ours is then in the middle of an import, and nobody's spans are lost.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.integration.grpc_sink import GrpcSink
from tests.integration.otlp_sink import Answer, OtlpSink
from tests.integration.services import Service, clean_environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
]

PROTOCOLS = ["http/protobuf", "grpc"]
FORKS = 50
DEADLINE_S = 120.0


@pytest.fixture
def sink(protocol: str) -> Iterator[OtlpSink | GrpcSink]:
    """
    A receiver for the protocol of the test.
    """
    with GrpcSink() if protocol == "grpc" else OtlpSink() as found:
        yield found


def ran(script: str, directory: Path, *arguments: str, **variables: str) -> list[str]:
    """
    Return what a script printed, line by line; it runs as a user's would.
    """
    path = directory / "script.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, str(path), *arguments],
        cwd=directory,
        env=clean_environment(**variables),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.splitlines()


# One process that has only our modules forks many "services"; each is set up and then forks a worker at its own moment.
FORKING = """
import json, os, signal, sys, time
import otel_correlation.bootstrap, otel_correlation

def worker(tracer, provider, number):
    with tracer.start_as_current_span("worker"):
        pass
    arrived = provider.force_flush(20_000)
    import requests
    os._exit(0 if arrived and hasattr(requests, "Session") else 1)

def service(delay_s, number):
    from opentelemetry import trace
    began = time.monotonic()
    otel_correlation.bootstrap()
    tracer, provider = trace.get_tracer("t"), trace.get_tracer_provider()
    with tracer.start_as_current_span("before"):
        pass
    while time.monotonic() < began + delay_s:
        time.sleep(0.0005)
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)  # one that hangs is ended, and seen
        worker(tracer, provider, number)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with tracer.start_as_current_span("after"):
        pass
    arrived = provider.force_flush(20_000)
    os._exit(0 if arrived and ended == 0 else 1 if ended == 0 else 2)

running = {}
for number, delay_s in enumerate(json.loads(sys.argv[1])):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        try:
            service(delay_s, number)
        finally:
            os._exit(3)
    running[pid] = delay_s
    while len(running) >= 4:
        pid, status = os.wait()
        print(json.dumps([running.pop(pid), os.waitstatus_to_exitcode(status)]), flush=True)
while running:
    pid, status = os.wait()
    print(json.dumps([running.pop(pid), os.waitstatus_to_exitcode(status)]), flush=True)
"""


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_fork_at_any_moment_of_the_first_second_loses_nothing(
    protocol: str, sink: OtlpSink | GrpcSink, tmp_path: Path
) -> None:
    """
    Fifty services fork at fifty moments: every span of parent and worker arrives once, and the worker can import.
    """
    # Half of them around the first batch, which leaves half a second after the first span.
    moments = [random.Random(number).uniform(*((0.0, 1.0), (0.48, 0.7))[number % 2]) for number in range(FORKS)]
    printed = ran(
        FORKING,
        tmp_path,
        json.dumps(moments),
        OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint,
        OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
        OTEL_SERVICE_NAME="forking",
    )
    ended = [json.loads(line) for line in printed if line.startswith("[")]
    assert len(ended) == FORKS
    assert [entry for entry in ended if entry[1] != 0] == []
    assert Counter(span.name for span in sink.spans) == {"before": FORKS, "worker": FORKS, "after": FORKS}


# Whatever asks for a module that is not loaded comes by the first finder; a module that is loaded does not.
WATCHING = """
import sys, threading, time, os

found = []
class Watch:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if threading.current_thread() is not threading.main_thread():
            found.append((threading.current_thread().name, name))
sys.meta_path.insert(0, Watch)

import logging
import otel_correlation
otel_correlation.bootstrap()
from opentelemetry import metrics, trace
counter = metrics.get_meter("m").create_counter("c")
tracer = trace.get_tracer("t")
for number in range(8):
    with tracer.start_as_current_span(f"span {number}") as span:
        span.record_exception(ValueError("x"))
        logging.getLogger("app").error("record %d", number, exc_info=ValueError("y"))
        counter.add(1)
    trace.get_tracer_provider().force_flush(3_000)
    if os.environ["OTEL_METRICS_EXPORTER"] != "none":
        metrics.get_meter_provider().force_flush(3_000)
print("imported by threads:", sorted(set(found)))
os._exit(0)
"""


def imported_by_threads(directory: Path, **variables: str) -> str:
    """
    Return what the threads of a process that exports all signals imported, as its last line says it.
    """
    variables = {
        "OTEL_LOGS_EXPORTER": "otlp",
        "OTEL_METRICS_EXPORTER": "otlp",
        "OTEL_METRIC_EXPORT_INTERVAL": "300",
        **variables,
    }
    return ran(WATCHING, directory, **variables)[-1]


NOTHING = "imported by threads: []"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_thread_of_ours_imports(protocol: str, sink: OtlpSink | GrpcSink, host: str, tmp_path: Path) -> None:
    """
    Whatever the exporting threads need is imported before they start: traces, logs and metrics, with either protocol.
    """
    said = imported_by_threads(
        tmp_path,
        OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint.replace("127.0.0.1", host),
        OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
    )
    assert said == NOTHING
    assert len(sink.spans) == 8


@pytest.mark.parametrize(
    "answer",
    [
        Answer(rejected=1, message="too old"),
        Answer(status=503, headers={"retry-after": "1"}),
        Answer(status=429, headers={"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        Answer(status=400, body=b"no"),
        Answer(drop=True),
    ],
    ids=["partial success", "503", "429 until a date", "400", "cut off"],
)
def test_no_thread_of_ours_imports_whatever_the_collector_answers(answer: Answer, tmp_path: Path) -> None:
    """
    The paths of a refusal, a partial success and a lost answer import nothing on a thread, either.
    """
    with OtlpSink() as sink:
        sink.answers = [answer] * 4
        assert imported_by_threads(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint) == NOTHING


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_no_thread_of_ours_imports_to_compress(compression: str, tmp_path: Path) -> None:
    """
    Compression, https and a collector that cannot be reached import nothing on a thread.
    """
    assert (
        imported_by_threads(
            tmp_path,
            OTEL_EXPORTER_OTLP_ENDPOINT="https://127.0.0.1:1",
            OTEL_EXPORTER_OTLP_COMPRESSION=compression,
            OTEL_METRICS_EXPORTER="none",
        )
        == NOTHING
    )


SLOW_IMPORT = """
import sys, threading, time, os, pathlib
here = pathlib.Path(__file__).parent
(here / "slow_module.py").write_text("import time\\nfor _ in range(60): time.sleep(0.01)\\nREADY = True\\n")
sys.path.insert(0, str(here))
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from otel_correlation import export

class Lazy(SpanExporter):
    def export(self, spans):
        import slow_module
        return SpanExportResult.SUCCESS
    def shutdown(self): pass
    def force_flush(self, timeout_millis=0): return True

pipeline = export.SpanPipeline([Lazy()], schedule_delay_ms=1)
provider = TracerProvider(shutdown_on_exit=False)
provider.add_span_processor(pipeline)
provider.get_tracer("t").start_span("a").end()
while "slow_module" not in sys.modules:
    time.sleep(0.001)
pid = os.fork()
if pid == 0:
    import slow_module
    provider.get_tracer("t").start_span("b").end()
    os._exit(0 if hasattr(slow_module, "READY") and pipeline.force_flush(5000) else 1)
print("worker ended with", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
os._exit(0)
"""


def test_a_fork_waits_for_an_import_of_somebodys_exporter(tmp_path: Path) -> None:
    """
    An exporter that is not ours may import when it exports first; a fork waits until that import has ended.
    """
    assert ran(SLOW_IMPORT, tmp_path)[-1] == "worker ended with 0"


PRELOADED = """
import logging, os, time
from fastapi import FastAPI
app = FastAPI()
logging.getLogger("app").warning("importing")
time.sleep(float(os.environ["LOAD"]))
@app.get("/x/{n}")
def x(n: int): return {"pid": os.getpid()}
@app.get("/req")
def req():
    import requests
    return {"ok": hasattr(requests, "Session")}
"""


@pytest.mark.parametrize("load", ["0.3", "0.45", "0.5"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_gunicorn_preload_serves_and_delivers(
    protocol: str, sink: OtlpSink | GrpcSink, load: str, tmp_path: Path
) -> None:
    """
    ``gunicorn --preload -w 3`` whose application logs before the fork: each worker answers, imports, and delivers all.
    """
    (tmp_path / "preloaded.py").write_text(PRELOADED)
    service = Service(
        [
            *("opentelemetry-instrument", "gunicorn", "--preload", "-w", "3", "-b", "127.0.0.1:{port}"),
            *("-k", "uvicorn_worker.UvicornWorker", "preloaded:app"),
        ],
        tmp_path,
        clean_environment(
            LOAD=load,
            OTEL_LOGS_EXPORTER="otlp",
            OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint,
            OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
            OTEL_PYTHON_EXCLUDED_URLS="openapi.json",
        ),
    )
    with service:
        for number in range(12):
            assert httpx.get(f"{service.url}/x/{number}", timeout=20).status_code == 200
        assert httpx.get(f"{service.url}/req", timeout=20).json() == {"ok": True}
        service.stop()
    names = Counter(span.name for span in sink.spans if span.kind == "SERVER")
    assert names == {"GET /x/{n}": 12, "GET /req": 1}
