"""
Log lines of services, read back: every preset of ours, what other libraries write, what platforms wrap around it, text.
"""

from __future__ import annotations

import json
import logging
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from otel_correlation import semconv
from otel_correlation.logs import presets
from otel_correlation.logs.lines import JsonLines, TextLines
from otel_correlation.settings import Settings, with_overrides
from otel_correlation.stores import StoreError, Trace, as_json
from otel_correlation.stores.lines import Reader, Wanted
from otel_correlation.stores.model import LogLine

if TYPE_CHECKING:
    from collections.abc import Mapping

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
HALF_ID = "0" * 16 + TRACE_ID[16:]
SPAN_ID = "00f067aa0ba902b7"
REQUEST_ID = "customer-quote/2026#000123"
CREATED = 1_795_000_000.25
CREATED_NS = 1_795_000_000_250_000_000
BY_REQUEST = Wanted.by(REQUEST_ID)
BY_TRACE = Wanted.by(TRACE_ID)


def read(text: str, wanted: Wanted = BY_REQUEST, renames: tuple[str, ...] = (), near_ns: int = 0) -> LogLine | None:
    return Reader(renames).read(text, wanted, "orders", near_ns)


def found(text: str, wanted: Wanted = BY_REQUEST, **more: Any) -> LogLine:
    line = read(text, wanted, **more)
    assert line is not None, text
    return line


def failing_record() -> logging.LogRecord:
    try:
        raise ValueError("seven\nis odd")
    except ValueError as error:
        record = logging.LogRecord(
            "shop.orders",
            logging.ERROR,
            "/srv/orders.py",
            7,
            "order %s",
            (7,),
            (type(error), error, error.__traceback__),
        )
    record.created = CREATED
    record.__dict__.update(
        trace_id=TRACE_ID, span_id=SPAN_ID, trace_flags="01", request_id=REQUEST_ID, service_name="shop", tries=3
    )
    return record


@pytest.mark.parametrize("wanted", [BY_REQUEST, BY_TRACE])
@pytest.mark.parametrize("renames", [(), ("trace_id=tid", "message=text", "request_id=req.no")])
@pytest.mark.parametrize("preset", list(semconv.LOG_PRESETS))
def test_our_own_lines_are_read_back(preset: str, renames: tuple[str, ...], wanted: Wanted) -> None:
    """
    What the formatter wrote under any preset and rename is the record again: time, level, names, ids, fields, exception.
    """
    chosen = with_overrides(Settings(log_fields=renames), {"log_preset": preset})
    names = presets.build(chosen, {"GOOGLE_CLOUD_PROJECT": "p"})
    text = JsonLines(names=names).format(failing_record())
    assert any(spelling in text for spelling in wanted.spellings)
    line = found(text, wanted, renames=renames)
    is_half = preset == "datadog" and wanted is BY_REQUEST
    assert line.trace_id == (HALF_ID if is_half else TRACE_ID)
    assert (line.span_id, line.request_id, line.time_ns) == (SPAN_ID, REQUEST_ID, CREATED_NS)
    assert (line.severity, line.logger, line.service, line.body) == ("ERROR", "shop.orders", "shop", "order 7")
    assert line.attributes["tries"] == 3
    assert line.attributes["exception.type"] == "ValueError"
    assert line.attributes["exception.message"] == "seven\nis odd"
    assert "failing_record" in str(line.attributes["exception.stacktrace"])


def test_our_own_text_is_read_back() -> None:
    """
    A readable line has a clock time only: the file's own time says which day it was.
    """
    text = TextLines(colours=False).format(failing_record()).partition("\n")[0]
    line = found(text, near_ns=CREATED_NS + 10**9)
    assert (line.trace_id, line.request_id, line.severity) == (TRACE_ID, REQUEST_ID, "ERROR")
    assert (line.logger, line.time_ns) == ("shop.orders", CREATED_NS)
    assert line.body.startswith("order 7  request_id=")
    # Written after that time of the day: the day before.
    before = found(text, near_ns=CREATED_NS - 3600 * 10**9)
    assert before.time_ns == CREATED_NS - 86400 * 10**9
    assert found(text).time_ns == 0


