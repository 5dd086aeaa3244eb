"""
deploy/ for Kubernetes: built by the real kustomize, checked against the API's schemas, and read by the real collectors.

No cluster is needed, and none was used: what a scheduler, a kubelet or a network plugin does with these files is not tested.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml

from tests.stack import build, kafka
from tests.stack.harness import CONFIGS, ROOT, Collector, Jaeger, Machine, eventually, get

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.needs("kubernetes")
DEPLOY = ROOT / "deploy"
OVERLAYS = (
    "kubernetes/overlays/dev",
    "kubernetes/overlays/production",
    "scale/overlays/direct",
    "scale/overlays/kafka",
    "scale/overlays/direct-mtls",
)
SCHEMAS = "1.30"  # The newest whose schemas kubectl-validate 0.0.4 has within itself.
# Namespaces of what is there already; the operator writes their addresses into the overlay.
STORES = {"jaeger", "tempo", "loki"}
OPERATOR = "github.com/open-telemetry/opentelemetry-operator@v0.140.0"  # The newest that the module proxies serve.
CRD = "config/crd/bases/opentelemetry.io_instrumentations.yaml"
CRD_SHA256 = "ac79b5a124bc0a7128c7f0f846084d6e661efd9611c7d4ec99aa76bbf6eb5ee2"

Document = dict[str, Any]


def kustomize(directory: Path) -> subprocess.CompletedProcess[str]:
    """
    Run ``kustomize build`` without a flag, as ``kubectl apply -k`` does.
    """
    command = [str(build.ensure(build.KUSTOMIZE)), "build", str(directory)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@functools.cache
def _rendered(overlay: str) -> str:
    answer = kustomize(DEPLOY / overlay)
    assert (answer.returncode, answer.stderr) == (0, "")
    return answer.stdout


def documents(overlay: str) -> list[Document]:
    """
    Return what the overlay would apply, a fresh copy.
    """
    return list(yaml.safe_load_all(_rendered(overlay)))


def schemas(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """
    Check a file against the schemas of the Kubernetes API.
    """
    command = [str(build.ensure(build.KUBECTL_VALIDATE)), str(path), "--version", SCHEMAS, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def pod_template(document: Document) -> Document | None:
    """
    Return the pod template of a workload, or None of anything else.
    """
    template = document.get("spec", {}).get("template")
    return template if isinstance(template, dict) and "containers" in template.get("spec", {}) else None


def containers(found: list[Document]) -> Iterator[tuple[Document, Document]]:
    """
    Yield each container with its workload, those that run before the others included.
    """
    for document in found:
        if template := pod_template(document):
            for container in template["spec"].get("initContainers", []) + template["spec"]["containers"]:
                yield document, container


def environment(found: list[Document], workload: Document, container: Document) -> dict[str, str]:
    """
    Return the environment as the kubelet would make it: ConfigMaps, the downward API, and $(NAME) of what stands above.
    """
    namespace = workload["metadata"]["namespace"]
    template = workload["spec"]["template"]
    fields = {
        "metadata.name": f"{workload['metadata']['name']}-0",
        "metadata.namespace": namespace,
        "metadata.uid": "6f2b8a36-6c0e-4a7e-9a39-0d6b5a0b1b7e",
        "spec.nodeName": "node-1",
        "metadata.labels['apps.kubernetes.io/pod-index']": "0",
    } | {f"metadata.labels['{key}']": value for key, value in template["metadata"]["labels"].items()}
    result: dict[str, str] = {}
    for source in container.get("envFrom", []):
        result |= named(found, "ConfigMap", source["configMapRef"]["name"], namespace)["data"]
    for entry in container.get("env", []):
        value = entry["value"] if "value" in entry else fields[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        for name, known in result.items():
            value = value.replace(f"$({name})", known)
        result[entry["name"]] = value
    return result


def named(found: list[Document], kind: str, name: str, namespace: str) -> Document:
    """
    Return the one object of that kind and name.
    """
    (match,) = (
        document
        for document in found
        if document["kind"] == kind and document["metadata"]["name"] == name
        if document["metadata"].get("namespace") == namespace
    )
    return match


def selected(found: list[Document], selector: dict[str, Any], namespace: str) -> list[Document]:
    """
    Return the workloads whose pods a label selector chooses.
    """

    def matches(labels: dict[str, str]) -> bool:
        expressions = selector.get("matchExpressions", [])
        assert {expression["operator"] for expression in expressions} <= {"In"}
        return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
            labels.get(expression["key"]) in expression["values"] for expression in expressions
        )

    return [
        document
        for document in found
        if (template := pod_template(document)) and document["metadata"]["namespace"] == namespace
        if matches(template["metadata"]["labels"])
    ]


def ports(workload: Document) -> dict[str, int]:
    """
    Return the ports that the pod's containers name.
    """
    return {
        port["name"]: port["containerPort"]
        for container in workload["spec"]["template"]["spec"]["containers"]
        for port in container.get("ports", [])
    }


def addresses(found: list[Document]) -> Iterator[tuple[str, str, str, int]]:
    """
    Yield who names which address: the namespace of whoever names it, the whole text, the host and the port.
    """
    texts = [
        (workload["metadata"]["namespace"], value)
        for workload, container in containers(found)
        for name, value in environment(found, workload, container).items()
        if name not in ("OTEL_RESOURCE_ATTRIBUTES", "KAFKA_LOG4J_OPTS")
    ]
    texts += [
        (document["metadata"]["namespace"], value)
        for document in found
        if document["kind"] == "ConfigMap"
        for name, value in document["data"].items()
        if name in ("server.properties", "topic.sh")
    ]
    for namespace, text in texts:
        for host, port in re.findall(r"([a-z0-9][a-z0-9.-]*[a-z0-9]):(\d{2,5})\b", text):
            if host != "0.0.0.0":
                yield namespace, text, host, int(port)


def broken_references(found: list[Document]) -> list[str]:
    """
    Return what is named somewhere and is not there: services, ports, pods, volumes, ConfigMaps, targets.
    """
    problems: list[str] = []
    services = {
        (document["metadata"]["namespace"], document["metadata"]["name"]): document
        for document in found
        if document["kind"] == "Service"
    }
    workloads = [document for document in found if pod_template(document)]
    namespaces = {document["metadata"]["name"] for document in found if document["kind"] == "Namespace"}
    for document in found:
        where = f"{document['kind']} {document['metadata']['name']}"
        namespace = document["metadata"].get("namespace", "")
        spec = document.get("spec", {})
        if document["kind"] != "Namespace" and namespace not in namespaces:
            problems.append(f"{where}: no namespace {namespace}")
        if document["kind"] == "Service":
            behind = selected(found, {"matchLabels": spec["selector"]}, namespace)
            if not behind:
                problems.append(f"{where}: selects nothing")
            problems += [
                f"{where}: no port {port['targetPort']}"
                for port in spec["ports"]
                for workload in behind
                if port["targetPort"] not in ports(workload)
            ]
        elif document["kind"] == "PodDisruptionBudget" and not selected(found, spec["selector"], namespace):
            problems.append(f"{where}: selects nothing")
        elif document["kind"] == "HorizontalPodAutoscaler":
            scaled = (spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"], namespace)
            if scaled not in [(w["kind"], w["metadata"]["name"], w["metadata"]["namespace"]) for w in workloads]:
                problems.append(f"{where}: no {scaled}")
        elif document["kind"] == "StatefulSet" and (namespace, spec["serviceName"]) not in services:
            problems.append(f"{where}: no service {spec['serviceName']}")
    for workload, container in containers(found):
        where = f"{workload['kind']} {workload['metadata']['name']}"
        named_ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
        template = workload["spec"]["template"]["spec"]
        volumes = {volume["name"] for volume in template.get("volumes", [])}
        volumes |= {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
        problems += [
            f"{where}: no volume {mount['name']}"
            for mount in container.get("volumeMounts", [])
            if mount["name"] not in volumes
        ]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            for action in container.get(probe, {}).values():
                if isinstance(action, dict) and action["port"] not in named_ports:
                    problems.append(f"{where}: {probe} asks port {action['port']}")
        listening = {
            int(value.rpartition(":")[2])
            for name, value in environment(found, workload, container).items()
            if value.startswith("0.0.0.0:") or name == "COLLECTOR_METRICS_PORT"
        }
        problems += [f"{where}: {port} is not among its ports" for port in listening - set(named_ports.values())]
        existing = {
            document["metadata"]["name"]
            for document in found
            if document["kind"] == "ConfigMap"
            and document["metadata"]["namespace"] == workload["metadata"]["namespace"]
        }
        problems += [
            f"{where}: no ConfigMap {volume['configMap']['name']}"
            for volume in template.get("volumes", [])
            if "configMap" in volume and volume["configMap"]["name"] not in existing
        ]
    for namespace, text, host, port in addresses(found):
        *pod, service, there = host.split(".") if "." in host else [host, namespace]
        if there in STORES:
            continue
        target = services.get((there, service))
        if target is None:
            problems.append(f"{text}: no service {service} in {there}")
        elif port not in [offered["port"] for offered in target["spec"]["ports"]]:
            problems.append(f"{text}: {service} has no port {port}")
        elif target["spec"].get("clusterIP") == "None":
            (members_of,) = selected(found, {"matchLabels": target["spec"]["selector"]}, there)
            if port not in ports(members_of).values():
                problems.append(f"{text}: without an address of its own, {service} has only the pods' ports")
            replicas = members_of["spec"].get("replicas")
            members = {f"{members_of['metadata']['name']}-{number}" for number in range(replicas or 0)}
            problems += [f"{text}: no pod {name}" for name in pod if replicas and name not in members]
    return problems + list(broken_policies(found))


def broken_policies(found: list[Document]) -> Iterator[str]:
    """
    Yield the rules of network policies that name a port that no pod on that side has.
    """
    for policy in (document for document in found if document["kind"] == "NetworkPolicy"):
        namespace = policy["metadata"]["namespace"]
        mine = selected(found, policy["spec"]["podSelector"], namespace)
        for direction, peers in (("ingress", "from"), ("egress", "to")):
            for rule in policy["spec"].get(direction, []):
                if direction == "ingress":
                    sides = mine
                else:
                    sides = []
                    for peer in rule[peers]:
                        labels = peer.get("namespaceSelector", {}).get("matchLabels", {})
                        there = labels.get("kubernetes.io/metadata.name", namespace)
                        sides += selected(found, peer.get("podSelector", {"matchLabels": {"-": "-"}}), there)
                named_ports = {name for workload in sides for name in ports(workload)}
                for port in rule.get("ports", []):
                    if sides and isinstance(port["port"], str) and port["port"] not in named_ports:
                        yield f"NetworkPolicy {policy['metadata']['name']}: no port {port['port']}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_built_and_fits_the_schemas(overlay: str, tmp_path: Path) -> None:
    """
    Plain kustomize builds it, and each object is what the API server's schema allows, with no unknown field.
    """
    path = tmp_path / "all.yaml"
    path.write_text(_rendered(overlay))
    answer = schemas(path)
    assert answer.returncode == 0, answer.stdout + answer.stderr


BROKEN = [
    pytest.param("kubernetes/agent/agent.yaml", "readinessProbe:", "readynessProbe:", id="unknown-field"),
    pytest.param("kubernetes/gateway/gateway.yaml", "replicas: 1", "replicas: one", id="number-that-is-none"),
    pytest.param("kubernetes/agent/agent.yaml", "{type: RuntimeDefault}", "[RuntimeDefault]", id="list-for-an-object"),
    pytest.param(
        "kubernetes/gateway/gateway.yaml",
        "- metadata:\n        name: queue",
        "- metadat:\n        name: queue",
        id="claim",
    ),
    pytest.param("kubernetes/overlays/dev/kustomization.yaml", "../../jaeger", "../../jager", id="missing-directory"),
    pytest.param(
        "kubernetes/agent/kustomization.yaml", "../../../collector", "../../../collectors", id="missing-files"
    ),
    pytest.param("kubernetes/overlays/dev/kustomization.yaml", "literals:", "literal:", id="unknown-key"),
]


@pytest.mark.parametrize(("file", "good", "bad"), BROKEN)
def test_a_planted_error_is_refused(file: str, good: str, bad: str, tmp_path: Path) -> None:
    """
    One wrong word is found by kustomize or by the schemas, so acceptance means something.
    """
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    shutil.copytree(CONFIGS, tmp_path / "collector")
    shipped = (tmp_path / "deploy" / file).read_text()
    assert good in shipped
    (tmp_path / "deploy" / file).write_text(shipped.replace(good, bad, 1))
    answer = kustomize(tmp_path / "deploy/kubernetes/overlays/dev")
    if answer.returncode == 0:
        (tmp_path / "all.yaml").write_text(answer.stdout)
        assert schemas(tmp_path / "all.yaml").returncode != 0


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_that_is_named_is_there(overlay: str) -> None:
    """
    Services, ports, pods, volumes, ConfigMaps and the targets of policies all exist in the same rendered set.
    """
    assert broken_references(documents(overlay)) == []


# Who connects to whom in each overlay: from (namespace, pod), to (namespace, pod), the port's name.
AGENTS, COLLECTORS, SHOP = "observability-agents", "observability", "shop"
PATHS: dict[str, list[tuple[tuple[str, str], tuple[str, str], str]]] = {
    "kubernetes/overlays/dev": [((COLLECTORS, "gateway"), (COLLECTORS, "jaeger"), "otlp-grpc")],
    "kubernetes/overlays/production": [((COLLECTORS, "gateway"), ("tempo", "distributor"), "otlp")],
    "scale/overlays/direct": [
        ((AGENTS, "agent"), (COLLECTORS, "router"), "otlp-grpc"),
        ((COLLECTORS, "router"), (COLLECTORS, "sampler"), "otlp-grpc"),
        ((COLLECTORS, "sampler"), ("tempo", "distributor"), "otlp"),
    ],
}
for overlay in ("kubernetes/overlays/dev", "kubernetes/overlays/production"):
    PATHS[overlay] += [
        ((AGENTS, "agent"), (COLLECTORS, "gateway"), "otlp-grpc"),
        ((SHOP, "gateway"), (SHOP, "orders"), "http"),
        ((SHOP, "orders"), (SHOP, "inventory"), "http"),
        *(((SHOP, name), (AGENTS, "agent"), "otlp-http") for name in ("gateway", "orders", "inventory")),
        (("monitoring", "prometheus"), (AGENTS, "agent"), "metrics"),
        (("monitoring", "prometheus"), (COLLECTORS, "gateway"), "service-metrics"),
    ]
CLOSED = [
    ((SHOP, "orders"), (COLLECTORS, "gateway"), "otlp-grpc"),
    ((SHOP, "inventory"), (SHOP, "orders"), "http"),
    ((SHOP, "gateway"), (SHOP, "inventory"), "http"),
    (("elsewhere", "any"), (SHOP, "orders"), "http"),
    (("elsewhere", "any"), (COLLECTORS, "gateway"), "otlp-grpc"),
    (("elsewhere", "any"), (COLLECTORS, "gateway"), "metrics"),
    ((COLLECTORS, "gateway"), ("elsewhere", "any"), "http"),
    ((AGENTS, "agent"), ("tempo", "distributor"), "otlp"),
    ((COLLECTORS, "jaeger"), (COLLECTORS, "gateway"), "otlp-grpc"),
    ((SHOP, "orders"), ("elsewhere", "any"), "http"),
]
ROLES = {"tempo": "store", "jaeger": "store", "loki": "store", "monitoring": "prometheus"}


def fits(selector: Document, labels: dict[str, str]) -> bool:
    """
    Tell whether labels match a selector that has only ``matchLabels``.
    """
    assert selector.keys() <= {"matchLabels"}
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def pod_labels(namespace: str, name: str) -> dict[str, str]:
    """
    Return what a pod of that name is labelled with.
    """
    part_of = {SHOP: "shop", AGENTS: "otel-correlation", COLLECTORS: "otel-correlation"}.get(namespace, "other")
    return {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": part_of}


def lets(found: list[Document], side: str, here: tuple[str, str], there: tuple[str, str], port: str | int) -> bool:
    """
    Tell whether the policies of one side of a connection let it through; as Kubernetes does: any that allows it is enough.
    """
    direction, peers = ("Egress", "to") if side == "from" else ("Ingress", "from")
    namespace_labels = {"kubernetes.io/metadata.name": there[0], "otel-correlation/role": ROLES.get(there[0], "")}
    closed = False
    for policy in found:
        spec = policy.get("spec", {})
        if policy["kind"] != "NetworkPolicy" or policy["metadata"]["namespace"] != here[0]:
            continue
        if direction not in spec["policyTypes"] or not fits(spec["podSelector"], pod_labels(*here)):
            continue
        closed = True
        for rule in spec.get(direction.lower(), []):
            peer_fits = any(
                (
                    fits(peer["namespaceSelector"], namespace_labels)
                    if "namespaceSelector" in peer
                    else here[0] == there[0]
                )
                and fits(peer.get("podSelector", {}), pod_labels(*there))
                for peer in rule[peers]
            )
            if peer_fits and ("ports" not in rule or port in [entry["port"] for entry in rule["ports"]]):
                return True
    return not closed


@pytest.mark.parametrize("overlay", PATHS)
def test_only_the_path_of_the_spans_is_open(overlay: str) -> None:
    """
    Each connection that pods make is let through on both sides, with DNS for all; any other is stopped on one of them.
    """
    found = documents(overlay)
    for source, target, port in PATHS[overlay]:
        assert lets(found, "from", source, target, port), (source, target, port)
        assert lets(found, "to", target, source, port), (source, target, port)
    for source, target, port in CLOSED:
        stopped = not lets(found, "from", source, target, port) or not lets(found, "to", target, source, port)
        assert stopped or (SHOP in (source[0], target[0]) and "scale" in overlay), (source, target, port)
    namespaces = {document["metadata"]["name"] for document in found if document["kind"] == "Namespace"}
    for namespace in namespaces:
        pod = (namespace, "any")
        assert not lets(found, "to", pod, ("elsewhere", "any"), "http"), namespace
        assert lets(found, "from", pod, ("kube-system", "dns"), 53), namespace


def _port_of_service(found: list[Document]) -> None:
    named(found, "Service", "router", "observability")["spec"]["ports"][0]["targetPort"] = "otlp"


def _address(found: list[Document]) -> None:
    container = named(found, "DaemonSet", "agent", "observability-agents")["spec"]["template"]["spec"]["containers"][0]
    for entry in container["env"]:
        if entry["name"] == "NEXT_OTLP_ENDPOINT":
            entry["value"] = "dns:///router.observability:4327"


def _too_few_samplers(found: list[Document]) -> None:
    named(found, "StatefulSet", "sampler", "observability")["spec"]["replicas"] = 2


def _probe(found: list[Document]) -> None:
    container = named(found, "StatefulSet", "sampler", "observability")["spec"]["template"]["spec"]["containers"][0]
    container["livenessProbe"]["httpGet"]["port"] = "healthy"


def _listening(found: list[Document]) -> None:
    container = named(found, "StatefulSet", "sampler", "observability")["spec"]["template"]["spec"]["containers"][0]
    container["ports"] = [port for port in container["ports"] if port["name"] != "metrics"]


def _policy(found: list[Document]) -> None:
    named(found, "NetworkPolicy", "router", "observability")["spec"]["ingress"][0]["ports"][0]["port"] = "otlp"


def _config_map(found: list[Document]) -> None:
    found.remove(next(document for document in found if document["metadata"]["name"].startswith("router-connections")))


@pytest.mark.parametrize(
    "break_it", [_port_of_service, _address, _too_few_samplers, _probe, _listening, _policy, _config_map]
)
def test_a_name_that_leads_nowhere_is_found(break_it: Callable[[list[Document]], None]) -> None:
    """
    The check above sees each kind of wrong name.
    """
    found = copy.deepcopy(documents("scale/overlays/direct"))
    break_it(found)
    assert broken_references(found) != []


def collectors(overlay: str) -> list[tuple[str, Document, Document]]:
    """
    Return the containers of an overlay that read a configuration of ours, with a name for the test.
    """
    return [
        (workload["metadata"]["name"], workload, container)
        for workload, container in containers(documents(overlay))
        if container["image"].startswith(("otel/", "jaegertracing/"))
    ]


@dataclass(frozen=True, slots=True)
class Rendered:
    """
    One collector of an overlay as its container would find it, below a directory of the test.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    files: str


