"""
Every shipped configuration is accepted by the program that reads it, which refuses a broken one; and all keep the same rules.
"""

from __future__ import annotations

import os
import re
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.stack import build
from tests.stack.harness import CONFIGS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.needs()  # And each case the program that its file is for.
COLLECTORS = ("agent", "gateway", "kafka-router", "kafka-sampler", "local", "router", "sampler")
# An overlay is a file that is given after others: which ones.
OVERLAYS: list[tuple[str, ...]] = [
    ("agent", "tls-agent"),
    ("gateway", "tls-receiver"),
    ("gateway", "tls-outside"),
    ("gateway", "tls-receiver", "tls-outside"),
    ("router", "tls-receiver", "tls-router"),
    ("kafka-router", "tls-receiver", "tls-outside"),
    ("sampler", "tls-receiver"),
    ("jaeger", "jaeger-badger"),
]
ALONE: list[tuple[str, ...]] = [(name,) for name in (*COLLECTORS, "jaeger", "loki", "tempo")]


def case(names: tuple[str, ...]) -> Any:
    """
    Return the parameter of one file, or of one with overlays, marked with the part that reads it.
    """
    return pytest.param(names, marks=needs(names[0]), id="+".join(names))


def needs(name: str) -> pytest.MarkDecorator:
    """
    Return the mark of what has the program for a file.
    """
    parts = {"jaeger": "jaeger", "loki": "loki", "tempo": "tempo", "kafka-sampler": "kafka"}
    return pytest.mark.needs(parts.get(name, "collector"))


# One wrong word each, and the file that it is in.
BROKEN = [
    pytest.param("local", "max_elapsed_time: 0", "max_elapsed_times: 0", id="unknown-key", marks=needs("local")),
    pytest.param(
        "local",
        "[memory_limiter, transform/lend",
        "[memory_limit, transform/lend",
        id="unknown-processor",
        marks=needs("local"),
    ),
    pytest.param(
        "local", "check_interval: 1s", "check_interval: 0s", id="limiter-that-never-checks", marks=needs("local")
    ),
    pytest.param(
        "local", "span.status.message)", "span.status.mesage)", id="statement-with-a-typing-error", marks=needs("local")
    ),
    pytest.param("local", "_MEMORY_MIB:-400}", "_MEMORY_MIB:-many}", id="size-that-is-no-number", marks=needs("local")),
    pytest.param(
        "gateway",
        "boolean_attribute: {key:",
        "boolean_attribute: {keys:",
        id="unknown-key-of-a-policy",
        marks=needs("gateway"),
    ),
    pytest.param(
        "router",
        "routing_key: traceID",
        "routing_keys: traceID",
        id="unknown-key-of-the-balancer",
        marks=needs("router"),
    ),
    pytest.param("jaeger", "max_traces:", "max_trace:", id="unknown-key-of-jaeger", marks=needs("jaeger")),
    pytest.param("loki", "replication_factor:", "replication_factors:", id="unknown-key-of-loki", marks=needs("loki")),
    pytest.param("tempo", "usage_report:", "usage_reports:", id="unknown-key-of-tempo", marks=needs("tempo")),
]


