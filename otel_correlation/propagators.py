"""
What crosses the wire: W3C Trace Context (Level 2, strict), W3C Baggage, and the request id.

Nothing here raises on what a caller sent, and nothing is stored that could not be parsed (OpenTelemetry specification,
context/api-propagators.md). The server edge calls the functions over raw header values; everybody else the propagators.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, MutableMapping
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple, cast
from urllib.parse import quote

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context, create_key
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.propagators.textmap import TextMapPropagator, default_getter, default_setter
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags
from opentelemetry.trace.span import TraceState as ApiTraceState

from otel_correlation import guard, identity, semconv
from otel_correlation.request_id import from_headers
from otel_correlation.settings import from_environment
from otel_correlation.upstream.api import BAGGAGE_KEY as _BAGGAGE_KEY
from otel_correlation.upstream.api import RANDOM_TRACE_ID

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.propagators.textmap import CarrierT, Getter, Setter

    from otel_correlation.settings import Settings

# Trace Context Level 2: 3.2 traceparent, 3.3 tracestate. Patterns are used by fullmatch only.
_TRACEPARENT: Final = re.compile(
    rb"[ \t]*([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?[ \t]*", re.DOTALL
)
_KEY: Final = re.compile(r"[a-z0-9][a-z0-9_\-*/@]{0,255}")
_VALUE: Final = re.compile(r"[ -+\--<>-~]{0,255}[!-+\--<>-~]")
_MEMBER: Final = re.compile(rf"({_KEY.pattern})=({_VALUE.pattern})[ \t]*")
# What stands between commas and is not only optional whitespace; the search runs in C however many commas there are.
_NOT_EMPTY: Final = re.compile(r"[^, \t][^,]*")
MAX_MEMBERS: Final = 32
# 32 members of the longest key and value are 16,447 characters; twice that leaves room for whitespace.
_MAX_TRACESTATE_IN: Final = 32_768
# Level 2 asks for at least 512. Common servers refuse a header field above 8,190 bytes, and OpenTelemetry's own
# propagator drops a whole tracestate above 8,192.
MAX_TRACESTATE_OUT: Final = 8_000
_LONG_MEMBER: Final = 128
_SHORT: Final = 16

_SAMPLED_AND_RANDOM: Final = TraceFlags.SAMPLED | RANDOM_TRACE_ID
_FLAGS: Final = tuple(TraceFlags(bits) for bits in range(_SAMPLED_AND_RANDOM + 1))
_FLAGS_TEXT: Final = tuple(f"-{bits:02x}" for bits in range(_SAMPLED_AND_RANDOM + 1))


def _is_member(key: object, value: object) -> bool:
    return (
        isinstance(key, str)
        and isinstance(value, str)
        and _KEY.fullmatch(key) is not None
        and _VALUE.fullmatch(value) is not None
    )


class TraceState(ApiTraceState):
    """
    An immutable tracestate of the Level 2 grammar that keeps the order of its members.

    The API's own class drops keys that Level 2 allows (``1st``, ``a@b@c``), so it cannot carry what callers may send.
    Wrong pairs and those beyond the 32nd are left out.

    Args:
        entries: Keys and values, leftmost first.
    """

    _dict: dict[str, str]
    _header: str | None

    def __init__(self, entries: Sequence[tuple[str, str]] | None = None) -> None:  # pyright: ignore[reportMissingSuperCall]
        # Not the base's __init__: it filters by the Level 1 grammar and logs what callers sent.
        members: dict[str, str] = {}
        for key, value in entries or ():
            if len(members) < MAX_MEMBERS and _is_member(key, value):
                members.setdefault(key, value)
        self._dict = members
        self._header = None

    @classmethod
    def _made_of(cls, members: dict[str, str]) -> TraceState:
        state = cls.__new__(cls)
        state._dict = members
        state._header = None
        return state

    @classmethod
    def from_header(cls, header_list: list[str]) -> TraceState:
        """
        Parse one or more header fields, combined in order; the empty tracestate if they do not follow the grammar.

        Of a key that comes twice the first, which is the newest, is kept.
        """
        text = header_list[0] if len(header_list) == 1 else ",".join(header_list)
        if len(text) > _MAX_TRACESTATE_IN:
            return EMPTY
        # Empty members are no members, so commas alone do not tell; the stop comes before thousands are made.
        if text.count(",") >= MAX_MEMBERS and len([*islice(_NOT_EMPTY.finditer(text), MAX_MEMBERS + 1)]) > MAX_MEMBERS:
            return EMPTY
        parts = _NOT_EMPTY.findall(text)
        if not parts:
            return EMPTY
        members: dict[str, str] = {}
        for part in parts:
            match = _MEMBER.fullmatch(part)
            if match is None:
                return EMPTY
            key, value = match.groups()
            members.setdefault(key, value)
        return cls._made_of(members)

    def with_member(self, key: str, value: str) -> TraceState:
        """
        Return a tracestate with this member leftmost; the rightmost one leaves if there were 32 others.

        A key or value outside the grammar returns this object unchanged.
        """
        if not _is_member(key, value):
            return self
        members = {key: value, **self._dict}
        members[key] = value
        if len(members) > MAX_MEMBERS:
            members.popitem()
        return self._made_of(members)

    def without(self, key: str) -> TraceState:
        """
        Return a tracestate without this key.
        """
        if key not in self._dict:
            return self
        return self._made_of({name: value for name, value in self._dict.items() if name != key})

    def add(self, key: str, value: str) -> TraceState:
        """
        Return a tracestate with this new member leftmost; this object if the key exists or the pair is not valid.
        """
        return self if key in self._dict else self.with_member(key, value)

    def update(self, key: str, value: str) -> TraceState:
        """
        Return a tracestate with this member leftmost, new or changed; this object if the pair is not valid.
        """
        return self.with_member(key, value)

    def delete(self, key: str) -> TraceState:
        """
        Return a tracestate without this key.
        """
        return self.without(key)

    def to_header(self) -> str:
        """
        Return the whole header value, made once.
        """
        header = self._header
        if header is None:
            header = self._header = ",".join([f"{key}={value}" for key, value in self._dict.items()])
        return header


EMPTY: Final = TraceState()


@lru_cache(maxsize=128)
def _short_state(value: bytes) -> TraceState:
    """
    Parse a tracestate that is likely to come again: every hop of a fleet at one ratio sends the same ``ot=th:0``.
    """
    return TraceState.from_header([value.decode("latin-1")])


def extract_from_headers(values_traceparent: list[bytes], values_tracestate: list[bytes]) -> SpanContext | None:
    """
    Read the caller's span context from raw header values.

    Args:
        values_traceparent: Every ``traceparent`` field, in order. Two mean that the trace is restarted.
        values_tracestate: Every ``tracestate`` field, in order. What cannot be parsed never affects traceparent.

    Returns:
        The remote span context with the flags of Level 2 only, or None if a new trace must be started.
    """
    if len(values_traceparent) != 1:
        return None
    match = _TRACEPARENT.fullmatch(values_traceparent[0])
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    if version == b"ff" or (rest is not None and version == b"00"):
        return None
    if not values_tracestate:
        state = EMPTY
    elif len(values_tracestate) == 1 and len(values_tracestate[0]) <= _SHORT:
        state = _short_state(values_tracestate[0])
    else:
        # latin-1 takes every byte; what is not ASCII fails the grammar.
        state = TraceState.from_header([value.decode("latin-1") for value in values_tracestate])
    bits = int(flags, 16) & _SAMPLED_AND_RANDOM
    found = SpanContext(int(trace_id, 16), int(span_id, 16), True, _FLAGS[bits], state)
    return found if found.is_valid else None


def format_traceparent(span_context: SpanContext) -> str:
    """
    Return the ``traceparent`` of a valid span context: version 00, and no flags but sampled and random.
    """
    flags = _FLAGS_TEXT[span_context.trace_flags & _SAMPLED_AND_RANDOM]
    return f"00-{span_context.trace_id:032x}-{span_context.span_id:016x}{flags}"


def format_tracestate(state: ApiTraceState) -> str:
    """
    Return the ``tracestate`` to send, empty if there is none; at most ``MAX_TRACESTATE_OUT`` characters.

    Whole members only are left out: first those of more than 128 characters, then any, each from the right.
    """
    header = state.to_header()
    if len(header) <= MAX_TRACESTATE_OUT:
        return header
    members = [f"{key}={value}" for key, value in state.items()]
    excess = len(header) - MAX_TRACESTATE_OUT
    for least in (_LONG_MEMBER + 1, 0):
        for position in reversed(range(len(members))):
            if excess > 0 and len(members[position]) >= least:
                excess -= len(members.pop(position)) + 1
    return ",".join(members)


def _fields(getter: Getter[CarrierT], carrier: CarrierT, name: str) -> list[bytes]:
    """
    Return every value of a field as bytes; some getters give one text, or bytes, where a list of text is promised.
    """
    found: object = getter.get(carrier, name)
    if found is None:
        return []
    values = cast("Iterable[object]", [found] if isinstance(found, str | bytes) else found)
    # What is not ASCII becomes bytes that no grammar here takes, lone surrogates included.
    return [value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass") for value in values]


def _forget(carrier: object, *names: str) -> None:
    """
    Take these fields off a carrier that is a copy of other headers, whatever their case: two spellings are two fields.
    """
    if isinstance(carrier, MutableMapping):
        fields = cast("MutableMapping[object, object]", carrier)
        for key in [key for key in fields if _lower(key) in names]:
            fields.pop(key, None)  # A multi-dictionary names a key for each of its values.


class TraceContextPropagator(TextMapPropagator):
    """
    W3C Trace Context, Level 2.
    """

    def extract(
        self,
        carrier: CarrierT,
        context: Context | None = None,
        getter: Getter[CarrierT] = default_getter,
    ) -> Context:
        """
        Return ``context`` with the caller's span, or unchanged if there is none that can be continued.
        """
        context = Context() if context is None else context
        try:
            found = extract_from_headers(
                _fields(getter, carrier, semconv.TRACEPARENT), _fields(getter, carrier, semconv.TRACESTATE)
            )
        except Exception:  # noqa: BLE001 - a getter of somebody else's
            guard.report("tracecontext.extract")
            return context
        return context if found is None else trace.set_span_in_context(NonRecordingSpan(found), context)

    def inject(
        self,
        carrier: CarrierT,
        context: Context | None = None,
        setter: Setter[CarrierT] = default_setter,
    ) -> None:
        """
        Write ``traceparent``, and ``tracestate`` if there is one, of the current span; nothing if there is no span.
        """
        span_context = trace.get_current_span(context).get_span_context()
        if not span_context.is_valid:
            return
        # A tracestate belongs to the traceparent beside it.
        _forget(carrier, semconv.TRACEPARENT, semconv.TRACESTATE)
        setter.set(carrier, semconv.TRACEPARENT, format_traceparent(span_context))
        if header := format_tracestate(span_context.trace_state):
            setter.set(carrier, semconv.TRACESTATE, header)

    @property
    def fields(self) -> set[str]:
        """
        The headers that ``inject`` writes.
        """
        return {semconv.TRACEPARENT, semconv.TRACESTATE}


# W3C Baggage, "Header Content" and "Limits". Each repeat is possessive: what follows it can never begin with what it
# takes, so it matches the same texts, and a text that does not match is refused in one pass. With plain repeats the two
# runs of whitespace around an empty value doubled the time with each property.
_NAME: Final = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_OCTETS: Final = r"[!#-+\--:<-\[\]-~]*+"
_OWS: Final = r"[ \t]*+"
_BAGGAGE_MEMBER: Final = re.compile(
    rf"({_NAME}){_OWS}={_OWS}({_OCTETS}){_OWS}(?:;{_OWS}{_NAME}{_OWS}(?:={_OWS}{_OCTETS}{_OWS})?+)*+"
)
_ESCAPE: Final = re.compile(rb"%([0-9A-Fa-f]{2})")
_BYTES: Final = {
    first + second: bytes.fromhex((first + second).decode("ascii"))
    for first in (b"%c" % digit for digit in b"0123456789abcdefABCDEF")
    for second in (b"%c" % digit for digit in b"0123456789abcdefABCDEF")
}
MAX_BAGGAGE_MEMBERS: Final = 64
MAX_BAGGAGE_BYTES: Final = 8_192
# A plus sign is sent encoded: OpenTelemetry's own propagator would read it as a space.
_SAFE_IN_VALUE: Final = "!$&'()*/:=?@"
_SAFE_IN_KEY: Final = "!#$&'*^`|"

_RECEIVED_KEY: Final = create_key("otel-correlation-baggage")


class _Member(NamedTuple):
    """
    One list member: what the baggage API holds of it, and the whole text with its properties.
    """

    key: str
    value: str
    text: str


class _Received(NamedTuple):
    """
    Baggage as it came in. As long as the API's mapping is the same object, the header goes on as it is.
    """

    values: dict[str, object]
    members: list[_Member]
    header: str


def _within_limits(members: list[_Member]) -> list[_Member]:
    kept: list[_Member] = []
    size = -1
    for member in members:
        longer = size + 1 + len(member.text)
        if longer <= MAX_BAGGAGE_BYTES and len(kept) < MAX_BAGGAGE_MEMBERS:
            kept.append(member)
            size = longer
    if dropped := len(members) - len(kept):
        guard.count("baggage.members_over_limit", dropped)
    return kept


def _parsed(header: bytes) -> list[_Member]:
    """
    Return the members of a header that follow the grammar.

    The limits hold before anything is parsed: work stops after 8,192 bytes and after 64 members, right or wrong.
    """
    # Never a partial member: a longer header ends at the last comma within the limit or just behind it.
    text = header if len(header) <= MAX_BAGGAGE_BYTES else header[: MAX_BAGGAGE_BYTES + 1].rpartition(b",")[0]
    over = 0 if text is header else header.count(b",", len(text)) + (not text)
    members: list[_Member] = []
    for number, found in enumerate(_NOT_EMPTY.finditer(text.decode("latin-1"))):
        if number == MAX_BAGGAGE_MEMBERS:
            over += text.count(b",", found.start()) + 1
            break
        part = found.group().rstrip(" \t")
        if match := _BAGGAGE_MEMBER.fullmatch(part):
            key, value = match.groups()
            members.append(_Member(_decoded(key), _decoded(value), part))
    if over:
        guard.count("baggage.members_over_limit", over)
    return members


def _decoded(text: str) -> str:
    """
    Return ASCII text with each ``%`` and two hex digits as the byte that they name, read as UTF-8.

    As ``urllib.parse.unquote`` does, which costs five times as much for a value that is nothing but per cent signs.
    """
    if "%" not in text:
        return text
    pieces = _ESCAPE.split(text.encode("ascii"))
    # Hex digits stand at the odd places.
    pieces[1::2] = [_BYTES[digits] for digits in pieces[1::2]]
    return b"".join(pieces).decode("utf-8", "replace")


def _encoded(key: str, value: object) -> _Member:
    text = str(value)
    name = quote(str(key), safe=_SAFE_IN_KEY, errors="replace")
    return _Member(key, text, f"{name}={quote(text, safe=_SAFE_IN_VALUE, errors='replace')}")


def _members(context: Context) -> list[_Member]:
    """
    Return the baggage of ``context``: members as received while their value is, then changed and new ones.
    """
    found = context.get(_BAGGAGE_KEY)
    values = cast("dict[str, object]", found) if isinstance(found, dict) else {}
    received = context.get(_RECEIVED_KEY)
    members: list[_Member] = []
    unchanged: set[str] = set()
    if isinstance(received, _Received):
        # Of a key that came twice the API holds the last value; both stay if nobody changed that.
        unchanged = {key for key, value in received.values.items() if key in values and values[key] == value}
        members = [member for member in received.members if member.key in unchanged]
    members += [_encoded(key, value) for key, value in values.items() if key and key not in unchanged]
    return members


def extract_baggage_from_headers(values: list[bytes], context: Context) -> Context:
    """
    Return ``context`` with the caller's baggage, or unchanged if there is none that follows the grammar.

    Args:
        values: Every ``baggage`` field, in order; they are one list.
        context: What to add to. Of a key in both, the caller's value holds.
    """
    if not values:
        return context
    came = _parsed(values[0] if len(values) == 1 else b",".join(values))
    if came and _BAGGAGE_KEY in context:
        keys = {member.key for member in came}
        came = [member for member in _members(context) if member.key not in keys] + came
    members = _within_limits(came)
    if not members:
        return context
    held: dict[str, object] = {member.key: member.value for member in members}
    received = _Received(held, members, ",".join([member.text for member in members]))
    return Context({**context, _BAGGAGE_KEY: held, _RECEIVED_KEY: received})


def format_baggage(context: Context) -> str:
    """
    Return the ``baggage`` header of ``context``, empty if there is none; within the limits of the specification.
    """
    held = context.get(_BAGGAGE_KEY)
    if not held:
        return ""
    received = context.get(_RECEIVED_KEY)
    if isinstance(received, _Received) and received.values is held:
        return received.header
    return ",".join([member.text for member in _within_limits(_members(context))])


def _key_of(member: str) -> str:
    """
    Return the key of a list member of baggage that somebody else wrote, right or wrong.
    """
    key = member.partition(";")[0].partition("=")[0].strip(" \t")
    return _decoded(key) if key.isascii() else key


def merge_baggage(theirs: list[bytes], ours: str) -> bytes:
    """
    Return one ``baggage`` header of what somebody else wrote first and what we add to it.

    Their members stay as they are, right or wrong, and in their order; of a key in both ours is sent, behind them.
    Where the limits of the specification leave no room, whole members of ours are left out and counted.

    Args:
        theirs: Every field that is there, in order; they are one list. Beyond the limits none of it is parsed.
        ours: What ``format_baggage`` returned.
    """
    there = theirs[0] if len(theirs) == 1 else b",".join(theirs)
    mine = _NOT_EMPTY.findall(ours)
    if len(there) > MAX_BAGGAGE_BYTES:
        guard.count("baggage.members_over_limit", len(mine))
        return there
    keys = {_key_of(member) for member in mine}
    kept = [part for part in _NOT_EMPTY.findall(there.decode("latin-1")) if _key_of(part) not in keys]
    size = sum(map(len, kept)) + len(kept) - 1
    room = MAX_BAGGAGE_MEMBERS - len(kept)
    dropped = 0
    for member in mine:
        if room > 0 and size + 1 + len(member) <= MAX_BAGGAGE_BYTES:
            kept.append(member)
            size += 1 + len(member)
            room -= 1
        else:
            dropped += 1
    if dropped:
        guard.count("baggage.members_over_limit", dropped)
    return ",".join(kept).encode("latin-1")


def merge_tracestate(theirs: list[bytes], ours: ApiTraceState) -> str:
    """
    Return one ``tracestate`` header of what somebody else wrote first and the members of our span, which stand left.

    Of a key in both ours is sent. What does not follow the grammar is left out as a whole, as every reader would.
    """
    members = {**ours}
    for key, value in TraceState.from_header([value.decode("latin-1") for value in theirs]).items():
        if len(members) < MAX_MEMBERS:
            members.setdefault(key, value)
    return format_tracestate(TraceState._made_of(members))


class BaggagePropagator(TextMapPropagator):
    """
    W3C Baggage. Properties survive a hop, although OpenTelemetry's baggage API holds plain values.
    """

    def extract(
        self,
        carrier: CarrierT,
        context: Context | None = None,
        getter: Getter[CarrierT] = default_getter,
    ) -> Context:
        """
        Return ``context`` with the caller's baggage, or unchanged if there is none that follows the grammar.
        """
        context = Context() if context is None else context
        try:
            return extract_baggage_from_headers(_fields(getter, carrier, semconv.BAGGAGE), context)
        except Exception:  # noqa: BLE001 - a getter of somebody else's
            guard.report("baggage.extract")
            return context

    def inject(
        self,
        carrier: CarrierT,
        context: Context | None = None,
        setter: Setter[CarrierT] = default_setter,
    ) -> None:
        """
        Write ``baggage`` if there is any.
        """
        if header := format_baggage(otel_context.get_current() if context is None else context):
            _forget(carrier, semconv.BAGGAGE)
            setter.set(carrier, semconv.BAGGAGE, header)

    @property
    def fields(self) -> set[str]:
        """
        The header that ``inject`` writes.
        """
        return {semconv.BAGGAGE}


def _lower(name: object) -> str:
    return name.decode("latin-1").lower() if isinstance(name, bytes) else str(name).lower()


def _has_field(carrier: object, name: str) -> bool:
    """
    Tell whether a carrier that can be read (a mapping, or a list of pairs) has this field, whatever its case.
    """
    if isinstance(carrier, Mapping):
        return any(_lower(key) == name for key in cast("Mapping[object, object]", carrier))
    if isinstance(carrier, list):
        pairs = cast("list[object]", carrier)
        return any(isinstance(pair, tuple | list) and pair and _lower(pair[0]) == name for pair in pairs)
    return False


class RequestIdPropagator(TextMapPropagator):
    """
    The request id, under the names of the settings.

    Args:
        settings: Names to read and to write; those of the environment if None.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        settings = from_environment() if settings is None else settings
        self._names = settings.request_id_headers
        self._name = settings.response_header
        self._lower_name = settings.response_header.lower()

    def extract(
        self,
        carrier: CarrierT,
        context: Context | None = None,
        getter: Getter[CarrierT] = default_getter,
    ) -> Context:
        """
        Return ``context`` with the caller's request id, or unchanged if there is no valid one.
        """
        context = Context() if context is None else context
        try:
            found, _ = from_headers(self._pairs(carrier, getter), self._names)
        except Exception:  # noqa: BLE001 - a getter of somebody else's
            guard.report("xrequestid.extract")
            return context
        return context if found is None else identity.set_in(context, identity.Identity(found))

    def _pairs(self, carrier: CarrierT, getter: Getter[CarrierT]) -> list[tuple[bytes, bytes]]:
        # By the carrier's own keys first: a plain dictionary is read by the exact key, and ours is X-Request-ID.
        spelled = dict.fromkeys(getter.keys(carrier))
        pairs: list[tuple[bytes, bytes]] = []
        for name in self._names:
            lower = name.decode("ascii")
            keys = [key for key in spelled if _lower(key) == lower] or [lower]
            pairs += [(name, value) for key in keys for value in _fields(getter, carrier, key)]
        return pairs

    def inject(
        self,
        carrier: CarrierT,
        context: Context | None = None,
        setter: Setter[CarrierT] = default_setter,
    ) -> None:
        """
        Write the current request id if there is one and the carrier has none: what a caller set is left alone.
        """
        found = identity.current() if context is None else identity.get_from(context)
        if found is not None and not _has_field(carrier, self._lower_name):
            setter.set(carrier, self._name, found.request_id)

    @property
    def fields(self) -> set[str]:
        """
        The header that ``inject`` writes.
        """
        return {self._name}


