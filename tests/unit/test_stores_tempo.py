"""
Tempo's answers, recorded from Tempo 3.0.3, and whatever else may stand behind its URL.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from otel_correlation.stores import StoreError, Trace, as_json, cause, find
from otel_correlation.stores.tempo import MAX_TRACES, TempoStore
from tests.http_answers import Answer, any_json, damaged, http_server

if TYPE_CHECKING:
    from collections.abc import Callable

ANSWERS = Path(__file__).parent / "answers"
TRACE_ID = "1eaedd495dde8d43dfc6f8ab9a678023"
REQUEST_ID = "tempo-quote/2026#000999"


def recorded(name: str) -> Any:
    return json.loads((ANSWERS / name).read_text())


def tempo(path: str) -> Answer:
    parts = urlsplit(path)
    if parts.path == "/api/search":
        wanted = REQUEST_ID in parse_qs(parts.query)["q"][0]
        return 200, json.dumps(recorded("tempo_search.json") if wanted else {"traces": []}).encode()
    if parts.path == f"/api/v2/traces/{TRACE_ID}":
        return 200, json.dumps(recorded("tempo_trace_v2.json")).encode()
    return 404, b"trace not found"


def before_2_7(path: str) -> Answer:
    if path == f"/api/traces/{TRACE_ID}":
        return 200, json.dumps(recorded("tempo_trace_v1.json")).encode()
    return tempo(path) if path.startswith("/api/search") else (404, b"404 page not found")


@pytest.mark.parametrize("server", [tempo, before_2_7])
@pytest.mark.parametrize("wanted", [TRACE_ID, TRACE_ID.upper(), REQUEST_ID])
def test_a_trace_is_found_by_either_id(server: Callable[[str], Answer], wanted: str) -> None:
    """
    A trace id directly, a request id by TraceQL; base64 ids, enumerations by name and integers in text become ours.
    """
    with http_server(server) as (url, _):
        (trace,) = TempoStore(url).find(wanted)
    assert trace.trace_id == TRACE_ID
    client, request = trace.spans
    assert (client.kind, client.parent_id, client.span_id) == ("CLIENT", "", "a0354a732b4ee7f1")
    assert (request.kind, request.parent_id, request.service) == ("SERVER", client.span_id, "orders")
    assert (request.name, request.failed, request.request_id) == ("GET /orders/{n}", True, REQUEST_ID)
    assert request.attributes["http.response.status_code"] == 500
    assert client.start_ns <= request.start_ns < request.end_ns <= client.end_ns
    why = cause(trace)
    assert why is not None
    assert (why.place, why.type) == ("/srv/orders.py:13 in orders", "ZeroDivisionError")


def test_the_search_names_both_attributes_and_a_range() -> None:
    """
    What a caller sent and what the request got, in the last seven days, which is what Tempo allows.
    """
    with http_server(tempo) as (url, asked):
        TempoStore(url).find(REQUEST_ID)
    query = {name: values[0] for name, values in parse_qs(urlsplit(asked[2]).query).items()}
    assert query["q"] == (
        f'{{ span.request_id = "{REQUEST_ID}" || span.otel_correlation.caller.request_id = "{REQUEST_ID}" }}'
    )
    assert 6 * 86400 < int(query["end"]) - int(query["start"]) <= 7 * 86400
    assert query["limit"] == str(MAX_TRACES)


def test_an_id_cannot_leave_its_quotes() -> None:
    """
    Whatever is asked for is one string of TraceQL.
    """
    with http_server(tempo) as (url, asked):
        assert TempoStore(url).find('x" || true || "\\\n') == []
    assert r'span.request_id = "x\" || true || \"\\\n" ||' in parse_qs(urlsplit(asked[-1]).query)["q"][0]


def test_ids_in_hex_and_numbers_are_read_too() -> None:
    """
    OTLP's own JSON mapping, which gateways and other stores with Tempo's API use.
    """
    span = {
        "traceId": "0" * 31 + "1",
        "spanId": "00000000000000B1",
        "parentSpanId": "0000000000000000",
        "kind": 3,
        "startTimeUnixNano": 5,
        "endTimeUnixNano": 2,
        "status": {"code": 2, "message": "why"},
        "links": [{"traceId": "f" * 32, "spanId": "00000000000000c1"}],
        "attributes": [
            {"key": "big", "value": {"intValue": str(2**60)}},
            {"key": "list", "value": {"arrayValue": {"values": [{"boolValue": True}, {}]}}},
            {"key": "map", "value": {"kvlistValue": {"values": [{"key": "a", "value": {"doubleValue": 1.5}}]}}},
        ],
    }
    other = {"traceId": "", "spanId": "AAAAAAAAAME=", "kind": 77}
    answer = {"trace": {"resourceSpans": [{"instrumentationLibrarySpans": [{"spans": [span, other]}]}]}}
    search = {"traces": [{"traceID": "1"}]}
    with http_server(lambda path: (200, json.dumps(search if path.startswith("/api/search") else answer).encode())) as (
        url,
        asked,
    ):
        (trace,) = TempoStore(url).find("42")
    assert asked[-1] == "/api/v2/traces/" + "0" * 31 + "1"
    second, first = trace.spans
    assert (first.span_id, first.parent_id, first.kind, first.service) == (
        "00000000000000b1",
        "",
        "CLIENT",
        "unknown_service",
    )
    assert (first.start_ns, first.end_ns, first.failed, first.status_message) == (5, 5, True, "why")
    assert first.links == (("f" * 32, "00000000000000c1"),)
    assert first.attributes == {"big": str(2**60), "list": [True, None], "map": {"a": 1.5}}
    assert (second.span_id, second.kind) == ("00000000000000c1", "INTERNAL")


def test_what_is_given_in_part_is_told_with_what_there_is() -> None:
    """
    Tempo cuts traces that are too large and says so: the spans are shown, and that there are more.
    """
    answer = {**recorded("tempo_trace_v2.json"), "status": "PARTIAL", "message": "trace exceeds max size"}
    with (
        http_server(lambda path: (200, json.dumps(answer).encode()) if "v2" in path else tempo(path)) as (url, _),
        pytest.raises(StoreError, match=f"part of trace {TRACE_ID} only") as caught,
    ):
        TempoStore(url).find(TRACE_ID)
    assert [len(trace.spans) for trace in caught.value.traces] == [2]


def test_what_was_found_before_a_failure_stays() -> None:
    """
    A search that runs into a limit does not hide the trace that its id named.
    """

    def limited(path: str) -> Answer:
        return (429, b"too many outstanding requests\n") if "search" in path else tempo(path)

    with http_server(limited) as (url, _):
        with pytest.raises(StoreError, match=r"status 429 \(too many outstanding requests\)") as caught:
            TempoStore(url).find(TRACE_ID)
        assert [trace.trace_id for trace in caught.value.traces] == [TRACE_ID]


def test_known_traces_are_asked_for_by_id_alone() -> None:
    """
    No search is made for what another store has found.
    """
    with http_server(tempo) as (url, asked):
        (trace,) = TempoStore(url).complete([Trace(TRACE_ID), Trace("f" * 32)])
    assert len(trace.spans) == 2
    assert [path for path in asked if "search" in path] == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((200, b"<html>"), "did not answer with JSON"),
        ((200, b'{"trace": 5}'), "did not answer as Tempo does"),
        ((200, b'{"trace": {"resourceSpans": [{"scopeSpans": [{"spans": [{"spanId": "!"}]}]}]}}'), "is no spanId"),
        ((200, b'{"trace": {"resourceSpans": [{"scopeSpans": [{"spans": [{"spanId": "AAAA"}]}]}]}}'), "is no spanId"),
        ((200, b'{"traces": [{"traceID": "../x"}]}'), "is no trace id"),
        ((404, b""), "something else than Tempo"),
        ((400, b"invalid TraceQL query: x\nmore"), r"\(invalid TraceQL query: x\)$"),
        ((502, b"<html>Bad Gateway"), "status 502$"),
    ],
)
def test_an_answer_that_is_none_of_tempo_is_one_line(answer: Answer, reason: str) -> None:
    """
    The line names the address and what is wrong; a store's own reason is quoted, a proxy's page is not.
    """
    with http_server(lambda _path: answer) as (url, _), pytest.raises(StoreError, match=reason) as caught:
        TempoStore(url).find(TRACE_ID)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)
    with http_server(lambda _path: answer) as (url, _):
        if answer[0] not in (404, 200):
            with pytest.raises(StoreError, match=reason):
                TempoStore(url).complete([Trace(TRACE_ID)])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_answer_is_more_than_a_store_error(data: st.DataObject) -> None:
    """
    Any JSON, and any damage to a real answer, gives traces that can be told, or a StoreError.
    """
    name = data.draw(st.sampled_from(["tempo_trace_v2.json", "tempo_trace_v1.json", "tempo_search.json"]))
    answer = data.draw(any_json() | damaged(recorded(name)))
    body = json.dumps(answer).encode()
    broken = data.draw(st.sampled_from(["/api/search", "/api/v2", "/api"]))
    with http_server(lambda path: (200, body) if path.startswith(broken) else before_2_7(path)) as (url, _):
        try:
            found = TempoStore(url).find(REQUEST_ID)
        except StoreError as error:
            found = list(error.traces)
    for trace in found:
        as_json(trace)


@pytest.mark.parametrize("depth", [300, 1000, 3000])
def test_an_attribute_without_a_bottom_is_a_store_error_at_most(depth: int) -> None:
    """
    How deep JSON may be read depends on Python's version; reading what it holds never ends in a traceback.
    """
    value = '{"arrayValue":{"values":[' * depth + "]}}" * depth
    text = f'{{"trace":{{"resourceSpans":[{{"resource":{{"attributes":[{{"key":"a","value":{value}}}]}}}}]}}}}'
    with http_server(lambda path: (200, b"{}" if "search" in path else text.encode())) as (url, _):
        found, errors = find([TempoStore(url)], TRACE_ID)
    assert found == []
    assert all(url in str(error) for error in errors)
