"""
OTLP decoding: every field, both encodings, and input that is not what it says.
"""

from __future__ import annotations

import contextlib
import gzip
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from otel_correlation.local import otlp
from otel_correlation.stores.bounded import MalformedError, TooBigError
from tests.local_payloads import START_NS, TRACE_ID, as_otlp_json, checkout, log, logs, span, traces

LIMIT = 1000
DECODERS = (otlp.decode_traces, otlp.decode_logs, otlp.check_metrics)


@pytest.mark.parametrize("media", [otlp.PROTOBUF, otlp.JSON])
def test_spans_arrive_as_they_were_sent(media: str) -> None:
    """
    Every field of a span survives both encodings: ids, kind, times, status, attributes with their types, events, links.
    """
    sent = span(
        "a",
        "b",
        "gateway",
        "GET /",
        "PRODUCER",
        (1, 2),
        attributes={"text": "é\u2028", "yes": True, "n": 7, "f": 1.5, "list": ["a", 1], "map": {"k": None}},
        failed=True,
        status_message="why",
        events=checkout().spans[4].events,
        links=((TRACE_ID[::-1], "9" * 16),),
    )
    message = traces([sent, *checkout().spans])
    body = json.dumps(as_otlp_json(message)).encode() if media == otlp.JSON else message.SerializeToString()
    assert otlp.decode_traces(body, media) == otlp.Batch(spans=(sent, *checkout().spans))


@pytest.mark.parametrize("media", [otlp.PROTOBUF, otlp.JSON])
def test_log_lines_arrive_as_they_were_sent(media: str) -> None:
    """
    Every field of a log record survives both encodings.
    """
    message = logs(checkout().logs)
    body = json.dumps(as_otlp_json(message)).encode() if media == otlp.JSON else message.SerializeToString()
    assert otlp.decode_logs(body, media) == otlp.Batch(logs=checkout().logs)


def test_a_span_with_an_invalid_id_is_rejected_alone() -> None:
    """
    Ids of a wrong length, of zeros or of no hex digits cost their own span, are counted, and the sender is told.
    """
    good = as_otlp_json(traces([span("a", "", "s", "n", "SERVER", (0, 1))]))
    spans: list[dict[str, Any]] = good["resourceSpans"][0]["scopeSpans"][0]["spans"]
    for bad in ({"traceId": "0" * 32}, {"traceId": "ab"}, {"spanId": "zz" * 8}, {"spanId": ""}):
        spans.append({**spans[0], **bad})
    batch = otlp.decode_traces(json.dumps(good).encode(), otlp.JSON)
    assert (len(batch.spans), batch.rejected) == (1, 4)
    answer = json.loads(otlp.trace_response(batch, otlp.JSON))
    assert answer["partialSuccess"]["rejectedSpans"] == "4"
    assert answer["partialSuccess"]["errorMessage"]


def test_log_records_without_a_trace_are_taken_and_counted() -> None:
    """
    A start-up line names no trace: that is no fault of the sender, so it is not a rejection; a wrong id is one.
    """
    message = logs([log(0, "s", "kept"), log(0, "s", "start-up", trace_id=""), log(0, "s", "wrong", trace_id="ab")])
    batch = otlp.decode_logs(message.SerializeToString(), otlp.PROTOBUF)
    assert [line.body for line in batch.logs] == ["kept"]
    assert (batch.without_trace, batch.rejected) == (1, 1)


def test_values_that_json_would_change_become_text() -> None:
    """
    Integers beyond 2**53, infinities and bytes reach a browser as text, not as another number.
    """
    message = traces([span("a", "", "s", "n", "SERVER", (0, 1))])
    attributes = message.resource_spans[0].scope_spans[0].spans[0].attributes
    attributes.add(key="big").value.int_value = 2**53 + 1
    attributes.add(key="nan").value.double_value = float("nan")
    attributes.add(key="raw").value.bytes_value = b"\0\xff"
    values = otlp.decode_traces(message.SerializeToString(), otlp.PROTOBUF).spans[0].attributes
    assert (values["big"], values["nan"], values["raw"]) == ("9007199254740993", "nan", "AP8=")


