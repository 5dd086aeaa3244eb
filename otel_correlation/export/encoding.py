"""
Spans and log records as OTLP protobuf bytes, written by hand.

The messages are those that ``opentelemetry.exporter.otlp.proto.common`` makes (a property test compares the two), at a
fraction of the time: resource and scope are encoded once per object, frequent attributes once per value, and no message
objects are built. Two things differ on purpose: text that is not Unicode and values that OTLP cannot hold are
replaced, where the stock encoder drops the attribute or the whole batch.

See: opentelemetry-proto (trace.proto, logs.proto, common.proto); protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from otel_correlation import guard
from otel_correlation.upstream.sdk import BoundedAttributes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from opentelemetry.sdk._logs import ReadableLogRecord
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import Link, SpanContext, Status

_BYTE: Final = tuple(bytes((value,)) for value in range(256))
_DOUBLE: Final = struct.Struct("<Bd").pack
_FIXED64: Final = struct.Struct("<BQ").pack
_FIXED64_PAIR: Final = struct.Struct("<BQBQ").pack
_FIXED32: Final = struct.Struct("<BI").pack
_INT64_MIN: Final = -(2**63)
_INT64_MAX: Final = 2**63 - 1

# Deeper values are cut: protobuf parsers refuse more than 100 levels, and a list may contain itself.
_MAX_DEPTH: Final = 30
# The caches: entries in all, values of one key, characters of one value.
_MAX_ENTRIES: Final = 4096
_MAX_VALUES: Final = 64
_MAX_LENGTH: Final = 200
_MAX_NAMES: Final = 1024

# SpanFlags: bit 8 says that bit 9 (the parent is remote) is known.
_FLAGS_LOCAL: Final = b"\x85\x01" + struct.pack("<I", 0x100)
_FLAGS_REMOTE: Final = b"\x85\x01" + struct.pack("<I", 0x300)


def _varint(value: int) -> bytes:
    if value < 0x80:
        return _BYTE[value]
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _sized(tag: bytes, body: bytes) -> bytes:
    return tag + _varint(len(body)) + body


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace")


def _any_value(value: object, depth: int = 0) -> bytes:
    """
    Return the body of an ``AnyValue``; never raises for a value.
    """
    if value is None:
        return b""
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, str):
        return _sized(b"\x0a", _utf8(value))
    if isinstance(value, int):
        if _INT64_MIN <= value <= _INT64_MAX:
            return b"\x18" + _varint(value & 0xFFFFFFFFFFFFFFFF)
        return _sized(b"\x0a", hex(value).encode())  # not str(): that is refused from 4300 digits on
    if isinstance(value, float):
        return _DOUBLE(0x21, value)
    if isinstance(value, bytes):
        return _sized(b"\x3a", value)
    if depth >= _MAX_DEPTH:
        return b""
    if isinstance(value, Sequence):
        return _sized(b"\x2a", b"".join([_sized(b"\x0a", _any_value(entry, depth + 1)) for entry in value]))
    if isinstance(value, Mapping):
        pairs = [_sized(b"\x0a", _key_value(str(key), entry, depth + 1)) for key, entry in value.items()]
        return _sized(b"\x32", b"".join(pairs))
    try:
        text = str(value)
    except Exception:  # noqa: BLE001 - somebody's __str__
        return b""
    return _sized(b"\x0a", _utf8(text))


def _key_value(key: str, value: object, depth: int = 0) -> bytes:
    name = _sized(b"\x0a", _utf8(key)) if key else b""
    return name + _sized(b"\x12", _any_value(value, depth))


class _Attributes:
    """
    Encodes the attributes of one kind of message, each as field ``tag``.

    A value that comes back is taken from a cache. A key with more than 64 values (an id, a path) is *wide*: its values
    are not cached, only what stands before them, by their length.
    """

    __slots__ = ("_entries", "_narrow", "_tag", "_wide")

    def __init__(self, tag: int) -> None:
        self._tag = _BYTE[tag]
        self._entries = 0
        self._narrow: dict[str, dict[object, bytes]] = {}
        self._wide: dict[str, dict[int, bytes]] = {}

    def add(self, parts: list[bytes], items: Iterable[tuple[str, object]]) -> None:
        """
        Append every attribute to ``parts``.
        """
        narrow = self._narrow
        wide = self._wide
        for key, value in items:
            kind = type(value)
            if kind is str:
                heads = wide.get(key)
                if heads is not None:
                    try:
                        text = value.encode()  # type: ignore[attr-defined]
                    except UnicodeEncodeError:
                        text = _utf8(value)  # type: ignore[arg-type]
                    head = heads.get(len(text))
                    parts.append(head if head is not None else self._head(heads, key, len(text)))
                    parts.append(text)
                    continue
            elif kind is not int:
                # True == 1 == 1.0: only text and integers may share a cache, and integers are never equal to text.
                parts.append(_sized(self._tag, _key_value(key, value)))
                continue
            known = narrow.get(key)
            if known is not None:
                found = known.get(value)
                if found is not None:
                    parts.append(found)
                    continue
            parts.append(self._learn(key, value))

    def _learn(self, key: str, value: object) -> bytes:
        encoded = _sized(self._tag, _key_value(key, value))
        if len(encoded) > _MAX_LENGTH:
            return encoded
        if self._entries >= _MAX_ENTRIES:
            self._entries = 0
            self._narrow.clear()
            self._wide.clear()
        known = self._narrow.get(key)
        if known is None:
            known = self._narrow[key] = {}
            self._entries += 1
        if len(known) < _MAX_VALUES:
            known[value] = encoded
            self._entries += 1
        elif isinstance(value, str):
            self._narrow[key] = {}
            self._wide[key] = {}
        return encoded

    def _head(self, heads: dict[int, bytes], key: str, length: int) -> bytes:
        inner = b"\x0a" + _varint(length)
        name = _sized(b"\x0a", _utf8(key)) if key else b""
        outer = name + b"\x12" + _varint(len(inner) + length) + inner
        head = self._tag + _varint(len(outer) + length) + outer
        if length <= 1024:
            heads[length] = head
        return head


class _Groups:
    """
    The bytes of resources and scopes, once per object; equal ones become one group.
    """

    __slots__ = ("_resources", "_scopes")

    def __init__(self) -> None:
        # The object is kept beside its bytes, so that its id() stays its own.
        self._resources: dict[int, tuple[Resource, tuple[bytes, bytes]]] = {}
        self._scopes: dict[int, tuple[InstrumentationScope | None, tuple[bytes, bytes]]] = {}

    def resource(self, resource: Resource) -> tuple[bytes, bytes]:
        """
        Return the fields that stand before and after the scopes of a resource.
        """
        found = self._resources.get(id(resource))
        if found is not None:
            return found[1]
        parts: list[bytes] = []
        _RESOURCE_ATTRIBUTES.add(parts, _items(resource.attributes))
        encoded = (_sized(b"\x0a", b"".join(parts)), _schema_url(resource.schema_url))
        if len(self._resources) >= 64:
            self._resources.clear()
        self._resources[id(resource)] = (resource, encoded)
        return encoded

    def scope(self, scope: InstrumentationScope | None) -> tuple[bytes, bytes]:
        """
        Return the fields that stand before and after the spans or records of a scope.
        """
        found = self._scopes.get(id(scope))
        if found is not None:
            return found[1]
        encoded = (b"\x0a\x00", b"")
        if scope is not None:
            parts = [_text(b"\x0a", scope.name), _text(b"\x12", scope.version)]
            _SCOPE_ATTRIBUTES.add(parts, _items(scope.attributes))
            encoded = (_sized(b"\x0a", b"".join(parts)), _schema_url(scope.schema_url))
        if len(self._scopes) >= 256:
            self._scopes.clear()
        self._scopes[id(scope)] = (scope, encoded)
        return encoded


def _text(tag: bytes, value: str | None) -> bytes:
    return _sized(tag, _utf8(value)) if value else b""


def _schema_url(value: str | None) -> bytes:
    return _text(b"\x1a", value)


def _items(attributes: Any) -> Iterable[tuple[str, object]]:
    # The mixin methods of a Mapping cost a microsecond for each attribute; what is inside is a dict.
    kind = type(attributes)
    if kind is dict:
        return attributes.items()  # type: ignore[no-any-return]
    if kind is BoundedAttributes:
        return attributes._dict.items()  # type: ignore[no-any-return]
    return attributes.items() if attributes else ()


_SPAN_ATTRIBUTES: Final = _Attributes(0x4A)
_EVENT_ATTRIBUTES: Final = _Attributes(0x1A)
_LINK_ATTRIBUTES: Final = _Attributes(0x22)
_LOG_ATTRIBUTES: Final = _Attributes(0x32)
_RESOURCE_ATTRIBUTES: Final = _Attributes(0x0A)
_SCOPE_ATTRIBUTES: Final = _Attributes(0x1A)
_GROUPS: Final = _Groups()

_names: dict[str, bytes] = {}


def _name(name: str) -> bytes:
    encoded = _text(b"\x2a", name)
    if len(encoded) <= _MAX_LENGTH:
        if len(_names) >= _MAX_NAMES:
            _names.clear()
        _names[name] = encoded
    return encoded


# SpanKind numbers its members from 0 and OTLP from 1.
_KIND: Final = tuple(b"\x30" + _BYTE[value + 1] for value in range(5))
_STATUS: Final = (b"\x7a\x00", b"\x7a\x02\x18\x01", b"\x7a\x02\x18\x02")


def _status(status: Status) -> bytes:
    code = status.status_code.value
    return _sized(b"\x7a", _text(b"\x12", status.description) + (b"\x18" + _BYTE[code] if code else b""))


def _flags(parent: SpanContext | None) -> bytes:
    return _FLAGS_REMOTE if parent is not None and parent.is_remote else _FLAGS_LOCAL


def _event(event: Event) -> bytes:
    parts = [_FIXED64(0x09, event.timestamp or 0), _text(b"\x12", event.name)]
    _EVENT_ATTRIBUTES.add(parts, _items(event.attributes))
    if dropped := event.dropped_attributes:
        parts.append(b"\x20" + _varint(dropped))
    return _sized(b"\x5a", b"".join(parts))


def _link(link: Link) -> bytes:
    context = link.context
    parts = [b"\x0a\x10", context.trace_id.to_bytes(16, "big"), b"\x12\x08", context.span_id.to_bytes(8, "big")]
    _LINK_ATTRIBUTES.add(parts, _items(link.attributes))
    if dropped := link.dropped_attributes:
        parts.append(b"\x28" + _varint(dropped))
    # Field 6: tag 0x35, the same four bytes as a span's flags.
    parts.append(b"\x35" + _flags(context)[2:])
    return _sized(b"\x6a", b"".join(parts))


def _span(span: ReadableSpan) -> bytes:
    context = span.get_span_context()
    assert context is not None
    name = span.name
    parent = span.parent
    status = span.status
    parts = [
        b"\x0a\x10",
        context.trace_id.to_bytes(16, "big"),
        b"\x12\x08",
        context.span_id.to_bytes(8, "big"),
        _names.get(name) or _name(name),
        _KIND[span.kind._value_],
        _FIXED64_PAIR(0x39, span.start_time or 0, 0x41, span.end_time or 0),
        _STATUS[status.status_code._value_] if not status.description else _status(status),
    ]
    if parent is None:
        parts.append(_FLAGS_LOCAL)
    else:
        parts += (b"\x22\x08", parent.span_id.to_bytes(8, "big"), _FLAGS_REMOTE if parent.is_remote else _FLAGS_LOCAL)
    if state := context.trace_state:
        parts.append(_text(b"\x1a", ",".join([f"{key}={value}" for key, value in state.items()])))
    _SPAN_ATTRIBUTES.add(parts, _items(span._attributes))
    if events := span._events:
        parts += [_event(event) for event in events]
    if links := span._links:
        parts += [_link(link) for link in links]
    if dropped := span.dropped_attributes:
        parts.append(b"\x50" + _varint(dropped))
    if dropped := span.dropped_events:
        parts.append(b"\x60" + _varint(dropped))
    if dropped := span.dropped_links:
        parts.append(b"\x70" + _varint(dropped))
    return b"".join(parts)


def _log(log: ReadableLogRecord) -> bytes:
    record = log.log_record
    number = record.severity_number
    parts = [
        _FIXED64_PAIR(0x09, record.timestamp or 0, 0x59, record.observed_timestamp or 0),
        b"\x10" + _BYTE[number.value] if number is not None else b"",
        _text(b"\x1a", record.severity_text),
        _sized(b"\x2a", _any_value(record.body)),
    ]
    _LOG_ATTRIBUTES.add(parts, _items(record.attributes))
    if dropped := log.dropped_attributes:
        parts.append(b"\x38" + _varint(dropped))
    if flags := record.trace_flags:
        parts.append(_FIXED32(0x45, flags))
    if trace_id := record.trace_id:
        parts += (b"\x4a\x10", trace_id.to_bytes(16, "big"))
    if span_id := record.span_id:
        parts += (b"\x52\x08", span_id.to_bytes(8, "big"))
    if record.event_name:
        parts.append(_text(b"\x62", record.event_name))
    return b"".join(parts)


def _encode(items: Sequence[Any], encode: Callable[[Any], bytes], kind: str) -> tuple[bytes, int]:
    # Resource -> scope -> parts; a batch nearly always has one resource and a few scopes.
    groups: dict[tuple[bytes, bytes], dict[tuple[bytes, bytes], list[bytes]]] = {}
    encoded = 0
    for item in items:
        try:
            body = encode(item)
            resource = _GROUPS.resource(item.resource)
            scope = _GROUPS.scope(item.instrumentation_scope)
        except Exception:  # noqa: BLE001 - one strange item must not cost the batch
            guard.count(f"{kind}.dropped.not_encodable")
            guard.report("export.encoding")
            continue
        scopes = groups.get(resource)
        if scopes is None:
            scopes = groups[resource] = {}
        parts = scopes.get(scope)
        if parts is None:
            parts = scopes[scope] = []
        encoded += 1
        size = len(body)
        parts.append(b"\x12" + _BYTE[size] if size < 0x80 else b"\x12" + _varint(size))
        parts.append(body)
    message: list[bytes] = []
    for (resource_head, resource_tail), scopes in groups.items():
        inner = [resource_head]
        for (scope_head, scope_tail), parts in scopes.items():
            inner.append(_sized(b"\x12", scope_head + b"".join(parts) + scope_tail))
        inner.append(resource_tail)
        message.append(_sized(b"\x0a", b"".join(inner)))
    return b"".join(message), encoded


def encode_spans(spans: Sequence[ReadableSpan]) -> tuple[bytes, int]:
    """
    Return a serialized ``ExportTraceServiceRequest`` and how many spans it holds.

    A span that cannot be encoded is left out and counted. Threads may encode at the same time: the caches are only
    ever read and written by single operations on dicts.
    """
    return _encode(spans, _span, "spans")


def encode_logs(records: Sequence[ReadableLogRecord]) -> tuple[bytes, int]:
    """
    Return a serialized ``ExportLogsServiceRequest`` and how many records it holds; else as ``encode_spans``.
    """
    return _encode(records, _log, "logs")
