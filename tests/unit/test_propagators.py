"""
Trace Context Level 2, Baggage and the request id on the wire.
"""

from __future__ import annotations

import copy
import pickle
import re
import time
from importlib.metadata import EntryPoint, EntryPoints
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry import baggage, trace
from opentelemetry import context as otel_context
from opentelemetry.baggage import _BAGGAGE_KEY
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import Getter, Setter, TextMapPropagator
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags
from opentelemetry.trace.span import TraceState as ApiTraceState

from otel_correlation import guard, identity, propagators
from otel_correlation.propagators import (
    BaggagePropagator,
    RequestIdPropagator,
    TraceContextPropagator,
    TraceState,
    build,
    extract_baggage_from_headers,
    extract_from_headers,
    format_baggage,
    format_traceparent,
    format_tracestate,
)
from otel_correlation.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

TRACE = "12345678901234567890123456789012"
SPAN = "1234567890123456"
PARENT = f"00-{TRACE}-{SPAN}-01"

# The grammars again, written from the specifications and not from the code under test.
LEVEL_2_LIST = re.compile(
    r"[a-z0-9][a-z0-9_\-*/@]{0,255}=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
    r"(,[a-z0-9][a-z0-9_\-*/@]{0,255}=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]){0,31}"
)
_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_OCTET = r"[\x21\x23-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]"
_OWS = r"[ \t]*"
_PAIR = rf"{_TOKEN}{_OWS}={_OWS}{_OCTET}*(?:{_OWS};{_OWS}{_TOKEN}{_OWS}(?:={_OWS}{_OCTET}*)?)*"
BAGGAGE_STRING = re.compile(rf"{_PAIR}(?:{_OWS},{_OWS}{_PAIR})*")

KEYS = st.from_regex(r"[a-z0-9][a-z0-9_\-*/@]{0,255}", fullmatch=True)
VALUES = st.from_regex(r"[ -+\--<>-~]{0,255}[!-+\--<>-~]", fullmatch=True)
MEMBERS = st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=32, unique_by=lambda pair: pair[0])
HEADERS = st.lists(st.binary(max_size=200), max_size=4)


def carry(**fields: str | list[str]) -> dict[str, str | list[str]]:
    """
    A carrier whose fields may come twice.
    """
    return dict(fields)


def state_of(*fields: str) -> TraceState:
    """
    The tracestate that these header fields make.
    """
    found = extract_from_headers([PARENT.encode()], [field.encode("latin-1") for field in fields])
    assert found is not None
    assert f"{found.trace_id:032x}" == TRACE
    assert isinstance(found.trace_state, TraceState)
    return found.trace_state


def context_of(span_context: SpanContext) -> Context:
    """
    A context whose current span is this one.
    """
    return trace.set_span_in_context(NonRecordingSpan(span_context), Context())


