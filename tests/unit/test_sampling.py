"""
Head sampling: one ratio, exact for every shape of id, consistent across services, and honest in ``tracestate``.
"""

from __future__ import annotations

import math
import random
import uuid
from hashlib import blake2b
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    TraceFlags,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace import TraceState as ApiTraceState

from otel_correlation import sampling
from otel_correlation.ids import CorrelationIdGenerator, given_trace_id
from otel_correlation.propagators import TraceState
from otel_correlation.request_id import to_trace_id
from otel_correlation.sampling import RatioSampler, from_settings, randomness, threshold
from otel_correlation.settings import SAMPLERS, Settings, from_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

TRACES = 20_000
RATIOS = (0.01, 0.1, 0.5, 0.7, 0.9)
MAX = 1 << 56
NODE = 0x0242AC110002


def _of_version(bits: int, version: int) -> str:
    # By hand: uuid.UUID(version=...) knows 6 and 7 from Python 3.14 on only.
    fixed = bits & ~(0xF << 76) & ~(0x3 << 62) | version << 76 | 0x2 << 62
    return str(uuid.UUID(int=fixed))


def _v1(rng: random.Random, index: int) -> str:
    ticks = 0x1F0_1234_5678_9ABC + index * 3  # 100 ns steps: one busy host, one node, one clock sequence
    return str(
        uuid.UUID(fields=(ticks & 0xFFFFFFFF, ticks >> 32 & 0xFFFF, ticks >> 48 & 0xFFF | 0x1000, 0x85, 7, NODE))
    )


def _v4(rng: random.Random, index: int) -> str:
    return _of_version(rng.getrandbits(128), 4)


def _v6(rng: random.Random, index: int) -> str:
    ticks = 0x1F0_1234_5678_9ABC + index * 3
    return _of_version(ticks >> 12 << 80 | (ticks & 0xFFF) << 64 | 0x0507 << 48 | NODE, 6)


def _v7(rng: random.Random, index: int) -> str:
    return _of_version(1_763_700_000_000 + index << 80 | rng.getrandbits(80), 7)


def _v7_counter(rng: random.Random, index: int) -> str:
    # RFC 9562, 6.2, method 1: within one millisecond rand_a counts and the rest is random.
    return _of_version(1_763_700_000_000 + (index >> 12) << 80 | (index & 0xFFF) << 64 | rng.getrandbits(62), 7)


def _v7_monotonic(rng: random.Random, index: int) -> str:
    # RFC 9562, 6.2, method 2: within one millisecond the whole random part is incremented.
    return _of_version(1_763_700_000_000 << 80 | 0x1234 << 60 | 0x0ABC_DEF0_1234_5678 + index, 7)


SHAPES: Mapping[str, Callable[[random.Random, int], str]] = {
    "random": lambda rng, index: f"{rng.getrandbits(128):032x}",
    "uuid1": _v1,
    "uuid4": _v4,
    "uuid6": _v6,
    "uuid7": _v7,
    "uuid7 in a tight loop": _v7_counter,
    "uuid7 counted up": _v7_monotonic,
    "uuid1 without dashes": lambda rng, index: _v1(rng, index).replace("-", ""),
    "uuid4 without dashes": lambda rng, index: _v4(rng, index).replace("-", ""),
    "uuid6 without dashes": lambda rng, index: _v6(rng, index).replace("-", ""),
    "uuid7 without dashes": lambda rng, index: _v7(rng, index).replace("-", ""),
    "zero-padded hex counter": lambda rng, index: f"{index + 1:032x}",
    "prefix and hex counter": lambda rng, index: f"deadbeefcafe0001{index:016x}",
    "long counter": lambda rng, index: f"gateway-eu1-{index:09d}",
    "short counter": lambda rng, index: f"{index}",
}


def _trace_ids(shape: str, amount: int = TRACES) -> list[int]:
    """
    Return the trace ids that requests with ids of this shape root; a short id roots a random one.
    """
    rng = random.Random(f"sampling {shape}")
    make = SHAPES[shape]
    return [to_trace_id(make(rng, index)) or rng.getrandbits(128) for index in range(amount)]


