"""
The soak with hostile callers: any request head, everything unique, and clients that leave at any moment.

    python -m tests.integration.soak_hostile --heads 1000000 --unique 200000 --aborted 100000 --clients 2

Each load runs against a real uvicorn with both of its HTTP implementations, half of the requests each, from several client
processes over raw sockets: keep-alive, pipelined. What is asserted is in ``Report.faults``: no status of 500 or more, one
valid request id on each response, every line on stdout one JSON object, no traceback anywhere, memory flat once every table
is full, and no descriptor and no task that stays.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx

from tests.integration.services import BIN, DEADLINE_S, clean_environment, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEPTH = 16  # Requests in flight on one connection.
PER_CONNECTION = 640
SILENCE_S = 120.0
# The largest table that keys of callers fill: the reuse guard's.
TABLE = 65_536
# What memory may grow by once the tables are full: the allocator's pages, and batches in flight.
FLAT_MB = 24.0
# Before they are full; a run of seconds ends there.
FILLING_MB = 160.0

# uvicorn over httptools writes to a connection that is gone, and uvloop raises; it does so without us, too.
_UVLOOP = b"unable to perform operation on <TCPTransport closed=True"
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
_ID = re.compile(rb"\r\nx-request-id: ([A-Za-z0-9._~:/+=#-]{1,200})\r\n", re.IGNORECASE)
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)


@dataclass(slots=True)
class Report:
    """
    What one load did, and what went wrong.
    """

    load: str
    http: str
    requests: int = 0
    seconds: float = 0.0
    lines: int = 0
    of_uvloop: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    rss_mb: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """
        Return it as lines for a person.
        """
        memory = (
            f"{self.rss_mb[0]:.0f} to {self.rss_mb[-1]:.0f} MB, at most {max(self.rss_mb):.0f}"
            if self.rss_mb
            else "unknown"
        )
        answers = ", ".join(f"{status} x {count}" for status, count in sorted(self.statuses.items()))
        return "\n".join(
            (
                f"{self.load} over {self.http}: {self.requests} in {self.seconds:.0f} s; {answers or 'no answer was waited for'}",
                f"  {self.lines} lines, each a JSON object ({self.of_uvloop} tell of uvloop's closed handler); memory {memory}; faults: {len(self.faults)}",
                *(f"  {fault}" for fault in self.faults[:10]),
            )
        )


# --- the server ---


class _Drain(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", "0")))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


class Server:
    """
    One uvicorn process under ``opentelemetry-instrument``; its stdout is read and checked while it runs.
    """

    def __init__(self, directory: Path, http: str, **variables: str) -> None:
        self.port = free_port()
        self.bad_lines: list[str] = []
        self.lines = 0
        self.of_uvloop = 0
        self._drain = ThreadingHTTPServer(("127.0.0.1", 0), _Drain)
        self._err = directory / f"hostile-{http}-{self.port}.err"
        environment = clean_environment(
            OTEL_SERVICE_NAME="hostile",
            OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{self._drain.server_port}",
            OTEL_LOGS_EXPORTER="otlp",
            OTEL_CORRELATION_LOG_FORMAT="json",
            OTEL_CORRELATION_REQUEST_ID_HEADERS="X-Request-ID,X-Correlation-ID,X-Amzn-Trace-Id",
            OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_SERVER_REQUEST="x-tenant,x-.*-id",
            OTEL_PYTHON_FASTAPI_EXCLUDED_URLS="health,internal/.*",
            PYTHONPATH=str(Path(__file__).parent),
            **variables,
        )
        with self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [
                    *(
                        str(BIN / "opentelemetry-instrument"),
                        "uvicorn",
                        "soak_hostile_app:app",
                        "--port",
                        str(self.port),
                    ),
                    *("--http", http, "--no-access-log", "--backlog", "4096"),
                ],
                cwd=directory,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=err,
                start_new_session=True,
            )
        self._threads = [threading.Thread(target=self._read), threading.Thread(target=self._drain.serve_forever)]

    def __enter__(self) -> Self:
        """
        Wait for the first answer.
        """
        for thread in self._threads:
            thread.start()
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                self.state()
                return self
            time.sleep(0.05)
        self.__exit__()
        raise AssertionError(f"the server did not start:\n{self.stderr()}")

    def __exit__(self, *exc_info: object) -> None:
        """
        Stop it, and read what it still had to say.
        """
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(DEADLINE_S)
        self._drain.shutdown()
        for thread in self._threads:
            thread.join()
        self._drain.server_close()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            self.lines += 1
            try:
                line = json.loads(raw)
                bad = not isinstance(line, dict) or "exception" in line or line["level"] in ("ERROR", "CRITICAL")
            except (ValueError, KeyError):
                bad = True
            if bad and _UVLOOP in raw:
                self.of_uvloop += 1
            elif bad and len(self.bad_lines) < 20:
                self.bad_lines.append(raw[:6000].decode("utf-8", "replace"))

    def state(self) -> dict[str, Any]:
        """
        Return what the service says of itself.
        """
        found: dict[str, Any] = httpx.get(f"http://127.0.0.1:{self.port}/state", timeout=SILENCE_S).json()
        return found

    def stderr(self) -> str:
        """
        Return what it wrote to stderr.
        """
        return self._err.read_text(errors="replace")

    @property
    def rss_mb(self) -> float:
        """
        The memory of the process.
        """
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    @property
    def descriptors(self) -> int:
        """
        How many files and sockets it has open.
        """
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))  # noqa: PTH208 - counted, not read


# --- what callers send ---

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
_NAMES = (
    *(
        "traceparent",
        "tracestate",
        "baggage",
        "X-Request-ID",
        "X-Correlation-ID",
        "X-Amzn-Trace-Id",
        "x-tenant",
        "x-a-id",
    ),
    *(
        "X-Forwarded-For",
        "Forwarded",
        "User-Agent",
        "Cookie",
        "Accept",
        "Referer",
        "Authorization",
        "X_Request_ID",
        "b3",
    ),
)
_PIECES = (
    *(
        PARENT,
        TRACE,
        "00-",
        "-01",
        "ot=th:8;rv:01234567890abc",
        "ot=th:",
        "a=b",
        ",",
        ";",
        "=",
        ";p=1",
        "; p = 1",
        "%20",
        "%ff",
        "%",
    ),
    *(
        "f4a2b3c1-dead-beef-0000-aabbccddeeff",
        "order-7",
        "Root=1-67891233-abcdef012345678912345678",
        "for=",
        "for=1.1.1.1",
        '"',
        "\\",
    ),
    *(
        "127.0.0.1",
        "[::1]",
        ":80",
        "a",
        "0",
        " ",
        "\t",
        "  ",
        "é",
        "\xff",
        "\x80",
        "{",
        "}",
        "$",
        "'",
        "<",
        "token=",
        "&",
        "?",
        "#",
        "@",
        "://",
        "x" * 300,
    ),
)
_TARGET = re.compile(r"[^!-~]")


def _value(chance: random.Random) -> str:
    kind = chance.random()
    if kind < 0.6:
        text = "".join(chance.choices(_PIECES, k=chance.randint(1, 12)))
    elif kind < 0.8:
        text = "".join(map(chr, chance.choices((*range(0x21, 0x7F), *range(0x80, 0x100)), k=chance.randint(1, 60))))
    elif kind < 0.97:
        text = chance.choice(_PIECES) * chance.randint(1, 60)
    else:
        text = chance.choice(_PIECES) * (chance.randint(1000, 16_000) // 8)
    # What a server refuses itself, before it asks us, teaches nothing: control characters, white space at the ends.
    return text[:16_000].strip(" \t")


def head(chance: random.Random) -> bytes:
    """
    Return one request with any headers, path and query that a server lets through.
    """
    pairs = [(chance.choice(_NAMES), _value(chance)) for _ in range(chance.choice((0, 1, 1, 2, 3, 5, 8)))]
    if chance.random() < 0.02:
        pairs += [(f"x-{chance.randrange(50)}", "1")] * chance.randint(10, 200)
    if chance.random() < 0.3:
        pairs.append(("traceparent", PARENT))
    chance.shuffle(pairs)
    target = "/" + _TARGET.sub("_", _value(chance)[:3000]).replace("#", "_")
    host = _TARGET.sub("", chance.choice(("h", "h:80", "[::1]:8", _value(chance)[:80]))).replace(",", "") or "h"
    lines = [f"GET {target} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in pairs)]
    raw = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    # Of h11: 64 kB for a whole head.
    return raw if len(raw) < 60_000 else f"GET {target} HTTP/1.1\r\nHost: h\r\n\r\n".encode("latin-1")


def unique(chance: random.Random) -> bytes:
    """
    Return a request of which nothing ever comes again: path, ids, user agent, query, baggage, header and host.
    """
    one = f"{chance.getrandbits(128):032x}"
    own = f"{one[:8]}-{one[8:12]}-{one[12:16]}-{one[16:20]}-{one[20:]}"
    parent = (
        f"traceparent: 00-{one[::-1]}-{one[:16]}-01\r\ntracestate: {one[:8]}=x{one},ot=th:{one[:3]}8\r\n"
        if chance.random() < 0.3
        else ""
    )
    return (
        f"GET /{one}/{one[:9]}?{one[:12]}={one}&token={one} HTTP/1.1\r\nHost: {one[:10]}.example:{chance.randrange(1, 65536)}\r\n"
        f"X-Request-ID: {own}\r\nUser-Agent: agent/{one}\r\nbaggage: {one[:7]}={one}\r\nx-tenant: {one}\r\n"
        f"X-Forwarded-For: {chance.randrange(256)}.1.{chance.randrange(256)}.{chance.randrange(256)}\r\n"
        f"x-{one[:6]}-id: {one}\r\n{parent}\r\n"
    ).encode()


# --- clients ---


def _connect(port: int, chance: random.Random) -> socket.socket:
    made = socket.socket()
    # Many addresses of this machine: a port that is waited for after its end is not free for a minute.
    made.bind((f"127.0.{chance.randrange(1, 250)}.{chance.randrange(1, 250)}", 0))
    made.settimeout(SILENCE_S)
    made.connect(("127.0.0.1", port))
    return made


def _answers(connection: socket.socket, count: int) -> Iterator[bytes]:
    """
    Yield the heads of so many responses; their bodies have a length.
    """
    buffer = b""
    for _ in range(count):
        while (end := buffer.find(b"\r\n\r\n")) < 0:
            data = connection.recv(1 << 16)
            if not data:
                return
            buffer += data
        top = buffer[: end + 2]
        length = _LENGTH.search(top)
        rest = end + 4 + (int(length[1]) if length else 0)
        while len(buffer) < rest:
            data = connection.recv(1 << 16)
            if not data:
                return
            buffer += data
        buffer = buffer[rest:]
        yield top


def _talk(port: int, seed: int, count: int, make: Callable[[random.Random], bytes], results: Any) -> None:
    """
    Send so many requests, pipelined, and tell the statuses and what was wrong with the answers.
    """
    chance = random.Random(seed)
    statuses: Counter[str] = Counter()
    faults: list[str] = []
    left = count
    while left > 0 and len(faults) < 5:
        with _connect(port, chance) as connection:
            for _ in range(PER_CONNECTION // DEPTH):
                batch = [make(chance) for _ in range(min(DEPTH, left))]
                if not batch:
                    break
                connection.sendall(b"".join(batch))
                got = 0
                for top in _answers(connection, len(batch)):
                    status = _STATUS.match(top)
                    code = status[1].decode() if status else "none"
                    statuses[code] += 1
                    if code >= "500" or not status:
                        faults.append(f"{code} for {batch[got][:300]!r}")
                    elif code != "400" and len(_ID.findall(top)) != 1:
                        faults.append(f"no valid request id on the answer to {batch[got][:300]!r}")
                    got += 1
                    if code == "400":  # The server's own; it closes the connection.
                        break
                left -= max(got, 1)
                if got < len(batch):
                    if code != "400":
                        faults.append(f"no answer to {batch[min(got, len(batch) - 1)][:300]!r}")
                    break
    results.put((count, statuses, faults))


_ABORTED = (
    b"GET /slow HTTP/1.1\r\nHost: h\r\nX-Request-ID: order-0000000000000007\r\nbaggage: a=b\r\n\r\n",
    b"GET /stream HTTP/1.1\r\nHost: h\r\ntraceparent: " + PARENT.encode() + b"\r\n\r\n",
    b"POST /body HTTP/1.1\r\nHost: h\r\nContent-Length: 40000\r\n\r\n" + b"x" * 40_000,
    b"POST /body HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n" * 8,
    b"GET /stream HTTP/1.1\r\nHost: h\r\n\r\nGET /slow HTTP/1.1\r\nHost: h\r\n\r\n" * 3,
)


def _leave(port: int, seed: int, count: int, results: Any) -> None:
    """
    Open so many connections and close each at a random moment: in the head, in the body, before, in and after the answer.
    """
    chance = random.Random(seed)
    statuses: Counter[str] = Counter()
    faults: list[str] = []
    open_ones: list[socket.socket] = []
    for _ in range(count):
        data = chance.choice(_ABORTED)
        if chance.random() < 0.5:
            data = data[: chance.randrange(len(data))]
        try:
            connection = _connect(port, chance)
        except OSError as error:
            faults.append(f"the server takes no connection: {error}")
            break
        with contextlib.suppress(OSError):
            connection.sendall(data)
            if chance.random() < 0.3:
                connection.settimeout(chance.random() * 0.01)
                connection.recv(chance.choice((1, 100, 8192)))
        if chance.random() < 0.5:
            # At once and unfinished: RST instead of FIN.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # Some stay for a while, so that the server meets their end in the middle of other work.
        open_ones.append(connection)
        if len(open_ones) > 50:
            open_ones.pop(chance.randrange(len(open_ones))).close()
    for connection in open_ones:
        connection.close()
    results.put((count, statuses, faults))


_MAKERS: dict[str, Callable[[random.Random], bytes]] = {"heads": head, "unique": unique}


def run(directory: Path, load: str, *, count: int, http: str, clients: int = 2, seed: int = 1) -> Report:
    """
    Run one load against one server and return what was seen.

    Args:
        directory: For the server's stderr.
        load: ``heads``, ``unique`` or ``aborted``.
        count: Requests, or connections.
        http: uvicorn's HTTP implementation, ``h11`` or ``httptools``.
        clients: Client processes.
        seed: Another one makes other requests.
    """
    report = Report(load, http, requests=count)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with Server(directory, http) as server:
        # What a first request makes for good is no growth.
        for _ in range(20):
            server.state()
        before, descriptors = server.state(), server.descriptors
        share = [count // clients + (number < count % clients) for number in range(clients)]
        target: Any = _leave if load == "aborted" else _talk
        more = () if load == "aborted" else (_MAKERS[load],)
        processes = [
            context.Process(target=target, args=(server.port, seed * 1000 + number, part, *more, results))
            for number, part in enumerate(share)
        ]
        began = time.monotonic()
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            report.rss_mb.append(server.rss_mb)
            processes[0].join(0.5)
            if not processes[0].is_alive():
                processes[-1].join(0.5)
            if server.process.poll() is not None:
                report.faults.append(f"the server ended with {server.process.returncode}")
                break
        for process in processes:
            process.join(5 if report.faults else SILENCE_S)
            if process.exitcode != 0:
                report.faults.append(f"a client ended with {process.exitcode}")
            else:
                _, statuses, faults = results.get(timeout=SILENCE_S)
                report.statuses += statuses
                report.faults += faults
            process.close()
        results.close()
        results.join_thread()
        report.seconds = time.monotonic() - began
        if server.process.poll() is None:
            report.faults += _left_behind(server, before, descriptors)
            report.rss_mb.append(server.rss_mb)
    report.lines, report.of_uvloop = server.lines, server.of_uvloop
    report.faults += [f"a line that is wrong: {line}" for line in server.bad_lines]
    if "Traceback" in (stderr := server.stderr()):
        report.faults.append(f"stderr: {stderr[-2000:]}")
    report.faults += _growth(report)
    return report


def _left_behind(server: Server, before: dict[str, Any], descriptors: int) -> list[str]:
    """
    Return what stays when all clients are gone; what is about to end has a minute for it.
    """
    deadline = time.monotonic() + DEADLINE_S
    while True:
        after = server.state()
        # The exporters' own connections, and the one that asks.
        more_files, more_tasks = server.descriptors - descriptors, after["tasks"] - before["tasks"]
        if more_files <= 8 and more_tasks <= 0:
            return []
        if time.monotonic() > deadline:
            return [f"{more_files} descriptors and {more_tasks} tasks are left"]
        time.sleep(0.2)


def _growth(report: Report) -> list[str]:
    """
    Return whether memory still grew once the tables were full: those of ``unique`` are when 65,536 keys came.
    """
    samples = report.rss_mb
    if len(samples) < 2:
        return []
    full = min(TABLE * 3 / 2 / report.requests, 1.0) if report.load == "unique" else 0.5
    enough = report.requests >= 2 * TABLE
    start = samples[int(len(samples) * full) if enough else 0] if full < 1.0 else samples[0]
    grown, allowed = samples[-1] - start, FLAT_MB if enough else FILLING_MB
    return [f"memory grew by {grown:.0f} MB, {allowed:.0f} are allowed"] if grown > allowed else []


def main() -> int:
    """
    Run what was asked for and print what was seen; 1 when anything was wrong.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=1_000_000, help="generated request heads")
    parser.add_argument("--unique", type=int, default=200_000, help="requests of which everything is unique")
    parser.add_argument("--aborted", type=int, default=100_000, help="connections that end at a random moment")
    parser.add_argument("--http", default="httptools,h11", help="uvicorn's HTTP implementations")
    parser.add_argument("--clients", type=int, default=2, help="client processes")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    failed = False
    kinds = options.http.split(",")
    with tempfile.TemporaryDirectory() as directory:
        for load in ("heads", "unique", "aborted"):
            count = getattr(options, load)
            for http in kinds if count else ():
                report = run(
                    # Everything unique fills the tables of one process, so each server gets all of them.
                    Path(directory),
                    load,
                    count=count if load == "unique" else -(-count // len(kinds)),
                    http=http,
                    clients=options.clients,
                    seed=options.seed,
                )
                print(report, flush=True)
                failed = failed or bool(report.faults)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