class TestTraceparent:
    @pytest.mark.parametrize(
        "value",
        [
            PARENT,
            f" {PARENT}",
            f"\t{PARENT}",
            f"{PARENT} ",
            f"{PARENT}\t",
            f"\t {PARENT} \t",
            f"cc-{TRACE}-{SPAN}-01",
            f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like",
            f"01-{TRACE}-{SPAN}-01-",
            f"fe-{TRACE}-{SPAN}-01",
            f"01-{TRACE}-{SPAN}-01 ",
        ],
    )
    def test_continued(self, value: str) -> None:
        """
        A valid traceparent of this or a later version is continued, whitespace around it or not.
        """
        found = extract_from_headers([value.encode()], [])
        assert found is not None
        assert format_traceparent(found) == PARENT
        assert found.is_remote

    @pytest.mark.parametrize(
        "value",
        [
            "",
            " ",
            f"00-{TRACE}-{SPAN}-01.",
            f"00-{TRACE}-{SPAN}-01-",
            f"00-{TRACE}-{SPAN}-01-what-the-future-will-be-like",
            f"cc-{TRACE}-{SPAN}-01.what-the-future-will-be-like",
            f"cc-{TRACE}-{SPAN}-011",
            f"ff-{TRACE}-{SPAN}-01",
            f"ff-{TRACE}-{SPAN}-01-more",
            f".0-{TRACE}-{SPAN}-01",
            f"0.-{TRACE}-{SPAN}-01",
            f"000-{TRACE}-{SPAN}-01",
            f"0-{TRACE}-{SPAN}-01",
            f"0A-{TRACE}-{SPAN}-01",
            f"00-{'0' * 32}-{SPAN}-01",
            f"00-.{TRACE[1:]}-{SPAN}-01",
            f"00-{TRACE[:-1]}.-{SPAN}-01",
            f"00-{TRACE[:-1]}A-{SPAN}-01",
            f"00-{TRACE}3-{SPAN}-01",
            f"00-{TRACE[1:]}-{SPAN}-01",
            f"00-{TRACE}-{'0' * 16}-01",
            f"00-{TRACE}-.{SPAN[1:]}-01",
            f"00-{TRACE}-{SPAN[:-1]}.-01",
            f"00-{TRACE}-{SPAN[:-1]}F-01",
            f"00-{TRACE}-{SPAN}7-01",
            f"00-{TRACE}-{SPAN[1:]}-01",
            f"00-{TRACE}-{SPAN}-.0",
            f"00-{TRACE}-{SPAN}-0.",
            f"00-{TRACE}-{SPAN}-0F",
            f"00-{TRACE}-{SPAN}-001",
            f"00-{TRACE}-{SPAN}-1",
            f"00-{TRACE}-{SPAN}",
            f"{PARENT}\n",
            f"{PARENT},{PARENT}",
            f"{PARENT}\x00",
            "\xe9" + PARENT[1:],
            "00-" + "\u0661" * 32 + f"-{SPAN}-01",
        ],
    )
    def test_restarted(self, value: str) -> None:
        """
        Anything else starts a new trace, and its tracestate is dropped with it.
        """
        assert extract_from_headers([value.encode()], [b"foo=1"]) is None

    def test_two_fields_restart_the_trace(self) -> None:
        """
        Two traceparent fields start a new trace, even if they are the same.
        """
        assert extract_from_headers([PARENT.encode()] * 2, []) is None
        assert extract_from_headers([PARENT.encode(), b""], []) is None

    def test_tracestate_without_traceparent(self) -> None:
        """
        A tracestate alone is dropped.
        """
        assert extract_from_headers([], [b"foo=1"]) is None

    @pytest.mark.parametrize("version", ["00", "01", "fe"])
    def test_flags(self, version: str) -> None:
        """
        Sampled and random survive, bit by bit; every other flag leaves as zero.
        """
        for flags in range(256):
            found = extract_from_headers([f"{version}-{TRACE}-{SPAN}-{flags:02x}".encode()], [])
            assert found is not None
            assert found.trace_flags.sampled == bool(flags & 1)
            assert found.trace_flags.random_trace_id == bool(flags & 2)
            assert format_traceparent(found) == f"00-{TRACE}-{SPAN}-{flags & 3:02x}"

    def test_foreign_flags_stay_inside(self) -> None:
        """
        Flags that other code put into a span context do not leave either.
        """
        assert format_traceparent(SpanContext(1, 2, False, TraceFlags(0xFD))).endswith("-01")

    @given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.integers(0, 3))
    def test_round_trip(self, trace_id: int, span_id: int, flags: int) -> None:
        """
        What is written is read back, whatever the ids.
        """
        sent = SpanContext(trace_id, span_id, False, TraceFlags(flags))
        found = extract_from_headers([format_traceparent(sent).encode()], [])
        assert found is not None
        assert (found.trace_id, found.span_id, found.trace_flags) == (trace_id, span_id, flags)

    @given(HEADERS, HEADERS)
    @example([PARENT.encode()], [b"\xff" * 100_000])
    @example([b"01" + PARENT[2:].encode() + b"-" * 1_000_000], [b"," * 1_000_000])
    @example([b" " * 1_000_000 + PARENT.encode() + b" " * 1_000_000 + b"x"], [])
    def test_never_raises(self, parents: list[bytes], states: list[bytes]) -> None:
        """
        No bytes at all make it raise, and what it accepts it can send on.
        """
        found = extract_from_headers(parents, states)
        if found is not None:
            assert found.is_valid
            assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[0-3]", format_traceparent(found))
            header = format_tracestate(found.trace_state)
            assert not header or LEVEL_2_LIST.fullmatch(header)


_LOWER = "abcdefghijklmnopqrstuvwxyz"
_ALL_VALUES = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) not in ",=")


