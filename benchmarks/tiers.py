"""
What a span costs in each tier: CPU time, memory, disk and wire, of the shipped configurations on the real programs.

    python benchmarks/tiers.py                 # all tiers, under six minutes; writes benchmarks/tiers.json
    python benchmarks/tiers.py --only agent,router
    python benchmarks/tiers.py --quick         # seconds; figures mean nothing, nothing is written

How it is measured stands in ``benchmarks/README.md``; ``capacity.py`` turns the file into a plan. Linux and two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)] if str(HERE.parent) not in sys.path else []  # As a script, only HERE is on the path.

from benchmarks import otlp_load  # noqa: E402
from benchmarks.side_by_side import cores, machine  # noqa: E402
from tests.stack import build, engines  # noqa: E402
from tests.stack import kafka as kafka_files  # noqa: E402
from tests.stack.harness import Machine, eventually, get  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.otlp_load import Load, Template

SIZES = (500, 1500)  # Encoded bytes of a span: ours without and with an application's own attributes.
RECORD = 300  # Encoded bytes of a log record.
SDK_BATCH, TIER_BATCH = 512, 1024  # What our exporter sends at once; what a collector's queue (min_size) does.
RATIOS = (0.1, 1.0)
CONNECTIONS = 4
TAIL_WAIT_S = 1.0  # SAMPLER_DECISION_WAIT in the runs; it moves memory (measured apart), not CPU.
TARGET = HERE / "tiers.json"
ONE_CORE = {"GOMAXPROCS": "1"}


class Unusable(Exception):  # noqa: N818 - what it is
    """
    A run that gives no figure; the message is one line.
    """


@dataclass(slots=True)
class Bench:
    """
    The machine while it measures: who is pinned where, what was measured, what was left out.
    """

    host: Machine
    seconds: float
    slices: int
    quick: bool = False
    acceptor: str = ""
    count: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    templates: dict[tuple[str, int, int], list[Template]] = field(default_factory=dict)

    def batches(self, signal: str, size: int, per_batch: int) -> list[Template]:
        """
        Return eight different batches, encoded once.
        """
        key = (signal, size, per_batch)
        if key not in self.templates:
            make = otlp_load.spans if signal == "spans" else otlp_load.records
            self.templates[key] = [make(size, per_batch, seed) for seed in range(8)]
        return self.templates[key]

    @property
    def sizes(self) -> tuple[int, ...]:
        """
        Return the sizes of spans that are run.
        """
        return SIZES[:1] if self.quick else SIZES

    def load(self, address: str, signal: str, protocol: str, size: int) -> Load:
        """
        Return load for one address: as our SDK sends (``http``), or as a collector sends to the next.
        """
        host, slash, prefix = address.partition("/")
        batches = self.batches(signal, size, SDK_BATCH if protocol == "http" else TIER_BATCH)
        return otlp_load.Load(host, signal, protocol, batches, 1 if self.quick else CONNECTIONS, slash + prefix)

    def received(self) -> int:
        """
        Return the bytes that the acceptor has taken.
        """
        return int(get(f"http://{self.acceptor}/stats").json()["bytes"])

    def figure(self, name: str, value: float) -> None:
        self.figures[name] = round(value)
        say(f"{name}: {value:.0f}")

    @contextlib.contextmanager
    def collector(self, file: str, ratio: float | None = None, **environment: str) -> Iterator[Measured]:
        """
        Run a tier on the first core from its shipped file, sending to the acceptor unless told otherwise.
        """
        settings = {
            "COLLECTOR_QUEUE_ITEMS": "1000000",
            "COLLECTOR_MEMORY_MIB": "2000",
            "NEXT_OTLP_ENDPOINT": self.acceptor,
            "JAEGER_OTLP_ENDPOINT": self.acceptor,
            "LOGS_OTLP_ENDPOINT": f"http://{self.acceptor}",
            "COLLECTOR_LOGS_EXPORTER": "otlp_http/logs",
            "ROUTER_SAMPLERS": f"[{self.acceptor}]",
            "SAMPLER_DECISION_WAIT": f"{TAIL_WAIT_S:.0f}s",
            "SAMPLER_TRACES": "1000000",
            "SAMPLER_RATIO": str(1.0 if ratio is None else ratio),
        }
        self.count += 1
        tier = engines.Tier(self.host, file, settings | environment, name=f"{file}-{self.count}")
        tool = build.KAFKA_COLLECTOR if file in engines.WITH_KAFKA_RECEIVER else build.COLLECTOR
        self.versions[tool.name] = tool.version
        with self.engine(file, tier) as measured:
            yield measured

    @contextlib.contextmanager
    def engine(self, name: str, engine: engines.Engine, core: int = 0) -> Iterator[Measured]:
        """
        Run one engine on one core, and end it.
        """
        try:
            with pinned(core):
                engine.start(**ONE_CORE)
        except AssertionError as error:  # What eventually() raises; the program's own last words say why.
            words = engine.running().log.read_text(errors="replace").strip().splitlines()
            engine.kill()
            raise Unusable(f"{error}: {words[-1] if words else 'it said nothing'}") from None
        try:
            yield Measured(name, engine)
        finally:
            engine.kill()


@dataclass(slots=True)
class Measured:
    """
    One running process.
    """

    name: str
    engine: engines.Engine

    @property
    def pid(self) -> int:
        return self.engine.running().popen.pid

    def address(self, protocol: str) -> str:
        """
        Return where this tier takes OTLP.
        """
        assert isinstance(self.engine, engines.Tier)
        return self.engine.grpc if protocol == "grpc" else self.engine.http

    def cpu_s(self) -> float:
        """
        Return the CPU seconds used so far, user and system, of all threads.
        """
        return time.clock_gettime(~self.pid << 3 | 2)  # clock_getcpuclockid(3), as the kernel encodes it

    def mib(self, which: str = "VmRSS") -> float:
        """
        Return resident memory, or with ``VmHWM`` the most there was of it.
        """
        return int(Path(f"/proc/{self.pid}/status").read_text().split(f"{which}:")[1].split()[0]) / 1024

    def disk(self) -> int:
        """
        Return the bytes that its directory takes on the disk.
        """
        return sum(path.stat().st_blocks * 512 for path in self.engine.directory.rglob("*") if path.is_file())

    def settle(self, signal: str, items: int, traces: int, *, tail: bool) -> None:
        """
        Wait until everything that was accepted has left the process, or was sampled out.

        Raises:
            Unusable: Something was refused or thrown away, so the figure would be of less work than it says.
        """
        kind = "spans" if signal == "spans" else "log_records"
        engine = self.engine

        def done() -> bool:
            if not isinstance(engine, engines.Tier):  # Has no collector's metrics; an idle processor says it.
                before = self.cpu_s()
                time.sleep(0.2)
                return self.cpu_s() - before < 0.02
            now = engine.metrics()
            lost = ("receiver_refused_" + kind, "receiver_failed_" + kind, "exporter_enqueue_failed_" + kind)
            for name in (*lost, "processor_tail_sampling_sampling_trace_dropped_too_early"):
                if number := now.total(f"otelcol_{name}"):
                    raise Unusable(f"{self.name}: {name} {number:.0f}; lower --seconds")
            if now.total("otelcol_exporter_queue_size") or now.total(f"otelcol_receiver_accepted_{kind}") < items:
                return False
            if tail:
                return now.total("otelcol_processor_tail_sampling_global_count_traces_sampled") >= traces
            return now.total(f"otelcol_exporter_sent_{kind}") >= items

        eventually(f"{self.name} to hand on what it has", done, while_running=[engine.running()])


@contextlib.contextmanager
def pinned(core: int) -> Iterator[None]:
    """
    Give what is started inside the first (0, measured) or the second core (1, everything else).
    """
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES[core])
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


CORES = cores()


def measure(
    bench: Bench,
    tier: Measured,
    load: Load,
    signal: str,
    size: int,
    *,
    ratio: float | None = None,
    beside: Measured | None = None,
    store: Measured | None = None,
) -> dict[str, Any]:
    """
    Send for a few slices and return what an item cost.

    A slice is sending for ``bench.seconds``, then waiting until nothing is left in the process: the whole cost of each
    item is in it. The CPU time of ``beside`` is taken with it; of a ``store`` the disk it has taken in the end.
    """
    items = traces = 0
    wait = TAIL_WAIT_S if ratio is not None else 0
    cost: list[float] = []
    other: list[float] = []
    rates: list[float] = []
    busy: list[float] = []
    wire: list[float] = []
    idle, disk = tier.mib(), store.disk() if store else 0
    for number in range(bench.slices + 1):  # The first one warms up.
        before, before_beside, before_bytes = tier.cpu_s(), beside.cpu_s() if beside else 0.0, bench.received()
        started = time.monotonic()
        sent = load.send(bench.seconds if number else bench.seconds / 2)
        items, traces = items + sent.items, traces + sent.traces
        if sent.refused or not sent.items:
            raise Unusable(f"{tier.name}: {sent.refused} of {sent.items + sent.refused} {signal} refused")
        tier.settle(signal, items, traces, tail=ratio is not None)
        took, used = time.monotonic() - started - wait, tier.cpu_s() - before
        if number:
            cost.append(used / sent.items * 1e6)
            rates.append(sent.items / took)
            busy.append(used / took)
            wire.append((bench.received() - before_bytes) / sent.items)
            other.append((beside.cpu_s() - before_beside) / sent.items * 1e6 if beside else 0)
    sample = {
        "tier": tier.name,
        "signal": signal,
        "bytes": size,
        **({} if ratio is None else {"ratio": ratio}),
        "cpu_us": round(statistics.median(cost), 2),
        "cpu_us_range": [round(min(cost), 2), round(max(cost), 2)],
        "per_s": round(max(rates)),
        "busy": round(max(busy), 2),
        "idle_mib": round(idle),
        "peak_mib": round(tier.mib("VmHWM")),
        "items": items,
        **({"beside_cpu_us": round(statistics.median(other), 2)} if beside else {}),
    }
    if store:
        sample["disk_bytes"] = round((store.disk() - disk) / items)
    elif sent_on := round(statistics.median(wire)):  # To Kafka, nothing comes by the acceptor.
        sample["wire_bytes"] = sent_on
    bench.samples.append(sample)
    describe(sample)
    return sample | {"traces": traces}


MOVED = {"wire_bytes": "B sent on", "disk_bytes": "B on disk"}


def describe(sample: dict[str, Any]) -> None:
    ratio = f" at {sample['ratio']:g}" if "ratio" in sample else ""
    beside = f", Kafka {sample['beside_cpu_us']} us" if "beside_cpu_us" in sample else ""
    moved = ", ".join(f"{sample[key]} {what}" for key, what in MOVED.items() if key in sample)
    say(
        f"{sample['tier']:13} {sample['signal']:5} of {sample['bytes']:4} B{ratio:7}: {sample['cpu_us']:7} us"
        f" {sample['cpu_us_range']}{beside}, {sample['per_s']}/s at {sample['busy']:.0%} of the core,"
        f" {sample['peak_mib']} MiB, {moved}"
    )


def agent(bench: Bench) -> None:
    """
    The agent, as our SDK sends to it: OTLP over HTTP, 512 spans at once, not compressed.
    """
    for kind, size in (*(("spans", size) for size in bench.sizes), ("logs", RECORD)):
        with bench.collector("agent") as tier:
            measure(bench, tier, bench.load(tier.address("http"), kind, "http", size), kind, size)


def queue(bench: Bench) -> None:
    """
    The disk that a span takes in an agent's queue while the next tier is away, and the memory of that agent.
    """
    for size in bench.sizes:
        with bench.collector("agent", NEXT_OTLP_ENDPOINT=f"127.0.0.1:{bench.host.port()}") as tier:
            sent = bench.load(tier.address("http"), "spans", "http", size).send(bench.seconds * 3, batches=128)
            bench.figure(f"queue_span_bytes_{size}", tier.disk() / sent.items)
            bench.figure(f"queue_peak_mib_{size}", tier.mib("VmHWM"))


def gateway(bench: Bench) -> None:
    """
    The gateway, as agents send to it.
    """
    sampling(bench, "gateway")
    logs(bench, "gateway")


def router(bench: Bench) -> None:
    """
    The router in front of two samplers, as agents send to it.
    """
    port = bench.acceptor.partition(":")[2]
    for size in bench.sizes:
        with bench.collector("router", ROUTER_SAMPLERS=f"[127.0.0.1:{port}, localhost:{port}]") as tier:
            measure(bench, tier, bench.load(tier.address("grpc"), "spans", "grpc", size), "spans", size)
    logs(bench, "router")


def sampler(bench: Bench) -> None:
    """
    The sampler, and what an open span takes of its memory.
    """
    sampling(bench, "sampler")
    for size in bench.sizes:
        with bench.collector("sampler", 0.1, SAMPLER_DECISION_WAIT="600s", COLLECTOR_MEMORY_MIB="4000") as tier:
            idle = tier.mib("VmHWM")
            sent = bench.load(tier.address("grpc"), "spans", "grpc", size).send(bench.seconds * 3, batches=96)
            bench.figure(f"open_span_bytes_{size}", (tier.mib("VmHWM") - idle) * 2**20 / sent.items)


def sampling(bench: Bench, name: str) -> None:
    for size in bench.sizes:
        for ratio in RATIOS:
            with bench.collector(name, ratio) as tier:
                load = bench.load(tier.address("grpc"), "spans", "grpc", size)
                measure(bench, tier, load, "spans", size, ratio=ratio)


def logs(bench: Bench, name: str) -> None:
    with bench.collector(name) as tier:
        measure(bench, tier, bench.load(tier.address("grpc"), "logs", "grpc", RECORD), "logs", RECORD)


def kafka(bench: Bench) -> None:
    """
    The router that writes to Kafka, the broker beside the load generator, and the sampler that reads what is there.
    """
    bench.versions["kafka"] = kafka_files.VERSION
    with bench.engine("kafka", engines.Kafka(bench.host), core=1) as broker:
        assert isinstance(broker.engine, engines.Kafka)
        for size in bench.sizes:
            environment = {"KAFKA_BROKERS": broker.engine.brokers, "KAFKA_TOPIC": f"spans-{size}"}
            broker.engine.create_topic(environment["KAFKA_TOPIC"], 4)
            before = broker.disk()
            with bench.collector("kafka-router", None, **environment) as tier:
                load = bench.load(tier.address("grpc"), "spans", "grpc", size)
                sample = measure(bench, tier, load, "spans", size, beside=broker)
            bench.figure(f"kafka_span_bytes_{size}", (broker.disk() - before) / sample["items"])
            for ratio in RATIOS:
                backlog(bench, broker, sample, ratio, environment)


def backlog(bench: Bench, broker: Measured, written: dict[str, Any], ratio: float, environment: dict[str, str]) -> None:
    items: int = written["items"]
    group = {"KAFKA_GROUP": f"samplers-{written['bytes']}-{ratio}"}
    with bench.collector("kafka-sampler", ratio, **environment, **group) as tier:
        started, idle = time.monotonic(), tier.mib()
        # Only what reading costs: starting up took these.
        before, before_broker, before_bytes = tier.cpu_s(), broker.cpu_s(), bench.received()
        tier.settle("spans", items, written["traces"], tail=True)
        took, used = time.monotonic() - started - TAIL_WAIT_S, tier.cpu_s() - before
        cost = used / items * 1e6
        bench.samples.append(
            {
                "tier": "kafka-sampler",
                "signal": "spans",
                "bytes": written["bytes"],
                "ratio": ratio,
                "cpu_us": round(cost, 2),
                "cpu_us_range": [round(cost, 2)] * 2,
                "per_s": round(items / took),
                "busy": round(used / took, 2),
                "wire_bytes": round((bench.received() - before_bytes) / items),
                "idle_mib": round(idle),
                "peak_mib": round(tier.mib("VmHWM")),
                "items": items,
                "beside_cpu_us": round((broker.cpu_s() - before_broker) / items * 1e6, 2),
            }
        )
        describe(bench.samples[-1])


def jaeger(bench: Bench) -> None:
    """
    Jaeger, on disk as it is shipped for more than a laptop: what taking a span costs it.
    """
    bench.versions["jaeger"] = build.JAEGER.version
    for size in bench.sizes:
        store = engines.Jaeger(bench.host, f"jaeger-{size}")
        with bench.engine("jaeger", store) as process:
            measure(bench, process, bench.load(store.otlp, "spans", "grpc", size), "spans", size, store=process)


def tempo(bench: Bench) -> None:
    """
    The Tempo that TEMPO_BIN names, in one process.
    """
    if not os.environ.get("TEMPO_BIN"):
        raise Unusable("TEMPO_BIN names no Tempo")
    bench.versions["tempo"] = "of TEMPO_BIN"
    for size in bench.sizes:
        store = engines.Tempo(bench.host, f"tempo-{size}")
        with bench.engine("tempo", store) as process:
            # Its blocks are written minutes later, so its disk says nothing yet.
            measure(bench, process, bench.load(store.otlp, "spans", "grpc", size), "spans", size)


@dataclass(slots=True)
class Loki(engines.Loki):
    """
    Loki without its limits of so many MB/s for a tenant and a stream, which stop it long before a core is used up.
    """

    def command(self) -> list[str]:
        """
        Return Loki with its file and wide limits.
        """
        limits = [f"distributor.ingestion-{name}-mb=1000" for name in ("rate-limit", "burst-size")]
        limits += [f"ingester.per-stream-rate-limit{name}=1GB" for name in ("", "-burst")]
        return [*engines.Loki.command(self), *(f"-{limit}" for limit in limits)]


def loki(bench: Bench) -> None:
    """
    Loki, as the gateway sends to it.
    """
    bench.versions["loki"] = build.LOKI.version
    store = Loki(bench.host)
    with bench.engine("loki", store) as process:
        load = bench.load(f"{store.http}/otlp", "logs", "gzip", RECORD)
        measure(bench, process, load, "logs", RECORD, store=process)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


RUNS: dict[str, Callable[[Bench], None]] = {
    run.__name__: run for run in (agent, queue, gateway, router, sampler, kafka, jaeger, tempo, loki)
}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """
    Measure what was asked for and return the file's content.
    """
    started = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="tiers-"))
    bench = Bench(Machine(directory), options.seconds, options.slices, options.quick)
    os.sched_setaffinity(0, CORES[1])
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM")
    )  # The processes below must not be left behind.
    acceptor = subprocess.Popen([sys.executable, HERE / "otlp_acceptor.py"], stdout=subprocess.PIPE)
    try:
        assert acceptor.stdout is not None
        bench.acceptor = f"127.0.0.1:{int(acceptor.stdout.readline())}"
        for name in options.only:
            try:
                RUNS[name](bench)
            except (Unusable, build.StackError) as error:
                bench.left_out[name] = str(error)
                say(f"{name} left out: {error}")
    finally:
        bench.host.clean_up()
        acceptor.terminate()
        acceptor.wait()
        shutil.rmtree(directory, ignore_errors=True)
    return {
        "command": " ".join(["python benchmarks/tiers.py", *sys.argv[1:]]),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "seconds": round(time.monotonic() - started),
        "versions": bench.versions | {"python": platform.python_version()},
        "spans_per_trace": otlp_load.SPANS_PER_TRACE,
        "left_out": bench.left_out,
        "samples": bench.samples,
        "figures": bench.figures,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="CPU, memory, disk and wire per span of each tier.")
    parser.add_argument("--only", default=",".join(RUNS), help=f"comma list of {', '.join(RUNS)}; the rest is kept")
    parser.add_argument("--seconds", type=float, default=1.5, help="of sending in each slice")
    parser.add_argument("--slices", type=int, default=2, help="slices of each run, after a warm-up")
    parser.add_argument("--quick", action="store_true", help="agent and router for a moment, to see that it runs")
    parser.add_argument("--out", type=Path, help="where to write; default benchmarks/tiers.json, with --quick nowhere")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := [name for name in options.only if name not in RUNS]:
        parser.error(f"unknown tier {', '.join(unknown)}; there are {', '.join(RUNS)}")
    if not (0.1 <= options.seconds <= 60 and 1 <= options.slices <= 20):
        parser.error("--seconds is from 0.1 to 60, --slices from 1 to 20")
    if options.quick:
        options.only, options.seconds, options.slices = ["agent", "router"], 0.2, 1
    target = options.out or (None if options.quick else TARGET)
    if CORES[0] == CORES[1]:
        say("only one core: what is measured and its load share it, so take no rate from this run")
    result = run(options)
    if target is None:
        say(f"{len(result['samples'])} figures in {result['seconds']} s, written nowhere")
        return 0
    if set(options.only) != set(RUNS) and target.exists():
        result = merged(json.loads(target.read_text()), result, options.only)
    target.write_text(json.dumps(result, indent=1) + "\n")
    say(f"{len(result['samples'])} samples in {target}; left out: {', '.join(result['left_out']) or 'nothing'}")
    return 0


def merged(old: dict[str, Any], new: dict[str, Any], ran: list[str]) -> dict[str, Any]:
    """
    Return the new figures, and the old ones of what was not measured now.
    """
    if old["machine"] != new["machine"]:
        raise SystemExit(f"tiers: the other figures are of another machine ({old['machine']}); run it without --only")
    measured = {(sample["tier"], sample["signal"]) for sample in new["samples"]}
    kept = [sample for sample in old["samples"] if (sample["tier"], sample["signal"]) not in measured]
    left_out = {name: why for name, why in old["left_out"].items() if name not in ran} | new["left_out"]
    return new | {
        "versions": old["versions"] | new["versions"],
        "samples": kept + new["samples"],
        "figures": old["figures"] | new["figures"],
        "left_out": left_out,
    }


if __name__ == "__main__":
    raise SystemExit(main())
