"""
Whose ids the ticks of a scheduler have: those of the request that armed it once, and nobody's when it is armed again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import DEADLINE_S, Service, clean_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.slow

RID = "order-7781-customer-quote"
NOBODY = [None, None]


@pytest.fixture(scope="module")
def sink() -> Iterator[OtlpSink]:
    """
    Where spans arrive.
    """
    with OtlpSink() as found:
        yield found


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, sink: OtlpSink
) -> Iterator[Service]:
    """
    The application as users start it, on both kinds of event loop.
    """
    directory = tmp_path_factory.mktemp(request.param)
    (directory / "main.py").write_text((Path(__file__).parent / "scheduler_app.py").read_text())
    environment = clean_environment(
        OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint, OTEL_BSP_SCHEDULE_DELAY="50", OTEL_CORRELATION_LOG_FORMAT="json"
    )
    command = ("opentelemetry-instrument", "uvicorn", "main:app", "--port", "{port}", "--loop", request.param)
    with Service(command, directory, environment) as found:
        yield found


def ask(service: Service, path: str) -> Any:
    """
    Return the answer to a request that brings its id.
    """
    return httpx.get(f"{service.url}{path}", headers={"X-Request-ID": RID}, timeout=DEADLINE_S).json()


def seen(service: Service, wanted: Callable[[dict[str, list[Any]]], bool]) -> dict[str, list[Any]]:
    """
    Return the ids of every tick so far, once there are those that the test waits for.
    """
    deadline = time.monotonic() + DEADLINE_S
    found: dict[str, list[Any]]
    while not wanted(found := httpx.get(f"{service.url}/seen", timeout=DEADLINE_S).json()):
        assert time.monotonic() < deadline, {name: ticks[-3:] for name, ticks in found.items()}
        time.sleep(0.02)
    return found


def more(before: dict[str, list[Any]], names: tuple[str, ...], count: int) -> Callable[[dict[str, list[Any]]], bool]:
    """
    Ask for so many more ticks of each of these names.
    """
    return lambda found: all(len(found.get(name, ())) >= len(before.get(name, ())) + count for name in names)


def test_a_job_that_a_request_adds_does_not_make_the_scheduler_its_own(service: Service, sink: OtlpSink) -> None:
    """
    APScheduler's ticks have no ids after a request added jobs: no lines, no spans, no calls; the added job has.
    """
    before = seen(service, lambda found: len(found.get("tick", ())) > 2)
    ask(service, "/remind")
    found = seen(service, more({**before, "called": []}, ("tick", "beside", "called"), 10))
    (rid, trace), *others = found["remind"]
    assert (rid, others) == (RID, [])
    # A tick that was due in that very moment may have been run by the wake-up that the request asked for.
    assert found["tick"][-3:] == [NOBODY] * 3
    assert {rid for rid, _ in found["called"][-3:]}.isdisjoint({RID})
    assert {called for _, called in found["called"][-3:]}.isdisjoint({trace})
    assert found["beside"] == [NOBODY] * len(found["beside"])
    assert sink.wait(lambda: len([span for span in sink.spans if span.name == "tick"]) > 10)
    spans = [span for span in list(sink.spans) if span.name == "tick"][-3:]
    assert [(span.trace_id == trace, "request_id" in span.attributes) for span in spans] == [(False, False)] * 3
    lines = [json.loads(line) for line in service.stdout().splitlines() if line.startswith("{") and '"tick"' in line]
    assert {"request_id", "trace_id"}.isdisjoint(lines[-1])


def test_chains_of_timers(service: Service) -> None:
    """
    The first tick of a chain is its request's; what arms itself again after that has no ids, by every kind of timer.
    """
    names = ("call_later", "call_at", "call_soon_threadsafe", "task", "Timer")
    before = seen(service, lambda _: True)
    ask(service, "/chains")
    found = seen(service, more(before, names, 8))
    for name in names:
        ticks = found[name][len(before.get(name, ())) :]
        assert ticks[0][0] == RID, name
        assert ticks[-3:] == [NOBODY] * 3, name


def test_what_is_armed_once_belongs_to_its_request(service: Service) -> None:
    """
    A reminder, a timer of a background task, a task that runs on after the response and what it arms once have its ids.
    """
    before = seen(service, lambda _: True)
    ask(service, "/once")
    names = ("background", "after", "after, armed once")
    found = seen(service, more(before, names, 1))
    assert {found[name][-1][0] for name in names} == {RID}

    def reminded(found: dict[str, list[Any]]) -> bool:
        new = [found.get(name, [])[len(before.get(name, ())) :] for name in ("call_later", "Timer")]
        return all(any(rid == RID for rid, _ in ticks) for ticks in new)

    seen(service, reminded)


def test_what_a_request_starts_for_the_service_is_nobodys(service: Service) -> None:
    """
    A refresher that the first request starts inside of ``detached()`` has no ids, not even in its first turn.
    """
    ask(service, "/lazy")
    found = seen(service, lambda found: len(found.get("lazy", ())) > 3)
    assert found["lazy"] == [NOBODY] * len(found["lazy"])