class TestTracestate:
    @pytest.mark.parametrize(
        ("fields", "header"),
        [
            (["foo=1,bar=2"], "foo=1,bar=2"),
            (["foo=1 \t , \t bar=2, \t baz=3"], "foo=1,bar=2,baz=3"),
            (["foo=1\t \t,\t \tbar=2,\t \tbaz=3"], "foo=1,bar=2,baz=3"),
            ([" foo=1"], "foo=1"),
            (["\tfoo=1"], "foo=1"),
            (["foo=1 "], "foo=1"),
            (["foo=1\t"], "foo=1"),
            (["\t foo=1 \t"], "foo=1"),
            (["foo=  1"], "foo=  1"),
            ([""], ""),
            ([",, ,\t,"], ""),
            (["foo=1", ""], "foo=1"),
            (["", "foo=1"], "foo=1"),
            (["foo=1,,bar=2,"], "foo=1,bar=2"),
            (["foo=1,bar=2", "rojo=1,congo=2", "baz=3"], "foo=1,bar=2,rojo=1,congo=2,baz=3"),
            (["foo=1,foo=1"], "foo=1"),
            (["foo=1,foo=2"], "foo=1"),
            (["foo=1", "foo=2,bar=3"], "foo=1,bar=3"),
            (["foo@=1,bar=2"], "foo@=1,bar=2"),
            (["foo@@bar=1,bar=2"], "foo@@bar=1,bar=2"),
            (["foo@bar@baz=1,bar=2"], "foo@bar@baz=1,bar=2"),
            (["1st=1"], "1st=1"),
            (["foo=1", "z" * 256 + "=1"], "foo=1," + "z" * 256 + "=1"),
            (["foo=1", "t" * 241 + "@" + "v" * 14 + "=1"], "foo=1," + "t" * 241 + "@" + "v" * 14 + "=1"),
            (["foo=1", "t" * 242 + "@v=1"], "foo=1," + "t" * 242 + "@v=1"),
            (["foo=1", "t@" + "v" * 15 + "=1"], "foo=1,t@" + "v" * 15 + "=1"),
            ([_LOWER + "0123456789_-*/=" + _ALL_VALUES], _LOWER + "0123456789_-*/=" + _ALL_VALUES),
            (
                [_LOWER + "0123456789_-*/@a-z0-9_-*/=" + _ALL_VALUES],
                _LOWER + "0123456789_-*/@a-z0-9_-*/=" + _ALL_VALUES,
            ),
            (["a=" + "v" * 256], "a=" + "v" * 256),
            (["a=" + " " * 255 + "v"], "a=" + " " * 255 + "v"),
        ],
    )
    def test_inherited(self, fields: list[str], header: str) -> None:
        """
        What follows the Level 2 grammar goes on, in order, without whitespace, empty members and second duplicates.
        """
        assert state_of(*fields).to_header() == header

    @pytest.mark.parametrize(
        "fields",
        [
            ["foo =1"],
            ["FOO=1"],
            ["foo.bar=1"],
            ["@foo=1,bar=2"],
            ["_foo=1,bar=2"],
            ["foo=bar=baz"],
            ["foo=,bar=3"],
            ["foo= ,bar=3"],
            ["foo,bar=3"],
            ["=1,bar=3"],
            ["foo=1", "z" * 257 + "=1"],
            ["foo=1", "a=" + "v" * 257],
            ["foo=1", "a=\x7f"],
            ["foo=1", "a=b\tc"],
            ["foo=1", "a=b\n"],
            ["foo=1", "a=\xe9"],
            [",".join(f"bar{number:02}={number:02}" for number in range(1, 34))],
            [",".join(f"k{number}={'v' * 250}" for number in range(1, 33)), " " * 40_000],
        ],
    )
    def test_discarded(self, fields: list[str]) -> None:
        """
        One wrong member, a 33rd one or an absurd length discards the tracestate and never the traceparent.
        """
        assert state_of(*fields).to_header() == ""

    def test_thirty_two_members(self) -> None:
        """
        32 members in four fields are all inherited.
        """
        fields = [",".join(f"bar{ten + one:02}=1" for one in range(1, 9)) for ten in (0, 8, 16, 24)]
        assert list(state_of(*fields)) == [f"bar{number:02}" for number in range(1, 33)]

    @pytest.mark.parametrize("value", ["ot=th:0", "ot=", "\xe9=1"])
    def test_short_ones_are_remembered(self, value: str) -> None:
        """
        A short tracestate that came before gives the same answer again.
        """
        assert state_of(value) is state_of(value)

    @given(MEMBERS, st.lists(st.sampled_from([",", " ,", ", \t", ",,", " , ,"]), min_size=32, max_size=32))
    def test_order_is_kept(self, members: list[tuple[str, str]], commas: list[str]) -> None:
        """
        Members keep their order and their values, however they were separated.
        """
        text = "".join(f"{key}={value}{comma}" for (key, value), comma in zip(members, commas, strict=False))
        assert list(TraceState.from_header([text]).items()) == members

    def test_more_than_512_characters(self) -> None:
        """
        A tracestate of 512 characters and far more is sent whole.
        """
        text = ",".join(f"k{number:02}={'v' * 240}" for number in range(32))
        assert len(text) > 7_500
        assert format_tracestate(state_of(text)) == text

    @given(MEMBERS)
    @example([(f"k{number:02}", "v" * (256 if number % 2 else 20)) for number in range(32)])
    @example([(f"k{number:02}" + "k" * 250, "v" * 256) for number in range(32)])
    def test_truncation(self, members: list[tuple[str, str]]) -> None:
        """
        Too long a tracestate loses whole members: the long ones from the right, then the others from the right.
        """
        header = format_tracestate(TraceState(members))
        assert len(header) <= propagators.MAX_TRACESTATE_OUT
        assert LEVEL_2_LIST.fullmatch(header)
        sent = [f"{key}={value}" for key, value in members]
        kept = header.split(",")
        assert [member for member in sent if member in kept] == kept
        if len(",".join(sent)) <= propagators.MAX_TRACESTATE_OUT:
            assert kept == sent
        else:
            long = [member for member in sent if len(member) > 128]
            assert [member for member in kept if len(member) > 128] == long[: sum(len(m) > 128 for m in kept)]
            assert len(header) + 1 + 513 > propagators.MAX_TRACESTATE_OUT or kept == sent

    def test_truncation_spares_short_members(self) -> None:
        """
        The members of more than 128 characters go first, whatever stands right of them.
        """
        long = [(f"k{number:02}" + "k" * 46, "v" * 256) for number in range(30)]
        state = TraceState([("first", "1"), *long, ("last", "1")])
        # 30 members of 306 characters and their commas: 26 of them, and the short ones, fit in 8,000.
        assert format_tracestate(state) == TraceState([("first", "1"), *long[:26], ("last", "1")]).to_header()

    def test_truncation_of_an_object_of_the_api(self) -> None:
        """
        A tracestate made by somebody else's code is sent within the same limits.
        """
        members = [(f"k{number:02}" + "k" * 200, "v" * 100) for number in range(32)]
        assert len(format_tracestate(ApiTraceState(members))) <= propagators.MAX_TRACESTATE_OUT
        assert format_tracestate(ApiTraceState([("a", "1")])) == "a=1"


