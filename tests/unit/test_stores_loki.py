"""
Loki's answers, recorded from Loki 3.7.6, and whatever else may stand behind its URL.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from otel_correlation.stores import LogLine, Span, StoreError, Trace, as_json, cause
from otel_correlation.stores import loki as module
from otel_correlation.stores.loki import LokiStore
from tests.http_answers import Answer, any_json, damaged, http_server
from tests.local_payloads import START_NS

ANSWERS = Path(__file__).parent / "answers"
TRACE_ID = "1eaedd495dde8d43dfc6f8ab9a678023"
REQUEST_ID = "tempo-quote/2026#000999"
STDOUT_ID = "file-quote/2026=000777"
HOUR_NS = 3600 * 10**9
EMPTY = {"status": "success", "data": {"resultType": "streams", "result": []}}


def recorded(name: str) -> Any:
    return json.loads((ANSWERS / name).read_text())


def asked_for(path: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(path).query).items()}


def body(document: Any) -> Answer:
    return 200, json.dumps(document).encode()


def loki(path: str) -> Answer:
    if not path.startswith("/loki/api/v1/query_range?"):
        return 404, b"404 page not found"
    query = asked_for(path)["query"]
    if "|=" in query:
        return body(recorded("loki_stdout.json") if STDOUT_ID in query else EMPTY)
    return body(recorded("loki_otlp.json") if REQUEST_ID in query or TRACE_ID in query else EMPTY)


@pytest.mark.parametrize("name", ["loki_otlp.json", "loki_otlp_flat.json"])
def test_lines_that_came_over_otlp(name: str) -> None:
    """
    Structured metadata, apart from the labels or (before Loki 2.9) among them, becomes ids, severity, logger, exception.
    """
    with http_server(lambda path: body(EMPTY if "|=" in path else recorded(name))) as (url, _):
        (trace,) = LokiStore(url).find(TRACE_ID)
    assert trace.trace_id == TRACE_ID
    _, order, error, summary = trace.logs
    assert order.body == 'order 7 "quoted"\nsecond line é'
    assert (order.severity, order.logger, order.service) == ("INFO", "shop.orders", "orders")
    assert (order.span_id, order.request_id) == ("b8cb0a57338e1810", REQUEST_ID)
    assert order.attributes["code.file.path"] == "/srv/orders.py"
    assert order.attributes["user_id"] == "u-7"
    assert not {"service_version", "flags", "observed_timestamp", "trace_id"} & set(order.attributes)
    assert error.attributes["exception.type"] == "ZeroDivisionError"
    assert summary.body.startswith("GET /orders/{n} 500")
    why = cause(trace)
    assert why is not None
    assert (why.place, why.message) == ("/srv/orders.py:13 in orders", "integer division or modulo by zero")


def test_lines_that_an_agent_read_from_stdout() -> None:
    """
    Where the line itself is JSON or text, the ids are in it: ours, and a proxy's that names the request alone.
    """
    with http_server(loki) as (url, _):
        found = {trace.trace_id: trace for trace in LokiStore(url).find(STDOUT_ID)}
    assert set(found) == {"55d555e43d473da873eb867e03eb5cd8", "38e07538fd461e78aace4a3631e2150f", ""}
    order, error, _ = found["55d555e43d473da873eb867e03eb5cd8"].logs
    assert (order.service, order.logger, order.severity) == ("otel", "shop.orders", "INFO")
    assert order.body == 'order 7 "quoted"\nsecond line é'
    assert error.attributes["exception.type"] == "ZeroDivisionError"
    (proxy,) = found[""].logs
    assert (proxy.service, proxy.request_id, proxy.attributes["status"]) == ("nginx", STDOUT_ID, 502)
    assert proxy.time_ns == 1795259965444748596
    text = found["38e07538fd461e78aace4a3631e2150f"].logs
    assert {line.severity for line in text} == {"INFO", "ERROR"}


def test_what_is_asked() -> None:
    """
    Metadata by field and lines by text, of the last seven days, the newest first, in pages that Loki allows.
    """
    with http_server(loki) as (url, asked):
        LokiStore(url).find("order-7781-customer-quote")
    first, second = map(asked_for, asked)
    trace_id = "2c067d76d971e5850bb82d8a96aa53dc"
    assert first["query"] == (
        f'{{service_name=~".+"}} | trace_id="{trace_id}" or request_id="order-7781-customer-quote"'
    )
    assert second["query"].startswith('{service_name=~".+"} |= "order-7781-customer-quote" or "2c067d76')
    assert (first["direction"], first["limit"]) == ("backward", "1000")
    assert 7 * 24 * HOUR_NS < int(first["end"]) - int(first["start"]) < 8 * 24 * HOUR_NS


def test_a_short_id_is_searched_behind_the_name_of_one() -> None:
    """
    "42" stands in every other line; only one that calls it a request id is fetched.
    """
    with http_server(loki) as (url, asked):
        LokiStore(url, ("request_id=req.no",)).find("4.2")
    assert asked_for(asked[0])["query"].endswith('| request_id="4.2"')
    assert r"""|~ "(?i)(?:req\\.no|request_id|""" in asked_for(asked[1])["query"]
    assert asked_for(asked[1])["query"].endswith(r'\\W{1,8}4\\.2(?:\\W|$)"')


