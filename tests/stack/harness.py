"""
Real processes for the tests: started with a log each, stopped by pid, and asked over the wire.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from tests.stack import build

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
CONFIGS = ROOT / "collector"
SHOP = ROOT / "examples" / "shop"
DEADLINE_S = (
    90.0  # For one event. Generous, because two cores may be busy with anything else; nothing is asserted about time.
)

T = TypeVar("T")


def eventually(what: str, probe: Callable[[], T | None], *, while_running: Sequence[Process] = ()) -> T:
    """
    Return the first truthy answer of ``probe``; a refused connection counts as "not yet".

    Raises:
        AssertionError: Nothing came before the deadline, or one of ``while_running`` has ended.
    """
    deadline = time.monotonic() + DEADLINE_S
    while True:
        for process in while_running:
            assert process.popen.poll() is None, f"{process.name} ended with {process.popen.poll()}, waiting for {what}"
        try:
            if answer := probe():
                return answer
        except (httpx.TransportError, OSError):
            pass
        assert time.monotonic() < deadline, f"waited {DEADLINE_S} s for {what}"
        time.sleep(0.05)


@dataclass(slots=True)
class Process:
    """
    One started program, the leader of a process group of its own.
    """

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """
        Send one signal and return the exit status; a process that stays is killed and fails the test.

        SIGTERM goes to the process alone, as a supervisor sends it; SIGINT to its whole group, as Ctrl-C in a terminal does.
        (A gunicorn master that gets SIGINT alone waits half a minute for its uvicorn workers and kills them, bare or traced.)
        """
        if number == signal.SIGINT:
            os.killpg(self.popen.pid, number)
        else:
            self.popen.send_signal(number)
        try:
            return self.popen.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.clean_up()
            raise AssertionError(f"{self.name} did not end after {number.name}") from None

    def clean_up(self) -> None:
        """
        End whatever is left of the group, workers without their master included.
        """
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()


@dataclass(slots=True)
class Machine:
    """
    Everything that one test started.
    """

    directory: Path
    processes: list[Process] = field(default_factory=list)
    ports: set[int] = field(default_factory=set)
    directories: list[Path] = field(default_factory=list)  # Outside ``directory``, removed at the end.

    def port(self) -> int:
        """
        Return a free port on loopback that outgoing connections are never given.

        The collector and Jaeger have to be told their ports, and one of them is restarted on the same: a port that the kernel
        chose could be some connection's own by then, so this looks below the range that the kernel chooses from.
        """
        while True:
            candidate = random.SystemRandom().randrange(12_000, 32_000)
            with socket.socket() as probe:
                try:
                    probe.bind(("127.0.0.1", candidate))
                except OSError:
                    continue
            if candidate not in self.ports:
                self.ports.add(candidate)
                return candidate

    def start(self, name: str, command: Sequence[str | Path], environment: dict[str, str], cwd: Path = ROOT) -> Process:
        """
        Start a program whose environment has nothing of OpenTelemetry but what is given; both outputs go to its log.
        """
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "COLLECTOR_", "JAEGER_"))
        }
        # The tests' own strict guard stays on in the services: a failure that would be hidden shows as an error.
        inherited |= {key: value for key, value in os.environ.items() if key == "OTEL_CORRELATION_STRICT"}
        log = self.directory / f"{len(self.processes):02d}-{name}.log"
        with log.open("wb") as output:
            popen = subprocess.Popen(
                [str(part) for part in command],
                cwd=cwd,
                env=inherited | {"PYTHONUNBUFFERED": "1"} | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        process = Process(name, popen, log)
        self.processes.append(process)
        return process

    def clean_up(self) -> None:
        """
        End all of them, the newest first.
        """
        for process in reversed(self.processes):
            process.clean_up()
        for directory in self.directories:
            shutil.rmtree(directory, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Span:
    """
    One span as Jaeger's query API tells it.
    """

    service: str
    name: str
    span_id: str
    parent_id: str | None
    tags: dict[str, Any]
    events: list[dict[str, Any]]

    @property
    def kind(self) -> str:
        """
        Return ``server``, ``client``, ``internal``, ``producer`` or ``consumer``.
        """
        return str(self.tags.get("span.kind", "internal"))


@dataclass(slots=True)
class Jaeger:
    """
    The real Jaeger with the shipped configuration, asked through its query API.
    """

    machine: Machine
    otlp: str = ""
    query: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """
        Choose the ports once, so that it can be started later, or again.
        """
        self.otlp = f"127.0.0.1:{self.machine.port()}"
        self.query = f"127.0.0.1:{self.machine.port()}"
        self.environment = {
            "JAEGER_OTLP_ENDPOINT": self.otlp,
            "JAEGER_QUERY_ENDPOINT": self.query,
            "JAEGER_GRPC_ENDPOINT": f"127.0.0.1:{self.machine.port()}",
            "JAEGER_HEALTH_ENDPOINT": f"127.0.0.1:{self.machine.port()}",
        }

    def start(self) -> Process:
        """
        Return when all parts of it are healthy.
        """
        command = [str(build.ensure(build.JAEGER)), f"--config={CONFIGS / 'jaeger.yaml'}"]
        process = self.machine.start("jaeger", command, self.environment, self.machine.directory)
        health = f"http://{self.environment['JAEGER_HEALTH_ENDPOINT']}/status"
        eventually("Jaeger", lambda: get(health).status_code == 200, while_running=[process])
        return process

    def raw(self, trace_id: str) -> str:
        """
        Return the stored trace as the API's text.
        """
        return get(f"http://{self.query}/api/traces/{trace_id}").text

    def trace(self, trace_id: str) -> list[Span]:
        """
        Return the spans of one trace, or none.
        """
        return self._spans(f"http://{self.query}/api/traces/{trace_id}")

    def search(self, service: str, **tags: str) -> list[Span]:
        """
        Return the spans of the traces in which a span of the service has these tags.
        """
        return self._spans(f"http://{self.query}/api/traces", service=service, tags=json.dumps(tags))

    def _spans(self, url: str, **parameters: str) -> list[Span]:
        answer = get(url, parameters=parameters)
        if answer.status_code == 404:
            return []
        answer.raise_for_status()
        return [
            Span(
                service=trace["processes"][span["processID"]]["serviceName"],
                name=span["operationName"],
                span_id=span["spanID"],
                parent_id=next((ref["spanID"] for ref in span["references"] if ref["refType"] == "CHILD_OF"), None),
                tags={tag["key"]: tag["value"] for tag in span["tags"]},
                events=[{entry["key"]: entry["value"] for entry in event["fields"]} for event in span["logs"] or []],
            )
            for trace in answer.json()["data"]
            for span in trace["spans"]
        ]


@dataclass(slots=True)
class Collector:
    """
    The real collector with the shipped ``collector/local.yaml``.
    """

    machine: Machine
    jaeger: Jaeger
    grpc: str = ""
    http: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """
        Choose the ports once, so that it can be started again on the same queue.
        """
        self.grpc = f"127.0.0.1:{self.machine.port()}"
        self.http = f"127.0.0.1:{self.machine.port()}"
        self.environment = {
            "COLLECTOR_GRPC_ENDPOINT": self.grpc,
            "COLLECTOR_HTTP_ENDPOINT": self.http,
            "COLLECTOR_HEALTH_ENDPOINT": f"127.0.0.1:{self.machine.port()}",
            "COLLECTOR_QUEUE_DIR": str(self.machine.directory / "queue"),
            "JAEGER_OTLP_ENDPOINT": self.jaeger.otlp,
        }

    def start(self, **environment: str) -> Process:
        """
        Return when it accepts OTLP.
        """
        command = [str(build.ensure(build.COLLECTOR)), f"--config={CONFIGS / 'local.yaml'}"]
        process = self.machine.start("otelcol", command, self.environment | environment, self.machine.directory)
        health = f"http://{self.environment['COLLECTOR_HEALTH_ENDPOINT']}/"
        eventually("the collector", lambda: get(health).status_code == 200, while_running=[process])
        return process

    def exports(self, service: str, protocol: str = "http/protobuf") -> dict[str, str]:
        """
        Return what a service's environment needs to send here.
        """
        return exports(service, protocol, self.grpc if protocol == "grpc" else self.http)


def exports(service: str, protocol: str, endpoint: str) -> dict[str, str]:
    """
    Return the environment of a service that sends spans and logs to ``host:port``.
    """
    return {
        "OTEL_SERVICE_NAME": service,
        "OTEL_LOGS_EXPORTER": "otlp",
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{endpoint}",
    }


def get(url: str, *, headers: dict[str, str] | None = None, parameters: dict[str, str] | None = None) -> httpx.Response:
    """
    Return the answer to one GET on a connection of its own, through no proxy.
    """
    with httpx.Client(trust_env=False, timeout=30) as client:
        return client.get(url, headers=headers, params=parameters)
