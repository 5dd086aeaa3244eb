"""
What ``find`` and the viewer read from strangers takes time that grows with its size, and no faster.

Each reader gets the worst of its own grammar, once and sixteen times as large. Sixteen times the time is linear, 256 is
quadratic; a test fails beyond 64.
"""

from __future__ import annotations

import contextlib
import gc
import gzip
import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from otel_correlation.local import otlp, wire
from otel_correlation.stores import LogLine, Span, Trace, as_json, cause, entry, find, waterfall
from otel_correlation.stores.bounded import MAX_MEMBERS, MalformedError, TooBigError, read_json
from otel_correlation.stores.lines import MAX_REQUEST_IDS, Reader, Wanted, put_exception
from tests.local_payloads import REQUEST_ID, TRACE_ID, log, span

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TIMES = 16
TOO_MUCH = 64.0
# Below this a clock and a scheduler tell more of themselves than of the code.
ENOUGH_S = 0.003


def seconds(work: Callable[[], object], runs: int = 3) -> float:
    """
    Returns the least CPU time of some runs, without what other threads and the garbage collector took.
    """
    taken: list[float] = []
    gc.disable()
    try:
        for _ in range(runs):
            begin = time.thread_time()
            work()
            taken.append(time.thread_time() - begin)
    finally:
        gc.enable()
    return min(taken)


def check(make: Callable[[int], Callable[[], object]], size: int) -> None:
    """
    Fails if 16 times ``size`` takes much more than 16 times the time; a size that takes no time is made larger.
    """
    while (small := seconds(make(size))) < ENOUGH_S and size < 1_000_000:
        size *= 4
    large = seconds(make(size * TIMES), 1)
    if large > small * TOO_MUCH:
        large = seconds(make(size * TIMES))
    assert large < small * TOO_MUCH, f"{size}: {small:.3f} s, {size * TIMES}: {large:.3f} s"


