"""
Redis pub/sub: the envelope, byte for byte, and the identity that it carries; with clients that are not there.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.trace import SpanKind, StatusCode

from otel_correlation import continue_from, guard, request_id, trace_id, work
from otel_correlation.tasks import carriers
from otel_correlation.tasks.redis import MAX_ENVELOPE, messages, publish, received, unwrap, wrap
from tests.contract.wire import wired

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from opentelemetry.sdk.trace import ReadableSpan

    from otel_correlation.tasks.redis import Message
    from tests.contract.wire import Wire

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CARRIED = {"traceparent": TRACEPARENT, "X-Request-ID": "order-7781-customer-quote"}
HEAD = b"otel-correlation/1\n"
ID_LIKE = "f4a2b3c1-dead-beef-0000-aabbccddeeff"

tokens = st.text("abcXYZ019-_!~", min_size=1, max_size=20)
values = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=60)
payloads = st.binary(max_size=200) | st.sampled_from([b"", b"\n", b"\n\n", HEAD, HEAD + b"\n", wrap(CARRIED, b"x")])


@pytest.fixture(params=["light", "plain"])
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    """
    A process that is set up, and an application without FastAPI.
    """
    with wired(request.param, instrument=False) as found:
        carriers.switch(lambda: found.settings)
        yield found
        carriers.switch(None)


class Encoder:
    """
    redis-py's, as far as it matters.
    """

    def __init__(self, encoding: str = "utf-8") -> None:
        self.encoding = encoding

    def encode(self, value: object) -> bytes | memoryview:
        if isinstance(value, bytes | memoryview):
            return value
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise TypeError("Invalid input of type")
        return value.encode(self.encoding) if isinstance(value, str) else repr(value).encode()


class Pool:
    """
    A connection pool that knows its server.
    """

    def __init__(self, **known: object) -> None:
        self.connection_kwargs = known


class Client:
    """
    A synchronous client; what was sent stays here.
    """

    def __init__(self, encoding: str = "utf-8", error: Exception | None = None, **known: object) -> None:
        self.sent: list[tuple[Any, Any]] = []
        self.current: list[tuple[str | None, Any]] = []
        self._encoding = encoding
        self._error = error
        self.connection_pool = Pool(**known)

    def get_encoder(self) -> Encoder:
        return Encoder(self._encoding)

    def publish(self, channel: Any, message: Any) -> int:
        self.current.append((request_id(), trace.get_current_span().get_span_context()))
        if self._error is not None:
            raise self._error
        self.sent.append((channel, message))
        return 2


class AsyncClient(Client):
    """
    An asyncio client: ``publish`` returns a coroutine, which does the work.
    """

    async def _later(self, channel: Any, message: Any) -> int:
        return Client.publish(self, channel, message)

    def publish(self, channel: Any, message: Any) -> Any:
        return self._later(channel, message)


class Pipeline(Client):
    """
    A pipeline returns itself; an asyncio one can be awaited, too.
    """

    def publish(self, channel: Any, message: Any) -> Any:
        Client.publish(self, channel, message)
        return self

    def __await__(self) -> Any:
        raise AssertionError("nobody awaits a pipeline to add a command to it")


class PubSub:
    """
    A subscription to which these were delivered.
    """

    def __init__(self, *raw: dict[str, Any]) -> None:
        self._raw = raw

    def listen(self) -> Iterator[dict[str, Any]]:
        yield from self._raw


class AsyncPubSub(PubSub):
    """
    The same, of an asyncio client.
    """

    async def listen(self) -> AsyncIterator[dict[str, Any]]:  # type: ignore[override]
        for raw in self._raw:
            yield raw


def delivered(data: object, channel: object = b"room:7", pattern: object = None) -> dict[str, Any]:
    """
    Return what redis-py hands over for a message.
    """
    kind = "message" if pattern is None else "pmessage"
    return {"type": kind, "pattern": pattern, "channel": channel, "data": data}


def message_of(data: object, **more: object) -> Message:
    found = received(delivered(data, **more))
    assert found is not None
    return found


def ids_of(span: ReadableSpan) -> tuple[int, int]:
    assert span.context is not None
    return span.context.trace_id, span.context.span_id


@given(st.dictionaries(tokens, values, max_size=10), payloads)
def test_round_trip(headers: dict[str, str], payload: bytes) -> None:
    """
    Whatever the payload is, an envelope of its own included, it comes back byte for byte, and so do the headers.
    """
    assert unwrap(wrap(headers, payload)) == (headers, payload, False)


@given(st.dictionaries(tokens, values, max_size=10), st.text(max_size=200))
def test_round_trip_of_text(headers: dict[str, str], payload: str) -> None:
    """
    A client that decodes its responses decodes what it would have decoded without the envelope.
    """
    encoded = payload.encode("utf-8", "surrogatepass")
    framed = wrap(headers, encoded).decode("utf-8", "surrogatepass")
    assert unwrap(framed) == (headers, payload, False)


@given(st.dictionaries(st.text(max_size=10), st.text(max_size=10), max_size=100), payloads)
def test_any_headers_make_an_envelope(headers: dict[str, str], payload: bytes) -> None:
    """
    Headers of any kind cannot break the envelope: what cannot be a line is left out, the payload comes back.
    """
    found = unwrap(wrap(headers, payload))
    assert (found.payload, found.malformed) == (payload, False)
    assert found.headers is not None
    assert found.headers.items() <= headers.items()


@given(
    st.binary(max_size=300) | st.binary(max_size=200).map(lambda rest: HEAD + rest) | st.text(max_size=200) | st.none()
)
def test_any_bytes_never_raise(data: bytes | str | None) -> None:
    """
    Whatever comes is handed on: whole, or without a whole envelope.
    """
    found = unwrap(data)
    if found.headers is None:
        assert found.payload == data
    else:
        assert isinstance(data, bytes | str)
        assert data.endswith(found.payload)  # type: ignore[arg-type]
        assert not found.malformed


@given(st.integers(0, len(wrap(CARRIED, b"")) - 1))
def test_truncated_envelope(length: int) -> None:
    """
    An envelope that was cut anywhere is handed on as it came.
    """
    data = wrap(CARRIED, b"")[:length]
    found = unwrap(data)
    assert (found.headers, found.payload) == (None, data)
    assert found.malformed is data.startswith(b"otel-correlation/")


@pytest.mark.parametrize(
    "data",
    [
        b"otel-correlation/2\ntraceparent: x\n\npayload",
        b"otel-correlation/1 \n\npayload",
        b"otel-correlation/1\r\n\r\npayload",
        HEAD + b"traceparent\n\npayload",
        HEAD + b"traceparent:x\n\npayload",
        HEAD + b": x\n\npayload",
        HEAD + b"trace parent: x\n\npayload",
        HEAD + b"a: 1\na: 2\n\npayload",
        HEAD + b"a: \xff\n\npayload",
        HEAD + b"a: \x00\n\npayload",
        HEAD + b"".join(b"h%d: x\n" % number for number in range(65)) + b"\npayload",
        HEAD + b"a: " + b"x" * MAX_ENVELOPE + b"\n\npayload",
    ],
)
@pytest.mark.usefixtures("wire")
def test_malformed_envelope(data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """
    What claims to be an envelope and is none is handed on as it came, starts fresh, and is said once a minute.
    """
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            message = message_of(data)
            assert message.data == data
            assert message.headers == {}
            with message.continued():
                assert trace_id() == request_id() != TRACEPARENT[3:35]
    assert [record.getMessage().partition(" of ")[0] for record in caplog.records] == [
        "A Redis message starts like an envelope"
    ]
    assert guard.counters()["message.malformed"] == 3


def test_oversized_headers_are_left_out() -> None:
    """
    An envelope has a bound: what does not fit is left out and counted, what comes after it still fits.
    """
    found = unwrap(wrap({"first": "1", "huge": "x" * MAX_ENVELOPE, "last": "2"}, b"payload"))
    assert found == ({"first": "1", "last": "2"}, b"payload", False)
    assert guard.counters()["message.header_left_out"] == 1


lines = st.sampled_from(["traceparent", "tracestate", "X-Request-ID", "baggage", "x-amzn-trace-id"]).flatmap(
    lambda name: st.sampled_from([TRACEPARENT, "00-0-0-01", "a=1,b=2", "", ID_LIKE]).map(
        lambda value: f"{name}: {value}\n"
    )
)


@given(st.lists(lines | st.text(max_size=30), max_size=6), st.binary(max_size=40), st.integers(0, 400))
def test_any_envelope_gives_an_identity(parts: list[str], payload: bytes, cut: int) -> None:
    """
    Whatever an envelope holds, and wherever it was cut, its message has an identity and the block runs.
    """
    data = (HEAD + "".join(parts).encode("utf-8", "surrogatepass") + b"\n" + payload)[: cut or None]
    with wired(instrument=False) as wire:
        carriers.switch(lambda: wire.settings)
        try:
            with message_of(data).continued():
                assert request_id()
                assert len(trace_id() or "") == 32
        finally:
            carriers.switch(None)
        assert len(wire.spans) == 1


@pytest.mark.parametrize("link", [False, True])
def test_one_identity_for_every_receiver(wire: Wire, link: bool) -> None:
    """
    All receivers of a message have the sender's request id, and a span of their own: the sender's child, or linked to it.
    """
    wire.configure(messages="link" if link else "continue")
    client = Client(host="cache.internal", port=6380)
    with work("sender", request_id="order-7781-customer-quote"):
        assert publish(client, "room:7", b"hello", template="room:{room}") == 2
    ((channel, data),) = client.sent
    assert channel == "room:7"
    assert data.startswith(HEAD)
    assert data.endswith(b"\n\nhello")
    for _ in range(2):
        message = message_of(data, pattern=b"room:*")
        assert (message.data, message.channel, message.pattern) == (b"hello", b"room:7", b"room:*")
        with message.continued() as span:
            assert request_id() == "order-7781-customer-quote"
            assert trace.get_current_span() is span
    produced, sender, *consumed = wire.spans
    assert sender.name == "sender"
    assert produced.parent is not None
    assert produced.parent.span_id == ids_of(sender)[1]
    assert (produced.name, produced.kind) == ("publish room:{room}", SpanKind.PRODUCER)
    assert dict(produced.attributes or {}) == {
        "messaging.system": "redis",
        "messaging.operation.name": "publish",
        "messaging.operation.type": "send",
        "messaging.destination.name": "room:7",
        "messaging.destination.template": "room:{room}",
        "messaging.message.body.size": 5,
        "server.address": "cache.internal",
        "server.port": 6380,
        "otel_correlation.redis.receivers": 2,
        "request_id": "order-7781-customer-quote",
    }
    assert len(consumed) == 2
    for one in consumed:
        assert (one.name, one.kind) == ("process room:*", SpanKind.CONSUMER)
        assert dict(one.attributes or {}) == {
            "messaging.system": "redis",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": "room:7",
            "messaging.destination.template": "room:*",
            "messaging.message.body.size": 5,
            "request_id": "order-7781-customer-quote",
        }
        if link:
            assert one.parent is None
            assert [(entry.context.trace_id, entry.context.span_id) for entry in one.links] == [ids_of(produced)]
            assert ids_of(one)[0] != ids_of(produced)[0]
        else:
            assert one.parent is not None
            assert (one.parent.trace_id, one.parent.span_id) == ids_of(produced)


def test_publish_outside_of_a_request(wire: Wire) -> None:
    """
    A message that nobody asked for gets its identity from the publisher, so that its receivers share one.
    """
    client = Client()
    publish(client, b"ticks", "x")
    publish(client, b"ticks", "x")
    first, second = [message_of(data).headers for _, data in client.sent]
    assert first["X-Request-ID"] == first["traceparent"][3:35]
    assert first["X-Request-ID"] != second["X-Request-ID"]
    assert [span.name for span in wire.spans] == ["publish", "publish"]
    assert request_id() is None


def test_publish_in_a_span_of_the_application(wire: Wire) -> None:
    """
    In a span that was started by hand outside of a request, the message is in its trace.
    """
    client = Client()
    with trace.get_tracer("application").start_as_current_span("job") as span:
        publish(client, "ticks", "x")
    headers = message_of(client.sent[0][1]).headers
    assert headers["X-Request-ID"] == f"{span.get_span_context().trace_id:032x}" == headers["traceparent"][3:35]
    assert wire.spans[0].parent is not None
    assert wire.spans[0].parent.span_id == span.get_span_context().span_id


def test_asyncio(wire: Wire) -> None:
    """
    An asyncio client's awaitable is awaited in the message's span, whenever that is; nothing stays current meanwhile.
    """
    client = AsyncClient()

    async def main() -> list[bytes]:
        with work("sender"):
            sending = publish(client, "room:7", b"hello")
            assert trace.get_current_span().get_span_context().span_id != 0
            assert not wire.spans
            assert await sending == 2
        return [message.data async for message in messages(AsyncPubSub(delivered(client.sent[0][1])))]

    assert asyncio.run(main()) == [b"hello"]
    produced, sender = wire.spans
    assert produced.name == "publish"
    assert client.current[0][1].span_id == ids_of(produced)[1]
    assert ids_of(produced)[0] == ids_of(sender)[0]
    assert (produced.attributes or {})["otel_correlation.redis.receivers"] == 2


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_failure_of_redis(wire: Wire, kind: type[Client]) -> None:
    """
    What the client raises passes through unchanged and is on the span, once.
    """
    error = ConnectionError("Error 111 connecting to 127.0.0.1:6379")

    async def main() -> None:
        result: Any = publish(kind(error=error), "room:7", b"hello")
        await result

    with pytest.raises(ConnectionError) as caught:
        asyncio.run(main())
    assert caught.value is error
    (produced,) = wire.spans
    assert produced.status.status_code is StatusCode.ERROR
    assert (produced.attributes or {})["error.type"] == "ConnectionError"
    assert [event.name for event in produced.events] == ["exception"]


def test_cancelled_publish(wire: Wire) -> None:
    """
    A publish that is cancelled while Redis does not answer ends its span.
    """

    class Hanging(Client):
        async def _forever(self) -> int:
            await asyncio.Event().wait()
            return 0

        def publish(self, channel: Any, message: Any) -> Any:
            return self._forever()

    async def main() -> None:
        async with asyncio.timeout(0.01):
            await publish(Hanging(), "room:7", b"hello")

    with pytest.raises(TimeoutError):
        asyncio.run(main())
    (produced,) = wire.spans
    assert (produced.attributes or {})["error.type"] == "asyncio.exceptions.CancelledError"


def test_pipeline(wire: Wire) -> None:
    """
    A pipeline is handed back at once; the envelope is in what it will send.
    """
    pipeline = Pipeline()
    assert publish(pipeline, "room:7", b"hello") is pipeline
    assert message_of(pipeline.sent[0][1]).data == b"hello"
    assert [span.name for span in wire.spans] == ["publish"]


@pytest.mark.parametrize(
    ("data", "encoding", "payload"),
    [
        ("größer", "utf-8", "größer".encode()),
        ("größer", "latin-1", "größer".encode("latin-1")),
        (7, "utf-8", b"7"),
        (0.5, "utf-8", b"0.5"),
        (memoryview(b"view"), "utf-8", b"view"),
        (b"\x00\xff", "utf-8", b"\x00\xff"),
    ],
)
@pytest.mark.usefixtures("wire")
def test_payload_is_what_the_client_would_send(data: object, encoding: str, payload: bytes) -> None:
    """
    The payload has the client's own encoding.
    """
    client = Client(encoding)
    publish(client, "room:7", data)
    assert message_of(client.sent[0][1]).data == payload


@pytest.mark.usefixtures("wire")
def test_payload_that_the_client_refuses() -> None:
    """
    What cannot be published is refused by the client's own error.
    """
    client = Client()
    with pytest.raises(TypeError, match="Invalid input of type"):
        publish(client, "room:7", data=None)
    assert client.sent == []


@pytest.mark.usefixtures("wire")
def test_client_without_an_encoder() -> None:
    """
    Another library's client gets text as UTF-8, and anything else as it is.
    """

    class Other:
        def __init__(self) -> None:
            self.sent: list[Any] = []

        def publish(self, channel: Any, message: Any) -> int:
            self.sent.append(message)
            return 1

    client = Other()
    publish(client, "room:7", "größer")
    publish(client, "room:7", 7)
    assert message_of(client.sent[0]).data == "größer".encode()
    assert client.sent[1] == 7


def test_message_of_somebody_else(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    """
    A message without an envelope is handed on unchanged and starts fresh, with one warning a minute.
    """
    message = message_of(b'{"plain": true}')
    assert message.data == b'{"plain": true}'
    with message.continued("room message"):
        first = request_id()
    with message.continued("room message"):
        assert request_id() not in {first, None}
    assert [(span.name, span.kind, span.parent) for span in wire.spans] == [
        ("room message", SpanKind.CONSUMER, None)
    ] * 2
    assert guard.counters()["message.without_ids"] == 2
    assert len(caplog.records) == 1


@pytest.mark.parametrize("kind", ["subscribe", "unsubscribe", "psubscribe", "punsubscribe", "pong"])
def test_confirmations_are_no_messages(kind: str) -> None:
    """
    Only what was published is a message.
    """
    raw = {"type": kind, "pattern": None, "channel": b"room:7", "data": 1}
    assert received(raw) is None
    assert received(None) is None
    assert [
        message.data for message in messages(PubSub(raw, delivered(b"x"), {**delivered(b"y"), "type": "smessage"}))
    ] == [
        b"x",
        b"y",
    ]


def test_switched_off() -> None:
    """
    Without a set-up a payload goes as it is, unless it looks like an envelope; envelopes of others are taken off.
    """
    client = Client()
    for payload in (b"hello", HEAD + b"\nhello", b"otel-correlation/9"):
        publish(client, "room:7", payload)
        assert message_of(client.sent[-1][1]).data == payload
    assert client.sent[0][1] == b"hello"
    message = message_of(wrap(CARRIED, b"hello"))
    assert message.data == b"hello"
    with message.continued():
        assert request_id() is None


def test_sdk_disabled(wire: Wire) -> None:
    """
    Without the SDK the request id still goes along.
    """
    wire.configure(sdk_disabled=True)
    client = Client()
    with work("sender", request_id="order-7781-customer-quote"):
        publish(client, "room:7", b"hello")
    message = message_of(client.sent[0][1])
    assert message.headers == {"X-Request-ID": "order-7781-customer-quote"}
    with message.continued():
        assert (request_id(), trace_id()) == ("order-7781-customer-quote", None)
    assert wire.spans == []


def test_relayed_headers() -> None:
    """
    The headers of a message are a carrier: they can be continued elsewhere.
    """
    message = message_of(wrap(CARRIED, b"hello").decode())
    assert message.data == "hello"
    with wired(instrument=False) as wire:
        carriers.switch(lambda: wire.settings)
        with continue_from(message.headers, "elsewhere"):
            assert (request_id(), trace_id()) == ("order-7781-customer-quote", TRACEPARENT[3:35])
        carriers.switch(None)


def test_our_failure_is_not_the_applications(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """
    A tracer that fails costs the message its identity, and nothing else.
    """
    monkeypatch.delenv(guard.STRICT_ENV)

    class Wrong:
        def start(self, *_: object, **__: object) -> None:
            raise RuntimeError("tracer")

        def new_trace_id(self) -> int:
            raise RuntimeError("tracer")

    monkeypatch.setattr("otel_correlation.tasks.carriers._tracer", Wrong())
    client = Client()
    assert publish(client, "room:7", b"hello") == 2
    assert client.sent == [("room:7", b"hello")]
    with message_of(wrap(CARRIED, b"hello")).continued():
        assert request_id() is None
    assert "Telemetry failed in redis.publish" in caplog.text
    assert wire.spans == []
