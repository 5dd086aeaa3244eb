r"""
The public W3C trace-context harness against a real service under our activation.

The harness is not part of this repository. To run it::

    git clone https://github.com/w3c/trace-context
    python -m venv harness && harness/bin/pip install aiohttp
    W3C_HARNESS_DIR=trace-context/test W3C_HARNESS_PYTHON=harness/bin/python \
        python -m pytest tests/integration/test_w3c_harness.py

``W3C_HARNESS_PYTHON`` is the interpreter that has aiohttp; without it, the one that runs the tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import Service, clean_environment, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

HARNESS = os.environ.get("W3C_HARNESS_DIR", "")
PYTHON = os.environ.get("W3C_HARNESS_PYTHON", sys.executable)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not HARNESS,
        reason="W3C_HARNESS_DIR does not name the test directory of a github.com/w3c/trace-context checkout",
    ),
]

# What the harness leaves out itself: six strict tests at STRICT_LEVEL 1, one Level 2 test at SPEC_LEVEL 1.
SKIPPED = {(1, 1): 7, (1, 2): 1, (2, 1): 6, (2, 2): 0}


@pytest.fixture(scope="module", params=["httptools", "h11"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """
    The target under opentelemetry-instrument, exporting to a receiver, with each of uvicorn's HTTP parsers.
    """
    command = ("opentelemetry-instrument", "uvicorn", "w3c_target:app", "--port", "{port}", "--http", request.param)
    app_dir = ("--app-dir", str(Path(__file__).parent))
    with OtlpSink() as sink:
        environment = clean_environment(OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint, OTEL_SERVICE_NAME="w3c-target")
        with Service((*command, *app_dir), tmp_path_factory.mktemp("w3c"), environment) as started:
            yield started


@pytest.mark.parametrize(("spec_level", "strict_level"), SKIPPED)
def test_harness(service: Service, spec_level: int, strict_level: int) -> None:
    """
    All 41 tests of the harness pass at every level that it knows.
    """
    # test.py takes the port of its own server from the environment; `python -m unittest` would always use 7777.
    port = str(free_port())
    done = subprocess.run(
        [str(Path(PYTHON).absolute()), "test.py", f"{service.url}/test"],
        cwd=HARNESS,
        env=clean_environment(HARNESS_PORT=port, SPEC_LEVEL=str(spec_level), STRICT_LEVEL=str(strict_level)),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    report = f"{done.stdout}\n{done.stderr}"
    skipped = SKIPPED[spec_level, strict_level]
    assert done.returncode == 0, f"{report}\n{service.output()}"
    assert re.search(r"^Ran 41 tests in ", report, re.MULTILINE), report
    assert re.search(rf"^OK \(skipped={skipped}\)$" if skipped else "^OK$", report, re.MULTILINE), report
