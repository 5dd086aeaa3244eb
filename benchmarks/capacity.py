"""
How many processes, cores, gigabytes and partitions a target takes, from what ``tiers.py`` measured.

    python benchmarks/capacity.py --requests 20000 --spans-per-request 5 --bytes-per-span 600 --outage-minutes 30
    python benchmarks/capacity.py --show ladder          # 1 k to 1 M spans/s; also: measurements, published
    python benchmarks/capacity.py --write-docs docs/how-to/capacity.md

The rules are explained in ``docs/how-to/capacity.md``. It reads one file and needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HERE = Path(__file__).parent
MEASURED = HERE / "tiers.json"
NEEDED = ("agent", "gateway", "router", "sampler", "kafka-router", "kafka-sampler", "jaeger", "loki")

# Chosen, not measured; the reasons stand in docs/how-to/capacity.md.
SPARE_SPACE = 1.25  # Of a queue's disk: its file grows in steps and is compacted only after an outage.
SOFT_LIMIT = 0.8  # The memory limiter refuses from here (spike_limit_percentage 20).
OVERHEAD = 1.25  # A container's limit over the limiter's, which counts Go's heap only.
MAX_GATEWAY_CORES = 4
MAX_SAMPLERS = 32  # Above it, routers x samplers connections and queues on as many disks are Kafka's work.
ROUTER_QUEUE_S = (
    60  # A router's queue covers a restart of what is behind it; what is longer waits on the agents' disks.
)
REPLICAS = 3
BROKER_FILL = 0.6
REQUESTS_PER_HOST = 500
BACKGROUND_MIB = 150  # Decision caches at their default size, estimated.

# Published by others, see docs/how-to/capacity.md for the sources.
PARTITION_MB_S = 10.0
TEMPO_SINGLE_MB_S = 25.0
TEMPO_MB_S = {"distributors": 10.0, "live-stores": 6.0, "block-builders": 10.0}
CLICKHOUSE_SPANS_S = 50_000


class Refused(Exception):  # noqa: N818 - what it is
    """
    Input that no plan can be made of; the message is one line that says what to change.
    """


@dataclass(frozen=True, slots=True)
class Target:
    """
    What has to be carried, at its peak.

    Attributes:
        requests: Requests that enter the fleet per second; each is one trace.
        spans: Spans of one such request, in all services.
        bytes: Encoded bytes of a span (OTLP protobuf).
        logs: Log records of one request.
        log_bytes: Encoded bytes of a log record.
        outage_s: The longest outage of a store, or of a tier, that must cost nothing.
        ratio: Share that tail sampling keeps of what is neither failed, slow nor forced.
        kept_anyway: Share of the traces that is.
        wait_s: ``SAMPLER_DECISION_WAIT``.
        hosts: Agents.
        cores: Cores of one process.
        load: Share of a core that is used at the peak.
        lossless: Whether the death of a sampler may cost no span.
    """

    requests: float
    spans: float = 5
    bytes: float = 600
    logs: float = 5
    log_bytes: float = 300
    outage_s: float = 1800
    ratio: float = 0.1
    kept_anyway: float = 0.02
    wait_s: float = 10
    hosts: int = 0
    cores: int = 2
    load: float = 0.6
    lossless: bool = False
    shape: str = "auto"

    @property
    def spans_s(self) -> float:
        return self.requests * self.spans

    @property
    def records_s(self) -> float:
        return self.requests * self.logs

    @property
    def kept(self) -> float:
        """
        Return the share of the traces that is stored.
        """
        return self.kept_anyway + (1 - self.kept_anyway) * self.ratio

    @property
    def agents(self) -> int:
        return self.hosts or max(2, math.ceil(self.requests / REQUESTS_PER_HOST))


@dataclass(frozen=True, slots=True)
class Figure:
    """
    One figure and whether it lies inside what was measured.
    """

    value: float
    inside: bool


class Measurements:
    """
    The content of ``tiers.json``, asked by tier and size.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        self.samples: list[dict[str, Any]] = content["samples"]
        self.figures: dict[str, float] = content["figures"]

    @classmethod
    def read(cls, path: Path) -> Measurements:
        """
        Read the file.

        Raises:
            Refused: It is not there, is not what ``tiers.py`` writes, or lacks a tier.
        """
        try:
            content = json.loads(path.read_text())
            made = cls(content)
            present = {sample["tier"] for sample in made.samples}
        except OSError as error:
            raise Refused(f"{path}: {error.strerror}; python benchmarks/tiers.py writes it") from None
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(f"{path}: not what tiers.py writes ({error!r}); run it again") from None
        if missing := [tier for tier in NEEDED if tier not in present]:
            raise Refused(f"{path}: no figures of {', '.join(missing)}; python benchmarks/tiers.py measures them")
        return made

    def sample(self, tier: str, key: str, size: float, kept: float | None = None, signal: str = "spans") -> Figure:
        """
        Return a figure of a tier for spans of ``size`` bytes, on the line through the sizes that were measured.

        With ``kept`` it is on the line through the ratios, too. Spans smaller than the smallest cost as much as that.
        """
        points: dict[int, list[tuple[float, float]]] = {}
        for sample in self.samples:
            if sample["tier"] == tier and sample["signal"] == signal and key in sample:
                points.setdefault(sample["bytes"], []).append((sample.get("ratio", 1.0), sample[key]))
        if not points:
            raise Refused(f"no {key} of {tier} among the measurements; python benchmarks/tiers.py measures it")
        by_size = [
            (float(at), line(sorted(values), kept) if kept is not None else max(value for _, value in values))
            for at, values in sorted(points.items())
        ]
        return Figure(
            line(by_size, max(size, by_size[0][0])), by_size[0][0] <= size <= by_size[-1][0] or len(points) == 1
        )

    def kept_traces_s(self) -> float:
        """
        Return the most traces that one process was seen to keep in a second.

        Each is one transaction of the queue on disk, in the same way in all tiers that decide, so the best rate is the
        nearest to what the disk can do; at a ratio of 1 every trace is kept.
        """
        rates = [sample["per_s"] for sample in self.samples if sample.get("ratio") == 1.0]
        return max(rates) / float(self.content["spans_per_trace"])

    def figure(self, name: str, size: float) -> float:
        """
        Return a figure that was measured at several sizes, for this one.
        """
        points = sorted(
            (float(found[1]), value)
            for key, value in self.figures.items()
            if (found := re.fullmatch(rf"{name}_(\d+)", key))
        )
        if not points:
            raise Refused(f"no {name} among the measurements; python benchmarks/tiers.py measures it")
        return line(points, max(size, points[0][0]))


