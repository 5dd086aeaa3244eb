"""
The real engines of the whole path, each with the shipped configuration: collector tiers, Kafka, Jaeger on disk, Loki, Tempo.

Each chooses its ports and directories once, so that it can be killed and started again as the same one.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.stack import build, harness, kafka
from tests.stack.harness import CONFIGS, DEADLINE_S, Machine, Process, eventually, exports, get

if TYPE_CHECKING:
    from collections.abc import Sequence

# Files that the collector with Kafka's receiver reads; everything else is the other one's.
WITH_KAFKA_RECEIVER: Final = ("kafka-sampler",)
# How a file wants its collector started stands at its top.
_GATES: Final = re.compile(r"^# .*(--feature-gates=[+\w.,-]*\w)", re.MULTILINE)
CLUSTER_ID: Final = "MkU3OEVBNTcwNTJENDM2Qk"  # Any will do.
LOG4J: Final = kafka.SOURCE / "log4j2.properties"
_SAMPLE: Final = re.compile(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)")
_LABEL: Final = re.compile(r'([\w.]+)="((?:[^"\\]|\\.)*)"')


@dataclass(slots=True)
class Engine:
    """
    One server that is started, killed and started again: same ports, same directory, one log per start.
    """

    machine: Machine
    name: str
    environment: dict[str, str] = field(default_factory=dict)
    process: Process | None = None

    def __post_init__(self) -> None:
        """
        Choose the ports and the directory.
        """

    @property
    def directory(self) -> Path:
        """
        Return where it keeps its data.
        """
        return self.machine.directory / self.name

    def port(self) -> str:
        """
        Return a free port as text.
        """
        return str(self.machine.port())

    def address(self) -> str:
        """
        Return a free port on loopback, with the address.
        """
        return f"127.0.0.1:{self.machine.port()}"

    def command(self) -> list[str]:
        """
        Return how it is started.
        """
        raise NotImplementedError

    def healthy(self) -> bool:
        """
        Tell whether it is ready for its users; a refused connection counts as not yet.
        """
        raise NotImplementedError

    def start(self, **environment: str) -> Process:
        """
        Start it and return when it is ready; what is given adds to its environment, now and later.
        """
        self.launch(**environment)
        return self.wait()

    def wait(self) -> Process:
        """
        Return when it is ready.
        """
        process = self.running()
        eventually(self.name, self.healthy, while_running=[process])
        return process

    def launch(self, **environment: str) -> Process:
        """
        Start it and return at once, so that others start beside it; ``wait`` for it later.
        """
        assert self.process is None or self.process.popen.poll() is not None, f"{self.name} is still running"
        self.environment |= environment
        self.directory.mkdir(exist_ok=True)
        self.process = self.machine.start(self.name, self.command(), self.environment, self.machine.directory)
        return self.process

    def running(self) -> Process:
        """
        Return its process.
        """
        assert self.process is not None, f"{self.name} was never started"
        return self.process

    def kill(self) -> None:
        """
        End it as ``kill -9`` does, with no chance to write anything.
        """
        self.running().clean_up()

    def rss_mib(self) -> float:
        """
        Return its resident memory in MiB.
        """
        return rss_mib(self.running())


def rss_mib(process: Process) -> float:
    """
    Return a process's resident memory in MiB.
    """
    lines = Path(f"/proc/{process.popen.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


@dataclass(slots=True)
class Metrics:
    """
    One scrape of a Prometheus page.
    """

    samples: list[tuple[str, dict[str, str], float]]

    def total(self, name: str, **labels: str) -> float:
        """
        Return the sum over the samples of this name (with or without ``_total``) with these labels; 0 where there is none.
        """
        return sum(
            value
            for found, has, value in self.samples
            if found.removesuffix("_total") == name and labels.items() <= has.items()
        )

    def names(self) -> list[str]:
        """
        Return the names on the page, sorted.
        """
        return sorted({name for name, _, _ in self.samples})


def scrape(address: str) -> Metrics:
    """
    Return what a Prometheus server would read at ``address`` now.
    """
    lines = get(f"http://{address}/metrics").raise_for_status().text.splitlines()
    samples = (_SAMPLE.fullmatch(line) for line in lines if not line.startswith("#"))
    return Metrics([(m[1], dict(_LABEL.findall(m[2] or "")), float(m[3])) for m in samples if m])


@dataclass(slots=True)
class Tier(Engine):
    """
    One collector with a shipped file: ``Tier(machine, "agent")``; ``name`` tells two of the same file apart.

    ``overlays`` are further shipped files, given after it. The queue's directory, the health, OTLP and metrics ports are its
    own; everything else comes from ``environment``.
    """

    file: str = ""
    overlays: Sequence[str] = ()
    grpc: str = ""
    http: str = ""
    metrics_address: str = ""
    health: str = ""

    def __init__(
        self,
        machine: Machine,
        file: str,
        environment: dict[str, str] | None = None,
        *,
        name: str | None = None,
        overlays: Sequence[str] = (),
    ) -> None:
        """
        Choose the ports; nothing runs yet.
        """
        self.file, self.overlays = file, overlays
        Engine.__init__(self, machine, name or file, dict(environment or {}))

    def __post_init__(self) -> None:
        """
        Choose the ports once.
        """
        self.grpc, self.http, self.health = self.address(), self.address(), self.address()
        port = self.port()
        self.metrics_address = f"127.0.0.1:{port}"
        self.environment = {
            "COLLECTOR_GRPC_ENDPOINT": self.grpc,
            "COLLECTOR_HTTP_ENDPOINT": self.http,
            "COLLECTOR_HEALTH_ENDPOINT": self.health,
            "COLLECTOR_QUEUE_DIR": str(self.directory),
            "COLLECTOR_METRICS_PORT": port,
            "COLLECTOR_METRICS_LEVEL": "normal",
            "METRICS_ENDPOINT": self.address(),
        } | self.environment

    def command(self) -> list[str]:
        """
        Return the collector with its file and the overlays.
        """
        tool = build.KAFKA_COLLECTOR if self.file in WITH_KAFKA_RECEIVER else build.COLLECTOR
        files = [CONFIGS / f"{name}.yaml" for name in (self.file, *self.overlays)]
        return [str(build.ensure(tool)), *_GATES.findall(files[0].read_text()), *(f"--config={file}" for file in files)]

    def healthy(self) -> bool:
        """
        Tell whether its pipelines run.
        """
        return get(f"http://{self.health}/").status_code == 200

    def metrics(self) -> Metrics:
        """
        Return its own metrics (queue sizes, accepted, refused, failed).
        """
        return scrape(self.metrics_address)

    def queued(self) -> float:
        """
        Return how many items wait in all of its sending queues.
        """
        return self.metrics().total("otelcol_exporter_queue_size")

    def exports(self, service: str, protocol: str = "http/protobuf") -> dict[str, str]:
        """
        Return what a service's environment needs to send here.
        """
        return exports(service, protocol, self.grpc if protocol == "grpc" else self.http)


@dataclass(slots=True)
class Jaeger(Engine):
    """
    Jaeger on disk (jaeger.yaml and jaeger-badger.yaml), so that a kill forgets nothing; asked like ``harness.Jaeger``.
    """

    name: str = "jaeger"
    otlp: str = ""
    query: str = ""
    asked: harness.Jaeger = field(init=False)

    def __post_init__(self) -> None:
        """
        Take the ports that the other Jaeger chose.
        """
        self.asked = harness.Jaeger(self.machine)
        self.otlp, self.query = self.asked.otlp, self.asked.query
        self.environment = self.asked.environment | {"JAEGER_DATA_DIR": str(self.directory)} | self.environment

    def command(self) -> list[str]:
        """
        Return Jaeger with both files.
        """
        files = [f"--config={CONFIGS / name}" for name in ("jaeger.yaml", "jaeger-badger.yaml")]
        return [str(build.ensure(build.JAEGER)), *files]

    def healthy(self) -> bool:
        """
        Tell whether all parts of it run.
        """
        return get(f"http://{self.environment['JAEGER_HEALTH_ENDPOINT']}/status").status_code == 200


@dataclass(slots=True)
class Loki(Engine):
    """
    Loki with the shipped configuration, asked in LogQL.
    """

    name: str = "loki"
    http: str = ""

    def __post_init__(self) -> None:
        """
        Choose the ports once.
        """
        port = self.port()
        self.http = f"127.0.0.1:{port}"
        self.environment = {
            "LOKI_HTTP_PORT": port,
            "LOKI_GRPC_PORT": self.port(),
            "LOKI_DATA_DIR": str(self.directory),
        } | self.environment

    @property
    def otlp(self) -> str:
        """
        Return the address for ``LOGS_OTLP_ENDPOINT``.
        """
        return f"http://{self.http}/otlp"

    def command(self) -> list[str]:
        """
        Return Loki with its file.
        """
        return [str(build.ensure(build.LOKI)), f"-config.file={CONFIGS / 'loki.yaml'}", "-config.expand-env=true"]

    def healthy(self) -> bool:
        """
        Tell whether it takes records.
        """
        return get(f"http://{self.http}/ready").status_code == 200

    def lines(self, query: str, *, limit: int = 5000) -> list[tuple[str, dict[str, str]]]:
        """
        Return the text and the labels (structured metadata included) of the last hour's records that the LogQL selects.
        """
        now = time.time_ns()
        parameters = {"query": query, "limit": str(limit), "start": str(now - 3600 * 10**9), "end": str(now + 10**9)}
        answer = get(f"http://{self.http}/loki/api/v1/query_range", parameters=parameters).raise_for_status()
        return [
            (entry[1], stream["stream"]) for stream in answer.json()["data"]["result"] for entry in stream["values"]
        ]


@dataclass(slots=True)
class Tempo(Engine):
    """
    The Tempo that ``TEMPO_BIN`` names, with the shipped configuration.
    """

    name: str = "tempo"
    otlp: str = ""
    http: str = ""

    def __post_init__(self) -> None:
        """
        Choose the ports once.
        """
        port = self.port()
        self.http, self.otlp = f"127.0.0.1:{port}", self.address()
        self.environment = {
            "TEMPO_HTTP_PORT": port,
            "TEMPO_OTLP_ENDPOINT": self.otlp,
            "TEMPO_GRPC_PORT": self.port(),
            "TEMPO_GOSSIP_PORT": self.port(),
            "TEMPO_DATA_DIR": str(self.directory),
        } | self.environment

    def command(self) -> list[str]:
        """
        Return Tempo with its file.
        """
        file = f"-config.file={CONFIGS / 'tempo.yaml'}"
        return [os.environ["TEMPO_BIN"], "-target=all", file, "-config.expand-env=true"]

    def healthy(self) -> bool:
        """
        Tell whether it takes spans.
        """
        return get(f"http://{self.http}/ready").status_code == 200

    def trace(self, trace_id: str) -> dict[str, Any] | None:
        """
        Return the trace in OTLP's JSON, or None.
        """
        answer = get(f"http://{self.http}/api/traces/{trace_id}", headers={"Accept": "application/json"})
        if answer.status_code == 404:
            return None
        found: dict[str, Any] = answer.raise_for_status().json()
        return found

    def search(self, query: str) -> list[str]:
        """
        Return the ids of the traces that the TraceQL selects.
        """
        answer = get(f"http://{self.http}/api/search", parameters={"q": query}).raise_for_status()
        return [trace["traceID"].rjust(32, "0") for trace in answer.json()["traces"]]


@dataclass(slots=True)
class Kafka(Engine):
    """
    One Kafka broker that is its own controller (KRaft).
    """

    name: str = "kafka"
    broker: str = ""
    memory_mib: int = 384

    def __post_init__(self) -> None:
        """
        Choose the ports once.
        """
        self.broker = self.address()

    @property
    def brokers(self) -> str:
        """
        Return the value for ``KAFKA_BROKERS``.
        """
        return f"[{self.broker}]"

    def command(self) -> list[str]:
        """
        Return the broker, its storage formatted before the first start.
        """
        properties = self.directory / "server.properties"
        if not properties.exists():
            controller = self.address()
            properties.write_text(
                "process.roles=broker,controller\nnode.id=1\n"
                f"listeners=PLAINTEXT://{self.broker},CONTROLLER://{controller}\n"
                f"advertised.listeners=PLAINTEXT://{self.broker}\n"
                f"controller.quorum.voters=1@{controller}\ncontroller.listener.names=CONTROLLER\n"
                f"log.dirs={self.directory / 'data'}\n"
                "offsets.topic.replication.factor=1\noffsets.topic.num.partitions=1\n"
                "transaction.state.log.replication.factor=1\ntransaction.state.log.min.isr=1\n"
                "group.initial.rebalance.delay.ms=0\nauto.create.topics.enable=false\n"
                # A broker that was killed is let in again when its old session has ended; the default is 9 s.
                "broker.session.timeout.ms=2000\nbroker.heartbeat.interval.ms=500\n"
            )
            self._tool("kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(properties))
        heap = f"-Xmx{self.memory_mib}m"
        return [*self._java(heap, "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"), "kafka.Kafka", str(properties)]

    def healthy(self) -> bool:
        """
        Tell whether the broker has said that it is up, and answers.
        """
        return "Kafka Server started" in self.running().log.read_text(errors="replace")

    def create_topic(self, topic: str, partitions: int) -> None:
        """
        Make a topic of this many partitions.
        """
        self._admin("TopicCommand", "--create", "--topic", topic, "--partitions", str(partitions))

    def offsets(self, topic: str) -> dict[int, int]:
        """
        Return the end offset of each partition: how many messages were ever written.
        """
        lines = self._admin("GetOffsetShell", "--topic", topic).splitlines()
        return {int(line.split(":")[1]): int(line.split(":")[2]) for line in lines if line.startswith(topic)}

    def partitions(self, topic: str) -> dict[str, set[int]]:
        """
        Return, per key, the partitions that have a message of it.
        """
        shown = (f"--property=print.{what}" for what in ("partition=true", "key=true", "value=false"))
        wanted = ("--from-beginning", f"--max-messages={sum(self.offsets(topic).values())}", *shown)
        found: dict[str, set[int]] = {}
        for line in self._admin("consumer.ConsoleConsumer", "--topic", topic, *wanted).splitlines():
            if line.startswith("Partition:"):
                partition, key = line.removeprefix("Partition:").split("\t")
                found.setdefault(key, set()).add(int(partition))
        return found

    def lag(self, group: str) -> dict[int, int]:
        """
        Return, per partition, how many messages the group has not committed; all of them where it never committed one.
        """
        rows = [
            line.split()
            for line in self._admin("consumer.group.ConsumerGroupCommand", "--describe", "--group", group).splitlines()
            if line.startswith(group)
        ]  # GROUP TOPIC PARTITION CURRENT-OFFSET LOG-END-OFFSET LAG CONSUMER-ID HOST CLIENT-ID
        return {int(row[2]): int(row[4]) - (0 if row[3] == "-" else int(row[3])) for row in rows if row[4] != "-"}

    def _admin(self, tool: str, *arguments: str) -> str:
        return self._tool(f"org.apache.kafka.tools.{tool}", "--bootstrap-server", self.broker, *arguments)

    def _java(self, *options: str) -> list[str]:
        return [kafka.java(), *options, f"-Dlog4j2.configurationFile={LOG4J}", "-cp", f"{kafka.ensure()}/*"]

    def _tool(self, main: str, *arguments: str) -> str:
        command = [*self._java("-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"), main, *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
        assert ended.returncode == 0, f"{main}: {ended.stdout}{ended.stderr}"
        return ended.stdout
