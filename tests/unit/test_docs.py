"""
The documents say what the code does.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import otel_correlation
from otel_correlation import semconv
from otel_correlation.policy.bounds import HEADERS, LINE_FIELD, LINE_MESSAGE, LINE_STACK, QUEUE_BYTES, Bounds
from otel_correlation.settings import Settings

ROOT = Path(__file__).parents[2]
REFERENCE = (ROOT / "docs/reference/settings.md").read_text()
SOURCE = (ROOT / "otel_correlation/settings.py").read_text()


def variables_read() -> set[str]:
    """
    Return the variables that settings.py reads, with those that it composes.
    """
    named = set(re.findall(r'"(OTEL_[A-Z_]+[A-Z])"', SOURCE))
    ours = {value for name, value in vars(semconv).items() if name.startswith("OTEL_")}
    return named | ours


def test_every_variable_has_one_line_in_the_reference() -> None:
    """
    Each variable that is read stands in exactly one row of the reference.
    """
    rows = re.findall(r"^\| `(OTEL_[A-Z_]+)` \|", REFERENCE, re.MULTILINE)
    assert sorted(rows) == sorted(set(rows)), "a variable has two lines"
    assert variables_read() <= set(rows)


def test_every_setting_has_its_name_in_the_reference() -> None:
    """
    Each field of Settings is named in the reference, for those who pass it in code.
    """
    names = {entry.name for entry in fields(Settings)} - {"problems"}
    assert names <= set(re.findall(r"`([a-z_]+)`", REFERENCE))


def test_every_public_name_and_every_counter_is_in_the_reference() -> None:
    """
    Each public name has a row, and so has each counter, but for internal errors, which share one.
    """
    page = (ROOT / "docs/reference/python.md").read_text()
    assert set(otel_correlation.__all__) <= set(re.findall(r"^\| `(\w+)(?:\([^`]*\))?` \|", page, re.MULTILINE))
    sources = "".join(path.read_text() for path in (ROOT / "otel_correlation").rglob("*.py"))
    counted = set(re.findall(r'guard\.count\(f?"(?:{(?:self\.|sender\.)?kind}\.)?([a-z_.]+)"', sources))
    named = set(re.findall(r"`([a-z_.]+)`", page))
    assert {"exported", "dropped.queue_full", "caller.restarted"} <= counted
    assert {name for name in counted if not name.startswith("internal_error.")} <= named


def test_every_bound_of_a_text_is_in_the_reference() -> None:
    """
    The table of what is held of a text has the numbers that the code has, and no others.
    """
    found = {
        number for row in re.findall(r"^\| .* \| (\d+) \| .* \|$", REFERENCE, re.MULTILINE) for number in [int(row)]
    }
    lengths = {entry.default for entry in fields(Bounds) if entry.name != "marked"}
    assert found == lengths | {HEADERS, LINE_MESSAGE, LINE_FIELD, LINE_STACK}
    assert f"`{QUEUE_BYTES}`" in REFERENCE


def test_links_between_documents_lead_somewhere() -> None:
    """
    Every relative link in README and docs names a file that is there.
    """
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith(("http:", "https:")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_public_names_are_sorted_and_there() -> None:
    """
    The package exports exactly its public names, sorted, and each can be used.
    """
    assert otel_correlation.__all__ == sorted(otel_correlation.__all__)
    for name in otel_correlation.__all__:
        assert getattr(otel_correlation, name) is not None


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
def test_the_readmes_example_runs(block: str) -> None:
    """
    The example of the README answers with the id that its response carries.
    """
    check = """
from starlette.testclient import TestClient
response = TestClient(app).get("/orders/7")
assert response.json() == {"number": 7, "request_id": response.headers["x-request-id"]}, response.json()
"""
    ended = subprocess.run(
        [sys.executable, "-c", block + check], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_the_test_of_the_how_to_passes(tmp_path: Path) -> None:
    """
    The test that the page on testing shows passes as a file of its own, in a process of its own.
    """
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/how-to/testing.md").read_text(), re.DOTALL)
    (tmp_path / "test_orders.py").write_text(block)
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "1 passed" in ended.stdout