def validate(paths: list[Path], directory: Path) -> subprocess.CompletedProcess[str]:
    """
    Let the program that the files are for say whether it would run with them, with nothing in the environment but a token.
    """
    name = paths[0].stem
    if name == "loki":
        command = [
            str(build.ensure(build.LOKI)),
            "-verify-config",
            "-config.expand-env=true",
            f"-config.file={paths[0]}",
        ]
    elif name == "tempo":
        command = [
            os.environ["TEMPO_BIN"],
            "-config.verify=true",
            "-config.expand-env=true",
            f"-config.file={paths[0]}",
        ]
    else:
        tools = {"jaeger": build.JAEGER, "kafka-sampler": build.KAFKA_COLLECTOR}
        tool = str(build.ensure(tools.get(name, build.COLLECTOR)))
        gates = re.findall(r"^# .*(--feature-gates=[+\w.,-]*\w)", paths[0].read_text(), re.MULTILINE)
        command = [tool, "validate", *gates, *(f"--config={path}" for path in paths)]
    environment = {"PATH": os.environ["PATH"], "COLLECTOR_TOKEN": "token"}
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_no_file_is_left_out() -> None:
    """
    Whatever is added to collector/ is validated here, alone or as an overlay.
    """
    known = {name for names in (*ALONE, *OVERLAYS) for name in names}
    assert known == {path.stem for path in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize("names", [case(names) for names in ALONE + OVERLAYS])
def test_a_shipped_configuration_is_valid(names: tuple[str, ...], tmp_path: Path) -> None:
    """
    Each file in collector/ is accepted with its own defaults, no variable set; each overlay after each file that it is for.
    """
    answer = validate([CONFIGS / f"{name}.yaml" for name in names], tmp_path)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize(("name", "good", "bad"), BROKEN)
def test_a_broken_configuration_is_refused(name: str, good: str, bad: str, tmp_path: Path) -> None:
    """
    One wrong word is found, so acceptance means something.
    """
    shipped = (CONFIGS / f"{name}.yaml").read_text()
    assert good in shipped
    broken = tmp_path / f"{name}.yaml"
    broken.write_text(shipped.replace(good, bad))
    assert validate([broken], tmp_path).returncode != 0


def parsed(name: str) -> dict[str, Any]:
    """
    Return what a shipped file says, with the defaults of its variables taken off: they are what differs by intention.
    """
    text = re.sub(r"(\$\{env:\w+):-(?:[^{}])*\}", r"\1}", (CONFIGS / f"{name}.yaml").read_text())
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def components(name: str) -> Iterator[tuple[str, Any]]:
    """
    Return the file's extensions, receivers, processors, connectors and exporters, each under its whole name.
    """
    content = parsed(name)
    for section in ("extensions", "receivers", "processors", "connectors", "exporters"):
        for component, settings in content.get(section, {}).items():
            yield f"{section}::{component}", settings


# Behind tail sampling nobody can be refused any more, so queues wait there.
DIFFERENT = {("exporters::otlp_grpc/jaeger", "local")}


def test_the_same_name_means_the_same_in_every_file() -> None:
    """
    Redaction, limiter, queues, sampling and the rest are one text in all tiers: YAML has no include, so this test is it.
    """
    seen: dict[str, tuple[str, Any]] = {}
    for name in COLLECTORS:
        for component, settings in components(name):
            if (component, name) not in DIFFERENT:
                first, expected = seen.setdefault(component, (name, settings))
                assert settings == expected, f"{component} differs between {first}.yaml and {name}.yaml"


@pytest.mark.parametrize("name", COLLECTORS)
def test_memory_is_limited_first_and_nothing_is_batched_before_a_queue(name: str) -> None:
    """
    Whatever comes from outside passes the memory limiter first; no `batch`.
    """
    content = parsed(name)
    for pipeline, parts in content["service"]["pipelines"].items():
        inside = set(parts["receivers"]) <= set(content.get("connectors", {}))
        processors = parts.get("processors", [])
        assert "batch" not in processors
        if not inside:
            assert processors[0] == "memory_limiter", pipeline


@pytest.mark.parametrize("signal", ["traces", "logs", "metrics"])
@pytest.mark.parametrize("path", ["agent gateway", "agent router sampler", "agent kafka-router kafka-sampler"])
def test_every_path_redacts_twice(path: str, signal: str) -> None:
    """
    By the agent, before anything is on a disk, and once more before a store or Kafka; a third pass would only cost.
    """
    pipelines = [parsed(name)["service"]["pipelines"].get(signal, {}) for name in path.split()]
    passes = ["redaction" in pipeline.get("processors", []) for pipeline in pipelines]
    assert passes[0]
    assert sum(passes) == 2


@pytest.mark.parametrize("name", COLLECTORS)
def test_what_is_acknowledged_waits_on_disk_without_end(name: str) -> None:
    """
    Spans and records wait in a bounded queue on disk and are tried for ever; only metrics, which the next point replaces, do not.
    """
    for component, settings in components(name):
        if component.split("::")[1].split("/")[0] in ("otlp_grpc", "otlp_http", "load_balancing", "kafka") and (
            component.startswith("exporters") and component != "exporters::otlp_grpc/metrics"
        ):
            assert settings["retry_on_failure"]["max_elapsed_time"] == 0, component
            queue = settings["sending_queue"]
            assert (queue["storage"], queue["sizer"]) == ("file_storage", "items"), component
            assert queue["queue_size"] == "${env:COLLECTOR_QUEUE_ITEMS}", component


@pytest.mark.parametrize("name", COLLECTORS)
def test_what_one_machine_cannot_show_is_configured(name: str) -> None:
    """
    A power cut, a second broker, a kill in the one moment: what an answer promises beyond what a killed process can prove.
    """
    found = dict(components(name))
    assert found["extensions::file_storage"]["fsync"] is True
    # Whoever decides about traces has them whole, blocks instead of forgetting, and so do the queues behind.
    if decides := found.get("processors::tail_sampling"):
        assert decides["block_on_overflow"] is True
        for store in ("jaeger", "tempo"):
            assert found[f"exporters::otlp_grpc/{store}"]["sending_queue"]["block_on_overflow"] is True
            assert found[f"exporters::otlp_grpc/{store}"]["timeout"] == "30s"
    if balancer := found.get("exporters::load_balancing"):
        assert (balancer["routing_key"], balancer["timeout"]) == ("traceID", "1m")
        assert balancer["retry_on_failure"]["enabled"] is True
        assert balancer["protocol"]["otlp"]["retry_on_failure"]["max_elapsed_time"] == 0
        assert balancer["protocol"]["otlp"]["sending_queue"] == {"enabled": False}
    if kafka := found.get("exporters::kafka"):
        assert kafka["partition_traces_by_id"] is True
        assert kafka["producer"]["required_acks"] == -1
    if reads := found.get("receivers::kafka"):
        assert reads["message_marking"] == {"after": True, "on_error": False}
        assert reads["initial_offset"] == "earliest"


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.glob("*.yaml"))])
def test_every_variable_is_listed_at_the_top(name: str) -> None:
    """
    The comment at the top of a file names each variable that it reads, with its default.
    """
    text = (CONFIGS / f"{name}.yaml").read_text()
    listed = dict(re.findall(r"^#   ([A-Z_]+) +(\S+)", text, re.MULTILINE))
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    read = dict.fromkeys(re.findall(r"\$\{(?:env:)?([A-Z_]+)", body))
    if name != "tls-router":  # The same three files as in the overlay that it stands beside.
        assert sorted(listed) == sorted(read)
    for variable, default in re.findall(r"\$\{(?:env:)?([A-Z_]+):-([^{}\s]+)\}", body):
        if variable in listed:
            assert listed[variable].lstrip("/") == default
