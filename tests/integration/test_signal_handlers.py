"""
A process whose signal handler logs, traces and binds a thousand times a second, with queues that are full.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.integration.otlp_sink import Answer, OtlpSink
from tests.integration.services import clean_environment

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = 3.0  # `make stack` runs it for ten (tests/stack/test_interrupts.py)

SCRIPT = """
import json, logging, signal, sys, time
from opentelemetry import trace
from otel_correlation import bind, bootstrap, stats, work

# No lines: a handler that takes longer than a millisecond is interrupted by itself, until Python's stack is full.
logging.getLogger().addHandler(logging.NullHandler())
bootstrap(log_format="none", logs_exporters=("otlp",), max_queue_size=32, max_batch_size=16, schedule_delay_ms=5)
log = logging.getLogger("app")
tracer = trace.get_tracer("app")
calls = 0

def handler(number, frame):
    global calls
    calls += 1
    log.warning("from the handler")
    with tracer.start_as_current_span("in the handler"):
        bind(handled=calls)
    if calls % 50 == 0:
        stats()
        trace.get_tracer_provider().force_flush(1)

signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
end = time.monotonic() + float(sys.argv[1])
spans = 0
while time.monotonic() < end:
    with work("loop"):
        with tracer.start_as_current_span("in the loop"):
            bind(spans=spans)
            log.warning("from the loop")
            spans += 1
    stats()
signal.setitimer(signal.ITIMER_REAL, 0)
print(json.dumps({"calls": calls, "spans": spans, "stats": stats()}), flush=True)
"""


def interrupted_for(seconds: float, tmp_path: Path) -> None:
    """
    Run the script for so long, and check that it ends and what it tells.
    """
    script = tmp_path / "service.py"
    script.write_text(SCRIPT)
    with OtlpSink(answer=Answer(hang_s=0.02)) as sink:
        done = subprocess.run(
            [sys.executable, str(script), str(seconds)],
            env=clean_environment(OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint),
            capture_output=True,
            text=True,
            timeout=120 + 10 * seconds,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout.splitlines()[-1])
        assert told["calls"] > 10
        assert told["stats"]["spans.dropped.queue_full"] > 0
        arrived = len(sink.spans)
    # Those of work(), of the loop and of the handler; the ones in the queue at the last stats() arrive at the exit.
    made = told["calls"] + 2 * told["spans"]
    lost = sum(amount for name, amount in told["stats"].items() if name.startswith("spans.dropped."))
    assert arrived + lost == made


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs setitimer")
def test_a_handler_that_logs_never_waits_for_the_thread_that_it_interrupted(tmp_path: Path) -> None:
    """
    The process does not hang, and each span is exported or counted: in the loop and in the handler alike.
    """
    interrupted_for(SECONDS, tmp_path)
