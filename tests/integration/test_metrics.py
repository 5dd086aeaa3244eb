"""
Metrics of a service that asks for them by one standard variable, as a collector receives them.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.integration.otlp_sink import OtlpSink, attributes
from tests.integration.services import Service, clean_environment, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

pytestmark = pytest.mark.slow

APP = """
import threading
from fastapi import FastAPI

app = FastAPI()
held = threading.Barrier(4)

@app.get("/hello")
async def hello() -> str:
    return "hello"

@app.get("/boom")
async def boom() -> str:
    raise KeyError("x")

@app.get("/held")
def wait() -> str:
    held.wait(60)
    return "free"

@app.get("/free")
async def free() -> int:
    import asyncio
    while held.n_waiting < 3:
        await asyncio.sleep(0.02)
    return held.n_waiting

@app.get("/release")
async def release() -> None:
    import asyncio
    await asyncio.to_thread(held.wait, 60)
"""
UVICORN = ("opentelemetry-instrument", "uvicorn", "main:app", "--port", "{port}")
GUNICORN = ("gunicorn", "main:app", "--bind", "127.0.0.1:{port}", "-k", "uvicorn_worker.UvicornWorker", "-w", "2")
STARTS = {
    "uvicorn": UVICORN,
    "uvicorn-workers": (*UVICORN, "--workers", "2"),
    "gunicorn": ("opentelemetry-instrument", *GUNICORN),
    "gunicorn-preload": ("opentelemetry-instrument", *GUNICORN, "--preload"),
}


def latest(sink: OtlpSink) -> Iterator[tuple[str, Metric]]:
    """
    Yield what each process sent last of each metric, with the process's ``service.instance.id``.
    """
    found: dict[tuple[str, str], Metric] = {}
    for request in list(sink.metrics):
        for resource in request.resource_metrics:
            instance = attributes(resource.resource.attributes)["service.instance.id"]
            for scope in resource.scope_metrics:
                found |= {(instance, metric.name): metric for metric in scope.metrics}
    for (instance, _), metric in found.items():
        yield instance, metric


def statuses(sink: OtlpSink) -> Counter[tuple[Any, Any]]:
    """
    Return how many requests the metrics tell of, by route and status, over all processes.
    """
    counted: Counter[tuple[Any, Any]] = Counter()
    for _, metric in latest(sink):
        if metric.name == "http.server.request.duration":
            for point in metric.histogram.data_points:
                said = attributes(point.attributes)
                counted[said["http.route"], said["http.response.status_code"]] += point.count
    return counted


def wanting(sink: OtlpSink, **variables: str) -> dict[str, str]:
    return clean_environment(
        OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint,
        OTEL_METRICS_EXPORTER="otlp",
        OTEL_METRIC_EXPORT_INTERVAL="3600000",
        OTEL_TRACES_SAMPLER_ARG="0.01",
        **variables,
    )


@pytest.mark.parametrize("start", STARTS)
def test_the_last_requests_are_counted_when_the_service_ends(start: str, tmp_path: Path) -> None:
    """
    SIGTERM comes long before the next export: every request is in the metrics all the same, the one that failed, too.
    """
    (tmp_path / "main.py").write_text(APP)
    with OtlpSink() as sink:
        with Service(STARTS[start], tmp_path, wanting(sink), ready="/openapi.json") as service:
            codes = [httpx.get(f"{service.url}{path}").status_code for path in [*["/hello"] * 20, "/boom"]]
            assert not sink.metrics, "something left before the signal: the test would prove nothing"
            service.stop()
        assert Counter(codes) == {200: 20, 500: 1}
        counted = statuses(sink)
        assert (counted["/hello", 200], counted["/boom", 500]) == (20, 1), service.output()


def test_busy_threads_of_blocking_endpoints_are_seen(tmp_path: Path) -> None:
    """
    Three blocking endpoints at work are three used threads of the pool's 40, and the span exporter's counters are beside.
    """
    (tmp_path / "main.py").write_text(APP)
    with OtlpSink() as sink:
        environment = wanting(sink) | {"OTEL_METRIC_EXPORT_INTERVAL": "100", "OTEL_TRACES_SAMPLER_ARG": "1"}

        def gauge(name: str) -> list[float]:
            return [
                point.as_double
                for _, metric in latest(sink)
                if metric.name == name
                for point in metric.gauge.data_points
            ]

        def counter(name: str) -> list[int]:
            return [
                point.as_int for _, metric in latest(sink) if metric.name == name for point in metric.sum.data_points
            ]

        with Service(UVICORN, tmp_path, environment, ready="/openapi.json") as service, httpx.Client() as client:
            asking = [threading.Thread(target=httpx.get, args=(f"{service.url}/held",)) for _ in range(3)]
            for thread in asking:
                thread.start()
            assert client.get(f"{service.url}/free", timeout=60).json() == 3
            assert sink.wait(lambda: gauge("otel_correlation.thread_pool.used") == [3.0]), service.output()
            assert gauge("otel_correlation.thread_pool.limit") == [40.0]
            client.get(f"{service.url}/release", timeout=60)
            for thread in asking:
                thread.join()
            assert sink.wait(lambda: gauge("otel_correlation.thread_pool.used") == [0.0]), service.output()
            assert sink.wait(lambda: counter("otel.sdk.exporter.span.exported") == [6])


def test_an_absent_collector_does_not_hold_up_the_exit(tmp_path: Path) -> None:
    """
    With nobody listening, SIGTERM ends a service that has metrics with its code; its own end would wait half a minute.
    """
    (tmp_path / "main.py").write_text(APP)
    environment = clean_environment(
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{free_port()}", OTEL_METRICS_EXPORTER="otlp"
    )
    with Service(UVICORN, tmp_path, environment, ready="/openapi.json") as service:
        httpx.get(f"{service.url}/hello")
        assert service.stop() == -signal.SIGTERM
    script = "import otel_correlation; otel_correlation.bootstrap(); print('done')"
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "done\n")


def test_an_applications_own_meter_provider_is_kept(tmp_path: Path) -> None:
    """
    A provider that the application made first is the one that measures, and gets our counters, too; no second one exports.
    """
    (tmp_path / "own.py").write_text(
        """
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

