"""
A CLIENT span covers the response's body: it ends when the body was read, closed, broken or dropped, and only once.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.trace import StatusCode

from otel_correlation import clients
from otel_correlation.clients import _attempt
from tests.clients_probe import SIDES, Probe, Side, attempts, request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator


@pytest.fixture(params=SIDES, ids=repr)
def side(request: pytest.FixtureRequest) -> Side:
    """
    Each of the four ways to send.
    """
    found: Side = request.param
    return found


@pytest.fixture
def probe() -> Iterator[Probe]:
    """
    Every client is traced.
    """
    with attempts(Probe()) as found:
        yield found


def body(side: Side, chunks: list[bytes | Exception], on_close: Callable[[], None] = lambda: None) -> Any:
    """
    Return a body of these chunks; an exception among them breaks it.
    """

    class Chunks(side.library.SyncByteStream, side.library.AsyncByteStream):  # type: ignore[misc, name-defined]
        def __iter__(self) -> Iterator[bytes]:
            for chunk in chunks:
                if isinstance(chunk, Exception):
                    raise chunk
                yield chunk

        async def __aiter__(self) -> AsyncIterator[bytes]:
            for chunk in self:
                yield chunk

        def close(self) -> None:
            on_close()

        async def aclose(self) -> None:
            on_close()

    return Chunks()


def transport(
    side: Side, *chunks: bytes | Exception, status: int = 200, on_close: Callable[[], None] = lambda: None
) -> Any:
    """
    Return a transport that answers with a body of these chunks.
    """

    def handler(_: Any) -> Any:
        extensions = {"http_version": b"HTTP/1.1", "network_stream": "kept"}
        return side.library.Response(status, stream=body(side, list(chunks), on_close), extensions=extensions)

    return side.mock(handler)


def opened(side: Side, client: Any, job: Callable[[Any], Any]) -> Any:
    """
    Send with ``stream=True`` and run a job with the open response.
    """
    prepared = client.build_request("GET", "http://orders/")
    if side.is_async:

        async def inside(_: Any) -> Any:
            found = job(await client.send(prepared, stream=True))
            return await found if asyncio.iscoroutine(found) else found

        return side.run(client, inside)
    return side.run(client, lambda _: job(client.send(prepared, stream=True)))


def test_the_span_ends_with_the_body(side: Side, probe: Probe) -> None:
    """
    Nothing ends while there is something to read; the last chunk ends it.
    """
    seen: list[int] = []

    async def read_async(response: Any) -> None:
        seen.extend([len(probe.spans) async for _ in response.aiter_bytes()])

    def read(response: Any) -> None:
        seen.extend([len(probe.spans) for _ in response.iter_bytes()])

    opened(side, side.client(transport(side, b"a", b"b", b"c")), read_async if side.is_async else read)
    assert seen == [0, 0, 0]
    assert probe.span.status.status_code is StatusCode.UNSET


def test_a_body_that_is_read_at_once(side: Side, probe: Probe) -> None:
    """
    What httpx says about a response is what it says without us.
    """
    response = side.fetch(transport(side, b"he", b"llo"))
    assert response.text == "hello"
    assert response.num_bytes_downloaded == 5
    assert response.elapsed.total_seconds() >= 0
    assert response.is_closed
    assert response.extensions == {"http_version": b"HTTP/1.1", "network_stream": "kept"}
    assert probe.span.end_time >= probe.span.start_time


def test_closing_ends_the_span(side: Side, probe: Probe) -> None:
    """
    A response that is closed unread ends its span then, and its own close runs once.
    """
    closed: list[int] = []

    async def close_async(response: Any) -> None:
        assert probe.spans == []
        await response.aclose()
        await response.aclose()

    def close(response: Any) -> None:
        assert probe.spans == []
        response.close()
        response.close()

    client = side.client(transport(side, b"a", on_close=lambda: closed.append(1)))
    opened(side, client, close_async if side.is_async else close)
    assert closed == [1]
    assert probe.span.status.status_code is StatusCode.UNSET


def test_leaving_the_loop_is_not_the_end(side: Side, probe: Probe) -> None:
    """
    A reader that stops early can still close the response; that is the end (httpx2 closes it by itself).
    """
    ended: list[bool] = []

    async def read_async(response: Any) -> None:
        chunks = response.aiter_raw()
        async for _ in chunks:
            break
        await chunks.aclose()
        ended.append(bool(probe.spans) is response.is_closed)
        await response.aclose()

    def read(response: Any) -> None:
        chunks = response.iter_raw()
        for _ in chunks:
            break
        chunks.close()
        ended.append(bool(probe.spans) is response.is_closed)
        response.close()

    opened(side, side.client(transport(side, b"a", b"b")), read_async if side.is_async else read)
    assert ended == [True]
    assert len(probe.spans) == 1


def test_a_body_that_breaks_is_an_error(side: Side, probe: Probe) -> None:
    """
    An error in the middle of a good response is the span's error, once, and passes unchanged.
    """
    error = side.library.ReadError("cut")
    with pytest.raises(side.library.ReadError) as caught:
        side.fetch(transport(side, b"a", error))
    assert caught.value is error
    span = probe.span
    assert span.attributes["http.response.status_code"] == 200
    assert span.attributes["error.type"] == f"{side.library.__name__}.ReadError"
    assert span.status.status_code is StatusCode.ERROR
    assert len(span.events) == 1


def test_a_close_that_fails_is_an_error(side: Side, probe: Probe) -> None:
    """
    An error of the stream's own close is the span's error and passes unchanged.
    """
    error = OSError("close")

    def fail() -> None:
        raise error

    with pytest.raises(OSError, match="close") as caught:
        side.fetch(transport(side, b"a", on_close=fail))
    assert caught.value is error
    assert len(probe.spans) == 1


@pytest.mark.filterwarnings("error")
def test_a_dropped_response_ends_its_span(side: Side, probe: Probe) -> None:
    """
    Nobody reads, nobody closes: the span ends when the response is collected, without a warning.
    """
    opened(side, side.client(transport(side, b"a")), lambda _: None)
    gc.collect()
    assert probe.span.attributes["http.response.status_code"] == 200
    assert probe.span.status.status_code is StatusCode.UNSET


def test_a_response_that_is_collected_inside_telemetry(side: Side, probe: Probe) -> None:
    """
    Where the collector interrupts a span processor, the span is ended by the next attempt instead of waiting for itself.
    """
    held: list[Any] = []
    opened(side, side.client(transport(side, b"a")), held.append)
    namespace = {"__name__": "opentelemetry.sdk.trace.export", "collect": gc.collect}
    exec("def on_end(held):\n    held.clear()\n    collect()\n", namespace)
    namespace["on_end"](held)  # type: ignore[operator]
    assert probe.spans == []
    side.fetch(transport(side, b"b"))
    assert len(probe.spans) == 2


def test_shutdown_ends_what_was_dropped(side: Side, probe: Probe) -> None:
    """
    What waits for a next attempt is ended by ``end_dropped()``, with the time of the drop.
    """
    gc.collect()
    clients.end_dropped()  # what tests before this one left
    held: list[Any] = []
    opened(side, side.client(transport(side, b"a")), held.append)
    namespace = {"__name__": "otel_correlation.export.batching", "collect": gc.collect}
    exec("def on_end(held):\n    held.clear()\n    collect()\n", namespace)
    namespace["on_end"](held)  # type: ignore[operator]
    ((_, dropped_ns),) = _attempt._dropped
    clients.end_dropped()
    assert probe.span.end_time == dropped_ns


def test_a_response_dropped_in_a_thread(probe: Probe) -> None:
    """
    A thread's own frames are no reason to wait.
    """
    side = SIDES[0]

    def work() -> None:
        opened(side, side.client(transport(side, b"a")), lambda _: None)
        gc.collect()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(probe.spans) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_ends_nothing_of_its_parents(side: Side, probe: Probe) -> None:
    """
    A child that collects its copy of an open response does not end the parent's span a second time.
    """
    held: list[Any] = []
    opened(side, side.client(transport(side, b"a")), held.append)
    child = os.fork()
    if child == 0:
        held.clear()
        gc.collect()
        os._exit(len(probe.spans))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    held.clear()
    gc.collect()
    assert len(probe.spans) == 1


def test_a_websocket_handshake_ends_with_its_101(side: Side, probe: Probe) -> None:
    """
    A connection that stays open for hours does not keep a span open.
    """
    ended: list[int] = []

    async def look_async(response: Any) -> None:
        ended.append(len(probe.spans))
        await response.aclose()

    def look(response: Any) -> None:
        ended.append(len(probe.spans))
        response.close()

    opened(side, side.client(transport(side, b"a", status=101)), look_async if side.is_async else look)
    assert ended == [1]
    assert probe.span.attributes["http.response.status_code"] == 101


def test_an_error_status_with_a_broken_body(side: Side, probe: Probe) -> None:
    """
    The later error names what ended the attempt.
    """
    with pytest.raises(side.library.ReadError):
        side.fetch(transport(side, side.library.ReadError("cut"), status=500))
    assert probe.span.attributes["error.type"] == f"{side.library.__name__}.ReadError"


def test_a_body_is_measured_where_the_trace_is_not_sampled(side: Side) -> None:
    """
    The duration covers the body, whether or not there is a span.
    """
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    seen: list[Any] = []

    async def read_async(response: Any) -> None:
        seen.append(reader.get_metrics_data())
        await response.aread()

    def read(response: Any) -> None:
        seen.append(reader.get_metrics_data())
        response.read()

    with attempts(Probe(), meter_provider=provider) as probe, request(sampled=False):
        opened(side, side.client(transport(side, b"a")), read_async if side.is_async else read)
        assert probe.spans == []
    assert seen == [None]
    assert reader.get_metrics_data() is not None
    provider.shutdown()


def test_an_unsampled_body_is_left_alone(side: Side, probe: Probe) -> None:
    """
    Where nobody looks, the stream is httpx's own.
    """
    kinds: list[str] = []

    async def look_async(response: Any) -> None:
        kinds.append(type(response.stream._stream).__name__)
        await response.aclose()

    def look(response: Any) -> None:
        kinds.append(type(response.stream._stream).__name__)
        response.close()

    with request(sampled=False):
        opened(side, side.client(transport(side, b"a")), look_async if side.is_async else look)
    assert kinds == ["Chunks"]
