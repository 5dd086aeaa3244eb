"""
Every shipped configuration is accepted by the program that reads it, and that program would have refused a broken one.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.stack import build
from tests.stack.harness import CONFIGS

if TYPE_CHECKING:
    from pathlib import Path

BROKEN = [
    pytest.param("max_elapsed_time: 0", "max_elapsed_times: 0", id="unknown-key"),
    pytest.param(
        "processors: [memory_limiter, redaction]", "processors: [memory_limiter, redactions]", id="unknown-processor"
    ),
    pytest.param("check_interval: 1s", "check_interval: 0s", id="limiter-that-never-checks"),
    pytest.param("span.status.message)", "span.status.mesage)", id="statement-with-a-typing-error"),
    pytest.param("{env:COLLECTOR_MEMORY_MIB:-400}", "{env:COLLECTOR_MEMORY_MIB:-many}", id="size-that-is-no-number"),
]


def validate(path: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    """
    Run ``validate`` of the program that the file is for.
    """
    tool = build.JAEGER if path.name.startswith("jaeger") else build.COLLECTOR
    command = [str(build.ensure(tool)), "validate", f"--config={path}"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_a_shipped_configuration_is_valid(path: Path, tmp_path: Path) -> None:
    """
    Each file in collector/ is accepted with its own defaults, no variable set.
    """
    answer = validate(path, tmp_path)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize(("good", "bad"), BROKEN)
def test_a_broken_configuration_is_refused(good: str, bad: str, tmp_path: Path) -> None:
    """
    One wrong word in local.yaml is found, so acceptance means something.
    """
    shipped = (CONFIGS / "local.yaml").read_text()
    assert good in shipped
    broken = tmp_path / "local.yaml"
    broken.write_text(shipped.replace(good, bad))
    assert validate(broken, tmp_path).returncode != 0
