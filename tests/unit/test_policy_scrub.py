"""
What an exception's text may not carry out of the process, wherever the text goes.
"""

from __future__ import annotations

import timeit
import traceback
from typing import TYPE_CHECKING, Any

import httpx
import pydantic
import pytest
from fastapi.exceptions import RequestValidationError, ResponseValidationError
from hypothesis import given
from hypothesis import strategies as st

from otel_correlation.policy import redact_query, scrub
from otel_correlation.policy.scrubbing import _QUOTES
from otel_correlation.tracer import exception_event

if TYPE_CHECKING:
    from collections.abc import Callable


class Login(pydantic.BaseModel):
    """
    What a user sends.
    """

    pin: int


def test_a_span_event_never_quotes_what_a_user_sent() -> None:
    """
    The exception event of a validation error has neither in its message nor in its stack trace what was sent.
    """
    sent = f"hunter{1 + 1}"  # not a literal: a traceback shows source lines
    with pytest.raises(pydantic.ValidationError) as caught:
        Login.model_validate({"pin": sent})
    event = exception_event(caught.value)
    assert "hunter2" not in str(event)
    assert "REDACTED" in event["exception.message"]


def test_a_url_in_an_exception_loses_its_secrets() -> None:
    """
    A status error of httpx quotes the whole URL; its password and token do not leave the process.
    """
    request = httpx.Request("GET", "https://ada:hunter2@api.example/v1?token=s3cret&page=2")
    with pytest.raises(httpx.HTTPStatusError) as caught:
        httpx.Response(500, request=request).raise_for_status()
    text = str(exception_event(caught.value))
    assert "hunter2" not in text
    assert "s3cret" not in text
    assert "page=2" in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            'duplicate key value violates unique constraint "account_pkey"\nDETAIL:  Key (email)=({}) already exists.\n',
            'duplicate key value violates unique constraint "account_pkey"\nDETAIL:  REDACTED\n',
        ),
        ("DETAIL:  Failing row contains ({}, null).", "DETAIL:  REDACTED"),
        ('invalid input syntax for type integer: "{}"', 'invalid input syntax for type integer: "REDACTED"'),
        ('date/time field value out of range: "{}"', 'date/time field value out of range: "REDACTED"'),
        (
            "invalid input for query argument $1: '{}' (an integer is required)",
            "invalid input for query argument $1: REDACTED (an integer is required)",
        ),
        ("Command # 2 (LPUSH a {}) of pipeline caused error: x", "Command # 2 (REDACTED) of pipeline caused error: x"),
        ("[parameters: {{'password': '{}'}}]\n(Background)", "[parameters: REDACTED]\n(Background)"),
    ],
)
@pytest.mark.parametrize("sent", ["hunter2", 'hunter2) [x] "(y)" \', input_type='])
def test_what_databases_quote_is_hidden(text: str, shown: str, sent: str) -> None:
    """
    What PostgreSQL, its drivers, SQLAlchemy and Redis quote of a value leaves no trace of it, whatever is in the value.
    """
    assert scrub(text.format(sent)) == shown


@pytest.mark.parametrize("scheme", ["postgresql+asyncpg", "redis", "amqp", "mongodb+srv"])
def test_the_url_of_a_database_loses_its_password(scheme: str) -> None:
    """
    An error that names where it could not connect to shows neither user nor password, whatever the scheme.
    """
    text = f"cannot connect to '{scheme}://app:s3cret@db.internal:5432/shop': refused"
    assert scrub(text) == f"cannot connect to '{scheme}://REDACTED:REDACTED@db.internal:5432/shop': refused"


def test_scrubbing_leaves_other_texts_alone() -> None:
    """
    A text without anything to hide is the same afterwards.
    """
    assert (
        scrub("division by zero, see https://example.org/help#why")
        == "division by zero, see https://example.org/help#why"
    )


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ("a=1;token=x&b=2", "a=1;token=REDACTED&b=2"),
        ("token=x;rest&b=2", "token=REDACTED;REDACTED&b=2"),
        ("a;b&token=&c", "a;b&token=&c"),
        ("a=1&flag&token=x", "a=1&flag&token=REDACTED"),
    ],
)
def test_a_semicolon_hides_no_secret(query: str, shown: str) -> None:
    """
    Whether or not a server takes ``;`` for a separator, no part of a secret value stays.
    """
    assert redact_query(query, "sensitive") == shown


SENT = f"hunter{1 + 1}"  # not a literal: a traceback shows source lines


class Odd:
    """
    A value whose text has several lines.
    """

    def __repr__(self) -> str:
        return f"Odd(\n  a=[1]\n\n  password={SENT}\n)"


class Strict(pydantic.BaseModel):
    """
    Fields that refuse what is odd.
    """

    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)

    first: int
    second: int


def pydantic_error(value: object) -> Exception:
    """
    Return a validation error of two fields.
    """
    with pytest.raises(pydantic.ValidationError) as caught:
        Strict.model_validate({"first": value, "second": value})
    return caught.value


def fastapi_error(kind: type[Exception], value: object) -> Exception:
    """
    Return FastAPI's own error, with what pydantic's ``errors()`` gives.
    """
    with pytest.raises(pydantic.ValidationError) as caught:
        Strict.model_validate({"first": value, "second": value})
    made: Any = kind
    error: Exception = made(caught.value.errors(include_url=False), endpoint_ctx={"path": "GET /pin"})
    return error