OTHERS: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [
    (
        "structlog",
        {"event": "hello", "level": "warning", "timestamp": "2026-11-21T10:00:00.5Z", "request_id": REQUEST_ID},
        {"body": "hello", "severity": "WARNING", "time_ns": 1_795_255_200_500_000_000},
    ),
    (
        "loguru",
        {
            "text": "...",
            "record": {
                "message": "hello",
                "name": "shop",
                "level": {"name": "INFO", "no": 20},
                "time": {"timestamp": 1_795_255_200.5},
                "extra": {"request_id": REQUEST_ID, "trace_id": TRACE_ID, "n": 1},
            },
        },
        {"body": "hello", "logger": "shop", "trace_id": TRACE_ID, "time_ns": 1_795_255_200_500_000_000},
    ),
    (
        "nested ECS",
        {"message": "hello", "trace": {"id": TRACE_ID, "x": 1}, "http": {"request": {"id": REQUEST_ID}}},
        {"trace_id": TRACE_ID, "request_id": REQUEST_ID},
    ),
    ("pino", {"level": 30, "time": 1_795_255_200_500, "msg": "hello", "requestId": REQUEST_ID}, {"severity": ""}),
    ("contrib", {"message": "hello", "otelTraceID": TRACE_ID, "correlation_id": REQUEST_ID}, {"trace_id": TRACE_ID}),
    ("zap", {"ts": 1_795_255_200, "msg": "hello", "X-Request-ID": REQUEST_ID}, {"time_ns": 1_795_255_200 * 10**9}),
    ("64 bits", {"message": "hello", "traceId": TRACE_ID[16:], "request_id": REQUEST_ID}, {"trace_id": HALF_ID}),
    ("a number", {"message": {"a": 1}, "request_id": REQUEST_ID, "ts": "when", "level": 7}, {"body": '{"a": 1}'}),
    ("a proxy", {"status": 502, "request_id": REQUEST_ID, "time": True}, {"severity": "", "time_ns": 0}),
    ("no id but a mention", {"message": f"held by {REQUEST_ID}."}, {"request_id": REQUEST_ID}),
    ("a mentioned trace", {"message": "hello", "traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01", "r": REQUEST_ID}, {}),
]


@pytest.mark.parametrize(("data", "expected"), [case[1:] for case in OTHERS], ids=[case[0] for case in OTHERS])
def test_lines_of_other_libraries(data: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """
    The usual names of the fields are known, nested or with dots, and times in every unit.
    """
    line = found(json.dumps(data))
    assert {name: getattr(line, name) for name in expected} == dict(expected)
    assert line.body == expected.get("body", "hello" if "hello" in str(data) else line.body)


@pytest.mark.parametrize(
    ("wrapped", "service", "time_ns"),
    [
        ("2026-11-21T10:00:00.5+00:00 stdout F {line}", "orders", 1_795_255_200_500_000_000),
        ("orders-1  | {line}", "orders", 0),
        (
            '{{"log": {quoted}, "stream": "stdout", "time": "2026-11-21T10:00:00.5Z"}}',
            "orders",
            1_795_255_200_500_000_000,
        ),
    ],
)
def test_what_container_engines_wrap_around(wrapped: str, service: str, time_ns: int) -> None:
    """
    CRI's prefix, compose's, and Docker's envelope: the line inside is what counts, with the outer time if it has none.
    """
    inner = json.dumps({"message": "hello", "request_id": REQUEST_ID})
    line = found(wrapped.format(line=inner, quoted=json.dumps(inner + "\n")))
    assert (line.body, line.request_id, line.service, line.time_ns) == ("hello", REQUEST_ID, service, time_ns)
    text = f"INFO request_id={REQUEST_ID} hello"
    line = found(wrapped.format(line=text, quoted=json.dumps(text + "\n")))
    assert (line.severity, line.request_id, line.time_ns) == ("INFO", REQUEST_ID, time_ns)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"2026-11-21 10:00:00,500 ERROR [trace_id={TRACE_ID} span_id={SPAN_ID}] late", (TRACE_ID, SPAN_ID, "ERROR")),
        (f'1.2.3.4 - - [21/Nov/2026:10:00:00 +0000] "GET /" 502 00-{TRACE_ID}-{SPAN_ID}-01', (TRACE_ID, "", "")),
        (f"gave up on {TRACE_ID}", (TRACE_ID, "", "")),
        (f"{{not json}} {TRACE_ID}", (TRACE_ID, "", "")),
        (f"[{TRACE_ID}]", (TRACE_ID, "", "")),
    ],
)
def test_text_that_names_a_trace(text: str, expected: tuple[str, str, str]) -> None:
    """
    A line that is no JSON counts when the id stands in it as a word, and is shown whole.
    """
    line = found(text, BY_TRACE)
    assert (line.trace_id, line.span_id, line.severity, line.body) == (*expected, text)


