"""
The real collector and Jaeger for each test that asks for them; what is missing is built first, once.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.stack import build, servers
from tests.stack.harness import ROOT, Collector, Jaeger, Machine

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

MACHINE = pytest.StashKey[Machine]()


@pytest.fixture(scope="session", autouse=True)
def tools(request: pytest.FixtureRequest) -> None:
    """
    Build the real tools before the first test, with progress on the terminal; without Go, one line and no tests.
    """
    if all("test_contrib_suites" in item.nodeid for item in request.session.items):
        return  # contrib's suites need Python only.
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        try:
            for tool in (build.COLLECTOR, build.JAEGER, build.COMPOSE):
                build.ensure(tool)
            servers.install()
        except build.StackError as error:
            pytest.exit(str(error), returncode=2)


@pytest.fixture(scope="session")
def libraries(request: pytest.FixtureRequest) -> Path:
    """
    The programs of the environment that has other libraries and their official instrumentations; made when missing.
    """
    command = ["make", "setup", "VENV=.venv-libraries", "REQUIREMENTS=requirements/libraries.txt"]
    # This interpreter's own base, so that the environment is of the version under test.
    base = f"PYTHON={getattr(sys, '_base_executable', sys.executable)}"
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        subprocess.run([*command, base], cwd=ROOT, check=True, timeout=1800)
    return ROOT / ".venv-libraries" / "bin"


@pytest.fixture(scope="session")
def chromium() -> str:
    """
    Return a Chromium; where there is none, it is installed from the operating system's packages.
    """
    if _browser() is None and shutil.which("apt-get") is not None:
        for arguments in (("update",), ("install", "--yes", "--no-install-recommends", "chromium")):
            subprocess.run(["apt-get", "-qq", *arguments], check=False, timeout=600, capture_output=True)
    found = _browser()
    assert found is not None, "these tests need Chromium: install the package `chromium`"
    return found


def _browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    """
    Whatever the test starts is gone afterwards, and its logs are printed when the test fails.
    """
    machine = request.node.stash[MACHINE] = Machine(tmp_path)
    yield machine
    machine.clean_up()


@pytest.fixture
def jaeger(machine: Machine) -> Jaeger:
    """
    A Jaeger that is running.
    """
    jaeger = Jaeger(machine)
    jaeger.start()
    return jaeger


@pytest.fixture
def collector(machine: Machine, jaeger: Jaeger) -> Collector:
    """
    A collector that is running and sends to ``jaeger``.
    """
    collector = Collector(machine, jaeger)
    collector.start()
    return collector


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """
    A failed test shows the end of every process's log.
    """
    report = yield
    machines = [node.stash[MACHINE] for node in item.listchain() if MACHINE in node.stash] if report.failed else []
    for machine in machines:
        for process in machine.processes:
            tail = process.log.read_text(errors="replace").splitlines()[-60:]
            report.sections.append((f"log of {process.name} ({process.log})", "\n".join(tail)))
    return report
