"""
Wrong values that OpenTelemetry's packages raise on: kept from them while they are read, and from nobody else (ADR 006).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.integration.services import BIN, DEADLINE_S, clean_environment

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT: Final = Path(__file__).parents[2]
PTH: Final = ROOT / "otel_correlation.pth"
INSTRUMENT: Final = str(BIN / "opentelemetry-instrument")
# As a Node service beside ours would have them: names and values that only its own OpenTelemetry knows.
WRONG: Final = {
    "OTEL_PROPAGATORS": "xray-lambda,tracecontext",
    "OTEL_EXPERIMENTAL_RESOURCE_DETECTORS": "gcp-node",
    "OTEL_SPAN_LINK_COUNT_LIMIT": "many",
    "OTEL_ATTRIBUTE_COUNT_LIMIT": "-1",
    "OTEL_LOGRECORD_ATTRIBUTE_COUNT_LIMIT": "many",
    "OTEL_TRACES_EXPORTER": "none",
}
SHOW: Final = "import json, os; print(json.dumps(dict(os.environ)))"
# A child of another language: it inherits the environment and is no instrumented Python.
CHILD: Final = f"""
import subprocess, sys
subprocess.run([sys.executable, "-I", "-S", "-c", {SHOW!r}], check=True)
"""


def run(command: Sequence[str | Path], **variables: str) -> subprocess.CompletedProcess[str]:
    """
    Run a program with a clean environment and these variables.
    """
    return subprocess.run(
        [str(part) for part in command],
        env=clean_environment(**variables),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def shown(ended: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """
    Return the environment that the child printed, without what opentelemetry-instrument itself puts there.
    """
    assert ended.returncode == 0, ended.stderr
    found: dict[str, str] = json.loads(next(line for line in ended.stdout.splitlines() if '"PATH"' in line))
    return {name: value for name, value in found.items() if name != "PYTHONPATH"}


WAYS: Final = {
    "opentelemetry-instrument": ([INSTRUMENT, sys.executable, "-c", CHILD], {}),
    "with metrics": ([INSTRUMENT, sys.executable, "-c", CHILD], {"OTEL_METRICS_EXPORTER": "otlp"}),
    "our own command's start": (
        [
            sys.executable,
            "-c",
            (
                "import os, sys\n"
                "from otel_correlation.cli.launch import instrumented\n"
                f"command = instrumented([sys.executable, '-c', {CHILD!r}])\n"
                "os.execv(command[0], command)"
            ),
        ],
        {},
    ),
    "bootstrap": ([sys.executable, "-c", f"import otel_correlation; otel_correlation.bootstrap()\n{CHILD}"], {}),
    "only imported": ([sys.executable, "-c", f"import otel_correlation.bootstrap\n{CHILD}"], {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_child_process_has_the_environment_as_the_user_set_it(way: str) -> None:
    """
    A process that an instrumented service starts inherits what the user set, wrong values included, and nothing else.
    """
    command, more = WAYS[way]
    variables = {
        **WRONG,
        **more,
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
        "OTEL_METRIC_EXPORT_TIMEOUT": "1",
    }
    ended = run(command, **variables)
    assert shown(ended) == {**clean_environment(**variables), **present_in_every_child()}
    assert "Traceback" not in ended.stderr


def present_in_every_child() -> dict[str, str]:
    """
    Return what Python or the platform adds to the environment of any child (LC_CTYPE, PEP 538).
    """
    plain = shown(run([sys.executable, "-c", CHILD]))
    return {name: value for name, value in plain.items() if name not in clean_environment()}


def test_a_service_reads_its_environment_as_the_user_set_it() -> None:
    """
    Code of an instrumented service finds the values in os.environ that the user set.
    """
    code = f"import os, json; print(json.dumps([os.environ.get(name) for name in {list(WRONG)!r}]))"
    ended = run([INSTRUMENT, sys.executable, "-c", code], **WRONG)
    assert json.loads(ended.stdout.splitlines()[0]) == list(WRONG.values()), ended.stderr


SPAWNS: Final = """
import multiprocessing, sys
{start}

