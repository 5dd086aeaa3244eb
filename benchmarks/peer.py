"""
The other side of the wire, on the load generator's core: an OTLP receiver that counts and answers 200, and an upstream.

Standard library only, run as ``python peer.py``; prints its port. ``GET /stats`` answers with what was counted so far,
by variant (the first path segment of the exporter's endpoint).
"""

from __future__ import annotations

import asyncio
import gzip
import json
from collections import defaultdict

_COUNTS: defaultdict[str, dict[str, int]] = defaultdict(lambda: {"posts": 0, "bytes": 0, "spans": 0, "logs": 0})


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _children(data: bytes, start: int, end: int, wanted: int) -> list[tuple[int, int]]:
    """
    Return where the length-delimited fields ``wanted`` of a protobuf message begin and end.
    """
    found = []
    while start < end:
        tag, start = _varint(data, start)
        kind = tag & 7
        if kind == 2:
            size, start = _varint(data, start)
            if tag >> 3 == wanted:
                found.append((start, start + size))
            start += size
        elif kind == 0:
            _, start = _varint(data, start)
        else:
            start += 8 if kind == 1 else 4
    return found


def _items(body: bytes) -> int:
    """
    Count the spans or log records of an OTLP request: both are field 2 of field 2 of field 1.
    """
    return sum(
        len(_children(body, *scope, 2))
        for resource in _children(body, 0, len(body), 1)
        for scope in _children(body, *resource, 2)
    )


def _answer(method: str, path: str, headers: dict[str, str], body: bytes) -> bytes:
    if method == "POST":
        variant, _, signal = path.lstrip("/").partition("/")
        if headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        counts = _COUNTS[variant]
        counts["posts"] += 1
        counts["bytes"] += len(body)
        if signal.endswith(("traces", "logs")):
            counts["spans" if signal.endswith("traces") else "logs"] += _items(body)
        payload, kind = b"", "application/x-protobuf"
    elif path == "/stats":
        payload, kind = json.dumps(_COUNTS).encode(), "application/json"
    else:
        payload, kind = b'{"in_stock":3}', "application/json"
    return f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(payload)}\r\n\r\n".encode() + payload


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, path, _ = head[0].split(" ")
            headers = {
                name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)
            }
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            writer.write(_answer(method, path, headers, body))
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main() -> None:
    server = await asyncio.start_server(_serve, "127.0.0.1", 0, limit=1 << 24)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
