"""
Real services for tests: started as a user starts them, awaited by events, stopped by process id.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self, TypeVar

import httpx

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

T = TypeVar("T")

BIN = Path(sys.executable).parent
DEADLINE_S = 60.0
# Proves that no test takes a line for written because its request was answered: what services write is seen so many
# seconds late (``TESTS_SLOW_OUTPUT_S=1 make test``).
SLOW_OUTPUT_S = float(os.environ.get("TESTS_SLOW_OUTPUT_S", "0"))


def wait_for(
    found: Callable[[], T], what: Callable[[], object] = str, *, running: Callable[[], bool] | None = None
) -> T:
    """
    Return the first answer of ``found`` that is not empty: the one way to look at what another process writes.

    Args:
        found: Looks for the event. What it finds may still grow, so it has to ask for all that it wants.
        what: Told where it does not come.
        running: Whether it may still come; looked at before ``found``, so that the last words of a process count.

    Raises:
        AssertionError: Nothing came in time, which is long: only a test that fails waits for it.
    """
    deadline = time.monotonic() + DEADLINE_S
    while True:
        goes_on = running is None or running()
        if answer := found():
            return answer
        assert goes_on, f"it ended: {what()}"
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what()}"
        time.sleep(0.02)


def free_port() -> int:
    """
    Return a loopback port that was free a moment ago.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def clean_environment(**variables: str) -> dict[str, str]:
    """
    Return this process's environment without any OpenTelemetry variable, plus these.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OTEL_", "FASTAPI_OTEL", "COV_", "COVERAGE")) and name != "PYTHONPATH"
    }
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**kept, "PATH": path, "PYTHONUNBUFFERED": "1", **variables}


class Service:
    """
    One server process (and its children), with its output.

    Args:
        command: The command; ``{port}`` in it is replaced by the service's port.
        directory: Its working directory, where the application's module is.
        environment: Its whole environment.
        ready: The path that must answer before the service counts as started.
    """

    def __init__(
        self,
        command: Sequence[str],
        directory: Path,
        environment: Mapping[str, str],
        *,
        ready: str | None = "/openapi.json",
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        first, *rest = [part.replace("{port}", str(self.port)) for part in command]
        program = BIN / first
        self._out = directory / f"service-{self.port}.out"
        self._err = directory / f"service-{self.port}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [str(program) if program.exists() else first, *rest],
                cwd=directory,
                env=dict(environment),
                stdout=subprocess.PIPE if SLOW_OUTPUT_S else out,
                stderr=subprocess.PIPE if SLOW_OUTPUT_S else err,
                start_new_session=True,
            )
        self._relays = [
            threading.Thread(target=_relay, args=(stream, path), daemon=True)
            for stream, path in ((self.process.stdout, self._out), (self.process.stderr, self._err))
            if stream is not None
        ]
        for relay in self._relays:
            relay.start()
        self._ready = ready

    def __enter__(self) -> Self:
        """
        Wait until it answers.
        """
        if self._ready is not None:
            try:
                self.wait_ready()
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        """
        End it and its children.
        """
        self.close()

    def wait_ready(self) -> None:
        """
        Wait for the first answer.
        """

        def answers() -> bool:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(self.url + (self._ready or "/"), timeout=5)
                return True
            return False

        self.wait_for(answers)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """
        Send a signal to the process itself and wait for its end.
        """
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        """
        Wait for its end; then all that it wrote is there.
        """
        code = self.process.wait(DEADLINE_S)
        for relay in self._relays:
            relay.join(DEADLINE_S)
        return code

    def close(self) -> None:
        """
        Kill what is left of the process group.
        """
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(DEADLINE_S)

    def stdout(self) -> str:
        """
        Return what it wrote to stdout so far.
        """
        return self._out.read_text(errors="replace")

    def stderr(self) -> str:
        """
        Return what it wrote to stderr so far.
        """
        return self._err.read_text(errors="replace")

    def output(self) -> str:
        """
        Return both streams.
        """
        return self.stdout() + self.stderr()

    def lines(self, **wanted: object) -> list[dict[str, Any]]:
        """
        Return the JSON lines on stdout with these fields; of one that is half written nothing.
        """
        text = self.stdout()
        whole = text[: text.rfind("\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines() if line.startswith("{")]
        return [line for line in lines if wanted.items() <= line.items()]

    def wait_for(self, found: Callable[[], T]) -> T:
        """
        Return the first answer of ``found`` that is not empty, as ``wait_for``; fails at once where the service ends.
        """
        return wait_for(found, self.output, running=lambda: self.process.poll() is None)

    def wait_for_line(self, **wanted: object) -> dict[str, Any]:
        """
        Return the first JSON line with these fields, once it is written.
        """
        return self.wait_for(lambda: self.lines(**wanted))[0]


def _relay(stream: IO[bytes], path: Path) -> None:
    with stream, path.open("ab") as file:
        while block := os.read(stream.fileno(), 65536):
            time.sleep(SLOW_OUTPUT_S)
            file.write(block)
            file.flush()
