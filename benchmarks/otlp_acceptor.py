"""
The end of the line for ``tiers.py``: takes OTLP over gRPC and HTTP and counts bytes as they come over the wire.

It prints its port; ``GET /stats`` answers ``{"requests": ..., "bytes": ...}``.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, StreamEnded
from h2.settings import SettingCodes

STATS = {"requests": 0, "bytes": 0}
WINDOW = 1 << 30  # Nobody waits for permission to send.


class Connection(asyncio.Protocol):
    """
    One connection, of whichever HTTP its first bytes say.
    """

    def __init__(self) -> None:
        self.buffer = b""
        self.h2: H2Connection | None = None
        self.paths: dict[int, int] = {}

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.h2 is None:
            self.buffer += data
            if not self.buffer.startswith(b"PRI"):
                self.http1()
                return
            self.h2 = H2Connection(
                H2Configuration(client_side=False, header_encoding=None, validate_inbound_headers=False)
            )
            self.h2.initiate_connection()
            self.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: WINDOW, SettingCodes.MAX_FRAME_SIZE: 1 << 20})
            self.h2.increment_flow_control_window(WINDOW)
            data, self.buffer = self.buffer, b""
        for event in self.h2.receive_data(data):
            if isinstance(event, DataReceived):
                STATS["bytes"] += event.flow_controlled_length or 0
                self.h2.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id or 0)
            elif isinstance(event, RequestReceived):
                self.paths[event.stream_id or 0] = 0
            elif isinstance(event, StreamEnded):
                STATS["requests"] += 1
                stream = event.stream_id or 0
                self.h2.send_headers(stream, [(b":status", b"200"), (b"content-type", b"application/grpc")])
                self.h2.send_data(stream, b"\0\0\0\0\0")
                self.h2.send_headers(stream, [(b"grpc-status", b"0")], end_stream=True)
        self.transport.write(self.h2.data_to_send())

    def http1(self) -> None:
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            at = head.find(b"content-length:")
            size = int(head[at + 15 :].split(b"\r\n")[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + size:
                return
            self.buffer = self.buffer[end + 4 + size :]
            body = b""
            if head.startswith(b"get /stats"):
                body = json.dumps(STATS).encode()
            else:
                STATS["requests"] += 1
                STATS["bytes"] += size
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", int(os.environ.get("PORT", "0")))
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
