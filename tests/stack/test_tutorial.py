"""
The tutorial, command by command; only the ports are others.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.stack import build
from tests.stack.harness import BIN, ROOT, Machine, Process, eventually, get

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.needs("collector")

TEXT = (ROOT / "docs/tutorial/README.md").read_text()
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", TEXT, re.DOTALL)
INSTALLED = ("venv", "docker compose")  # What the other tests run; see test_wheel.py and test_compose.py.


class Reader:
    """
    Somebody who types what the tutorial says, in a folder of their own.
    """

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine = machine
        self.folder = folder
        self.commands = [
            code.strip()
            for language, code in BLOCKS
            if language == "sh" and not any(word in code for word in INSTALLED)
        ]
        self.ports = {old: str(machine.port()) for old in ("8000", "4318", "4317", "4327", "16686")}
        program = next(code for language, code in BLOCKS if language == "python")
        (folder / "main.py").write_text(self._moved(program))
        self.environment: dict[str, str] = {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.ports['4318']}",
            "OTEL_CORRELATION_STORES": f"http://127.0.0.1:{self.ports['4318']}",
            "JAEGER_QUERY_ENDPOINT": f"127.0.0.1:{self.ports['16686']}",
        }
        for name in ("JAEGER_OTLP_ENDPOINT", "JAEGER_GRPC_ENDPOINT", "JAEGER_HEALTH_ENDPOINT"):
            self.environment[name] = f"127.0.0.1:{machine.port()}"

    def take(self, word: str) -> str:
        """
        Return the next command, which has the word in it, with this reader's ports.
        """
        command: str = self.commands.pop(0)
        assert word in command, f"the tutorial goes on with {command!r}, and not with {word}"
        return self._moved(command)

    def _moved(self, text: str) -> str:
        for old, new in self.ports.items():
            text = re.sub(rf"(?<!\d){old}(?!\d)", new, text)
        return text

    def start(self, word: str, **environment: str) -> Process:
        """
        Run the next command in a terminal of its own.
        """
        command = self.take(word)
        if "serve" in command:
            command += f" --port {self.ports['4318']}"
        if "uvicorn" in command:
            command += f" --port {self.ports['8000']}"
        cwd = self.folder if "tests/stack" not in command else ROOT
        return self.machine.start(word, ["bash", "-c", f"exec env {command}"], self.environment | environment, cwd)

    def run(self, word: str) -> str:
        """
        Run the next command to its end and return what it printed.
        """
        return subprocess.run(
            ["bash", "-ec", self.take(word)],
            cwd=self.folder,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        ).stdout

    def collector(self, name: str) -> dict[str, str]:
        """
        Return the addresses of a collector that the tutorial leaves at their defaults.
        """
        grpc, http = ("4317", "4318") if name == "agent" else ("4327", "")
        return {
            "COLLECTOR_GRPC_ENDPOINT": f"127.0.0.1:{self.ports[grpc]}",
            "COLLECTOR_HTTP_ENDPOINT": f"127.0.0.1:{self.ports.get(http) or self.machine.port()}",
            "COLLECTOR_HEALTH_ENDPOINT": f"127.0.0.1:{self.machine.port()}",
            "COLLECTOR_METRICS_PORT": str(self.machine.port()),
            "METRICS_ENDPOINT": f"127.0.0.1:{self.machine.port()}",
            "COLLECTOR_QUEUE_DIR": str(self.folder / name),
        }


def test_every_step_does_what_the_tutorial_says(machine: Machine, tmp_path: Path) -> None:
    """
    One id in the answer and in all lines; the story from the viewer, then from Jaeger behind an agent and a gateway.
    """
    build.ensure(build.COLLECTOR)
    reader = Reader(machine, tmp_path)
    service = reader.start("opentelemetry-instrument")
    base = f"http://127.0.0.1:{reader.ports['8000']}"
    eventually("the service", lambda: get(f"{base}/stock/tent").status_code == 200, while_running=[service])

    answer = reader.run("tutorial-2026-000001")
    assert "502" in answer
    assert "x-request-id: tutorial-2026-000001" in answer

    def told() -> list[str]:
        lines = [line for line in service.log.read_text().splitlines() if "tutorial-2026-000001" in line]
        return lines if any("the shelf of the lamps is gone" in line for line in lines) else []

    lines = eventually("the service's lines", told, while_running=[service])
    assert len({found for line in lines for found in re.findall(r'"trace_id": "([0-9a-f]{32})"', line)}) == 1

    viewer = reader.start("otel-correlation serve")
    page = f"http://127.0.0.1:{reader.ports['4318']}/"
    eventually("the viewer", lambda: get(page).status_code == 200, while_running=[viewer])
    lines_of_step = reader.commands[0].splitlines()
    reader.commands[0:1] = lines_of_step
    assert "tutorial-2026-000002" in reader.run("curl")
    finding = reader.commands[0]
    story = eventually("the story", lambda: _story(reader, finding, "lamp"))
    assert story.index("the shelf of the lamps is gone") < story.index("/stock/")
    assert viewer.stop(signal.SIGINT) in (0, 130, -signal.SIGINT)
    reader.commands.pop(0)

    jaeger = reader.start("jaeger")
    health = f"http://{reader.environment['JAEGER_HEALTH_ENDPOINT']}/status"
    eventually("Jaeger", lambda: get(health).status_code == 200, while_running=[jaeger])
    gateway_command = reader.commands[0]
    gateway_ports = reader.collector("gateway")
    gateway = reader.start("gateway.yaml", **gateway_ports)
    agent = reader.start("agent.yaml", **reader.collector("agent"))
    assert "tutorial-2026-000003" in reader.commands[0]
    reader.commands[0:1] = reader.commands[0].splitlines()
    eventually("the gateway", lambda: _healthy(gateway_ports), while_running=[gateway, agent])
    assert "502" in reader.run("curl")
    finding = reader.commands[0]
    eventually("the story in Jaeger", lambda: _story(reader, finding, "lamp"))
    reader.commands.pop(0)

    gateway.stop(signal.SIGINT)
    assert "502" in reader.run("tutorial-2026-000004")
    reader.commands.insert(0, gateway_command)
    gateway = reader.start("gateway.yaml", **gateway_ports)
    later = finding.replace("000003", "000004")
    eventually("what the agent kept", lambda: _story(reader, later, "lamp"), while_running=[gateway])
    assert reader.commands == []


def _healthy(ports: dict[str, str]) -> bool:
    return get(f"http://{ports['COLLECTOR_HEALTH_ENDPOINT']}/").status_code == 200


def _story(reader: Reader, finding: str, word: str) -> str | None:
    reader.commands.insert(0, finding)
    said = reader.run("find")
    return said if word in said and "RuntimeError" in said else None
