"""
What a trace says: the request that it began with, its spans as a tree, and the cause of a failure.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from otel_correlation.stores.model import trace_to_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from otel_correlation.stores.model import Json, LogLine, Span, Trace

# A frame of a traceback as CPython prints it; an exception group puts "| " in front.
_FRAME: Final = re.compile(
    r'^[\s|+]*File "(?P<file>[^"\n]+)", line (?P<line>\d+)(?:, in (?P<function>.+))?$', re.MULTILINE
)
# Frames of installed packages, of ours, of the standard library and of generated code are not the application's.
_FOREIGN: Final = re.compile(r"[/\\](?:site-packages|dist-packages|otel_correlation|python\d\.\d+t?)[/\\]|^<")
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
    """
    known = {span.span_id for span in trace.spans}
    roots = [span for span in trace.spans if span.parent_id not in known]
    servers = [span for span in roots if span.kind == "SERVER"]
    return next(iter(servers or roots or trace.spans), None)


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

    The deepest failed span names the service: an error travels up from there. Its exception is the one recorded on
    that span or on the nearest ancestor in the same service, else one that the service logged, else what the span's
    status says.
    """
    rows = waterfall(trace)
    failed = [(depth, span) for depth, span in rows if span.failed or _exceptions(span)]
    if not failed:
        return _logged(trace, "", fatal=False)
    deepest = max(failed, key=lambda row: (row[0], -row[1].end_ns))[1]
    begin = entry(trace)
    fatal = begin is not None and (begin.failed or _status(begin) >= _HTTP_FAILURE)
    for span in _same_service_upwards(trace, deepest):
        for attributes in _exceptions(span):
            return _cause(span.service, {**_code(span.attributes), **attributes}, span.span_id, fatal=fatal)
    if logged := _logged(trace, deepest.service, fatal=fatal):
        return logged
    status = _status(deepest)
    return Cause(
        service=deepest.service,
        place=_place("", deepest.attributes),
        type=_text(deepest.attributes, "error.type") or (f"HTTP {status}" if status else "error"),
        message=deepest.status_message,
        span_id=deepest.span_id,
        fatal=fatal,
    )


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
    frames = list(_FRAME.finditer(stacktrace))
    own = [frame for frame in frames if not _FOREIGN.search(frame["file"])]
    if own or (frames and "code.file.path" not in attributes):
        frame = (own or frames)[-1]
        function = f" in {frame['function']}" if frame["function"] else ""
        return f"{frame['file']}:{frame['line']}{function}"
    file = _text(attributes, "code.file.path")
    if not file:
        return ""
    function = _text(attributes, "code.function.name")
    return f"{file}:{attributes.get('code.line.number', '?')}" + (f" in {function}" if function else "")


def _code(attributes: Mapping[str, Json]) -> dict[str, Json]:
    return {key: value for key, value in attributes.items() if key.startswith("code.")}


def _status(span: Span) -> int:
    value = span.attributes.get("http.response.status_code")
    return value if isinstance(value, int) else 0


def _text(attributes: Mapping[str, Json], key: str) -> str:
    value = attributes.get(key)
    return value if isinstance(value, str) else ""
