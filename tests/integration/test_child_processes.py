"""
Child processes that end at once: their spans arrive, and their lines have the ids.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import DEADLINE_S, clean_environment

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

JOBS = """
import logging
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import otel_correlation
from opentelemetry import trace

log = logging.getLogger("jobs")


def thumbnail(name):
    with trace.get_tracer("jobs").start_as_current_span(f"thumbnail {name}"):
        log.warning("made %s for %s", name, otel_correlation.request_id())


if __name__ == "__main__":
    otel_correlation.bootstrap(mint="uuid")
    context = multiprocessing.get_context(sys.argv[1])
    with otel_correlation.work("upload"):
        print("ID", otel_correlation.request_id(), flush=True)
        call = otel_correlation.carried(thumbnail)
        if sys.argv[2] == "process":
            child = context.Process(target=call, args=("a",))
            child.start()
            child.join()
            assert child.exitcode == 0
        elif sys.argv[2] == "pool":
            with context.Pool(1) as pool:
                pool.map(call, ["a"])
                pool.close()
                pool.join()
        else:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                pool.submit(call, "a").result()
"""


@pytest.mark.parametrize("kind", ["process", "pool", "executor"])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_child_sends_its_spans_before_it_ends(method: str, kind: str, tmp_path: Path) -> None:
    """
    A child that ends long before the schedule delay sends its span, in the parent's trace, under its request id.
    """
    (tmp_path / "jobs.py").write_text(JOBS)
    with OtlpSink() as sink:
        ended = subprocess.run(
            [sys.executable, "jobs.py", method, kind],
            cwd=tmp_path,
            env=clean_environment(
                OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint,
                OTEL_SERVICE_NAME="jobs",
                OTEL_BSP_SCHEDULE_DELAY="60000",
                OTEL_CORRELATION_LOG_FORMAT="json",
            ),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        spans = {span.name: span for span in sink.spans}
    (rid,) = [line.removeprefix("ID ") for line in ended.stdout.splitlines() if line.startswith("ID ")]
    assert set(spans) == {"upload", "thumbnail a"}, ended.stdout + ended.stderr
    upload, thumbnail = spans["upload"], spans["thumbnail a"]
    assert (thumbnail.trace_id, thumbnail.parent_span_id) == (upload.trace_id, upload.span_id)
    assert thumbnail.attributes["request_id"] == upload.attributes["request_id"] == rid
    assert len(rid) == 36, "settings that were given in code hold in the child, too"
    assert thumbnail.resource["service.name"] == "jobs"
    (line,) = [line for line in ended.stdout.splitlines() if '"logger": "jobs"' in line]
    assert f'"message": "made a for {rid}"' in line
    assert f'"request_id": "{rid}"' in line
    assert f'"trace_id": "{upload.trace_id}"' in line
    assert "Traceback" not in ended.stderr