def _ot(state: ApiTraceState | None) -> str | None:
    return None if state is None else state.get("ot")


def _parent(
    *,
    sampled: bool,
    ot: str | None = None,
    trace_id: int = 0xABCDEF,
    is_remote: bool = True,
    flags: int = 0,
    others: Sequence[tuple[str, str]] = (),
) -> SpanContext:
    members = [*others[:1], *([("ot", ot)] if ot is not None else []), *others[1:]]
    state = TraceState(members)
    return SpanContext(trace_id, 0x1234, is_remote, TraceFlags(flags | sampled), state)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_ratio_keeps_that_share_of_the_traces_whatever_ids_arrive(shape: str) -> None:
    """
    Ratio p keeps p of 20,000 traces within four standard deviations, for every shape of id.
    """
    values = [randomness(trace_id) for trace_id in _trace_ids(shape)]
    for ratio in RATIOS:
        rejection = threshold(ratio)
        kept = sum(value >= rejection for value in values)
        sigma = math.sqrt(TRACES * ratio * (1 - ratio))
        assert abs(kept - TRACES * ratio) < 4 * sigma, (shape, ratio, kept)


@pytest.mark.parametrize("shape", SHAPES)
def test_decisions_follow_the_randomness_of_the_trace_id(shape: str) -> None:
    """
    A root is kept exactly where ``blake2b(trace_id)`` reaches the threshold, for given and for minted ids.
    """
    for ratio in RATIOS:
        sampler = RatioSampler(ratio)
        for trace_id in _trace_ids(shape, 500):
            expected = randomness(trace_id) >= threshold(ratio)
            assert sampler.decide(None, trace_id, given=True)[0] is expected
            assert sampler.decide(None, trace_id, given=False)[0] is expected


def test_randomness_is_the_documented_function() -> None:
    """
    The randomness of a root can be recomputed by anyone: the first 56 bits that ``b2sum -l 56`` prints for the 16 bytes.
    """
    for trace_id in (1, 0xF4A2B3C1DEADBEEF0000AABBCCDDEEFF, (1 << 128) - 1):
        digest = blake2b(trace_id.to_bytes(16, "big"), digest_size=7).hexdigest()
        assert randomness(trace_id) == int(digest, 16)
        assert _ot(RatioSampler(0.0).decide(None, trace_id, given=True)[1]) == f"rv:{digest}"


@pytest.mark.parametrize("shape", SHAPES)
def test_the_traces_of_a_lower_ratio_are_a_subset_of_those_of_a_higher_one(shape: str) -> None:
    """
    A service with a lower ratio never keeps a trace that one with a higher ratio drops.
    """
    samplers = [RatioSampler(ratio) for ratio in (0.0, *RATIOS, 1.0)]
    for trace_id in _trace_ids(shape, 1_000):
        decisions = [sampler.decide(None, trace_id, given=True)[0] for sampler in samplers]
        assert decisions == sorted(decisions)
        assert decisions[0] is False
        assert decisions[-1] is True


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_two_services_keep_the_same_traces_also_behind_a_legacy_hop(shape: str, ratio: float) -> None:
    """
    A service behind a hop that forwards only the request id decides as the one in front of it did.
    """
    front, behind = RatioSampler(ratio), RatioSampler(ratio)
    rng = random.Random(shape)
    for index in range(500):
        received = SHAPES[shape](rng, index)
        mapped = to_trace_id(received)
        if mapped is None:
            # A short id stays as received, so nothing ties the two roots together: contract, "Short ids repeat".
            continue
        assert front.decide(None, mapped, given=True) == behind.decide(None, mapped, given=True)