def line(points: Sequence[tuple[float, float]], at: float) -> float:
    """
    Return the value at ``at`` on the straight line through the first and the last point; of one point, its value.
    """
    (x0, y0), (x1, y1) = points[0], points[-1]
    return y0 if x0 == x1 else max(y0 + (y1 - y0) * (at - x0) / (x1 - x0), 0.0)


@dataclass(frozen=True, slots=True)
class Row:
    """
    One tier of a plan.

    Attributes:
        processes: As many as are needed and, where several share the work, one more.
        needed: Without that one.
        cores: CPU time that the tier uses at the peak, of all processes.
        mib: Memory limit of one process's container.
        disk: Bytes of disk of one process.
        basis: ``measured``, ``extrapolated``, ``published`` or ``estimated``.
        settings: Environment of each process.
    """

    tier: str
    processes: int
    needed: int
    cores: float
    mib: float
    disk: float
    bound: str
    basis: str
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """
    What a target takes, and why in this shape.
    """

    target: Target
    shape: str
    why: str
    rows: list[Row]
    notes: list[str]

    def row(self, tier: str) -> Row:
        return next(row for row in self.rows if row.tier == tier)


def plan(target: Target, measured: Measurements) -> Plan:
    """
    Return the plan: the smallest shape that fits, and its tiers.
    """
    gateway = tail_tier("gateway", target, measured, spare=0)
    gateway_cores = gateway.cores / target.load
    samplers = tail_tier("sampler", target, measured)
    if target.shape != "auto":
        shape, why = target.shape, "as asked for"
    elif target.lossless:
        shape, why = "kafka", "a sampler that dies loses its open traces, and --lossless says that it must not"
    elif gateway_cores <= MAX_GATEWAY_CORES and gateway.needed == 1:
        shape, why = "gateway", f"one gateway needs {cores_text(gateway_cores)} at {target.load:.0%} load"
    elif samplers.processes <= MAX_SAMPLERS:
        shape = "routers"
        why = f"one gateway would need {cores_text(gateway_cores)}, and two would split traces"
    else:
        shape, why = (
            "kafka",
            f"{samplers.processes} samplers are more than the {MAX_SAMPLERS} that routers should feed directly",
        )
    rows = [agent_row(target, measured)]
    notes: list[str] = []
    if shape == "gateway":
        rows.append(gateway)
        opened = count(target.spans_s * target.wait_s)
        notes.append(f"a gateway that dies loses its open traces: {target.wait_s:g} s, {opened} spans")
        notes.append("it has no second one beside it: while it is away, spans wait on the agents' disks")
    elif shape == "routers":
        rows += [router_row("router", target, measured), samplers]
        lost = target.spans_s * target.wait_s / samplers.processes
        notes.append(
            f"a sampler that dies loses its open traces: {target.wait_s:g} s of its share, {count(lost)} spans"
        )
    else:
        router, reader = router_row("kafka-router", target, measured), tail_tier("kafka-sampler", target, measured)
        rows += [router, *kafka_rows(target, measured, reader), reader]
        catch_up = target.outage_s / 60 * target.load / (1 - target.load)
        notes.append(
            f"a killed sampler reads again what Kafka has of its partitions, at most {target.outage_s / 60:g} minutes,"
            f" and needs about {catch_up:.0f} minutes for it beside what comes in; nothing is lost"
        )
    rows += store_rows(target, measured)
    return Plan(target, shape, why, rows, notes + wire_notes(target, measured))


