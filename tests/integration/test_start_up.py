"""
The start costs what the configuration needs: what it does not use is not imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import BIN, clean_environment

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

# Each of them is installed here, and costs the start 10 to 60 ms.
UNUSED = ("httpx", "httpx2", "rich", "requests", "urllib3", "google.protobuf", "grpc", "opentelemetry.sdk.metrics")

LOADED = f"""
import json, os, sys
import opentelemetry.trace
with opentelemetry.trace.get_tracer("t").start_as_current_span("a"):
    pass
assert opentelemetry.trace.get_tracer_provider().force_flush(10_000)
print(json.dumps([name for name in {UNUSED} if name in sys.modules]))
"""


def started(directory: Path, script: str, *, zero_code: bool = True, **variables: str) -> str:
    """
    Return the last line that a script printed; it is started by ``opentelemetry-instrument``, or calls ``bootstrap()``.
    """
    path = directory / "script.py"
    path.write_text(script if zero_code else f"import otel_correlation\notel_correlation.bootstrap()\n{script}")
    starter = [str(BIN / "opentelemetry-instrument")] if zero_code else []
    done = subprocess.run(
        [*starter, sys.executable, str(path)],
        cwd=directory,
        env=clean_environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("zero_code", [True, False], ids=["opentelemetry-instrument", "bootstrap"])
@pytest.mark.parametrize(
    ("variables", "used"),
    [
        ({}, []),
        ({"OTEL_LOGS_EXPORTER": "otlp"}, []),
        ({"OTEL_TRACES_EXPORTER": "none"}, []),
        ({"HTTP_PROXY": "http://127.0.0.1:1", "NO_PROXY": "*"}, ["requests", "urllib3"]),
    ],
    ids=["traces", "traces and logs", "nothing", "a proxy"],
)
def test_what_is_not_used_is_not_imported(
    tmp_path: Path, variables: dict[str, str], used: list[str], zero_code: bool
) -> None:
    """
    A service that exports spans has imported no client library, no protobuf, no gRPC, no metrics, unless it uses them.
    """
    with OtlpSink() as sink:
        said = started(tmp_path, LOADED, zero_code=zero_code, OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint, **variables)
        assert len(sink.spans) == (variables.get("OTEL_TRACES_EXPORTER") != "none")
    assert json.loads(said) == used


CALLING = """
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        found.append(self.headers.get("traceparent", ""))
        self.send_response(204)
        self.end_headers()
    def log_message(self, *_): pass

found = []
server = HTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
{library}
client.get(f"http://127.0.0.1:{{server.server_port}}/")
print("traced" if found[0] else "not traced")
"""


LATE = """
def late():
    global client
    import httpx
    client = httpx.Client()

thread = threading.Thread(target=late)
thread.start()
thread.join()
"""


@pytest.mark.parametrize(
    "library",
    [
        "import httpx; client = httpx.Client()",
        "import httpx2; client = httpx2.Client()",
        "from opentelemetry.instrumentation import httpx as contrib; import httpx; client = httpx.Client()",
        LATE,
    ],
    ids=["httpx", "httpx2", "contrib first", "imported by a thread"],
)
@pytest.mark.parametrize("zero_code", [True, False], ids=["opentelemetry-instrument", "bootstrap"])
def test_a_client_that_is_imported_later_is_instrumented(tmp_path: Path, library: str, zero_code: bool) -> None:
    """
    Httpx and httpx2 are instrumented when the application imports them, in whatever way.
    """
    script = CALLING.format(library=library)
    assert started(tmp_path, script, zero_code=zero_code, OTEL_TRACES_EXPORTER="none") == "traced"


@pytest.mark.parametrize("left_out", ["httpx", "httpx,httpx2", "*"])
def test_a_client_that_is_left_out_stays_out(tmp_path: Path, left_out: str) -> None:
    """
    ``OTEL_PYTHON_DISABLED_INSTRUMENTATIONS`` holds for a library that is imported later, too.
    """
    script = CALLING.format(library="import httpx; client = httpx.Client()")
    said = started(tmp_path, script, OTEL_TRACES_EXPORTER="none", OTEL_PYTHON_DISABLED_INSTRUMENTATIONS=left_out)
    assert said == "not traced"
