"""
Where every numbered span went while the parts of the real stack are killed under load, one at a time.

``python -m tests.stack.accounting`` prints the tables of docs/explanation/scale-out.md, with the shipped decision wait of 10 s
and pauses of 10 s (about a quarter of an hour); the test does the same with short ones.

A span is *sent* when the agent answered 2xx; until then the load offers the same batch again, as an SDK does. *Stored* is what
Jaeger returns for its trace at the end. *Twice* is what Jaeger acknowledged more than once, counted at its door (see door.py).
*Sampled out* is what the policies say of the trace: the load knows which of its traces fail, and computes the ratio's decision from
the trace id. *Lost* is what the policies keep and Jaeger has not.
"""

from __future__ import annotations

import argparse
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Self

import httpx
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.stack.door import Door
from tests.stack.engines import Engine, Jaeger, Kafka, Loki, Tier
from tests.stack.harness import Machine, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

SPANS: Final = 4  # Of each trace; half of them come a tick after the others, from another service.
TICK_S: Final = 0.05
Shape = Literal["gateway", "direct", "kafka"]
SHAPES: Final[tuple[Shape, ...]] = ("gateway", "direct", "kafka")
TOPIC: Final = "otlp_spans"
PARTITIONS: Final = 4
ON_MEMORY: Final = "otelcol_processor_tail_sampling_sampling_traces_on_memory"
GIVE_UP_S: Final = 120.0  # Without any progress; the longest pause between two attempts of anything here is 15 s.


@dataclass(frozen=True, slots=True)
class Row:
    """
    One line of a table.
    """

    what: str
    sent: int
    stored: int
    sampled_out: int
    lost: int
    twice: int
    refused: int  # Batches that the agent refused or did not answer, and that were offered again.
    logs_sent: int
    logs_lost: int
    why: str = ""

    def __post_init__(self) -> None:
        """
        Every span is in exactly one column, or the table says nothing.
        """
        assert self.sent == self.stored + self.sampled_out + self.lost, self


