"""
The stores over HTTP: the embedded one, Jaeger's answers, what is configured, and stores that do not answer.
"""

from __future__ import annotations

import gzip
import json
import socket
import threading
import tracemalloc
from base64 import b64encode
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest

from otel_correlation.local import LocalServer
from otel_correlation.semconv import CALLER_REQUEST_ID
from otel_correlation.stores import Span, StoreError, Trace, cause, client, configured, find
from otel_correlation.stores.embedded import EmbeddedStore
from otel_correlation.stores.jaeger import JaegerStore
from tests.http_answers import Answer, http_server, raw_server
from tests.local_payloads import REQUEST_ID, START_NS, TRACE_ID, checkout, log, span

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        is_whole: ClassVar[bool] = True

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
    The line names the variable and the item, and shows how to write it; of an address that is none, no more than ``***``.
    """
    with pytest.raises(StoreError, match="OTEL_CORRELATION_STORES") as caught:
        configured((item,))
    shown = {"tempo=http://h:99999": "tempo=http://***", "http://[": "http://***"}.get(item, item)
    assert repr(shown) in str(caught.value)


@pytest.mark.parametrize(
    "item", ["hunter2=ftp://h", "tempo=ftp://u:hunter2@h", "tempoo=http://h?token=hunter2", "hunter2"]
)
def test_a_wrong_store_shows_no_credential(item: str) -> None:
    """
    Wherever in the item it stands.
    """
    with pytest.raises(StoreError) as caught:
        configured((item,))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("place", ["127.0.0.1:1?token=hunter2", "127.0.0.1:1/hunter2/x", "u:hunter2@127.0.0.1:1"])
@pytest.mark.parametrize("kind", ["embedded", "jaeger", "tempo", "loki"])
def test_a_store_that_is_not_there_shows_no_credential(kind: str, place: str) -> None:
    """
    Neither its name nor its failure shows a password, a query's value or a key that is part of the path.
    """
    stores = configured((f"{kind}=http://{place}",))
    _, errors = find(stores, TRACE_ID)
    assert errors
    assert "hunter2" not in " ".join([*(store.name for store in stores), *map(str, errors)])


class Stub:
    """
    A store that has what it was made of, and notes what it is asked for.
    """

    name = "stub"
    is_whole: ClassVar[bool] = False

    def __init__(self, found: Sequence[Trace], more: Sequence[Trace] = (), *, error: str = "") -> None:
        self.found, self.more, self.error = list(found), list(more), error
        self.known: list[Trace] = []

    def find(self, _wanted: str, /) -> list[Trace]:
        if self.error:
            raise StoreError(self.error, self.found)
        return self.found

    def complete(self, known: Sequence[Trace], /) -> list[Trace]:
        self.known = list(known)
        if self.error:
            raise StoreError(self.error, self.more)
        return self.more


class Whole(Stub):
    is_whole: ClassVar[bool] = True


def request(trace_id: str = TRACE_ID, request_id: str = REQUEST_ID) -> Trace:
    made = span("a", "", "orders", "GET", "SERVER", (0, 10), trace_id=trace_id)
    return Trace.of(trace_id, [replace(made, attributes={"request_id": request_id})], ())


def lines(trace_id: str, *texts: str, at_ms: int = 1, **fields: str) -> Trace:
    made = [replace(log(at_ms, "orders", text, trace_id=trace_id), attributes=fields) for text in texts]
    return Trace.of(trace_id, (), made)


def test_each_store_is_asked_for_what_the_others_found() -> None:
    """
    Tempo leads from a request id to a trace: Loki is asked for it and tells its lines, but no other trace of that id.
    """
    spans, logs = Whole([request()]), Stub([], [lines(TRACE_ID, "hello"), lines("f" * 32, "of another")])
    (trace,), errors = find([spans, logs], "42")
    assert ([line.body for line in trace.logs], len(trace.spans), errors) == (["hello"], 1, [])
    assert [known.trace_id for known in logs.known] == [TRACE_ID]
    assert spans.known == []
    spans, logs = Whole([], [request()]), Stub([lines(TRACE_ID, "hello")])
    (trace,), _ = find([spans, logs], "42")
    assert (len(trace.spans), len(trace.logs)) == (1, 1)
    assert [known.trace_id for known in spans.known] == [TRACE_ID]


def test_one_round_is_enough_where_nothing_new_is_known() -> None:
    """
    A store of whole traces alone is asked once, and so is a store of lines that were found by all of their ids.
    """
    alone = Whole([request()])
    find([alone], "42")
    logs = Stub([lines(client.trace_id_of(REQUEST_ID) or "", "hello", request_id=REQUEST_ID)])
    find([logs], REQUEST_ID)
    assert (alone.known, logs.known) == ([], [])
    # By the trace id, the request id is news, which a proxy's line may name alone.
    logs = Stub([lines(TRACE_ID, "hello", request_id=REQUEST_ID)], [lines("", "proxy", request_id=REQUEST_ID)])
    (trace,), _ = find([logs], TRACE_ID)
    assert [line.body for line in trace.logs] == ["hello", "proxy"]


def test_a_store_that_failed_is_asked_again_for_what_is_known() -> None:
    """
    A search over a week may be too much for it where a trace's own hour is not; the failure is told once.
    """
    logs = Stub([], [lines(TRACE_ID, "hello")], error="too slow")
    (trace,), errors = find([Whole([request()]), logs], TRACE_ID)
    assert ([line.body for line in trace.logs], [str(error) for error in errors]) == (["hello"], ["too slow"])


def test_a_line_that_two_stores_have_is_told_once() -> None:
    """
    A file has milliseconds and OTLP a float's nanoseconds; a line that one store has twice was written twice.
    """
    exact = log(1, "orders", "retrying")
    blurred = replace(exact, time_ns=exact.time_ns - 128, attributes={})
    one, two = Trace(TRACE_ID, (), (exact, exact)), Trace(TRACE_ID, (), (blurred,))
    for order in ([one, two], [two, one]):
        (trace,), _ = find([Stub([part]) for part in order], TRACE_ID)
        assert [line.body for line in trace.logs] == ["retrying", "retrying"]


def test_half_of_a_trace_id_is_the_whole_that_ends_in_it() -> None:
    """
    Lines in Datadog's form have the lower half; two wholes that end alike, or none, leave it as it is.
    """
    half = "0" * 16 + TRACE_ID[16:]
    (trace,), _ = find([Whole([request()]), Stub([lines(half, "hello")])], "42")
    assert (trace.trace_id, [line.trace_id for line in trace.logs]) == (TRACE_ID, [TRACE_ID])
    twin = "f" * 16 + TRACE_ID[16:]
    found, _ = find([Whole([request(), request(twin)]), Stub([lines(half, "hello")])], "42")
    assert {trace.trace_id for trace in found} == {TRACE_ID, twin, half}


def test_a_line_without_a_trace_goes_where_its_request_is() -> None:
    """
    Of several traces with its request id the nearest in time; without any, the trace that the id leads to, or none.
    """
    later = Trace.of(
        "f" * 32,
        [
            replace(part, start_ns=part.start_ns + 10**12, end_ns=part.end_ns + 10**12)
            for part in request("f" * 32).spans
        ],
        (),
    )
    other = request("e" * 32, "somebody-else-entirely")
    spans = Whole([request(), later, other])

    def placed(line: Trace, wanted: str = REQUEST_ID) -> list[str]:
        return [trace.trace_id for trace in find([spans, Stub([line])], wanted)[0] if trace.logs]

    assert placed(lines("", "proxy", request_id=REQUEST_ID)) == [TRACE_ID]
    assert placed(lines("", "proxy", request_id=REQUEST_ID, at_ms=10**6)) == ["f" * 32]
    untimed = lines("", "proxy", request_id=REQUEST_ID)
    untimed = Trace("", (), (replace(untimed.logs[0], time_ns=0),))
    assert placed(untimed) == ["f" * 32]
    assert placed(lines("", "proxy", request_id="nobody-has-seen-this")) == [client.trace_id_of("nobody-has-seen-this")]
    (alone,), _ = find([Stub([lines("", "proxy", request_id="42")])], "42")
    assert (alone.trace_id, len(alone.logs)) == ("", 1)


@pytest.mark.parametrize(
    ("userinfo", "secret", "expected"),
    [
        ("123:glc_s%40cret%2C@", "glc_s@cret,", "Basic " + b64encode(b"123:glc_s@cret,").decode()),
        (":tok%3Den-s3cret@", "tok=en-s3cret", "Bearer tok=en-s3cret"),
        ("user@", "dXNlcjo=", "Basic dXNlcjo="),
        ("", "nothing", None),
    ],
)
def test_credentials_and_tenant_go_into_headers_only(userinfo: str, secret: str, expected: str | None) -> None:
    """
    Basic for a user, bearer for a password alone, the fragment as the tenant; no message or name shows a secret.
    """
    headers: list[dict[str, str]] = []
    refusal = 403, f"refused {expected} and {secret}".encode()
    with http_server(lambda _path: refusal, headers) as (url, asked):
        there = url.replace("://", f"://{userinfo}")
        stores = configured([f"{kind}={there}/base/#team%20a|b" for kind in ("loki", "tempo", "jaeger", "embedded")])
        _, errors = find(stores, TRACE_ID)
    assert len(headers) == len(errors) == 4
    assert {sent.get("authorization") for sent in headers} == {expected}
    assert {sent["x-scope-orgid"] for sent in headers} == {"team a|b"}
    assert all(path.startswith("/base/") and "#" not in path for path in asked)
    for text in [*(store.name for store in stores), *map(str, errors)]:
        assert "@" not in text
        assert "team" not in text
        assert secret not in text or not userinfo


@pytest.mark.parametrize("kind", ["jaeger", "embedded", "tempo"])
def test_what_was_completed_before_a_failure_is_kept(kind: str) -> None:
    """
    A store that answers for one trace and fails at the next has given that one.
    """
    otlp = {"traceId": TRACE_ID, "spanId": "00000000000000b1", "name": "x"}
    first = {
        "jaeger": {"data": [JAEGER_TRACE]},
        "embedded": {"traces": [{"trace_id": TRACE_ID, "spans": [], "logs": []}]},
        "tempo": {"trace": {"resourceSpans": [{"scopeSpans": [{"spans": [otlp]}]}]}},
    }[kind]

    def answer(path: str) -> Answer:
        return (200, json.dumps(first).encode()) if TRACE_ID in path else (500, b"overloaded")

    with http_server(answer) as (url, _):
        (store,) = configured((f"{kind}={url}",))
        with pytest.raises(StoreError, match="overloaded") as caught:
            store.complete([Trace(TRACE_ID), Trace("f" * 32)])
    assert [trace.trace_id for trace in caught.value.traces] == [TRACE_ID]


@pytest.mark.parametrize(
    "reason",
    ["no such user: maria", f"bad credentials {b64encode(b'maria:s3cretpw').decode()}", "x" * 196 + "s3cretpw"],
)
def test_what_a_store_says_shows_no_part_of_a_secret(reason: str) -> None:
    """
    Its reason may quote the user, the credentials without their scheme, or a password that the cut goes through.
    """
    with http_server(lambda _path: (403, reason.encode())) as (url, _):
        _, (error,) = find(configured((url.replace("://", "://maria:s3cretpw@"),)), TRACE_ID)
    assert str(error).endswith("answered with status 403")


@pytest.mark.parametrize(
    ("name", "value"),
    [("SSL_CERT_FILE", "/nowhere.pem"), ("HTTP_PROXY", "socks9://proxy"), ("HTTP_PROXY", "socks5://proxy:1")],
)
def test_an_environment_that_no_client_can_use_is_one_line(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Certificates that are not there, and proxies of a kind that is unknown or not installed.
    """
    client._certificates.cache_clear()
    for proxy in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setenv(name, value)
    _, (error,) = find(configured(("http://192.0.2.1:4318",)), TRACE_ID)
    assert str(error).startswith("http://192.0.2.1:4318 cannot be asked (")
    assert "SSL_CERT_FILE" in str(error)


