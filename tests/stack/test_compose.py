"""
docker-compose.yml, read by the real Docker Compose: it is valid, it runs the tested configurations, and it gives nothing away.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.stack import build
from tests.stack.harness import CONFIGS, ROOT, SHOP

if TYPE_CHECKING:
    from pathlib import Path

COMPOSE = ROOT / "docker-compose.yml"
BROKEN = [
    pytest.param("restart: unless-stopped", "restarts: unless-stopped", id="unknown-key"),
    pytest.param("depends_on: [orders]", "depends_on: [order]", id="unknown-service"),
    pytest.param("<<: *shop", "<<: *store", id="unknown-anchor"),
    pytest.param("queue:/queue", "queues:/queue", id="unknown-volume"),
    pytest.param(":-4317}:4317", ":-4317}:many", id="port-that-is-no-number"),
]


def compose(path: Path, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """
    Run the real ``docker compose`` on one file, with no variable of the user's set.
    """
    command = [str(build.ensure(build.COMPOSE)), "--file", str(path), "--project-directory", str(ROOT), *arguments]
    environment = {"PATH": os.environ["PATH"], "HOME": str(directory), "DOCKER_CONFIG": str(directory)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def services(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """
    The services with every anchor and default resolved by Compose.
    """
    resolved = compose(COMPOSE, tmp_path, "config", "--format", "json")
    assert resolved.returncode == 0, resolved.stderr
    services: dict[str, dict[str, Any]] = json.loads(resolved.stdout)["services"]
    return services


def test_the_compose_file_is_valid(tmp_path: Path) -> None:
    """
    ``docker compose config -q`` accepts the file and has nothing to warn of.
    """
    answer = compose(COMPOSE, tmp_path, "config", "-q")
    assert (answer.returncode, answer.stderr) == (0, "")


@pytest.mark.parametrize(("good", "bad"), BROKEN)
def test_a_broken_compose_file_is_refused(good: str, bad: str, tmp_path: Path) -> None:
    """
    One wrong word is found, so acceptance means something.
    """
    shipped = COMPOSE.read_text()
    assert good in shipped
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(shipped.replace(good, bad, 1))
    assert compose(broken, tmp_path, "config", "-q").returncode != 0


def test_every_container_is_confined(services: dict[str, dict[str, Any]]) -> None:
    """
    Pinned image, read-only root, no capability, limits; only the one that hands over the volume is root, with CHOWN alone.
    """
    for name, service in services.items():
        image, _, tag = service["image"].rpartition(":")
        assert image, name
        assert re.fullmatch(r"\d+\.\d+\.\d+", tag) or (tag == "local" and service["build"]), name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}, name
    root = {name: service.get("cap_add") for name, service in services.items() if service["user"] != "10001:10001"}
    assert root == {"queue-owner": ["CHOWN"]}
    assert services["queue-owner"]["network_mode"] == "none"


def test_ports_are_published_on_loopback_only(services: dict[str, dict[str, Any]]) -> None:
    """
    Nothing listens on the laptop's network.
    """
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert published
    assert {port["host_ip"] for port in published} == {"127.0.0.1"}


@pytest.mark.parametrize(("name", "file"), [("collector", "local.yaml"), ("jaeger", "jaeger.yaml")])
def test_a_container_reads_the_tested_file(name: str, file: str, services: dict[str, dict[str, Any]]) -> None:
    """
    The mounted file is the shipped one, and each variable given to it is one that it reads.
    """
    service = services[name]
    (mount,) = (volume for volume in service["volumes"] if volume["type"] == "bind")
    assert (mount["source"], mount["read_only"]) == (str(CONFIGS / file), True)
    assert service["command"] == [f"--config={mount['target']}"]
    read = set(re.findall(r"\$\{env:(\w+):-", (CONFIGS / file).read_text()))
    assert set(service["environment"]) - {"GOMEMLIMIT"} <= read
    listening = {value for key, value in service["environment"].items() if value.startswith("0.0.0.0:")}
    assert {f"0.0.0.0:{port['target']}" for port in service["ports"]} <= listening


def test_no_container_probes_itself_with_what_it_has_not(services: dict[str, dict[str, Any]]) -> None:
    """
    The images without a shell have no health check of their own; one that has Python asks both where they listen.
    """
    checked = {name: service["healthcheck"]["test"] for name, service in services.items() if "healthcheck" in service}
    assert set(checked) == {"gateway", "orders", "inventory", "ready"}
    assert {tuple(test[:2]) for test in checked.values()} == {("CMD", "python")}
    for name, test in checked.items():
        compile(test[3], name, "exec")
    for name, variable in (("collector", "COLLECTOR_HEALTH_ENDPOINT"), ("jaeger", "JAEGER_HEALTH_ENDPOINT")):
        port = services[name]["environment"][variable].rpartition(":")[2]
        assert f"http://{name}:{port}/" in checked["ready"][3]


def test_each_shop_service_finds_the_next(services: dict[str, dict[str, Any]]) -> None:
    """
    What runs is a file of the shop, and the addresses that it is given are variables that it reads, of services that are there.
    """
    for name in ("gateway", "orders", "inventory"):
        service = services[name]
        assert service["command"] == [f"{name}:app"]
        source = (SHOP / f"{name}.py").read_text()
        given = {key: value for key, value in service["environment"].items() if key.endswith("_URL")}
        assert given.keys() == set(re.findall(r'environ.get\("(\w+_URL)"', source))
        assert all(services[value.removeprefix("http://").removesuffix(":8000")] for value in given.values())