def test_an_id_cannot_leave_its_quotes() -> None:
    """
    Whatever is asked for is one string of LogQL.
    """
    with http_server(loki) as (url, asked):
        assert LokiStore(url).find('x" or "1"="1') == []
    assert asked_for(asked[0])["query"].endswith(r'| request_id="x\" or \"1\"=\"1"')


def test_known_traces_are_looked_for_around_their_time() -> None:
    """
    What other stores found says when: an hour around it is asked for, by trace ids and by request ids that lead to one.
    """
    request = {"request_id": REQUEST_ID}
    span = Span(TRACE_ID, "b" * 16, "", "s", "n", "SERVER", START_NS, START_NS + 5, attributes=request)
    line = LogLine(TRACE_ID, "", START_NS + 9, "INFO", "s", "l", "b", {"request_id": "42"})
    with http_server(loki) as (url, asked):
        (trace,) = LokiStore(url).complete([Trace.of(TRACE_ID, [span], [line])])
    assert len(trace.logs) == 4
    query = asked_for(asked[0])
    assert query["query"].endswith(f'| trace_id="{TRACE_ID}" or request_id="{REQUEST_ID}"')
    assert int(query["end"]) == START_NS + 9 + HOUR_NS
    assert int(query["start"]) <= START_NS


@pytest.mark.parametrize("age_days", [-400, 0, 90])
def test_no_clock_makes_a_range_that_loki_refuses(age_days: int) -> None:
    """
    Old traces are looked for at their time; one from the future, whose clock is wrong, up to now. Loki takes 721 hours.
    """
    now_ns = time.time_ns()
    line = LogLine(TRACE_ID, "", now_ns - age_days * 24 * HOUR_NS, "INFO", "s", "l", "b")
    for more in ((), (LogLine(TRACE_ID, "", 2**63 - 1, "INFO", "s", "l", "b"),)):
        with http_server(loki) as (url, asked):
            LokiStore(url).complete([Trace(TRACE_ID, (), (line, *more))])
        begin_ns, end_ns = (int(asked_for(asked[0])[name]) for name in ("start", "end"))
        assert 0 < end_ns - begin_ns <= 721 * HOUR_NS
        assert end_ns <= time.time_ns() + HOUR_NS
        assert more or age_days < 0 or begin_ns < line.time_ns < end_ns


def test_pages_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A full page is followed by the one before it, without a line lost at the seam or told twice.
    """
    monkeypatch.setattr(module, "PAGE", 3)
    metadata = {"structuredMetadata": {"trace_id": TRACE_ID, "observed_timestamp": "1"}}
    stored = [(START_NS + at, f"line {number}") for number, at in enumerate((0, 1, 2, 2, 3, 4, 5))]

    def paged(path: str) -> Answer:
        query = asked_for(path)
        inside = [entry for entry in stored if int(query["start"]) <= entry[0] < int(query["end"])]
        page = sorted(inside, reverse=True)[: int(query["limit"])]
        values = [[str(time_ns), text, metadata] for time_ns, text in page]
        stream = {"stream": {"service_name": "s"}, "values": values}
        return body({"data": {"result": [stream] if "|=" not in query["query"] else []}})

    known = Trace(TRACE_ID, (), (LogLine(TRACE_ID, "", START_NS, "", "s", "", ""),))
    with http_server(paged) as (url, asked):
        (trace,) = LokiStore(url).complete([known])
        assert [line.body for line in trace.logs] == [text for _, text in stored]
        assert len(asked) == 5
        monkeypatch.setattr(module, "MAX_LINES", 4)
        with pytest.raises(StoreError, match="more than 4 lines") as caught:
            LokiStore(url).complete([known])
        (newest,) = caught.value.traces
        assert newest.logs[-1].body == "line 6"
        # One nanosecond with more lines than a page has is passed.
        stored[:] = [(START_NS, f"line {number}") for number in range(5)]
        monkeypatch.setattr(module, "MAX_LINES", 1000)
        (some,) = LokiStore(url).complete([known])
        assert len(some.logs) == 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((200, b"<html>"), "did not answer with JSON"),
        ((200, b"[]"), "did not answer as Loki does"),
        ((200, b'{"data": {"result": [{"values": [["1"]]}]}}'), "did not answer as Loki does"),
        ((200, b'{"data": {"result": [{"values": [["x", "y"]]}]}}'), "did not answer as Loki does"),
        ((404, b""), "something else than Loki"),
        ((400, b"max entries limit per query exceeded"), r"\(max entries limit per query exceeded\)$"),
    ],
)
def test_an_answer_that_is_none_of_loki_is_one_line(answer: Answer, reason: str) -> None:
    """
    The line names the address and what is wrong.
    """
    with http_server(lambda _path: answer) as (url, _), pytest.raises(StoreError, match=reason) as caught:
        LokiStore(url).find(TRACE_ID)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_answer_is_more_than_a_store_error(data: st.DataObject) -> None:
    """
    Any JSON, and any damage to a real answer, gives traces that can be told, or a StoreError.
    """
    name = data.draw(st.sampled_from(["loki_otlp.json", "loki_otlp_flat.json", "loki_stdout.json"]))
    answer = data.draw(any_json() | damaged(recorded(name)))
    with http_server(lambda _path: body(answer)) as (url, _):
        try:
            found = LokiStore(url).find(STDOUT_ID if "stdout" in name else TRACE_ID)
        except StoreError as error:
            found = list(error.traces)
    for trace in found:
        as_json(trace)