def stack_of(token: str) -> Callable[[int], str]:
    return lambda size: token * (size // len(token))


STACKS: dict[str, Callable[[int], str]] = {
    "line feeds": stack_of("\n"),
    "blank lines": stack_of(" \n"),
    "spaces": stack_of(" "),
    "bars": stack_of("| + "),
    "unclosed files": stack_of('  File "'),
    "unclosed files on lines": stack_of('\n  File "'),
    "one long name": lambda size: '  File "' + "a" * size,
    "a long number": lambda size: '  File "a", line ' + "1" * size + "x",
    "a long function": lambda size: '  File "a", line 1, in ' + " " * size,
    "frames": stack_of('  File "/srv/a.py", line 1, in f\n'),
    "foreign frames": stack_of(
        '  File "/python3.1/python3.11111',
    ),
    "errors": stack_of("ValueError: x\n"),
    "dots": lambda size: "Traceback (most recent call last):\n" + "a." * size + "!",
}


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_trace_is_looked_at_once(name: str) -> None:
    """
    The text of an exception, for the cause of a trace and where it follows a line of a file.
    """

    def make(size: int) -> Callable[[], object]:
        stack = STACKS[name](size)
        attributes = {"exception.type": "E", "exception.stacktrace": stack}
        failed = span("a", "", "s", "GET /", "SERVER", (0, 1), failed=True)
        trace = Trace.of(TRACE_ID, [failed], [log(0, "s", "x", attributes=attributes)])

        def work() -> None:
            cause(trace)
            put_exception({}, stack)

        return work

    check(make, 2000)


LINES: dict[str, Callable[[int], str]] = {
    "names": stack_of("trace_id "),
    "names with spaces": stack_of("request_id" + " " * 90),
    "one name, spaces": lambda size: "trace_id=" + " " * size,
    "spaces on both sides": lambda size: "trace_id" + " " * size + "=" + " " * size,
    "traceparents": stack_of("00-" + "0" * 32 + "-"),
    "hex": stack_of("0af7651916cd43dd"),
    "values": lambda size: "request_id=" + "a" * size,
    "braces": stack_of("{"),
    "objects": stack_of('{"a":'),
    "closed objects": lambda size: '{"a":[' + "{}," * size + "{}]}",
    "escapes": lambda size: '{"a":"' + '\\"' * size,
    "own text": lambda size: "12:00:00.000 INFO " + " " * size,
}


@pytest.mark.parametrize("name", LINES)
def test_a_log_line_is_looked_at_once(name: str) -> None:
    """
    Lines of files and of Loki, as text and as JSON.
    """

    def make(size: int) -> Callable[[], object]:
        text = f"{LINES[name](size)} {REQUEST_ID}"
        return lambda: Reader().read(text, Wanted.by(REQUEST_ID), "s", 0)

    check(make, 2000)


def test_the_request_ids_of_a_trace_are_not_all_looked_for() -> None:
    """
    Each line is searched for each id: a trace with thousands of them makes no search of millions.
    """
    lines = [log(0, "s", "x", attributes={"request_id": f"{number:032x}"}) for number in range(5000)]
    wanted = Wanted.of([Trace.of(TRACE_ID, [], lines), Trace(TRACE_ID)])
    assert len(wanted.request_ids) == MAX_REQUEST_IDS
    assert f"{0:032x}" in wanted.request_ids


def spans(size: int, parent: Callable[[int], str], **more: object) -> list[Span]:
    made = span("a", "", "s", "GET", "SERVER", (0, 1))
    return [
        replace(made, span_id=f"{n:016x}", parent_id=parent(n), start_ns=n, end_ns=n + size, **more)  # type: ignore[arg-type]
        for n in range(1, size + 1)
    ]


def calls_and_hops(size: int, services: int, length: int) -> list[Span]:
    """
    Returns calls, each followed by a hop of some service that lost its parent.
    """
    made = spans(2 * size, lambda _: "")
    return [
        replace(
            one,
            kind="SERVER" if number % 2 else "CLIENT",
            service=f"s{number // 2 % services}",
            end_ns=one.start_ns + length,
            failed=True,
        )
        for number, one in enumerate(made)
    ]


TRACES: dict[str, Callable[[int], Sequence[Span]]] = {
    "a chain": lambda size: spans(size, lambda n: f"{n - 1:016x}", failed=True),
    "a star": lambda size: spans(size, lambda _: f"{1:016x}", failed=True),
    "a cycle": lambda size: spans(size, lambda n: f"{n % size + 1:016x}", failed=True),
    "roots": lambda size: spans(size, lambda _: "", failed=True),
    "calls that never end": lambda size: calls_and_hops(size, 1, 10**9),
    "calls of two services": lambda size: calls_and_hops(size, 2, 10**9),
    "calls of many services": lambda size: calls_and_hops(size, size, 10**9),
    "calls that end at once": lambda size: calls_and_hops(size, 7, 0),
    "calls within calls": lambda size: [
        *(replace(one, kind="CLIENT", end_ns=10**9 - n) for n, one in enumerate(spans(size, lambda _: ""))),
        *(
            replace(one, span_id=f"f{n:015x}", service="t", start_ns=10**9 - size + n, end_ns=10**9)
            for n, one in enumerate(spans(size, lambda _: ""))
        ),
    ],
}


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_is_told_in_the_time_that_its_spans_take(name: str) -> None:
    """
    Its entry, its waterfall, its cause and its JSON, however its spans hang together.
    """

    def make(size: int) -> Callable[[], object]:
        trace = Trace.of(TRACE_ID, TRACES[name](size), ())

        def work() -> None:
            entry(trace)
            waterfall(trace)
            cause(trace)
            as_json(trace)

        return work

    check(make, 250)


class Stub:
    """
    A store that has what it was given.
    """

    is_whole: ClassVar[bool] = True
    name = "a stub"

    def __init__(self, traces: list[Trace]) -> None:
        self._traces = traces

    def find(self, _wanted: str, /) -> list[Trace]:
        return self._traces

    def complete(self, _known: Sequence[Trace], /) -> list[Trace]:
        return []


def line(number: int, trace_id: str) -> LogLine:
    return replace(log(number, "s", f"line {number}", trace_id=trace_id), time_ns=number * 1000)


ANSWERS: dict[str, Callable[[int], list[Trace]]] = {
    "halves of trace ids": lambda size: [Trace.of(f"{n:032x}", (), [line(n, f"{n:032x}")]) for n in range(1, size)],
    "halves and wholes": lambda size: [
        Trace.of(one, (), [line(n, one)]) for n in range(1, size) for one in (f"{n:032x}", f"1{n:031x}")
    ],
    "one trace many times": lambda size: [Trace.of(TRACE_ID, (), [line(n, TRACE_ID)]) for n in range(size)],
    "lines without a trace": lambda size: [
        *(Trace.of(f"1{n:031x}", (), [line(n, f"1{n:031x}")]) for n in range(size)),
        Trace.of("", (), [line(n, "") for n in range(size)]),
    ],
    "lines beside one large trace": lambda size: [
        Trace.of(TRACE_ID, spans(size, lambda _: ""), [line(n, TRACE_ID) for n in range(size)]),
        Trace.of("", (), [line(n, "") for n in range(size)]),
    ],
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_of_stores_are_put_together_once(name: str) -> None:
    """
    Thousands of traces, halves of ids and lines that name none do not meet each other one by one.
    """

    def make(size: int) -> Callable[[], object]:
        store = Stub(ANSWERS[name](size))
        return lambda: find([store], REQUEST_ID)

    check(make, 250)


@pytest.mark.parametrize("token", ["[", '"', '\\"', '"\\\\",', '"",', '{"a":', "\\", ",", "1", "[],", '"{'])
@pytest.mark.parametrize("begin", ["[", '"'])
def test_json_is_looked_at_once(begin: str, token: str) -> None:
    """
    Nested, unclosed and empty forms alike; what is refused is refused in that time, too.
    """

    def make(size: int) -> Callable[[], object]:
        text = (begin + token * (size // len(token))).encode()

        def work() -> None:
            with contextlib.suppress(MalformedError, TooBigError):
                read_json(text, max_values=10_000_000)

        return work

    check(make, 80_000)


def test_json_is_refused_before_it_is_in_memory() -> None:
    """
    Values and levels are counted outside of texts, each exactly, before anything is made of them.
    """
    for text, values in (('{"a,[{": ["\\",", {}, [1]]}', 6), ("[]", 1), ('["\\\\",1,2]', 3), ("1", 0)):
        assert read_json(text, max_values=values) == json.loads(text)
        if values:
            with pytest.raises(TooBigError):
                read_json(text, max_values=values - 1)
    assert read_json("[" * 100 + "]" * 100, max_values=1000)
    for deep in ("[" * 101 + "]" * 101, '{"a":' * 101 + "1" + "}" * 101):
        with pytest.raises(MalformedError, match="levels"):
            read_json(deep, max_values=1000)


def test_gzip_members_are_bounded() -> None:
    """
    Members that hold nothing are bounded: zlib copies what is left of its input at the end of each.
    """
    empty = gzip.compress(b"")
    assert otlp.decompress(empty * MAX_MEMBERS, 10) == b""
    with pytest.raises(TooBigError, match="members"):
        otlp.decompress(empty * (MAX_MEMBERS + 1), 10)


def nested(levels: int) -> bytes:
    body = b""
    for number in range(levels):
        tag = b"\x0a" if number % 2 else b"\x2a"
        body = tag + len(body).to_bytes(1, "big") + body if len(body) < 128 else tag + varint(len(body)) + body
    return body


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


PROTOBUF = {
    "empty messages": b"\x0a\x00",
    "numbers": b"\x20\x01",
    "unknown texts": b"\x7a\x00",
    "long numbers": b"\x20" + b"\x80" * 9 + b"\x01",
    "eight bytes": b"\x39" + b"\0" * 8,
    "lengths beyond the end": b"\x0a\xff\xff\xff\xff\x0f",
}


@pytest.mark.parametrize("name", PROTOBUF)
def test_protobuf_is_counted_once(name: str) -> None:
    """
    The count of fields is linear, and ends at its bounds.
    """
    shape = wire.Shape(ExportTraceServiceRequest.DESCRIPTOR)

    def make(size: int) -> Callable[[], object]:
        body = PROTOBUF[name] * (size // len(PROTOBUF[name]))

        def work() -> None:
            with contextlib.suppress(MalformedError):
                wire.check(body, shape, max_fields=10**9, max_records=10**9)

        return work

    check(make, 20_000)


def test_protobuf_is_refused_before_it_is_in_memory() -> None:
    """
    One field, one record or one level too much is refused; attributes are fields and no records.
    """
    shape = wire.Shape(ExportTraceServiceRequest.DESCRIPTOR)
    request = ExportTraceServiceRequest()
    proto = request.resource_spans.add().scope_spans.add().spans.add(name="x")
    proto.attributes.add(key="k").value.string_value = "v"
    proto.attributes.add(key="k").value.array_value.values.add().int_value = 1
    body = request.SerializeToString()
    # Three messages around the name and two attributes; of these a key, a value and what is in it.
    fields, records = 3 + 1 + 2 * 3 + 1 + 3, 3
    wire.check(body, shape, max_fields=fields, max_records=records)
    for bounds in ((fields - 1, records), (fields, records - 1)):
        with pytest.raises(TooBigError):
            wire.check(body, shape, max_fields=bounds[0], max_records=bounds[1])
    for wrong in (body[:-1], body + b"\x0a", b"\x0b", b"\x20" + b"\xff" * 10 + b"\x01"):
        with pytest.raises(MalformedError):
            wire.check(wrong, shape, max_fields=100, max_records=100)


@pytest.mark.parametrize("levels", [10, 200, 20_000])
def test_protobuf_that_is_nested_without_end_is_malformed(levels: int) -> None:
    """
    Lists within lists end somewhere; none ends the process.
    """
    value = nested(levels)
    body = b""
    for tag, content in ((b"\x12", value), (b"\x4a", b""), (b"\x12", b""), (b"\x12", b""), (b"\x0a", b"")):
        body = tag + varint(len(content or body)) + (content or body)
    if levels == 10:
        assert otlp.decode_traces(body, otlp.PROTOBUF).rejected == 1
        return
    with pytest.raises(MalformedError):
        otlp.decode_traces(body, otlp.PROTOBUF)
