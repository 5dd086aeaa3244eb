"""
What an exception's text may not carry out of the process, wherever the text goes.
"""

from __future__ import annotations

import httpx
import pydantic
import pytest

from otel_correlation.policy import redact_query, scrub
from otel_correlation.tracer import exception_event


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
