"""
The identity of a request: what logs, spans and user code see of it, and how it survives its own context.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, dataclass
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import (
    INVALID_SPAN,
    NonRecordingSpan,
    Span,
    SpanContext,
    TraceFlags,
    set_span_in_context,
)

from otel_correlation import identity
from otel_correlation.identity import Identity, bind, current, get_from, log_ids, set_in, stash, stashed

if TYPE_CHECKING:
    from collections.abc import Iterator

TRACE = 0x0AF7651916CD43DD8448EB211C80319C
SPAN = 0x00F067AA0BA902B7
NONE = ("", "", "", "")


def _span(flags: int = 1, span_id: int = SPAN) -> Span:
    return NonRecordingSpan(SpanContext(TRACE, span_id, is_remote=False, trace_flags=TraceFlags(flags)))


@contextmanager
def _request(request_id: str | None = "customer-4711", span: Span | None = None) -> Iterator[Identity | None]:
    context = Context() if span is None else set_span_in_context(span, Context())
    who = None if request_id is None else Identity(request_id, span)
    if who is not None:
        context = set_in(context, who)
    token = otel_context.attach(context)
    try:
        yield who
    finally:
        otel_context.detach(token)


def test_outside_a_request_there_is_nobody() -> None:
    """
    Outside of any request ids are None, log fields empty, and ``bind`` does nothing.
    """
    assert current() is None
    assert identity.request_id() is None
    assert identity.trace_id() is None
    assert log_ids() == NONE
    bind(order=1)
    assert current() is None


def test_inside_a_request_its_ids_are_current() -> None:
    """
    Request id, trace id and log fields are those of the context, and gone with it.
    """
    with _request(span=_span()) as who:
        assert current() is who
        assert identity.request_id() == "customer-4711"
        assert identity.trace_id() == f"{TRACE:032x}"
        assert log_ids() == (f"{TRACE:032x}", f"{SPAN:016x}", "01", "customer-4711")
    assert log_ids() == NONE


def test_a_context_is_never_changed_in_place() -> None:
    """
    ``set_in`` returns a new context with everything that the old one held; the old one stays as it was.
    """
    before = Context({"other": 1})
    who = Identity("a")
    after = set_in(before, who)
    assert get_from(after) is who
    assert after["other"] == 1
    assert get_from(before) is None


def test_something_else_under_the_key_is_nobody() -> None:
    """
    A value that is no identity, under our key, is not taken for one.
    """
    context = Context({identity._KEY: "customer-4711"})
    assert get_from(context) is None
    token = otel_context.attach(context)
    try:
        assert current() is None
        assert log_ids() == NONE
    finally:
        otel_context.detach(token)


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        (None, ("", "", "")),
        (INVALID_SPAN, ("", "", "")),
        (_span(0), (f"{TRACE:032x}", f"{SPAN:016x}", "00")),
        (_span(3), (f"{TRACE:032x}", f"{SPAN:016x}", "03")),
        (_span(0xFF), (f"{TRACE:032x}", f"{SPAN:016x}", "ff")),
        (_span(1, span_id=0), (f"{TRACE:032x}", "", "01")),
    ],
)
@pytest.mark.parametrize("request_id", [None, "customer-4711"])
def test_log_fields_are_zero_padded_hex_or_empty(
    span: Span | None, expected: tuple[str, str, str], request_id: str | None
) -> None:
    """
    Each id is lower-case hex of its full width, sampled or not; what does not exist is the empty string.
    """
    with _request(request_id, span):
        assert log_ids() == (*expected, request_id or "")
        assert identity.trace_id() == (expected[0] or None)


def test_bound_fields_stand_on_the_request_and_on_its_server_span() -> None:
    """
    ``bind`` adds to what was bound, the last value wins, and the SERVER span gets each as an attribute value.
    """
    provider = TracerProvider(shutdown_on_exit=False)
    span = provider.get_tracer("test").start_span("GET /")
    with _request(span=span) as who:
        assert who is not None
        bind(order=1, paid=True)
        seen = who.fields
        bind(order=2, share=0.5, lines=["a"], note="x")
        assert seen == {"order": 1, "paid": True}
        assert who.fields == {"order": 2, "paid": True, "share": 0.5, "lines": ["a"], "note": "x"}
    attributes: Any = span.attributes  # type: ignore[attr-defined]
    assert dict(attributes) == {"order": 2, "paid": True, "share": 0.5, "lines": "['a']", "note": "x"}


def test_binding_works_without_a_recording_span() -> None:
    """
    Where no span is made, dropped or already ended, bound fields are for the log lines alone.
    """
    for span in (None, _span(0)):
        with _request(span=span) as who:
            bind(order=1)
            assert who is not None
            assert who.fields == {"order": 1}


def test_a_value_without_text_fails_no_request() -> None:
    """
    What cannot be shown, such as a row whose session is gone, is bound all the same, sampled or not.
    """

    class Detached:
        def __str__(self) -> str:
            raise RuntimeError

    span = TracerProvider(shutdown_on_exit=False).get_tracer("test").start_span("GET /")
    with _request(span=span) as who:
        bind(user=(user := Detached()))
    assert who is not None
    assert who.fields == {"user": user}
    assert "Detached without text>" in str(getattr(span, "attributes", {})["user"])


def test_bound_fields_of_interleaved_requests_never_mix() -> None:
    """
    Of 200 requests that run at once each sees only what was bound to itself.
    """

    async def handle(number: int) -> tuple[str | None, dict[str, Any]]:
        with _request(f"customer-{number}"):
            bind(number=number)
            await asyncio.sleep(0)
            bind(twice=number * 2)
            await asyncio.sleep(0)
            found = current()
            assert found is not None
            return identity.request_id(), found.fields

    async def main() -> list[tuple[str | None, dict[str, Any]]]:
        return await asyncio.gather(*(handle(number) for number in range(200)))

    for number, (request, fields) in enumerate(asyncio.run(main())):
        assert request == f"customer-{number}"
        assert fields == {"number": number, "twice": number * 2}


# ---- ids on exceptions


class Slotted(Exception):  # noqa: N818 - a name for the test
    """
    An exception class with slots.
    """

    __slots__ = ("code",)


@dataclass(frozen=True)
class Frozen(Exception):  # noqa: N818
    """
    An exception that cannot be changed.
    """

    code: int = 1


class Hostile(Exception):  # noqa: N818
    """
    An exception whose ``__setattr__`` fails in a way of its own.
    """

    def __setattr__(self, name: str, value: object) -> None:
        raise RuntimeError(name)


class Falsy(Exception):  # noqa: N818
    """
    An exception that is false.
    """

    def __bool__(self) -> bool:
        return False


@pytest.mark.parametrize(
    "error", [ValueError("x"), Slotted(), Falsy(), KeyboardInterrupt(), ExceptionGroup("g", [OSError()])]
)
def test_ids_left_on_an_exception_are_there_after_the_request(error: BaseException) -> None:
    """
    What ``stash`` leaves on an exception is what a log line of its request would have shown.
    """
    with _request(span=_span()):
        stash(error)
        ids = log_ids()
    assert log_ids() == NONE
    assert stashed(error) == ids


@pytest.mark.parametrize("error", [Frozen(), Hostile()])
def test_an_exception_that_takes_no_attribute_is_left_alone(error: BaseException) -> None:
    """
    An exception that cannot carry ids passes unchanged, what its copies are made of too, without a failure of ours.
    """
    before = dict(vars(error))
    with _request(span=_span()):
        stash(error)
    assert stashed(error) is None
    assert vars(error) == before
    with pytest.raises((FrozenInstanceError, RuntimeError)):
        error.anything = 1  # type: ignore[attr-defined]


def test_a_shared_exception_shows_the_last_request() -> None:
    """
    An exception instance that is raised in many requests carries one set of ids, of the last one, and no notes.
    """
    error = ValueError("shared")
    for name in ("first-customer", "second-customer"):
        with _request(name, _span()):
            stash(error)
    found = stashed(error)
    assert found is not None
    assert found[3] == "second-customer"
    assert not hasattr(error, "__notes__")


def test_the_ids_are_found_through_the_chain() -> None:
    """
    An exception raised from, or while handling, the one that carries the ids leads to them, causes first.
    """
    inner, other = Falsy(), ValueError()
    with _request("inner-customer", _span()):
        stash(inner)
    with _request("other-customer", _span()):
        stash(other)
    by_context, by_cause = RuntimeError(), RuntimeError()
    by_context.__context__ = inner
    by_cause.__context__, by_cause.__cause__ = other, inner
    assert (stashed(by_context) or NONE)[3] == "inner-customer"
    assert (stashed(by_cause) or NONE)[3] == "inner-customer"


def test_the_ids_are_found_in_a_group() -> None:
    """
    A group that somebody made around a request's exception leads to its ids; a group without any leads on.
    """
    inner = ValueError()
    with _request("inner-customer", _span()):
        stash(inner)
    assert (stashed(BaseExceptionGroup("both", [OSError(), inner])) or NONE)[3] == "inner-customer"
    outer = ExceptionGroup("none", [OSError()])
    assert stashed(outer) is None
    outer.__cause__ = inner
    assert (stashed(outer) or NONE)[3] == "inner-customer"


def test_no_exception_has_no_ids() -> None:
    """
    Without an exception, or with one that nobody marked, there are no ids.
    """
    assert stashed(None) is None
    assert stashed(ValueError()) is None


def test_a_loop_and_a_long_chain_end() -> None:
    """
    A chain that leads back to itself ends without ids, and one is followed eight links far.
    """
    first, second = ValueError(), ValueError()
    first.__cause__, second.__cause__ = second, first
    assert stashed(first) is None

    def chain(length: int) -> BaseException:
        error: BaseException = ValueError("deepest")
        with _request(span=_span()):
            stash(error)
        for _ in range(length):
            outer = ValueError()
            outer.__cause__ = error
            error = outer
        return error

    assert stashed(chain(7)) is not None
    assert stashed(chain(8)) is None


def test_what_is_kept_of_a_caller_after_its_request() -> None:
    """
    Ids stay known as the caller's, as long as they are no longer than ids are; lists and anything large go.
    """
    ids = {b"traceparent": [b"00-a", b"00-b"], b"x-request-id": [b"i" * 200]}
    large = {b"baggage": [b"a=1"], b"tracestate": [b"a=1"], b"x-other": [b"x" * 10_000], b"b3": [b"1"] * 3}
    assert identity.short_ones({**ids, **large}) == ids
    assert identity.short_ones(large) is None
    assert identity.short_ones({}) is None
    assert identity.short_ones(None) is None