def rendered(overlay: str, directory: Path) -> Iterator[Rendered]:
    """
    Yield each collector, and Jaeger, with its mounted files written and the paths in its variables and arguments moved there.
    """
    found = documents(overlay)
    for name, workload, container in collectors(overlay):
        root = directory / name
        volumes = {volume["name"]: volume for volume in workload["spec"]["template"]["spec"]["volumes"]}
        files = ""
        for mount in container["volumeMounts"]:
            inside = root / mount["mountPath"].removeprefix("/")
            inside.mkdir(parents=True, exist_ok=True)
            if config := volumes.get(mount["name"], {}).get("configMap"):
                data = named(found, "ConfigMap", config["name"], workload["metadata"]["namespace"])["data"]
                for file, text in data.items():
                    assert not (CONFIGS / file).exists() or text == (CONFIGS / file).read_text()
                    (inside / file).write_text(text)
                    files += text
        arguments = [re.sub(r"^--config=", f"--config={root}", argument) for argument in container["args"]]
        if container["image"].startswith("jaegertracing/"):
            tool = build.JAEGER
        else:
            tool = build.KAFKA_COLLECTOR if "kafka-sampler" in "".join(arguments) else build.COLLECTOR
        variables = {
            variable: f"{root}{value}" if value.startswith(("/var/", "/etc/")) else value
            for variable, value in environment(found, workload, container).items()
        }
        yield Rendered(name, [str(build.ensure(tool)), *arguments], variables, files)


