"""
Foreign text is cut, marked, and never shows what was hidden before it was cut.
"""

from __future__ import annotations

import traceback
import types
from typing import Any

import pytest

from otel_correlation import guard
from otel_correlation.edge._record import _shown_query
from otel_correlation.policy import DEFAULT, LINES, HeaderCapture, bounds_for, scrubbed, scrubbed_stack, stack_of
from otel_correlation.policy.bounds import HEADER_VALUES, HEADERS

SECRET = f"hunter{1 + 1}"  # not a literal: a traceback shows source lines
MARK = "...[cut from "


@pytest.mark.parametrize("length", [0, 1, 99, 100, 101, 10_000])
def test_a_cut_is_within_the_limit_and_says_the_whole_length(length: int) -> None:
    """
    A text up to the limit stays; a longer one has exactly the limit, with a mark that says how long it was.
    """
    text = "é" * length
    cut = DEFAULT.cut(text, 100)
    if length <= 100:
        assert cut == text
    else:
        assert len(cut) == 100
        assert cut.endswith(f"é...[cut from {length} characters]")
    assert DEFAULT.cut(cut, 100) == cut
    assert len(DEFAULT.decode(text.encode("latin-1"), 100)) == min(length, 100)


def test_no_more_is_decoded_than_is_kept() -> None:
    """
    Of bytes only what is kept becomes text, with the mark in bytes; half a character is replaced.
    """

    class Counted(bytes):
        def decode(self, *_: Any, **__: Any) -> str:
            raise AssertionError

        def __getitem__(self, part: Any) -> Any:
            return bytes(self)[part]

    assert DEFAULT.decode(Counted(b"a" * 1000), 100) == "a" * 76 + "...[cut from 1000 bytes]"
    assert DEFAULT.decode("é".encode() * 1000, 99, "utf-8") == "é" * 37 + "\ufffd...[cut from 2000 bytes]"


@pytest.mark.parametrize("limit", [5, 100_000])
def test_a_limit_of_the_users_is_the_only_one(limit: int) -> None:
    """
    Where the user set a length, texts are cut at it as the SDK does: smaller or larger than ours, and without a mark.
    """
    bounds = bounds_for(limit)
    assert bounds.cut("x" * 200_000, bounds.user_agent) == "x" * limit
    assert bounds.decode(b"x" * 200_000, bounds.header) == "x" * limit
    assert scrubbed("x" * 200_000, bounds.message, bounds) == "x" * limit
    assert bounds.body == max(limit, DEFAULT.body)
    assert bounds_for(None) is DEFAULT


@pytest.mark.parametrize("mode", ["sensitive", "none"])
def test_a_query_is_cut_before_it_is_redacted_and_shows_no_more(mode: str) -> None:
    """
    A secret that the cut divides stays hidden, whatever stands before it, and the mark is never hidden with it.
    """
    for before in range(DEFAULT.query - 60, DEFAULT.query + 5):
        query = b"a=" + b"b" * (before - 10) + b"&token=" + SECRET.encode() * 1000
        shown = _shown_query(query, mode, DEFAULT)
        assert SECRET[:3] not in shown.replace(MARK, "")
        assert len(shown) <= DEFAULT.query
        assert shown.endswith(f"{MARK}{len(query)} bytes]")


def test_a_query_that_redaction_makes_longer_is_cut_again() -> None:
    """
    The bound holds for what is recorded, not only for what came.
    """
    shown = _shown_query(b"pin" + (b"=1&" + b"a" * 22 + b"_pin") * 120, "sensitive", DEFAULT)
    assert len(shown) == DEFAULT.query
    assert shown.endswith(" characters]")


@pytest.mark.parametrize(
    "text",
    [
        f"cannot reach postgres://user:{SECRET}@db/x",
        f"cannot reach 'https://user:{SECRET}@host/?a=b'",
        f"[parameters: ('{SECRET}', '{SECRET}')]",
        f"1 validation error\n  Value error [type=x, input_value='{SECRET}', input_type=str]",
        f"duplicate key\nDETAIL:  Key (password)=({SECRET}) already exists.",
    ],
)
@pytest.mark.parametrize("bounds", [DEFAULT, bounds_for(8_192)], ids=["ours", "the user's"])
def test_a_secret_that_a_cut_divides_stays_hidden(text: str, bounds: Any) -> None:
    """
    Wherever an exception's text is cut, it shows no part of what is hidden in the whole; a second cut changes nothing.
    """
    assert SECRET not in scrubbed(text, bounds.message, bounds)
    for place in range(bounds.message - len(text) - 60, bounds.message + 2):
        long = "x" * place + " " + text + " " * 5 + "y" * 9_000
        shown = scrubbed(long, bounds.message, bounds)
        assert "hun" not in shown, (place, shown[-100:])
        assert len(shown) <= bounds.message
        if bounds.marked:
            assert scrubbed(shown, bounds.message, bounds) == shown
            assert shown.endswith(f"\n{MARK}{len(long)} characters]")


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as found:
        return found


def test_an_ordinary_exception_is_shown_as_python_shows_it() -> None:
    """
    Chains, groups, notes and syntax errors of usual size are what ``traceback`` makes of them.
    """
    cases: list[BaseException] = [
        raised(ValueError("a")),
        raised(KeyError(1)),
        raised(ExceptionGroup("g", [OSError("b")])),
    ]
    cases[0].add_note("noted")
    cases[1].__cause__ = cases[0]
    try:
        compile("a b", "f", "exec")
    except SyntaxError as found:
        cases.append(found)
    for error in cases:
        expected = "".join(traceback.format_exception(error))
        assert stack_of(error, error.__traceback__, DEFAULT) == expected


