"""
Head sampling by one ratio, exact whatever trace ids arrive.

Consistent probability sampling (OpenTelemetry specification, "TraceState: Probability Sampling"): a trace is kept where
its 56 bits of randomness reach the rejection threshold. A UUID or a counter that was bridged to a trace id is not
random in its low bits, so the randomness of every root is one pure function of the trace id, and it travels as
``ot=rv``.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import get_current_span

from otel_correlation.ids import was_forced, was_given
from otel_correlation.propagators import TraceState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.context import Context
    from opentelemetry.trace import Link, SpanContext, SpanKind
    from opentelemetry.trace import TraceState as ApiTraceState
    from opentelemetry.util.types import Attributes

    from otel_correlation.settings import Settings

_BITS: Final = 56
_MAX: Final = 1 << _BITS
_KEY: Final = "ot"
_TH: Final = re.compile(r"[0-9a-f]{1,14}")
_RV: Final = re.compile(r"[0-9a-f]{14}")
_MAX_OT_LENGTH: Final = 256
_TH_ZERO: Final = TraceState([(_KEY, "th:0")])


def threshold(ratio: float) -> int:
    """
    Return the rejection threshold of a ratio: ``2**56 - round(ratio * 2**56)``, all 14 hex digits kept.

    The multiplication by a power of two is exact, so this is the only rounding there is.
    """
    return _MAX - round(ratio * _MAX)


def randomness(trace_id: int) -> int:
    """
    Return the 56 bits of randomness of a root: ``blake2b(trace_id, digest_size=7)``.
    """
    return int.from_bytes(blake2b(trace_id.to_bytes(16, "big"), digest_size=7).digest(), "big")


def _format_th(value: int) -> str:
    return f"{value:014x}".rstrip("0") or "0"


def _parse(member: str) -> tuple[int | None, int | None, list[str]]:
    """
    Split an ``ot`` member into threshold, randomness and whatever else it holds; wrong parts are None.
    """
    th: int | None = None
    rv: int | None = None
    rest: list[str] = []
    if len(member) > _MAX_OT_LENGTH:
        return None, None, rest
    for part in member.split(";"):
        key, _, value = part.partition(":")
        if key == "th":
            th = int(value.ljust(14, "0"), 16) if _TH.fullmatch(value) else None
        elif key == "rv":
            rv = int(value, 16) if _RV.fullmatch(value) else None
        elif part:
            rest.append(part)
    return th, rv, rest


def _format(th: int | None, rv: int | None, rest: list[str]) -> str:
    parts = [] if th is None else [f"th:{_format_th(th)}"]
    if rv is not None:
        parts.append(f"rv:{rv:014x}")
    member = ";".join(parts + rest)
    # Others' extensions give way: a member that is too long would be refused, and the old threshold would stay.
    return member if len(member) <= _MAX_OT_LENGTH else ";".join(parts)


def _with_ot(state: ApiTraceState | None, member: str) -> ApiTraceState | None:
    if not state:
        return TraceState([(_KEY, member)]) if member else state
    ours = state if isinstance(state, TraceState) else TraceState(list(state.items()))
    return ours.with_member(_KEY, member) if member else ours.without(_KEY)


def without_threshold(state: ApiTraceState | None) -> ApiTraceState | None:
    """
    Return the tracestate of a span that was sampled although its randomness says no.

    How many others it stands for is unknown then, and no threshold says so (specification: adjusted count).
    """
    if not state or _KEY not in state:
        return state
    _, rv, rest = _parse(state[_KEY])
    return _with_ot(state, _format(None, rv, rest))


class RatioSampler(Sampler):
    """
    Keep ``ratio`` of the traces; a lower ratio's traces are a subset of a higher one's.

    Args:
        ratio: 0 to 1.
        parent_based: Whether spans with a parent follow its sampled flag.
    """

    def __init__(self, ratio: float, *, parent_based: bool = True) -> None:
        self.ratio = ratio
        self._parent_based = parent_based
        self._threshold = threshold(ratio)
        # At ratio 0 the threshold has a digit more: "g" is above every hexadecimal one.
        self._threshold_hex = f"{self._threshold:014x}" if self._threshold < _MAX else "g"
        self._th = f"th:{_format_th(self._threshold)};" if ratio > 0 else ""

    def decide(self, parent: SpanContext | None, trace_id: int, *, given: bool) -> tuple[bool, ApiTraceState | None]:
        """
        Decide for one span.

        Args:
            parent: The valid parent, or None for a root.
            trace_id: The span's trace id.
            given: Whether a root's trace id came from a request id.

        Returns:
            Whether it is sampled, and the tracestate of its span context.
        """
        if parent is None:
            if self._threshold == 0 and not given:
                return True, _TH_ZERO
            # What randomness() returns, without a trip through numbers of 14 digits; hex digits compare as they do.
            rv = blake2b(trace_id.to_bytes(16, "big"), digest_size=7).hexdigest()
            kept = rv >= self._threshold_hex
            # Both values are in the grammar by construction.
            return kept, TraceState._made_of({_KEY: f"{self._th}rv:{rv}" if kept else f"rv:{rv}"})
        if self._parent_based:
            state: ApiTraceState | None = parent.trace_state
            if state and parent.is_remote and _KEY in state:
                state = self._consistent(parent, state)
            return parent.trace_flags.sampled, state
        return self._by_ratio(parent, trace_id)

    def _consistent(self, parent: SpanContext, state: ApiTraceState) -> ApiTraceState | None:
        """
        Erase a threshold that contradicts the sampled flag; it would make counts extrapolated from it wrong.
        """
        th, rv, rest = _parse(state[_KEY])
        if th is None:
            return state
        random_value = parent.trace_id & (_MAX - 1) if rv is None else rv
        if (random_value >= th) == parent.trace_flags.sampled:
            return state
        return _with_ot(state, _format(None, rv, rest))

    def _by_ratio(self, parent: SpanContext, trace_id: int) -> tuple[bool, ApiTraceState | None]:
        """
        Decide by the ratio although there is a parent (``traceidratio``).
        """
        _, rv, rest = _parse(parent.trace_state.get(_KEY, "") if parent.trace_state else "")
        if rv is not None:
            random_value = rv
        elif parent.trace_flags.random_trace_id:
            random_value = trace_id & (_MAX - 1)
        else:
            random_value = randomness(trace_id)
        kept = random_value >= self._threshold
        return kept, _with_ot(parent.trace_state, _format(self._threshold if kept else None, rv, rest))

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,  # noqa: ARG002 - the SDK's signature
        kind: SpanKind | None = None,  # noqa: ARG002
        attributes: Attributes | None = None,
        links: Sequence[Link] | None = None,  # noqa: ARG002
        trace_state: ApiTraceState | None = None,  # noqa: ARG002 - the SDK never passes it
    ) -> SamplingResult:
        """
        Decide for a span that the SDK starts.
        """
        found = get_current_span(parent_context).get_span_context()
        parent = found if found.is_valid else None
        kept, state = self.decide(parent, trace_id, given=parent is None and was_given())
        if not kept and was_forced():
            kept, state = True, without_threshold(state)
        return SamplingResult(Decision.RECORD_AND_SAMPLE if kept else Decision.DROP, attributes, state)

    def get_description(self) -> str:
        """
        Return the name with its ratio.
        """
        return f"{'ParentBased' if self._parent_based else ''}ConsistentRatio{{{self.ratio:g}}}"


def from_settings(settings: Settings) -> RatioSampler | None:
    """
    Return the sampler that the settings name, or None if it is a third party's.
    """
    ratios = {"traceidratio": settings.ratio, "always_on": 1.0, "always_off": 0.0}
    name = settings.sampler.removeprefix("parentbased_")
    if name not in ratios:
        return None
    return RatioSampler(ratios[name], parent_based=settings.sampler.startswith("parentbased_"))
