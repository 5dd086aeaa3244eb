"""
How much of a foreign text is kept and how much may wait: every default, in one place.

A text that is longer is cut where it enters, before it is decoded, searched or queued, and ends (a traceback: goes on)
with ``...[cut from N characters]``, or ``bytes``, where N is its whole length; the mark is within the limit. Where the
user set ``OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT`` (or its form for spans), that length takes the place of every length
here, smaller or larger, and the cut is the SDK's: without a mark.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

# How every mark begins.
CUT: Final = "...[cut from "

# What a queue holds, in estimated bytes, with the batch that is being exported; the newest are dropped beyond it.
QUEUE_BYTES: Final = 32 * 1024 * 1024
# What goes out in one request, estimated. A collector refuses more than 4 MiB over gRPC and 20 MiB over HTTP.
BATCH_BYTES: Final = 4 * 1024 * 1024

# Values of captured headers on one span, all names together; more are left out and counted.
HEADER_VALUES: Final = 64
# Their characters, all together.
HEADERS: Final = 32_768
# A header with a longer name is not captured: the name is a part of the attribute's.
HEADER_NAME: Final = 256

# Of a line that is ours to write, in characters. Loki refuses lines above 256 KiB: what is below arrives whole.
LINE_MESSAGE: Final = 131_072
LINE_FIELD: Final = 65_536
LINE_STACK: Final = 65_536


@dataclass(frozen=True, slots=True)
class Bounds:
    """
    The longest value of each kind that goes into spans and OTLP records, in characters.

    Attributes:
        method: ``http.request.method_original``; registered methods have at most 17.
        scheme: ``url.scheme`` and ``network.protocol.version``, which a proxy's header may have set.
        address: ``server.address`` and ``client.address``; a DNS name has at most 253 (RFC 1035).
        path: ``url.path``, ``http.route`` and the path of the summary line; browsers and proxies end at about 2,000.
        query: ``url.query``, before its values are redacted; servers with a limit take about 8,000 for the whole line.
        user_agent: ``user_agent.original``; real ones have 100 to 300.
        header: One value of a captured header; servers with a limit take about 8,000 for all headers.
        message: ``exception.message``, and the text of each exception in a traceback.
        stack: ``exception.stacktrace``: its first quarter, and as much of its end.
        body: The body of an OTLP log record.
        value: One attribute of an OTLP log record, with all that a list or dict in it holds.
        marked: Whether a cut is marked; not where the user set the length.
    """

    method: int = 64
    scheme: int = 64
    address: int = 255
    path: int = 2_048
    query: int = 4_096
    user_agent: int = 1_024
    header: int = 4_096
    message: int = 8_192
    stack: int = 32_768
    body: int = 65_536
    value: int = 16_384
    marked: bool = True

    def cut(self, text: str, limit: int) -> str:
        """
        Return the first ``limit`` characters of ``text``, the mark among them.
        """
        length = len(text)
        if length <= limit:
            return text
        mark = f"{CUT}{length} characters]" if self.marked else ""
        return text[: limit - len(mark)] + mark

    def decode(self, raw: bytes, limit: int, encoding: str = "latin-1") -> str:
        """
        Return ``raw`` as text of at most ``limit`` characters; no more than that is decoded.
        """
        length = len(raw)
        if length <= limit:
            return raw.decode(encoding, "replace")
        mark = f"{CUT}{length} bytes]" if self.marked else ""
        return raw[: limit - len(mark)].decode(encoding, "replace") + mark


DEFAULT: Final = Bounds()
# What our own lines on stdout hold of an exception.
LINES: Final = Bounds(message=LINE_FIELD // 2, stack=LINE_STACK)


@lru_cache(maxsize=16)
def bounds_for(limit: int | None) -> Bounds:
    """
    Return the bounds where the SDK's limit of an attribute's length is ``limit``; None is unset.
    """
    if limit is None:
        return DEFAULT
    return Bounds(
        method=limit,
        scheme=limit,
        address=limit,
        path=limit,
        query=limit,
        user_agent=limit,
        header=limit,
        message=limit,
        stack=limit,
        # A body is no attribute, so a limit below its default is not meant for it.
        body=max(limit, DEFAULT.body),
        value=limit,
        marked=False,
    )