class TestTraceStateObject:
    def test_is_one_of_the_api(self) -> None:
        """
        The SDK and every other package sees a TraceState of the API.
        """
        state = TraceState([("1st", "a"), ("b@c@d", "2")])
        assert isinstance(state, ApiTraceState)
        assert dict(state) == {"1st": "a", "b@c@d": "2"}
        assert (len(state), "1st" in state, state["1st"], state.get("x")) == (2, True, "a", None)
        assert TraceState.get_default() == TraceState() == ApiTraceState()

    def test_constructor_keeps_what_is_valid(self) -> None:
        """
        Wrong pairs, second duplicates and members beyond the 32nd are left out, without a word to the log.
        """
        wrong: list[Any] = [("A", "1"), ("a", ""), ("a", "1"), ("a", "2"), (5, "x"), ("x", None)]
        assert TraceState(wrong).to_header() == "a=1"
        assert len(TraceState([(f"k{number}", "1") for number in range(40)])) == 32

    @given(MEMBERS, KEYS, VALUES)
    @example([(f"k{number}", "1") for number in range(32)], "new", "1")
    @example([(f"k{number}", "1") for number in range(32)], "k31", "2")
    def test_with_member(self, members: list[tuple[str, str]], key: str, value: str) -> None:
        """
        The new or changed member is leftmost, the others keep their order, and there are never more than 32.
        """
        state = TraceState(members)
        changed = state.with_member(key, value)
        others = [pair for pair in members if pair[0] != key]
        assert list(changed.items()) == [(key, value), *others][:32]
        assert list(state.items()) == members
        assert list(changed.without(key)) == [name for name, _ in others[:31]]

    @pytest.mark.parametrize(("key", "value"), [("A", "1"), ("a", "1,2"), ("a", ""), ("", "1")])
    def test_with_a_wrong_member(self, key: str, value: str) -> None:
        """
        A pair outside the grammar changes nothing.
        """
        state = TraceState([("b", "2")])
        assert state.with_member(key, value) is state
        assert state.add(key, value) is state
        assert state.update(key, value) is state

    def test_methods_of_the_api_keep_the_class(self) -> None:
        """
        add, update and delete, copies and pickles keep the Level 2 class.
        """
        state = TraceState([("1a@b@c", "1"), ("d", "2")])
        assert state.to_header() == "1a@b@c=1,d=2"
        changed = {
            "e=3,1a@b@c=1,d=2": state.add("e", "3"),
            "d=4,1a@b@c=1": state.update("d", "4"),
            "1a@b@c=1": state.delete("d"),
            "1a@b@c=1,d=2": copy.deepcopy(state),
        }
        for header, result in changed.items():
            assert isinstance(result, TraceState)
            assert result.to_header() == header
        assert state.add("d", "9") is state
        assert state.delete("nothing") is state
        assert copy.copy(state).to_header() == state.to_header()
        assert pickle.loads(pickle.dumps(state)).to_header() == state.to_header()

    def test_header_is_made_once(self) -> None:
        """
        A second to_header() costs nothing.
        """
        state = TraceState([("a", "1"), ("b", "2")])
        assert state.to_header() is state.to_header()

    def test_survives_the_sdk(self) -> None:
        """
        A child span of the SDK's hands on what a caller sent, Level 2 keys included.
        """
        parent = extract_from_headers([PARENT.encode()], [b"a@b@c=1,1st=2"])
        assert parent is not None
        tracer = TracerProvider(sampler=ParentBased(ALWAYS_ON), shutdown_on_exit=False).get_tracer("test")
        child = tracer.start_span("child", context=context_of(parent)).get_span_context()
        assert format_traceparent(child).startswith(f"00-{TRACE}-")
        assert format_tracestate(child.trace_state) == "a@b@c=1,1st=2"


class _Broken(Getter[Any]):
    def get(self, carrier: Any, key: str) -> list[str] | None:
        raise RuntimeError

    def keys(self, carrier: Any) -> list[str]:
        raise RuntimeError


class _Raw(Getter[Any]):
    """
    A getter that returns what is stored, as some integrations do.
    """

    def get(self, carrier: Any, key: str) -> list[str] | None:
        return carrier.get(key)  # type: ignore[no-any-return]

    def keys(self, carrier: Any) -> list[str]:
        return []


ALL: list[Callable[[], TextMapPropagator]] = [
    TraceContextPropagator,
    BaggagePropagator,
    RequestIdPropagator,
    lambda: build(Settings()),
]


class TestTraceContextPropagator:
    def test_extract(self) -> None:
        """
        The caller's span is current in the context that is returned, and the rest of it stays.
        """
        before = Context({"other": 1})
        after = TraceContextPropagator().extract(carry(traceparent=PARENT, tracestate=["a=1", "b=2"]), before)
        found = trace.get_current_span(after).get_span_context()
        assert (format_traceparent(found), found.trace_state.to_header()) == (PARENT, "a=1,b=2")
        assert after["other"] == 1
        assert "other" in before
        assert len(before) == 1

    @pytest.mark.parametrize("parents", [[], ["nonsense"], [PARENT, PARENT], [PARENT.upper() + "Z"]])
    def test_nothing_is_stored(self, parents: list[str]) -> None:
        """
        What cannot be parsed leaves the context as it was, a current span included.
        """
        before = context_of(SpanContext(5, 6, False))
        assert TraceContextPropagator().extract(carry(traceparent=parents), before) is before
        assert TraceContextPropagator().extract(carry(traceparent=parents)) == Context()

    @pytest.mark.parametrize("value", [PARENT, [PARENT], PARENT.encode(), (PARENT.encode(),)])
    def test_lenient_getters(self, value: object) -> None:
        """
        A getter that returns one text, or bytes, in place of a list of text is understood.
        """
        after = TraceContextPropagator().extract({"traceparent": value}, getter=_Raw())
        assert format_traceparent(trace.get_current_span(after).get_span_context()) == PARENT

    def test_text_that_no_header_can_hold(self) -> None:
        """
        Characters outside ASCII discard the tracestate; they are not replaced by something valid.
        """
        for character in ("\u20ac", "\xe9", "\udcff"):
            after = TraceContextPropagator().extract(carry(traceparent=PARENT, tracestate=f"a=1,b={character}"))
            span_context = trace.get_current_span(after).get_span_context()
            assert (span_context.is_valid, span_context.trace_state.to_header()) == (True, "")

    def test_inject(self) -> None:
        """
        Traceparent is written, and tracestate only if there is one.
        """
        carrier: dict[str, str | list[str]] = {}
        TraceContextPropagator().inject(carrier, context_of(SpanContext(1, 2, False, TraceFlags(3))))
        assert carrier == {"traceparent": f"00-{1:032x}-{2:016x}-03"}
        state = TraceState([("a", "1")])
        token = otel_context.attach(context_of(SpanContext(1, 2, False, TraceFlags(0), state)))
        try:
            TraceContextPropagator().inject(carrier)
        finally:
            otel_context.detach(token)
        assert carrier == {"traceparent": f"00-{1:032x}-{2:016x}-00", "tracestate": "a=1"}

    def test_inject_without_a_span(self) -> None:
        """
        Without a valid span nothing is written.
        """
        carrier: dict[str, str | list[str]] = {}
        TraceContextPropagator().inject(carrier, Context())
        TraceContextPropagator().inject(carrier, context_of(SpanContext(1, 0, False)))
        assert carrier == {}


