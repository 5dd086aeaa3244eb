"""
A line is one line, says what it should in its order, and cannot be forged.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_correlation.logs.lines import JsonLines, TextLines, exception_text, message_of

ENDS_OR_MOVES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\n]")


def record(message: object = "hello", args: Any = (), exc_info: Any = None, **extra: Any) -> logging.LogRecord:
    made = logging.LogRecord("app.orders", logging.INFO, "orders.py", 7, message, args, exc_info)
    made.created = 1763694245.625
    made.__dict__.update(extra)
    return made


def parsed(made: logging.LogRecord) -> dict[str, Any]:
    line = JsonLines().format(made)
    assert len(line.splitlines()) == 1
    found: dict[str, Any] = json.loads(line)
    return found


def test_fields_stand_in_their_order() -> None:
    """
    Timestamp, level, logger, message, the five fields, extra and bound fields, exception: always in this order.
    """
    try:
        raise ValueError("bad")
    except ValueError:
        made = record(
            exc_info=sys.exc_info(),
            customer=42,
            service_name="orders",
            request_id="order-7",
            trace_flags="01",
            span_id="b",
            trace_id="a",
        )
    found = parsed(made)
    assert list(found) == [
        "timestamp",
        "level",
        "logger",
        "message",
        "trace_id",
        "span_id",
        "trace_flags",
        "request_id",
        "service_name",
        "customer",
        "exception",
    ]
    assert found["timestamp"] == "2025-11-21T03:04:05.625Z"
    assert found["exception"].endswith("ValueError: bad")


def test_empty_ids_are_left_out() -> None:
    """
    A line outside of a request does not carry five empty fields.
    """
    found = parsed(record(trace_id="", span_id="", trace_flags="", request_id="", service_name=""))
    assert list(found) == ["timestamp", "level", "logger", "message"]


def test_extra_cannot_replace_a_field() -> None:
    """
    A field of the user that is called like one of ours is kept beside it, under ``extra.``.
    """
    found = parsed(record(level=3, timestamp="never", exception="none", **{"extra.level": 4}))
    assert (found["level"], found["timestamp"][:4]) == ("INFO", "2025")
    assert {found["extra.level"], found["extra.extra.level"]} == {3, 4}
    assert found["extra.exception"] == "none"


class Silent:
    """
    An object that has no text.
    """

    def __str__(self) -> str:
        raise RuntimeError

    __repr__ = __str__


def cycle() -> dict[str, Any]:
    found: dict[str, Any] = {"a": 1}
    found["self"] = [found]
    return found


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1, 2},
        b"\xff",
        Silent(),
        cycle(),
        float("nan"),
        float("inf"),
        10**5000,
        {(1, 2): 3},
        ...,
        "\ud800",
        1j,
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_that_json_cannot_carry_never_raises(value: object) -> None:
    """
    Objects, cycles, NaN, endless numbers, keys that are no text: the line is there, as valid JSON.
    """
    assert parsed(record(thing=value))["message"] == "hello"
    assert "\n" not in TextLines(colours=False).format(record(thing=value))


def test_arguments_that_do_not_fit_are_shown() -> None:
    """
    ``log.info("%d", "x")`` gives a line that says what was wrong, not a traceback on stderr.
    """
    assert parsed(record("%d items", ("x",)))["message"] == "%d items (arguments ('x',) do not fit: TypeError)"


def test_a_percent_sign_in_a_servers_line_stays() -> None:
    """
    A line of the server without arguments is shown as it is.
    """
    made = record("100% of 5%d workers")
    made.name = "uvicorn.error"
    assert parsed(made)["message"] == "100% of 5%d workers"


def test_the_text_of_an_exception_that_has_none_is_a_name() -> None:
    """
    An exception whose own text raises does not cost the line.
    """

    class BrokenError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    try:
        raise BrokenError
    except BrokenError:
        found = parsed(record("failed", exc_info=sys.exc_info()))
    assert found["message"] == "failed"
    assert "BrokenError" in found["exception"]


def test_a_record_from_another_process_keeps_its_traceback() -> None:
    """
    What a queue or a socket left of an exception, its text, is shown; a stack that was asked for, too.
    """
    found = parsed(
        record(exc_text="Traceback ...\nValueError: input_value='x', input_type=str]", stack_info="Stack:\nx")
    )
    assert found["exception"] == "Traceback ...\nValueError: input_value=REDACTED, input_type=str]"
    assert found["stack"] == "Stack:\nx"


def test_other_alphabets_are_readable() -> None:
    """
    Text that is not ASCII is written as it is; only what could end a line or change the screen is escaped.
    """
    line = JsonLines().format(record("Zürich 東京 \u2028"))
    assert "Zürich 東京 \\u2028" in line


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(message=st.text(alphabet=st.characters(codec=None)), extra=st.dictionaries(st.text(min_size=1), json_values))
def test_any_message_and_extra_give_one_json_line_that_reads_back(message: str, extra: dict[str, Any]) -> None:
    """
    Whatever a message or a field holds, the line is one line, and a reader gets the same text back.
    """
    made = record("%s", (message,))
    for name, value in extra.items():
        made.__dict__.setdefault("x" + name, value)
    line = JsonLines().format(made)
    assert not ENDS_OR_MOVES.search(line)
    found = json.loads(line)
    assert found["message"] == message
    for name, value in extra.items():
        assert found["x" + name] == value


@given(
    message=st.text(alphabet=st.characters(codec=None)),
    extra=st.dictionaries(st.text(min_size=1), json_values, max_size=3),
    level=st.text(max_size=10),
    request_id=st.text(),
)
def test_any_message_and_extra_give_one_readable_line(
    message: str, extra: dict[str, Any], level: str, request_id: str
) -> None:
    """
    A readable line cannot be ended, coloured or reordered by what it shows.
    """
    made = record("%s", (message,), request_id=request_id)
    made.levelname = level
    for name, value in extra.items():
        made.__dict__.setdefault("x" + name, value)
    assert not ENDS_OR_MOVES.search(TextLines(colours=False).format(made))


def test_a_tab_moves_nothing_on_the_screen() -> None:
    """
    A tab in a field, a message or an exception's text is escaped like any other control character.
    """
    try:
        raise ValueError("a\tb")
    except ValueError:
        made = record("said\tthis", exc_info=sys.exc_info(), user="x\trequest_id=forged", path="a b\tc")
    line = TextLines(colours=False).format(made)
    assert "\t" not in line
    for shown in ("said\\tthis", "user=x\\trequest_id=forged", "path='a b\\tc'", "ValueError: a\\tb"):
        assert shown in line


def test_a_traceback_cannot_pass_for_a_record() -> None:
    """
    In readable lines every line of a traceback stands behind a bar, whatever the exception's text holds.
    """
    try:
        raise ValueError("bad\n12:00:00.000 INFO forged\x1b[2J")
    except ValueError:
        lines = TextLines(colours=True).format(record(exc_info=sys.exc_info())).split("\n")
    assert len(lines) > 3
    assert all(line.startswith("  | ") for line in lines[1:])
    assert not ENDS_OR_MOVES.search("".join(lines[1:]))


def test_a_minted_id_is_shown_once_on_a_terminal() -> None:
    """
    A request id that is the trace id is not printed twice.
    """
    same = TextLines(colours=False).format(record(request_id="a" * 32, trace_id="a" * 32))
    assert same.count("a" * 32) == 1
    other = TextLines(colours=False).format(record(request_id="order-7", trace_id="a" * 32, user="x y"))
    assert other.endswith(f"request_id=order-7 trace_id={'a' * 32} user='x y'")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (
            "age\n  Input should be valid [type=int_parsing, input_value='ada, input_type=x', input_type=str]",
            "age\n  Input should be valid [type=int_parsing, input_value=REDACTED, input_type=str]",
        ),
        (
            "(IntegrityError) UNIQUE\n[SQL: INSERT ...]\n[parameters: ('ada@example.com', 'x]')]\n(Background: ...)",
            "(IntegrityError) UNIQUE\n[SQL: INSERT ...]\n[parameters: REDACTED]\n(Background: ...)",
        ),
    ],
)
def test_exception_texts_lose_what_a_user_sent(text: str, left: str) -> None:
    """
    The values that pydantic and SQLAlchemy quote do not reach a line.
    """
    error = ValueError(text)
    assert exception_text((ValueError, error, None)) == f"ValueError: {left}"


def test_a_quote_without_an_end_is_dropped_and_costs_no_time() -> None:
    """
    What only begins like a quoted value loses its rest and the lines that may belong to it; a megabyte is no work.
    """
    text = exception_text((ValueError, ValueError("x input_value='ada\nnext\nHINT:  look"), None))
    assert text == "ValueError: x input_value=REDACTED\nHINT:  look"
    many = exception_text((ValueError, ValueError("input_value=" * 100_000), None))
    assert many == "ValueError: input_value=REDACTED\n...[cut from 1200000 characters]"


def test_pydantics_own_message_loses_its_input() -> None:
    """
    What pydantic really says today is covered.
    """
    from pydantic import BaseModel, ValidationError

    class Model(BaseModel):
        age: int

    with pytest.raises(ValidationError) as caught:
        Model.model_validate({"age": "ada@example.com"})
    text = exception_text((caught.type, caught.value, caught.tb))
    assert "input_value=REDACTED" in text
    assert "ada@example.com" not in text.split("ValidationError: ")[-1]


def test_what_holds_itself_many_times_over_is_bounded() -> None:
    """
    A graph of dicts that all hold each other is one line of a bounded length, and takes no time.
    """
    people: list[dict[str, Any]] = [{"id": number} for number in range(200)]
    for person in people:
        person["friends"] = people
    record = logging.makeLogRecord({"name": "shop", "levelname": "INFO", "people": people})
    line = JsonLines().format(record)
    assert len(line) < 2_000_000
    assert "too large" in line
    shown = json.loads(line)["people"]
    assert (len(shown), shown[0]["id"]) == (200, 0)


def test_a_line_of_ours_is_bounded_generously() -> None:
    """
    A text of 100,000 characters is written whole; of 10 MB as much as a log store takes of a line, and it is marked.
    """
    whole = logging.makeLogRecord({"msg": "x" * 100_000, "field": "y" * 60_000})
    line = json.loads(JsonLines().format(whole))
    assert (line["message"], line["field"]) == ("x" * 100_000, "y" * 60_000)
    error = ValueError("e" * 10_000_000)
    long = logging.makeLogRecord(
        {
            "msg": "x" * 10_000_000,
            "field": "y" * 10_000_000,
            "exc_info": (ValueError, error, None),
            "levelno": 40,
            "levelname": "ERROR",
            "name": "app",
        }
    )
    for formatter in (JsonLines(), TextLines(colours=False)):
        line_text = formatter.format(long)
        assert len(line_text) < 2**18 + 2**15
        assert line_text.count("...[cut from 10000000 characters]") == 3


def test_what_an_access_line_shows_of_a_query_is_bounded() -> None:
    """
    A query of 2 MB is cut before its values are hidden.
    """
    record = logging.makeLogRecord(
        {"name": "uvicorn.access", "msg": "%s", "args": ("/?" + "token=secret&" * 160_000,), "levelno": 20}
    )
    message = message_of(record)
    assert "secret" not in message
    assert message.endswith("...[cut from 2080000 characters]")
    assert len(message) < 3 * 4_096
