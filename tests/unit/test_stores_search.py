"""
The stores over HTTP: the embedded one, Jaeger's answers, what is configured, and stores that do not answer.
"""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest

from otel_correlation.local import LocalServer
from otel_correlation.semconv import CALLER_REQUEST_ID
from otel_correlation.stores import Span, StoreError, Trace, cause, client, configured, find
from otel_correlation.stores.embedded import EmbeddedStore
from otel_correlation.stores.jaeger import JaegerStore
from tests.local_payloads import REQUEST_ID, START_NS, TRACE_ID, checkout, log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# What Jaeger 1.76 (2.13) answers for a failed SERVER span under a CLIENT span, shortened.
JAEGER_TRACE: dict[str, Any] = {
    "traceID": TRACE_ID,
    "spans": [
        {
            "traceID": TRACE_ID,
            "spanID": "00000000000000b1",
            "operationName": "POST /reservations",
            "references": [
                {"refType": "CHILD_OF", "traceID": TRACE_ID, "spanID": "00000000000000a1"},
                {"refType": "FOLLOWS_FROM", "traceID": "f" * 32, "spanID": "00000000000000c1"},
            ],
            "startTime": START_NS // 1000,
            "duration": 1500,
            "tags": [
                {"key": "span.kind", "type": "string", "value": "server"},
                {"key": "http.response.status_code", "type": "int64", "value": 500},
                {"key": "request_id", "type": "string", "value": REQUEST_ID},
                {"key": "otel.status_code", "type": "string", "value": "ERROR"},
                {"key": "otel.status_description", "type": "string", "value": "why"},
                {"key": "error", "type": "bool", "value": True},
            ],
            "logs": [
                {
                    "timestamp": START_NS // 1000 + 1000,
                    "fields": [
                        {"key": "event", "type": "string", "value": "exception"},
                        {"key": "exception.type", "type": "string", "value": "ZeroDivisionError"},
                        {"key": "exception.message", "type": "string", "value": "by zero"},
                    ],
                }
            ],
            "processID": "p1",
            "warnings": None,
        },
        {
            "traceID": TRACE_ID,
            "spanID": "00000000000000a1",
            "operationName": "POST",
            "references": [],
            "startTime": START_NS // 1000 - 500,
            "duration": 2500,
            "tags": [{"key": "span.kind", "type": "string", "value": "client"}],
            "logs": [],
            "processID": "p2",
            "warnings": None,
        },
    ],
    "processes": {"p1": {"serviceName": "inventory", "tags": []}, "p2": {"serviceName": "orders", "tags": []}},
}
Answer = tuple[int, bytes]


