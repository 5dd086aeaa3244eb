"""
The measurement of the tiers runs end to end on the real collector; no figure of it is judged.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from benchmarks import tiers
from benchmarks.capacity import Measurements, Refused
from tests.stack.harness import ROOT

if TYPE_CHECKING:
    from pathlib import Path


def test_the_tiers_are_measured_end_to_end(tmp_path: Path) -> None:
    """
    ``tiers.py --quick`` sends through the shipped agent and router, and writes what capacity.py reads.

    That one says in one line which tiers are missing.
    """
    out = tmp_path / "tiers.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "tiers.py"), "--quick", "--out", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    content = json.loads(out.read_text())
    assert content["left_out"] == {}
    assert {(entry["tier"], entry["signal"], entry["bytes"]) for entry in content["samples"]} == {
        *((tier, "spans", 500) for tier in ("agent", "router")),
        *((tier, "logs", 300) for tier in ("agent", "router")),
    }
    for entry in content["samples"]:
        assert all(entry[name] > 0 for name in ("cpu_us", "per_s", "items", "wire_bytes", "idle_mib", "peak_mib")), (
            entry
        )
        assert entry["wire_bytes"] < entry["bytes"], "sent on without compression"
    with pytest.raises(Refused, match="no figures of gateway, sampler"):
        Measurements.read(out)


def test_a_part_that_is_measured_again_keeps_the_rest() -> None:
    """
    Figures of what was not run stay, those of the same machine only; what is measured now is no longer left out.
    """
    then = {"tier": "agent", "signal": "spans", "cpu_us": 1}, {"tier": "loki", "signal": "logs", "cpu_us": 2}
    old = {
        "machine": "here",
        "samples": [*then],
        "figures": {"a": 1},
        "versions": {"x": "1"},
        "left_out": {"loki": "why"},
    }
    now = {"tier": "loki", "signal": "logs", "cpu_us": 3}
    new = {"machine": "here", "samples": [now], "figures": {"b": 2}, "versions": {"y": "2"}, "left_out": {}}
    assert tiers.merged(old, new, ["loki"]) == {
        "machine": "here",
        "samples": [then[0], now],
        "figures": {"a": 1, "b": 2},
        "versions": {"x": "1", "y": "2"},
        "left_out": {},
    }
    with pytest.raises(SystemExit, match="another machine"):
        tiers.merged(old, new | {"machine": "there"}, ["loki"])
