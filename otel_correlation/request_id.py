"""
The request id: what is valid, how one is read from headers, minted, and mapped to a trace id.

Pure and total functions only; the contract is ``docs/reference/bridge.md``.
"""

from __future__ import annotations

import re
import uuid
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

MAX_LENGTH: Final = 200
# Shorter ids repeat ("42", "test"), so they never name a trace.
MIN_ROOT_LENGTH: Final = 16

_VALID: Final = re.compile(rb"[A-Za-z0-9._~:/+=#-]{1,200}")
_UUID: Final = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_HEX32: Final = re.compile(r"[0-9A-Fa-f]{32}")
_ALB_ROOT: Final = re.compile(r"(?:Root=)?1-([0-9A-Fa-f]{8})-([0-9A-Fa-f]{24})")
# X-Amzn-Trace-Id is a list of fields, Root= among them, in any order (AWS: request tracing for ALB).
_ALB_FIELD: Final = re.compile(rb"(?:[^;]*;)*?[ \t]*Root=(1-[0-9A-Fa-f]{8}-[0-9A-Fa-f]{24})[ \t]*(?:;.*)?", re.DOTALL)
_ALB_HEADER: Final = b"x-amzn-trace-id"


def parse(value: bytes) -> str | None:
    """
    Validate an untrusted header value.

    Args:
        value: The whole field value as received.

    Returns:
        The id unchanged, or None if it must be replaced. Never a repaired, cut or decoded value.
    """
    # fullmatch: ``$`` would let a final line feed through.
    return value.decode("ascii") if _VALID.fullmatch(value) else None


def from_headers(headers: Iterable[tuple[bytes, bytes]], names: tuple[bytes, ...]) -> tuple[str | None, bool]:
    """
    Read the request id from the first header of ``names`` that is present.

    Args:
        headers: Raw ASGI header pairs, in order.
        names: Lower-case header names, most wanted first.

    Returns:
        The valid id or None, and whether a present header was refused (two fields, or a value that is not valid). No
        second
        header is consulted after a refusal.
    """
    found: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        # ASGI servers send lower-case names; a test client or another server may not.
        key = name if name in names else name.lower()
        if key in names:
            found.setdefault(key, []).append(value)
    return from_fields(found, names)


def from_fields(fields: Mapping[bytes, Sequence[bytes]], names: tuple[bytes, ...]) -> tuple[str | None, bool]:
    """
    Read the request id as ``from_headers`` does.

    Args:
        fields: All values of each header that is present, by lower-case name.
        names: Lower-case header names, most wanted first.
    """
    for name in names:
        values = fields.get(name)
        if not values:
            continue
        if len(values) > 1:
            return None, True
        if name == _ALB_HEADER:
            match = _ALB_FIELD.fullmatch(values[0])
            return (match.group(1).decode("ascii"), False) if match else (None, True)
        valid = parse(values[0])
        return valid, valid is None
    return None, False


def to_trace_id(request_id: str) -> int | None:
    """
    Map a valid request id to the trace id that it roots.

    Args:
        request_id: A valid request id.

    Returns:
        The 128 bits of a UUID (8-4-4-4-12 hex digits, any version), of 32 hex digits or of an ALB root; for any other
        id of 16
        characters or more ``blake2b(id, digest_size=16)``, which is what ``b2sum -l 128`` prints; None for a short or
        an
        all-zero id, which never names a trace.
    """
    if _UUID.fullmatch(request_id):
        return int(request_id.replace("-", ""), 16) or None
    if _HEX32.fullmatch(request_id):
        return int(request_id, 16) or None
    if match := _ALB_ROOT.fullmatch(request_id):
        return int(match.group(1) + match.group(2), 16) or None
    if len(request_id) < MIN_ROOT_LENGTH:
        return None
    return int.from_bytes(blake2b(request_id.encode("ascii", "replace"), digest_size=16).digest(), "big") or None


def to_uuid(bits: int) -> str:
    """
    Return a UUIDv4 made of 128 random bits, six of them overwritten, for peers that accept nothing else.
    """
    return str(uuid.UUID(int=bits, version=4))