def test_times_beyond_the_range_are_clamped() -> None:
    """
    A sender with broken clocks cannot make a number that the store refuses, nor a negative duration.
    """
    message = traces([span("a", "", "s", "n", "SERVER", (0, 1)), span("b", "", "s", "n", "SERVER", (0, 1))])
    message.resource_spans[0].scope_spans[0].spans[0].end_time_unix_nano = 1
    message.resource_spans[1].scope_spans[0].spans[0].start_time_unix_nano = 2**64 - 1
    first, second = otlp.decode_traces(message.SerializeToString(), otlp.PROTOBUF).spans
    assert first.start_ns == first.end_ns == START_NS
    assert second.start_ns == second.end_ns == 2**63 - 1


def test_members_that_this_version_does_not_know_are_ignored() -> None:
    """
    A newer sender's JSON is read.
    """
    document = as_otlp_json(logs([log(0, "s", "kept")]))
    document["somethingNew"] = {"traceId": ["not", "an", "id"]}
    assert len(otlp.decode_logs(json.dumps(document).encode(), otlp.JSON).logs) == 1


def test_gzip_is_bounded_by_what_comes_out() -> None:
    """
    A small body that inflates beyond the limit is refused before it is in memory; one at the limit is taken.
    """
    assert otlp.decompress(gzip.compress(b"x" * LIMIT), LIMIT) == b"x" * LIMIT
    for bomb in (gzip.compress(b"x" * (LIMIT + 1)), gzip.compress(b"x" * LIMIT) * 2, gzip.compress(b"x" * 50_000_000)):
        with pytest.raises(TooBigError):
            otlp.decompress(bomb, LIMIT)


def test_gzip_of_several_members_is_read() -> None:
    """
    RFC 1952 lets members follow each other.
    """
    assert otlp.decompress(gzip.compress(b"a") + gzip.compress(b"b"), LIMIT) == b"ab"


@given(st.binary(max_size=200))
def test_what_is_no_gzip_is_malformed(body: bytes) -> None:
    """
    Any bytes either inflate or are refused as malformed; nothing else is raised.
    """
    for data in (body, gzip.compress(body)[:-1]):
        with contextlib.suppress(MalformedError):
            assert len(otlp.decompress(data, LIMIT)) <= LIMIT


@given(st.binary(max_size=300), st.sampled_from([otlp.PROTOBUF, otlp.JSON]))
def test_any_bytes_are_read_or_malformed(body: bytes, media: str) -> None:
    """
    No bytes raise anything but MalformedError.
    """
    for decode in DECODERS:
        with contextlib.suppress(MalformedError):
            decode(body, media)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["resourceSpans", "resourceLogs", "scopeSpans", "spans", "traceId", "attributes", "value", "x"]
            ),
            inner,
            max_size=3,
        )
    ),
)


@given(_JSON)
def test_any_json_is_read_or_malformed(document: Any) -> None:
    """
    JSON of any shape, lone surrogates and huge numbers too, raises nothing but MalformedError.
    """
    body = json.dumps(document).encode()
    for decode in DECODERS:
        with contextlib.suppress(MalformedError):
            decode(body, otlp.JSON)


@pytest.mark.parametrize("body", [b"[" * 200_000, b'{"resourceSpans":' * 2000 + b"1" + b"}" * 2000, b'{"a":"\xff"}'])
def test_json_that_would_exhaust_the_parser_is_malformed(body: bytes) -> None:
    """
    Nesting without end and bytes that are no UTF-8 are refused like any other malformed body.
    """
    with pytest.raises(MalformedError):
        otlp.decode_traces(body, otlp.JSON)


def test_metrics_are_checked_and_not_kept() -> None:
    """
    A metrics request is accepted, so that a sender with metrics on is not told to retry.
    """
    body = ExportMetricsServiceRequest().SerializeToString()
    assert otlp.check_metrics(body, otlp.PROTOBUF) == otlp.Batch()
    with pytest.raises(MalformedError):
        otlp.check_metrics(b"\xff", otlp.PROTOBUF)
