"""
A tier that is configured wrongly says what is wrong and does not run: nothing half-starts.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.stack.engines import Tier
from tests.stack.harness import CONFIGS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.stack.harness import Machine

pytestmark = pytest.mark.needs("collector")

MISSING = "open /+nowhere/[a-z.]+: no such file or directory"

# Which file, which variable is set to what, and what the collector's own last lines say about it.
WRONG = [
    pytest.param("agent", {"COLLECTOR_GRPC_ENDPOINT": "nonsense"}, "address nonsense: missing port", id="no-port"),
    pytest.param("agent", {"COLLECTOR_GRPC_ENDPOINT": "127.0.0.1:99999"}, "99999: invalid port", id="impossible-port"),
    pytest.param("agent", {"COLLECTOR_HTTP_ENDPOINT": "192.0.2.1:4318"}, "listen tcp 192.0.2.1:4318", id="not-my-host"),
    pytest.param(
        "agent", {"NEXT_OTLP_ENDPOINT": ""}, 'exporters::otlp_grpc/next: .*non-empty "endpoint"', id="nowhere"
    ),
    pytest.param("agent", {"NEXT_OTLP_ENDPOINT": "gateway"}, "address gateway: missing port", id="next-without-port"),
    pytest.param("agent", {"COLLECTOR_QUEUE_ITEMS": "many"}, "queue_size.*got unconvertible", id="items-no-number"),
    pytest.param("agent", {"COLLECTOR_QUEUE_ITEMS": "0"}, "`queue_size` must be positive", id="no-queue"),
    pytest.param("agent", {"COLLECTOR_QUEUE_ITEMS": "500"}, "next::sending_queue: `min_size` must be less", id="tiny"),
    pytest.param("agent", {"COLLECTOR_MEMORY_MIB": "400MiB"}, "limit_mib.*got unconvertible", id="memory-with-unit"),
    pytest.param(
        "agent", {"COLLECTOR_METRICS_PORT": "http"}, "prometheus.port.*got unconvertible", id="port-no-number"
    ),
    pytest.param("agent", {"COLLECTOR_METRICS_LEVEL": "loud"}, 'unknown metrics level "loud"', id="unknown-level"),
    pytest.param(
        "gateway", {"TRACES_EXPORTERS": "[otlp_grpc/jeager]"}, '"otlp_grpc/jeager".*not configured', id="store"
    ),
    pytest.param("gateway", {"TRACES_EXPORTERS": "otlp_grpc/jaeger"}, "exporters.*must be an array", id="no-list"),
    pytest.param("gateway", {"TRACES_EXPORTERS": "[]"}, "at least one exporter", id="no-store"),
    pytest.param("gateway", {"COLLECTOR_LOGS_EXPORTER": "loki"}, 'exporter "loki".*not configured', id="log-store"),
    pytest.param("gateway", {"SAMPLER_DECISION_WAIT": "soon"}, "decision_wait.*invalid duration", id="no-duration"),
    pytest.param("gateway", {"SAMPLER_RATIO": "half"}, "transform/threshold.*half", id="ratio-no-number"),
    pytest.param("router", {"ROUTER_SAMPLERS": ""}, "no endpoints specified", id="no-samplers"),
    pytest.param("agent tls-agent", {"COLLECTOR_TLS_CA": "/nowhere/ca.crt"}, MISSING, id="authority"),
    pytest.param("gateway tls-receiver", {"COLLECTOR_TLS_CERT": "/nowhere/tls.crt"}, MISSING, id="certificate"),
    pytest.param("gateway tls-receiver", {"COLLECTOR_TLS_CERT": ""}, "read /: is a directory", id="no-certificate"),
    pytest.param("gateway tls-outside", {}, "bearertokenauth: no bearer token", id="no-token"),
    pytest.param("gateway tls-outside", {"COLLECTOR_TOKEN_FILE": "/nowhere/token"}, MISSING, id="no-token-file"),
]


def refusal(machine: Machine, tier: Tier) -> str:
    """
    Return what a collector printed that must end by itself, with an error and without having said that it is ready.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "COLLECTOR_"))}
    ended = subprocess.run(
        tier.command(),
        cwd=machine.directory,
        env=environment | tier.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode == 1, said
    assert "Everything is ready" not in said
    return said[said.index("Error: ") :]


@pytest.mark.parametrize(("files", "environment", "says"), WRONG)
def test_a_wrong_value_stops_the_collector(
    machine: Machine, files: str, environment: dict[str, str], says: str
) -> None:
    """
    The collector ends with status 1, and its error names the value, the key or the file that is wrong.
    """
    file, *overlays = files.split()
    tier = Tier(machine, file, environment, overlays=overlays)
    assert re.search(says, refusal(machine, tier), re.DOTALL)


def test_a_port_in_use_is_named(machine: Machine) -> None:
    """
    A second collector on the port of another one says which port, and lets go of the port that it had opened before.
    """
    tier = Tier(machine, "agent")
    host, _, port = tier.http.rpartition(":")
    with socket.create_server((host, int(port))):
        assert f"listen tcp {tier.http}: bind: address already in use" in refusal(machine, tier)
    socket.create_server((host, int(tier.grpc.rpartition(":")[2]))).close()


def test_a_queue_that_cannot_be_written_is_named(machine: Machine) -> None:
    """
    A directory that is not one, and a disk that takes nothing, stop the collector before it accepts anything.
    """
    in_the_way = machine.directory / "file"
    in_the_way.touch()
    tier = Tier(machine, "agent", {"COLLECTOR_QUEUE_DIR": str(in_the_way / "queue")})
    assert f"stat {in_the_way}/queue: not a directory" in refusal(machine, tier)
    tier = Tier(machine, "agent", {"COLLECTOR_QUEUE_DIR": "/proc/self"}, name="read-only")
    assert "open /proc/self" in refusal(machine, tier)


def test_two_collectors_do_not_share_a_queue(machine: Machine) -> None:
    """
    A second collector on the same directory gives up after ten seconds instead of hanging; the first one runs on.
    """
    first = Tier(machine, "agent")
    first.start()
    second = Tier(machine, "agent", {"COLLECTOR_QUEUE_DIR": str(first.directory)}, name="second")
    assert 'failed to start "otlp_grpc/' in refusal(machine, second)
    assert first.healthy()


def test_an_unknown_key_is_named(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A key with a typing error is refused by name; the collector says in which component, though not in which file.
    """
    shutil.copytree(CONFIGS, tmp_path / "collector")
    broken = tmp_path / "collector" / "agent.yaml"
    broken.write_text(broken.read_text().replace("max_interval", "max_intervall"))
    monkeypatch.setattr("tests.stack.engines.CONFIGS", tmp_path / "collector")
    said = refusal(machine, Tier(machine, "agent"))
    assert '"otlp_grpc/next"' in said
    assert "'retry_on_failure' has invalid keys: max_intervall" in said