@pytest.mark.needs("kubernetes", "collector", "kafka", "jaeger")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_collector_accepts_its_files_with_the_environment_of_the_manifest(overlay: str, tmp_path: Path) -> None:
    """
    The program takes the mounted files with exactly these variables and arguments.

    The files are the tested ones, byte for byte, and each variable is one that they read.
    """
    assert collectors(overlay)
    given = {name: {entry["name"] for entry in container["env"]} for name, _, container in collectors(overlay)}
    for one in rendered(overlay, tmp_path):
        assert given[one.name] - {"GOMEMLIMIT"} <= set(re.findall(r"\$\{env:(\w+)", one.files)), one.name
        program, *arguments = one.command
        command = [program, "validate", *arguments]
        answer = subprocess.run(command, env=one.environment, capture_output=True, text=True, check=False, timeout=60)
        assert answer.returncode == 0, f"{one.name}: {answer.stderr}"


@pytest.mark.needs("kubernetes", "collector", "jaeger")
def test_the_tiers_run_as_rendered_and_carry_a_trace(machine: Machine, jaeger: Jaeger) -> None:
    """
    Agent, router and sampler with the files, variables and arguments of the mTLS overlay deliver a failed span.

    Only hosts and ports are of this machine. What the autoscaler asks for is what the router counts, and the services' metrics
    are offered by the agent.
    """
    run(DEPLOY / "scale/mtls/certificates.sh", machine.directory / "certificates", "localhost")
    tiers = {one.name: one for one in rendered("scale/overlays/direct-mtls", machine.directory)}
    for name, one in tiers.items():
        variables = one.environment
        for variable, value in variables.items():
            if value.startswith("0.0.0.0:"):
                variables[variable] = f"127.0.0.1:{machine.port()}"
        variables |= {"COLLECTOR_METRICS_HOST": "127.0.0.1", "COLLECTOR_METRICS_PORT": str(machine.port())}
        variables |= {"SAMPLER_DECISION_WAIT": "1s", "TEMPO_OTLP_ENDPOINT": jaeger.otlp}
        mounted = Path(variables["COLLECTOR_TLS_CERT"]).parent
        for file in ("tls.crt", "tls.key", "ca.crt"):
            shutil.copy(machine.directory / "certificates" / name / file, mounted / file)

    def on_this_machine(name: str) -> str:
        return f"localhost:{tiers[name].environment['COLLECTOR_GRPC_ENDPOINT'].rpartition(':')[2]}"

    tiers["agent"].environment["NEXT_OTLP_ENDPOINT"] = f"dns:///{on_this_machine('router')}"
    tiers["router"].environment["ROUTER_SAMPLERS"] = f"[{on_this_machine('sampler')}]"
    processes = []
    for one in tiers.values():
        processes.append(machine.start(one.name, one.command, one.environment, machine.directory))
        health = f"http://{one.environment['COLLECTOR_HEALTH_ENDPOINT']}/"
        eventually(one.name, lambda health=health: get(health).status_code == 200, while_running=processes)  # type: ignore[misc]

    now = time.time_ns()
    trace_id = secrets.token_hex(16)
    span = {
        "traceId": trace_id,
        "spanId": secrets.token_hex(8),
        "name": "GET /orders",
        "kind": 2,
        "status": {"code": 2},
    }
    span |= {"startTimeUnixNano": str(now), "endTimeUnixNano": str(now + 1)}
    point = {"asInt": "7", "startTimeUnixNano": str(now - 1), "timeUnixNano": str(now)}
    metric = {"name": "orders", "sum": {"dataPoints": [point], "aggregationTemporality": 2, "isMonotonic": True}}
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": "orders"}}]}
    agent = tiers["agent"].environment
    for path, body in (
        ("traces", {"resourceSpans": [{"resource": resource, "scopeSpans": [{"spans": [span]}]}]}),
        ("metrics", {"resourceMetrics": [{"resource": resource, "scopeMetrics": [{"metrics": [metric]}]}]}),
    ):
        with httpx.Client(trust_env=False) as client:
            client.post(f"http://{agent['COLLECTOR_HTTP_ENDPOINT']}/v1/{path}", json=body).raise_for_status()
    (stored,) = eventually("the span", lambda: jaeger.trace(trace_id), while_running=processes)
    assert (stored.service, stored.name) == ("orders", "GET /orders")
    offered = f"http://{agent['METRICS_ENDPOINT']}/metrics"
    eventually("the service's metric", lambda: "orders_total{" in get(offered).text, while_running=processes)

    (scaler,) = (one for one in documents("scale/overlays/direct") if one["kind"] == "HorizontalPodAutoscaler")
    wanted = scaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
    own = get(f"http://127.0.0.1:{tiers['router'].environment['COLLECTOR_METRICS_PORT']}/metrics").text
    assert re.search(rf'^{wanted}{{[^}}]*exporter="load_balancing"', own, re.MULTILINE)


