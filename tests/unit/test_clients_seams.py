"""
What holds when httpx changes below us: other private names cost spans or time, never a request.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import propagate

from otel_correlation import propagators
from otel_correlation.clients._attempt import ClientConfig, begin
from otel_correlation.clients._seams import Library
from otel_correlation.settings import Settings
from otel_correlation.tracer import Tracer
from tests.clients_probe import REQUEST_ID, SIDES, Probe, attempts, request, traceparent

if TYPE_CHECKING:
    import pytest


class Mock(httpx.MockTransport):
    """
    A transport class that only these tests patch.
    """

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """
        Answer, as the base does.
        """
        return super().handle_request(request)


def test_without_the_private_method_transports_are_left(caplog: pytest.LogCaptureFixture) -> None:
    """
    A client without ``_send_single_request`` costs one line; its requests are seen at the transports.
    """
    probe = Probe()
    empty = type("Client", (), {})
    module: Any = SimpleNamespace(
        __name__="httpx",
        Client=empty,
        AsyncClient=empty,
        MockTransport=Mock,
        SyncByteStream=httpx.SyncByteStream,
        AsyncByteStream=httpx.AsyncByteStream,
    )
    library = Library(module)
    library.everywhere = ClientConfig(Settings(), tracer=Tracer("test", probe.provider))
    original = vars(Mock)["handle_request"]
    library.settle()
    try:
        Mock(lambda _: httpx.Response(204)).handle_request(httpx.Request("GET", "http://orders/"))
    finally:
        library.everywhere = None
        library.settle()
    assert probe.span.attributes["http.response.status_code"] == 204
    assert "has no _send_single_request" in caplog.text
    assert vars(Mock)["handle_request"] is original


class OtherHeaders:
    """
    Headers that keep their fields elsewhere, with httpx's public surface.
    """

    def __init__(self, pairs: list[tuple[bytes, bytes]]) -> None:
        self.raw = pairs


class OtherRequest:
    """
    A request with such headers.
    """

    method = "GET"
    url = httpx.URL("http://orders/")

    def __init__(self, *pairs: tuple[bytes, bytes]) -> None:
        self.headers: Any = OtherHeaders(list(pairs))


def test_without_the_private_list_headers_are_written_publicly() -> None:
    """
    Headers of another shape are replaced as a whole, again and again, with nothing twice.
    """
    probe = Probe()
    config = ClientConfig(Settings(), tracer=Tracer("test", probe.provider))
    sent = OtherRequest((b"Host", b"orders"))
    before = propagate.get_global_textmap()
    propagate.set_global_textmap(propagators.build(Settings()))
    try:
        with request():
            for _ in range(2):
                attempt = begin(config, sent)
                assert attempt is not None
                attempt.end()
    finally:
        propagate.set_global_textmap(before)
    last = traceparent(probe.spans[-1]).encode()
    assert sent.headers.raw == [(b"Host", b"orders"), (b"traceparent", last), (b"X-Request-ID", REQUEST_ID.encode())]


NAMES = st.sampled_from(
    ["traceparent", "TraceParent", "tracestate", "baggage", "X-Request-ID", "x-request-id", "Accept"]
)


@given(st.lists(st.tuples(NAMES, st.text("abc-0123456789", max_size=8)), max_size=6), st.integers(1, 3))
def test_nothing_is_ever_sent_twice(pairs: list[tuple[str, str]], sends: int) -> None:
    """
    Whatever the caller set: it goes out as it was, every time, and of what it did not set there is one field at most.
    """
    side = SIDES[0]
    seen: list[list[tuple[str, str]]] = []

    def handler(received: Any) -> Any:
        seen.append([(name.lower(), value) for name, value in received.headers.multi_items()])
        return side.library.Response(200)

    with attempts(Probe()), request():
        client = side.client(side.mock(handler))
        client.headers.clear()
        same = client.build_request("GET", "http://orders/", headers=pairs)
        was = [(name.lower(), value) for name, value in same.headers.multi_items()]
        side.send(client, *[same] * sends)
    assert len(seen) == sends
    set_by_caller = {name for name, _ in was}
    for received in seen:
        assert [pair for pair in received if pair[0] in set_by_caller] == was
        added = [name for name, _ in received if name not in set_by_caller]
        assert len(added) == len(set(added))