def test_a_line_without_a_time_makes_no_trace_old() -> None:
    """
    The newest trace is told first, whatever its lines leave out.
    """
    old, new = lines("1" * 32, "old"), lines("2" * 32, "new")
    new = replace(new, logs=(*new.logs, replace(new.logs[0], time_ns=0, body="no time")))
    old = replace(old, logs=tuple(replace(line, time_ns=line.time_ns - 10**9) for line in old.logs))
    found, _ = find([Stub([old, new])], "x")
    assert [trace.trace_id[0] for trace in found] == ["2", "1"]


@pytest.mark.parametrize("item", ["loki=http://:a%0Ab@h:1", "tempo=http://h:1#%0d%0aX: y", "jaeger=http://:%C3%BC@h"])
def test_what_cannot_stand_in_a_header_is_refused(item: str) -> None:
    """
    A line feed in a password must not become a header of its own; the line does not show it either.
    """
    with pytest.raises(StoreError, match="cannot be sent") as caught:
        configured((item,))
    assert "@" not in str(caught.value)


def test_a_wrong_store_does_not_show_its_password() -> None:
    """
    The line that refuses an item is printed, pasted and kept.
    """
    for item in ("tempoo=http://user:s3cret@h:1", "http://user:s3cret@h:99999", "user:s3cret@h"):
        with pytest.raises(
            StoreError, match=r"is no store; write .* embedded, jaeger, tempo, loki, or logs=FILES"
        ) as caught:
            configured((item,))
        assert "s3cret" not in str(caught.value)
        assert "user" not in str(caught.value)


