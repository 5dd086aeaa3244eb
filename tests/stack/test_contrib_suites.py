"""
contrib's own test suites, run on stock and on ours: nobody who switches loses what contrib promised.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.stack import build

pytestmark = pytest.mark.needs()

HERE = Path(__file__).parent
PLUGIN = HERE / "contrib"
REQUIREMENTS = PLUGIN / "requirements.txt"
SUITES = {"fastapi": 95, "httpx": 170}  # At least so many tests pass on stock, or the run itself is broken.


@pytest.fixture(scope="session")
def suites() -> Path:
    """
    The unpacked suites, and what they import under ``site``; downloaded by name and hash once.
    """
    entry = f"contrib-{hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]}"
    with build.locked("contrib") as directory:
        final = directory / entry
        if not (final / "stamp.json").exists():
            with tempfile.TemporaryDirectory(prefix=f"{entry}-", dir=directory) as scratch:
                result = Path(scratch) / "result"
                unpack(result, Path(scratch) / "downloads")
                (result / "stamp.json").write_text("{}\n")
                shutil.rmtree(final, ignore_errors=True)
                result.rename(final)
    return final


def unpack(result: Path, downloads: Path) -> None:
    """
    Fill ``result``. The sdists' metadata is prepared with this environment's hatchling: a build environment is not hashed.
    """
    sources = ",".join(f"opentelemetry-instrumentation-{suite}" for suite in SUITES)
    pip("download", "--no-deps", "--require-hashes", "--no-build-isolation", f"--no-binary={sources}",
        f"--requirement={REQUIREMENTS}", f"--dest={downloads}")  # fmt: skip
    pip("install", "--no-deps", "--no-index", f"--target={result / 'site'}", *map(str, downloads.glob("*.whl")))
    for source in downloads.glob("*.tar.gz"):
        with tarfile.open(source) as archive:
            archive.extractall(result, filter="data")
    for suite in result.glob("opentelemetry_instrumentation_*"):
        (suite / "pytest.ini").write_text("[pytest]\n")  # The suite's root is here, whatever lies above the cache.


def pip(*arguments: str) -> None:
    """
    Run this environment's pip, or fail with what it said.
    """
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr


def outcomes(suites: Path, suite: str, runs: str, directory: Path) -> tuple[dict[str, str], str]:
    """
    Run one suite on ``stock`` or on ``ours``; return the outcome of each test, and pytest's own report.
    """
    (root,) = suites.glob(f"opentelemetry_instrumentation_{suite}-*")
    result = directory / f"{runs}.json"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "PYTEST_"))}
    environment |= {
        "CONTRIB_SUITE_RUNS": runs,
        "CONTRIB_SUITE_OUTCOMES": str(result),
        "PYTHONPATH": os.pathsep.join([str(suites / "site"), str(PLUGIN)]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    quiet = ["-p", "no:randomly", "-p", "no:cacheprovider", "-p", "no:otel_correlation", "-q", "--tb=short"]
    command = [sys.executable, "-m", "pytest", *quiet, "-p", "contrib_suite_plugin", "tests"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=600)
    report = done.stdout + done.stderr
    (directory / f"{runs}.log").write_text(report)
    assert result.exists(), report
    return json.loads(result.read_text()), report


def listed(suite: str) -> set[str]:
    """
    Return the tests of the suite that stand in the list of differences; every entry has its reason.
    """
    entries = tomllib.loads((HERE / "contrib_differences.toml").read_text()).get(suite, [])
    assert all(entry["reason"].strip() for entry in entries)
    return {test for entry in entries for test in entry["tests"]}


@pytest.mark.parametrize("suite", SUITES)
def test_what_passes_on_stock_passes_on_ours(suite: str, suites: Path, tmp_path: Path) -> None:
    """
    Every test of contrib's suite that stock passes, ours passes, or a reason is on record; and no recorded difference is stale.
    """
    with ThreadPoolExecutor(2) as pool:
        (stock, _), (ours, report) = pool.map(lambda runs: outcomes(suites, suite, runs, tmp_path), ("stock", "ours"))
    passing = {test for test, outcome in stock.items() if outcome == "passed"}
    assert len(passing) >= SUITES[suite]
    lost = {test for test in passing if ours.get(test) != "passed"}
    assert sorted(lost - listed(suite)) == [], report
    assert sorted(listed(suite) - lost) == [], "listed as different, but it passes, or stock fails it, or it is gone"
