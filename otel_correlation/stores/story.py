"""
What a trace says: the request that it began with, its spans as a tree, and the cause of a failure.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Final

from otel_correlation.stores.model import trace_to_json
from otel_correlation.stores.tracebacks import frames, is_cut, own_frames, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from otel_correlation.stores.model import Json, LogLine, Span, Trace

_HTTP_FAILURE: Final = 500


@dataclass(frozen=True, slots=True)
class Cause:
    """
    Where and why a trace failed first: the deepest failing service.
    """

    service: str
    # "file:line", with " in function" where known; empty if nothing says.
    place: str
    type: str
    message: str
    span_id: str
    # False when the request as a whole succeeded in spite of this.
    fatal: bool


def entry(trace: Trace) -> Span | None:
    """
    Return the span that the request began with: the earliest SERVER span without a known parent, else the earliest.

    A caller that sends a request again with the same id makes a second one in the same trace: then it is the first that
    failed. One that lies within an earlier one is none: it is a later hop, behind a service that drops the traceparent.
    """
    known = {span.span_id for span in trace.spans}
    roots = [span for span in trace.spans if span.parent_id not in known]
    requests: list[Span] = []
    end_ns = -1
    for span in roots:
        if span.kind == "SERVER" and span.end_ns > end_ns:
            requests.append(span)
            end_ns = span.end_ns
    failed = [span for span in requests if _is_failed(span)]
    return next(iter(failed or requests or roots or trace.spans), None)


def waterfall(trace: Trace) -> list[tuple[int, Span]]:
    """
    Return every span once with its depth, parents before children, siblings by start.

    A parent that the trace does not hold (another store, not sampled) makes its child a root; a cycle of parents, which
    only a broken sender makes, is cut at its earliest span.
    """
    children: dict[str, list[Span]] = {}
    known = {span.span_id for span in trace.spans}
    roots: list[Span] = []
    for span in trace.spans:
        if span.parent_id in known and span.parent_id != span.span_id:
            children.setdefault(span.parent_id, []).append(span)
        else:
            roots.append(span)
    rows: list[tuple[int, Span]] = []
    seen: set[str] = set()
    # The second pass over all spans finds what no root leads to: cycles.
    for root in (*roots, *trace.spans):
        stack = [(0, root)]
        while stack:
            depth, span = stack.pop()
            if span.span_id in seen:
                continue
            seen.add(span.span_id)
            rows.append((depth, span))
            stack.extend((depth + 1, child) for child in reversed(children.get(span.span_id, [])))
    return rows


def cause(trace: Trace) -> Cause | None:
    """
    Return the first cause of what failed in ``trace``, or None if nothing did.

    An error travels up from the service where it began. So the span to look at is the deepest one that failed and whose
    failure reached the entry: every span between the two failed as well, and none of them was tried again with success.
    Its exception is the one recorded on it or on its nearest ancestor in the same service, else one that the service
    logged. Where that says nothing, the deepest failed span of all is asked, and in the end what a span's status says.
    """
    rows = waterfall(_joined(trace))
    begin = entry(trace)
    fatal = begin is not None and _is_failed(begin)
    failed = [(depth, span) for depth, span in rows if _is_failed(span)]
    recorded = [(depth, span) for depth, span in rows if _exceptions(span)]
    reached = _reaching(rows, begin.span_id if begin else "")
    suspects = [_deepest(spans) for spans in (reached, failed, recorded) if spans]
    for span in suspects:
        if why := _exception_of(trace, span, fatal=fatal):
            return why
    if not suspects:
        # No spans at all: the trace was not sampled, and log lines are all there is.
        return _logged(trace, "", fatal=not trace.spans)
    span = suspects[0]
    status = _status(span)
    return Cause(
        service=span.service,
        place=_place("", span.attributes),
        type=_text(span.attributes, "error.type") or (f"HTTP {status}" if status else "error"),
        message=span.status_message,
        span_id=span.span_id,
        fatal=fatal,
    )


def _joined(trace: Trace) -> Trace:
    """
    Return ``trace`` with every hop behind a service that drops the traceparent below the call that it began in.

    Such a hop is a root of its own in the same trace. Which call of another service led to it only time can tell, so
    this is good for finding a cause and for nothing that is shown.
    """
    calls = [span for span in trace.spans if span.kind == "CLIENT"]
    begun = 0
    open_calls = _OpenCalls()
    spans: list[Span] = []
    for span in trace.spans:
        if span.kind == "SERVER" and not span.parent_id:
            # Spans are in the order of their starts.
            while begun < len(calls) and calls[begun].start_ns <= span.start_ns:
                open_calls.begin(calls[begun])
                begun += 1
            call = open_calls.around(span)
            if call is not None:
                span = replace(span, parent_id=call.span_id)  # noqa: PLW2901 - the same span below its call
        spans.append(span)
    return replace(trace, spans=tuple(spans))


class _OpenCalls:
    """
    The calls that have begun, in the order of their starts; each question takes a logarithm of their number.
    """

    def __init__(self) -> None:
        self._number = 0
        # Of each service, the last to begin on top; and on a heap the tops of all, the last to begin first.
        self._by_service: dict[str, list[tuple[int, Span]]] = {}
        self._tops: list[tuple[int, str]] = []

    def begin(self, call: Span) -> None:
        """
        Add a call; it began no earlier than those before.
        """
        self._number -= 1
        self._by_service.setdefault(call.service, []).append((self._number, call))
        heappush(self._tops, (self._number, call.service))

    def around(self, span: Span) -> Span | None:
        """
        Return the last call of another service to begin that has not ended when ``span`` starts, or None.

        Calls that ended before are forgotten: spans that are asked for later start no earlier.
        """
        own: tuple[int, str] | None = None
        found: Span | None = None
        while self._tops and found is None:
            number, service = self._tops[0]
            calls = self._by_service[service]
            if calls[-1:] and calls[-1][0] == number and calls[-1][1].end_ns >= span.start_ns:
                if service != span.service:
                    found = calls[-1][1]
                else:
                    own = heappop(self._tops)
                continue
            heappop(self._tops)
            if calls[-1:] and calls[-1][0] == number:
                calls.pop()
                if calls:
                    heappush(self._tops, (calls[-1][0], service))
        if own is not None:
            heappush(self._tops, own)
        return found


def _reaching(rows: list[tuple[int, Span]], begin: str) -> list[tuple[int, Span]]:
    """
    Return the failed spans that are joined to the entry by failed spans.
    """
    succeeded = {_same_call(span): span.start_ns for _, span in rows if not _is_failed(span)}
    joined: dict[str, tuple[int, Span]] = {}
    for depth, span in rows:
        tried_again = succeeded.get(_same_call(span), -1) >= span.end_ns
        if _is_failed(span) and not tried_again and (span.span_id == begin or span.parent_id in joined):
            joined[span.span_id] = (depth, span)
    return list(joined.values())


def _same_call(span: Span) -> tuple[object, ...]:
    url = _text(span.attributes, "url.full").partition("?")[0]
    return span.parent_id, span.kind, span.service, span.name, url


def _deepest(rows: list[tuple[int, Span]]) -> Span:
    return max(rows, key=lambda row: (row[0], -row[1].end_ns))[1]


def _is_failed(span: Span) -> bool:
    return span.failed or _status(span) >= _HTTP_FAILURE


def _exception_of(trace: Trace, span: Span, *, fatal: bool) -> Cause | None:
    recorded = [(own, event) for own in _same_service_upwards(trace, span) for event in _exceptions(own)]
    if not recorded:
        return _logged(trace, span.service, fatal=fatal)
    own, first = recorded[0]
    why = _cause(own.service, {**_code(own.attributes), **first}, own.span_id, fatal=fatal)
    first_stack = _text(first, "exception.stacktrace")
    if own_frames(first_stack) and not is_cut(first_stack):
        return why
    # The span of a library sees the library's frames only. What its exception became further up, or the line that
    # logged it, knows where the application made the call.
    told = [event for _, event in recorded[1:]] + [
        line.attributes for line in trace.logs if line.service == own.service
    ]
    for stacktrace in (_text(attributes, "exception.stacktrace") for attributes in told):
        if why.type.rpartition(".")[2] in stacktrace and (own_ones := own_frames(stacktrace)):
            return replace(why, place=shown(own_ones[-1]))
    return why


def as_json(trace: Trace) -> dict[str, Json]:
    """
    Return ``trace`` as JSON with what it says: ``entry`` (a span id), ``request_ids``, ``services``, ``cause``.
    """
    begin, why = entry(trace), cause(trace)
    return {
        **trace_to_json(trace),
        "entry": begin.span_id if begin else None,
        "request_ids": list(trace.request_ids),
        "services": list(trace.services),
        "cause": asdict(why) if why else None,
    }


def _same_service_upwards(trace: Trace, span: Span) -> Iterator[Span]:
    by_id = {other.span_id: other for other in trace.spans}
    current: Span | None = span
    # Popping ends a cycle of parents.
    while current is not None and current.service == span.service:
        yield current
        current = by_id.pop(current.parent_id, None)


def _exceptions(span: Span) -> list[Mapping[str, Json]]:
    """
    Return the attributes of the exceptions on ``span``, the last recorded first: it is the one that ended the span.
    """
    return [event.attributes for event in reversed(span.events) if event.name == "exception"]


def _logged(trace: Trace, service: str, *, fatal: bool) -> Cause | None:
    for line in trace.logs:
        if _text(line.attributes, "exception.type") and service in ("", line.service):
            return _cause(line.service, _with_message(line), line.span_id, fatal=fatal)
    return None


def _with_message(line: LogLine) -> Mapping[str, Json]:
    return {"exception.message": line.body, **line.attributes}


def _cause(service: str, attributes: Mapping[str, Json], span_id: str, *, fatal: bool) -> Cause:
    return Cause(
        service=service,
        place=_place(_text(attributes, "exception.stacktrace"), attributes),
        type=_text(attributes, "exception.type") or "exception",
        message=_text(attributes, "exception.message"),
        span_id=span_id,
        fatal=fatal,
    )


def _place(stacktrace: str, attributes: Mapping[str, Json]) -> str:
    """
    Return the application's last frame in ``stacktrace``, else where the code attributes point, else the last frame.
    """
    if is_cut(stacktrace):
        stacktrace = ""
    found = own_frames(stacktrace)
    if not found and "code.file.path" not in attributes:
        found = frames(stacktrace)
    if found:
        return shown(found[-1])
    file = _text(attributes, "code.file.path")
    if not file:
        return ""
    function = _text(attributes, "code.function.name")
    line = attributes.get("code.line.number")
    return f"{file}:{line if isinstance(line, int | str) else '?'}" + (f" in {function}" if function else "")


def _code(attributes: Mapping[str, Json]) -> dict[str, Json]:
    return {key: value for key, value in attributes.items() if key.startswith("code.")}


def _status(span: Span) -> int:
    value = span.attributes.get("http.response.status_code")
    return value if isinstance(value, int) else 0


def _text(attributes: Mapping[str, Json], key: str) -> str:
    value = attributes.get(key)
    return value if isinstance(value, str) else ""
