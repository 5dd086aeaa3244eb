"""
Every span of a load is accounted for while the parts of the stack are killed under it, one at a time.

The stacks run side by side, because most of the time each waits for its own next attempt. ``python -m tests.stack.accounting``
does the same with the shipped decision wait and longer pauses.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.stack import accounting
from tests.stack.accounting import Row, Shape, Stack
from tests.stack.conftest import MACHINE
from tests.stack.harness import Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.needs("collector", "jaeger", "loki")


def kills(stack: Stack) -> None:
    """
    Kill the parts that the other scenarios do not.
    """
    for engine in (stack.agent, stack.router, stack.loki):
        stack.killed(engine)
    for number in range(len(stack.samplers)):
        stack.sampler_killed(number)


def disk(stack: Stack) -> None:
    """
    Fill the agent's disk, where there can be a small one.
    """
    if accounting.can_mount():
        accounting.full_disk(stack)


def gateway_and_store(stack: Stack) -> None:
    """
    Kill the gateway; keep the store away, and then slow, for as short as a test can.
    """
    stack.sampler_killed(0)
    stack.outage(4)
    stack.slow(4)


SCENARIOS: dict[str, tuple[Shape, Callable[[Stack], object]]] = {
    "without_kafka": ("direct", kills),
    "full_disk": ("direct", disk),
    "with_kafka": ("kafka", accounting.through_kafka),
    "gateway": ("gateway", gateway_and_store),
}


@pytest.fixture(scope="module")
def rows(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[list[Row]]]]:
    """
    The rows of each scenario that a selected test asks for, while they come.
    """
    everything = request.node.stash[MACHINE] = Machine(tmp_path_factory.mktemp("accounting"))
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    asked = {name for item in items if not item.get_closest_marker("skip") for name in item.fixturenames}

    def run(name: str) -> list[Row]:
        directory = everything.directory / name
        directory.mkdir()
        shape, scenario = SCENARIOS[name]
        stack = Stack(Machine(directory, everything.processes, everything.ports), shape)
        with stack.running():
            scenario(stack)
        print(accounting.table(name, stack.rows))
        return stack.rows

    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        yield {name: pool.submit(run, name) for name in SCENARIOS.keys() & asked}
    everything.clean_up()


@pytest.fixture(scope="module")
def without_kafka(rows: dict[str, Future[list[Row]]]) -> list[Row]:
    """
    The rows of the stack without Kafka.
    """
    return rows["without_kafka"].result()


@pytest.fixture(scope="module")
def full_disk(rows: dict[str, Future[list[Row]]]) -> list[Row]:
    """
    The rows of the full disk.
    """
    return rows["full_disk"].result()


@pytest.fixture(scope="module")
def with_kafka(rows: dict[str, Future[list[Row]]]) -> list[Row]:
    """
    The rows of the stack with Kafka.
    """
    return rows["with_kafka"].result()


@pytest.fixture(scope="module")
def gateway(rows: dict[str, Future[list[Row]]]) -> list[Row]:
    """
    The rows of one gateway.
    """
    return rows["gateway"].result()


def test_a_killed_gateway_loses_its_open_window_and_an_outage_of_the_store_nothing(gateway: list[Row]) -> None:
    """
    One gateway holds undecided traces as a sampler does, and nothing else that a kill or a store could take.
    """
    assert [bool(row.lost) for row in gateway] == [True, False, False]
    assert [row.logs_lost for row in gateway] == [0, 0, 0]


def test_without_kafka_only_the_open_window_of_a_killed_sampler_is_lost(without_kafka: list[Row]) -> None:
    """
    Whichever part is killed, every span and log record is stored, but for a dead sampler's undecided ones.

    That those were sent within the decision wait before the kill is held where the row is made.
    """
    samplers = [row for row in without_kafka if row.what.startswith("sampler")]
    assert len(samplers) == 2
    assert all(row.lost for row in samplers), "a kill under load that loses nothing was no kill under load"
    assert [row for row in without_kafka if row.lost and row not in samplers] == []
    assert [row for row in without_kafka if row.logs_lost] == []


def test_a_full_disk_is_refused_to_the_senders_and_loses_nothing(full_disk: list[Row]) -> None:
    """
    An agent whose queue has no disk left answers that it cannot, and gives up nothing that it took, killed or not.
    """
    if not full_disk:
        pytest.skip("needs a small file system of its own: run as root where `mount -t tmpfs` is allowed")
    assert [row.lost for row in full_disk] == [0, 0]
    assert [row for row in full_disk if row.logs_lost or not row.refused] == []


@pytest.mark.needs("kafka")
def test_with_kafka_nothing_is_lost_whichever_part_is_killed(with_kafka: list[Row]) -> None:
    """
    A killed sampler reads its open window again, and with a ratio every span is stored or was decided against.
    """
    assert [row for row in with_kafka if row.lost or row.logs_lost] == []
    assert 0 < with_kafka[-1].sampled_out < with_kafka[-1].sent