@pytest.mark.parametrize("ratio", [*RATIOS, 1.0, 0.0])
def test_a_minted_id_decides_alike_when_it_comes_back_as_a_request_id(ratio: float) -> None:
    """
    A minted root and the root that its 32-hex request id makes behind a legacy hop are kept or dropped together.
    """
    sampler = RatioSampler(ratio)
    rng = random.Random(7)
    for _ in range(500):
        minted = rng.getrandbits(128)
        bridged = to_trace_id(f"{minted:032x}")
        assert bridged == minted
        assert sampler.decide(None, minted, given=False)[0] is sampler.decide(None, bridged, given=True)[0]


@pytest.mark.parametrize(("ratio", "share"), [(0.1, 0.0), (0.9, 1.0)])
def test_the_stock_ratio_sampler_is_the_trap_that_this_one_avoids(ratio: float, share: float) -> None:
    """
    Stock ``TraceIdRatioBased`` keeps none of the UUIDv4 ids at 0.1 and all at 0.9; ours keeps the ratio.
    """
    stock, ours = TraceIdRatioBased(ratio), RatioSampler(ratio)
    traces = _trace_ids("uuid4", 2_000)
    by_stock = sum(
        stock.should_sample(None, trace_id, "GET /").decision is Decision.RECORD_AND_SAMPLE for trace_id in traces
    )
    by_ours = sum(ours.decide(None, trace_id, given=True)[0] for trace_id in traces)
    assert by_stock == share * len(traces)
    assert abs(by_ours - ratio * len(traces)) < 4 * math.sqrt(len(traces) * ratio * (1 - ratio))


@given(st.floats(min_value=0, max_value=1, allow_nan=False))
def test_a_threshold_has_one_rounding_rule(ratio: float) -> None:
    """
    A threshold is ``2**56 - round(ratio * 2**56)``, and ``ot=th`` is its 14 hex digits without trailing zeros.
    """
    value = threshold(ratio)
    assert value == 2**56 - round(ratio * 2**56)
    assert 0 <= value <= MAX
    text = sampling._format_th(value)
    if value < MAX:
        assert int(text.ljust(14, "0"), 16) == value
        assert text == "0" or not text.endswith("0")


@pytest.mark.parametrize(
    ("ratio", "text"), [(1.0, "0"), (0.5, "8"), (0.25, "c"), (0.1, "e6666666666666"), (0.01, "fd70a3d70a3d71")]
)
def test_thresholds_read_as_the_specification_writes_them(ratio: float, text: str) -> None:
    """
    Well-known ratios have the well-known ``th`` values, with all 14 digits where they are needed.
    """
    sampler = RatioSampler(ratio)
    kept = next(trace_id for trace_id in range(1, 10_000) if sampler.decide(None, trace_id, given=True)[0])
    assert _ot(sampler.decide(None, kept, given=True)[1]) == f"th:{text};rv:{randomness(kept):014x}"


def test_a_minted_root_at_ratio_one_carries_only_a_threshold() -> None:
    """
    At ratio 1 a root whose id is random says ``ot=th:0`` and nothing else.
    """
    kept, state = RatioSampler(1.0).decide(None, 0xABC, given=False)
    assert kept is True
    assert state is not None
    assert state.to_header() == "ot=th:0"


def test_a_bridged_root_makes_its_randomness_explicit() -> None:
    """
    A root whose id came from a request id carries ``rv`` at every ratio, as its id is not random.
    """
    kept, state = RatioSampler(1.0).decide(None, 0xABC, given=True)
    assert kept is True
    assert state is not None
    assert state.to_header() == f"ot=th:0;rv:{randomness(0xABC):014x}"