class TestBoundary:
    @pytest.mark.parametrize("make", ALL)
    def test_a_broken_getter(self, make: Callable[[], TextMapPropagator], monkeypatch: pytest.MonkeyPatch) -> None:
        """
        A getter that raises costs the caller's identity and nothing else.
        """
        monkeypatch.delenv(guard.STRICT_ENV)
        before = Context({"other": 1})
        assert make().extract({}, before, _Broken()) == before

    @pytest.mark.parametrize("make", ALL)
    @given(
        st.dictionaries(st.sampled_from(["traceparent", "tracestate", "baggage", "x-request-id"]), st.lists(st.text()))
    )
    def test_any_text(self, make: Callable[[], TextMapPropagator], carrier: Mapping[str, str | list[str]]) -> None:
        """
        No text makes extract raise, and the same propagator can send on what it took.
        """
        make().inject({}, make().extract(carrier))


class TestBaggage:
    @pytest.mark.parametrize(
        ("fields", "values"),
        [
            (["a=1"], {"a": "1"}),
            (["a=1,b=2"], {"a": "1", "b": "2"}),
            (["a=1", "b=2", "c=3"], {"a": "1", "b": "2", "c": "3"}),
            ([" a\t= 1 ,\tb = 2 "], {"a": "1", "b": "2"}),
            (["a=1;p1;p2=v;p3 = w , b=2"], {"a": "1", "b": "2"}),
            (["a=x=y=="], {"a": "x=y=="}),
            (["a="], {"a": ""}),
            (["a=1+2"], {"a": "1+2"}),
            (["a=%20x%20"], {"a": " x "}),
            (["a=Am%C3%A9lie"], {"a": "Am\xe9lie"}),
            (["a=%E2%82%AC%2C%3B%25"], {"a": "\u20ac,;%"}),
            (["a=%FF%C3x"], {"a": "\ufffd\ufffdx"}),
            (["a=100%"], {"a": "100%"}),
            (["user%20id=1"], {"user id": "1"}),
            (["a=1,a=2"], {"a": "2"}),
            (['a=1,,nonsense,b c=2,=3,\xe9=4,d=\xe9,e=a b,f="1",g=1;,h=1;p p,i=\\,j=5'], {"a": "1", "j": "5"}),
            (["a=1", "", ",", "b=2"], {"a": "1", "b": "2"}),
        ],
    )
    def test_values(self, fields: list[str], values: dict[str, str]) -> None:
        """
        All fields are one list; values are decoded, a plus sign is a plus sign, and wrong members are left out.
        """
        context = extract_baggage_from_headers([field.encode("latin-1") for field in fields], Context())
        assert dict(baggage.get_all(context)) == values

    @pytest.mark.parametrize("fields", [[], [b""], [b",, "], [b"nonsense"], [b"\xff\x00"], [b"a=" + b"x" * 9_000]])
    def test_nothing_is_stored(self, fields: list[bytes]) -> None:
        """
        Where nothing can be parsed the very same context comes back.
        """
        before = Context({"other": 1})
        assert extract_baggage_from_headers(fields, before) is before

    @pytest.mark.parametrize(
        "header",
        [
            "a=1;p1;p2=v,b=2",
            "a=%20x%20,b=%e2%82%ac;k=%FF",
            "a=1,b=2,a=3;p",
            "a=100%,b=x+y,c==",
            "k1=v1;property1;property2,key2=value2,key3=value3;propertyKey=propertyValue",
        ],
    )
    def test_an_untouched_header_goes_on_as_it_came(self, header: str) -> None:
        """
        Properties, duplicates and the spelling of every member survive a hop.
        """
        assert format_baggage(extract_baggage_from_headers([header.encode()], Context())) == header

    def test_a_changed_value_leaves_the_others_alone(self) -> None:
        """
        A changed value is encoded anew without the old properties; removed ones go; others keep theirs.
        """
        context = extract_baggage_from_headers([b"a=1;p=x,b=2;q,c=3;r,a=4;s,d=%41;t"], Context())
        context = baggage.set_baggage("b", "two, too", context)
        context = baggage.remove_baggage("c", context)
        context = baggage.set_baggage("e", "5", context)
        context = baggage.set_baggage("d", "A", context)
        assert format_baggage(context) == "a=1;p=x,a=4;s,d=%41;t,b=two%2C%20too,e=5"
        assert format_baggage(baggage.clear(context)) == ""

    def test_a_second_extract_adds(self) -> None:
        """
        Baggage that the context holds stays unless the caller names the same key.
        """
        context = extract_baggage_from_headers([b"a=1;p,b=2;q"], baggage.set_baggage("z", "0", Context()))
        context = extract_baggage_from_headers([b"b=3;r,c=4"], context)
        assert format_baggage(context) == "z=0,a=1;p,b=3;r,c=4"
        assert dict(baggage.get_all(context)) == {"z": "0", "a": "1", "b": "3", "c": "4"}

    @pytest.mark.parametrize(("count", "kept"), [(64, 64), (65, 64), (500, 64)])
    def test_member_limit(self, count: int, kept: int) -> None:
        """
        64 members are propagated, more are left out whole and counted.
        """
        context = extract_baggage_from_headers([f"k{number}=v;p".encode() for number in range(count)], Context())
        assert len(baggage.get_all(context)) == kept
        assert format_baggage(context) == ",".join(f"k{number}=v;p" for number in range(kept))
        assert guard.counters().get("baggage.members_over_limit", 0) == count - kept

    def test_size_limit(self) -> None:
        """
        8,192 bytes in several fields are propagated; of a longer list nothing beyond them is read, nor part of a member.
        """
        first, second = "a=" + "x" * 4_000, "b=" + "y" * (8_192 - 4_003 - 2)
        fits = [first.encode(), second.encode()]
        assert format_baggage(extract_baggage_from_headers(fits, Context())) == f"{first},{second}"
        assert guard.counters() == {}
        over = [first.encode(), second.encode() + b"y", b"c=1"]
        assert format_baggage(extract_baggage_from_headers(over, Context())) == first
        assert guard.counters() == {"baggage.members_over_limit": 2}

    def test_a_huge_header_is_cut_between_members(self) -> None:
        """
        Of a header beyond any limit only a bounded part is read, and never a partial member.
        """
        fields = [b" " * 8_180 + b"aa=123456789012345,bb=2"]
        assert format_baggage(extract_baggage_from_headers(fields, Context())) == ""
        fields = [b"a=1," + b" " * 1_000_000 + b",b=2"]
        assert format_baggage(extract_baggage_from_headers(fields, Context())) == "a=1"

    @pytest.mark.parametrize(
        "worst",
        [
            lambda size: b"a=b" + b";p= " * size + b'"',
            lambda size: b"a=b" + b"; p =\t" * size + b'"',
            lambda size: b"a" + b" " * size * 50 + b'"',
            lambda size: b"a= " + b" " * size * 50 + b'"',
            lambda size: b"a=b" + b";p" * size + b" " * size * 50 + b"=\x00",
        ],
    )
    def test_a_member_that_is_wrong_at_its_end(self, worst: Callable[[int], bytes]) -> None:
        """
        Ten times as many properties, or as much whitespace, cost at most some forty times as much: nothing doubles.
        """

        def cost(size: int) -> int:
            fields = [worst(size)]
            times = []
            for _ in range(5):
                before = time.process_time_ns()
                assert extract_baggage_from_headers(fields, before_all) is before_all
                times.append(time.process_time_ns() - before)
            return min(times)

        before_all = Context()
        # Of the same size as the first doubling that would be felt; 20 properties once took most of a second.
        assert cost(20) < 40 * max(cost(2), 50_000)

    @given(st.text(alphabet="%0aFf1g\xc3", max_size=30))
    def test_values_are_decoded_as_everybody_does(self, text: str) -> None:
        """
        Each ``%`` before two hex digits is a byte of UTF-8, any other stays; as the standard library reads it.
        """
        sent = text.replace("\xc3", "%C3")
        held = baggage.get_all(extract_baggage_from_headers([f"a={sent}".encode()], Context()))
        assert held == {"a": unquote(sent)}

    @given(st.dictionaries(st.text(min_size=1), st.text(), max_size=8))
    @example({"a": " x ", "b+c": "+", "d,e;f=g": ',;=\\"%', "\u20ac": "\u20ac", "%41": "%41"})
    def test_round_trip(self, values: dict[str, str]) -> None:
        """
        Whatever text a service sets, the next service reads.
        """
        context = Context()
        for key, value in values.items():
            context = baggage.set_baggage(key, value, context)
        header = format_baggage(context)
        assert not header or BAGGAGE_STRING.fullmatch(header)
        assert dict(baggage.get_all(extract_baggage_from_headers([header.encode()], Context()))) == values

    @given(st.lists(st.binary(max_size=300) | st.from_regex(_PAIR.encode(), fullmatch=True), max_size=8))
    def test_any_bytes(self, fields: list[bytes]) -> None:
        """
        No bytes make it raise; what goes out follows the grammar and the limits, and means the same again.
        """
        context = extract_baggage_from_headers(fields, Context())
        header = format_baggage(context)
        assert len(header) <= propagators.MAX_BAGGAGE_BYTES
        if header:
            assert BAGGAGE_STRING.fullmatch(header)
            assert header.count(",") < propagators.MAX_BAGGAGE_MEMBERS
        again = extract_baggage_from_headers([header.encode()], Context())
        assert baggage.get_all(again) == baggage.get_all(context)
        assert format_baggage(again) == header

    def test_values_that_are_not_text(self) -> None:
        """
        Numbers leave as text; an empty name and lone surrogates never raise.
        """
        context = baggage.set_baggage("n", 5, Context())
        context = baggage.set_baggage("", "nameless", context)
        context = baggage.set_baggage("s", "\udcff", context)
        assert format_baggage(context) == "n=5,s=?"

    def test_plus_is_sent_encoded(self) -> None:
        """
        A plus sign is sent so that receivers that take it for a space read it right, too.
        """
        assert format_baggage(baggage.set_baggage("a", "1+2 3", Context())) == "a=1%2B2%203"
        assert unquote("1%2B2%203") == "1+2 3"

    def test_a_baggage_of_somebody_elses_making(self) -> None:
        """
        A context whose baggage is not a mapping gives no header.
        """
        assert format_baggage(Context({_BAGGAGE_KEY: "strange"})) == ""

    def test_propagator(self) -> None:
        """
        The propagator reads every field and writes one, from the context given or the current one.
        """
        propagator = BaggagePropagator()
        context = propagator.extract(carry(baggage=["a=1;p", "b=2"]), Context({"other": 1}))
        assert context["other"] == 1
        carrier: dict[str, str | list[str]] = {}
        propagator.inject(carrier, context)
        assert carrier == {"baggage": "a=1;p,b=2"}
        carrier.clear()
        propagator.inject(carrier)
        assert carrier == {}
        token = otel_context.attach(context)
        try:
            propagator.inject(carrier)
        finally:
            otel_context.detach(token)
        assert set(carrier) == propagator.fields == {"baggage"}


