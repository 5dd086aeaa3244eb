"""
A store that cannot keep up: every queue on the way fills to its bound and no further, and the services, who count it, lose the rest.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.stack.conftest import MACHINE
from tests.stack.door import Door
from tests.stack.engines import Jaeger, Tier, rss_mib
from tests.stack.harness import Machine, eventually
from tests.stack.numbered import Numbered, stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.needs("collector", "jaeger")

RATE = 1600  # Spans a second that the service makes; the slow store manages half of it.
# What each queue holds. The router's is no smaller than the agent's: a batch that is larger than a queue never fits into it.
ITEMS = {"agent": 1000, "router": 2000, "sampler-0": 1000, "sampler-1": 1000}
MEMORY_MIB = 200
SERVICE_ITEMS = 1024
ENOUGH = 500  # Spans dropped by the service, which then are no accident of one moment.


@dataclass(slots=True)
class Tiers:
    """
    Agent, router, two samplers and a store behind a door.
    """

    machine: Machine
    agent: Tier
    router: Tier
    samplers: list[Tier]
    door: Door
    jaeger: Jaeger
    highest_mib: Counter[str] = field(default_factory=Counter)
    highest_queue: Counter[str] = field(default_factory=Counter)

    @property
    def collectors(self) -> list[Tier]:
        """
        Return every collector.
        """
        return [self.agent, self.router, *self.samplers]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """
        Remember the highest memory and the longest queue of each, looking five times a second.
        """
        over = threading.Event()

        def look() -> None:
            while not over.wait(0.2):
                for tier in self.collectors:
                    with contextlib.suppress(httpx.TransportError):
                        self.highest_queue[tier.name] = max(self.highest_queue[tier.name], int(tier.queued()))
                    self.highest_mib[tier.name] = max(self.highest_mib[tier.name], int(tier.rss_mib()))

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@pytest.fixture(scope="module")
def tiers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiers]:
    """
    All of it, with small queues.
    """
    machine = request.node.stash[MACHINE] = Machine(tmp_path_factory.mktemp("pressure"))
    jaeger = Jaeger(machine)
    door = f"127.0.0.1:{machine.port()}"

    def tier(file: str, name: str, **environment: str) -> Tier:
        sizes = {"COLLECTOR_QUEUE_ITEMS": str(ITEMS[name]), "COLLECTOR_MEMORY_MIB": str(MEMORY_MIB)}
        return Tier(machine, file, sizes | environment, name=name)

    sampling = {"SAMPLER_RATIO": "1.0", "SAMPLER_DECISION_WAIT": "1s", "SAMPLER_TRACES": "200"}
    samplers = [tier("sampler", f"sampler-{number}", JAEGER_OTLP_ENDPOINT=door, **sampling) for number in range(2)]
    addresses = ", ".join(sampler.grpc for sampler in samplers)
    router = tier("router", "router", ROUTER_SAMPLERS=f"[{addresses}]")
    agent = tier("agent", "agent", NEXT_OTLP_ENDPOINT=router.grpc)
    try:
        jaeger.start()
        for one in (*samplers, router, agent):
            one.start()
        with Door(door, jaeger.otlp) as opened:
            yield Tiers(machine, agent, router, samplers, opened, jaeger)
    finally:
        machine.clean_up()


def assert_pressure_reaches_the_service(tiers: Tiers, service: str, relieve: Callable[[], None]) -> None:
    """
    The service drops and counts; nothing else grows; what it did not drop is in Jaeger once the store is itself again.
    """
    environment = tiers.agent.exports(service) | {
        "OTEL_BSP_MAX_QUEUE_SIZE": str(SERVICE_ITEMS),
        "OTEL_LOGS_EXPORTER": "none",
    }
    before = tiers.agent.metrics().total("otelcol_receiver_refused_spans")
    load = Numbered.start(tiers.machine, RATE, environment)
    with tiers.watched():
        eventually("spans that the service drops", lambda: load.dropped() >= ENOUGH, while_running=[load.process])
        refused = tiers.agent.metrics().total("otelcol_receiver_refused_spans") - before
        service_mib = rss_mib(load.process)
        relieve()
        taken = load.exported()
        eventually("spans that the agent takes again", lambda: load.exported() > taken, while_running=[load.process])
        last = load.stop()
        expected = last["made"] - load.dropped()
        eventually(f"{expected} spans in Jaeger", lambda: len(stored(tiers.jaeger.query, service)) >= expected)
    assert refused > 0
    assert last["spans.retried"] > 0
    assert last["spans.exported"] == expected == len(stored(tiers.jaeger.query, service))
    assert service_mib < MEMORY_MIB
    assert tiers.highest_queue.keys() == tiers.highest_mib.keys() == ITEMS.keys()
    assert {name: longest for name, longest in tiers.highest_queue.items() if longest > ITEMS[name]} == {}
    assert {name: most for name, most in tiers.highest_mib.items() if most > MEMORY_MIB} == {}


def test_a_store_at_half_the_loads_speed(tiers: Tiers) -> None:
    """
    The queues of sampler, router and agent fill, the agent refuses, the service's own queue fills, and it counts what it drops.
    """
    tiers.door.spans_per_s = RATE / 2

    def relieve() -> None:
        tiers.door.spans_per_s = 0.0

    assert_pressure_reaches_the_service(tiers, "half-speed", relieve)


def test_a_store_that_hangs(tiers: Tiers) -> None:
    """
    The same while Jaeger is stopped in the middle of whatever it was doing, as a virtual machine is that is moved.
    """
    jaeger = tiers.jaeger.running().popen
    jaeger.send_signal(signal.SIGSTOP)
    assert_pressure_reaches_the_service(tiers, "hung", lambda: jaeger.send_signal(signal.SIGCONT))
