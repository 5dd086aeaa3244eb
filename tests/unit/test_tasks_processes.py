"""
What goes along to another process, seen through pickle; the processes themselves are in tests/integration.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import baggage
from opentelemetry import context as otel_context

from otel_correlation import bind, carried, guard, identity, request_id, tasks, trace_id, work
from otel_correlation.tasks import processes
from tests.contract.wire import wired

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otel_correlation.settings import Settings
    from tests.contract.wire import Wire

started: list[Settings] = []
error = LookupError("gone")


def start(settings: Settings) -> None:
    """
    Stand for what sets another process up.
    """
    started.append(settings)


def look(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """
    Return what a call in another process sees.
    """
    found = identity.current()
    return request_id(), trace_id(), found.fields if found else None, baggage.get_baggage("a"), args, kwargs


def fail() -> None:
    """
    Fail.
    """
    raise error


@pytest.fixture(autouse=True)
def wire() -> Iterator[Wire]:
    """
    A process that is set up.
    """
    started.clear()
    with wired("light", instrument=False) as found:
        tasks.activate(lambda: found.settings, start)
        yield found
        tasks.deactivate()


def elsewhere(function: Any, *args: Any, **kwargs: Any) -> Any:
    """
    Call a function as another process would.
    """
    return pickle.loads(pickle.dumps(function))(*args, **kwargs)


def test_everything_goes_along(wire: Wire) -> None:
    """
    Request id, trace, baggage and plain bound fields are current in the call, and nothing is afterwards.
    """
    with work("tick"):
        bind(user_id=7, plan="gold", odd=object())
        token = otel_context.attach(baggage.set_baggage("a", "1"))
        function = carried(look)
        otel_context.detach(token)
        expected = (request_id(), trace_id(), {"user_id": 7, "plan": "gold"}, "1", (1,), {"self": 2})
    seen = elsewhere(function, 1, self=2)
    assert seen == expected
    assert otel_context.get_current() == {}
    assert started == [wire.settings]


def test_it_goes_along_whatever_is_propagated_outside(wire: Wire) -> None:
    """
    Between processes of one service the ids go along, also where OTEL_PROPAGATORS names none.
    """
    wire.configure(propagators=[])
    with work("tick"):
        assert elsewhere(carried(look))[:2] == (request_id(), trace_id())


def test_outside_the_call_has_no_identity() -> None:
    """
    A function that is carried outside of a request has none, wherever it is called; the process is set up all the same.
    """
    assert elsewhere(carried(look))[:3] == (None, None, None)
    assert len(started) == 1


def test_without_the_sdk(wire: Wire) -> None:
    """
    With the SDK disabled the request id goes along.
    """
    wire.configure(sdk_disabled=True)
    with work("tick"):
        assert elsewhere(carried(look))[:2] == (request_id(), None)


def test_it_looks_like_the_function() -> None:
    """
    Name, documentation and what it returns are the function's.
    """
    function = carried(look)
    assert (function.__name__, function.__doc__) == (look.__name__, look.__doc__)


def test_exceptions_pass_with_the_ids() -> None:
    """
    The call's exception passes through as it is, with the ids of the request on it.
    """
    with work("tick"):
        rid = request_id()
        function = carried(fail)
    with pytest.raises(LookupError) as caught:
        function()
    assert caught.value is error
    assert (identity.stashed(error) or ("",) * 4)[3] == rid


def test_a_process_that_cannot_be_set_up_calls_all_the_same(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Where setting up fails, the user's function is called and the failure is counted.
    """

    def broken(settings: Settings) -> None:
        raise OSError("no")

    monkeypatch.delenv(guard.STRICT_ENV)
    tasks.activate(lambda: wire.settings, broken)
    assert carried(look)(1)[4] == (1,)
    assert guard.counters()["internal_error.tasks.process"] == 1


def test_without_a_start_it_is_the_function() -> None:
    """
    In a process that was not set up, or is switched off, the very function comes back.
    """
    tasks.deactivate()
    assert carried(look) is look


def test_our_failure_does_not_cost_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Where nothing can be taken along, the very function comes back.
    """

    def no_settings() -> Settings:
        raise OSError("no")

    monkeypatch.delenv(guard.STRICT_ENV)
    processes.switch(no_settings)
    with work("tick"):
        assert carried(look) is look
    assert guard.counters()["internal_error.tasks.carried"] == 1
