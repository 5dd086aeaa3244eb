"""
Headers that user code copied from another request: which of them are ours, by their values.

What we put on a request is remembered on that object alone. A gateway that sends ``headers=request.headers``, an
authentication that makes a request of its own, a client's defaults: they carry our ids all the same, and the outbound
policy holds for them. Asked only for a host that may not have all three.
"""

from __future__ import annotations

from itertools import chain, product
from operator import add
from typing import TYPE_CHECKING, Final, cast

from opentelemetry.context import Context
from opentelemetry.trace import get_current_span

from otel_correlation import identity, propagators, semconv
from otel_correlation.request_id import MIN_ROOT_LENGTH
from otel_correlation.upstream.api import BAGGAGE_KEY as _BAGGAGE_KEY

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from opentelemetry.trace import SpanContext

    from otel_correlation.identity import Identity
    from otel_correlation.settings import Settings

    # Raw name, lower-case name and value of one header.
    Entry = tuple[bytes, bytes, bytes]

_TRACEPARENT: Final = semconv.TRACEPARENT.encode()
_TRACESTATE: Final = semconv.TRACESTATE.encode()
_BAGGAGE: Final = semconv.BAGGAGE.encode()
_AMZN: Final = semconv.X_AMZN_TRACE_ID.lower().encode()
# Names that services read a request id from, also where ours are others.
_STANDARD: Final = (b"x-request-id", b"x-correlation-id", b"x-kong-request-id", _AMZN)
_SPACE: Final = b" \t"
# Of a header that somebody joined of several fields, so many are looked up in the memory.
_MAX_PARTS: Final = 8
# 64 spellings of a name; a configured one with more hyphens is known with those behind as they are.
_MAX_HYPHENS: Final = 6

# Two generations of at most so many hash values of headers that left: about 0.7 MB.
MAX_REMEMBERED: Final = 4_096
_recent: set[int] = set()
_older: set[int] = set()


def remember_sent(sent: Iterable[Entry]) -> None:
    """
    Remember what left for a host that may have it: a copy of it is ours, whatever is current then.
    """
    global _older, _recent
    if len(_recent) >= MAX_REMEMBERED:
        _older, _recent = _recent, set()
    for entry in sent:
        _recent.add(hash(entry[2]))


def forget_sent() -> None:
    """
    Forget what left.
    """
    _recent.clear()
    _older.clear()


def remembered() -> int:
    """
    Return how many values are remembered.
    """
    return len(_recent) + len(_older)


def _left_before(value: bytes) -> bool:
    """
    Tell whether a value, or the first of a list of them, is remembered.
    """
    # Shorter values repeat ("test", "1"), so they name nothing.
    parts = [value, *(part.strip(_SPACE) for part in value.split(b",", _MAX_PARTS)[:_MAX_PARTS])]
    return any(len(part) >= MIN_ROOT_LENGTH and _is_remembered(part) for part in parts)


def _is_remembered(value: bytes) -> bool:
    found = hash(value)
    return found in _recent or found in _older


class Names:
    """
    The header names that can carry something of ours.

    Args:
        settings: Names a request id is read from and written to.
        fields: What the propagators write.
    """

    def __init__(self, settings: Settings, fields: Iterable[str]) -> None:
        ids = {*settings.request_id_headers, settings.response_header.lower().encode("latin-1", "replace")}
        written = {name.lower().encode("latin-1", "replace") for name in fields}
        self.trace = frozenset((written - ids - {_BAGGAGE}) | {_TRACEPARENT, _TRACESTATE})
        self.ids = frozenset(spelled for name in (*ids, *_STANDARD) for spelled in _spellings(name))
        self.all = self.trace | self.ids | {_BAGGAGE}


def _spellings(name: bytes) -> Iterator[bytes]:
    """
    Give a name with each hyphen as an underscore, too: WSGI reads them as one.
    """
    words = name.replace(b"_", b"-").split(b"-", _MAX_HYPHENS)
    for separators in product((b"-", b"_"), repeat=len(words) - 1):
        yield words[0] + b"".join(map(add, separators, words[1:]))