def sql_error(parameters: str) -> Exception:
    """
    Return an error with SQLAlchemy's text.
    """
    return RuntimeError(
        "(sqlite3.IntegrityError) UNIQUE constraint failed: account.email\n[SQL: INSERT INTO account\nVALUES (?, ?)]\n"
        f"[parameters: {parameters}]\n(Background on this error at: https://sqlalche.me/e/20/gkpj)"
    )


def row_error() -> Exception:
    """
    Return an error with PostgreSQL's text about a row of several lines.
    """
    return RuntimeError(
        'null value in column "total"\nDETAIL:  Failing row contains (1, Dear Sir.\n\n'
        f"{SENT}, null).\nHINT:  Give it a total."
    )


LEAKS: dict[str, tuple[Callable[[], Exception], str]] = {
    "pydantic": (lambda: pydantic_error(SENT), "second"),
    "pydantic lines": (lambda: pydantic_error(Odd()), "input_type=Odd"),
    "request": (lambda: fastapi_error(RequestValidationError, SENT), "'loc': ('second',)"),
    "response": (lambda: fastapi_error(ResponseValidationError, {"pin": SENT}), "'type': 'int_type'"),
    "response lines": (lambda: fastapi_error(ResponseValidationError, Odd()), "Endpoint: GET /pin"),
    "parameters": (lambda: sql_error(f"('a]b', '{SENT}')"), "VALUES (?, ?)]"),
    "parameter lines": (lambda: sql_error(f"(Odd(a=[1] b\n c={SENT}),)"), "(Background on this error"),
    "row": (row_error, "HINT:  Give it a total."),
    "tag": (lambda: RuntimeError(f"Input tag '{SENT}' found using 'kind' does not match"), "found using 'kind'"),
    "mysql": (lambda: RuntimeError(f"(1062, \"Duplicate entry '{SENT}' for key 'pin'\")"), "for key 'pin'"),
}


def raised(make: Callable[[], Exception], how: str) -> BaseException:
    """
    Return an exception as it is caught: alone, as a cause, as a context, in a group, quoted by another one.
    """
    error: Exception = make()
    try:
        try:
            raise error
        except Exception as first:
            if how == "alone":
                raise
            if how == "cause":
                raise LookupError("no row") from first
            if how == "context":
                raise LookupError("no row")  # noqa: B904 - the point
            if how == "group":
                raise ExceptionGroup("both", [ValueError("plain"), first, ExceptionGroup("inner", [first])])  # noqa: B904
            raise RuntimeError(f"failed with {first!r}") from None
    except Exception as caught:
        return caught


@pytest.mark.parametrize("how", ["alone", "cause", "context", "group", "quoted"])
@pytest.mark.parametrize("leak", LEAKS)
def test_a_planted_password_is_in_no_text(leak: str, how: str) -> None:
    """
    Whatever library quotes it, over however many lines, wherever in the chain: it is gone, and the rest is there.
    """
    make, stays = LEAKS[leak]
    error = raised(make, how)
    event = exception_event(error)
    assert SENT in str(error) + "".join(traceback.format_exception(error))
    assert SENT not in str(event)
    assert "REDACTED" in event["exception.stacktrace"]
    assert "in raised" in event["exception.stacktrace"]
    if how != "quoted":
        assert stays in event["exception.stacktrace"]
    if how == "group":
        assert "ValueError: plain" in event["exception.stacktrace"]


def test_a_traceback_keeps_its_frames_after_a_value_that_does_not_end() -> None:
    """
    A quote without its end takes the rest of the value's lines, and not the traceback that follows.
    """
    text = (
        f"ValueError: input_value={SENT}\nmore {SENT}\n\nDuring handling of the above exception, another exception "
        'occurred:\n\nTraceback (most recent call last):\n  File "a.py", line 1, in f\nKeyError: 1'
    )
    shown = scrub(text)
    assert SENT not in shown
    assert shown.startswith("ValueError: input_value=REDACTED\nDuring handling")
    assert shown.endswith('  File "a.py", line 1, in f\nKeyError: 1')


@given(st.text(max_size=200))
def test_any_text_can_be_scrubbed(text: str) -> None:
    """
    No text makes scrubbing fail, and a second time changes nothing.
    """
    once = scrub(text)
    assert scrub(once) == once


@given(
    st.lists(
        st.sampled_from([quote.mark for quote in _QUOTES] + [quote.begin for quote in _QUOTES] + [SENT, "\n", "]", "}"])
    )
)
def test_pieces_of_quotes_can_be_scrubbed(pieces: list[str]) -> None:
    """
    The marks in any order neither fail nor grow without bound.
    """
    text = "".join(pieces)
    assert len(scrub(text)) <= len(text) + len("REDACTED") * (len(pieces) + 1) * len(_QUOTES)


def test_scrubbing_is_linear() -> None:
    """
    A text that is made of marks takes time by its length, not by its square.
    """
    small, large = (timed(size) for size in (2_000, 40_000))
    assert large < small * 200


def timed(size: int) -> float:
    """
    Return the shortest of three times that scrubbing takes.
    """
    text = "input_value=[parameters: 'loc': 'msg': DETAIL:  \n" * size
    return min(timeit.repeat(lambda: scrub(text), number=1, repeat=3))