def cores_text(cores: float) -> str:
    return f"{cores:.1f} cores" if cores >= 0.1 else "less than a tenth of a core"


def limits(base: float, extra_mib: float) -> tuple[int, float]:
    """
    Return the value of ``COLLECTOR_MEMORY_MIB`` and the container's limit for a process that needs this much.
    """
    limit = max(200, math.ceil((base + extra_mib) / SOFT_LIMIT / 50) * 50)
    return limit, limit * OVERHEAD


def working(tier: str, target: Target, measured: Measurements, cores: float) -> float:
    """
    Return the memory that a process of so many cores works in, in MiB: idle, and what one busy core adds for each.
    """
    idle = measured.sample(tier, "idle_mib", target.bytes).value
    return idle + (measured.sample(tier, "peak_mib", target.bytes).value - idle) * max(1.0, cores)


def basis(cores: float, *, inside: bool, processes: int = 1) -> str:
    """
    Say what a row rests on: one process on one core was run, everything beyond it was not.
    """
    return "measured" if inside and cores <= 1 and processes == 1 else "extrapolated"


def agent_row(target: Target, measured: Measurements) -> Row:
    spans, records = target.spans_s / target.agents, target.records_s / target.agents
    cost = measured.sample("agent", "cpu_us", target.bytes)
    each = (
        spans * cost.value + records * measured.sample("agent", "cpu_us", target.log_bytes, signal="logs").value
    ) / 1e6
    items = math.ceil(max(spans, records) * target.outage_s / 1000) * 1000
    stored = spans * measured.figure("queue_span_bytes", target.bytes) + records * log_bytes(target, measured)
    limit, container = limits(
        max(working("agent", target, measured, each), measured.figure("queue_peak_mib", target.bytes)), 0
    )
    return Row(
        "agent",
        target.agents,
        target.agents,
        each * target.agents,
        container,
        stored * target.outage_s * SPARE_SPACE,
        "hosts",
        basis(each / target.load, inside=cost.inside),  # A host is a host, so many of them change nothing for the one.
        {"COLLECTOR_MEMORY_MIB": str(limit), "COLLECTOR_QUEUE_ITEMS": str(items)},
    )


