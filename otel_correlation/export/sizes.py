"""
How much a span or a log record holds, estimated in a third of a microsecond: the queues are bounded in bytes.

An estimate is close to the memory that an item holds, and hardly ever below what it is as OTLP. It costs one look at
each attribute; nothing is encoded and nothing is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from otel_correlation.upstream.sdk import BoundedAttributes

if TYPE_CHECKING:
    from opentelemetry.sdk._logs import ReadableLogRecord
    from opentelemetry.sdk.trace import ReadableSpan

# Measured with tracemalloc, and rounded up (tests/unit/test_export_sizes.py holds them to it).
_SPAN: Final = 700
# What a span of the SDK holds beside that: bounded attributes, a lock.
_OF_THE_SDK: Final = 2_000
_RECORD: Final = 900
_EVENT: Final = 1_600
_LINK: Final = 1_600
# An attribute with its key and a short value.
_ATTRIBUTE: Final = 150
# A text up to this length is short.
SHORT: Final = 64
# UTF-8 has at most four bytes for a character, and so has Python.
_WIDEST: Final = 4
# Of a list or dict, so many of what it holds are looked at; the others count as short.
_NODES: Final = 16_384
# Where the tracestate stands in a SpanContext, which is a tuple.
_STATE: Final = 4
# What nobody can look at.
_UNKNOWN: Final = 4_096


def span_bytes(span: ReadableSpan) -> int:
    """
    Return the estimated bytes of a span that has ended; never raises.
    """
    # Every span passes here: what is rare is looked at elsewhere.
    try:
        held: Any = span._attributes
        if type(held) is dict:
            # Of a SERVER span the edge has counted what is long in it.
            known = getattr(span, "_long", None)
            size = _SPAN + (_attributes_bytes(held) if known is None else _ATTRIBUTE * len(held) + known)
        else:
            size = _SPAN + _OF_THE_SDK + _attributes_bytes(_plain(held))
        context: Any = span._context
        if (
            span._events
            or span._links
            or len(span._name) > SHORT
            or span._status._description
            # By their places: reading a property of a SpanContext costs as much as all the rest of this.
            or len(context[_STATE]._dict) > 1
        ):
            size += _rare_bytes(span)
    except Exception:  # noqa: BLE001 - a span of somebody else's
        return _UNKNOWN
    return size


def _rare_bytes(span: ReadableSpan) -> int:
    size = text_bytes(span._name) + _state_bytes(span._context)
    for event in span._events:
        size += _EVENT + text_bytes(event.name) + _attributes_bytes(_plain(event.attributes))
    for link in span._links:
        size += _LINK + _attributes_bytes(_plain(link.attributes)) + _state_bytes(link.context)
    return size + (text_bytes(span._status.description) if span._status.description else 0)


def record_bytes(record: ReadableLogRecord) -> int:
    """
    Return the estimated bytes of a log record; never raises.
    """
    try:
        found = record.log_record
        body = found.body
        size = _RECORD
        if type(body) is str:
            length = len(body)
            if length > SHORT:
                size += length if body.isascii() else length * _WIDEST
        else:
            size += value_bytes(body)
        held = found.attributes
        return size + _attributes_bytes(held if type(held) is dict else _plain(held))
    except Exception:  # noqa: BLE001 - a record of somebody else's
        return _UNKNOWN


def _plain(attributes: Any) -> Mapping[str, object]:
    # Looking into a Mapping costs a microsecond for each attribute; what is inside is a dict.
    if type(attributes) is BoundedAttributes:
        return attributes._dict
    return attributes or {}


def _attributes_bytes(attributes: Mapping[str, object]) -> int:
    size = _ATTRIBUTE * len(attributes)
    for value in attributes.values():
        kind = type(value)
        if kind is str:
            length = len(value)  # type: ignore[arg-type]
            if length > SHORT:
                size += length if value.isascii() else length * _WIDEST  # type: ignore[attr-defined]
        elif kind is not int:
            size += value_bytes(value)
    return size


def text_bytes(text: str) -> int:
    """
    Return how many bytes a text has, in memory or as UTF-8, at most.
    """
    return len(text) if text.isascii() else len(text) * _WIDEST


def value_bytes(value: object) -> int:
    """
    Return the bytes of an attribute's value, with all that it holds.
    """
    size = 0
    waiting = [value]
    left = _NODES
    while waiting and left:
        left -= 1
        found = waiting.pop()
        if isinstance(found, str):
            size += text_bytes(found)
        elif isinstance(found, bytes | bytearray):
            size += len(found)
        elif isinstance(found, list | tuple):
            size += SHORT * len(found)
            waiting += islice(found, left)
        elif isinstance(found, Mapping):
            size += _ATTRIBUTE * len(found)
            size += sum(text_bytes(name) for name in islice(found, left) if len(name) > SHORT)
            waiting += islice(found.values(), left)
    return size


def _state_bytes(context: Any) -> int:
    members = context.trace_state._dict
    return sum(map(len, members.values())) + _ATTRIBUTE * len(members) if len(members) > 1 else 0