def test_times_of_text() -> None:
    """
    A stamp without a zone is this machine's, as logging writes it; a web server's has one.
    """
    line = found(f"2026-11-21 10:00:00,500 {TRACE_ID}", BY_TRACE)
    assert line.time_ns == int(datetime.fromisoformat("2026-11-21 10:00:00.500").timestamp() * 1e3) * 10**6
    line = found(f"[21/Nov/2026:10:00:00 +0000] {TRACE_ID}", BY_TRACE)
    assert line.time_ns == 1_795_255_200 * 10**9
    for wrong in ("99/Nov/2026:10:00:00 +0000", "2026-99-21 10:00:00", "0001-01-01T00:00:00+14:00"):
        assert found(f"{wrong} {TRACE_ID}", BY_TRACE).time_ns == 0


@pytest.mark.parametrize(
    "text",
    [
        f"x{TRACE_ID}",
        f"{TRACE_ID}0",
        json.dumps({"trace_id": "f" * 32, "message": f"held by {TRACE_ID}"}),
        json.dumps({"request_id": "another-request-of-somebody", "message": TRACE_ID}),
        f"trace_id={'f' * 32} held by {TRACE_ID}",
    ],
)
def test_what_belongs_to_another_request_is_left_out(text: str) -> None:
    """
    Part of a longer word is no id, and a line that is another request's own only mentions this one.
    """
    assert read(text, BY_TRACE) is None


@pytest.mark.parametrize(
    "text", ["request_id=42 x", "X-Request-ID: 42", '{"request_id": "42"}', '{"a": {}, "request-id": "42"}']
)
def test_a_short_id_has_to_be_named_as_one(text: str) -> None:
    """
    "42" is an id where it is called one, and a number elsewhere.
    """
    assert found(text, Wanted.by("42")).request_id == "42"
    assert read("took 42 ms", Wanted.by("42")) is None
    assert read('{"message": "took 42 ms"}', Wanted.by("42")) is None
    assert read("request_id=421", Wanted.by("42")) is None
    assert Wanted.by("42").spellings == ()


def test_every_spelling_is_looked_for() -> None:
    """
    Slashes and equals signs as other encoders write them, the trace as its UUID, and Datadog's decimal of its half.
    """
    assert {r"a\/b=0123456789abcdef", r"a/b\u003d0123456789abcdef"} < set(Wanted.by("a/b=0123456789abcdef").spellings)
    assert {TRACE_ID, "0af76519-16cd-43dd-8448-eb211c80319c", str(int(TRACE_ID[16:], 16))} <= set(BY_TRACE.spellings)
    only_half = Wanted.of([Trace(HALF_ID)])
    assert set(only_half.spellings) == {TRACE_ID[16:], str(int(TRACE_ID[16:], 16))}
    assert found(json.dumps({"request_id": "0af76519-16cd-43dd-8448-eb211c80319c"}), BY_TRACE).trace_id == TRACE_ID
    assert found(json.dumps({"dd.trace_id": str(int(TRACE_ID[16:], 16))}), BY_TRACE).trace_id == TRACE_ID


