"""
CPU time from the start of a process to its first answer, side by side: bare, stock OpenTelemetry, and ours.

    python benchmarks/start_up.py
    python benchmarks/start_up.py --rounds 20 --variants bare,ours,ours-logs --other ../another-checkout/.venv/bin

What is measured stands in ``benchmarks/README.md``. Linux only: it reads another process's CPU clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import side_by_side as bench

APPLICATION = """
from fastapi import FastAPI

app = FastAPI()


@app.get("/hello/{name}")
def hello(name: str) -> dict[str, str]:
    return {"hello": name}
"""


def first_answer_s(name: str, home: Path, endpoint: str, *, as_worker: bool) -> float:
    """
    Start one variant; return the CPU seconds that its process had used when its first answer was there.
    """
    variant = bench.VARIANTS[name]
    port = bench.free_port()
    command = [home / "uvicorn", "start_up_app:app", "--port", str(port), "--log-level", "warning"]
    if variant.instrumented and not as_worker:
        command = [home / "opentelemetry-instrument", *command]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "PYTHON", "BENCH_"))}
    env |= {
        "PATH": f"{home}{os.pathsep}{env.get('PATH', '')}",
        "OTEL_SERVICE_NAME": "bench",
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        **variant.env,
    }
    if variant.instrumented and as_worker:
        # What opentelemetry-instrument leaves to the processes that its program starts.
        (found,) = home.parent.glob("lib/python*/site-packages/opentelemetry/instrumentation/auto_instrumentation")
        env["PYTHONPATH"] = str(found)
    process = subprocess.Popen(command, cwd=bench.OUT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    worker = bench.Worker(name, process, port)
    with bench.stopping([process]):
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/hello/world", timeout=5) as response:
                    response.read()
                return worker.cpu_s()
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{name} did not start") from None
                time.sleep(0.01)


def main() -> None:
    """
    Start every variant in turn, round by round, and print the table.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--variants", default="bare,stock,stock-traces,ours,ours-logs,ours-none")
    parser.add_argument("--other", type=Path, help="the bin directory of another environment: ours as it is there")
    parser.add_argument("--as-worker", action="store_true", help="as uvicorn --workers starts them: no launcher")
    options = parser.parse_args()
    bench.OUT.mkdir(exist_ok=True)
    names = options.variants.split(",")
    runs = {name: (name, bench.scripts(bench.VARIANTS[name].home)) for name in names}
    if options.other:
        runs["other"] = ("ours", options.other.resolve())
    (bench.OUT / "start_up_app.py").write_text(APPLICATION)
    peer = subprocess.Popen([sys.executable, bench.HERE / "peer.py"], stdout=subprocess.PIPE)
    assert peer.stdout is not None
    peer_port = int(peer.stdout.readline())
    found: dict[str, list[float]] = {title: [] for title in runs}
    with bench.stopping([peer]):
        for number in range(-1, options.rounds):
            order = list(runs.items())
            for title, (name, home) in order if number % 2 else reversed(order):
                cpu_s = first_answer_s(name, home, f"http://127.0.0.1:{peer_port}/{title}", as_worker=options.as_worker)
                if number >= 0:  # the round before the first writes bytecode
                    found[title].append(cpu_s)
    print("| variant | CPU to the first answer, ms | min - max | x bare | over bare, ms |\n|---|---|---|---|---|")
    for title, seconds in found.items():
        over = [one - other for one, other in zip(seconds, found.get("bare", seconds), strict=True)]
        ratio = [one / other for one, other in zip(seconds, found.get("bare", seconds), strict=True)]
        spread = f"{min(seconds) * 1000:.0f} - {max(seconds) * 1000:.0f}"
        middle = f"{statistics.median(ratio):.2f} | {statistics.median(over) * 1000:.0f}"
        print(f"| {title} | {statistics.median(seconds) * 1000:.0f} | {spread} | {middle} |")


if __name__ == "__main__":
    main()
