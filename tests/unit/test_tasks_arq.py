"""
arq: what a job carries, byte for byte, and the order of the worker's hooks; with a worker that is not there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import pickle
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import SpanKind, StatusCode

from otel_correlation import guard, request_id, work
from otel_correlation.tasks import arq, carriers
from tests.contract.wire import wired

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext

    from tests.contract.wire import Wire

JOB: dict[str, Any] = {"t": None, "f": "greet", "a": ("ada",), "k": {}, "et": 1}
RESULT = {**JOB, "s": True, "r": 7}


@dataclasses.dataclass
class Function:
    """
    arq's, as far as it matters; a cron job has the same two.
    """

    name: str
    coroutine: Any


class RetryError(RuntimeError):
    """
    How a job asks for another try.
    """


class RetryJobError(RuntimeError):
    """
    The same, older.
    """


@pytest.fixture(params=["light", "plain"])
def wire(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """
    A process that is set up, where ``arq.worker`` can be imported.
    """
    worker = ModuleType("arq.worker")
    vars(worker).update(
        Retry=RetryError,
        RetryJob=RetryJobError,
        func=lambda found: found if isinstance(found, Function) else Function(found.__qualname__, found),
    )
    monkeypatch.setitem(sys.modules, "arq", ModuleType("arq"))
    monkeypatch.setitem(sys.modules, "arq.worker", worker)
    with wired(request.param, instrument=False) as found:
        carriers.switch(lambda: found.settings)
        yield found
        carriers.switch(None)


async def greet(_ctx: dict[str, Any], name: str) -> tuple[str, str | None]:
    """
    A job.
    """
    return name, request_id()


def run(settings: dict[str, Any], raw: bytes, **ctx: Any) -> Any:
    """
    Run one try of a job as arq's worker does: in a task of its own, with the hooks around.
    """

    async def run_job() -> Any:
        job = settings["job_deserializer"](raw)
        context: dict[str, Any] = {"job_id": "7", "job_try": 1, **ctx}
        await settings["on_job_start"](context)
        functions = {one.name: one for one in [*settings.get("functions", ()), *settings.get("cron_jobs", ())]}
        try:
            return await asyncio.create_task(functions[job["f"]].coroutine(context, *job["a"], **job["k"]))
        except (Exception, asyncio.CancelledError) as error:
            return error
        finally:
            await settings["on_job_end"](context)

    return asyncio.run(run_job())


def spans(wire: Wire) -> dict[str, ReadableSpan]:
    """
    Return what was exported, by name.
    """
    return {span.name: span for span in wire.spans}


def context_of(span: ReadableSpan) -> SpanContext:
    """
    Return where a span stands.
    """
    found = span.get_span_context()
    assert found is not None
    return found


def test_a_job_carries_the_identity_beside_what_arq_put_there(wire: Wire) -> None:
    """
    Without ours on the other side the five keys are as they were; the arguments are untouched, and results gain nothing.
    """
    serialize = arq.serializers()["job_serializer"]
    with work("a request", request_id="order-7781-customer-quote"):
        sent = pickle.loads(serialize(dict(JOB)))
        assert pickle.loads(serialize(dict(RESULT))) == RESULT
    carrier = sent.pop("otel_correlation")
    assert sent == JOB
    assert carrier["X-Request-ID"] == "order-7781-customer-quote"
    producer = spans(wire)["enqueue greet"]
    assert producer.kind is SpanKind.PRODUCER
    assert carrier["traceparent"].split("-")[2] == f"{context_of(producer).span_id:016x}"


def test_a_job_of_nobody_has_one_identity_for_all_its_tries(wire: Wire) -> None:
    """
    What a script enqueues outside of any request is a trace of its own from there on.
    """
    settings: dict[str, Any] = arq.correlated({"functions": [greet]})
    raw = arq.serializers()["job_serializer"](dict(JOB))
    first, second = run(settings, raw), run(settings, raw)
    assert first == second == ("ada", request_id_of(raw))
    assert {context_of(span).trace_id for span in wire.spans} == {int(request_id_of(raw), 16)}


def request_id_of(raw: bytes) -> str:
    """
    Return the request id that a job carries.
    """
    return str(pickle.loads(raw)["otel_correlation"]["X-Request-ID"])


def test_the_applications_own_serializers_are_inside(wire: Wire) -> None:
    """
    A pair of one's own sees the whole job, in the producer's call as in the worker's settings.
    """

    def dump(data: dict[str, Any]) -> bytes:
        return json.dumps(data).encode()

    settings: dict[str, Any] = arq.correlated(
        {"functions": [greet], "job_serializer": dump, "job_deserializer": json.loads}
    )
    with work("a request", request_id="order-7781-customer-quote"):
        raw = arq.serializers(dump, json.loads)["job_serializer"](dict(JOB))
    assert json.loads(raw)["otel_correlation"]["X-Request-ID"] == "order-7781-customer-quote"
    assert run(settings, raw) == ("ada", "order-7781-customer-quote")
    assert json.loads(settings["job_serializer"](RESULT)) == {**RESULT, "a": ["ada"]}


def test_the_hooks_of_the_application_run_inside(wire: Wire) -> None:
    """
    Both hooks see the job's identity, an end hook after the job; a start hook that fails ends the span with its error.
    """
    seen: list[tuple[str, str | None]] = []

    class Settings:
        functions = (greet,)

        @staticmethod
        async def on_job_start(ctx: dict[str, Any]) -> None:
            seen.append(("start", request_id()))
            if ctx["job_try"] == 2:
                message = "no"
                raise LookupError(message)

        @staticmethod
        async def on_job_end(_ctx: dict[str, Any]) -> None:
            seen.append(("end", request_id()))

    assert arq.correlated(Settings) is Settings
    values = dict(vars(Settings))
    with work("a request", request_id="order-7781-customer-quote"):
        raw = values["job_serializer"](dict(JOB))
    run(values, raw)
    assert seen == [("start", "order-7781-customer-quote"), ("end", "order-7781-customer-quote")]
    with pytest.raises(LookupError):
        run(values, raw, job_try=2)
    statuses = [(span.status.status_code, len(span.events)) for span in wire.spans if span.name == "run greet"]
    assert statuses == [(StatusCode.UNSET, 0), (StatusCode.ERROR, 1)]


@pytest.mark.parametrize(
    ("raised", "status", "events", "retry"),
    [
        (ValueError("no"), StatusCode.ERROR, 1, None),
        (asyncio.CancelledError(), StatusCode.ERROR, 0, None),
        (RetryError(), StatusCode.UNSET, 0, True),
        (RetryJobError(), StatusCode.UNSET, 0, True),
    ],
)
def test_how_a_job_ended_is_on_its_span(
    wire: Wire, raised: BaseException, status: StatusCode, events: int, retry: bool | None
) -> None:
    """
    An exception is recorded once, a cancelled job is an error, and a job that asks for another try is none.
    """

    async def ends(_ctx: dict[str, Any], _name: str) -> None:
        raise raised

    settings: dict[str, Any] = arq.correlated({"functions": [Function("greet", ends)]})
    assert run(settings, settings["job_serializer"](dict(JOB))) is raised
    span = spans(wire)["run greet"]
    assert span.attributes is not None
    assert (span.status.status_code, len(span.events)) == (status, events)
    assert span.attributes.get("otel_correlation.arq.retry") == retry


def test_a_cron_job_carries_nothing_and_is_work(wire: Wire) -> None:
    """
    What the worker's clock enqueues is no message; called in a request by its name, a cron job continues that.
    """
    settings: dict[str, Any] = arq.correlated({"cron_jobs": [Function("cron:greet", greet)]})
    raw = settings["job_serializer"]({**JOB, "f": "cron:greet"})
    assert "otel_correlation" not in pickle.loads(raw)
    _, seen = run(settings, raw)
    (tick,) = wire.spans
    assert (tick.kind, f"{context_of(tick).trace_id:032x}") == (SpanKind.INTERNAL, seen)
    with work("a request", request_id="order-7781-customer-quote"):
        raw = settings["job_serializer"]({**JOB, "f": "cron:greet"})
    assert run(settings, raw) == ("ada", "order-7781-customer-quote")


def test_a_start_of_a_worker_is_told(wire: Wire) -> None:
    """
    The start-up line is said before the application's own hook runs.
    """
    said: list[str] = []

    async def on_startup(_ctx: dict[str, Any]) -> None:
        said.append("theirs")

    carriers.serving(lambda: said.append("ours"))
    try:
        settings: dict[str, Any] = arq.correlated({"functions": [greet], "on_startup": on_startup})
        asyncio.run(settings["on_startup"]({}))
    finally:
        carriers.serving(lambda: None)
    assert said == ["ours", "theirs"]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=40) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=8,
)


def test_a_job_runs_whatever_it_claims_to_carry(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    """
    No header that somebody else wrote keeps a job from running, or leaves it without ids.
    """
    caplog.set_level(logging.CRITICAL)
    settings: dict[str, Any] = arq.correlated({"functions": [greet]})

    @given(anything | st.fixed_dictionaries({}, optional={"traceparent": anything, "X-Request-ID": anything}))
    def check(carrier: Any) -> None:
        name, seen = run(settings, pickle.dumps({**JOB, "otel_correlation": carrier}))
        assert name == "ada"
        assert seen

    check()


@given(st.binary(max_size=200))
def test_bytes_that_are_no_job_are_the_deserializers_own_matter(raw: bytes) -> None:
    """
    What the application's deserializer makes of bytes is returned, and what it raises is raised.
    """

    def outcome(read: Callable[[bytes], Any]) -> Any:
        try:
            return read(raw)
        except ValueError as error:
            return type(error)

    assert outcome(arq.serializers(deserialize=json.loads)["job_deserializer"]) == outcome(json.loads)


def test_without_a_set_up_nothing_is_added() -> None:
    """
    In a process that nobody set up, and after our own failure, a job is what arq made of it.
    """
    assert pickle.loads(arq.serializers()["job_serializer"](dict(JOB))) == JOB
    assert guard.counters() == {}
