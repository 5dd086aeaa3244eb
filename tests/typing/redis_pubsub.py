"""
User code on Redis pub/sub that must type-check, without redis-py's own types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from otel_correlation.tasks.redis import messages, publish, received, unwrap, wrap

if TYPE_CHECKING:
    from collections.abc import Awaitable


class Client:
    """
    A synchronous client.
    """

    def publish(self, channel: str | bytes, message: bytes | str | float, **kwargs: Any) -> int:
        """
        Send.
        """
        raise NotImplementedError

    def listen(self) -> list[dict[str, Any]]:
        """
        Receive.
        """
        raise NotImplementedError


class AsyncClient:
    """
    An asyncio client.
    """

    def publish(self, channel: str | bytes, message: bytes | str | float, **kwargs: Any) -> Awaitable[int]:
        """
        Send.
        """
        raise NotImplementedError


def announce(client: Client) -> int:
    """
    Publish, and handle what comes.
    """
    for message in messages(client):
        with message.continued("room message", link=True) as span:
            span.set_attribute("room", message.channel)
    if (one := received(None)) is not None:
        print(one.data, one.headers, one.pattern, one.raw)
    envelope = unwrap(wrap({"traceparent": "00"}, b"payload"))
    print(envelope.headers, envelope.payload, envelope.malformed)
    return publish(client, "room:7", "hello", template="room:{room}")


async def announce_later(client: AsyncClient) -> int:
    """
    Publish with an asyncio client.
    """
    return await publish(client, b"room:7", 7.5)