class _PairGetter(Getter[Any]):
    """
    Reads lists of pairs, as message queues have them.
    """

    def get(self, carrier: Any, key: str) -> list[str] | None:
        return [value for name, value in carrier if name == key] or None

    def keys(self, carrier: Any) -> list[str]:
        return [name for name, _ in carrier]


class _PairSetter(Setter[Any]):
    def set(self, carrier: Any, key: str, value: str) -> None:
        carrier.append((key, value))


class TestRequestId:
    @pytest.mark.parametrize("name", ["x-request-id", "X-Request-ID", "X-REQUEST-ID"])
    @pytest.mark.parametrize("value", ["order-42", ["order-42"], [b"order-42"]])
    def test_extract(self, name: str, value: Any) -> None:
        """
        A valid id becomes the identity of the context, however the carrier spells the name.
        """
        after = RequestIdPropagator(Settings()).extract({name: value}, Context({"other": 1}))
        found = identity.get_from(after)
        assert found is not None
        assert found.request_id == "order-42"
        assert after["other"] == 1

    @pytest.mark.parametrize("value", ["", "a b", "a\n", "\xe9", "\u20ac", "a" * 201, ["a", "b"], ["a", "a"], []])
    def test_refused(self, value: str | list[str]) -> None:
        """
        A refused id, or two of them, leaves the context as it was.
        """
        before = Context()
        assert RequestIdPropagator(Settings()).extract({"X-Request-ID": value}, before) is before
        assert identity.get_from(RequestIdPropagator(Settings()).extract({"X-Request-ID": value})) is None

    def test_two_spellings_are_two_fields(self) -> None:
        """
        Two fields that differ in case only are refused like two fields.
        """
        carrier = {"X-Request-ID": "a", "x-request-id": "b"}
        assert identity.get_from(RequestIdPropagator(Settings()).extract(carrier)) is None

    def test_pairs(self) -> None:
        """
        A carrier of pairs is read once for each key, though its getter lists a key twice.
        """
        propagator = RequestIdPropagator(Settings(request_id_headers=(b"x-other", b"x-request-id")))
        found = identity.get_from(
            propagator.extract([("a", "1"), ("a", "2"), ("X-Request-ID", "id-1")], None, _PairGetter())
        )
        assert found is not None
        assert found.request_id == "id-1"
        twice = [("X-Request-ID", "id-1"), ("X-Request-ID", "id-1")]
        assert identity.get_from(propagator.extract(twice, None, _PairGetter())) is None

    def test_a_getter_without_keys(self) -> None:
        """
        A getter that lists no keys is asked for the lower-case name.
        """
        found = identity.get_from(RequestIdPropagator(Settings()).extract({"x-request-id": "id-1"}, None, _Raw()))
        assert found is not None

    def test_inject(self) -> None:
        """
        The id of the context, or of the current one, is written under the name of the settings.
        """
        propagator = RequestIdPropagator(Settings(response_header="X-Correlation-ID"))
        context = identity.set_in(Context(), identity.Identity("id-1"))
        carrier: dict[str, str | list[str]] = {}
        propagator.inject(carrier, context)
        assert carrier == {"X-Correlation-ID": "id-1"}
        carrier.clear()
        propagator.inject(carrier)
        propagator.inject(carrier, Context())
        assert carrier == {}
        token = otel_context.attach(context)
        try:
            propagator.inject(carrier)
        finally:
            otel_context.detach(token)
        assert set(carrier) == propagator.fields == {"X-Correlation-ID"}

    @pytest.mark.parametrize(
        "carrier",
        [
            {"X-Request-ID": "mine"},
            {"x-request-id": "mine"},
            {b"x-REQUEST-id": b"mine"},
            [("x-request-id", "mine")],
            [[b"X-Request-ID", b"mine"]],
        ],
    )
    def test_what_the_caller_set_stays(self, carrier: Any) -> None:
        """
        An id that is in the carrier already is left alone.
        """
        before = copy.deepcopy(carrier)
        context = identity.set_in(Context(), identity.Identity("id-1"))
        RequestIdPropagator(Settings()).inject(carrier, context, _PairSetter())
        assert carrier == before

    @pytest.mark.parametrize("carrier", [[], [("a", "1")], ["a", ()], [("x-request-id-2", "b")]])
    def test_lists_are_written(self, carrier: list[Any]) -> None:
        """
        A list of pairs without the field gets it.
        """
        context = identity.set_in(Context(), identity.Identity("id-1"))
        RequestIdPropagator(Settings()).inject(carrier, context, _PairSetter())
        assert carrier[-1] == ("X-Request-ID", "id-1")

    def test_a_carrier_that_cannot_be_read_is_written(self) -> None:
        """
        Of a carrier that is neither mapping nor list nothing is known, so the id is written.
        """

        class Box(Setter[dict[str, str]]):
            def set(self, carrier: object, key: str, value: str) -> None:
                written[key] = value

        written: dict[str, str] = {}
        context = identity.set_in(Context(), identity.Identity("id-1"))
        opaque: Any = object()
        RequestIdPropagator(Settings()).inject(opaque, context, Box())
        assert written == {"X-Request-ID": "id-1"}

    def test_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """
        Loaded without arguments, as an entry point is, it takes its names from the environment.
        """
        monkeypatch.setenv("OTEL_CORRELATION_RESPONSE_HEADER", "X-Other")
        monkeypatch.setenv("OTEL_CORRELATION_REQUEST_ID_HEADERS", "X-Kong-Request-ID,X-Other")
        propagator = RequestIdPropagator()
        assert propagator.fields == {"X-Other"}
        found = identity.get_from(propagator.extract({"X-Other": "id-1"}))
        assert found is not None


