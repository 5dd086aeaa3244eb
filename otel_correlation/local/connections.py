"""
The connections of the local server: none waits for its caller without end, and none takes the place of another.

uvicorn's ``limit_concurrency`` counts every connection that is open, those that never ask for anything too: a few
hundred of them make each further answer a 503. Here the connection that has waited longest for its caller makes room.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

# Below the 256 open files that macOS allows a process.
MAX_CONNECTIONS: Final = 200
# For the whole head of a request to arrive.
HEAD_S: Final = 10.0
# What is read from a connection before the others have their turn: h11 takes some 100 µs for each chunk of a body, and
# one may be of a single byte.
_READ_BYTES: Final = 4096
# uvicorn closes an idle connection after five seconds; one that does not read what is left of its answer stays until
# this.
IDLE_S: Final = 10.0


class _Connection:
    """
    One connection, and the timer that ends it.
    """

    __slots__ = ("is_idle", "timer", "transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.timer: asyncio.TimerHandle | None = None
        self.is_idle = False

    def end_in(self, seconds: float | None) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if seconds is not None:
            # Not close(): that waits until everything is read.
            self.timer = asyncio.get_running_loop().call_later(seconds, self.transport.abort)


class Connections:
    """
    All of one server; of its event loop's thread alone. A connection's key is the caller's address and port.

    Attributes:
        ended: How many were ended to make room for others.
    """

    def __init__(self, *, max_connections: int, head_s: float, idle_s: float) -> None:
        self.ended = 0
        self._max = max_connections
        self._head_s = head_s
        self._idle_s = idle_s
        self._open: dict[object, _Connection] = {}
        # Those that wait for their caller, the longest first.
        self._waiting: dict[object, None] = {}

    def made(self, transport: asyncio.Transport) -> None:
        """
        Take a new connection, in place of the one that waits longest if there are too many.
        """
        if len(self._open) >= self._max:
            # None waits: all are being worked for, and the new one has to go.
            oldest = next(iter(self._waiting), None)
            ended = transport if oldest is None else self._open[oldest].transport
            self.ended += 1
            ended.abort()
            if oldest is None:
                return
            self._forget(oldest)
        key = _key(transport)
        connection = self._open[key] = _Connection(transport)
        self._waiting[key] = None
        connection.end_in(self._head_s)

    def heard(self, transport: asyncio.Transport) -> None:
        """
        Give the rest of a request's head its time, once: bytes that drip give no more of it.
        """
        connection = self._open.get(_key(transport))
        if connection is not None and connection.is_idle:
            connection.is_idle = False
            connection.end_in(self._head_s)

    def lost(self, transport: asyncio.Transport) -> None:
        """
        Forget a connection.
        """
        key = _key(transport)
        connection = self._open.get(key)
        if connection is not None and connection.transport is transport:
            self._forget(key)

    def wait(self, key: object) -> None:
        """
        Note that a request waits for its caller: to send its body, or to read its answer. The request has its own time.
        """
        self._next(key, None)
        if key in self._open:
            self._waiting.pop(key, None)
            self._waiting[key] = None

    def work(self, key: object) -> None:
        """
        Note that a request has arrived and is worked for: now it keeps its place.
        """
        self._next(key, None)
        self._waiting.pop(key, None)

    def rest(self, key: object) -> None:
        """
        Note that a request is answered.
        """
        self.wait(key)
        self._next(key, self._idle_s, is_idle=True)

    def end(self, key: object) -> None:
        """
        End a connection at once.
        """
        if key in self._open:
            self._open[key].transport.abort()

    def protocol(self) -> type[H11Protocol]:
        """
        Return uvicorn's protocol, which tells what happens on the wire.

        It is the one on h11 wherever httptools is installed, too: that one reads a head without end into memory.
        """
        connections = self

        class Protocol(H11Protocol, asyncio.BufferedProtocol):
            def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
                super().connection_made(transport)
                self.buffer = bytearray(_READ_BYTES)
                connections.made(transport)

            def get_buffer(self, sizehint: int) -> bytearray:  # noqa: ARG002 - asyncio's signature
                return self.buffer

            def buffer_updated(self, nbytes: int) -> None:
                self.data_received(bytes(self.buffer[:nbytes]))

            def data_received(self, data: bytes) -> None:
                connections.heard(self.transport)
                super().data_received(data)

            def connection_lost(self, exc: Exception | None) -> None:
                connections.lost(self.transport)
                super().connection_lost(exc)

        return Protocol

    def _next(self, key: object, seconds: float | None, *, is_idle: bool = False) -> None:
        connection = self._open.get(key)
        if connection is not None:
            connection.is_idle = is_idle
            connection.end_in(seconds)

    def _forget(self, key: object) -> None:
        self._open.pop(key).end_in(None)
        self._waiting.pop(key, None)


class Room:
    """
    Bytes that requests hold while they wait for their callers. Where there are too many, the first to come lets go.

    Args:
        max_bytes: How many all may hold together; asked for each time.
    """

    def __init__(self, max_bytes: Callable[[], int]) -> None:
        self._max_bytes = max_bytes
        self._held: dict[asyncio.Timeout, int] = {}
        self._total = 0

    def take(self, holder: asyncio.Timeout, size: int) -> None:
        """
        Count ``size`` bytes more for ``holder``, whose time is over when another needs the room.
        """
        self._held[holder] = self._held.get(holder, 0) + size
        self._total += size
        while self._total > self._max_bytes():
            oldest = next(iter(self._held))
            self.give(oldest)
            if not oldest.expired():
                oldest.reschedule(asyncio.get_running_loop().time())

    def has(self, holder: asyncio.Timeout) -> bool:
        """
        Return whether ``holder`` has what it took.
        """
        return holder in self._held

    def give(self, holder: asyncio.Timeout) -> None:
        """
        Count nothing more for ``holder``.
        """
        self._total -= self._held.pop(holder, 0)


def _key(transport: asyncio.Transport) -> object:
    # As uvicorn makes ``scope["client"]``: an address of IPv6 has four parts.
    peer = transport.get_extra_info("peername")
    return tuple(peer[:2]) if isinstance(peer, tuple) else transport
