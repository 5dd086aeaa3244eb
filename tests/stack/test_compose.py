"""
docker-compose.yml, read by the real Docker Compose: each size is valid, runs the tested configurations, and gives nothing away.

No container is started: what an image does with its arguments is not tested here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.stack import build, kafka
from tests.stack.harness import CONFIGS, ROOT, SHOP

pytestmark = pytest.mark.needs("compose")

COMPOSE: Final = ROOT / "docker-compose.yml"
Services = dict[str, dict[str, Any]]

SHOPS: Final = {"gateway", "orders", "inventory"}
ALWAYS: Final = SHOPS | {"agent", "jaeger", "volume-owner"}
STORES: Final = {"tempo", "loki", "grafana"}
SIZES: Final = {
    "jaeger": ALWAYS | {"small-gateway", "small-ready"},
    "full": ALWAYS | STORES | {"full-gateway", "prometheus", "full-ready"},
    "scale": ALWAYS
    | STORES
    | {"router", "sampler-1", "sampler-2", "kafka", "kafka-topic", "prometheus-scale", "scale-ready"},
}
COLLECTORS: Final = {
    "agent": "agent.yaml",
    "small-gateway": "gateway.yaml",
    "full-gateway": "gateway.yaml",
    "router": "kafka-router.yaml",
    "sampler-1": "kafka-sampler.yaml",
    "sampler-2": "kafka-sampler.yaml",
    "jaeger": "jaeger.yaml",
    "tempo": "tempo.yaml",
    "loki": "loki.yaml",
}
# Where each of the images without a shell says that it is ready.
HEALTH: Final = {
    "jaeger": (13133, "/status"),
    "tempo": (3200, "/ready"),
    "loki": (3100, "/ready"),
    "prometheus": (9090, "/-/ready"),
    "prometheus-scale": (9090, "/-/ready"),
    "grafana": (3000, "/api/health"),
}
BROKEN = [
    pytest.param("restart: unless-stopped", "restarts: unless-stopped", id="unknown-key"),
    pytest.param("depends_on: [orders]", "depends_on: [order]", id="unknown-service"),
    pytest.param("<<: *shop", "<<: *store", id="unknown-anchor"),
    pytest.param("agent-queue:/volumes", "agents-queue:/volumes", id="unknown-volume"),
    pytest.param(":-4317}:4317", ":-4317}:many", id="port-that-is-no-number"),
    pytest.param("depends_on: [agent, small-gateway, jaeger]", "depends_on: [loki]", id="service-of-another-size"),
]


def compose(path: Path, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """
    Run the real ``docker compose`` on one file, with no variable of the user's set.
    """
    command = [str(build.ensure(build.COMPOSE)), "--file", str(path), "--project-directory", str(ROOT), *arguments]
    environment = {"PATH": os.environ["PATH"], "HOME": str(directory), "DOCKER_CONFIG": str(directory)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def resolve(directory: Path, *arguments: str) -> Services:
    """
    Return the services of one size with every anchor and default resolved by Compose.
    """
    resolved = compose(COMPOSE, directory, *arguments, "config", "--format", "json")
    assert (resolved.returncode, resolved.stderr) == (0, "")
    services: Services = json.loads(resolved.stdout)["services"]
    return services


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Services:
    """
    The services of all sizes.
    """
    return resolve(tmp_path_factory.mktemp("compose"), "--profile", "*")


@pytest.fixture(params=SIZES)
def services(request: pytest.FixtureRequest, tmp_path: Path) -> Services:
    """
    The services of one size after the other.
    """
    return resolve(tmp_path, "--profile", request.param)


@pytest.mark.parametrize("size", SIZES)
def test_each_size_is_valid_and_holds_what_it_says(size: str, tmp_path: Path) -> None:
    """
    ``docker compose --profile SIZE config`` has nothing to warn of; one agent, one next tier.
    """
    assert set(resolve(tmp_path, "--profile", size)) == SIZES[size]


def test_without_a_word_it_is_one_agent_one_gateway_and_jaeger(tmp_path: Path) -> None:
    """
    ``docker compose up`` starts the smallest size.
    """
    assert set(resolve(tmp_path)) == SIZES["jaeger"]


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


def test_every_container_is_confined(everything: Services) -> None:
    """
    Pinned image, read-only root, no capability, limits; only the one that hands over the volumes is root, with CHOWN alone.
    """
    for name, service in everything.items():
        assert "build" in service or re.fullmatch(r".+:v?\d+\.\d+\.\d+(@sha256:[0-9a-f]{64})?", service["image"]), name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}, name
        assert service["logging"]["options"].keys() == {"max-size", "max-file"}, name
    users = {name: service["user"] for name, service in everything.items() if service["user"] != "10001:10001"}
    assert users == {"volume-owner": "0:0", "grafana": "472:0"}
    assert {name: service["cap_add"] for name, service in everything.items() if service.get("cap_add")} == {
        "volume-owner": ["CHOWN"]
    }
    assert everything["volume-owner"]["network_mode"] == "none"


def test_no_two_builds_make_one_image(services: Services) -> None:
    """
    Compose builds all at once, and of two builds with the same name the second fails on a machine that has no such image yet.
    """
    built = [service.get("image", name) for name, service in services.items() if "build" in service]
    assert len(built) > 1
    assert len(set(built)) == len(built)


def test_each_volume_is_handed_over_before_it_is_used(everything: Services) -> None:
    """
    Who keeps something on a volume waits for the one that gives it to him; nobody else's root is written to.
    """
    given = {volume["source"] for volume in everything["volume-owner"]["volumes"]}
    used = set()
    for name, service in everything.items():
        mine = {volume["source"] for volume in service.get("volumes", []) if volume["type"] == "volume"}
        if mine and name != "volume-owner":
            used |= mine
            awaited = service["depends_on"]["volume-owner"]
            assert awaited["condition"] == "service_completed_successfully", name
    assert used == given
    compile(everything["volume-owner"]["entrypoint"][2], "volume-owner", "exec")


def test_ports_are_published_on_loopback_only(everything: Services) -> None:
    """
    Nothing listens on the laptop's network, and no two of one size want the same port.
    """
    published = [port for service in everything.values() for port in service.get("ports", [])]
    assert published
    assert {port["host_ip"] for port in published} == {"127.0.0.1"}
    for size in SIZES.values():
        ports = [port["published"] for name in size for port in everything[name].get("ports", [])]
        assert len(set(ports)) == len(ports)


def test_no_default_password_exists(everything: Services) -> None:
    """
    Grafana makes no account and shows no login, so `admin:admin` opens nothing; no file here holds a password.
    """
    grafana = everything["grafana"]["environment"]
    assert grafana["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert (grafana["GF_AUTH_BASIC_ENABLED"], grafana["GF_AUTH_DISABLE_LOGIN_FORM"]) == ("false", "true")
    assert grafana["GF_AUTH_ANONYMOUS_ORG_ROLE"] != "Admin"
    assert (grafana["GF_SERVER_DOMAIN"], grafana["GF_SERVER_ENFORCE_DOMAIN"]) == ("127.0.0.1", "true")
    assert not re.search(r"(?i)password\s*[:=]", COMPOSE.read_text())


@pytest.mark.parametrize(("name", "file"), COLLECTORS.items())
def test_a_container_reads_the_tested_file(name: str, file: str, everything: Services) -> None:
    """
    The mounted file is the shipped one, and each variable given to it is one that it reads; what is published is listened on.
    """
    service = everything[name]
    (mount,) = (volume for volume in service["volumes"] if volume["type"] == "bind")
    assert (mount["source"], mount["read_only"]) == (str(CONFIGS / file), True)
    assert (
        re.sub("^-+config(.file)?=", "", next(word for word in service["command"] if "config" in word))
        == mount["target"]
    )
    read = set(re.findall(r"\$\{(?:env:)?(\w+):-", (CONFIGS / file).read_text()))
    assert set(service["environment"]) - {"GOMEMLIMIT"} <= read
    defaults = dict(re.findall(r"^#   ([A-Z]+_HTTP_PORT)\s+(\d+)", (CONFIGS / file).read_text(), re.MULTILINE))
    listening = {value.rpartition(":")[2] for value in service["environment"].values() if value.startswith("0.0.0.0:")}
    assert {str(port["target"]) for port in service.get("ports", [])} <= listening | set(defaults.values())


def test_what_is_told_where_to_send_sends_to_somebody(services: Services) -> None:
    """
    Each address that a container is given is of a container of the same size, by its name or its alias.
    """
    names = set(services) | {
        alias
        for service in services.values()
        for network in (service.get("networks") or {}).values()
        for alias in (network or {}).get("aliases", [])
    }
    named = {
        (name, found)
        for name, service in services.items()
        for value in (service.get("environment") or {}).values()
        for found in re.findall(r"(?:^|[/\[ ])([a-z][a-z0-9-]*):\d{4,5}", value)
    }
    assert len(named) > 8
    assert {host for _, host in named} <= names


def test_somebody_asks_everybody_who_cannot_say_how_he_is(services: Services) -> None:
    """
    The images without a shell have no health check of their own; one that has Python asks each of them where it listens.
    """
    checked = {
        name: service["healthcheck"]["test"]
        for name, service in services.items()
        if "test" in service.get("healthcheck", {})
    }
    (ready,) = (name for name in services if name.endswith("-ready"))
    assert set(checked) == SHOPS | {ready} | ({"kafka"} & set(services))
    assert {tuple(test[:2]) for name, test in checked.items() if name != "kafka"} == {("CMD", "python")}
    for name in SHOPS | {ready}:
        compile(checked[name][3], name, "exec")
    asked = set(services[ready]["environment"]["READY_URLS"].split())
    expected = set()
    for name in set(services) - SHOPS - {ready, "volume-owner", "kafka", "kafka-topic"}:
        port, path = HEALTH.get(name, (13133, "/"))
        aliases = (services[name]["networks"]["default"] or {}).get("aliases", [name])
        expected.add(f"http://{aliases[0]}:{port}{path}")
        if name in COLLECTORS and name not in HEALTH:
            assert services[name]["environment"]["COLLECTOR_HEALTH_ENDPOINT"] == f"0.0.0.0:{port}"
    assert asked == expected


def test_each_shop_service_finds_the_next(services: Services) -> None:
    """
    What runs is a file of the shop, and the addresses that it is given are variables that it reads, of services that are there.
    """
    for name in SHOPS:
        service = services[name]
        assert service["command"] == [f"{name}:app"]
        source = (SHOP / f"{name}.py").read_text()
        given = {key: value for key, value in service["environment"].items() if key.endswith("_URL")}
        assert given.keys() == set(re.findall(r'environ.get\("(\w+_URL)"', source))
        assert all(services[value.removeprefix("http://").removesuffix(":8000")] for value in given.values())


def test_prometheus_asks_the_collectors_of_its_size(services: Services) -> None:
    """
    The targets that are mounted are exactly the collectors that run, at the ports that they are given.
    """
    found = [service for name, service in services.items() if name.startswith("prometheus")]
    if not found:
        return
    (prometheus,) = found
    mounts = {volume["target"]: volume["source"] for volume in prometheus["volumes"] if volume["type"] == "bind"}
    targets = Path(mounts["/etc/prometheus/targets.yml"]).read_text()
    asked = set(re.findall(r'"([a-z0-9-]+:\d+)"', targets))
    expected = {"next-tier:9464"}
    for name in set(services) & COLLECTORS.keys():
        if "COLLECTOR_METRICS_PORT" in services[name]["environment"]:
            aliases = (services[name]["networks"]["default"] or {}).get("aliases", [name])
            expected.add(f"{aliases[0]}:{services[name]['environment']['COLLECTOR_METRICS_PORT']}")
    assert asked == expected


@pytest.mark.needs("compose", "kafka")
def test_kafka_takes_its_file(everything: Services, tmp_path: Path) -> None:
    """
    Kafka's own tool accepts the mounted file and the cluster's id, and refuses a file with a wrong role.
    """
    (mount,) = (volume for volume in everything["kafka"]["volumes"] if volume["type"] == "bind")
    script = everything["kafka"]["entrypoint"][2]
    (cluster,) = re.findall(r"--cluster-id (\S+)", script)
    assert script.count(mount["target"]) == 2
    shipped = Path(mount["source"]).read_text()

    def formatted(text: str) -> int:
        properties = tmp_path / "kafka.properties"
        properties.write_text(re.sub("(?m)^log.dirs=.*", f"log.dirs={tmp_path}/data", text))
        command = [
            kafka.java(),
            "-cp",
            f"{kafka.ensure()}/*",
            "kafka.tools.StorageTool",
            "format",
            "--ignore-formatted",
        ]
        command += ["--cluster-id", cluster, "--config", str(properties)]
        return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode

    assert formatted(shipped) == 0
    assert formatted(shipped.replace("broker,controller", "brokers")) != 0


def test_kafka_keeps_its_messages_on_its_volume(everything: Services) -> None:
    """
    What Kafka writes lies on the named volume, and on none that Docker makes because the image asks for it.
    """
    mounts = {volume["type"]: volume for volume in everything["kafka"]["volumes"]}
    (logs,) = re.findall(r"^log.dirs=(.+)$", Path(mounts["bind"]["source"]).read_text(), re.MULTILINE)
    assert kafka.lasts(logs, mounts["volume"]["target"])


def test_kafka_takes_what_the_router_writes(everything: Services) -> None:
    """
    The topic is the router's and takes its largest message, and where Kafka unpacks the library that reads zstd, it may run it.

    Docker mounts a tmpfs with noexec unless it is told otherwise.
    """
    router = yaml.safe_load((CONFIGS / "kafka-router.yaml").read_text())["exporters"]["kafka"]
    topic = dict(word.removeprefix("--config=").split("=") for word in everything["kafka-topic"]["command"])
    assert f":-{topic['--topic']}}}" in router["traces"]["topic"]
    assert int(topic["max.message.bytes"]) >= router["producer"]["max_message_bytes"]
    assert router["producer"]["compression"] == "zstd"
    (options,) = (
        mount.partition(":")[2] for mount in everything["kafka"]["tmpfs"] if mount.partition(":")[0] == "/tmp"
    )
    assert "exec" in options.split(",")
