r"""
Propagation through a real service under our activation: one hop on the wire, and the public W3C trace-context harness.

The harness is not part of this repository. To run it::

    git clone https://github.com/w3c/trace-context
    python -m venv harness && harness/bin/pip install aiohttp
    W3C_HARNESS_DIR=trace-context/test W3C_HARNESS_PYTHON=harness/bin/python \
        python -m pytest tests/integration/test_w3c_harness.py

``W3C_HARNESS_PYTHON`` is the interpreter that has aiohttp; without it, the one that runs the tests.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import Service, clean_environment, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from email.message import Message

Fields = list[tuple[str, str | bytes]]

HARNESS = os.environ.get("W3C_HARNESS_DIR", "")
PYTHON = os.environ.get("W3C_HARNESS_PYTHON", sys.executable)

pytestmark = pytest.mark.slow

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


@pytest.mark.skipif(
    not HARNESS, reason="W3C_HARNESS_DIR does not name the test directory of a github.com/w3c/trace-context checkout"
)
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


class NextHop:
    """
    The service behind the service: keeps the headers of the last request that it got.
    """

    def __init__(self) -> None:
        hop = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                hop.headers = self.headers
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """
                Say nothing.
                """

        self.headers: Message = http.client.HTTPMessage()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        """
        Stop and wait for the end.
        """
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture(scope="module")
def next_hop() -> Iterator[NextHop]:
    """
    A next hop that runs for all tests here.
    """
    hop = NextHop()
    yield hop
    hop.close()


def through(service: Service, next_hop: NextHop, fields: Fields) -> tuple[str, Message]:
    """
    Send a request with these fields; return the request id of the response and the headers of the next hop.
    """
    body = json.dumps([{"url": f"http://127.0.0.1:{next_hop.server.server_port}/", "arguments": []}])
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    try:
        connection.putrequest("POST", "/test")
        for name, value in (("content-type", "application/json"), ("content-length", str(len(body))), *fields):
            connection.putheader(name, value)
        connection.endheaders(body.encode())
        response = connection.getresponse()
        response.read()
        assert response.status == 200
        return response.headers["x-request-id"], next_hop.headers
    finally:
        connection.close()


TRACE = "12345678901234567890123456789012"
PARENT = f"00-{TRACE}-1234567890123456-01"


def test_one_hop_keeps_what_is_valid(service: Service, next_hop: NextHop) -> None:
    """
    Trace, Level 2 tracestate in order, baggage with its properties and the request id reach the next service.
    """
    sent: Fields = [
        ("traceparent", PARENT),
        ("tracestate", "1st=1, b@c@d=2"),
        ("tracestate", "e=3"),
        ("baggage", "a=1;p=x;q, b=%20z%20"),
        ("baggage", "c=1+2,a=3;r"),
        ("x-request-id", "order-42"),
    ]
    request_id, headers = through(service, next_hop, sent)
    assert request_id == headers["x-request-id"] == "order-42"
    assert re.fullmatch(rf"00-{TRACE}-(?!1234567890123456)[0-9a-f]{{16}}-01", headers["traceparent"])
    assert headers["tracestate"] == "1st=1,b@c@d=2,e=3"
    assert headers["baggage"] == "a=1;p=x;q,b=%20z%20,c=1+2,a=3;r"


@pytest.mark.parametrize(
    "sent",
    [
        [("traceparent", PARENT), ("traceparent", PARENT), ("tracestate", "a=1")],
        [("traceparent", b"\xff\xfe"), ("tracestate", b"\xff=1"), ("baggage", b"\xff=,;,="), ("x-request-id", b"\xff")],
        [("traceparent", "0" * 8_000), ("x-request-id", "a" * 8_000), ("baggage", "=" * 8_000)],
        [("x-request-id", "one"), ("x-request-id", "two")],
        [("tracestate", "a=1"), ("baggage", "no member"), ("x-request-id", "a b")],
    ],
)
def test_one_hop_replaces_what_is_not(service: Service, next_hop: NextHop, sent: Fields) -> None:
    """
    Malformed and hostile fields start a new trace under a new request id, and nothing of them goes on.
    """
    request_id, headers = through(service, next_hop, sent)
    assert re.fullmatch(r"[0-9a-f]{32}", request_id)
    assert request_id not in {TRACE, "0" * 32}
    assert headers["x-request-id"] == request_id
    assert headers["traceparent"].startswith(f"00-{request_id}-")
    assert headers["tracestate"] == "ot=th:0"
    assert headers["baggage"] is None