def table(title: str, rows: list[Row]) -> str:
    """
    Return the rows as Markdown.
    """
    lines = [
        f"### {title}",
        "",
        "| what | sent | stored | sampled out | **lost** | twice | refused | log records sent | lost | |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    lines += [
        f"| {row.what} | {row.sent} | {row.stored} | {row.sampled_out} | **{row.lost}** | {row.twice} | {row.refused} "
        f"| {row.logs_sent} | {row.logs_lost} | {row.why} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


@dataclass(slots=True)
class Load:
    """
    Numbered spans and log records, offered to ``agent`` at an even rate from entering to leaving, each batch until it is taken.
    """

    agent: str
    service: str
    traces_per_s: float
    ratio: float
    padding: int = 0  # Characters of an attribute, for a queue that has to fill.
    accepted: dict[bytes, float] = field(default_factory=dict)  # Span id, and when the 2xx came.
    kept: set[bytes] = field(default_factory=set)  # Of these, what the policies keep.
    traces: set[bytes] = field(default_factory=set)
    lines: set[str] = field(default_factory=set)
    refused: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _failure: BaseException | None = None

    def __enter__(self) -> Self:
        """
        Begin.
        """
        self._thread = threading.Thread(target=self._guarded, name=f"load of {self.service}")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """
        Return when the last batch was taken, too.
        """
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        if self._failure:
            raise self._failure

    def more(self, spans: int) -> None:
        """
        Return when this many more spans were taken.
        """
        goal = len(self.accepted) + spans
        eventually(f"{spans} more spans taken", lambda: len(self.accepted) >= goal or self._failure)

    def goes_on(self, seconds: float) -> None:
        """
        Let time pass under load.
        """
        self._stop.wait(seconds)

    def _guarded(self) -> None:
        try:
            self._run()
        except BaseException as failure:  # Told to the thread that waits.
            self._failure = failure

    def _run(self) -> None:
        number, late, due = 0, list[tuple[bytes, bytes, bool]](), 0.0
        with httpx.Client(trust_env=False, timeout=5, base_url=f"http://{self.agent}") as client:
            began = time.monotonic()
            while not self._stop.wait(max(0.0, began + due - time.monotonic())) or late:
                spans, late = late, []
                lines = list[tuple[str, bytes]]()
                fresh = 0 if self._stop.is_set() else round(self.traces_per_s * TICK_S) or 1
                due += TICK_S
                for _ in range(fresh):
                    number += 1
                    trace_id, fails = secrets.token_bytes(16), number % 50 == 0
                    members = [(trace_id, secrets.token_bytes(8), fails) for _ in range(SPANS)]
                    spans += members[: SPANS // 2]
                    late += members[SPANS // 2 :]
                    if number % 3 == 0:  # So that one answer of Loki's, of at most 5,000 lines, has them all.
                        lines.append((f"{self.service} record {number}", trace_id))
                self._offer(client, "/v1/traces", self._trace_request(spans).SerializeToString())
                now = time.time()
                for trace_id, span_id, fails in spans:
                    self.traces.add(trace_id)
                    self.accepted[span_id] = now
                    if fails or keeps(trace_id, self.ratio):
                        self.kept.add(span_id)
                self._offer(client, "/v1/logs", self._log_request(lines).SerializeToString())
                self.lines.update(line for line, _ in lines)

    def _offer(self, client: httpx.Client, path: str, body: bytes) -> None:
        began = time.monotonic()
        while time.monotonic() - began < GIVE_UP_S:
            try:
                answer = client.post(path, content=body, headers={"content-type": "application/x-protobuf"})
            except httpx.TransportError:
                self.refused += 1
            else:
                if answer.is_success:
                    return
                assert answer.status_code in (429, 503), (
                    answer.status_code,
                    answer.content,
                )  # What OTLP lets one try again.
                self.refused += 1
            time.sleep(TICK_S)  # The pace of trying again, nothing is waited for.
        raise AssertionError(f"the agent took nothing for {GIVE_UP_S:g} s")

    def _trace_request(self, spans: list[tuple[bytes, bytes, bool]]) -> ExportTraceServiceRequest:
        request = ExportTraceServiceRequest()
        group = request.resource_spans.add()
        group.resource.attributes.add(key="service.name").value.string_value = self.service
        scope = group.scope_spans.add()
        now = time.time_ns()
        for trace_id, span_id, fails in spans:
            span = scope.spans.add(trace_id=trace_id, span_id=span_id, name="numbered", kind=Span.SPAN_KIND_SERVER)
            span.start_time_unix_nano, span.end_time_unix_nano = now, now + 1_000_000
            if fails:
                span.status.code = Status.STATUS_CODE_ERROR
            if self.padding:
                span.attributes.add(key="padding").value.string_value = secrets.token_urlsafe(self.padding)
        return request

    def _log_request(self, lines: list[tuple[str, bytes]]) -> ExportLogsServiceRequest:
        request = ExportLogsServiceRequest()
        group = request.resource_logs.add()
        group.resource.attributes.add(key="service.name").value.string_value = self.service
        scope = group.scope_logs.add()
        for line, trace_id in lines:
            record = scope.log_records.add(time_unix_nano=time.time_ns(), trace_id=trace_id)
            record.body.string_value = line
        return request


def keeps(trace_id: bytes, ratio: float) -> bool:
    """
    Tell whether the rest's ratio keeps a trace without ``ot=rv``: its low 56 bits reach the threshold.
    """
    return int.from_bytes(trace_id[9:], "big") >= (1 << 56) - round(ratio * (1 << 56))


@dataclass(slots=True)
class Stack:
    """
    The shipped files, from an agent to Jaeger (behind the door) and Loki.

    ``gateway``: agent -> gateway. ``direct``: agent -> router -> two samplers. ``kafka``: agent -> router -> Kafka -> two samplers.
    """

    machine: Machine
    shape: Shape
    decision_wait_s: int = 2
    traces_per_s: float = 60
    ratio: float = 1.0
    pause_s: float = 1.0
    rows: list[Row] = field(default_factory=list)
    jaeger: Jaeger = field(init=False)
    loki: Loki = field(init=False)
    kafka: Kafka = field(init=False)
    door: Door = field(init=False)
    agent: Tier = field(init=False)
    router: Tier = field(init=False)  # Or the gateway.
    samplers: list[Tier] = field(init=False)  # Or, again, the gateway.

    def __post_init__(self) -> None:
        """
        Choose every address; nothing runs yet.
        """
        self.jaeger, self.loki, self.kafka = Jaeger(self.machine), Loki(self.machine), Kafka(self.machine)
        self.door = Door(f"127.0.0.1:{self.machine.port()}", self.jaeger.otlp)
        kafka = {"KAFKA_BROKERS": self.kafka.brokers, "KAFKA_TOPIC": TOPIC}
        routes = {"LOGS_OTLP_ENDPOINT": self.loki.otlp}
        decides = {
            "JAEGER_OTLP_ENDPOINT": self.door.endpoint,
            "SAMPLER_DECISION_WAIT": f"{self.decision_wait_s}s",
            "SAMPLER_RATIO": str(self.ratio),
        }
        if self.shape == "gateway":
            self.router = Tier(self.machine, "gateway", routes | decides)
            self.samplers = [self.router]
        else:
            prefix = "kafka-" if self.shape == "kafka" else ""
            names = [f"sampler-{number}" for number in range(2)]
            self.samplers = [
                Tier(self.machine, f"{prefix}sampler", kafka | decides | {"KAFKA_INSTANCE": name}, name=name)
                for name in names
            ]
            routes |= {"ROUTER_SAMPLERS": f"[{','.join(sampler.grpc for sampler in self.samplers)}]"}
            self.router = Tier(self.machine, f"{prefix}router", kafka | routes, name="router")
        self.agent = Tier(self.machine, "agent", {"NEXT_OTLP_ENDPOINT": self.router.grpc})

    @property
    def collectors(self) -> list[Tier]:
        """
        Return every collector once, those that receive before those that send.
        """
        return [*(sampler for sampler in self.samplers if sampler is not self.router), self.router, self.agent]

    @contextmanager
    def running(self) -> Generator[Self]:
        """
        Start all of it, the stores first; whoever made the machine cleans up.
        """
        with self.door:
            if self.shape == "kafka":
                self.kafka.start()
                self.kafka.create_topic(TOPIC, PARTITIONS)
            for engine in (self.jaeger, self.loki, *self.collectors):
                engine.start()
            yield self

    # -- one line of the table

    def case(
        self,
        what: str,
        fault: Callable[[Load], None],
        explain: Callable[[Load, set[bytes]], str] | None = None,
        *,
        padding: int = 0,
    ) -> Row:
        """
        Put the stack under load, do ``fault`` to it, go on, and say where every span went.
        """
        began = time.monotonic()
        service = f"case-{self.machine.port()}"
        load = Load(self.agent.http, service, self.traces_per_s, self.ratio, padding)
        repeated = self.door.again.total()
        with load:
            eventually(
                "the first spans at the store",
                lambda: sum(span_id in self.door.first for span_id in list(load.kept)) > 100,
            )
            fault(load)
            load.more(SPANS * 20)
        self._settle(load)
        stored, lines = self._stored(load), self._lines(load)
        lost = load.kept - stored
        twice = self.door.again.keys() & load.accepted.keys()
        notes = [explain(load, lost)] if lost and explain else []
        if earlier := self.door.again.total() - repeated - sum(self.door.again[span_id] for span_id in twice):
            notes.append(f"{earlier} spans of earlier rows came again, too")
        row = Row(
            what=what,
            sent=len(load.accepted),
            stored=len(stored),
            sampled_out=len(load.accepted.keys() - load.kept - stored),
            lost=len(lost),
            twice=len(twice),
            refused=load.refused,
            logs_sent=len(load.lines),
            logs_lost=len(load.lines - lines),
            why="; ".join(notes),
        )
        assert not stored - load.kept, f"{len(stored - load.kept)} spans stored that no policy keeps"
        self.rows.append(row)
        print(f"{time.monotonic() - began:6.1f} s  {row}", file=sys.stderr, flush=True)
        return row

    def _settle(self, load: Load) -> None:
        """
        Return when the store has everything, or when nothing moves any more though nobody holds anything.
        """
        # Whether a sampler holds traces it says at each tick of 1 s; what waits in Kafka for a reader says nothing.
        idle_s = GIVE_UP_S if self.shape == "kafka" else 3.0
        missing, moved, busy = -1, 0.0, 0.0
        while load.kept - self.door.first.keys():
            now, left = time.monotonic(), len(load.kept - self.door.first.keys())
            held = self._held()
            if left != missing:
                missing, moved, busy = left, now, now
            if held:
                busy = now
            if now - busy > idle_s or now - moved > GIVE_UP_S:
                return
            time.sleep(0.2)

    def _held(self) -> float:
        """
        Return how many items are in queues on disk, and how many undecided traces in the samplers' memory.
        """
        pages = [tier.metrics() for tier in self.collectors if tier.running().popen.poll() is None]
        return sum(page.total("otelcol_exporter_queue_size") + page.total(ON_MEMORY) for page in pages)

    def _stored(self, load: Load) -> set[bytes]:
        found = set[bytes]()
        with (
            httpx.Client(trust_env=False, timeout=30, base_url=f"http://{self.jaeger.query}") as client,
            ThreadPoolExecutor(4) as pool,
        ):
            for answer in pool.map(client.get, [f"/api/traces/{trace_id.hex()}" for trace_id in load.traces]):
                if answer.status_code != 404:
                    found |= {
                        bytes.fromhex(span["spanID"])
                        for trace in answer.raise_for_status().json()["data"]
                        for span in trace["spans"]
                    }
        return found & load.accepted.keys()

    def _lines(self, load: Load) -> set[str]:
        query, found = f'{{service_name="{load.service}"}}', set[str]()
        deadline = time.monotonic() + GIVE_UP_S
        while not load.lines <= found and time.monotonic() < deadline:
            found = {line for line, _ in self.loki.lines(query)}
            if not load.lines <= found and not self._held():  # Once more: the last may have left a queue in between.
                return {line for line, _ in self.loki.lines(query)}
            time.sleep(0.1)
        return found

    # -- what is done to it

    def killed(self, engine: Engine) -> Row:
        """
        Kill one part as ``kill -9`` does, and start it again after the pause.
        """
        return self.case(f"{engine.name} killed{self._at()}", lambda load: self._kill(engine, load))

    def sampler_killed(self, number: int) -> Row:
        """
        Kill a sampler that has no Kafka before it: what is lost was in its open window, or this fails.
        """
        moment = 0.0

        def fault(load: Load) -> None:
            nonlocal moment
            moment = time.time()
            self._kill(self.samplers[number], load)

        def explain(load: Load, lost: set[bytes]) -> str:
            sent = [moment - load.accepted[span_id] for span_id in lost]
            # From a span's 2xx to the store's: the decision wait, the sampler's tick of 1 s, and the batching of three queues.
            before = (span_id for span_id in load.kept if self.door.first.get(span_id, moment) < moment)
            age = max(self.door.first[span_id] - load.accepted[span_id] for span_id in before)
            assert min(sent) >= 0, f"lost, though sent {-min(sent):.1f} s after the kill"
            assert max(sent) <= age + 1, (
                f"lost, though sent {max(sent):.1f} s before the kill; others took {age:.1f} s at most"
            )
            return (
                f"its open window: all were sent {min(sent):.1f} to {max(sent):.1f} s before the kill "
                f"(to the store it took others up to {age:.1f} s)"
            )

        return self.case(f"{self.samplers[number].name} killed", fault, explain)

    def outage(self, seconds: float) -> Row:
        """
        Keep the store down, and kill and restart the agent inside.
        """

        def fault(load: Load) -> None:
            self.jaeger.kill()
            load.goes_on(seconds / 2)
            self._kill(self.agent, load)
            load.goes_on(max(0.0, seconds / 2 - self.pause_s))
            self.jaeger.start()

        return self.case(f"Jaeger down for {seconds:g} s, agent killed inside", fault)

    def slow(self, seconds: float) -> Row:
        """
        Let the store manage half of the load for a while.
        """

        def fault(load: Load) -> None:
            self.door.spans_per_s = self.traces_per_s * SPANS / 2
            load.goes_on(seconds)
            self.door.spans_per_s = 0

        return self.case(f"store at half the load's speed for {seconds:g} s", fault)

    def full_disk(self, *, killed: bool, room: bool) -> Row:
        """
        Let the agent's queue fill its disk while the router is away.

        With ``killed`` it dies there, and starts with more ``room`` or on the full disk.
        """
        what = "agent's disk full" + (", agent killed" if killed else "")
        what += {(True, True): ", given room, started", (True, False): ", started on the full disk"}.get(
            (killed, room), ""
        )

        def fault(load: Load) -> None:
            self.router.kill()
            refused = load.refused
            eventually("a full disk", lambda: load.refused > refused + 20)
            assert b"no space left on device" in self.agent.running().log.read_bytes()
            if killed:
                self.agent.kill()
                if room:
                    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
                self.agent.start()
            self.router.start()

        def explain(_: Load, lost: set[bytes]) -> str:
            assert (killed, room) == (True, False), f"{len(lost)} spans lost on a full disk that needed not be"
            said = self.agent.running().log.read_text()
            assert "Errors occurred while moving items" in said or "Error deleting item from queue" in said
            return "the queue needs room even for reading; its log says `no space left on device`, no counter does"

        home = self.agent.environment["COLLECTOR_QUEUE_DIR"]
        disk = Path(tempfile.mkdtemp(dir=self.machine.directory))
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", disk], check=True)
        try:
            self.agent.running().stop()
            self.agent.start(COLLECTOR_QUEUE_DIR=str(disk))
            return self.case(what, fault, explain, padding=500)
        finally:
            self.agent.kill()
            subprocess.run(["umount", disk], check=True)
            self.agent.start(COLLECTOR_QUEUE_DIR=home)

    def taken_over(self, number: int) -> Row:
        """
        Kill a sampler and leave it dead, until the other one has its partitions and has sent everything.
        """
        sampler = self.samplers[number]
        row = self.case(f"{sampler.name} killed, its partitions taken over", lambda _: sampler.kill())
        sampler.start()
        return row

    def restart_samplers(self, **environment: str) -> None:
        """
        Stop the samplers in order and start them with another environment.
        """
        self.ratio = float(environment.get("SAMPLER_RATIO", self.ratio))
        for sampler in self.samplers:
            sampler.running().stop()
            sampler.start(**environment)

    def _at(self) -> str:
        return f", SAMPLER_RATIO={self.ratio}" if self.ratio < 1 else ""

    def _kill(self, engine: Engine, load: Load) -> None:
        engine.kill()
        load.goes_on(self.pause_s)
        engine.start()


def can_mount() -> bool:
    """
    Tell whether a small file system can be mounted here, for a disk that is full.
    """
    with tempfile.TemporaryDirectory() as directory:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], capture_output=True, check=False)
        if mounted.returncode == 0:
            subprocess.run(["umount", directory], check=True)
        return mounted.returncode == 0


def direct(stack: Stack, *, outage_s: float) -> None:
    """
    Do everything to the stack with samplers and without Kafka.
    """
    for engine in (stack.agent, stack.router, stack.jaeger, stack.loki):
        stack.killed(engine)
    for number in range(len(stack.samplers)):
        stack.sampler_killed(number)
    stack.outage(outage_s)
    stack.slow(outage_s)


def full_disk(stack: Stack) -> None:
    """
    Fill the agent's disk: nothing is lost, even where it is killed then, provided that it starts with more room.
    """
    stack.full_disk(killed=False, room=False)
    stack.full_disk(killed=True, room=True)


def through_kafka(stack: Stack) -> None:
    """
    Do to the stack with Kafka what is different there; the last row is with a ratio.

    A trace is whole on one sampler because all of its messages, the late ones and a killed router's, are in one partition.
    """
    stack.killed(stack.router)
    found = stack.kafka.partitions(TOPIC)
    split = [trace_id for trace_id, partitions in found.items() if len(partitions) != 1]
    assert not split, f"{len(split)} of {len(found)} traces are in more than one partition"
    assert {number for partitions in found.values() for number in partitions} == {*range(PARTITIONS)}
    for engine in (stack.kafka, *stack.samplers, stack.jaeger):
        stack.killed(engine)
    stack.restart_samplers(SAMPLER_RATIO="0.25")
    stack.killed(stack.samplers[0])


def main() -> None:
    """
    Print the tables.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pause", type=float, default=10, help="seconds from a kill to the restart (10)")
    parser.add_argument("--outage", type=float, default=60, help="seconds that the store is down, and slow (60)")
    parser.add_argument("--decision-wait", type=int, default=10, help="SAMPLER_DECISION_WAIT in seconds (10)")
    parser.add_argument("--traces", type=float, default=60, help=f"traces a second, of {SPANS} spans (60)")
    parser.add_argument("--only", choices=SHAPES, help="one of the tables")
    given = parser.parse_args()
    for shape in [given.only] if given.only else SHAPES:
        with tempfile.TemporaryDirectory() as directory:
            machine = Machine(Path(directory))
            stack = Stack(machine, shape, given.decision_wait, given.traces, pause_s=given.pause)
            try:
                with stack.running():
                    everything(stack, given.outage)
            finally:
                machine.clean_up()
                print(table(shape, stack.rows), flush=True)


def everything(stack: Stack, outage_s: float) -> None:
    """
    Make all rows that a shape has.
    """
    if stack.shape == "gateway":
        stack.killed(stack.agent)
        stack.sampler_killed(0)
        stack.outage(outage_s)
    elif stack.shape == "kafka":
        through_kafka(stack)
        stack.restart_samplers(SAMPLER_RATIO="1.0", KAFKA_SESSION_TIMEOUT="10s")
        stack.taken_over(1)
    else:
        direct(stack, outage_s=outage_s)
        if can_mount():
            full_disk(stack)
            stack.full_disk(killed=True, room=False)
        else:
            print("No rows of a full disk: a small file system cannot be mounted here.")


if __name__ == "__main__":
    main()
