"""
Calls that never got their answer, over real sockets: span and metric say so, whatever ended the wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import httpx2
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.trace import StatusCode

from tests.clients_probe import Probe, attempts

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

CANCELLED = "asyncio.exceptions.CancelledError"
HALF = b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhalf of it"


class Peer:
    """
    A server that answers with what it was given, and then nothing more.
    """

    def __init__(self, answer: bytes) -> None:
        self.asked = threading.Event()
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._held: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/x"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._held.append(connection)
                connection.recv(65536)
                connection.sendall(self._answer)
                self.asked.set()

    def close(self) -> None:
        """
        End the server and what it holds.
        """
        self._listener.shutdown(socket.SHUT_RDWR)
        for held in (self._listener, *self._held):
            held.close()
        self._thread.join(20)


@pytest.fixture(params=["silent", "half"])
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    """
    A server that sends nothing, or a head and half of the body.
    """
    found = Peer(HALF if request.param == "half" else b"")
    yield found
    found.close()


@pytest.fixture(params=["light", "plain"])
def probe(request: pytest.FixtureRequest) -> Iterator[Probe]:
    """
    Spans and metrics of every client.
    """
    found = Probe(light=request.param == "light")
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    with attempts(found, meter_provider=provider):
        found.reader = reader  # type: ignore[attr-defined]
        yield found
    provider.shutdown()


def failed_as(probe: Probe, kind: str, *, half: bool) -> None:
    """
    Check the one span and the one metric of a call.
    """
    reader: InMemoryMetricReader = probe.reader  # type: ignore[attr-defined]
    data: Any = reader.get_metrics_data()
    (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
    (point,) = metric.data.data_points
    for told in (probe.span.attributes, point.attributes):
        assert told["error.type"] == kind
        assert told.get("http.response.status_code") == (200 if half else None)
    assert probe.span.status.status_code is StatusCode.ERROR
    assert not probe.span.events, "who cancels wants to: no traceback"


async def by_timeout(
    call: Callable[[], Coroutine[Any, Any, Any]], asked: Callable[[], Coroutine[Any, Any, None]]
) -> None:
    """
    Bound a call by asyncio's own timeout.
    """

    async def bounded() -> None:
        async with asyncio.timeout(None) as bound:
            task = asyncio.create_task(asked())
            task.add_done_callback(lambda _: bound.reschedule(0))
            await call()

    with pytest.raises(TimeoutError):
        await bounded()


async def by_task(call: Callable[[], Coroutine[Any, Any, Any]], asked: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """
    Cancel the task that waits.
    """
    task = asyncio.create_task(call())
    await asked()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_scope(
    call: Callable[[], Coroutine[Any, Any, Any]], asked: Callable[[], Coroutine[Any, Any, None]]
) -> None:
    """
    Leave a cancel scope of anyio's.
    """
    async with anyio.create_task_group() as group:
        group.start_soon(call)
        await asked()
        group.cancel_scope.cancel()


async def by_sibling(
    call: Callable[[], Coroutine[Any, Any, Any]], asked: Callable[[], Coroutine[Any, Any, None]]
) -> None:
    """
    Fail beside it, in one task group.
    """

    async def fails() -> None:
        await asked()
        raise LookupError

    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(call())
            group.create_task(fails())

    with pytest.raises(ExceptionGroup):
        await both()


@pytest.mark.parametrize("library", [httpx, httpx2])
@pytest.mark.parametrize("ending", [by_timeout, by_task, by_scope, by_sibling])
def test_a_cancelled_call_is_no_success(library: Any, ending: Any, peer: Peer, probe: Probe) -> None:
    """
    A call that somebody cancelled is an error of its span and metric, before the answer and in the middle of its body.
    """

    async def main() -> None:
        async with library.AsyncClient(trust_env=False, timeout=20) as client:

            async def asked() -> None:
                assert await asyncio.to_thread(peer.asked.wait, 20)

            await ending(lambda: client.get(peer.url), asked)

    asyncio.run(main())
    failed_as(probe, CANCELLED, half="status_code" in str(probe.span.attributes))


@pytest.mark.parametrize("library", [httpx, httpx2])
def test_an_interrupted_call_is_no_success(library: Any, peer: Peer, probe: Probe) -> None:
    """
    Control-C in the middle of a blocking call ends it as ``KeyboardInterrupt``.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    main = threading.get_ident()

    def interrupt() -> None:
        assert peer.asked.wait(20)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with library.Client(trust_env=False, timeout=20) as client, pytest.raises(KeyboardInterrupt):
            client.get(peer.url)
    finally:
        thread.join(20)
        signal.signal(signal.SIGINT, before)
    failed_as(probe, "KeyboardInterrupt", half="status_code" in str(probe.span.attributes))


@pytest.mark.parametrize("library", [httpx, httpx2])
def test_a_call_that_was_closed_is_no_success(library: Any, probe: Probe) -> None:
    """
    A coroutine that is closed in the middle of its call, as at the end of a loop, got no answer.
    """

    async def main() -> None:
        async def answer(request: Any) -> Any:
            await asyncio.sleep(20)

        async with library.AsyncClient(transport=library.MockTransport(answer)) as client:
            call = client.get("http://orders/")
            call.send(None)
            call.close()

    asyncio.run(main())
    failed_as(probe, "GeneratorExit", half=False)


@pytest.mark.parametrize("library", [httpx, httpx2])
def test_a_body_that_is_left_is_no_error(library: Any, probe: Probe) -> None:
    """
    Whoever has read enough of a stream leaves it: that call got what it wanted.
    """
    peer = Peer(HALF)

    async def main() -> None:
        async with library.AsyncClient(trust_env=False, timeout=20) as client, client.stream("GET", peer.url) as answer:
            async for _ in answer.aiter_raw():
                break

    asyncio.run(main())
    peer.close()
    assert probe.span.attributes["http.response.status_code"] == 200
    assert "error.type" not in probe.span.attributes
    assert probe.span.status.status_code is StatusCode.UNSET
