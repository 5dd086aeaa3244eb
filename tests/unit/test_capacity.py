"""
The capacity plan: its arithmetic, what it refuses, and that its page says what it prints.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import capacity
from benchmarks.capacity import Measurements, Refused, Target, plan

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "capacity.py"
PAGE = ROOT / "docs" / "how-to" / "capacity.md"
COMMITTED = ROOT / "benchmarks" / "tiers.json"
SHARED = {"idle_mib": 50, "peak_mib": 150, "busy": 1.0, "items": 1000, "cpu_us_range": [1, 1]}


def sample(tier: str, size: int, cost: float, ratio: float | None = None, **more: float) -> dict[str, Any]:
    """
    Return one measurement with round figures.
    """
    kind = {"signal": "logs" if size == 300 else "spans", "bytes": size, "cpu_us": cost, "per_s": 8000}
    moved = {"wire_bytes": size / 5} if tier not in {"jaeger", "loki"} else {"disk_bytes": size}
    return {"tier": tier, **SHARED, **kind, **moved, **({} if ratio is None else {"ratio": ratio}), **more}


def round_figures() -> dict[str, Any]:
    """
    Return measurements that can be reckoned with in the head: 100 us for a span of 500 B, 200 us for one of 1500 B.
    """
    samples = [
        sample(tier, size, cost) for tier in ("agent", "router", "jaeger") for size, cost in ((500, 100), (1500, 200))
    ]
    for tier in ("gateway", "sampler", "kafka-sampler"):
        more = {"beside_cpu_us": 10} if tier == "kafka-sampler" else {}
        samples += [
            sample(tier, size, cost + (100 if ratio == 1 else 0), ratio, **more)
            for size, cost in ((500, 100), (1500, 200))
            for ratio in (0.1, 1.0)
        ]
    samples += [sample("kafka-router", size, cost, beside_cpu_us=10) for size, cost in ((500, 100), (1500, 200))]
    samples += [sample(tier, 300, 50) for tier in ("agent", "gateway", "router", "loki")]
    names = {"queue_span_bytes": 1, "open_span_bytes": 4, "kafka_span_bytes": 0.2}
    figures: dict[str, float] = {f"{name}_{size}": each * size for name, each in names.items() for size in (500, 1500)}
    return {
        "command": "python benchmarks/tiers.py",
        "date": "2026-11-21T12:00:00+00:00",
        "machine": "two cores",
        "versions": {},
        "load_average": [0.1],
        "spans_per_trace": 8,
        "samples": samples,
        "figures": figures | {"queue_peak_mib_500": 100, "queue_peak_mib_1500": 100},
    }


ROUND = Measurements(round_figures())
# 10,000 spans/s of 500 B, all else out of the way: no logs, one tenth kept.
PLAIN = Target(1250, spans=8, bytes=500, logs=0, kept_anyway=0, outage_s=600, hosts=10)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """
    Run the script as an operator does.
    """
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=ROOT)


def test_cores_are_spans_times_their_cost() -> None:
    """
    10,000 spans/s at 100 us each are one core, in every tier; at 60 % load of two cores that is one process and a spare one.
    """
    made = plan(replace(PLAIN, shape="routers"), ROUND)
    assert [made.row(tier).cores for tier in ("agent", "router", "sampler")] == pytest.approx([1.0, 1.0, 1.0])
    assert (made.row("router").needed, made.row("router").processes) == (1, 2)


@pytest.mark.parametrize(("size", "cost"), [(200, 1.0), (500, 1.0), (1000, 1.5), (1500, 2.0), (2500, 3.0)])
def test_cost_follows_the_line_through_the_sizes(size: int, cost: float) -> None:
    """
    Between two sizes, and beyond the larger, the cost is on their line; below the smaller it is that one's.
    """
    assert plan(replace(PLAIN, bytes=size), ROUND).row("agent").cores == pytest.approx(cost)


def test_sampler_cost_follows_what_is_kept() -> None:
    """
    Keeping everything costs what the ratio 1 cost, half way lies half way; what is kept anyway counts as kept.
    """

    def cores(**changes: float) -> float:
        return plan(capacity.replaced(PLAIN, shape="routers", **changes), ROUND).row("sampler").cores

    assert cores(ratio=1.0) == pytest.approx(2.0)
    assert cores(ratio=0.55) == pytest.approx(1.5)
    assert cores(ratio=0.0, kept_anyway=0.55) == pytest.approx(1.5)


def test_a_sampler_keeps_no_more_traces_than_its_disk_takes() -> None:
    """
    8,000 spans/s seen at ratio 1 are 1,000 kept traces/s, of which 60 % are planned with: 2,400 of them need four samplers.
    """
    row = plan(replace(PLAIN, requests=2400, spans=1, ratio=1.0, shape="routers"), ROUND).row("sampler")
    assert (row.needed, row.bound) == (4, "kept traces")


def test_memory_holds_the_open_spans_of_a_window_with_one_sampler_away() -> None:
    """
    What one process works in, its open spans and the decision caches are four fifths of the limiter's value.
    """
    row = plan(replace(PLAIN, requests=12500, wait_s=20, shape="routers"), ROUND).row("sampler")
    open_mib = 12500 * 8 / row.needed * 20 * 2000 / 2**20
    limit = int(row.settings["COLLECTOR_MEMORY_MIB"])
    working = 50 + 100 * max(1.0, row.cores / row.needed)
    assert 0 <= limit * 0.8 - (working + open_mib + capacity.BACKGROUND_MIB) < 50
    assert row.mib == limit * capacity.OVERHEAD
    assert int(row.settings["SAMPLER_TRACES"]) >= 2 * 12500 / row.needed * 20


def test_queues_hold_the_outage() -> None:
    """
    An agent's queue holds its host's spans of the outage, a gateway's the kept ones; the disk is theirs and a quarter more.
    """
    made = plan(PLAIN, ROUND)
    agent, gateway = made.row("agent"), made.row("gateway")
    assert int(agent.settings["COLLECTOR_QUEUE_ITEMS"]) == 1000 * 600
    assert agent.disk == pytest.approx(1000 * 600 * 500 * 1.25)
    assert int(gateway.settings["COLLECTOR_QUEUE_ITEMS"]) == pytest.approx(1000 * 600, abs=1000)


def test_queues_hold_the_log_records_of_the_outage() -> None:
    """
    Log records have a queue of their own of the same length, at the agent, the gateway and the router; a sampler sees none.
    """
    for shape, tier, records in (
        ("gateway", "agent", 1250),
        ("gateway", "gateway", 12_500),
        ("routers", "router", 12_500),
    ):
        row = plan(replace(PLAIN, logs=10, shape=shape), ROUND).row(tier)
        plain = plan(replace(PLAIN, shape=shape), ROUND).row(tier)
        assert int(row.settings["COLLECTOR_QUEUE_ITEMS"]) * row.needed >= records * 600, tier
        assert (row.disk - plain.disk) * (row.needed if tier == "router" else 1) >= 0.9 * records * 600 * 300, tier
        assert row.cores > plain.cores
    logs, plain = (plan(replace(PLAIN, logs=count, shape="routers"), ROUND).row("sampler") for count in (10, 0))
    assert logs == plain


def test_kafka_holds_the_outage_three_times_over() -> None:
    """
    Two partitions for each sampler, three copies, 60 % full, and the outage as retention.
    """
    made = plan(replace(PLAIN, lossless=True), ROUND)
    kafka, readers = made.row("kafka"), made.row("kafka-sampler")
    assert made.shape == "kafka"
    assert kafka.disk * kafka.needed == pytest.approx(10_000 * 100 * 600 * 3 / 0.6)
    assert kafka.settings["topic"].startswith(f"{2 * readers.processes} partitions, 3 replicas")
    assert "retention.ms=600000" in kafka.settings["topic"]
    assert kafka.processes >= 3


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, "gateway"),
        ({"requests": 2900}, "gateway"),
        ({"requests": 3100}, "routers"),
        ({"requests": 46_000}, "routers"),
        ({"requests": 48_000}, "kafka"),
        ({"lossless": True}, "kafka"),
        ({"shape": "routers"}, "routers"),
    ],
)
def test_the_smallest_shape_that_fits(changes: dict[str, Any], shape: str) -> None:
    """
    One gateway up to four cores, then up to 32 samplers, then Kafka; or as asked for.
    """
    assert plan(replace(PLAIN, **changes), ROUND).shape == shape


def test_what_was_not_run_is_marked() -> None:
    """
    One process on one core, of a size that was run, is measured; more cores, more processes and larger spans are not.
    """
    assert [row.basis for row in plan(replace(PLAIN, requests=700), ROUND).rows[:2]] == ["measured", "measured"]
    assert plan(replace(PLAIN, requests=800), ROUND).row("gateway").basis == "extrapolated"
    assert plan(replace(PLAIN, requests=100, bytes=1600), ROUND).row("agent").basis == "extrapolated"
    assert plan(replace(PLAIN, requests=20_000), ROUND).row("router").basis == "extrapolated"
    assert "extrapolated" in capacity.ladder(PLAIN, ROUND).splitlines()[-1]


@pytest.mark.parametrize("requests", [0.01, 1, 37, 1_000, 54_321, 1_000_000])
@pytest.mark.parametrize("shape", ["auto", "gateway", "routers", "kafka"])
def test_more_is_never_less(requests: float, shape: str) -> None:
    """
    At any size and in any shape each process has something to work with, and twice the load needs no less of anything.
    """
    one, two = (plan(Target(requests * factor, shape=shape, hosts=7), ROUND) for factor in (1, 2))
    for row in one.rows:
        assert row.processes >= 1 or row.basis == "published"
        assert all(int(value) > 0 for name, value in row.settings.items() if name.startswith("COLLECTOR_"))
    if shape != "auto":
        for row in (row for row in one.rows if row.settings.get("COLLECTOR_MEMORY_MIB")):
            assert two.row(row.tier).processes >= row.processes
            assert two.row(row.tier).cores == pytest.approx(2 * row.cores)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--requests is missing"),
        (["--requests", "many"], "'many' is not a number above 0"),
        (["--requests", "-5"], "'-5' is not a number above 0"),
        (["--requests", "nan"], "'nan' is not a number above 0"),
        (["--requests", "10", "--ratio", "1.5"], "'1.5' is not a share from 0 to 1"),
        (["--requests", "10", "--load", "1"], "'1' is not from 0.05 to 0.95"),
        (["--requests", "10", "--bytes-per-span", "5"], "'5' is not from 50 to 65536 bytes"),
        (["--requests", "10", "--shape", "star"], "--shape"),
        (["--request-rate", "10"], "--request-rate"),
        (["--requests", "10", "--measured", "nowhere.json"], "nowhere.json: No such file or directory"),
        (["--write-docs", "nowhere.md"], "nowhere.md: No such file or directory"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: list[str], said: str) -> None:
    """
    What cannot be planned ends with status 2 and one line that names the option or the file; nothing is printed beside it.
    """
    ended = run(*arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("capacity: ")
    assert said in ended.stderr


def without(tier: str) -> str:
    """
    Return the measurements without one tier.
    """
    content = round_figures()
    return json.dumps(content | {"samples": [entry for entry in content["samples"] if entry["tier"] != tier]})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not what tiers.py writes"),
        ("[]", "not what tiers.py writes"),
        ('{"samples": [{}], "figures": {}}', "not what tiers.py writes"),
        (without("kafka-sampler"), "no figures of kafka-sampler"),
    ],
)
def test_measurements_that_are_none_are_refused(text: str, said: str, tmp_path: Path) -> None:
    """
    A file that is broken, or lacks a tier, is named in one line.
    """
    path = tmp_path / "tiers.json"
    path.write_text(text)
    with pytest.raises(Refused, match=said) as refused:
        Measurements.read(path)
    assert str(path) in str(refused.value)


def test_the_page_says_what_the_script_prints() -> None:
    """
    Every example and table of docs/how-to/capacity.md is what its command prints from the committed measurements.
    """
    page = PAGE.read_text()
    assert len(capacity.BLOCK.findall(page)) == page.count("<!-- capacity.py") == page.count("<!-- end -->") >= 6
    assert capacity.renewed(page, COMMITTED) == page, (
        "run: python benchmarks/capacity.py --write-docs docs/how-to/capacity.md"
    )


def test_the_page_is_renewed_in_place(tmp_path: Path) -> None:
    """
    ``--write-docs`` replaces what stands between the marks, and nothing else.
    """
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- capacity.py --requests 10 -->\nold\n<!-- end -->\nafter\n")
    ended = run("--write-docs", str(page))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "1 blocks" in ended.stdout
    text = page.read_text()
    assert "old" not in text
    assert text.startswith(
        "before\n<!-- capacity.py --requests 10 -->\n```text\n$ python benchmarks/capacity.py --requests 10\n"
    )
    assert text.endswith("```\n<!-- end -->\nafter\n")
    assert run("--requests", "10").stdout.strip() in text


def test_every_variable_of_a_plan_is_one_of_the_files() -> None:
    """
    What the plan says to set is read by the tier's own file.
    """
    for shape in capacity.SHAPES:
        for row in plan(Target(20_000, shape=shape), ROUND).rows:
            path = ROOT / "collector" / f"{row.tier}.yaml"
            for name in row.settings if "COLLECTOR_MEMORY_MIB" in row.settings else ():
                assert f"{{env:{name}:-" in path.read_text(), f"{row.tier}: {name}"
