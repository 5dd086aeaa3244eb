"""
What a trace says: its entry, its tree, and the cause of a failure.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_correlation.stores import Trace, cause, entry, waterfall
from otel_correlation.stores.model import trace_from_json, trace_to_json
from tests.local_payloads import REQUEST_ID, STACK, TRACE_ID, checkout, exception, log, span

if TYPE_CHECKING:
    from otel_correlation.stores import Json, LogLine, Span


def trace(*spans: Span, logs: tuple[LogLine, ...] = ()) -> Trace:
    return Trace.of(TRACE_ID, spans, logs)


def test_the_cause_is_the_deepest_failing_services_exception() -> None:
    """
    The orders' exception is an echo of the inventory's: the cause is where it began, at the application's last frame.
    """
    why = cause(checkout())
    assert why is not None
    assert (why.service, why.place, why.type) == ("inventory", "/srv/inventory.py:24 in days_left", "ZeroDivisionError")
    assert (why.message, why.span_id, why.fatal) == ("integer division or modulo by zero", "e" * 16, True)


def test_an_exception_recorded_above_the_failed_span_is_the_cause() -> None:
    """
    A CLIENT span that failed without an exception of its own takes the one of the span around it in the same service.
    """
    raised = exception(9, "httpx.ConnectError", "All connection attempts failed", STACK.replace("inventory", "orders"))
    why = cause(
        trace(
            span("a", "", "orders", "POST /orders", "SERVER", (0, 10), failed=True, events=(raised,)),
            span("b", "a", "orders", "POST", "CLIENT", (1, 9), failed=True, attributes={"error.type": "ConnectError"}),
        )
    )
    assert why is not None
    assert (why.service, why.type, why.place) == ("orders", "httpx.ConnectError", "/srv/orders.py:24 in days_left")


def test_a_logged_exception_is_the_cause_when_no_span_recorded_it() -> None:
    """
    Some frameworks record exceptions as log records only.
    """
    logged: dict[str, Json] = {"exception.type": "KeyError", "exception.stacktrace": STACK}
    why = cause(
        trace(
            span("a", "", "inventory", "GET /", "SERVER", (0, 10), failed=True),
            logs=(log(5, "gateway", "other", attributes=logged), log(6, "inventory", "it broke", attributes=logged)),
        )
    )
    assert why is not None
    assert (why.service, why.type, why.message) == ("inventory", "KeyError", "it broke")


LIBRARY = """  File "/venv/lib/python3.11/site-packages/httpx/_transports/default.py", line 118, in map_exceptions
  File "asyncpg/protocol/protocol.pyx", line 197, in bind_execute