class _Ours:
    """
    What names the work that runs in a context: its traces, ids and baggage, and what its caller sent.
    """

    def __init__(self, context: Context) -> None:
        who = identity.get_from(context)
        received: Mapping[bytes, list[bytes]] = {} if who is None or who.received is None else who.received
        # Sets: a caller may send thousands of fields, and a gateway pass on thousands.
        self._received = {name: frozenset(values) for name, values in received.items()}
        self._traces: set[bytes] = set()
        self._state: set[tuple[str, str]] = set()
        for span_context in _span_contexts(context, who):
            self._traces.add(b"%032x" % span_context.trace_id)
            self._state.update(span_context.trace_state.items())
        # None of two or more fields: then the trace was restarted, and they are known as they came.
        if (sent := propagators.extract_from_headers(received.get(_TRACEPARENT, []), [])) is not None:
            self._traces.add(b"%032x" % sent.trace_id)
        self._id = b"" if who is None else who.request_id.encode("latin-1", "replace")
        ids = [values for name, values in received.items() if name not in (_TRACEPARENT, _TRACESTATE, _BAGGAGE)]
        self._ids = {self._id, *chain.from_iterable(ids)} - {b""}
        self._members = {*_members(context)}
        if came := received.get(_BAGGAGE):
            self._members.update(_members(propagators.extract_baggage_from_headers(came, Context())))

    def has_trace(self, lower: bytes, value: bytes) -> bool:
        """
        Tell whether a header names one of our traces, in whatever spelling, or is the caller's.
        """
        if value in self._received.get(lower, ()):
            return True
        text = value.lower().replace(b"-", b"")
        # Other formats send the lower half of a trace id.
        half = lower != _TRACEPARENT
        return any(trace in text or (half and trace[16:] in text) for trace in self._traces)

    def has_id(self, lower: bytes, value: bytes) -> bool:
        """
        Tell whether a header is our request id, or a list with it.
        """
        if lower == _AMZN and len(self._id) >= MIN_ROOT_LENGTH and self._id in value:
            return True  # There it is one field of several.
        return not self._ids.isdisjoint([part.strip(_SPACE) for part in (value, *value.split(b","))])

    def rest_of_state(self, value: bytes, *, alone: bool) -> bytes:
        """
        Return a tracestate without members of ours.

        Args:
            value: The header.
            alone: Whether no traceparent stands beside it. Where one does that is not ours, a bare threshold stays:
                every trace of a fleet at one ratio has ``ot=th:0``.
        """
        if value in self._received.get(_TRACESTATE, ()):
            return b""
        members = propagators.TraceState.from_header([value.decode("latin-1")]).items()
        left = [
            f"{key}={text}"
            for key, text in members
            if (key, text) not in self._state or (key == "ot" and not alone and "rv:" not in text)
        ]
        return value if len(left) == len(members) else ",".join(left).encode("latin-1")

    def rest_of_baggage(self, value: bytes) -> bytes:
        """
        Return baggage without members of ours.
        """
        if value in self._received.get(_BAGGAGE, ()):
            return b""
        if not self._members:
            return value
        parsed = propagators.extract_baggage_from_headers([value], Context()).get(propagators._RECEIVED_KEY)
        members = parsed.members if isinstance(parsed, propagators._Received) else []
        left = [member.text for member in members if (member.key, member.value) not in self._members]
        return value if len(left) == len(members) else ",".join(left).encode("latin-1")


def _span_contexts(context: Context, who: Identity | None) -> Iterator[SpanContext]:
    # Both: a message of a WebSocket has a trace of its own beside that of its request.
    for span in (get_current_span(context), None if who is None else who.span):
        if span is not None and (found := span.get_span_context()).trace_id:
            yield found


def _members(context: Context) -> Iterator[tuple[str, str]]:
    """
    Give key and value of all baggage members, those included that the application took out since they came.
    """
    held = context.get(_BAGGAGE_KEY)
    if isinstance(held, dict):
        yield from ((str(key), str(value)) for key, value in cast("dict[str, object]", held).items())
    received = context.get(propagators._RECEIVED_KEY)
    if isinstance(received, propagators._Received):
        yield from ((member.key, member.value) for member in received.members)


def kept_back(
    names: Names, context: Context, entries: list[Entry], allowed: tuple[bool, bool, bool]
) -> list[Entry] | None:
    """
    Return the headers without what is ours and may not leave, or None where all of them may.

    A value that is not ours stays as it is. Of a list (baggage, tracestate) that holds both, the members that are not
    ours stay. Work is linear in the size of the headers.

    Args:
        names: The names to look at.
        context: What runs now.
        entries: The headers.
        allowed: Whether traceparent, baggage and request id may leave.
    """
    if names.all.isdisjoint([lower for _, lower, _ in entries]):
        return None
    ours = _Ours(context)
    # By position: what is one of our ids, and what names one of our traces.
    ids: set[int] = set()
    traces: set[int] = set()
    earlier = False
    alone = all(lower != _TRACEPARENT for _, lower, _ in entries)
    for position, (_, lower, raw) in enumerate(entries):
        value = raw.strip(_SPACE)
        is_trace = lower in names.trace and lower != _TRACESTATE
        is_id = lower in names.ids
        if not is_trace and not is_id:
            continue
        before = _left_before(value)
        earlier = earlier or before
        if is_id and (before or ours.has_id(lower, value)):
            ids.add(position)
        if is_trace and (before or ours.has_trace(lower, value)):
            traces.add(position)
    left: list[Entry] = []
    for position, entry in enumerate(entries):
        name, lower, value = entry
        rest = value
        if position in ids and not allowed[2]:
            rest = b""
        elif lower in names.trace and not allowed[0]:
            # What stands beside our traceparent belongs to it; another traceparent does not.
            if position in traces or (traces and lower != _TRACEPARENT):
                rest = b""
            elif lower == _TRACESTATE:
                rest = ours.rest_of_state(value.strip(_SPACE), alone=alone)
        elif lower == _BAGGAGE and not allowed[1]:
            # Baggage repeats: what an earlier request had is a copy only beside another header of that request.
            text = value.strip(_SPACE)
            rest = b"" if earlier and _is_remembered(text) else ours.rest_of_baggage(text)
        if rest == value:
            left.append(entry)
        elif rest:
            left.append((name, lower, rest))
    return None if left == entries else left
