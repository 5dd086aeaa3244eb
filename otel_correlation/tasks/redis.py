"""
Redis pub/sub: a message carries its identity in an envelope, because Redis has no headers.

Nothing is patched. ``publish`` writes the envelope, ``messages`` (or ``received``) takes it off again, and a program
that does neither is not touched. redis-py itself is not imported.
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeVar, cast

from opentelemetry import context as otel_context
from opentelemetry.semconv.attributes import server_attributes

from otel_correlation import guard, identity, semconv
from otel_correlation.tasks import carriers
from otel_correlation.tasks.carriers import Scope, continue_from, inject

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping


SYSTEM: Final = "redis"

# The envelope: this line, one "name: value" line for each header, an empty line; then the payload as it is. All of it
# is ASCII, so that a client with decode_responses=True decodes what it would have decoded without it.
MAGIC: Final = b"otel-correlation/1\n"
# Whatever starts like this claims to be an envelope, of this version or of another.
_CLAIM: Final = b"otel-correlation/"
_END: Final = b"\n\n"
# The longest tracestate (8,000) and baggage (8,192) that are sent, twice: room for propagators of somebody else's.
MAX_ENVELOPE: Final = 32_768
_MAX_HEADERS: Final = 64
_NAME: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,200}"  # RFC 9110, token
_VALUE: Final = r"[ -~]*"
_HEADER: Final = re.compile(rf"({_NAME}): ({_VALUE})")

_PUBLISHED: Final = ("message", "pmessage", "smessage")

_Result_co = TypeVar("_Result_co", covariant=True)


class Publisher(Protocol[_Result_co]):
    """
    What ``publish`` needs of a client: ``redis.Redis``, ``redis.asyncio.Redis``, a cluster, or a pipeline.
    """

    def publish(self, channel: Any, message: Any, /) -> _Result_co:
        """
        Send one message.
        """
        ...


class Envelope(NamedTuple):
    """
    What ``unwrap`` found.

    Attributes:
        headers: The identity's headers; None where there is no envelope, or none that can be used.
        payload: What was wrapped, byte for byte; what came, where nothing was.
        malformed: Something claimed to be an envelope and is none.
    """

    headers: dict[str, str] | None
    payload: bytes | str
    malformed: bool


def wrap(headers: Mapping[str, str], payload: bytes) -> bytes:
    """
    Put headers before a payload; never raises on what the headers hold.

    What cannot stand in a line of ASCII is left out, as is what does not fit into ``MAX_ENVELOPE`` bytes.
    """
    lines: list[str] = []
    size = len(MAGIC) + 1
    for name, value in headers.items():
        line = f"{name}: {value}"
        size += len(line) + 1
        match = _HEADER.fullmatch(line)
        # A name with a colon in it would be read as another one.
        if len(lines) == _MAX_HEADERS or size > MAX_ENVELOPE or match is None or match[1] != name:
            size -= len(line) + 1
            guard.count("message.header_left_out")
        else:
            lines.append(f"{line}\n")
    # Without a header the magic line's own line feed is the first half of the end.
    return b"".join([MAGIC, "".join(lines).encode("ascii"), b"\n", payload])


def unwrap(data: object) -> Envelope:
    """
    Take an envelope off; never raises, whatever came.

    Args:
        data: What Redis delivered: bytes, or text where the client has ``decode_responses=True``.
    """
    if isinstance(data, bytes):
        if not data.startswith(_CLAIM):
            return Envelope(None, data, malformed=False)
        end = data.find(_END, 0, MAX_ENVELOPE)
        head = data[: end + 1] if end >= 0 else b""
        headers = _parsed(head.decode("latin-1"))
    elif isinstance(data, str):
        if not data.startswith(_CLAIM.decode()):
            return Envelope(None, data, malformed=False)
        end = data.find(_END.decode(), 0, MAX_ENVELOPE)
        headers = _parsed(data[: end + 1] if end >= 0 else "")
    else:
        return Envelope(None, cast("Any", data), malformed=False)
    if headers is None:
        return Envelope(None, data, malformed=True)
    return Envelope(headers, data[end + len(_END) :], malformed=False)


def _parsed(head: str) -> dict[str, str] | None:
    first, *lines = head.split("\n")[:-1] or [""]
    if first != MAGIC.decode().rstrip("\n") or len(lines) > _MAX_HEADERS:
        return None
    headers: dict[str, str] = {}
    for line in lines:
        match = _HEADER.fullmatch(line)
        if match is None or match[1] in headers:
            return None
        headers[match[1]] = match[2]
    return headers


def publish(
    client: Publisher[_Result_co], channel: str | bytes, data: Any, *, template: str | None = None
) -> _Result_co:
    """
    Publish with the current identity: a PRODUCER span, and an envelope around exactly what the client would send.

    Outside of a request the message gets an identity here, so that all its receivers share one. What the client
    raises passes through unchanged.

    Args:
        client: A client of redis-py, synchronous or asyncio, or a pipeline of one.
        channel: The channel.
        data: What ``client.publish`` takes: bytes, text, a number.
        template: The channel's name with placeholders for what varies (``room:{room}``), for the span's name and for
            grouping. A channel's own name may hold ids, so it is never in a span's name.

    Returns:
        What ``client.publish`` returns: the number of subscribers reached, or an awaitable of it.
    """
    payload = _encoded(client, data)
    if payload is None:
        return client.publish(channel, data)
    begun = _begin(client, channel, template, len(payload))
    token = None if begun is None else otel_context.attach(begun.context)
    try:
        # Without an identity the payload goes as it is, unless a receiver would take it for an envelope.
        result = client.publish(channel, wrap(inject(), payload) if begun or payload.startswith(_CLAIM) else payload)
    except BaseException as error:
        _over(begun, None, error)
        raise
    finally:
        if token is not None:
            identity.detach(token)
    if result is client or not inspect.isawaitable(result):
        # A pipeline returns itself: it sends later, and all at once.
        _over(begun, result, None)
        return result
    return cast("_Result_co", _awaited(result, begun)) if begun is not None else result


async def _awaited(result: Awaitable[Any], begun: carriers._Begun) -> Any:
    token = otel_context.attach(begun.context)
    try:
        answer = await result
    except BaseException as error:
        _over(begun, None, error)
        raise
    finally:
        identity.detach(token)
    _over(begun, answer, None)
    return answer


def _encoded(client: Any, data: Any) -> bytes | None:
    """
    Return the bytes that this client would send for ``data``; None leaves it to the client.
    """
    if isinstance(data, bytes):
        return data
    get_encoder = getattr(client, "get_encoder", None)
    if get_encoder is not None:
        # The client's own encoding, and its own error for what it does not take.
        encoded: object = get_encoder().encode(data)
        return bytes(encoded) if isinstance(encoded, bytes | memoryview) else None
    return data.encode() if isinstance(data, str) else None


def _begin(client: Any, channel: str | bytes, template: str | None, size: int) -> carriers._Begun | None:
    if carriers._settings is None:
        return None
    try:
        attributes: dict[str, Any] = {
            **_described("publish", "send", channel, template, size),
            **_server(client),
        }
        return carriers.producing(_name("publish", template), attributes, carriers._settings())
    except Exception:  # noqa: BLE001 - our failure is not the application's
        guard.report("redis.publish")
        return None


def _over(begun: carriers._Begun | None, result: object, error: BaseException | None) -> None:
    if begun is None or begun.span is None:
        return
    try:
        if type(result) is int:
            begun.span.set_attribute(semconv.REDIS_RECEIVERS, result)
        carriers._end(begun.span, error)
    except Exception:  # noqa: BLE001 - our failure is not the application's
        guard.report("redis.publish")


def _name(operation: str, template: str | None) -> str:
    return f"{operation} {template}" if template else operation


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _described(operation: str, kind: str, channel: str | bytes, template: str | None, size: int) -> dict[str, Any]:
    values: dict[str, Any] = {
        semconv.MESSAGING_SYSTEM: SYSTEM,
        semconv.MESSAGING_OPERATION_NAME: operation,
        semconv.MESSAGING_OPERATION_TYPE: kind,
        semconv.MESSAGING_DESTINATION_NAME: _text(channel),
        semconv.MESSAGING_MESSAGE_BODY_SIZE: size,
    }
    if template:
        values[semconv.MESSAGING_DESTINATION_TEMPLATE] = template
    return values


def _server(client: Any) -> dict[str, Any]:
    """
    Return where the client's server is, for clients that have one.
    """
    known: object = getattr(getattr(client, "connection_pool", None), "connection_kwargs", None)
    values: dict[str, Any] = {}
    if isinstance(known, dict):
        address = known.get("host") or known.get("path")
        if isinstance(address, str):
            values[server_attributes.SERVER_ADDRESS] = address
            if isinstance(port := known.get("port"), int) and "host" in known:
                values[server_attributes.SERVER_PORT] = port
    return values


class Message:
    """
    One message as it was published.

    Attributes:
        channel: Where it was published, as redis-py gives it.
        pattern: The pattern of the subscription that it came by, or None.
        data: The payload, byte for byte; text where the client has ``decode_responses=True``.
        headers: The identity that it carries; empty where it was published without.
        raw: What redis-py delivered.
    """

    __slots__ = ("_carrier", "channel", "data", "headers", "pattern", "raw")

    def __init__(self, raw: Mapping[str, Any]) -> None:
        found = unwrap(raw.get("data"))
        if found.malformed:
            guard.count("message.malformed")
            guard.warn_seldom(
                "redis.envelope",
                "A Redis message starts like an envelope of otel-correlation and is none: "
                "it is handed on as it came, and starts a trace of its own",
            )
        self.raw = raw
        self.channel: Any = raw.get("channel")
        self.pattern: Any = raw.get("pattern")
        self.data: Any = found.payload
        self.headers: dict[str, str] = found.headers or {}
        # A broken envelope was warned about above: not as a message without headers, too.
        self._carrier = None if found.malformed else self.headers

    def continued(self, name: str | None = None, *, link: bool | None = None) -> Scope:
        """
        Return a context manager (``with``, ``async with``) in which the publisher's identity is current.

        May be entered for each receiver in this process: every one has a CONSUMER span of its own, the child of the
        publisher's span (or linked to it).

        Args:
            name: Name of the span; ``process`` and the pattern of the subscription, if there is one, by default.
            link: As for ``continue_from``.
        """
        pattern = _text(self.pattern) if self.pattern else None
        attributes: dict[str, Any] = {}
        with guard.never_raise("redis.message"):
            size = len(self.data.encode("utf-8", "surrogatepass") if isinstance(self.data, str) else self.data)
            attributes = _described("process", "process", self.channel, pattern, size)
        return continue_from(self._carrier, name or _name("process", pattern), link=link, attributes=attributes)


def received(raw: Mapping[str, Any] | None) -> Message | None:
    """
    Return the message in what redis-py delivered; None for confirmations of subscriptions, and for None.

    For ``get_message()`` and for handlers; ``messages`` does it for every message of a subscription.
    """
    return Message(raw) if raw is not None and raw.get("type") in _PUBLISHED else None


class Subscription(Protocol):
    """
    What ``messages`` needs: the ``pubsub()`` of a client, synchronous or asyncio.
    """

    def listen(self) -> Any:
        """
        Iterate over what Redis delivers.
        """
        ...


class Messages:
    """
    The messages of a subscription, for ``for`` or ``async for``, as the client is.
    """

    def __init__(self, pubsub: Subscription) -> None:
        self._pubsub = pubsub

    def __iter__(self) -> Iterator[Message]:
        for raw in self._pubsub.listen():
            message = received(raw)
            if message is not None:
                yield message

    async def __aiter__(self) -> AsyncIterator[Message]:
        async for raw in self._pubsub.listen():
            message = received(raw)
            if message is not None:
                yield message


def messages(pubsub: Subscription) -> Messages:
    """
    Iterate over the messages of a subscription, without their envelopes.

    Messages that others published without one come unchanged. What redis-py raises passes through.

    Args:
        pubsub: A subscribed ``client.pubsub()``: for ``for`` of ``redis``, for ``async for`` of ``redis.asyncio``.
    """
    return Messages(pubsub)


__all__ = [
    "MAX_ENVELOPE",
    "Envelope",
    "Message",
    "Messages",
    "messages",
    "publish",
    "received",
    "unwrap",
    "wrap",
]