@contextmanager
def http_server(answer: Callable[[str], Answer]) -> Iterator[tuple[str, list[str]]]:
    """
    Run a small HTTP server; yield its URL and the paths that it was asked for.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            status, body = answer(self.path)
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def jaeger(path: str) -> Answer:
    parts = urlsplit(path)
    query = parse_qs(parts.query)
    if parts.path == "/api/services":
        return 200, b'{"data": ["orders", "inventory"], "total": 2, "limit": 0, "offset": 0, "errors": null}'
    if parts.path == "/api/traces":
        wanted = {"request_id": REQUEST_ID}, {CALLER_REQUEST_ID: "what-a-stranger-sent"}
        hit = query["service"] == ["inventory"] and json.loads(query["tags"][0]) in wanted
        return 200, json.dumps({"data": [JAEGER_TRACE] if hit else [], "errors": None}).encode()
    if parts.path == f"/api/traces/{TRACE_ID}":
        return 200, json.dumps({"data": [JAEGER_TRACE]}).encode()
    return 404, b'{"data": null, "errors": [{"code": 404, "msg": "trace not found"}]}'


def test_jaeger_is_asked_by_trace_id() -> None:
    """
    A trace id is looked up directly, and Jaeger's form becomes ours: kind, parent, link, times, status, exception.
    """
    with http_server(jaeger) as (url, asked):
        (trace,) = JaegerStore(url).find(TRACE_ID.upper())
    assert asked[0] == f"/api/traces/{TRACE_ID}"
    client_span, server_span = trace.spans
    assert client_span == Span(
        TRACE_ID, "00000000000000a1", "", "orders", "POST", "CLIENT", START_NS - 500_000, START_NS + 2_000_000
    )
    assert (server_span.kind, server_span.parent_id, server_span.service) == ("SERVER", "00000000000000a1", "inventory")
    assert (server_span.failed, server_span.status_message, server_span.request_id) == (True, "why", REQUEST_ID)
    assert server_span.links == (("f" * 32, "00000000000000c1"),)
    assert server_span.attributes["http.response.status_code"] == 500
    why = cause(trace)
    assert why is not None
    assert (why.service, why.type, why.message) == ("inventory", "ZeroDivisionError", "by zero")


def test_jaeger_is_searched_service_by_service() -> None:
    """
    A request id is looked up as the trace id that it leads to and as an attribute of every service's spans.
    """
    with http_server(jaeger) as (url, asked):
        found = JaegerStore(url).find(REQUEST_ID)
        assert [trace.trace_id for trace in found] == [TRACE_ID]
        assert asked[0] == f"/api/traces/{client.trace_id_of(REQUEST_ID)}"
        services = [parse_qs(urlsplit(path).query)["service"] for path in asked[2:]]
        assert services == [["orders"], ["orders"], ["inventory"], ["inventory"]]
        assert [trace.trace_id for trace in JaegerStore(url).find("what-a-stranger-sent")] == [TRACE_ID]
        assert JaegerStore(url).find("42") == []


def test_the_embedded_store_is_asked_over_http() -> None:
    """
    What the local server keeps is found through its API, whole.
    """
    with LocalServer(port=0) as local:
        local.store.add(checkout().spans, checkout().logs).result()
        assert EmbeddedStore(local.url + "/").find(REQUEST_ID) == [checkout()]
        assert EmbeddedStore(local.url).find("a/../b#c=..") == []
        assert EmbeddedStore(local.url).find("..") == []


def test_answers_of_several_stores_are_one_story() -> None:
    """
    Spans from Jaeger and log lines from the embedded store are put together by trace id; a span in both is told once.
    """
    with http_server(jaeger) as (url, _), LocalServer(port=0) as local:
        local.store.add((), (log(1, "orders", "hello"),)).result()
        stores = configured((local.url, f"jaeger={url}", f"jaeger={url}"))
        (trace,), errors = find(stores, TRACE_ID)
    assert (len(trace.spans), [line.body for line in trace.logs], errors) == (2, ["hello"], [])


def test_the_newest_trace_comes_first() -> None:
    """
    When an id has several traces, the last one is most likely the one that somebody asks about.
    """

    class Fixed:
        name = "fixed"
        is_whole = True

        def find(self, _wanted: str, /) -> list[Trace]:
            return [Trace.of(str(at), (), (log(at, "s", "x"),)) for at in (1, 3, 2)]

        def complete(self, known: Sequence[Trace], /) -> list[Trace]:
            raise AssertionError(known)

    traces, _ = find([Fixed()], "x")
    assert [trace.trace_id for trace in traces] == ["3", "2", "1"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((200, b"<html>"), "did not answer with JSON"),
        ((200, b'{"data": [{}], "traces": [{}]}'), "did not answer as"),
        ((200, b'{"data": "x", "traces": "x"}'), "did not answer as"),
        ((200, b"[" * 100_000), "did not answer with JSON"),
        ((500, b"{}"), "answered with status 500"),
        ((401, b""), "answered with status 401"),
        ((302, b""), "answered with status 302"),
    ],
)
@pytest.mark.parametrize("kind", [EmbeddedStore, JaegerStore])
def test_a_store_that_answers_wrongly_is_one_clear_error(
    kind: type[EmbeddedStore | JaegerStore], answer: Answer, reason: str
) -> None:
    """
    Another program on that port, a login page, a redirect: the error names the address and what is wrong.
    """
    with http_server(lambda _path: answer) as (url, _), pytest.raises(StoreError, match=reason) as caught:
        kind(url).find(TRACE_ID)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_answer_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    An answer beyond the bound is an error, not a full memory.
    """
    monkeypatch.setattr(client, "MAX_ANSWER_BYTES", 1000)
    with (
        http_server(lambda _path: (200, b" " * 5000)) as (url, _),
        pytest.raises(StoreError, match="more than 1000 bytes"),
    ):
        EmbeddedStore(url).find(TRACE_ID)


def test_a_store_that_is_down_leaves_the_others() -> None:
    """
    What one store has is shown, and the other's silence is reported beside it.
    """
    with LocalServer(port=0) as gone:
        url = gone.url
    with LocalServer(port=0) as local:
        local.store.add(checkout().spans, ()).result()
        traces, errors = find(configured((url, local.url)), TRACE_ID)
    assert len(traces) == 1
    assert [url in str(error) for error in errors] == [True]


def test_a_proxy_for_the_internet_is_not_asked_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    HTTP_PROXY without NO_PROXY is common on laptops, and must not break the local viewer.
    """
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with LocalServer(port=0) as local:
        assert EmbeddedStore(local.url).find(TRACE_ID) == []


def test_stores_are_named_by_url_and_kind() -> None:
    """
    A plain URL is an embedded store, ``jaeger=URL`` Jaeger; nothing at all is the embedded one at its default port.
    """
    names = [
        store.name
        for store in configured(("http://127.0.0.1:1/", "jaeger=http://[::1]:2", "embedded=https://c.example"))
    ]
    assert names[0] == "the embedded store at http://127.0.0.1:1"
    assert names[1].startswith("Jaeger at http://[::1]:2 ")
    assert names[2] == "the embedded store at https://c.example"
    assert [store.name for store in configured(())] == ["the embedded store at http://127.0.0.1:4318"]


@pytest.mark.parametrize(
    "item",
    [
        "lala=http://h:1",
        "logs=",
        "tempo=http://h:99999",
        "localhost:4318",
        "ftp://h",
        "jaeger=",
        "http://",
        "http://[",
        "=http://h",
    ],
)
def test_a_wrong_store_is_refused_by_name(item: str) -> None:
    """
    The line names the variable and the item, and shows how to write it.
    """
    with pytest.raises(StoreError, match="OTEL_CORRELATION_STORES") as caught:
        configured((item,))
    assert repr(item) in str(caught.value)