@pytest.mark.parametrize("given_id", [True, False])
def test_a_dropped_root_has_randomness_and_no_threshold(given_id: bool) -> None:
    """
    A dropped root passes its ``rv`` on, so that a service behind it can still decide alike, and no ``th``.
    """
    kept, state = RatioSampler(0.0).decide(None, 0xABC, given=given_id)
    assert kept is False
    assert state is not None
    assert state.to_header() == f"ot=rv:{randomness(0xABC):014x}"


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("ot", [None, "rv:0123456789abcd", "p:8;r:62"])
def test_a_parent_decides_and_its_tracestate_is_passed_on_untouched(sampled: bool, ot: str | None) -> None:
    """
    Below a parent its sampled flag holds, and a tracestate that nothing contradicts is the same object.
    """
    parent = _parent(sampled=sampled, ot=ot, others=[("a", "1"), ("b", "2")])
    kept, state = RatioSampler(0.1).decide(parent, parent.trace_id, given=False)
    assert kept is sampled
    assert state is parent.trace_state


@pytest.mark.parametrize(
    ("ot", "sampled"),
    [
        ("th:8;rv:80000000000000", True),
        ("th:8;rv:7fffffffffffff", False),
        ("th:0", True),
        ("rv:ffffffffffffff;th:fd70a3d70a3d71", True),
        ("x:y;th:8;rv:80000000000000", True),
    ],
)
def test_a_consistent_threshold_is_honoured(ot: str, sampled: bool) -> None:
    """
    A caller's ``th`` that agrees with its ``rv`` and its flag is passed on as it came.
    """
    parent = _parent(sampled=sampled, ot=ot)
    assert RatioSampler(0.5).decide(parent, 1, given=False) == (sampled, parent.trace_state)


@pytest.mark.parametrize(
    ("ot", "sampled", "left"),
    [
        ("th:8;rv:7fffffffffffff", True, "rv:7fffffffffffff"),
        ("th:8;rv:80000000000000", False, "rv:80000000000000"),
        ("th:8;rv:80000000000000;x:y", False, "rv:80000000000000;x:y"),
        ("th:0", False, None),
        # Without rv the randomness is the trace id's low 56 bits: 0xabcdef here.
        ("th:8", True, None),
        ("th:8;p:1", True, "p:1"),
    ],
)
def test_a_threshold_that_contradicts_the_flag_is_erased(ot: str, sampled: bool, left: str | None) -> None:
    """
    An inconsistent ``th`` is removed, as counts extrapolated from it would be wrong; all else stays, in order.
    """
    parent = _parent(sampled=sampled, ot=ot, others=[("a", "1"), ("b", "2"), ("c", "3")])
    kept, state = RatioSampler(0.5).decide(parent, parent.trace_id, given=False)
    assert kept is sampled
    assert state is not None
    assert _ot(state) == left
    assert [(key, value) for key, value in state.items() if key != "ot"] == [("a", "1"), ("b", "2"), ("c", "3")]


def test_a_local_parents_tracestate_is_not_questioned() -> None:
    """
    Below a span of this process the tracestate is our own and is passed on as it is.
    """
    parent = _parent(sampled=True, ot="th:8;rv:00000000000000", is_remote=False)
    assert RatioSampler(0.5).decide(parent, 1, given=False) == (True, parent.trace_state)


def test_a_parent_without_tracestate_gets_none_below_a_parent_based_sampler() -> None:
    """
    Where the caller sent no tracestate, following its flag adds none.
    """
    parent = SpanContext(1, 2, is_remote=True, trace_flags=TraceFlags(1))
    kept, state = RatioSampler(0.5).decide(parent, 1, given=False)
    assert kept is True
    assert not state


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize(
    ("rv", "kept", "expected"),
    [
        ("80000000000000", True, "th:8;rv:80000000000000"),
        ("7fffffffffffff", False, "rv:7fffffffffffff"),
    ],
)
def test_a_plain_ratio_decides_by_the_callers_randomness(flag: bool, rv: str, kept: bool, expected: str) -> None:
    """
    ``traceidratio`` ignores the caller's flag, honours its ``rv`` and writes its own threshold in front of foreign members.
    """
    parent = _parent(sampled=flag, ot=f"th:1;rv:{rv}", others=[("a", "1"), ("b", "2")])
    sampler = RatioSampler(0.5, parent_based=False)
    decision, state = sampler.decide(parent, parent.trace_id, given=False)
    assert decision is kept
    assert state is not None
    assert list(state.items()) == [("ot", expected), ("a", "1"), ("b", "2")]


