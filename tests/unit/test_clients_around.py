"""
Transports around transports: a span for each use of the innermost one, and none for an answer that nobody was asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import context as otel_context
from opentelemetry.context import _SUPPRESS_HTTP_INSTRUMENTATION_KEY
from opentelemetry.instrumentation import httpx as contrib
from opentelemetry.instrumentation.utils import is_http_instrumentation_enabled

from tests.clients_probe import REQUEST_ID, SIDES, SPAN_ID, Probe, Side, attempts, request, traceparent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

URL = "http://orders/items"


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


class Server:
    """
    Keeps what the wire saw; answers by the given statuses or errors, then 200.
    """

    def __init__(self, side: Side, *answers: Any) -> None:
        self._side = side
        self._answers = list(answers)
        self.seen: list[list[str]] = []
        self.transport = side.mock(self.answer)

    def answer(self, request: Any) -> Any:
        """
        Answer one request.
        """
        self.seen.append(request.headers.get_list("traceparent"))
        answer = self._answers.pop(0) if self._answers else 200
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, str):
            return self._side.library.Response(302, headers={"location": answer})
        return self._side.library.Response(answer, text="body")


def bases(side: Side) -> Any:
    """
    Return a base of transports that forwards both ways to one method of the test's.
    """

    class Around(side.library.BaseTransport, side.library.AsyncBaseTransport):  # type: ignore[misc, name-defined]
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def handle_request(self, request: Any) -> Any:
            for step in self.steps(request):
                if not isinstance(step, side.library.Request):
                    return step
                self.take(self.inner.handle_request(step))
            return self.last

        async def handle_async_request(self, request: Any) -> Any:
            for step in self.steps(request):
                if not isinstance(step, side.library.Request):
                    return step
                self.take(await self.inner.handle_async_request(step))
            return self.last

        def take(self, response: Any) -> None:
            self.last = response

    return Around


def cache(side: Side, inner: Any, *, copies: bool = False) -> Any:
    """
    Return a cache as people write it: asks once for each URL.
    """

    class Cache(bases(side)):  # type: ignore[misc]
        def steps(self, request: Any) -> Iterator[Any]:
            kept = self.__dict__.setdefault("kept", set())
            if str(request.url) in kept:
                yield side.library.Response(200, text="kept")
            kept.add(str(request.url))
            if copies:
                yield side.library.Request(request.method, request.url, headers=request.headers)
            else:
                yield request

    return Cache(inner)


@pytest.mark.parametrize("copies", [False, True])
def test_a_hit_is_no_attempt(side: Side, probe: Probe, copies: bool) -> None:
    """
    What a cache answers by itself has no span; what it asks for has one, whose traceparent the wire sees.
    """
    server = Server(side)
    client = side.client(cache(side, server.transport, copies=copies))
    with request():
        first, second = side.send(client, client.build_request("GET", URL), client.build_request("GET", URL))
    assert (first.text, second.text) == ("body", "kept")
    assert server.seen == [[traceparent(probe.span)]]
    assert probe.span.attributes["http.response.status_code"] == 200
    assert probe.span.parent.span_id == SPAN_ID
    assert "http.request.resend_count" not in probe.span.attributes


def test_a_transport_that_refuses_is_no_attempt(side: Side, probe: Probe) -> None:
    """
    A circuit breaker that is open, a limit that is reached: an error, and no span, because nothing was sent.
    """

    class Breaker(bases(side)):  # type: ignore[misc]
        def steps(self, request: Any) -> Iterator[Any]:
            raise side.library.PoolTimeout("open", request=request)
            yield

    with request(), pytest.raises(side.library.PoolTimeout):
        side.fetch(Breaker(Server(side).transport), URL)
    assert probe.spans == []


@pytest.mark.parametrize("copies", [False, True])
def test_each_attempt_of_a_retry_is_one(side: Side, probe: Probe, copies: bool) -> None:
    """
    A retrying transport that holds the inner one: siblings, each with its ordinal and its own traceparent.
    """

    class Retry(bases(side)):  # type: ignore[misc]
        def steps(self, request: Any) -> Iterator[Any]:
            for _ in range(3):
                yield (
                    side.library.Request(request.method, request.url, headers=request.headers) if copies else request
                )
                if self.last.status_code == 200:
                    return

    server = Server(side, 503, 503)
    with request():
        response = side.fetch(Retry(server.transport), URL)
    assert response.status_code == 200
    assert [span.attributes["http.response.status_code"] for span in probe.spans] == [503, 503, 200]
    assert [span.attributes.get("http.request.resend_count") for span in probe.spans] == [None, 1, 2]
    assert [span.parent.span_id for span in probe.spans] == [SPAN_ID] * 3
    assert server.seen == [[traceparent(span)] for span in probe.spans]
    assert not any(span.links for span in probe.spans)


@pytest.mark.parametrize("copies", [False, True])
def test_redirects_through_a_cache(side: Side, probe: Probe, copies: bool) -> None:
    """
    Each hop that was sent is an attempt with its ordinal; the hop that was kept is none.
    """
    server = Server(side, "/second", 200, "/second")
    client = side.client(cache(side, server.transport, copies=copies), follow_redirects=True)
    with request():
        side.send(client, client.build_request("GET", URL), client.build_request("GET", "http://orders/other"))
    assert [span.attributes["http.response.status_code"] for span in probe.spans] == [302, 200, 302]
    assert [span.attributes.get("http.request.resend_count") for span in probe.spans] == [None, 1, None]
    assert server.seen == [[traceparent(span)] for span in probe.spans]


def subclass(side: Side, server: Server) -> Any:
    """
    Return a cache that is a subclass of one of httpx's own transports.
    """

    class Cached(side.library.MockTransport):  # type: ignore[misc, name-defined]
        kept: Any = None

        def handle_request(self, request: Any) -> Any:
            if self.kept is None:
                self.kept = super().handle_request(request)
            return self.kept

        async def handle_async_request(self, request: Any) -> Any:
            if self.kept is None:
                self.kept = await super().handle_async_request(request)
            return self.kept

    return Cached(server.answer)


def twice(side: Side, server: Server) -> Any:
    """
    Return a transport around a cache.
    """

    class Logged(bases(side)):  # type: ignore[misc]
        def steps(self, request: Any) -> Iterator[Any]:
            assert request.headers["x-request-id"] == REQUEST_ID
            yield request

    return Logged(cache(side, server.transport))


def one_of_many(side: Side, server: Server) -> Any:
    """
    Return a cache in front of one of several transports, which are in a dictionary.
    """

    class Balanced(bases(side)):  # type: ignore[misc]
        def steps(self, request: Any) -> Iterator[Any]:
            self.inner = self.by_host["orders"]
            yield request

    balanced = Balanced(None)
    balanced.by_host = {"orders": server.transport}
    return cache(side, balanced)


def slots(side: Side, server: Server) -> Any:
    """
    Return a cache that has no dictionary of attributes.
    """

    class Slotted(side.library.BaseTransport, side.library.AsyncBaseTransport):  # type: ignore[misc, name-defined]
        __slots__ = ("around",)

        def handle_request(self, request: Any) -> Any:
            return self.around.handle_request(request)

        async def handle_async_request(self, request: Any) -> Any:
            return await self.around.handle_async_request(request)

    found = Slotted()
    found.around = cache(side, server.transport)
    return found


def by_its_own_means(side: Side, server: Server) -> Any:
    """
    Return a cache around a transport that sends by something that is not httpx's.
    """

    class Own(side.library.BaseTransport, side.library.AsyncBaseTransport):  # type: ignore[misc, name-defined]
        def handle_request(self, request: Any) -> Any:
            assert not is_http_instrumentation_enabled()
            return server.answer(request)

        async def handle_async_request(self, request: Any) -> Any:
            return self.handle_request(request)

    return cache(side, Own())


def by_hand(side: Side, server: Server) -> Any:
    """
    Return a cache around contrib's transport, which somebody put there by hand.
    """
    prefix = "Async" if side.is_async else "Sync"
    library = "Httpx2" if side.library.__name__ == "httpx2" else ""
    return cache(side, getattr(contrib, f"{prefix}OpenTelemetryTransport{library}")(server.transport))


@pytest.mark.parametrize("made", [subclass, twice, one_of_many, slots, by_its_own_means, by_hand])
def test_however_a_transport_holds_another(side: Side, made: Callable[[Side, Server], Any]) -> None:
    """
    The innermost transport makes the span, wherever the one around it keeps it.
    """
    server = Server(side)
    with attempts(Probe()) as probe, request():
        client = side.client(made(side, server))
        responses = side.send(client, client.build_request("GET", URL), client.build_request("GET", URL))
    assert [response.status_code for response in responses] == [200, 200]
    assert server.seen == [[traceparent(probe.span)]]


def test_a_cache_on_a_mount(side: Side, probe: Probe) -> None:
    """
    The transport of the URL decides, not the client's first one.
    """
    server, plain = Server(side), Server(side)
    client = side.client(plain.transport, mounts={"http://orders": cache(side, server.transport)})
    with request():
        urls = (URL, URL, "http://elsewhere/", "http://elsewhere/")
        side.send(client, *[client.build_request("GET", url) for url in urls])
    assert (len(server.seen), len(plain.seen), len(probe.spans)) == (1, 2, 3)


def test_hooks_and_captured_headers_belong_to_attempts(side: Side) -> None:
    """
    Request and response hooks are called for what is sent, with the span and its headers.
    """
    called: list[object] = []

    def on_request(span: Any, info: Any) -> None:
        called.append(f"{span.get_span_context().span_id:016x}" in info.headers["traceparent"])

    def on_response(span: Any, info: Any, answer: Any) -> None:
        del span, info
        called.append(answer.status_code)

    async def on_async_request(span: Any, info: Any) -> None:
        on_request(span, info)

    async def on_async_response(span: Any, info: Any, answer: Any) -> None:
        on_response(span, info, answer)

    hooks: dict[str, Any] = {
        "request_hook": on_request,
        "response_hook": on_response,
        "async_request_hook": on_async_request,
        "async_response_hook": on_async_response,
    }
    server = Server(side)
    with attempts(Probe(), **hooks), request():
        client = side.client(cache(side, server.transport))
        side.send(client, client.build_request("GET", URL), client.build_request("GET", URL))
    assert called == [True, 200]


def test_a_transport_that_sends_by_another_client_too(side: Side, probe: Probe) -> None:
    """
    A transport that holds one of httpx's and sends by something else still sends the ids; its trace is the request's.
    """
    sent: list[dict[str, str]] = []

    class Hybrid(bases(side)):  # type: ignore[misc]
        def steps(self, request: Any) -> Iterator[Any]:
            sent.append(dict(request.headers))
            yield side.library.Response(200)

    with request():
        side.fetch(Hybrid(Server(side).transport), URL)
    assert sent[0]["x-request-id"] == REQUEST_ID
    assert sent[0]["traceparent"].split("-")[2] == f"{SPAN_ID:016x}"
    assert probe.spans == []


def test_inside_of_a_foreign_transport_other_instrumentations_rest(side: Side, probe: Probe) -> None:
    """
    Another HTTP client inside of a transport makes no second span; a client of httpx's inside, and what goes on, do.
    """
    enabled: list[bool] = []
    contexts: list[Any] = []
    inner = Server(side)

    class Own(side.library.BaseTransport, side.library.AsyncBaseTransport):  # type: ignore[misc, name-defined]
        def handle_request(self, request: Any) -> Any:
            del request
            contexts.append(otel_context.get_current())
            enabled.append(is_http_instrumentation_enabled())
            with side.client(inner.transport) as client:
                return client.get("http://token/")

        async def handle_async_request(self, request: Any) -> Any:
            del request
            contexts.append(otel_context.get_current())
            enabled.append(is_http_instrumentation_enabled())
            async with side.client(inner.transport) as client:
                return await client.get("http://token/")

    with request():
        side.fetch(Own(), URL)
    assert enabled == [False]
    assert sorted(span.attributes["server.address"] for span in probe.spans) == ["orders", "token"]
    # A task that the transport started keeps the context, and its own requests have spans again.
    assert not contexts[0][_SUPPRESS_HTTP_INSTRUMENTATION_KEY]


def test_every_class_is_as_it_was_afterwards(side: Side) -> None:
    """
    What was patched of the user's transports is put back with everything else.
    """
    found = by_its_own_means(side, Server(side))
    kind = type(found.inner)
    before = dict(vars(kind))
    with attempts(Probe()), request():
        side.fetch(found, URL)
        assert dict(vars(kind)) != before
    assert dict(vars(kind)) == before
