"""
CPU time per request of one uvicorn worker, side by side: bare, stock OpenTelemetry, and ours.

    make bench
    python benchmarks/side_by_side.py --rounds 5 --requests 4000 --variants bare,stock,ours

What is measured and what is not stands in ``benchmarks/README.md``. Linux only: it reads another process's CPU clock.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime as dt
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import time
import urllib.request
import uuid
import venv
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

HERE = Path(__file__).parent
OUT = HERE / "out"
PATHS = {"hello": "/hello/world", "hop": "/hop"}
CONNECTIONS = 8
STOCK_DELAY = {"OTEL_BSP_SCHEDULE_DELAY": "500", "OTEL_BLRP_SCHEDULE_DELAY": "500"}


@dataclass(frozen=True)
class Variant:
    """
    One way to run the application.

    Attributes:
        title: What the table calls it.
        home: Which environment it runs in: ``bare``, ``stock`` (made under ``out/``) or ``ours`` (this interpreter's).
        instrumented: Whether ``opentelemetry-instrument`` starts it.
        env: Its settings.
    """

    title: str
    home: str
    instrumented: bool = True
    env: Mapping[str, str] = field(default_factory=dict)


VARIANTS: Mapping[str, Variant] = {
    "bare": Variant("bare app, plain log lines", "bare", instrumented=False),
    "stock": Variant("stock, as installed (traces, logs, metrics)", "stock", env=STOCK_DELAY),
    "stock-traces": Variant(
        "stock, traces only",
        "stock",
        env={**STOCK_DELAY, "OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"},
    ),
    "stock-traces-1pct": Variant(
        "stock, traces only, ratio 0.01",
        "stock",
        env={
            **STOCK_DELAY,
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_LOGS_EXPORTER": "none",
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": "0.01",
        },
    ),
    "ours": Variant("ours, default (every trace)", "ours"),
    "ours-1pct": Variant("ours, ratio 0.01", "ours", env={"OTEL_TRACES_SAMPLER_ARG": "0.01"}),
    "ours-logs": Variant("ours with OTLP logs, too", "ours", env={"OTEL_LOGS_EXPORTER": "otlp"}),
    "ours-none": Variant("ours, exporter none", "ours", env={"OTEL_TRACES_EXPORTER": "none"}),
    "ours-json": Variant("ours, its own JSON lines and summary line", "ours", env={"BENCH_LOGGING": "none"}),
}
DEFAULT = "bare,stock,stock-traces,stock-traces-1pct,ours,ours-1pct,ours-logs,ours-none,ours-json"


def scripts(home: str) -> Path:
    """
    Return the ``bin`` directory of a variant's environment, making the environment if it is not there yet.
    """
    if home == "ours":
        return Path(sysconfig.get_path("scripts"))
    root, wanted = OUT / f"venv-{home}", HERE / f"{home}.txt"
    constraints = OUT / "constraints.txt"
    # Telemetry packages are pinned by stock.txt; all else has the versions that ours runs with.
    pins = sorted(
        f"{dist.name}=={dist.version}"
        for dist in metadata.distributions()
        if not dist.name.startswith(("opentelemetry", "otel"))
    )
    state = wanted.read_text() + (HERE / "bare.txt").read_text() + "\n".join(pins)
    stamp = root / "installed.txt"
    if not stamp.is_file() or stamp.read_text() != state:
        print(f"installing {wanted.name} into {root.relative_to(HERE.parent)}", file=sys.stderr, flush=True)
        constraints.write_text("\n".join(pins))
        venv.create(root, with_pip=True, clear=True)
        command = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", wanted, "-c", constraints]
        subprocess.run([root / "bin" / "python", *command], check=True)
        stamp.write_text(state)
    return root / "bin"


def cores() -> tuple[set[int], set[int]]:
    """
    Return the worker's core and the load generator's; the same set twice where there is only one.
    """
    mine = sorted(os.sched_getaffinity(0))
    return ({mine[0]}, {mine[1]}) if len(mine) > 1 else (set(mine), set(mine))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Worker:
    """
    A running variant.
    """

    name: str
    process: subprocess.Popen[bytes]
    port: int

    def cpu_s(self) -> float:
        """
        Return the CPU seconds that the process has used so far, user and system, all its threads.
        """
        # clock_getcpuclockid(3) of a process, as the kernel encodes it.
        return time.clock_gettime(~self.process.pid << 3 | 2)

    def rss_mb(self) -> float:
        """
        Return the resident memory.
        """
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def settle(self) -> None:
        """
        Wait until what the requests left behind (batches to encode and send) is done.
        """
        deadline = time.monotonic() + 10
        time.sleep(0.6)  # longer than every variant's batch delay
        while time.monotonic() < deadline:
            before = self.cpu_s()
            time.sleep(0.2)
            if self.cpu_s() - before < 0.002:
                return


def start(name: str, peer: int, core: set[int]) -> Worker:
    """
    Start one variant and wait until it serves.
    """
    variant = VARIANTS[name]
    home = scripts(variant.home)
    port = free_port()
    command = [home / "uvicorn", "app:app", "--port", str(port), "--no-access-log", "--loop", "uvloop"]
    command += ["--http", "httptools"]
    if variant.instrumented:
        command = [home / "opentelemetry-instrument", *command]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "PYTHON", "BENCH_"))}
    env |= {
        "PATH": f"{home}{os.pathsep}{env.get('PATH', '')}",
        "BENCH_UPSTREAM": f"http://127.0.0.1:{peer}",
        "OTEL_SERVICE_NAME": "bench",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{peer}/{name}",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        **variant.env,
    }
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, core)  # the child inherits it, with every thread that it starts
    with (OUT / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=HERE,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
    os.sched_setaffinity(0, mine)
    worker = Worker(name, process, port)
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{PATHS['hello']}", timeout=5) as response:
                response.read()
            return worker
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise SystemExit(f"{name} did not start; see {OUT / f'{name}.log'}") from None
            time.sleep(0.05)


class Load:
    """
    Sends ``left`` requests over keep-alive connections, one at a time on each, and counts the answers.
    """

    def __init__(self, request: Callable[[], bytes], left: int) -> None:
        self.request = request
        self.left = left
        self.open = 0
        self.good = 0
        self.bad = 0
        self.done = asyncio.get_running_loop().create_future()


class Connection(asyncio.Protocol):
    """
    One connection of a load.
    """

    def __init__(self, load: Load) -> None:
        self.load = load
        self.buffer = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.load.open += 1
        self.send()

    def send(self) -> None:
        load = self.load
        if load.left > 0:
            load.left -= 1
            self.transport.write(load.request())
        else:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head = self.buffer.find(b"\r\n\r\n")
        if head < 0:
            return
        at = self.buffer.find(b"content-length: ") + 16
        size = int(self.buffer[at : self.buffer.index(b"\r", at)])
        if len(self.buffer) < head + 4 + size:
            return
        if self.buffer.startswith(b"HTTP/1.1 200"):
            self.load.good += 1
        else:
            self.load.bad += 1
        self.buffer = b""
        self.send()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self.load.open -= 1
        if self.load.open == 0 and not self.load.done.done():
            self.load.done.set_result(None)


def request_for(path: str, ids: str) -> Callable[[], bytes]:
    """
    Return a function that makes the next request's bytes.
    """
    head = (
        f"GET {path} HTTP/1.1\r\nhost: shop.example\r\nuser-agent: side-by-side/1\r\naccept: */*\r\n"
        "accept-encoding: gzip, deflate\r\n"
    ).encode()
    if ids == "uuid":
        return lambda: b"%bx-request-id: %b\r\n\r\n" % (head, str(uuid.uuid4()).encode())
    if ids == "traceparent":
        return lambda: b"%btraceparent: 00-%b-00f067aa0ba902b7-01\r\n\r\n" % (head, uuid.uuid4().hex.encode())
    fixed = head + b"\r\n"
    return lambda: fixed


async def send(port: int, path: str, amount: int, ids: str) -> None:
    """
    Send ``amount`` requests and wait for every answer.
    """
    loop = asyncio.get_running_loop()
    load = Load(request_for(path, ids), amount)
    await asyncio.gather(
        *(loop.create_connection(lambda: Connection(load), "127.0.0.1", port) for _ in range(CONNECTIONS))
    )
    await asyncio.wait_for(load.done, 300)
    if load.good != amount:
        raise SystemExit(
            f"{load.bad} of {amount} requests to {path} failed, {amount - load.good - load.bad} got no answer"
        )


@contextlib.contextmanager
def stopping(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """
    End every process at the end, whatever happens.
    """
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def stats(peer: int) -> dict[str, dict[str, int]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{peer}/stats", timeout=10) as response:
        found: dict[str, dict[str, int]] = json.load(response)
    return found


def versions(home: Path) -> dict[str, str]:
    """
    Return the versions of what matters in an environment.
    """
    names = ["fastapi", "starlette", "uvicorn", "uvloop", "httptools", "httpx", "sniffio", "opentelemetry-sdk"]
    names += ["opentelemetry-instrumentation-fastapi", "opentelemetry-distro", "otel-correlation"]
    code = (
        "import json,sys\nfrom importlib.metadata import version, PackageNotFoundError\nfound={}\n"
        "for name in sys.argv[1:]:\n  try: found[name]=version(name)\n  except PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([home / "python", "-c", code, *names], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def machine() -> str:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """
    Run every round and return what was measured.
    """
    names: list[str] = options.variants.split(",")
    worker_core, load_core = cores()
    if worker_core == load_core:
        print("only one core: worker and load generator share it, so take no figure from this run", file=sys.stderr)
    for name in names:
        scripts(VARIANTS[name].home)
    os.sched_setaffinity(0, load_core)
    samples: dict[str, dict[str, list[float]]] = {path: {name: [] for name in names} for path in options.workloads}
    received: dict[str, dict[str, list[dict[str, float]]]] = {
        path: {name: [] for name in names} for path in options.workloads
    }
    peer_process = subprocess.Popen([sys.executable, HERE / "peer.py"], stdout=subprocess.PIPE)
    processes = [peer_process]
    with stopping(processes):
        assert peer_process.stdout is not None
        peer = int(peer_process.stdout.readline())
        workers: list[Worker] = []
        for name in names:
            workers.append(start(name, peer, worker_core))
            processes.insert(-1, workers[-1].process)
        for worker in workers:
            for path in options.workloads:
                asyncio.run(send(worker.port, PATHS[path], options.warm_up, options.ids))
            worker.settle()
        for round_number in range(options.rounds):
            for path in options.workloads:
                amount = options.requests if path == "hello" else options.requests // 2
                # Every second round backwards, so that no variant always follows the same one.
                for worker in workers if round_number % 2 == 0 else reversed(workers):
                    before, seen = worker.cpu_s(), stats(peer).get(worker.name, {})
                    asyncio.run(send(worker.port, PATHS[path], amount, options.ids))
                    worker.settle()
                    used, now = worker.cpu_s() - before, stats(peer).get(worker.name, {})
                    samples[path][worker.name].append(used / amount * 1e6)
                    received[path][worker.name].append(
                        {kind: (now.get(kind, 0) - seen.get(kind, 0)) / amount for kind in ("spans", "logs")}
                    )
            print(f"round {round_number + 1} of {options.rounds}", file=sys.stderr, flush=True)
        rss = {worker.name: worker.rss_mb() for worker in workers}
    return {
        "command": "python benchmarks/side_by_side.py " + " ".join(sys.argv[1:]),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
        "ids": options.ids,
        "requests": options.requests,
        "versions": {home: versions(scripts(home)) for home in sorted({VARIANTS[name].home for name in names})},
        "rss_mb": rss,
        "cpu_us": samples,
        "received_per_request": received,
    }


def table(result: Mapping[str, Any], path: str) -> str:
    """
    Return one workload as a Markdown table.
    """
    samples: dict[str, list[float]] = result["cpu_us"][path]
    base = samples.get("bare")
    lines = [
        f"`{PATHS[path]}` | CPU us per request, median | min - max | x bare | over bare | spans, logs sent | RSS MB",
        "--- | ---: | ---: | ---: | ---: | ---: | ---:",
    ]
    for name, values in samples.items():
        median = statistics.median(values)
        # Each round against the bare figure of the same round: what else runs on the machine slows both.
        ratio = f"{statistics.median(v / b for v, b in zip(values, base, strict=True)):.2f}" if base else ""
        over = f"{statistics.median(v - b for v, b in zip(values, base, strict=True)):.0f}" if base else ""
        seen = result["received_per_request"][path][name]
        spans, logs = (statistics.median(entry[kind] for entry in seen) for kind in ("spans", "logs"))
        lines.append(
            f"{VARIANTS[name].title} | {median:.0f} | {min(values):.0f} - {max(values):.0f} | {ratio} | {over} | "
            f"{spans:.2f}, {logs:.2f} | {result['rss_mb'][name]:.0f}"
        )
    return "\n".join(f"| {line} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="CPU per request, side by side.", epilog=f"variants: {', '.join(VARIANTS)}"
    )
    parser.add_argument("--requests", type=int, default=4000, help="requests a round of /hello; half as many of /hop")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1000, help="requests of each workload before the first round")
    parser.add_argument("--variants", default=DEFAULT, help=f"comma list; default {DEFAULT}")
    parser.add_argument("--workloads", default="hello,hop", help="comma list of hello, hop")
    parser.add_argument("--ids", choices=("none", "uuid", "traceparent"), default="none", help="what callers send")
    options = parser.parse_args()
    options.workloads = options.workloads.split(",")
    if unknown := [name for name in options.variants.split(",") if name not in VARIANTS]:
        parser.error(f"unknown variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    if unknown := [name for name in options.workloads if name not in PATHS]:
        parser.error(f"unknown workload {', '.join(unknown)}; there are {', '.join(PATHS)}")
    OUT.mkdir(exist_ok=True)
    result = run(options)
    for path in options.workloads:
        print(table(result, path), end="\n\n")
    target = OUT / f"side_by_side-{result['date'].replace(':', '').replace('+0000', 'Z')}.json"
    target.write_text(json.dumps(result, indent=1))
    print(f"{result['machine']}; Python {result['python']}; {result['date']}; details in {target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
