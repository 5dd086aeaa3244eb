"""
Real services for tests: started as a user starts them, awaited by events, stopped by process id.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import httpx

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BIN = Path(sys.executable).parent
DEADLINE_S = 60.0


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
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
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
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the service ended with {self.process.returncode}:\n{self.output()}")
            with contextlib.suppress(httpx.TransportError):
                httpx.get(self.url + (self._ready or "/"), timeout=5)
                return
            time.sleep(0.05)
        raise AssertionError(f"no answer within {DEADLINE_S} s:\n{self.output()}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """
        Send a signal to the process itself and wait for its end.
        """
        self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)

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