def test_certificates_are_renewed_under_the_same_authority(tmp_path: Path) -> None:
    """
    certificates.sh run again makes new certificates, and no new authority that nobody who runs would believe.

    Without openssl it says so and makes nothing.
    """
    script, made = DEPLOY / "scale/mtls/certificates.sh", tmp_path / "made"
    run(script, made)
    before = {path.name: path.read_bytes() for path in (*made.glob("*.crt"), *made.glob("agent/tls.crt"))}
    run(script, made, "localhost")
    after = {path.name: path.read_bytes() for path in (*made.glob("*.crt"), *made.glob("agent/tls.crt"))}
    assert after["ca.crt"] == before["ca.crt"]
    assert after["tls.crt"] != before["tls.crt"]
    run("openssl", "verify", "-CAfile", made / "ca.crt", made / "agent/tls.crt", made / "sampler/tls.crt")
    path = tmp_path / "bin"
    path.mkdir()
    (path / "mkdir").symlink_to(str(shutil.which("mkdir")))
    ended = subprocess.run(
        ["/bin/sh", script, tmp_path / "none"], env={"PATH": str(path)}, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, "openssl" in ended.stderr) == (1, True)
    assert list((tmp_path / "none").iterdir()) == []


def test_kafka_keeps_its_messages_on_its_claim() -> None:
    """
    What a node writes lies on its claim, below the top, where some file systems have a directory that Kafka would not bear.
    """
    found = documents("scale/overlays/kafka")
    (files,) = (one["data"] for one in found if one["metadata"]["name"].startswith("kafka-config"))
    (logs,) = re.findall(r"^log.dirs=(.+)$", files["server.properties"], re.MULTILINE)
    (container,) = named(found, "StatefulSet", "kafka", "observability")["spec"]["template"]["spec"]["containers"]
    (mounted,) = (mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "data")
    assert kafka.lasts(logs, mounted)
    assert logs != mounted


