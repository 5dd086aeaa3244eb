"""
A clock that user code holds, replaces or mocks: no flush, request or exit waits for it, and durations stay true.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import clean_environment

if TYPE_CHECKING:
    from pathlib import Path

# Each is what a program does before or around its work; ``stop`` ends it.
FREEZING = {
    "freezegun": """
import freezegun
import otel_correlation
held = freezegun.freeze_time("2020-01-01")
held.start()
stop = held.stop
""",
    "freezegun before the import": """
import freezegun
held = freezegun.freeze_time("2020-01-01")
held.start()
import otel_correlation
stop = held.stop
""",
    "freezegun, released after the import": """
import freezegun
with freezegun.freeze_time("2020-01-01"):
    import otel_correlation
stop = lambda: None
""",
    "freezegun that looks at no caller": """
import freezegun
import freezegun.api
import otel_correlation
freezegun.api.call_stack_inspection_limit = 0
held = freezegun.freeze_time("2020-01-01")
held.start()
stop = held.stop
""",
    "time-machine": """
import time_machine
import otel_correlation
held = time_machine.travel("2020-01-01T00:00:00+00:00", tick=False)
held.start()
stop = held.stop
""",
    "mocks": """
import time
from unittest import mock
import otel_correlation
held = [
    mock.patch.object(time, name, return_value=1_577_836_800)
    for name in ("time", "monotonic", "perf_counter", "time_ns", "monotonic_ns", "perf_counter_ns", "sleep")
]
[one.start() for one in held]
stop = lambda: [one.stop() for one in held]
""",
}

# The answer of a program that hangs is its traceback.
WATCH = "import faulthandler\nfaulthandler.dump_traceback_later(60, exit=True)\n"

FLUSH = """
from opentelemetry import metrics, trace
from opentelemetry._logs import get_logger_provider
import logging, os
otel_correlation.bootstrap()
with trace.get_tracer("t").start_as_current_span("one"):
    logging.getLogger("app").warning("hello")
print("flushed", trace.get_tracer_provider().force_flush(300), get_logger_provider().force_flush(300), flush=True)
from otel_correlation.export import exits
exits.flush_now()
trace.get_tracer_provider().shutdown()
stop()
print("left", flush=True)
"""

REQUEST = """
import asyncio, json, time
from fastapi import FastAPI
import httpx
otel_correlation.bootstrap(log_format="json")
app = FastAPI()
transport = httpx.ASGITransport(app)

@app.get("/inner")
async def inner():
    return {}

@app.get("/")
async def handler():
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.get("/inner")
    stop()
    return {}

async def main():
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/")).status_code == 200

asyncio.run(main())
from opentelemetry import trace
print("flushed", trace.get_tracer_provider().force_flush(20_000), flush=True)
"""


def run(code: str, tmp_path: Path, **environment: str) -> str:
    """
    Run a program of its own; its output.
    """
    script = tmp_path / "frozen.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script)], env=clean_environment(**environment), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("how", "protocol"),
    [*((how, "http/protobuf") for how in FREEZING), ("freezegun that looks at no caller", "grpc")],
)
def test_a_flush_without_a_collector_returns_while_a_clock_is_held(how: str, protocol: str, tmp_path: Path) -> None:
    """
    ``force_flush``, the flush at the end of a server and ``shutdown`` return in their time, as they do with a free clock.
    """
    output = run(
        WATCH + FREEZING[how] + FLUSH,
        tmp_path,
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9",
        OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
        OTEL_LOGS_EXPORTER="otlp",
    )
    assert "flushed False False\n" in output
    assert output.endswith("left\n")


@pytest.mark.parametrize("how", FREEZING)
def test_durations_are_true_and_batches_leave_while_a_clock_is_held(how: str, tmp_path: Path) -> None:
    """
    A clock that is released in the middle of a request changes no duration, of a line or of a metric, and spans arrive.
    """
    with OtlpSink() as sink:
        output = run(
            WATCH + FREEZING[how] + REQUEST,
            tmp_path,
            OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint,
            OTEL_BSP_SCHEDULE_DELAY="100",
        )
        assert "flushed True\n" in output
        sink.wait_for_spans(2)
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    durations = [line["duration_ms"] for line in lines if "duration_ms" in line]
    assert len(durations) == 2
    assert all(0 <= duration < 60_000 for duration in durations), durations


def test_a_queue_leaves_by_its_delay_while_a_clock_is_held(tmp_path: Path) -> None:
    """
    Without any flush, spans leave after the schedule's delay, although the clock of the process stands.
    """
    work = """
from opentelemetry import trace
otel_correlation.bootstrap()
with trace.get_tracer("t").start_as_current_span("one"):
    pass
print("made", flush=True)
import sys
sys.stdin.readline()
"""
    with OtlpSink() as sink:
        script = tmp_path / "frozen.py"
        script.write_text(WATCH + FREEZING["freezegun that looks at no caller"] + work)
        environment = clean_environment(OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint, OTEL_BSP_SCHEDULE_DELAY="200")
        with subprocess.Popen(
            [sys.executable, str(script)], env=environment, stdin=subprocess.PIPE, text=True
        ) as process:
            try:
                sink.wait_for_spans(1)
            finally:
                process.communicate("\n")
        assert process.returncode == 0
