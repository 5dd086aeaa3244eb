"""
What the worst bodies cost ``otel-correlation serve``: time, memory, and how long everybody else waits meanwhile.

    python -m benchmarks.hostile_payloads [--only NAME]

A real server on a loopback port for each body, over HTTP. Memory is the most that the process ever held (VmHWM), so
this runs on Linux. The wait of others is the longest of ``GET /healthz``, asked without a pause.
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import json
import subprocess
import tempfile
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.integration.services import BIN, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1024 * 1024
PROTOBUF = "application/x-protobuf"
JSON = "application/json"
READY_S = 30.0
ANSWER_S = 120.0


def spans(count: int, attributes: int = 0) -> bytes:
    """
    Return a valid request of so many spans, each with so many attributes.
    """
    request = ExportTraceServiceRequest()
    scope = request.resource_spans.add().scope_spans.add()
    for number in range(count):
        span = scope.spans.add(trace_id=b"\x01" * 16, span_id=(number + 1).to_bytes(8, "big"), name="GET /")
        for index in range(attributes):
            span.attributes.add(key=f"k{index}").value.int_value = index
    data: bytes = request.SerializeToString()
    return data


def bodies() -> Iterator[tuple[str, str, bool, Callable[[], bytes]]]:
    """
    Yield each body: its name, its media type, whether it is compressed, and what makes it.
    """
    yield "64 MiB of empty messages", PROTOBUF, True, lambda: gzip.compress(b"\x0a\x00" * (32 * MIB), 9)
    yield "16 MiB of empty messages, plain", PROTOBUF, False, lambda: b"\x0a\x00" * (8 * MIB)
    yield "16 MiB of empty gzip members", PROTOBUF, True, lambda: gzip.compress(b"") * (16 * MIB // 20)
    yield "JSON: 64 MiB of {}", JSON, True, lambda: gzip.compress(b'{"resourceSpans":[' + b"{}," * (21 * MIB) + b"{}]}")
    yield "JSON: a million levels", JSON, False, lambda: b"[" * MIB
    yield "99,000 valid spans", PROTOBUF, False, lambda: spans(99_000)
    yield "400,000 attributes", PROTOBUF, False, lambda: spans(4_000, 100)


def peak_mib(pid: int) -> int:
    """
    Return the most that a process ever held.
    """
    line = next(row for row in Path(f"/proc/{pid}/status").read_text().splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


def ask(port: int, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> int:
    """
    Make one request; return its status, or 0 where the connection ended without an answer.
    """
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)) as connection:
        try:
            connection.request(method, path, body, headers or {})
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return 0


def measure(media: str, body: bytes, *, compressed: bool) -> tuple[int, float, int, int, float]:
    """
    Return status, seconds to the answer, memory before and at the peak, and the longest wait of others.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as directory, Path(directory, "log").open("wb") as log:
        command = [str(BIN / "otel-correlation"), "serve", "--port", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + READY_S
            while ask(port, "GET", "/healthz") != 200:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise SystemExit(Path(directory, "log").read_text())
                time.sleep(0.05)
            before = peak_mib(process.pid)
            waits: list[float] = []
            over = threading.Event()

            def others() -> None:
                while not over.is_set():
                    begun = time.monotonic()
                    ask(port, "GET", "/healthz")
                    waits.append(time.monotonic() - begun)

            thread = threading.Thread(target=others)
            thread.start()
            begun = time.monotonic()
            headers = {"content-type": media, **({"content-encoding": "gzip"} if compressed else {})}
            status = ask(port, "POST", "/v1/traces", body, headers)
            took = time.monotonic() - begun
            over.set()
            thread.join()
            return status, took, before, peak_mib(process.pid), max(waits)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)


def main() -> None:
    """
    Measure every body and print the table.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="bodies whose name has this in it")
    parser.add_argument("--json", action="store_true", help="a JSON object for each body")
    options = parser.parse_args()
    print(f"{'body':36}{'sent kB':>10}{'status':>8}{'s':>8}{'MiB before':>12}{'peak':>6}{'others s':>10}")
    for name, media, compressed, make in bodies():
        if options.only not in name:
            continue
        body = make()
        status, took, before, peak, waited = measure(media, body, compressed=compressed)
        row = {"body": name, "kB": len(body) // 1000, "status": status, "s": round(took, 2)}
        if options.json:
            print(json.dumps({**row, "before_mib": before, "peak_mib": peak, "others_s": round(waited, 2)}), flush=True)
            continue
        print(f"{name:36}{row['kB']:>10}{status:>8}{took:>8.2f}{before:>12}{peak:>6}{waited:>10.2f}", flush=True)


if __name__ == "__main__":
    main()