@pytest.mark.needs("kubernetes", "kafka")
def test_three_kafka_nodes_start_by_the_shipped_script(machine: Machine) -> None:
    """
    start.sh makes one cluster of three of the shipped properties, and topic.sh a topic whose spans lie on all three.

    The image's programs are Kafka's own from the same release; only hosts, ports, directories and the heap are this machine's.
    """
    bin_directory = machine.directory / "kafka/bin"
    bin_directory.mkdir(parents=True)
    for script, main in (
        ("kafka-storage.sh", "kafka.tools.StorageTool"),
        ("kafka-server-start.sh", "kafka.Kafka"),
        ("kafka-topics.sh", "org.apache.kafka.tools.TopicCommand"),
    ):
        java = f"{kafka.java()} -Xmx256m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -cp '{kafka.ensure()}/*'"
        logging = f"-Dlog4j2.configurationFile={kafka.SOURCE / 'log4j2.properties'}"
        (bin_directory / script).write_text(f'#!/bin/sh\nexec {java} {logging} {main} "$@"\n')
        (bin_directory / script).chmod(0o755)
    found = documents("scale/overlays/kafka")
    (files,) = (one["data"] for one in found if one["metadata"]["name"].startswith("kafka-config"))
    workload = named(found, "StatefulSet", "kafka", "observability")
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    variables = environment(found, workload, container)
    nodes = [(machine.port(), machine.port()) for _ in range(workload["spec"]["replicas"])]

    def here(text: str, number: int) -> str:
        for other, (broker, controller) in enumerate(nodes):
            text = text.replace(f"kafka-{other}.kafka.observability:9092", f"127.0.0.1:{broker}")
            text = text.replace(f"kafka-{other}.kafka.observability:9093", f"127.0.0.1:{controller}")
        broker, controller = nodes[number]
        for name, port in (("9092", broker), ("9093", controller)):
            text = text.replace(f"$POD_NAME.kafka.observability:{name}", f"127.0.0.1:{port}")
            text = text.replace(f"://:{name}", f"://127.0.0.1:{port}")
        directory = machine.directory / f"kafka-{number}"
        text = text.replace("/etc/kafka-config", str(directory)).replace("/tmp/server", f"{directory}/own")
        return re.sub("(?m)^log.dirs=.*", f"log.dirs={directory}/data", text)

    processes = []
    for number in range(len(nodes)):
        directory = machine.directory / f"kafka-{number}"
        directory.mkdir()
        for name, text in files.items():
            (directory / name).write_text(here(text, number))
        own = {"POD_NAME": f"kafka-{number}", "NODE_ID": str(number), "KAFKA_HOME": str(bin_directory.parent)}
        command = ["bash", *(here(argument, number) for argument in container["command"][1:])]
        processes.append(machine.start(f"kafka-{number}", command, variables | own, machine.directory))
    for process in processes:
        eventually(
            process.name,
            lambda process=process: "Kafka Server started" in process.log.read_text(),  # type: ignore[misc]
            while_running=processes,
        )
    home = os.environ | {"KAFKA_HOME": str(bin_directory.parent)}
    run("bash", machine.directory / "kafka-0/topic.sh", env=home)
    servers = ",".join(f"127.0.0.1:{broker}" for broker, _ in nodes)
    topics = bin_directory / "kafka-topics.sh"
    described = run(topics, "--bootstrap-server", servers, "--describe", "--topic", "otlp_spans")
    assert "PartitionCount: 24" in described
    assert "ReplicationFactor: 3" in described
    assert "min.insync.replicas=2" in described
    assert "retention.ms=14400000" in described
    assert described.count("Isr: ") == 24