@pytest.mark.parametrize(("low_bits", "kept"), [(1 << 55, True), ((1 << 55) - 1, False)])
def test_a_plain_ratio_trusts_the_random_flag(low_bits: int, kept: bool) -> None:
    """
    Without ``rv`` the low 56 bits of a trace id are its randomness where the caller vouches for them.
    """
    parent = _parent(sampled=False, trace_id=0xFF << 64 | low_bits, flags=TraceFlags.RANDOM_TRACE_ID)
    decision, state = RatioSampler(0.5, parent_based=False).decide(parent, parent.trace_id, given=False)
    assert decision is kept
    assert _ot(state) == ("th:8" if kept else None)


@pytest.mark.parametrize("shape", ["uuid4", "long counter", "random"])
def test_a_plain_ratio_below_an_old_caller_stays_exact(shape: str) -> None:
    """
    Without ``rv`` and without the random flag the decision is the one that a root with this id would get.
    """
    sampler = RatioSampler(0.1, parent_based=False)
    for trace_id in _trace_ids(shape, 500):
        parent = _parent(sampled=True, trace_id=trace_id)
        assert sampler.decide(parent, trace_id, given=False)[0] is sampler.decide(None, trace_id, given=True)[0]


def test_a_plain_ratio_never_leaves_a_wrong_threshold_in_a_full_member() -> None:
    """
    Where its threshold does not fit beside what the caller put into ``ot``, the caller's extensions give way.
    """
    long_rest = "x:" + "y" * 240
    parent = _parent(sampled=True, ot=f"th:0;{long_rest}", flags=TraceFlags.RANDOM_TRACE_ID, trace_id=MAX - 1)
    kept, state = RatioSampler(0.1, parent_based=False).decide(parent, parent.trace_id, given=False)
    assert kept is True
    assert _ot(state) == "th:e6666666666666"


def test_the_apis_own_tracestate_is_understood() -> None:
    """
    A tracestate of the API's class is read and rewritten, too; other propagators make it.
    """
    state = ApiTraceState([("a", "1"), ("ot", "th:8;rv:00000000000000"), ("b", "2")])
    parent = SpanContext(1, 2, is_remote=True, trace_flags=TraceFlags(1), trace_state=state)
    _, left = RatioSampler(0.5).decide(parent, 1, given=False)
    assert left is not None
    assert dict(left.items()) == {"ot": "rv:00000000000000", "a": "1", "b": "2"}


_OT_TEXT = st.one_of(
    st.text(alphabet="thrvpx:;-_.0123456789abcdefABCDEFZ", max_size=40),
    st.text(alphabet=st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters=",="), max_size=260),
    st.lists(
        st.sampled_from(
            ["th:0", "th:8", "th:", "th:100000000000000", "rv:0123456789abcd", "rv:1", "p:1", "", ":", "th"]
        ),
        max_size=6,
    ).map(";".join),
)


@given(
    ot=_OT_TEXT,
    ratio=st.sampled_from([0.0, 1e-18, 0.1, 0.5, 1.0]),
    parent_based=st.booleans(),
    sampled=st.booleans(),
    random_flag=st.booleans(),
    trace_id=st.integers(min_value=1, max_value=(1 << 128) - 1),
)
@settings(max_examples=300)
def test_no_tracestate_of_a_caller_raises_or_forges(
    ot: str, ratio: float, parent_based: bool, sampled: bool, random_flag: bool, trace_id: int
) -> None:
    """
    Whatever a caller puts into ``ot``: no exception, foreign members stay, and a ``th`` that leaves agrees with the flag.
    """
    flags = 2 if random_flag else 0
    parent = _parent(sampled=sampled, ot=ot, trace_id=trace_id, flags=flags, others=[("a", "1"), ("b", "2")])
    kept, state = RatioSampler(ratio, parent_based=parent_based).decide(parent, trace_id, given=False)
    assert state is not None
    assert [pair for pair in state.items() if pair[0] != "ot"] == [("a", "1"), ("b", "2")]
    if parent_based:
        assert kept is sampled
    left = _ot(state)
    if left is not None:
        th, rv, _ = sampling._parse(left)
        if th is not None:
            explicit = parent.trace_id & (MAX - 1) if parent_based or random_flag else randomness(trace_id)
            assert kept is ((explicit if rv is None else rv) >= th)
    if not parent_based and kept:
        assert left is not None
        assert left.startswith("th:")