def work():
    from opentelemetry import propagate
    print("fields", sorted(propagate.get_global_textmap().fields), flush=True)

if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target={target})
    child.start()
    child.join()
    sys.exit(child.exitcode)
"""
STARTS: Final = {
    "opentelemetry-instrument": ([INSTRUMENT, sys.executable], "", "work"),
    "carried": (
        [sys.executable],
        "import otel_correlation\nif __name__ == '__main__': otel_correlation.bootstrap()",
        "otel_correlation.carried(work)",
    ),
}


@pytest.mark.parametrize("start", STARTS)
def test_a_python_child_repairs_for_itself(start: str, tmp_path: Path) -> None:
    """
    A process that multiprocessing spawns meets the same wrong values, and starts as its parent did.
    """
    command, line, target = STARTS[start]
    (tmp_path / "main.py").write_text(SPAWNS.format(start=line, target=target))
    ended = run([*command, tmp_path / "main.py"], **WRONG)
    assert ended.returncode == 0, ended.stderr
    assert "'traceparent'" in ended.stdout
    assert "xray" not in ended.stdout
    assert "Traceback" not in ended.stderr


MODULES: Final = "import sys; print(*sorted(sys.modules))"


def test_other_programs_pay_for_nothing() -> None:
    """
    A Python program that nobody instruments imports what it imports without us, also where wrong values are set.

    What its start costs by the clock is in ADR 006.
    """
    plain = run([sys.executable, "-c", MODULES])
    told = run([sys.executable, "-c", MODULES], **WRONG)
    without_pth = run([sys.executable, "-S", "-c", MODULES])
    assert told.stdout == plain.stdout
    assert (told.stderr, plain.stderr) == ("", "")
    assert not [
        name for name in told.stdout.split() if name.startswith(("otel", "opentelemetry", "json", "importlib.m"))
    ]
    assert without_pth.returncode == 0


def test_the_line_acts_only_where_somebody_instruments(tmp_path: Path) -> None:
    """
    The file imports our package under opentelemetry-instrument with OTEL_PROPAGATORS set, and in no other process.
    """
    marked = tmp_path / "opentelemetry" / "instrumentation" / "auto_instrumentation"
    marked.mkdir(parents=True)
    script = tmp_path / "opentelemetry-instrument"
    script.write_text(MODULES)
    (tmp_path / "script.py").write_text(MODULES)
    cases: list[tuple[list[str | Path], dict[str, str], bool]] = [
        (["-c", MODULES], {"PYTHONPATH": str(marked), "OTEL_PROPAGATORS": "b3"}, True),
        ([script], {"OTEL_PROPAGATORS": "b3"}, True),
        (["-c", MODULES], {"PYTHONPATH": str(marked)}, False),
        ([script], {}, False),
        ([tmp_path / "script.py", "opentelemetry-instrument"], {"OTEL_PROPAGATORS": "b3"}, False),
        (["-c", MODULES], {"PYTHONPATH": str(tmp_path), "OTEL_PROPAGATORS": "b3"}, False),
    ]
    for arguments, variables, acts in cases:
        ended = run([sys.executable, *arguments], **variables)
        assert ("otel_correlation" in ended.stdout.split()) is acts, (arguments, variables, ended.stderr)
        assert ended.stderr == ""


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "a package that breaks"])
def test_a_package_that_is_gone_is_not_missed(left: str, tmp_path: Path) -> None:
    """
    Where the file is left behind without its package, or with a broken one, every Python starts without a word.
    """
    venv.create(tmp_path / "venv", with_pip=False, symlinks=os.name != "nt")
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    (site,) = (tmp_path / "venv").glob("**/site-packages")
    shutil.copy(PTH, site)
    if left != "nothing":
        (site / "otel_correlation").mkdir()
    if left == "a package that breaks":
        (site / "otel_correlation" / "__init__.py").write_text("raise RuntimeError('half removed')")
    instrumented = tmp_path / "gone" / "opentelemetry" / "instrumentation" / "auto_instrumentation"
    for path in ("", str(instrumented)):
        ended = run([python, "-c", "print('runs')"], **WRONG, PYTHONPATH=path)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "runs\n", "")