asyncpg.exceptions.UniqueViolationError: duplicate key value
"""
CHAINED = LIBRARY + "\nThe above exception was the direct cause of the following exception:\n\n" + STACK


@pytest.mark.parametrize("logged", [False, True])
def test_a_librarys_exception_is_placed_where_the_application_called_it(*, logged: bool) -> None:
    """
    A library's span knows its own frames only; the exception that it became, on the SERVER span or in a line, knows the rest.
    """
    raised = exception(3, "asyncpg.exceptions.UniqueViolationError", "duplicate key value", LIBRARY)
    became = exception(9, "sqlalchemy.exc.IntegrityError", "duplicate key value", CHAINED)
    line = log(9, "inventory", "it broke", attributes=became.attributes)
    why = cause(
        trace(
            span("a", "", "inventory", "POST /", "SERVER", (0, 10), failed=True, events=() if logged else (became,)),
            span("b", "a", "inventory", "INSERT", "CLIENT", (1, 3), failed=True, events=(raised,)),
            logs=(line,) if logged else (),
        )
    )
    assert why is not None
    assert (why.type, why.place, why.span_id) == (
        "asyncpg.exceptions.UniqueViolationError",
        "/srv/inventory.py:24 in days_left",
        "b" * 16,
    )


def test_an_unrelated_exception_lends_no_place() -> None:
    """
    Where nothing of the application is known of an exception, its last frame is told, whatever else went wrong.
    """
    raised = exception(3, "asyncpg.exceptions.UniqueViolationError", "duplicate key value", LIBRARY)
    other = exception(9, "ZeroDivisionError", "integer division or modulo by zero", STACK)
    why = cause(
        trace(
            span("a", "", "inventory", "POST /", "SERVER", (0, 10), failed=True, events=(other,)),
            span("b", "a", "inventory", "INSERT", "CLIENT", (1, 3), failed=True, events=(raised,)),
        )
    )
    assert why is not None
    assert why.place == "asyncpg/protocol/protocol.pyx:197 in bind_execute"


def test_a_stack_trace_that_the_store_cut_names_no_place() -> None:
    """
    Tempo keeps 2 KiB by default: the outer frames are not where it happened; the logged traceback knows.
    """
    outer = STACK[: STACK.index('  File "/srv/inventory.py", line 24')] + '  File "/srv/in'
    made = trace(
        span(
            "a",
            "",
            "inventory",
            "GET /",
            "SERVER",
            (0, 10),
            failed=True,
            events=(exception(5, "ZeroDivisionError", "by zero", outer),),
        )
    )
    why = cause(made)
    assert why is not None
    assert (why.type, why.place) == ("ZeroDivisionError", "")
    logged: dict[str, Json] = {"exception.type": "ZeroDivisionError", "exception.stacktrace": STACK}
    why = cause(replace(made, logs=(log(5, "inventory", "it broke", attributes=logged),)))
    assert why is not None
    assert why.place == "/srv/inventory.py:24 in days_left"


def test_a_failure_without_an_exception_says_what_the_span_says() -> None:
    """
    A 503 by a return statement has no exception; the cause is the service, its status and its code attributes.
    """
    attributes: dict[str, Json] = {
        "http.response.status_code": 503,
        "code.file.path": "/srv/a.py",
        "code.line.number": 7,
    }
    why = cause(
        trace(span("a", "", "s", "GET /", "SERVER", (0, 10), failed=True, status_message="full", attributes=attributes))
    )
    assert why is not None
    assert (why.type, why.message, why.place) == ("HTTP 503", "full", "/srv/a.py:7")


def test_a_handled_error_is_not_fatal_and_success_has_no_cause() -> None:
    """
    A request that answered 200 in spite of an exception on the way is not called failed.
    """
    handled = trace(
        span("a", "", "s", "GET /", "SERVER", (0, 10), attributes={"http.response.status_code": 200}),
        span("b", "a", "s", "cache", "INTERNAL", (1, 2), failed=True, events=(exception(2, "TimeoutError", ""),)),
    )
    why = cause(handled)
    assert why is not None
    assert not why.fatal
    assert cause(trace(span("a", "", "s", "GET /", "SERVER", (0, 10)))) is None
    assert cause(Trace(TRACE_ID)) is None


def test_a_call_that_was_tried_again_with_success_is_not_the_cause() -> None:
    """
    A deep failure that a retry made good does not hide the shallower one that ended the request.
    """
    url: dict[str, Json] = {"url.full": "http://inventory/stock?sku=1"}
    deep = exception(3, "TimeoutError", "slow", STACK)
    own = exception(9, "KeyError", "'price'", STACK.replace("inventory", "orders"))
    made = trace(
        span("a", "", "orders", "GET /", "SERVER", (0, 10), failed=True, events=(own,)),
        span("b", "a", "orders", "GET", "CLIENT", (1, 4), failed=True, attributes=url),
        span("c", "b", "inventory", "GET /stock", "SERVER", (2, 3), failed=True, events=(deep,)),
        span("d", "a", "orders", "GET", "CLIENT", (5, 7), attributes=url),
    )
    why = cause(made)
    assert why is not None
    assert (why.service, why.type, why.fatal) == ("orders", "KeyError", True)


def test_a_failure_that_a_service_made_up_for_is_not_the_cause() -> None:
    """
    The orders answered 200 in spite of the inventory's error, so what failed the gateway is its own.
    """
    own = exception(9, "KeyError", "'total'", STACK.replace("inventory", "gateway"))
    made = trace(
        span("a", "", "gateway", "GET /", "SERVER", (0, 10), failed=True, events=(own,)),
        span("b", "a", "gateway", "GET", "CLIENT", (1, 8)),
        span("c", "b", "orders", "GET /", "SERVER", (2, 7)),
        span("d", "c", "orders", "GET", "CLIENT", (3, 6), failed=True),
        span(
            "e", "d", "inventory", "GET /", "SERVER", (4, 5), failed=True, events=(exception(5, "OSError", "", STACK),)
        ),
    )
    why = cause(made)
    assert why is not None
    assert (why.service, why.type) == ("gateway", "KeyError")


def test_a_failure_that_was_swallowed_on_the_way_is_asked_in_the_end() -> None:
    """
    The gateway's 502 has no exception and the span between is not marked as failed: the inventory's still explains it.
    """
    made = trace(
        span("a", "", "gateway", "GET /", "SERVER", (0, 10), attributes={"http.response.status_code": 502}),
        span("b", "a", "gateway", "cached", "INTERNAL", (1, 8)),
        span(
            "c", "b", "inventory", "GET /", "SERVER", (2, 7), failed=True, events=(exception(5, "OSError", "x", STACK),)
        ),
    )
    why = cause(made)
    assert why is not None
    assert (why.service, why.type, why.fatal) == ("inventory", "OSError", True)


def test_log_lines_alone_have_a_cause() -> None:
    """
    An unsampled request is told from its log records: the first exception that was logged.
    """
    logged: dict[str, Json] = {"exception.type": "KeyError", "exception.stacktrace": STACK}
    why = cause(trace(logs=(log(1, "s", "fine"), log(5, "inventory", "it broke", "ERROR", attributes=logged))))
    assert why is not None
    assert (why.service, why.type, why.fatal) == ("inventory", "KeyError", True)


@pytest.mark.parametrize(
    ("stack", "place"),
    [
        (
            '  File "/srv/a.py", line 1, in f\n  File "/venv/lib/python3.11/site-packages/x.py", line 2, in g',
            "/srv/a.py:1 in f",
        ),
        ('  File "/usr/lib/python3/dist-packages/x.py", line 2, in g', "/usr/lib/python3/dist-packages/x.py:2 in g"),
        ('  |   File "/srv/group.py", line 3, in <module>', "/srv/group.py:3 in <module>"),
        (
            '  File "<frozen importlib._bootstrap>", line 1, in _x\n  File "C:\\app\\b.py", line 9, in h',
            "C:\\app\\b.py:9 in h",
        ),
        ('  File "/srv/bad.py", line 4\n    def (\nSyntaxError: invalid syntax', "/srv/bad.py:4"),
        ("no traceback at all", ""),
        ("", ""),
    ],
)
def test_the_place_is_the_applications_last_frame(stack: str, place: str) -> None:
    """
    Frames of packages and of the interpreter are passed over, unless there are no others.
    """
    why = cause(trace(span("a", "", "s", "n", "SERVER", (0, 1), events=(exception(1, "E", "m", stack),), failed=True)))
    assert why is not None
    assert why.place == place


def test_of_a_chain_the_last_traceback_counts() -> None:
    """
    "During handling of the above exception" puts the exception that ended the request last.
    """
    first = STACK + "\nDuring handling of the above exception, another exception occurred:\n\n"
    stack = first + STACK.replace("line 24, in days_left", "line 99, in cleanup")
    why = cause(trace(span("a", "", "s", "n", "SERVER", (0, 1), events=(exception(1, "E", "m", stack),), failed=True)))
    assert why is not None
    assert why.place == "/srv/inventory.py:99 in cleanup"


def test_the_entry_is_the_first_server_span_without_a_known_parent() -> None:
    """
    A caller's own span that is not here, or a clock that is off, does not hide where the request came in.
    """
    outer = span("b", "f", "gateway", "GET /", "SERVER", (5, 10))
    assert entry(trace(span("c", "", "job", "work", "INTERNAL", (0, 20)), outer)) == outer
    assert entry(trace(span("c", "b", "orders", "GET /", "SERVER", (0, 1)), outer)) == outer
    assert entry(Trace(TRACE_ID)) is None


def test_of_requests_with_one_id_the_failed_one_is_told() -> None:
    """
    A caller that tries again with the same id asks about the attempt that failed, the first or the second.
    """
    for failed in (0, 1):
        attempts = [
            span(own, "", "s", "GET /", "SERVER", (at, at + 1), failed=at == failed * 2)
            for own, at in (("a", 0), ("b", 2))
        ]
        begin = entry(trace(*attempts))
        assert begin is not None
        assert begin.span_id == attempts[failed].span_id
        why = cause(trace(*attempts))
        assert why is not None
        assert why.fatal


def test_a_hop_behind_a_legacy_service_is_not_the_entry() -> None:
    """
    Joined by the request id alone, the hop has no parent and lies within the request; the request succeeded all the same.
    """
    made = trace(
        span("a", "", "gateway", "GET /", "SERVER", (0, 10)),
        span("b", "", "inventory", "GET /", "SERVER", (2, 5), failed=True),
    )
    begin, why = entry(made), cause(made)
    assert begin is not None
    assert why is not None
    assert (begin.service, why.service, why.fatal) == ("gateway", "inventory", False)


def test_the_cause_is_found_behind_a_legacy_service() -> None:
    """
    A failing hop that is a root of its own, behind a service that dropped the traceparent, is where the failure began.
    """
    echo = exception(19, "httpx.HTTPStatusError", "Server error '500'", STACK.replace("inventory", "gateway"))
    raised = exception(14, "KeyError", "'chair'", STACK.replace("inventory", "ledger"))
    first = span("a", "", "gateway", "POST /orders", "SERVER", (0, 20), failed=True, events=(echo,))
    tried = span("b", "a", "gateway", "POST", "CLIENT", (1, 4), attributes={"http.response.status_code": 200})
    call = span("c", "a", "gateway", "POST", "CLIENT", (5, 18), failed=True)
    fine = span("d", "", "ledger", "GET /price", "SERVER", (2, 3))
    hop = span("e", "", "ledger", "POST /orders", "SERVER", (7, 15), failed=True, events=(raised,))
    why = cause(trace(first, tried, call, fine, hop))
    assert why is not None
    assert (why.service, why.type, why.place) == ("ledger", "KeyError", "/srv/ledger.py:24 in days_left")
    # A request of its own after the call, under the same id, is none of its hops.
    later = replace(hop, start_ns=call.end_ns + 1, end_ns=call.end_ns + 5)
    why = cause(trace(first, tried, call, fine, later))
    assert why is not None
    assert why.service == "gateway"
    # What is shown stays as it was sent.
    assert [depth for depth, _ in waterfall(trace(first, call, hop))] == [0, 1, 0]


def test_the_waterfall_has_parents_first_and_siblings_by_start() -> None:
    """
    The tree is told top-down, in order of time.
    """
    rows = waterfall(checkout())
    assert [(depth, row.span_id[0]) for depth, row in rows] == [(0, "a"), (1, "b"), (2, "c"), (3, "d"), (4, "e")]
    family = trace(
        span("a", "", "s", "a", "SERVER", (0, 9)),
        span("c", "a", "s", "c", "INTERNAL", (5, 6)),
        span("b", "a", "s", "b", "INTERNAL", (1, 4)),
        span("d", "b", "s", "d", "INTERNAL", (2, 3)),
    )
    assert [row.name for _, row in waterfall(family)] == ["a", "b", "d", "c"]


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["", *"abcdefgh"]), st.integers(0, 9), st.booleans())
    )
)
def test_any_set_of_spans_is_told_whole(rows: list[tuple[str, str, int, bool]]) -> None:
    """
    Whatever parents the spans name, cycles too, each is in the waterfall once and a cause is found if one failed.
    """
    made = trace(*(span(own, parent, "s", own, "SERVER", (at, at + 1), failed=bad) for own, parent, at, bad in rows))
    told = waterfall(made)
    assert sorted(row.span_id for _, row in told) == sorted({own * 16 for own, *_ in rows})
    assert (cause(made) is not None) == any(part.failed for part in made.spans)


def test_request_ids_and_services_are_told_once() -> None:
    """
    One trace may carry several request ids (a caller's own beside one behind a legacy hop); each is shown once.
    """
    other = replace(checkout().spans[4], span_id="f" * 16, attributes={"request_id": "other"})
    made = Trace.of(TRACE_ID, (*checkout().spans, other), checkout().logs)
    assert made.request_ids == (REQUEST_ID, "other")
    assert made.services == ("gateway", "orders", "inventory")


def test_json_keeps_everything() -> None:
    """
    A trace read back from its JSON is equal, and JSON of another shape is refused rather than half read.
    """
    assert trace_from_json(trace_to_json(checkout())) == checkout()
    bad: list[Json] = [
        None,
        [],
        {},
        {"trace_id": 1, "spans": [], "logs": []},
        {"trace_id": "x", "spans": [{}], "logs": []},
    ]
    for document in bad:
        with pytest.raises(ValueError, match="was expected"):
            trace_from_json(document)
