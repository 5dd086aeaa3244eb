"""
What an exception's text must not carry: the values of users that libraries and databases quote in it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from otel_correlation.policy.recording import REDACTED, redact_url
from otel_correlation.policy.sensitive import is_secret_in_query, is_secret_in_text

if TYPE_CHECKING:
    from collections.abc import Callable


class _Quote(NamedTuple):
    """
    One way to quote a value.

    Attributes:
        mark: What tells that a line has one.
        begin: What stands before the value, after the mark.
        end: What stands after the value; empty where the value ends with the line.
        runs_on: Whether a value can go on in the next lines.
        ended: Whether the value is over, by what follows ``end`` on the line.
    """

    mark: str
    begin: str
    end: str
    runs_on: bool = False
    ended: Callable[[str], bool] = lambda _rest: True


def _is_end_of_parameters(rest: str) -> bool:
    # By repr(), the text of an SQLAlchemy error is one line with "\\n" in it.
    return not rest.strip() or rest.startswith(("\\n", "'", '"', ")"))


_QUOTES: Final = (
    _Quote("input_value=", "", ", input_type=", runs_on=True),  # pydantic
    _Quote("Input tag ", "'", "' found using "),
    # FastAPI: str() of its validation errors shows what errors() gives; what comes after the message may be anything.
    _Quote("'loc': ", "'msg': ", "", runs_on=True),
    _Quote("[parameters: ", "", "]", runs_on=True, ended=_is_end_of_parameters),  # SQLAlchemy
    _Quote("DETAIL:  ", "", "", runs_on=True),  # PostgreSQL: the key that is there already, the row that failed
    _Quote("CONTEXT:  ", "", "", runs_on=True),
    _Quote("invalid input syntax for ", ': "', '"'),
    _Quote("invalid input value for ", ': "', '"'),
    _Quote("out of range", ': "', '"'),
    _Quote("invalid input for query argument $", ": ", " ("),  # asyncpg
    _Quote("Duplicate entry ", "'", "' for key "),  # MySQL
    _Quote("Command # ", " (", ") of pipeline caused error"),  # redis
)
_MARKS: Final = tuple((quote.mark, quote) for quote in _QUOTES)

# What begins a line that is no rest of a value: of a traceback (in a group behind bars), of the errors themselves.
_BARS: Final = " |+-\t"
_NEXT: Final = (
    'File "',
    "Traceback (most recent call last)",
    "Exception Group Traceback",
    "The above exception was the direct cause",
    "During handling of the above exception",
    "For further information visit",
    "(Background on this error",
    "[SQL: ",
    "[parameters: ",
    "DETAIL:  ",
    "HINT:  ",
    "CONTEXT:  ",
    "{'type': ",
    "Endpoint: ",
    "...[cut from ",  # bounds.CUT
)
# Of any scheme: what cannot connect to a database or a broker names it with its password.
_URL_IN_TEXT: Final = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]{0,31}:)?//[^\s'\"<>]+")


# Where a name may end that stands before its value: password=x, "password": "x", (b'password', b'x').
_SEPARATOR: Final = re.compile("[=:,]")
_NAME: Final = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-[]%"
_NAME_CHARACTERS: Final = 64
# Without quotes a value ends here.
_VALUE: Final = re.compile("[^\\s&\"',;)}\\]]*")
_SCHEMES: Final = frozenset({"basic", "bearer", "digest", "negotiate", "token"})


def scrub(text: str) -> str:
    """
    Return an exception's text without what a user sent and what is secret.

    Those are values that libraries and databases quote, users and secrets in URLs, and the values of names that are
    secret (``policy.sensitive``). Lines of source code are left alone.
    """
    text = hide_quoted(text)
    if "//" in text:
        text = _URL_IN_TEXT.sub(lambda found: redact_url(found.group(), "sensitive"), text)
    return _without_secrets(text) if "=" in text or ":" in text or "," in text else text


def _without_secrets(text: str) -> str:
    lines = text.split("\n")
    is_source = False
    for number, line in enumerate(lines):
        if is_source:
            # The line of the program that a traceback shows: `connect(password=password)` is no secret.
            is_source = False
        elif '", line ' in line and line.lstrip(_BARS).startswith('File "'):
            is_source = True
        else:
            lines[number] = _without_pairs(line)
    return "\n".join(lines)


def _without_pairs(line: str) -> str:
    kept: list[str] = []
    done = 0
    for found in _SEPARATOR.finditer(line):
        at = found.start()
        if at < done or not _is_secret_before(line, at, done):
            continue
        begin, end = _value_after(line, at)
        if begin < end:
            kept += (line[done:begin], REDACTED)
            done = end
    return "".join((*kept, line[done:]))


def _is_secret_before(line: str, at: int, done: int) -> bool:
    end = at
    if line[end - 1 : end] == " ":
        end -= 1
    is_quoted = line[end - 1 : end] in ('"', "'")
    if is_quoted:
        end -= 2 if line[end - 2 : end - 1] == "\\" else 1
    if (line[at] == "," and not is_quoted) or end <= done:
        return False
    left = line[max(done, end - _NAME_CHARACTERS) : end]
    begin = len(left.rstrip(_NAME))
    name = left[begin:]
    if len(name) < 3:
        return False
    return is_secret_in_query(name) if left[begin - 1 : begin] in ("?", "&") else is_secret_in_text(name)


def _value_after(line: str, at: int) -> tuple[int, int]:
    """
    Return where the value after a separator begins and ends; the same place twice where there is none.
    """
    begin = at + 1
    while line[begin : begin + 1] in (" ", "[", "(") and begin < at + 4:
        begin += 1
    if line[begin : begin + 2] in ("b'", 'b"'):
        begin += 1
    quote = line[begin : begin + 2] if line[begin : begin + 2] in ('\\"', "\\'") else line[begin : begin + 1]
    if quote[-1:] in ('"', "'") and quote:
        begin += len(quote)
        end = line.find(quote, begin)
        while len(quote) == 1 and end > 0 and line[end - 1] == "\\":
            end = line.find(quote, end + 1)
        return begin, end if end >= 0 else len(line)
    if line[at] == "," or line[begin : begin + 1] == "=":
        return begin, begin
    end = _VALUE.match(line, begin).end()  # type: ignore[union-attr]  # it matches nothing, too
    if line[begin:end].lower() in _SCHEMES and line[end : end + 1] == " ":
        end = _VALUE.match(line, end + 1).end()  # type: ignore[union-attr]
    if line[max(0, at - 16) : at].rstrip("\"' ").lower().endswith("cookie"):
        # Pairs of its own, to the end of the line.
        end = len(line)
    return begin, end


def hide_quoted(text: str) -> str:
    """
    Return a text without the values that libraries and databases quote in their errors; any other text is the same.
    """
    for mark, quote in _MARKS:
        if mark in text:
            text = _without(text, quote)
    return text


def _without(text: str, quote: _Quote) -> str:
    kept: list[str] = []
    inside = False
    body = text.rstrip("\n")
    for line in body.split("\n"):
        if inside:
            if not line.strip(_BARS).startswith(_NEXT):
                rest = _after(line, quote, 0)
                if rest is not None:
                    kept[-1] += rest
                    inside = False
                continue
            inside = False
        # Not a regular expression: one that finds the last end is quadratic in what a caller can make long.
        at = line.find(quote.mark)
        start = -1 if at < 0 else line.find(quote.begin, at + len(quote.mark))
        if start < 0:
            kept.append(line)
            continue
        start += len(quote.begin)
        rest = _after(line, quote, start)
        kept.append(line[:start] + REDACTED + (rest or ""))
        inside = rest is None and quote.runs_on
    return "\n".join(kept) + text[len(body) :]


def _after(line: str, quote: _Quote, start: int) -> str | None:
    """
    Return what comes after the value on this line, with its end, or None where the value is not over.
    """
    if not quote.end:
        return None
    stop = line.rfind(quote.end, start)
    if stop < 0 or not quote.ended(line[stop + len(quote.end) :]):
        return None
    return line[stop:]