class _Foreign(TextMapPropagator):
    """
    A propagator of another package, which fails when it is told to.
    """

    fails = False

    def extract(self, carrier: Any, context: Context | None = None, getter: Any = None) -> Context:
        if self.fails:
            raise RuntimeError
        return Context({**(context or {}), "foreign": 1})

    def inject(self, carrier: Any, context: Context | None = None, setter: Any = None) -> None:
        if self.fails:
            raise RuntimeError
        setter.set(carrier, "x-foreign", "1")

    @property
    def fields(self) -> set[str]:
        return {"x-foreign"}


class _Unusable:
    def __init__(self) -> None:
        raise RuntimeError("needs a licence")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Entry points of other packages: a good one, one that fails, one that is no propagator.
    """
    found = EntryPoints(
        EntryPoint(name, f"{__name__}:{name}", "opentelemetry_propagator")
        for name in ("_Foreign", "_Unusable", "_Nothing")
    )
    monkeypatch.setattr("otel_correlation.upstream.metadata.entry_points", found.select)


class TestBuild:
    def test_default(self) -> None:
        """
        Trace context, baggage and request id, in this order, each with its fields.
        """
        built = build(Settings())
        assert built.fields == {"traceparent", "tracestate", "baggage", "X-Request-ID"}
        sent = {"traceparent": PARENT, "tracestate": "1a@b=2", "baggage": "a=1;p", "X-Request-ID": "id-1"}
        carrier: dict[str, str | list[str]] = {}
        built.inject(carrier, built.extract(sent))
        assert carrier == sent

    def test_none(self) -> None:
        """
        Without any name nothing is read or written, and extract still returns a context.
        """
        built = build(Settings(propagators=()))
        before = Context({"other": 1})
        carrier: dict[str, str | list[str]] = {}
        assert built.extract({"traceparent": PARENT}) == Context()
        assert built.extract({"traceparent": PARENT}, before) is before
        built.inject(carrier, context_of(SpanContext(1, 2, False)))
        assert carrier == {}
        assert built.fields == set()

    @pytest.mark.usefixtures("installed")
    def test_of_another_package(self) -> None:
        """
        A propagator from an entry point runs between ours.
        """
        built = build(Settings(propagators=("baggage", "_Foreign")))
        context = built.extract({"baggage": "a=1"})
        carrier: dict[str, str | list[str]] = {}
        built.inject(carrier, context)
        assert carrier == {"baggage": "a=1", "x-foreign": "1"}
        assert built.fields == {"baggage", "x-foreign"}

    @pytest.mark.usefixtures("installed")
    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("_Missing", "none of that name is installed"),
            ("_Unusable", "RuntimeError: needs a licence"),
            ("_Nothing", "AttributeError"),
        ],
    )
    def test_what_does_not_load_is_left_out(self, name: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
        """
        One warning names the propagator and the reason; the others work.
        """
        built = build(Settings(propagators=(name, "tracecontext")))
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert f"'{name}'" in caplog.text
        assert reason in caplog.text
        assert built.fields == {"traceparent", "tracestate"}

    @pytest.mark.usefixtures("installed")
    def test_a_class_that_is_no_propagator(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        An entry point that is something else is left out, too.
        """
        monkeypatch.setitem(globals(), "_Nothing", dict)
        assert build(Settings(propagators=("_Nothing",))).fields == set()
        assert "'_Nothing'" in caplog.text

    @pytest.mark.usefixtures("installed")
    def test_one_that_fails_at_run_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """
        A propagator that raises costs its own headers and nothing else.
        """
        monkeypatch.delenv(guard.STRICT_ENV)
        monkeypatch.setattr(_Foreign, "fails", True)
        built = build(Settings(propagators=("_Foreign", "tracecontext")))
        context = built.extract({"traceparent": PARENT})
        carrier: dict[str, str | list[str]] = {}
        built.inject(carrier, context)
        assert carrier == {"traceparent": PARENT}
        assert guard.counters() == {"internal_error.propagator.extract": 1, "internal_error.propagator.inject": 1}

    def test_the_api_is_not_asked(self) -> None:
        """
        The module does not import the API's global propagator, which raises for names that it does not know.

        Where it would raise, the package has imported it with what is left of the names.
        """
        import subprocess
        import sys

        code = "import sys, otel_correlation.propagators; sys.exit('opentelemetry.propagate' in sys.modules)"
        for value, imported in (("tracecontext", 0), ("no-such-propagator", 1)):
            environment = {"OTEL_PROPAGATORS": value, "PYTHONPATH": ":".join(sys.path)}
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, check=False, timeout=60
            )
            assert (done.returncode, done.stderr) == (imported, b"")