def log_bytes(target: Target, measured: Measurements) -> float:
    """
    Return the queue's bytes for a log record: the share that a span's framing adds, on the record's own bytes.
    """
    smallest = min(sample["bytes"] for sample in measured.samples if sample["signal"] == "spans")
    return target.log_bytes * measured.figure("queue_span_bytes", smallest) / float(smallest)


def tail_tier(tier: str, target: Target, measured: Measurements, spare: int = 1) -> Row:
    """
    Return the tier that decides about traces: bound by CPU, or by the queue, which takes kept traces one by one.
    """
    cost = measured.sample(tier, "cpu_us", target.bytes, target.kept)
    used, records = target.spans_s * cost.value / 1e6, 0.0
    if tier == "gateway":  # In the other shapes log records part from the spans at the router.
        records = target.records_s
        used += records * measured.sample(tier, "cpu_us", target.log_bytes, signal="logs").value / 1e6
    most = MAX_GATEWAY_CORES if tier == "gateway" else target.cores
    by_cpu = math.ceil(used / (target.load * most) - 1e-9)
    by_queue = math.ceil(target.requests * target.kept / (target.load * measured.kept_traces_s()) - 1e-9)
    needed = max(1, by_cpu, by_queue)
    processes = needed + spare
    share = target.spans_s / needed  # What is left to each when the spare one is gone.
    open_bytes = share * target.wait_s * measured.figure("open_span_bytes", target.bytes)
    limit, container = limits(working(tier, target, measured, used / needed), open_bytes / 2**20 + BACKGROUND_MIB)
    items = math.ceil(max(share * target.kept, records) * target.outage_s / 1000) * 1000
    stored = share * target.kept * measured.figure("queue_span_bytes", target.bytes)
    disk = (stored + records * log_bytes(target, measured)) * target.outage_s * SPARE_SPACE
    settings = {
        "COLLECTOR_MEMORY_MIB": str(limit),
        "SAMPLER_RATIO": f"{target.ratio:g}",
        "SAMPLER_DECISION_WAIT": f"{target.wait_s:g}s",
        "SAMPLER_TRACES": str(math.ceil(2 * target.requests / needed * target.wait_s / 1000) * 1000),
        "COLLECTOR_QUEUE_ITEMS": str(max(items, 1000)),
    }
    bound = "CPU" if by_cpu >= by_queue else "kept traces"
    return Row(
        tier,
        processes,
        needed,
        used,
        container,
        disk,
        bound,
        basis(used / target.load, inside=cost.inside, processes=needed),
        settings,
    )


def router_row(tier: str, target: Target, measured: Measurements) -> Row:
    cost = measured.sample(tier, "cpu_us", target.bytes)
    record = measured.sample("router", "cpu_us", target.log_bytes, signal="logs").value
    used = (target.spans_s * cost.value + target.records_s * record) / 1e6
    needed = max(1, math.ceil(used / (target.load * target.cores) - 1e-9))
    share, records = target.spans_s / needed, target.records_s / needed
    limit, container = limits(working(tier, target, measured, used / needed), 0)
    items = math.ceil(max(share * ROUTER_QUEUE_S, records * target.outage_s) / 1000) * 1000
    disk = share * ROUTER_QUEUE_S * measured.figure("queue_span_bytes", target.bytes)
    disk = (disk + records * target.outage_s * log_bytes(target, measured)) * SPARE_SPACE
    settings = {"COLLECTOR_MEMORY_MIB": str(limit), "COLLECTOR_QUEUE_ITEMS": str(items)}
    return Row(
        tier,
        needed + 1,
        needed,
        used,
        container,
        disk,
        "CPU",
        basis(used / target.load, inside=cost.inside, processes=needed),
        settings,
    )