reader = InMemoryMetricReader()
own = MeterProvider([reader])
metrics.set_meter_provider(own)
import otel_correlation

otel_correlation.bootstrap()
assert metrics.get_meter_provider() is own
scopes = reader.get_metrics_data().resource_metrics[0].scope_metrics
print(sorted(metric.name for scope in scopes for metric in scope.metrics))
"""
    )
    with OtlpSink() as sink:
        ended = subprocess.run(
            [sys.executable, "own.py"], cwd=tmp_path, env=wanting(sink), capture_output=True, text=True, check=False
        )
        assert (ended.returncode, sink.metrics) == (0, []), ended.stderr
        assert "otel.sdk.exporter.span.exported" in ended.stdout
        assert "Overriding" not in ended.stderr


def test_an_applications_own_metrics_survive_the_signal(tmp_path: Path) -> None:
    """
    What a provider of the application's own measured last is sent at SIGTERM, too, as its spans are.
    """
    own = """
from opentelemetry import metrics
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

metrics.set_meter_provider(MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter(), 3_600_000)]))
import otel_correlation

otel_correlation.bootstrap()
"""
    (tmp_path / "main.py").write_text(own + APP)
    with OtlpSink() as sink:
        environment = clean_environment(OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint)
        with Service(UVICORN[1:], tmp_path, environment, ready="/openapi.json") as service:
            assert httpx.get(f"{service.url}/hello").status_code == 200
            assert not sink.metrics
            assert service.stop() == -signal.SIGTERM
        assert statuses(sink)["/hello", 200] == 1, service.output()


def test_metrics_leave_where_no_thread_can_be_started_any_more() -> None:
    """
    Python 3.12.0 and 3.12.1 start none once ``atexit`` runs: the last metrics are sent nonetheless, without a complaint.
    """
    script = """
import threading
from opentelemetry import metrics
import otel_correlation

otel_correlation.bootstrap()
metrics.get_meter("shop").create_counter("chairs").add(3)

def refuse(_thread):
    raise RuntimeError("can't create new thread at interpreter shutdown")

threading.Thread.start = refuse
"""
    with OtlpSink() as sink:
        ended = subprocess.run(
            [sys.executable, "-c", script], env=wanting(sink), capture_output=True, text=True, check=False
        )
        counted = [point.as_int for _, one in latest(sink) if one.name == "chairs" for point in one.sum.data_points]
    assert (ended.returncode, counted) == (0, [3]), ended.stderr
    assert "Telemetry failed" not in ended.stderr


def test_without_metrics_nothing_measures(tmp_path: Path) -> None:
    """
    A service that asks for no metrics has no provider, no reader's thread and no pool that is watched, and sends none.
    """
    (tmp_path / "main.py").write_text(
        APP
        + """
@app.get("/looked")
async def looked() -> list[object]:
    from opentelemetry.metrics import _internal
    from otel_correlation.edge import _threads
    readers = [thread.name for thread in threading.enumerate() if "Metric" in thread.name]
    return [_internal._METER_PROVIDER, readers, len(_threads._pools)]
"""
    )
    with OtlpSink() as sink:
        environment = clean_environment(OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint)
        with Service(UVICORN, tmp_path, environment, ready="/openapi.json") as service:
            assert httpx.get(f"{service.url}/looked").json() == [None, [], 0]
            service.stop()
        assert sink.spans
        assert not sink.metrics