def test_a_store_that_hangs_is_told_from_one_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Silence has an end, and its own words.
    """
    monkeypatch.setattr(client, "TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(StoreError, match="does not answer in time"):
            client.Http(url, 0.05).get("/")


def test_what_jaeger_found_before_a_failure_stays() -> None:
    """
    A search that fails does not hide the trace that its id named; a known trace is fetched by its id alone.
    """

    def limited(path: str) -> Answer:
        return (500, b"busy") if path.startswith("/api/services") else jaeger(path)

    with http_server(limited) as (url, asked):
        (trace,), errors = find([JaegerStore(url)], TRACE_ID)
        assert (len(trace.spans), len(errors)) == (2, 1)
        assert [one.trace_id for one in JaegerStore(url).complete([Trace(TRACE_ID)])] == [TRACE_ID]
    assert asked[-1] == f"/api/traces/{TRACE_ID}"
    with (
        http_server(lambda _path: (200, b'{"data": [1]}')) as (url, _),
        pytest.raises(StoreError, match="did not answer as Jaeger does"),
    ):
        JaegerStore(url).complete([Trace(TRACE_ID)])


def test_the_embedded_store_is_asked_for_known_traces() -> None:
    """
    What Jaeger leads to may have its lines in the embedded store.
    """
    with LocalServer(port=0) as local:
        local.store.add(checkout().spans, ()).result()
        assert EmbeddedStore(local.url).complete([Trace(TRACE_ID)]) == [replace(checkout(), logs=())]


@pytest.mark.parametrize("begin", [b"HTTP/1.1 200 OK\r\nx: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_whole_answer_has_one_deadline(begin: bytes) -> None:
    """
    A byte now and then, in the head or in the body, is silence all the same; the old time-out began again at each.
    """
    written: list[int] = []

    def drip(connection: socket.socket) -> None:
        connection.sendall(begin)
        for _ in range(6000):
            if ended.wait(0.01):
                return
            connection.sendall(b" ")
            written.append(1)

    ended = threading.Event()
    with raw_server(drip) as url:
        with pytest.raises(StoreError, match="does not answer in time"):
            client.Http(url, 0.5).get("/")
        ended.set()
    assert len(written) < 3000


GZIP_BOMB = gzip.compress(b" " * 50_000_000)


@pytest.mark.parametrize(
    ("coding", "body", "reason"),
    [
        ("gzip, gzip", gzip.compress(GZIP_BOMB), "neither plain nor gzip"),
        ("gzip,gzip,gzip", b"", "neither plain nor gzip"),
        ("br", b"x", "neither plain nor gzip"),
        ("deflate", b"x", "neither plain nor gzip"),
        ("gzip", GZIP_BOMB, "more than 1000000 bytes"),
        ("gzip", gzip.compress(b"") * 2000, "more than 1000000 bytes"),
        ("gzip", b"no gzip", "not gzip"),
        ("gzip", gzip.compress(b"{}")[:-4], "cut off"),
        ("identity", b" " * 1_000_001, "more than 1000000 bytes"),
    ],
)
def test_an_answer_is_inflated_once_and_within_its_bound(
    coding: str, body: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A second content coding is refused, and of the first no more is inflated than an answer may have.
    """
    monkeypatch.setattr(client, "MAX_ANSWER_BYTES", 1_000_000)
    head = f"HTTP/1.1 200 OK\r\ncontent-encoding: {coding}\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    tracemalloc.start()
    try:
        with (
            raw_server(lambda connection: connection.sendall(head + body)) as url,
            pytest.raises(StoreError, match=reason),
        ):
            client.Http(url).get("/")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_an_answer_in_gzip_is_read() -> None:
    """
    Stores behind a proxy that compresses are asked as any other; members follow each other as RFC 1952 allows.
    """
    body = gzip.compress(b'{"traces":') + gzip.compress(b"[]}")
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: GZIP\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with raw_server(lambda connection: connection.sendall(head + body)) as url:
        assert EmbeddedStore(url).find(TRACE_ID) == []


def test_an_answer_of_millions_of_values_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Three bytes of JSON become a hundred in memory: values are counted before they are read.
    """
    monkeypatch.setattr(client, "MAX_VALUES", 1000)
    with (
        http_server(lambda _path: (200, b"[" + b"{}," * 1000 + b"{}]")) as (url, _),
        pytest.raises(StoreError, match="more than 1000 values"),
    ):
        EmbeddedStore(url).find(TRACE_ID)