def kafka_rows(target: Target, measured: Measurements, readers: Row) -> list[Row]:
    written = target.spans_s * measured.figure("kafka_span_bytes", target.bytes)
    cost = measured.sample("kafka-router", "beside_cpu_us", target.bytes).value * REPLICAS
    cost += measured.sample("kafka-sampler", "beside_cpu_us", target.bytes, target.kept).value
    used = target.spans_s * cost / 1e6
    partitions = max(2 * readers.processes, math.ceil(written / 1e6 / PARTITION_MB_S))
    needed = max(REPLICAS - 1, math.ceil(used / (target.load * target.cores)))
    disk = written * target.outage_s * REPLICAS / BROKER_FILL / needed
    retention = f"retention.ms={math.ceil(target.outage_s) * 1000}"
    settings = {
        "topic": f"{partitions} partitions, {REPLICAS} replicas, min.insync.replicas={REPLICAS - 1}, {retention}"
    }
    return [Row("kafka", needed + 1, needed, used, 6144, disk, "CPU", "extrapolated", settings)]


def store_rows(target: Target, measured: Measurements) -> list[Row]:
    spans, size = target.spans_s * target.kept, target.bytes
    megabytes = spans * size / 1e6
    cost = measured.sample("jaeger", "cpu_us", size)
    used = spans * cost.value / 1e6
    day = spans * measured.sample("jaeger", "disk_bytes", size).value * 86400
    rows: list[Row] = []
    if used <= target.load:
        note = {"per day": f"{amount(day)} at the peak's rate"}
        rows.append(
            Row(
                "jaeger, one, on disk",
                1,
                1,
                used,
                1024,
                day,
                "CPU",
                basis(used / target.load, inside=cost.inside),
                note,
            )
        )
    elif spans <= CLICKHOUSE_SPANS_S * target.load:
        note = {
            "published": f"Jaeger 2 with ClickHouse: over {CLICKHOUSE_SPANS_S:,} spans/s on a node; {spans:,.0f} come"
        }
        rows.append(Row("jaeger + clickhouse", 1, 1, 0, 0, 0, "spans/s", "published", note))
    elif megabytes <= TEMPO_SINGLE_MB_S * target.load:
        note = {"published": f"Tempo in one process: {TEMPO_SINGLE_MB_S:g} MB/s; {megabytes:.1f} come"}
        rows.append(Row("tempo, one", 1, 1, 0, 0, 0, "MB/s", "published", note))
    else:
        parts = [f"{math.ceil(megabytes / each / target.load)} {part}" for part, each in TEMPO_MB_S.items()]
        note = {"published": f"Tempo's services: {', '.join(parts)} for {megabytes:.1f} MB/s"}
        rows.append(Row("tempo, many", 0, 0, 0, 0, 0, "MB/s", "published", note))
    record = measured.sample("loki", "cpu_us", target.log_bytes, signal="logs")
    used = target.records_s * record.value / 1e6
    needed = max(1, math.ceil(used / target.load / target.cores))
    day = target.records_s * measured.sample("loki", "disk_bytes", target.log_bytes, signal="logs").value * 86400
    note = {"per day": f"{amount(day)} at the peak's rate"}
    rows.append(
        Row(
            "loki",
            needed,
            needed,
            used,
            2048,
            day / needed,
            "CPU",
            basis(used / target.load, inside=record.inside, processes=needed),
            note,
        )
    )
    return rows


def wire_notes(target: Target, measured: Measurements) -> list[str]:
    wire = amount(target.spans_s * measured.sample("agent", "wire_bytes", target.bytes).value)
    return [
        f"between two tiers the network carries {wire}/s, compressed ({amount(target.spans_s * target.bytes)}/s before)"
    ]


