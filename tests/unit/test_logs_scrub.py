"""
What the texts of exceptions in messages and tracebacks show of a user, whoever formats the line.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import pytest

from otel_correlation import logs
from otel_correlation.logs import record
from otel_correlation.logs.lines import JsonLines, TextLines, extras_of, message_of
from otel_correlation.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def installed() -> Iterator[None]:
    """
    A process with our fields on its records.
    """
    logs.install(Settings())
    yield
    logs.uninstall()


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING, logging.ERROR])
def test_an_exception_in_a_message_loses_what_a_user_sent(level: int) -> None:
    """
    ``log.info("refused: %s", error)`` quotes no more than a traceback does.
    """
    error = ValueError("1 validation error\npin\n  bad [type=int_parsing, input_value='hunter2', input_type=str]")
    record = logging.LogRecord("shop", level, "", 0, "refused: %s", (error,), None)
    assert "hunter2" not in message_of(record)
    assert "input_type=str]" in message_of(record)


def test_a_text_in_a_warning_loses_what_a_user_sent() -> None:
    """
    From WARNING on, a message that was put together before loses it, too; a dict of structlog's is no text.
    """
    text = "failed: DETAIL:  Key (email)=(ada@example.com) already exists."
    record = logging.LogRecord("shop", logging.WARNING, "", 0, text, (), None)
    assert message_of(record) == "failed: DETAIL:  REDACTED"


SENT = f"hunter{1 + 1}"  # not a literal: a traceback shows source lines


def refusal() -> Exception:
    """
    Return an error that quotes what a user sent.
    """
    return ValueError(f"1 validation error\npin\n  bad [type=int_parsing, input_value='{SENT}', input_type=str]")


@pytest.mark.parametrize("formatter", [JsonLines(), TextLines(colours=False)], ids=["json", "text"])
def test_fields_of_a_failure_lose_what_a_user_sent(formatter: logging.Formatter) -> None:
    """
    ``extra={"error": error}`` shows no value, and from WARNING on ``extra={"error": str(error)}`` neither.
    """
    error = refusal()
    fields = {"error": error, "nested": {"errors": [error]}, "text": str(error), "order": 7}
    record = logging.makeLogRecord({"name": "shop", "levelno": logging.ERROR, "levelname": "ERROR", **fields})
    line = formatter.format(record)
    assert SENT not in line
    assert line.count("input_value=REDACTED") == 3
    assert record.__dict__["text"] == str(error)
    assert {name: extras_of(record)[name] for name in ("error", "order")} == {"error": error, "order": 7}


class Own(logging.Formatter):
    """
    A JSON formatter of somebody's, which never calls the original ``format``.
    """

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps({"error": self.formatException(record.exc_info) if record.exc_info else ""})


@pytest.mark.parametrize("formatter", [logging.Formatter("%(message)s | %(request_id)s"), Own()])
@pytest.mark.usefixtures("installed")
def test_the_applications_own_formatter_shows_no_value_of_a_user(formatter: logging.Formatter) -> None:
    """
    A traceback that the application's or the server's own formatter renders is scrubbed; the record is not.
    """
    error = refusal()
    made = logging.LogRecord("shop", logging.ERROR, "", 0, "failed: %s", (error,), (ValueError, error, None))
    text = formatter.format(made)
    assert SENT not in text
    assert "input_value=REDACTED" in text
    assert made.args == (error,)
    assert SENT in made.getMessage()
    logs.uninstall()
    made.exc_text = None
    assert SENT in formatter.format(made)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("refused: %s", lambda error: (error,)),
        ("refused: %(error)s", lambda error: ({"error": error},)),
        (None, lambda _error: ()),
    ],
    ids=["argument", "named argument", "message"],
)
@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO, logging.ERROR])
@pytest.mark.usefixtures("installed")
def test_an_exception_that_is_logged_shows_no_value_of_a_user(level: int, message: str | None, make: Any) -> None:
    """
    ``log.info("refused: %s", error)`` and ``log.info(error)``, at any level, in our formats and in the application's.
    """
    error = refusal()
    made = logging.LogRecord("shop", level, "", 0, message or error, make(error), None)
    for formatter in (logging.Formatter("%(message)s"), JsonLines(), TextLines(colours=False)):
        text = formatter.format(made)
        assert SENT not in text
        assert "input_value=REDACTED" in text


class Unbound:
    """
    A proxy of nothing, as lazy objects of libraries are outside of a request; it can be shown all the same.
    """

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """
        Ask what is not there.
        """
        raise RuntimeError("unbound")

    def __str__(self) -> str:
        return "fine"


@pytest.mark.parametrize(
    ("message", "args"),
    [("%s%s", (Unbound(), "")), ("fine%(other).0s", ({"other": Unbound()},)), (Unbound(), ())],
    ids=["argument", "named argument", "message"],
)
@pytest.mark.usefixtures("installed")
def test_an_object_that_does_not_say_what_it_is_costs_no_line(message: Any, args: Any) -> None:
    """
    Looking for exceptions in a record runs no code of what is logged.
    """
    made = logging.LogRecord("shop", logging.INFO, "", 0, message, args, None)
    assert logging.Formatter("%(message)s").format(made) == "fine"


@pytest.mark.parametrize(
    ("message", "args"),
    [("{'pin': input_value=x", ()), ("%s", ()), ("%d", ("x",)), ("fine: %s", ("input",)), (7, ())],
)
@pytest.mark.usefixtures("installed")
def test_other_messages_are_left_alone(message: Any, args: Any) -> None:
    """
    What was rendered as JSON, what does not fit and what quotes nothing reaches the formatter as it is.
    """
    made = logging.LogRecord("shop", logging.ERROR, "", 0, message, args, None)
    assert record._clean(made) is made


@pytest.mark.usefixtures("installed")
def test_a_subclass_finds_what_formatting_leaves_on_a_record() -> None:
    """
    A formatter that reads ``record.message`` and ``record.asctime`` after the base class has made them finds them.
    """

    class Short(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            super().format(record)
            return f"{record.asctime[:2]} {record.message}"

    record = logging.makeLogRecord({"levelno": logging.ERROR, "msg": "x input_value='s3cret', input_type=str"})
    assert Short("%(asctime)s").format(record) == f"{record.asctime[:2]} x input_value=REDACTED, input_type=str"
    assert record.getMessage() == "x input_value='s3cret', input_type=str"