class _Composite(CompositePropagator):
    """
    Propagators in order, each behind the never-raise boundary; with none, ``extract`` still returns a context.
    """

    def extract(
        self,
        carrier: CarrierT,
        context: Context | None = None,
        getter: Getter[CarrierT] = default_getter,
    ) -> Context:
        given = context
        context = Context() if context is None else context
        for propagator in self._propagators:
            try:
                context = propagator.extract(carrier, context, getter=getter)
            except Exception:  # noqa: BLE001 - a propagator of somebody else's
                guard.report("propagator.extract")
        if given is not None or not context or identity.get_from(context) is not None:
            # Nothing was found in a carrier that gives an empty context: instrumentations keep the current one then.
            return context
        # What is current decides: a carrier that names no request of its own is read by the request that runs.
        running = identity.current()
        return context if running is None else identity.set_in(context, running)

    def inject(
        self,
        carrier: CarrierT,
        context: Context | None = None,
        setter: Setter[CarrierT] = default_setter,
    ) -> None:
        for propagator in self._propagators:
            try:
                propagator.inject(carrier, context, setter=setter)
            except Exception:  # noqa: BLE001 - a propagator or a setter of somebody else's
                guard.report("propagator.inject")


def _load(name: str) -> TextMapPropagator | None:
    from otel_correlation.upstream.metadata import entry_points  # noqa: PLC0415 - rarely needed

    try:
        for entry in entry_points(group="opentelemetry_propagator", name=name):
            loaded: object = entry.load()()
            if isinstance(loaded, TextMapPropagator):
                return loaded
        reason = "none of that name is installed"
    except Exception as error:  # noqa: BLE001 - whatever another package does when it is imported
        reason = f"{type(error).__name__}: {error}"
    guard.logger.warning("OTEL_PROPAGATORS: the propagator %r cannot be used (%s) and is left out", name, reason)
    return None


def build(settings: Settings) -> TextMapPropagator:
    """
    Return the propagators of ``settings``, in order, as one; never raises.

    ``tracecontext``, ``baggage`` and ``xrequestid`` are ours. A name from elsewhere that does not load is left out with
    one warning; without any name nothing is read and nothing is written.
    """
    propagators: list[TextMapPropagator] = []
    for name in settings.propagators:
        if name == "tracecontext":
            propagators.append(TraceContextPropagator())
        elif name == "baggage":
            propagators.append(BaggagePropagator())
        elif name == "xrequestid":
            propagators.append(RequestIdPropagator(settings))
        elif (loaded := _load(name)) is not None:
            propagators.append(loaded)
    return _Composite(propagators)
