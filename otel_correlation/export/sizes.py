"""
How much a span or a log record holds, estimated in a third of a microsecond: the queues are bounded in bytes.

An estimate is close to the memory that an item holds, and hardly ever below what it is as OTLP. It costs one look at
each attribute; nothing is encoded and nothing is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.attributes import BoundedAttributes

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
_SHORT: Final = 64
# UTF-8 has at most four bytes for a character, and so has Python.
_WIDEST: Final = 4
# Of a list or dict, so many of what it holds are looked at; the others count as short.
_NODES: Final = 16_384
# What nobody can look at.
_UNKNOWN: Final = 4_096


def span_bytes(span: ReadableSpan) -> int:
    """
    Return the estimated bytes of a span that has ended; never raises.
    """
    try:
        held: Any = span._attributes
        size = _SPAN
        if type(held) is not dict:
            held = _plain(held)
            size += _OF_THE_SDK
        size += _ATTRIBUTE * len(held)
        for value in held.values():
            kind = type(value)
            if kind is str:
                length = len(value)
                if length > _SHORT:
                    size += length if value.isascii() else length * _WIDEST
            elif kind is not int:
                size += _value_bytes(value)
        if span._events:
            for event in span._events:
                size += _EVENT + _text_bytes(event.name) + _attributes_bytes(_plain(event.attributes))
        if span._links:
            for link in span._links:
                size += _LINK + _attributes_bytes(_plain(link.attributes)) + _state_bytes(link.context)
        if len(span._name) > _SHORT:
            size += _text_bytes(span._name)
        if span._status.description:
            size += _text_bytes(span._status.description)
        context = span._context
        return size if context is None else size + _state_bytes(context)
    except Exception:  # noqa: BLE001 - a span of somebody else's
        return _UNKNOWN


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
            if length > _SHORT:
                size += length if body.isascii() else length * _WIDEST
        else:
            size += _value_bytes(body)
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
            if length > _SHORT:
                size += length if value.isascii() else length * _WIDEST  # type: ignore[attr-defined]
        elif kind is not int:
            size += _value_bytes(value)
    return size


def _text_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text) * _WIDEST


def _value_bytes(value: object) -> int:
    size = 0
    waiting = [value]
    left = _NODES
    while waiting and left:
        left -= 1
        found = waiting.pop()
        if isinstance(found, str):
            size += _text_bytes(found)
        elif isinstance(found, bytes | bytearray):
            size += len(found)
        elif isinstance(found, list | tuple):
            size += _SHORT * len(found)
            waiting += islice(found, left)
        elif isinstance(found, Mapping):
            size += _ATTRIBUTE * len(found)
            waiting += islice(found.values(), left)
    return size


def _state_bytes(context: Any) -> int:
    members = context.trace_state._dict
    return sum(map(len, members.values())) + _ATTRIBUTE * len(members) if len(members) > 1 else 0
