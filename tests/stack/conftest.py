"""
The real collector and Jaeger for each test that asks for them; what is missing is built first, once (see parts.py).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.stack import build, parts
from tests.stack.harness import ROOT, Collector, Jaeger, Machine

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

MACHINE = pytest.StashKey[Machine]()
NEEDS = pytest.StashKey[set[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """
    Make the marker known, and refuse a word in STACK_SKIP that leaves nothing out.
    """
    config.addinivalue_line("markers", f"needs(*parts): what must run for the test, of {', '.join(parts.PARTS)}")
    try:
        parts.skipped()
    except build.StackError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(trylast=True)  # After -k and -m have chosen.
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """
    Mark what STACK_SKIP leaves out, and remember what the others need: everything, where a test does not say.
    """
    left_out = parts.skipped()
    needed: set[str] = set()
    for item in items:
        if not item.path.is_relative_to(Path(__file__).parent):
            continue
        marks = list(item.iter_markers("needs"))
        needs: set[str] = {part for mark in marks for part in mark.args} if marks else {*parts.PARTS} - {"tempo"}
        if unknown := sorted(needs - parts.PARTS.keys()):
            raise pytest.UsageError(f"{item.nodeid} needs {unknown}, which is none of {', '.join(parts.PARTS)}")
        if why := parts.reason(needs, left_out):
            item.add_marker(pytest.mark.skip(reason=why))
        else:
            needed |= needs
    config.stash[NEEDS] = needed


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """
    Provide what the selected tests need, with progress on the terminal; what cannot be had is one line and no tests.
    """
    if session.testsfailed or session.config.option.collectonly:
        return
    needed = session.config.stash[NEEDS]
    try:
        parts.provide(needed)
    except build.StackError as error:
        raise pytest.UsageError(*str(error).splitlines()) from None


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
