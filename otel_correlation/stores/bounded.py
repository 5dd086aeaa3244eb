"""
Bytes of others, read within bounds: JSON of a bounded depth and number of values, gzip of a bounded size.
"""

from __future__ import annotations

import json
import re
import zlib
from itertools import accumulate
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from otel_correlation.stores.model import Json

# Levels of lists and objects. Protobuf reads as many, and Python's own readers and writers come further.
MAX_DEPTH: Final = 100
# A gzip file may be of several members (RFC 1952); bgzip writes one for each 64 KiB.
MAX_MEMBERS: Final = 1000
# zlib copies what is left of its input at the end of a member: small pieces keep the copies small.
_PIECE: Final = 16 * 1024
# The last quote is optional: a text that never ends is looked at once, and left to the reader to refuse.
_STRING: Final = re.compile(rb'"[^"]*+"?')
_NO_STRUCTURE: Final = bytes(set(range(256)) - set(b'[]{},"'))
_STEPS: Final = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


class MalformedError(ValueError):
    """
    Bytes that are not what they claim to be.
    """


class TooBigError(ValueError):
    """
    Bytes that hold more than the bound.
    """


def read_json(data: bytes | bytearray | str, *, max_values: int) -> Json:
    """
    Return the JSON document (UTF-8) in ``data``; what is too big is refused before it is in memory.

    Args:
        data: The text. The scan is linear and takes about as long as the reading itself.
        max_values: How many values it may have, those of objects and lists included.

    Raises:
        TooBigError: It has more than ``max_values`` values.
        MalformedError: It is no JSON, or nested more than 100 levels deep.
    """
    structure = _structure(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)
    # Each value is the first of an object or a list, or stands behind a comma.
    if structure.count(b",") + structure.count(b"[") + structure.count(b"{") > max_values:
        raise TooBigError(f"the JSON has more than {max_values} values")
    brackets = structure.replace(b",", b"")
    if max(accumulate(map(_STEPS.__getitem__, brackets)), default=0) > MAX_DEPTH:
        raise MalformedError(f"the JSON is nested more than {MAX_DEPTH} levels deep")
    try:
        document: Json = json.loads(data if isinstance(data, str) else data.decode())
    except ValueError as error:
        raise MalformedError(f"no JSON ({type(error).__name__})") from None
    return document


def _structure(data: bytes | bytearray) -> bytes:
    """
    Return the brackets and commas of a JSON document that stand outside its strings.
    """
    marks = data.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NO_STRUCTURE)
    found = bytearray()
    is_in_string = False
    # Piece by piece: of millions of strings the re module would keep a list.
    for begin in range(0, len(marks), _PIECE):
        piece = b'"' * is_in_string + marks[begin : begin + _PIECE]
        is_in_string = piece.count(b'"') % 2 == 1
        found += _STRING.sub(b"", piece)
    return bytes(found)


class Gunzip:
    """
    Inflates gzip, piece by piece as it arrives.

    Args:
        max_bytes: What may come out in all.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._members = 0
        # zlib has no public name for the type.
        self._member = zlib.decompressobj(wbits=31)
        self.content = bytearray()

    def feed(self, data: bytes) -> None:
        """
        Put what is in ``data`` to ``content``.

        Raises:
            MalformedError: It is no gzip.
            TooBigError: More than ``max_bytes`` bytes came out, or it has more than 1,000 members.
        """
        for begin in range(0, len(data), _PIECE):
            piece = data[begin : begin + _PIECE]
            while piece:
                if self._member.eof:
                    self._next_member()
                try:
                    self.content += self._member.decompress(piece, self._max_bytes + 1 - len(self.content))
                except zlib.error as error:
                    raise MalformedError(f"the body is not gzip: {error}") from None
                if len(self.content) > self._max_bytes:
                    raise TooBigError(f"the body is larger than {self._max_bytes} bytes after decompression")
                piece = self._member.unused_data

    def finish(self) -> bytes:
        """
        Return everything.

        Raises:
            MalformedError: The end is missing.
        """
        if not self._member.eof:
            raise MalformedError("the gzip body is cut off")
        return bytes(self.content)

    def _next_member(self) -> None:
        self._members += 1
        if self._members >= MAX_MEMBERS:
            raise TooBigError(f"the gzip body has more than {MAX_MEMBERS} members")
        self._member = zlib.decompressobj(wbits=31)
