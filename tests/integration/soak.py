"""
The soak: many concurrent pipelined requests over several processes, and every line and span checked for foreign ids.

    python -m tests.integration.soak --records 1000000 --connections 5000 --workers 4

Each connection keeps three requests in flight (HTTP pipelining). One request in three brings a traceparent and a request id, one
brings only a UUID as request id, one brings nothing. A line or span is *foreign* when it names one request's token and
carries another's trace id or request id.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import resource
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import Service, clean_environment
from tests.integration.soak_app import LINES_PER_REQUEST

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

DEPTH = 3  # Requests in flight on one connection.
DEADLINE_S = 1800.0
_CHUNK = re.compile(rb"([0-9a-f]+)\r\n", re.IGNORECASE)


@dataclass(slots=True)
class Request:
    """
    What was sent, what has to come back, and what came.
    """

    token: str
    headers: bytes
    request_id: str | None  # What every line has to carry; None where the service mints it.
    trace_id: str | None


@dataclass(slots=True)
class Report:
    """
    What was seen.
    """

    requests: int = 0
    records: int = 0
    summaries: int = 0
    spans: int = 0
    missing_records: int = 0
    missing_spans: int = 0
    foreign: list[str] = field(default_factory=list)
    without_ids: list[str] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        """
        Return it as lines for a person.
        """
        return "\n".join(
            (
                (
                    f"{self.requests} requests in {self.seconds:.0f} s, at most {sum(self.peaks)} at once "
                    f"({', '.join(map(str, self.peaks))} in {len(self.peaks)} processes), {DEPTH} in flight a connection"
                ),
                (
                    f"{self.records} log records and {self.summaries} summary lines ({self.missing_records} missing), "
                    f"{self.spans} spans ({self.missing_spans} missing)"
                ),
                f"foreign ids: {len(self.foreign)}; lines or spans without ids: {len(self.without_ids)}",
                *self.foreign[:5],
                *self.without_ids[:5],
            )
        )

    @property
    def clean(self) -> bool:
        """
        Whether nothing crossed and nothing is missing.
        """
        return not (self.foreign or self.without_ids or self.missing_records or self.missing_spans)


def plan(number: int) -> Request:
    """
    Return the request with this number; three kinds in turn.
    """
    token = f"t{number:07d}"
    if number % 3 == 0:
        trace_id = uuid.uuid4().hex
        own = f"order-{token}"
        headers = f"traceparent: 00-{trace_id}-00f067aa0ba902b7-01\r\nX-Request-ID: {own}\r\n"
        return Request(token, headers.encode(), own, trace_id)
    if number % 3 == 1:
        own = str(uuid.uuid4())
        return Request(token, f"X-Request-ID: {own}\r\n".encode(), own, own.replace("-", ""))
    return Request(token, b"", None, None)


def split(buffer: bytearray) -> Iterator[tuple[dict[bytes, bytes], bytes]]:
    """
    Take whole chunked responses from the front of the buffer.
    """
    while (head_end := buffer.find(b"\r\n\r\n")) >= 0:
        body, at = bytearray(), head_end + 4
        while match := _CHUNK.match(buffer, at):
            size = int(match[1], 16)
            if len(buffer) < match.end() + size + 2:
                return
            body += buffer[match.end() : match.end() + size]
            at = match.end() + size + 2
            if size == 0:
                break
        else:
            return
        status, *lines = bytes(buffer[:head_end]).split(b"\r\n")
        assert status == b"HTTP/1.1 200 OK", status
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        del buffer[:at]
        yield headers, bytes(body)


async def converse(port: int, requests: list[Request], door: asyncio.Semaphore, connected: asyncio.Barrier) -> None:
    """
    Send the requests on one connection, ``DEPTH`` at a time, once all have connected, and learn the ids that were minted.
    """
    async with door:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await connected.wait()
    buffer = bytearray()
    for first in range(0, len(requests), DEPTH):
        batch = requests[first : first + DEPTH]
        writer.write(
            b"".join(b"GET /soak/%b HTTP/1.1\r\nHost: soak\r\n%b\r\n" % (r.token.encode(), r.headers) for r in batch)
        )
        answers: list[tuple[dict[bytes, bytes], bytes]] = []
        while len(answers) < len(batch):
            data = await reader.read(65536)
            assert data, "the server closed the connection"
            buffer += data
            answers += split(buffer)
        for request, (headers, body) in zip(batch, answers, strict=True):
            token, seen, trace_id = body.decode().split(" ")
            echoed = headers[b"x-request-id"].decode()
            assert token == request.token, f"{request.token} was answered with {token}"
            assert seen == echoed, f"{token}: the handler saw {seen}, the response says {echoed}"
            assert request.request_id in (None, seen), f"{token}: {seen} in place of {request.request_id}"
            assert request.trace_id in (None, trace_id), f"{token}: {trace_id} in place of {request.trace_id}"
            request.request_id, request.trace_id = seen, trace_id
    writer.close()
    await writer.wait_closed()


async def drive(port: int, requests: list[Request], connections: int) -> None:
    """
    Run all connections at once.
    """
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
        # Few connect at once: a process accepts whatever waits, and one would take nearly all of them.
        door, connected = asyncio.Semaphore(16), asyncio.Barrier(connections)
        for number in range(connections):
            group.create_task(converse(port, requests[number::connections], door, connected))


def check_lines(lines: Iterable[str], known: dict[str, Request], report: Report) -> None:
    """
    Count every line and compare its ids with those of the request that it names.
    """
    seen: Counter[str] = Counter()
    for line in lines:
        record = json.loads(line)
        message: str = record["message"]
        if record["logger"] == "soak" and message.startswith("peak "):
            report.peaks.append(int(message.removeprefix("peak ")))
            if "request_id" in record or "trace_id" in record:
                report.foreign.append(line)
            continue
        if message.startswith("soak "):
            token = message.split(" ")[1]
            seen[token] += 1
            report.records += 1
        elif "route" in record and record["route"] == "/soak/{token}":
            token = record["token"]
            report.summaries += 1
        else:
            continue
        ids = record.get("request_id"), record.get("trace_id")
        if not all(ids):
            report.without_ids.append(line)
        elif ids != (known[token].request_id, known[token].trace_id):
            report.foreign.append(line)
    report.missing_records += sum(LINES_PER_REQUEST - seen[token] for token in known)
    report.missing_records += len(known) - report.summaries


def run(
    directory: Path, *, records: int, connections: int, workers: int, http: str = "auto", loop: str = "auto"
) -> Report:
    """
    Start the service, load it, stop it and check everything that it wrote.
    """
    count = -(-records // LINES_PER_REQUEST)
    requests = [plan(number) for number in range(count)]
    known = {request.token: request for request in requests}
    command = ("opentelemetry-instrument", "uvicorn", "soak_app:app", "--port", "{port}")
    flags = ("--workers", str(workers), "--http", http, "--loop", loop)
    with OtlpSink() as sink:
        environment = clean_environment(
            OTEL_SERVICE_NAME="soak",
            OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint,
            OTEL_CORRELATION_LOG_FORMAT="json",
            OTEL_BSP_MAX_QUEUE_SIZE="200000",
            PYTHONPATH=str(Path(__file__).parent),
        )
        with Service((*command, *flags), directory, environment) as service:
            began = time.monotonic()
            asyncio.run(drive(service.port, requests, connections))
            report = Report(requests=count, seconds=time.monotonic() - began)
            service.stop()
            out = service.stdout()
        check_lines(out.splitlines(), known, report)
        spans = [span for span in sink.spans if "/soak/" in span.attributes.get("url.path", "")]
    for span in spans:
        request = known[span.attributes["url.path"].removeprefix("/soak/")]
        if (span.attributes["request_id"], span.trace_id) != (request.request_id, request.trace_id):
            report.foreign.append(str(span))
    report.spans = len(spans)
    report.missing_spans = count - len(spans)
    return report


def main() -> int:
    """
    Run the soak as asked and print what was seen; 1 when anything crossed or is missing.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--connections", type=int, default=5_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--http", default="auto", help="uvicorn's HTTP implementation: auto, h11 or httptools")
    parser.add_argument("--loop", default="auto", help="uvicorn's event loop: auto, asyncio or uvloop")
    options = vars(parser.parse_args())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = options["connections"] + 200
    if soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            print(f"{options['connections']} connections need {needed} open files; this process may have {hard}")
            return 2
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    with tempfile.TemporaryDirectory() as directory:
        report = run(Path(directory), **options)
    print(report)
    return 0 if report.clean else 1


if __name__ == "__main__":
    sys.exit(main())
