"""
httpx on aiohttp: one CLIENT span for each request on the wire, beside the official instrumentation of aiohttp.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.integration.services import DEADLINE_S, clean_environment

PROGRAM = Path(__file__).parent / "apps" / "aiohttp_under_httpx.py"


def test_one_span_for_each_request(libraries: Path) -> None:
    """
    Under httpx the span is ours and its traceparent is the one that is sent; aiohttp alone keeps its own span.
    """
    done = subprocess.run(
        [str(libraries / "python"), str(PROGRAM)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env=clean_environment(OTEL_CORRELATION_LOG_FORMAT="none"),
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    ours, theirs = "otel_correlation.client", "opentelemetry.instrumentation.aiohttp_client"
    assert seen["scopes"] == [ours, ours, theirs]
    assert [[value.rpartition("-")[0] for value in values] for values in seen["received"]] == [
        [span] for span in seen["spans"]
    ]