@pytest.mark.needs("collector")
def test_a_wrong_variable_in_a_manifest_is_refused(tmp_path: Path) -> None:
    """
    The collector's own check sees a size that is no number, so the test above means something.
    """
    (tmp_path / "agent.yaml").write_text((CONFIGS / "agent.yaml").read_text())
    command = [str(build.ensure(build.COLLECTOR)), "validate", f"--config={tmp_path / 'agent.yaml'}"]
    answer = subprocess.run(
        command, env={"COLLECTOR_MEMORY_MIB": "400Mi"}, capture_output=True, check=False, timeout=60
    )
    assert answer.returncode != 0


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_confined(overlay: str) -> None:
    """
    Every pod fits the level `restricted`, except the agents' where their queue is a directory of the host.

    Their namespace says so. Images are pinned, memory is bounded, and no pod may ask the API server.
    """
    found = documents(overlay)
    levels = {
        document["metadata"]["name"]: document["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        for document in found
        if document["kind"] == "Namespace"
    }
    outside: set[tuple[str, str]] = set()
    for workload, container in containers(found):
        spec = workload["spec"]["template"]["spec"]
        security = spec["securityContext"] | container["securityContext"]
        assert re.fullmatch(r"[a-z0-9./-]+:\d+\.\d+\.\d+(@sha256:[0-9a-f]{64})?", container["image"])
        assert container["resources"]["limits"]["memory"]
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec.get("hostNetwork")
        assert all("hostPort" not in port for port in container.get("ports", []))
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        restricted = (
            security["capabilities"] == {"drop": ["ALL"]} and security["runAsNonRoot"] and security["runAsUser"]
        )
        if not restricted:
            assert security["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN"]}
            outside.add((workload["metadata"]["namespace"], container["name"]))
        if any("hostPath" in volume for volume in spec.get("volumes", [])):
            outside.add((workload["metadata"]["namespace"], "queue-owner"))
    assert outside == (set() if overlay.endswith("dev") else {("observability-agents", "queue-owner")})
    relaxed = {namespace for namespace, level in levels.items() if level != "restricted"}
    assert relaxed == {namespace for namespace, _ in outside}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_memory_limits_agree(overlay: str) -> None:
    """
    A collector slows down first, then Go's collector works harder, and the kernel ends neither: 400 < 410 < 512, and so on.
    """
    for _, _, container in collectors(overlay):
        variables = {entry["name"]: entry.get("value", "") for entry in container["env"]}
        number, unit = re.fullmatch(r"(\d+)([MG])i", container["resources"]["limits"]["memory"]).groups()  # type: ignore[union-attr]
        limit = int(number) * (1024 if unit == "G" else 1)
        go = int(variables["GOMEMLIMIT"].removesuffix("MiB"))
        assert 0.75 * limit <= go <= 0.85 * limit
        if "COLLECTOR_MEMORY_MIB" in variables:
            assert int(variables["COLLECTOR_MEMORY_MIB"]) <= go