def test_a_member_beyond_the_specified_length_is_not_read() -> None:
    """
    An ``ot`` member of more than 256 characters, which no tracestate may hold, says nothing.
    """
    assert sampling._parse("th:8;x:" + "y" * 300) == (None, None, [])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("trace_id", [_trace_ids("uuid4", 3)[2], 0xABCDEF])
def test_the_sdk_gets_the_same_answer(sampler: str, trace_id: int) -> None:
    """
    A span that the SDK starts is sampled, flagged and stated as ``decide`` says: root, given root and child.
    """
    ours = from_settings(Settings(sampler=sampler, ratio=0.5))
    assert ours is not None
    provider = TracerProvider(sampler=ours, id_generator=CorrelationIdGenerator(), shutdown_on_exit=False)
    tracer = provider.get_tracer("test")
    for minted in (True, False):
        with given_trace_id(trace_id, random=minted):
            context = tracer.start_span("root").get_span_context()
        kept, state = ours.decide(None, trace_id, given=not minted)
        assert context.trace_id == trace_id
        assert (context.trace_flags.sampled, context.trace_state) == (kept, state)
        assert context.trace_flags.random_trace_id is minted
    for flag in (True, False):
        parent = _parent(sampled=flag, ot="rv:90000000000000;th:8", trace_id=trace_id, others=[("a", "1")])
        above = set_span_in_context(NonRecordingSpan(parent))
        assert get_current_span(above).get_span_context() is parent
        context = tracer.start_span("child", above).get_span_context()
        kept, state = ours.decide(parent, trace_id, given=False)
        assert (context.trace_flags.sampled, context.trace_state) == (kept, state)


@pytest.mark.parametrize(
    ("name", "root", "below_sampled", "below_dropped"),
    [
        ("always_on", True, True, True),
        ("always_off", False, False, False),
        ("traceidratio", False, False, False),
        ("parentbased_always_on", True, True, False),
        ("parentbased_always_off", False, True, False),
        ("parentbased_traceidratio", False, True, False),
    ],
)
def test_the_standard_sampler_names_mean_ours(name: str, root: bool, below_sampled: bool, below_dropped: bool) -> None:
    """
    Each of the six standard names decides as the specification says, for a trace that ratio 0.1 drops.
    """
    sampler = from_settings(from_environment({"OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": "0.1"}))
    assert isinstance(sampler, RatioSampler)
    dropped = next(trace_id for trace_id in range(1, 1_000) if randomness(trace_id) < threshold(0.1))
    assert sampler.decide(None, dropped, given=True)[0] is root
    assert sampler.decide(_parent(sampled=True, trace_id=dropped), dropped, given=False)[0] is below_sampled
    assert sampler.decide(_parent(sampled=False, trace_id=dropped), dropped, given=False)[0] is below_dropped


def test_a_third_partys_sampler_name_is_left_to_it() -> None:
    """
    A name that is not a standard one gives no sampler of ours, with or without the prefix.
    """
    assert from_settings(Settings(sampler="xray")) is None
    assert from_settings(Settings(sampler="parentbased_jaeger_remote")) is None


def test_the_description_names_the_ratio() -> None:
    """
    ``get_description`` tells the ratio and whether parents decide.
    """
    assert RatioSampler(0.25).get_description() == "ParentBasedConsistentRatio{0.25}"
    assert RatioSampler(1.0, parent_based=False).get_description() == "ConsistentRatio{1}"
