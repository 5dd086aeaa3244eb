"""
``otel-correlation demo``: the main job on real services, and that nothing of it is left behind.
"""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.integration.services import clean_environment

pytestmark = pytest.mark.slow

DEADLINE_S = 120
SHOP = Path(__file__).parents[2] / "examples" / "shop"


class Demo:
    """
    One run of the demo; its processes are known by a variable that all of them inherit.
    """

    def __init__(self, *arguments: str, **variables: str) -> None:
        self._mark = uuid.uuid4().hex
        command = [sys.executable, "-c", "from otel_correlation.cli import main; raise SystemExit(main())", "demo"]
        self.process = subprocess.Popen(
            [*command, *arguments],
            env=clean_environment(DEMO_TEST_MARK=self._mark, **variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, text: str) -> str:
        """
        Return the output up to and with the line that contains ``text``.
        """
        assert self.process.stdout is not None
        seen = ""
        for line in self.process.stdout:
            seen += line
            if text in line:
                return seen
        raise AssertionError(f"{text!r} was not printed: {seen}{self.process.communicate()[1]}")

    def end(self) -> tuple[str, str]:
        """
        Return what else was printed on stdout and stderr until the end.
        """
        return self.process.communicate(timeout=DEADLINE_S)

    def left(self) -> list[str]:
        """
        Return the command lines of this demo's processes that still run.
        """
        found: list[str] = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                # A zombie has an empty command line: it has ended.
                if self._mark.encode() in (folder / "environ").read_bytes() and (
                    line := (folder / "cmdline").read_bytes()
                ):
                    found.append(line.decode())
            except OSError:
                continue
        return found


def line_of(text: str) -> int:
    return next(n for n, line in enumerate((SHOP / "inventory.py").read_text().splitlines(), 1) if text in line)


def test_the_demo_ends_on_the_cause() -> None:
    """
    Four requests, then the failed one as ``find`` prints it; it ends by itself with status 0, and no process is left.

    What is told of it: both ids, the cause with file and line, the spans of three services, and their log lines.
    """
    demo = Demo(OTEL_TRACES_SAMPLER_ARG="0", OTEL_SDK_DISABLED="true", HTTP_PROXY="http://127.0.0.1:9")
    out, err = demo.end()
    assert (demo.process.returncode, err) == (0, ""), out + err
    assert demo.left() == []
    statuses = re.findall(r"→ (\d+)  X-Request-ID: (\S+)", out)
    assert [status for status, _ in statuses] == ["201", "201", "201", "502"]
    assert statuses[0][1] == "shop-app-1.4/checkout/000173"
    assert uuid.UUID(statuses[1][1])
    assert re.fullmatch(r"[0-9a-f]{32}", statuses[2][1])
    story = out.partition("4  The one that failed")[2]
    for text in (
        "POST /checkout 502",
        "request id  order-7781-customer-quote",
        # echo -n order-7781-customer-quote | b2sum -l 128
        "trace id    2c067d76d971e5850bb82d8a96aa53dc",
        f"inventory.py:{line_of('// self.sold')} in days_left",
        "ZeroDivisionError: integer division or modulo by zero",
        "1 trace, 5 spans",
        "otel-correlation run -- uvicorn main:app",
    ):
        assert text in story
    lines = re.findall(r"^  (\d\d:\d\d:\d\d\.\d{3}) \w+ +(\w+)", story, re.MULTILINE)
    assert [at for at, _ in lines] == sorted(at for at, _ in lines)
    assert {service for _, service in lines} == {"gateway", "orders", "inventory"}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("moment", ["1  The viewer", "The page:"])
def test_an_interrupted_demo_leaves_no_process(number: signal.Signals, status: int, moment: str) -> None:
    """
    Ctrl-C, kill or a closed terminal, while the services start or while they run, ends all of them without a traceback.
    """
    demo = Demo("--keep")
    demo.wait_for(moment)
    demo.process.send_signal(number)
    _, err = demo.end()
    assert demo.process.returncode == (0 if number == signal.SIGINT and moment == "The page:" else status)
    assert err == ""
    assert demo.left() == []


def test_ports_follow_the_one_that_is_named() -> None:
    """
    With ``--port`` the services take the next three ports, and one that is taken is one line.
    """
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] - 2
        demo = Demo("--port", str(port))
        _, err = demo.end()
    assert demo.process.returncode == 2
    assert err.count("\n") == 1
    assert f"port {port + 2}" in err or f"port {port + 1}" in err or f"port {port} " in err
    assert demo.left() == []


def test_a_service_that_does_not_start_is_said(tmp_path: Path) -> None:
    """
    When a service ends at its start, the demo shows that service's last lines, fails, and leaves no process.
    """
    (tmp_path / "pydantic.py").write_text("raise ImportError('broken on purpose')")
    demo = Demo(PYTHONPATH=str(tmp_path))
    _, err = demo.end()
    assert demo.process.returncode == 1
    assert "the service inventory ended with status 1" in err
    assert "broken on purpose" in err
    assert demo.left() == []