def test_a_long_text_keeps_the_whole_of_the_frames() -> None:
    """
    An exception with 10 MB of text is shown with its frames and its type; the text is cut, and marked.
    """
    error = raised(ValueError("x" * 10_000_000))
    error.add_note("n" * 1_000_000)
    shown = stack_of(error, error.__traceback__, DEFAULT)
    assert len(shown) <= DEFAULT.stack
    assert "in raised" in shown
    assert f"\n{MARK}10000000 characters]" in shown
    assert f"\n{MARK}1000000 characters]" in shown
    assert "ValueError: xxx" in shown


def test_a_long_traceback_keeps_its_head_and_its_end() -> None:
    """
    What is left out of a traceback is its middle: where it began and the line that failed are there.
    """
    source = (
        "".join(f"def f{n}():\n    f{n + 1}()\n" for n in range(700))
        + f"def f700():\n    raise ValueError('{'e' * 500}')\n"
    )
    names: dict[str, Any] = {}
    exec(compile(source, "long_name_of_a_module.py", "exec"), names)
    with pytest.raises(ValueError, match="eee") as caught:
        names["f0"]()
    error = caught.value
    whole = "".join(traceback.format_exception(error))
    shown = stack_of(error, error.__traceback__, DEFAULT)
    assert len(whole) > DEFAULT.stack >= len(shown) > DEFAULT.stack - 500
    head, mark, tail = shown.partition(f"{MARK}{len(whole)} characters]\n")
    assert whole.startswith(head)
    assert mark
    assert whole.endswith(tail)
    assert "in f3\n" in head
    assert "in f700\n" in tail
    assert scrubbed_stack(shown, DEFAULT) == shown


def test_the_end_of_a_traceback_never_begins_within_a_value() -> None:
    """
    A secret in the text of an exception in the middle of a chain is not shown by the part that is kept of the end.
    """
    line = '  File "a.py", line 1, in f\n    f()\n'
    value = f"sqlalchemy.exc.IntegrityError: x\n[parameters: ('{SECRET}', '" + f"{SECRET}\n" * 2_000 + "')]\n"
    for shift in range(0, 600, 7):
        text = "Traceback (most recent call last):\n" + line * 700 + "z" * shift + value + line * 100 + "KeyError: 1\n"
        shown = scrubbed_stack(text, DEFAULT)
        assert SECRET not in shown
        assert len(shown) <= DEFAULT.stack


def chain(length: int) -> BaseException:
    error: BaseException = raised(ValueError("the root cause"))
    for number in range(length):
        following = raised(RuntimeError(f"{number}"))
        following.__context__ = error
        error = following
    return error


def deep() -> BaseException:
    error = raised(ValueError("deep"))
    found: Any = error.__traceback__
    for _ in range(50_000):
        found = types.TracebackType(found, found.tb_frame, found.tb_lasti, found.tb_lineno)
    return error.with_traceback(found)


HUGE: dict[str, Any] = {
    "a chain": lambda: chain(5_000),
    "a group": lambda: ExceptionGroup(
        "many", [raised(ValueError("the root cause"))] + [OSError(n) for n in range(20_000)]
    ),
    "groups in groups": lambda: ExceptionGroup(
        "outer", [ExceptionGroup("inner", [OSError(n) for n in range(60)])] * 60
    ),
    "frames": deep,
    "a chain of long texts": lambda: chain(70),
}


@pytest.mark.parametrize("case", HUGE)
def test_a_huge_exception_costs_what_a_small_one_does(case: str) -> None:
    """
    Of a chain, a group or a traceback without end the first and the last part are formatted, and nothing between them.
    """
    error = HUGE[case]()
    shown = stack_of(error, error.__traceback__, DEFAULT)
    assert len(shown) <= DEFAULT.stack
    assert shown.rstrip().rpartition("\n")[2].startswith(type(error).__name__)
    if "chain" in case or case == "a group":
        assert "the root cause" in shown
        assert shown.count("Traceback (most recent call last)") == 2
    if case == "frames":
        assert "frames are left out" in shown


def test_a_cycle_of_exceptions_ends() -> None:
    """
    Exceptions that are each other's context are shown once each.
    """
    one, other = raised(ValueError("one")), raised(KeyError("other"))
    one.__context__, other.__context__ = other, one
    assert "ValueError: one" in stack_of(one, one.__traceback__, DEFAULT)
    error = chain(100)
    found = error
    while found.__context__ is not None:
        found = found.__context__
    found.__context__ = error
    assert len(stack_of(error, error.__traceback__, LINES)) <= LINES.stack


def test_captured_headers_are_bounded_in_number_length_and_sum() -> None:
    """
    However many headers match, and however long they are, one span gets so many values and characters; the rest counts.
    """
    capture = HeaderCapture([".*"], ["x-secret"], "http.request.header.")
    long = b"v" * 2_000_000
    found = capture.attributes([(b"x-a", long), (b"x-secret", long), (b"n" * 300, b"v"), (b"x-b", b"ok")])
    assert found["http.request.header.x-a"][0].endswith("v...[cut from 2000000 bytes]")
    assert len(found["http.request.header.x-a"][0]) == DEFAULT.header
    assert found["http.request.header.x-secret"] == ("[REDACTED]",)
    assert found["http.request.header.x-b"] == ("ok",)
    assert len(found) == 3
    assert not guard.counters()
    found = capture.attributes([(b"x-a", b"v")] * 10_000)
    assert len(found["http.request.header.x-a"]) == HEADER_VALUES
    found = capture.attributes([(b"x-%d" % number, long) for number in range(60)])
    assert sum(len(value) for values in found.values() for value in values) <= HEADERS
    assert guard.counters() == {"captured_headers.over_limit": 2}
