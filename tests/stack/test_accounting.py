"""
Every span of a load is accounted for while the parts of the stack are killed under it, one at a time.

The two stacks run side by side, because most of the time they wait for one another's attempts. ``python -m tests.stack.accounting``
does the same with the shipped decision wait and longer pauses.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.stack import accounting
from tests.stack.accounting import Row, Stack
from tests.stack.conftest import MACHINE
from tests.stack.harness import Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.needs("collector", "jaeger", "loki")


def direct(stack: Stack) -> None:
    """
    Without Kafka, with an outage short enough for a test.
    """
    accounting.direct(stack, outage_s=4)
    if accounting.can_mount():
        accounting.full_disk(stack)


SCENARIOS: dict[str, Callable[[Stack], None]] = {"without_kafka": direct, "with_kafka": accounting.through_kafka}


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
        stack = Stack(Machine(directory, everything.processes, everything.ports), name == "with_kafka")
        with stack.running():
            SCENARIOS[name](stack)
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
def with_kafka(rows: dict[str, Future[list[Row]]]) -> list[Row]:
    """
    The rows of the stack with Kafka.
    """
    return rows["with_kafka"].result()


def test_without_kafka_only_the_open_window_of_a_killed_sampler_is_lost(without_kafka: list[Row]) -> None:
    """
    Whichever part is killed, away or slow, every span and log record is stored, but for a dead sampler's undecided ones.

    That those were sent within the decision wait before the kill is held where the row is made.
    """
    samplers = [row for row in without_kafka if row.what.startswith("sampler")]
    assert len(samplers) == 2
    assert all(row.lost for row in samplers), "a kill under load that loses nothing was no kill under load"
    assert [row for row in without_kafka if row.lost and row not in samplers] == []
    assert [row for row in without_kafka if row.logs_lost] == []


def test_a_full_disk_is_refused_to_the_senders_and_loses_nothing(without_kafka: list[Row]) -> None:
    """
    An agent whose queue has no disk left answers that it cannot, and gives up nothing that it took, killed or not.
    """
    rows = [row for row in without_kafka if "disk full" in row.what]
    if not rows:
        pytest.skip("needs a small file system of its own: run as root where `mount -t tmpfs` is allowed")
    assert [row.lost for row in rows] == [0, 0]
    assert all(row.refused for row in rows)


@pytest.mark.needs("kafka")
def test_with_kafka_nothing_is_lost_whichever_part_is_killed(with_kafka: list[Row]) -> None:
    """
    A killed sampler reads its open window again, and with a ratio every span is stored or was decided against.
    """
    assert [row for row in with_kafka if row.lost or row.logs_lost] == []
    assert 0 < with_kafka[-1].sampled_out < with_kafka[-1].sent