def test_what_a_platform_calls_an_exception_is_kept() -> None:
    """
    Type and message of their own fields, else from the end of the traceback, notes and groups included.
    """
    stack = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    g()\nshop.Late: no\nnote'
    line = found(json.dumps({"request_id": REQUEST_ID, "exception": stack}))
    assert line.attributes["exception.type"] == "shop.Late"
    assert line.attributes["exception.message"] == "no\nnote"
    line = found(json.dumps({"request_id": REQUEST_ID, "error.stack": stack, "error.kind": "Late"}))
    assert (line.attributes["exception.type"], line.attributes["exception.message"]) == ("Late", "")
    for stack, kind in (("KeyError", "KeyError"), ("!?", None), ('  File "a", line 1\n    x', None)):
        line = found(json.dumps({"request_id": REQUEST_ID, "exception": stack}))
        assert line.attributes.get("exception.type") == kind


@given(
    text=st.text() | st.builds(json.dumps, st.recursive(st.none() | st.integers() | st.floats() | st.text(), st.lists))
)
@example("{" * 100_000 + REQUEST_ID)
@example('{"request_id": "' + REQUEST_ID + '", "ts": 1e400, "span_id": -1, "time": 99999999999999999999999}')
@example('{"timestamp": "9999-12-31T23:59:59-14:00", "request_id": "' + REQUEST_ID + '"}')
@example('{"record": {"extra": {"request_id": "' + REQUEST_ID + '", "level": {}}, "level": 3, "time": [1]}}')
@example('{"log": "{\\"request_id\\": 5}", "stream": 1, "time": {}}')
def test_no_text_is_more_than_a_line_or_none(text: str) -> None:
    """
    Whatever stands in a file, reading it never fails.
    """
    for wanted in (BY_REQUEST, BY_TRACE, Wanted.by("42"), Wanted.by("")):
        for one in (text, f"{text} {TRACE_ID} request_id={REQUEST_ID}", json.dumps({"trace_id": TRACE_ID, text: text})):
            line = read(one, wanted, near_ns=2**63 - 1)
            if line is not None:
                as_json(Trace.of(line.trace_id, (), [line]))


names = st.sampled_from(
    [name for preset in semconv.LOG_PRESETS.values() for name in preset.values()] + ["log", "stream", "record", "extra"]
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([TRACE_ID, REQUEST_ID, SPAN_ID]),
    lambda inner: st.lists(inner) | st.dictionaries(names | st.text(), inner),
    max_leaves=6,
)


@given(data=st.dictionaries(names, values))
def test_no_fields_are_more_than_a_line_or_none(data: dict[str, Any]) -> None:
    """
    Known names with values of any kind never fail either, and times are such that can be shown.
    """
    line = read(json.dumps({**data, "x-request-id": REQUEST_ID}))
    if line is not None:
        assert 0 <= line.time_ns < 2**63


def test_a_store_error_keeps_what_was_found() -> None:
    """
    An error may come with what was found nonetheless; by itself it has nothing.
    """
    assert StoreError("x").traces == ()
    assert StoreError("x", [Trace("1")]).traces == (Trace("1"),)


def test_a_number_that_is_no_time_is_none() -> None:
    """
    One too large for a float, infinity and what is behind every calendar: the line is told without a time.
    """
    for number in (str(10**400), "1e999", "-1e999", "NaN", str(10**25)):
        line = read(f'{{"trace_id": "{TRACE_ID}", "timestamp": {number}}}', BY_TRACE)
        assert line is not None
        assert line.time_ns == 0