def test_a_service_says_who_and_where_it_is() -> None:
    """
    Name, version and environment come from the pod's labels, k8s.* from the downward API; metrics go to the agent, too.
    """
    found = documents("kubernetes/overlays/production")
    shop = {
        workload["metadata"]["name"]: environment(found, workload, container)
        for workload, container in containers(found)
        if workload["metadata"]["namespace"] == "shop"
    }
    assert shop.keys() == {"gateway", "orders", "inventory"}
    for name, variables in shop.items():
        assert variables["OTEL_SERVICE_NAME"] == name
        assert dict(pair.split("=") for pair in variables["OTEL_RESOURCE_ATTRIBUTES"].split(",")) == {
            "service.version": "1.0.0",
            "deployment.environment.name": "production",
            "k8s.namespace.name": "shop",
            "k8s.deployment.name": name,
            "k8s.pod.name": f"{name}-0",
            "k8s.pod.uid": "6f2b8a36-6c0e-4a7e-9a39-0d6b5a0b1b7e",
            "k8s.node.name": "node-1",
            "k8s.container.name": "app",
        }
        assert variables["OTEL_METRICS_EXPORTER"] == "otlp"
        assert variables["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://agent.observability-agents:4318"


def test_routers_know_all_samplers() -> None:
    """
    The list of names in the routers is exactly the samplers that there are.
    """
    found = documents("scale/overlays/direct")
    router = named(found, "StatefulSet", "router", "observability")
    known = environment(found, router, router["spec"]["template"]["spec"]["containers"][0])["ROUTER_SAMPLERS"]
    replicas = named(found, "StatefulSet", "sampler", "observability")["spec"]["replicas"]
    assert yaml.safe_load(known) == [f"sampler-{number}.sampler.observability:4317" for number in range(replicas)]


@functools.cache
def operators_crd() -> Path:
    """
    Return the directory with the operator's own definition of Instrumentation, from its Go module, checked by its hash.
    """
    answer = subprocess.run(
        [build.go(), "mod", "download", "-json", OPERATOR],
        env={**os.environ, "GOTOOLCHAIN": "local", "GOSUMDB": "off", "GOFLAGS": "-mod=mod", "GOWORK": "off"},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return Path(json.loads(answer.stdout)["Dir"]) / CRD


def test_the_operators_resource_fits_its_schema(tmp_path: Path) -> None:
    """
    deploy/operator/instrumentation.yaml is what the operator's own CRD allows, and one wrong word is refused.
    """
    crd = operators_crd().read_bytes()
    assert hashlib.sha256(crd).hexdigest() == CRD_SHA256
    (tmp_path / "crds").mkdir()
    (tmp_path / "crds/instrumentation.yaml").write_bytes(crd)
    shipped = DEPLOY / "operator/instrumentation.yaml"
    local = f"--local-crds={tmp_path / 'crds'}"
    answer = schemas(shipped, local)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    broken = tmp_path / "broken.yaml"
    broken.write_text(shipped.read_text().replace("argument:", "arguments:", 1))
    assert schemas(broken, local).returncode != 0


def run(*command: object, **options: Any) -> str:
    """
    Run a command and return what it printed; its output is the failure's text.
    """
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return str(ended.stdout)


@pytest.fixture(scope="module")
def injected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    The directory that the operator mounts into a pod, made by the script that the image is made with.
    """
    folder = tmp_path_factory.mktemp("operator")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    target = folder / "otel-auto-instrumentation-python"
    run(DEPLOY / "operator/assemble.sh", target, wheel, env=os.environ | {"PYTHON": sys.executable})
    return target


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    A virtual environment as a service's image has it: FastAPI, httpx and uvicorn, and nothing of OpenTelemetry.
    """
    folder = tmp_path_factory.mktemp("application")
    run(sys.executable, "-m", "venv", folder / "venv")
    pins = re.findall(r"^[a-z0-9._-]+==[^ \\;]+", (ROOT / "requirements/dev.txt").read_text(), re.MULTILINE)
    (folder / "constraints.txt").write_text("\n".join(pins))
    install = (folder / "venv/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*install, "--constraint", folder / "constraints.txt", "fastapi", "httpx", "uvicorn")
    (folder / "main.py").write_text(MAIN)
    return folder


MAIN = """
import importlib.metadata
import logging
import fastapi
import typing_extensions
from fastapi import FastAPI

log = logging.getLogger("orders")
app = FastAPI()


@app.get("/orders/{number}")
async def order(number: int) -> list[str]:
    log.info("order %d", number)
    return [fastapi.__file__, typing_extensions.__file__]
"""


def python_path(injected: Path) -> str:
    """
    Return PYTHONPATH as the operator sets it in a container that has none of its own.
    """
    return f"{injected}/opentelemetry/instrumentation/auto_instrumentation{os.pathsep}{injected}"


@pytest.mark.needs("collector", "jaeger")
def test_a_plain_uvicorn_is_traced_by_the_operators_directory(
    machine: Machine, jaeger: Jaeger, collector: Collector, injected: Path, application: Path
) -> None:
    """
    `uvicorn main:app`, not started by opentelemetry-instrument, with nothing of ours installed, sends spans to a real collector.

    A wrong OTEL_PROPAGATORS is one line, as ADR 006 promises, and what the application has itself, it keeps.
    """
    spec = yaml.safe_load((DEPLOY / "operator/instrumentation.yaml").read_text())["spec"]
    given = {entry["name"]: entry["value"] for entry in spec["python"]["env"]}
    exports = collector.exports("orders") | given | {"OTEL_METRICS_EXPORTER": "none", "OTEL_TRACES_EXPORTER": "otlp"}
    exports |= {"OTEL_TRACES_SAMPLER": spec["sampler"]["type"], "OTEL_TRACES_SAMPLER_ARG": spec["sampler"]["argument"]}
    exports |= {"PYTHONPATH": python_path(injected), "OTEL_PROPAGATORS": "bogus"}
    port = str(machine.port())
    command: list[str | Path] = [application / "venv/bin/uvicorn", "main:app", "--port", port]
    service = machine.start("orders", command, exports, application)
    answer: httpx.Response = eventually(
        "the service",
        lambda: httpx.get(
            f"http://127.0.0.1:{port}/orders/7", headers={"x-request-id": "operator-2026-000123"}, trust_env=False
        ),
        while_running=[service],
    )
    assert answer.headers["x-request-id"] == "operator-2026-000123"
    assert all(path.startswith(str(application / "venv")) for path in answer.json())
    spans = eventually("the span", lambda: jaeger.search("orders", request_id="operator-2026-000123"))
    assert [(span.name, span.kind) for span in spans] == [("GET /orders/{number}", "server")]
    service.stop()
    lines = [json.loads(line) for line in service.log.read_text().splitlines()]
    assert [line["trace_id"] for line in lines if line["message"] == "order 7"]
    assert len([line for line in lines if "OTEL_PROPAGATORS='bogus'" in line["message"]]) == 1


def test_the_operators_directory_has_nothing_compiled_and_no_framework(injected: Path) -> None:
    """
    One directory serves every Python from 3.11 on, glibc and musl, and brings no FastAPI, httpx or gRPC of its own.
    """
    files = [path for path in injected.rglob("*") if path.is_file()]
    assert [path for path in files if path.suffix in (".so", ".pyd")] == []
    top = {path.name for path in injected.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"opentelemetry", "otel_correlation", "otel_correlation.pth", "fallback"}
    assert not {path.name for path in (injected / "fallback").iterdir()} & {"fastapi", "starlette", "httpx", "grpc"}
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in files)  # Another user than the one who copied reads it.


def test_a_program_without_fastapi_runs_as_before(injected: Path, tmp_path: Path) -> None:
    """
    A Python process of an injected pod that has no FastAPI runs as if nothing had been injected, after one line.
    """
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    assert untraced(tmp_path / "venv/bin/python", injected) == "FastAPI"


def untraced(python: Path, injected: Path) -> str:
    """
    Check that nothing of ours is on the interpreter's path, and return what it is said to want.
    """
    ended = subprocess.run(
        [python, "-c", "import sys; print([path for path in sys.path if 'otel-auto' in path])"],
        env={"PYTHONPATH": python_path(injected), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout) == (0, "[]\n"), ended.stderr
    said = re.fullmatch(r"otel-correlation: (.+) runs untraced, for want of (.+)\n", ended.stderr)
    assert said is not None, ended.stderr
    assert said[1] == str(python)
    return said[2]


def old_python() -> Path | None:
    """
    Return a Python before 3.11 that pyenv has here, if there is one.
    """
    if shutil.which("pyenv") is None:
        return None
    for version in run("pyenv", "versions", "--bare").split():
        if re.match(r"3\.([89]|10)\.", version):
            environ = os.environ | {"PYENV_VERSION": version}
            return Path(run("python3", "-c", "import sys; print(sys.executable)", env=environ).strip())
    return None


def test_an_old_python_runs_untraced_and_says_so(injected: Path) -> None:
    """
    Under a Python that we do not support the service starts as if nothing had been injected, after one line.
    """
    python = old_python()
    if python is None:
        pytest.skip("no Python before 3.11 on this machine")
    assert untraced(python, injected) == "Python 3.11"
