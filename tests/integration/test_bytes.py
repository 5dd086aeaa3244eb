"""
A stranger's large texts do not fill the process: its memory stays where it was, whether the collector takes, hangs or is away.
"""

from __future__ import annotations

import contextlib
import re
import socket
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.integration.otlp_sink import Answer, OtlpSink
from tests.integration.services import DEADLINE_S, Service, clean_environment, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

# httptools has no limit of its own for a header; h11 refuses what is above 64 KiB.
SIZE: Final = 2_000_000
# 60 of them are more than the bound; `make stack` sends ten times as many (tests/stack/test_bytes.py).
REQUESTS: Final = 60
MOST_MIB: Final = 80.0

APPLICATION: Final = """
import gc
import logging

from fastapi import FastAPI, Request

app = FastAPI()
log = logging.getLogger("application")


@app.get("/quiet")
def quiet():
    return {}


@app.get("/logs")
def logs(request: Request):
    agent = request.headers["user-agent"]
    log.warning("the agent is %s", agent, extra={"agent": agent})
    return {}


@app.get("/fails")
def fails(request: Request):
    # An exception and its frames hold each other: Python frees them, and the request that they hold, when it collects.
    # A bare application that fails with 2 MB texts has 43 MB of them between two collections.
    gc.collect()
    raise RuntimeError("no such agent: " + request.headers["user-agent"])
"""


@contextlib.contextmanager
def collector(state: str) -> Iterator[str]:
    """
    Give the endpoint of a collector that takes everything, answers nothing in time, or is not there.
    """
    if state == "absent":
        yield f"http://127.0.0.1:{free_port()}"
        return
    with OtlpSink(answer=Answer(hang_s=DEADLINE_S) if state == "slow" else None) as sink:
        yield sink.endpoint


def resident_mib(process: int) -> float:
    """
    Return the resident memory of a process, in MiB.
    """
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def get(port: int, path: str, agent: bytes) -> bytes:
    """
    Send one request and return the status line of its answer.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as connection:
        connection.sendall(
            b"GET " + path.encode() + b" HTTP/1.1\r\nhost: a\r\nconnection: close\r\nuser-agent: " + agent + b"\r\n\r\n"
        )
        answer = b""
        while part := connection.recv(65_536):
            answer += part
    return answer.partition(b"\r\n")[0]


def growth_mib(directory: Path, path: str, state: str, requests: int) -> float:
    """
    Send requests with 2 MB of User-Agent each to a server; return by how much its memory was above its start at most.

    Args:
        directory: Where the application is written.
        path: One of the application's.
        state: Of the collector, as for ``collector``.
        requests: How many.
    """
    (directory / "application.py").write_text(textwrap.dedent(APPLICATION))
    with collector(state) as endpoint:
        environment = clean_environment(
            OTEL_EXPORTER_OTLP_ENDPOINT=endpoint,
            OTEL_LOGS_EXPORTER="otlp",
            # uvicorn's own handler would write 2 MB of traceback for each failure.
            OTEL_CORRELATION_LOG_FORMAT="json" if path == "/fails" else "none",
        )
        command = ["opentelemetry-instrument", "uvicorn", "application:app", "--http", "httptools", "--port", "{port}"]
        with Service(command, directory, environment, ready="/quiet") as service:
            for _ in range(20):
                get(service.port, path, b"small")
            before = resident_mib(service.process.pid)
            most = 0.0
            agent = b"a" * SIZE
            expected = b"HTTP/1.1 500 Internal Server Error" if path == "/fails" else b"HTTP/1.1 200 OK"
            for _ in range(requests):
                assert get(service.port, path, agent) == expected
                most = max(most, resident_mib(service.process.pid) - before)
    print(f"{path}, collector {state}: {requests} requests of {SIZE} bytes, {most:.1f} MiB above {before:.1f}")
    return most


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("path", "state"),
    [("/quiet", "present"), ("/quiet", "absent"), ("/quiet", "slow"), ("/logs", "slow"), ("/fails", "absent")],
)
def test_large_texts_of_strangers_do_not_stay(tmp_path: Path, path: str, state: str) -> None:
    """
    Requests with 2 MB of User-Agent each leave the server's memory within 80 MiB of where it was.
    """
    assert growth_mib(tmp_path, path, state, REQUESTS) < MOST_MIB