def amount(number: float) -> str:
    """
    Return bytes as people say them.
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 999.5 * size else f"{number / size:,.0f} {unit}"
    return f"{number:.0f} B"


def count(number: float) -> str:
    return f"{number:,.0f}"


SHAPES = {
    "gateway": "agents and one gateway",
    "routers": "agents, routers and samplers",
    "kafka": "agents, routers, Kafka and samplers",
}


def printed(made: Plan) -> str:
    """
    Return the plan as text.
    """
    target = made.target
    total, size, kept = target.spans_s, target.spans_s * target.bytes, target.spans_s * target.kept
    asked = f"{count(target.requests)} requests/s x {target.spans:g} spans of {target.bytes:g} B"
    lines = [
        f"{asked}: {count(total)} spans/s, {amount(size)}/s",
        f"kept {target.kept:.1%}: {count(kept)} spans/s; {count(target.records_s)} log records/s",
        f"to be survived: {target.outage_s / 60:g} min; load {target.load:.0%}; {target.cores} cores a process",
        "",
        f"shape: {SHAPES[made.shape]} ({made.why})",
        "",
        f"{'tier':21}{'processes':>13}{'cores used':>12}{'memory each':>13}{'disk each':>13}  basis",
    ]
    for row in made.rows:
        spare = f"{row.needed} + {row.processes - row.needed}" if row.processes > row.needed else f"{row.needed}"
        if row.basis == "published":
            lines.append(f"{row.tier:21}{'see below':>13}{'':38}  {row.basis}")
            continue
        disk = amount(row.disk) + ("/day" if "per day" in row.settings else "")
        lines.append(f"{row.tier:21}{spare:>13}{row.cores:>12.2f}{row.mib:>9.0f} MiB{disk:>13}  {row.basis}")
    lines += ["", "environment of each process:"]
    for row in made.rows:
        if row.tier in {"agent", "gateway", "router", "sampler", "kafka-router", "kafka-sampler"}:
            lines.append(f"  {row.tier:14}" + " ".join(f"{name}={value}" for name, value in row.settings.items()))
        elif row.tier == "kafka":
            lines.append(f"  {'topic':14}{row.settings['topic']}")
    notes = [f"store: {row.settings['published']}" for row in made.rows if "published" in row.settings]
    notes += [
        f"the number of {row.tier}s is bound by kept traces, not by CPU"
        for row in made.rows
        if row.bound == "kept traces"
    ]
    lines += ["", *(f"- {note}" for note in notes + made.notes)]
    return "\n".join(lines)


def ladder(target: Target, measured: Measurements) -> str:
    """
    Return what each order of magnitude takes, as a Markdown table.
    """
    head = ["spans/s", "shape", "cores used by collectors", "gateway, or routers + samplers", "open in one sampler"]
    head += ["disk of all queues", "stored spans/s", "store"]
    lines = [f"| {' | '.join(head)} |", "| ---: | --- | ---: | --- | ---: | ---: | ---: | --- |"]
    for spans in (1e3, 1e4, 1e5, 1e6):
        made = plan(replaced(target, requests=spans / target.spans), measured)
        tiers = [row for row in made.rows if "COLLECTOR_MEMORY_MIB" in row.settings]
        middle = " + ".join(str(row.processes) for row in tiers[1:])
        opened = spans * target.wait_s / tiers[-1].processes
        disk = sum(row.disk * row.processes for row in made.rows if row in tiers or row.tier == "kafka")
        store = next(row.tier for row in made.rows if row.tier.startswith(("jaeger", "tempo")))
        mark = "" if all(row.basis == "measured" for row in tiers) else " (extrapolated)"
        lines.append(
            f"| {count(spans)} | {SHAPES[made.shape]} | {sum(row.cores for row in tiers):.1f}{mark} | {middle}"
            f" | {count(opened)} spans | {amount(disk)} | {count(spans * target.kept)} | {store} |"
        )
    return "\n".join(lines)


def replaced(target: Target, **changes: Any) -> Target:
    return Target(**{name: getattr(target, name) for name in Target.__slots__} | changes)


def measurements(measured: Measurements) -> str:
    """
    Return what was measured, as Markdown tables with what they were measured on.
    """
    content = measured.content
    versions = ", ".join(f"{name} {version}" for name, version in sorted(content["versions"].items()))
    command, _, part = content["command"].partition(" --only ")
    ran = f"`{command}` in parts, the last `--only {part}`," if part else f"`{command}`"
    lines = [
        f"{ran} on {content['date'][:10]}: {content['machine']}; {versions}.",
        f"Load average at the end: {content['load_average'][0]}.",
        "",
        "| tier | item | CPU us each | min - max | highest rate seen, at share of the core | peak MiB | B each |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for sample in measured.samples:
        item = f"{'span' if sample['signal'] == 'spans' else 'log record'}, {sample['bytes']} B"
        ratio = f", ratio {sample['ratio']:g}" if "ratio" in sample else ""
        low, high = sample["cpu_us_range"]
        moved = f"{sample['wire_bytes']} sent" if "wire_bytes" in sample else ""
        moved = f"{sample['disk_bytes']} stored" if "disk_bytes" in sample else moved
        lines.append(
            f"| {sample['tier']}{ratio} | {item} | {sample['cpu_us']:.0f} | {low:.0f} - {high:.0f} |"
            f" {count(sample['per_s'])}/s at {sample['busy']:.0%} | {sample['peak_mib']} | {moved} |"
        )
    lines += ["", "| figure | value |", "| --- | ---: |"]
    lines += [f"| `{name}` | {count(value)} |" for name, value in sorted(measured.figures.items())]
    for name, reason in content.get("left_out", {}).items():
        lines += ["", f"Not measured: {name} ({reason})."]
    return "\n".join(lines)


def published(measured: Measurements) -> str:
    """
    Return what others publish beside what was measured here, as a Markdown table.
    """

    def per_core(tier: str, signal: str = "spans") -> str:
        rates = [
            (s["bytes"], 1e6 / s["cpu_us"]) for s in measured.samples if s["tier"] == tier and s["signal"] == signal
        ]
        best = max(rates, key=lambda rate: rate[1])
        least = min(rates, key=lambda rate: rate[1])
        if best == least:
            return f"{count(best[1])}/s per core ({best[0]} B)"
        return f"{count(least[1])} ({least[0]} B) to {count(best[1])}/s per core ({best[0]} B)"

    broker = 1e6 / measured.sample("kafka-router", "beside_cpu_us", 500).value
    tempo = per_core("tempo") if any(sample["tier"] == "tempo" for sample in measured.samples) else "not measured"
    rows = [
        ("collector, spans", "15,000/s per core, 2 GB per core", "Splunk", f"agent: {per_core('agent')}"),
        ("collector, logs", "10,000/s per core", "Splunk", f"agent: {per_core('agent', 'logs')}"),
        ("collector, logs", "2 M/s on over 800 cores, so 2,500/s per core", "ClickHouse", "as above"),
        ("Tempo 3, one process", "25 to 35 MB/s, or 55,000 to 80,000 spans/s", "Grafana", tempo),
        ("Jaeger 2 + ClickHouse", "over 50,000 spans/s on one node", "Jaeger", f"Jaeger on disk: {per_core('jaeger')}"),
        ("Kafka", "10 MB/s per partition", "Grafana", f"written: {count(broker)} spans/s per core (500 B)"),
    ]
    lines = ["| what | published | by | here |", "| --- | --- | --- | --- |"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def numbers(low: float, high: float, what: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return number

    return parse


class Parser(argparse.ArgumentParser):
    """
    Says what is wrong in one line.
    """

    def error(self, message: str) -> NoReturn:
        raise Refused(message)


def parser() -> Parser:
    made = Parser(prog="capacity.py", description="Processes, cores, memory, disk and partitions for a target.")
    some, share = numbers(1e-3, 1e9, "a number above 0"), numbers(0, 1, "a share from 0 to 1")
    made.add_argument("--requests", type=some, help="requests/s that enter the fleet at the peak; each is one trace")
    made.add_argument("--spans-per-request", type=some, default=5, help="in all services together")
    made.add_argument(
        "--bytes-per-span", type=numbers(50, 65536, "from 50 to 65536 bytes"), default=600, help="OTLP protobuf"
    )
    made.add_argument("--logs-per-request", type=numbers(0, 1e6, "a number from 0"), default=5, help="records")
    made.add_argument(
        "--bytes-per-log", type=numbers(50, 65536, "from 50 to 65536 bytes"), default=300, help="OTLP protobuf"
    )
    made.add_argument(
        "--outage-minutes", type=numbers(0, 10080, "from 0 minutes to a week"), default=30, help="to be survived"
    )
    made.add_argument("--ratio", type=share, default=0.1, help="kept of the ordinary traces")
    made.add_argument("--kept-anyway", type=share, default=0.02, help="share of failed, slow and forced traces")
    made.add_argument("--decision-wait", type=numbers(1, 600, "from 1 to 600 seconds"), default=10, help="seconds")
    made.add_argument(
        "--hosts",
        type=numbers(1, 1e6, "a number from 1"),
        default=0,
        help=f"agents; default one per {REQUESTS_PER_HOST} requests/s",
    )
    made.add_argument("--cores-per-process", type=numbers(1, 64, "from 1 to 64"), default=2, help="default 2")
    made.add_argument(
        "--load", type=numbers(0.05, 0.95, "from 0.05 to 0.95"), default=0.6, help="share of each core used at the peak"
    )
    made.add_argument("--lossless", action="store_true", help="a sampler's death may cost no span: Kafka")
    made.add_argument("--shape", choices=("auto", *SHAPES), default="auto")
    made.add_argument("--show", choices=("plan", "ladder", "measurements", "published"), default="plan")
    made.add_argument("--measured", type=Path, default=MEASURED, help="what tiers.py wrote")
    made.add_argument(
        "--write-docs", type=Path, metavar="PAGE", help="renew every block of this page that names its arguments"
    )
    return made


def answer(arguments: Sequence[str]) -> str:
    """
    Return what the script prints for these arguments.

    Raises:
        Refused: They, or the measurements, are no basis for a plan.
    """
    options = parser().parse_args(arguments)
    if options.show == "plan" and options.requests is None:
        raise Refused("--requests is missing: how many requests per second enter the fleet at its peak?")
    measured = Measurements.read(options.measured)
    if options.show == "measurements":
        return measurements(measured)
    if options.show == "published":
        return published(measured)
    target = Target(
        requests=options.requests or 1,
        spans=options.spans_per_request,
        bytes=options.bytes_per_span,
        logs=options.logs_per_request,
        log_bytes=options.bytes_per_log,
        outage_s=options.outage_minutes * 60,
        ratio=options.ratio,
        kept_anyway=options.kept_anyway,
        wait_s=options.decision_wait,
        hosts=int(options.hosts),
        cores=int(options.cores_per_process),
        load=options.load,
        lossless=options.lossless,
        shape=options.shape,
    )
    return ladder(target, measured) if options.show == "ladder" else printed(plan(target, measured))


BLOCK = re.compile(r"(<!-- capacity\.py (?P<arguments>.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def renewed(page: str, measured: Path = MEASURED) -> str:
    """
    Return the page with every block between ``<!-- capacity.py ARGUMENTS -->`` and ``<!-- end -->`` written anew.
    """

    def block(found: re.Match[str]) -> str:
        arguments = shlex.split(found["arguments"])
        text = answer([*arguments, "--measured", str(measured)])
        if "--show" not in arguments:
            text = f"```text\n$ python benchmarks/capacity.py {found['arguments']}\n{text}\n```"
        return f"{found[1]}{text}\n{found[3]}"

    return BLOCK.sub(block, page)


def main() -> int:
    try:
        options = parser().parse_args()
        if options.write_docs is None:
            print(answer(sys.argv[1:]))
            return 0
        try:
            page = options.write_docs.read_text()
        except OSError as error:
            raise Refused(f"{options.write_docs}: {error.strerror}") from None
        options.write_docs.write_text(renewed(page, options.measured))
        print(f"{options.write_docs}: {len(BLOCK.findall(page))} blocks written from {options.measured}")
    except Refused as refused:
        print(f"capacity: {refused}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
