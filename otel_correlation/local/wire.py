"""
What a protobuf message holds, counted on its bytes: parsed, two bytes become hundreds.

See: protobuf's "Encoding": a field is its number and wire type, then a varint, 4 or 8 bytes, or a length and content.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from otel_correlation.stores.bounded import MAX_DEPTH, MalformedError, TooBigError

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_MAX_VARINT_BYTES: Final = 10
# Messages that make up attributes. They are many in every span, and small in memory.
_PARTS_OF_ATTRIBUTES: Final = frozenset({"KeyValue", "AnyValue", "ArrayValue", "KeyValueList"})


class Shape:
    """
    Which fields of a message are messages themselves, as deep as they go.
    """

    __slots__ = ("fields", "is_record")

    def __init__(self, descriptor: Descriptor, known: dict[str, Shape] | None = None) -> None:
        known = {} if known is None else known
        known[descriptor.full_name] = self
        self.is_record = descriptor.name not in _PARTS_OF_ATTRIBUTES
        self.fields: dict[int, Shape] = {}
        for field in descriptor.fields:
            kind = field.message_type
            if kind is not None:
                self.fields[field.number] = known.get(kind.full_name) or Shape(kind, known)


def check(body: bytes, shape: Shape, *, max_fields: int, max_records: int) -> None:
    """
    Check that ``body`` is a protobuf message of ``shape`` within bounds; linear, and it stops at a bound.

    Args:
        body: The encoded message.
        shape: What it should be. Fields that it does not know are skipped.
        max_fields: How many fields it may have, those of messages within included.
        max_records: How many messages it may have within that are no part of an attribute: spans, events, log records.

    Raises:
        TooBigError: It has more.
        MalformedError: It is none, or nested more than 100 levels deep.
    """
    fields = records = position = 0
    end = len(body)
    within: list[tuple[int, Shape]] = []
    try:
        while True:
            if position >= end:
                if position > end:
                    raise MalformedError("a field is longer than what it is in")
                if not within:
                    return
                end, shape = within.pop()
                continue
            fields += 1
            if fields > max_fields:
                raise TooBigError(f"the message has more than {max_fields} fields")
            key = body[position]
            position += 1
            if key >= 0x80:
                key, position = _varint(body, position - 1)
            kind = key & 7
            if kind == _LENGTH:
                size = body[position]
                position += 1
                if size >= 0x80:
                    size, position = _varint(body, position - 1)
                inner = shape.fields.get(key >> 3)
                if inner is None:
                    position += size
                    continue
                records += inner.is_record
                if records > max_records:
                    raise TooBigError(f"the message has more than {max_records} spans, events, records and the like")
                if len(within) >= MAX_DEPTH:
                    raise MalformedError(f"the message is nested more than {MAX_DEPTH} levels deep")
                within.append((end, shape))
                if position + size > end:
                    raise MalformedError("a field is longer than what it is in")
                end, shape = position + size, inner
            elif kind == _VARINT:
                if body[position] < 0x80:
                    position += 1
                else:
                    _, position = _varint(body, position)
            elif kind == _EIGHT_BYTES:
                position += 8
            elif kind == _FOUR_BYTES:
                position += 4
            else:
                raise MalformedError("a field has a wire type that OTLP does not use")
    except IndexError:
        raise MalformedError("a field is cut off") from None


def _varint(body: bytes, begin: int) -> tuple[int, int]:
    """
    Return a varint and where it ends.
    """
    value = 0
    for number in range(_MAX_VARINT_BYTES):
        byte = body[begin + number]
        value |= (byte & 0x7F) << (7 * number)
        if byte < 0x80:
            return value, begin + number + 1
    raise MalformedError("a number has more than 64 bits")
