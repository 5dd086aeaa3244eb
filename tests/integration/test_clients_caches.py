"""
Real transports around transports: hishel's caches and httpx-retries over real sockets.
"""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import hishel
import hishel.httpx
import hishel.httpx2
import httpx
import pytest
from httpx_retries import Retry, RetryTransport

from tests.clients_probe import SIDES, SPAN_ID, Probe, Side, attempts, request, traceparent
from tests.http_answers import running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DEADLINE_S = 30.0


class Origin(ThreadingHTTPServer):
    """
    Keeps which paths were asked for, and by which traceparents.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seen: list[tuple[str, list[str]]] = []

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Origin

    def do_GET(self) -> None:
        """
        Answer by path: for a while, to be asked again, or failing twice.
        """
        times = sum(path == self.path for path, _ in self.server.seen)
        self.server.seen.append((self.path, self.headers.get_all("traceparent") or []))
        status = 200
        if self.path == "/busy" and times < 2:
            status = 503
        elif self.path == "/stale" and self.headers.get("if-none-match"):
            status = 304
        elif self.path == "/moved":
            status = 302
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/kept")
        self.send_header("Cache-Control", "max-age=600" if self.path == "/kept" else "max-age=0")
        self.send_header("ETag", '"1"')
        if status != 304:
            self.send_header("Content-Length", "4")
        self.end_headers()
        if status != 304:
            self.wfile.write(b"body")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """
        Say nothing.
        """


@pytest.fixture
def origin() -> Iterator[Origin]:
    """
    A running server.
    """
    with running(Origin()) as server:
        yield server


def cache_client(side: Side, directory: Path, **options: Any) -> Any:
    """
    Return hishel's client of this side.
    """
    module: Any = hishel.httpx2 if side.library.__name__ == "httpx2" else hishel.httpx
    kind, storage = (
        (module.AsyncCacheClient, hishel.AsyncSqliteStorage)
        if side.is_async
        else (module.CacheClient, hishel.SqliteStorage)
    )
    return kind(storage=storage(database_path=directory / "cache.db"), trust_env=False, **options)


@pytest.mark.parametrize("side", SIDES, ids=repr)
@pytest.mark.parametrize("rfc", [True, False])
def test_a_cache(side: Side, origin: Origin, tmp_path: Path, rfc: bool) -> None:
    """
    As many spans as requests on the wire, whose traceparents they are: none for a hit, one for a revalidation.
    """
    paths = ("/kept", "/kept", "/stale", "/stale", "/moved")
    with attempts(Probe()) as probe, request():
        client = cache_client(side, tmp_path, rfc=rfc, follow_redirects=True)
        responses = side.send(client, *[client.build_request("GET", origin.url(path)) for path in paths])
        assert [response.text for response in responses] == ["body"] * 5
    asked = ["/kept", "/stale", "/stale", "/moved"] if rfc else ["/kept", "/stale", "/moved"]
    # Where the redirect leads is in the cache.
    assert [path for path, _ in origin.seen] == asked
    assert [found for _, found in origin.seen] == [[traceparent(span)] for span in probe.spans]
    statuses = [200, 200, 304, 302] if rfc else [200, 200, 302]
    assert [span.attributes["http.response.status_code"] for span in probe.spans] == statuses
    assert {span.parent.span_id for span in probe.spans} == {SPAN_ID}
    assert not any(span.links for span in probe.spans)


@pytest.mark.parametrize("side", SIDES, ids=repr)
def test_a_redirect_through_a_cache(side: Side, origin: Origin, tmp_path: Path) -> None:
    """
    A hop behind a hop, both sent: two spans, the second a re-send, each with its own traceparent and no other.
    """
    with attempts(Probe()) as probe, request():
        client = cache_client(side, tmp_path, rfc=True, follow_redirects=True)
        side.send(client, client.build_request("GET", origin.url("/moved")))
    assert [span.attributes.get("http.request.resend_count") for span in probe.spans] == [None, 1]
    assert [found for _, found in origin.seen] == [[traceparent(span)] for span in probe.spans]
    assert not any(span.links for span in probe.spans)


@pytest.mark.parametrize("side", [side for side in SIDES if side.library is httpx], ids=repr)
@pytest.mark.parametrize("given", [True, False])
def test_retries(side: Side, origin: Origin, given: bool) -> None:
    """
    Each of a retrying transport's attempts is a span with its ordinal, whether the inner transport was given or made.
    """
    inner = (httpx.AsyncHTTPTransport() if side.is_async else httpx.HTTPTransport()) if given else None
    transport = RetryTransport(transport=inner, retry=Retry(total=3, backoff_jitter=0.0))
    with attempts(Probe()) as probe, request():
        response = side.fetch(transport, origin.url("/busy"))
    assert response.status_code == 200
    assert [span.attributes["http.response.status_code"] for span in probe.spans] == [503, 503, 200]
    assert [span.attributes.get("http.request.resend_count") for span in probe.spans] == [None, 1, 2]
    assert [found for _, found in origin.seen] == [[traceparent(span)] for span in probe.spans]
