"""
``otel-correlation find ID``: the request, the cause, the waterfall, the log lines, and where it looked.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from otel_correlation.cli import FAILED, OK, USAGE, CommandError
from otel_correlation.cli.terminal import Screen, safe
from otel_correlation.request_id import MIN_ROOT_LENGTH, parse
from otel_correlation.semconv import OTEL_CORRELATION_STORES
from otel_correlation.settings import from_environment
from otel_correlation.stores import StoreError, as_json, cause, configured, entry, find, waterfall
from otel_correlation.stores.client import trace_id_of
from otel_correlation.stores.embedded import EmbeddedStore

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from otel_correlation.stores import Cause, LogLine, Span, Store, Trace

# Traces told in full; of more only one line each.
MAX_TOLD: Final = 3
_WIDEST_BAR: Final = 28
# Levels that are indented, as on the page: a chain of thousands of spans is no picture.
_DEEPEST: Final = 12
_FAILURE: Final = 500
_HEAD: Final = "bold"
_SOFT: Final = "dim"
_BAD: Final = "bold red"


def run(arguments: argparse.Namespace) -> int:
    """
    Print what the stores know of an id; return 0 if found, 1 if not, 2 if a store could not be asked.
    """
    # What is no text in the terminal's encoding becomes visible escapes.
    wanted = arguments.id.strip().encode("utf-8", "backslashreplace").decode()
    if not wanted:
        raise CommandError("the id is empty: give the X-Request-ID of a response, or a trace id")
    try:
        settings = from_environment(os.environ)
        stores = configured(settings.stores, settings.log_fields)
    except StoreError as error:
        raise CommandError(str(error)) from error
    traces, errors = find(stores, wanted)
    if arguments.json:
        answer = {
            "id": wanted,
            "traces": [as_json(trace) for trace in traces],
            "looked_in": [store.name for store in stores],
            "errors": [str(error) for error in errors],
        }
        # ASCII: no byte of the telemetry reaches a terminal as it came.
        try:
            print(json.dumps(answer, indent=2))
        except RecursionError:
            # Python 3.12 reads deeper than it writes.
            raise CommandError("an attribute is nested too deeply for --json; without it the rest is told") from None
    elif traces:
        tell(Screen(), wanted, traces, stores, errors)
    elif not errors:
        _tell_nothing(Screen(), wanted, stores)
    if traces:
        return OK
    if errors and not arguments.json:
        start = "start it with `otel-correlation serve`, or " if _has_embedded(stores) else ""
        raise CommandError(safe("; ".join(map(str, errors)) + f" ({start}set {OTEL_CORRELATION_STORES})"))
    return USAGE if errors else FAILED


def tell(
    screen: Screen, wanted: str, traces: Sequence[Trace], stores: Sequence[Store], errors: Sequence[StoreError]
) -> None:
    """
    Print the newest traces in full and the others as one line each.
    """
    for trace in traces[:MAX_TOLD]:
        _tell_trace(screen, trace, has_spans=any(store.is_whole for store in stores))
        screen.line()
    for number, trace in enumerate(traces[MAX_TOLD:]):
        if not number:
            screen.line((f"Also for {wanted}", _HEAD))
        begin = entry(trace)
        screen.line("  ", trace.trace_id or "no trace id", "  ", _title(begin) if begin else "log lines only")
    spans, lines = sum(len(trace.spans) for trace in traces), sum(len(trace.logs) for trace in traces)
    screen.line(
        (f"Looked in {'; '.join(store.name for store in stores)}: ", _SOFT),
        (", ".join((_count(len(traces), "trace"), _count(spans, "span"), _count(lines, "log line"))), _SOFT),
    )
    for error in errors:
        screen.line((f"Not complete: {error}", _BAD))
    if not lines and _has_embedded(stores):
        screen.line(("Next: services send their log lines here with OTEL_LOGS_EXPORTER=otlp", _SOFT))
    elif not lines and all(store.is_whole for store in stores):
        where = f"name it in {OTEL_CORRELATION_STORES} too, as loki=URL or logs=FILES"
        screen.line((f"Next: search for {wanted} where your services' log lines go, or {where}", _SOFT))
    elif len(traces) > 1:
        screen.line(("Next: one of them alone by its trace id: otel-correlation find TRACE_ID", _SOFT))
    else:
        page = ", or on the viewer's page" if _has_embedded(stores) else ""
        screen.line((f"Next: all attributes with `otel-correlation find {wanted} --json`{page}", _SOFT))


def _has_embedded(stores: Sequence[Store]) -> bool:
    return any(isinstance(store, EmbeddedStore) for store in stores)


def _tell_trace(screen: Screen, trace: Trace, *, has_spans: bool) -> None:
    begin = entry(trace)
    if begin is None:
        why = "the trace was not sampled, or its spans went elsewhere" if has_spans else "no store of spans was asked"
        screen.line((f"Log lines only: {why}", _HEAD))
    else:
        screen.line(
            (_title(begin), _BAD if _failed(begin) else _HEAD),
            f"  {_took(begin)}  {_time(begin.start_ns)}  {begin.service}",
        )
    screen.line(("request id  ", _SOFT), ", ".join(trace.request_ids) or "none")
    if sent := trace.caller_request_ids:
        screen.line(("caller sent ", _SOFT), ", ".join(sent), (" (not trusted)", _SOFT))
    screen.line(("trace id    ", _SOFT), trace.trace_id or "none: no line names one")
    if first := cause(trace):
        _tell_cause(screen, first)
    if trace.spans:
        _tell_waterfall(screen, trace)
    _tell_logs(screen, trace)


def _tell_cause(screen: Screen, why: Cause) -> None:
    screen.line()
    screen.line(("Cause", _BAD) if why.fatal else ("Handled on the way (the request succeeded)", _HEAD))
    screen.line("  ", (why.service, _HEAD), "  ", why.place)
    for number, text in enumerate(f"{why.type}: {why.message}".rstrip(": ").splitlines()):
        screen.line("  ", (text, _BAD if number == 0 else ""))


def _tell_waterfall(screen: Screen, trace: Trace) -> None:
    rows = waterfall(trace)
    begin = min(span.start_ns for span in trace.spans)
    total = max(span.end_ns for span in trace.spans) - begin or 1
    labels = [f"{'  ' * min(depth, _DEEPEST)}{span.service}  {_short(span)}" for depth, span in rows]
    bar = min(_WIDEST_BAR, screen.width // 4)
    width = min(max(map(len, labels)), max(screen.width - bar - 21, 24))
    screen.line()
    screen.line(("Waterfall", _HEAD))
    for label, (_, span) in zip(labels, rows, strict=True):
        left = min(int((span.start_ns - begin) / total * bar), bar - 1)
        length = max(1, min(round((span.end_ns - span.start_ns) / total * bar), bar - left))
        cut = label if len(label) <= width else label[: width - 1] + "…"
        style = "red" if _failed(span) else "cyan"
        screen.line(
            "  ",
            (cut.ljust(width), _BAD if _failed(span) else ""),
            "  ",
            (" " * left + "━" * length, style),
            " " * (bar - left - length),
            f" {_took(span):>10}",
            (f"  {_status(span) or ('failed' if _failed(span) else '')}", style),
        )


def _tell_logs(screen: Screen, trace: Trace) -> None:
    screen.line()
    screen.line((f"Log lines ({len(trace.logs)})" if trace.logs else "Log lines: none received", _HEAD))
    service = max((len(line.service) for line in trace.logs), default=0)
    for line in trace.logs:
        first, *rest = line.body.splitlines() or [""]
        style = _BAD if line.severity.upper() in ("ERROR", "FATAL", "CRITICAL") else ""
        screen.line(
            "  ",
            (_clock(line.time_ns) if line.time_ns else " " * 12, _SOFT),
            f" {line.severity:<7.7} ",
            (line.service.ljust(service), _HEAD),
            " ",
            (first, style),
        )
        for text in rest:
            screen.line("    ", text)
        for text in _exception_of(line):
            screen.line("    ", (text, _SOFT))


def _exception_of(line: LogLine) -> list[str]:
    """
    Return the last line of a logged traceback: what was raised. The whole of it is in ``--json``.
    """
    kind, message = (line.attributes.get(f"exception.{key}") for key in ("type", "message"))
    if not isinstance(kind, str):
        return []
    return f"{kind}: {message if isinstance(message, str) else ''}".rstrip(": ").splitlines()[:1]


def _tell_nothing(screen: Screen, wanted: str, stores: Sequence[Store]) -> None:
    screen.line((f"Nothing found for {wanted}", _HEAD))
    screen.line(f"Looked in {'; '.join(store.name for store in stores)}")
    trace_id = trace_id_of(wanted) if parse(wanted.encode()) else None
    if parse(wanted.encode()) is None:
        screen.line(
            "  - this is no valid request id: the service has replaced it; take the X-Request-ID of the response"
        )
    elif trace_id is None:
        screen.line(
            f"  - an id of fewer than {MIN_ROOT_LENGTH} characters never names a trace; "
            "it was searched as the attribute request_id"
        )
    else:
        screen.line(
            f"  - looked up as trace id {trace_id} too; a caller that also sent a traceparent has another trace id"
        )
    screen.line("  - the trace may not be sampled: OTEL_TRACES_SAMPLER, OTEL_TRACES_SAMPLER_ARG of the service")
    screen.line("  - its exporter may send elsewhere, or not at all: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_EXPORTER")
    screen.line(
        "  - the request may be older than what the store keeps, or too young: a collector that samples whole traces "
        "keeps them back for ten seconds, and Tempo may hide the last half minute"
    )
    elsewhere = f"{OTEL_CORRELATION_STORES} names other stores"
    screen.line((f"Next: `otel-correlation doctor` in the service's environment; {elsewhere}", _SOFT))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _title(span: Span) -> str:
    method = span.attributes.get("http.request.method")
    if not isinstance(method, str):
        return span.name
    named = (span.attributes.get(name) for name in ("http.route", "url.path"))
    where = next((text for text in named if isinstance(text, str) and text), "")
    return " ".join(part for part in (method, where, _status(span)) if part)


def _short(span: Span) -> str:
    url = span.attributes.get("url.full")
    if span.kind != "CLIENT" or not isinstance(url, str):
        return span.name
    # The name of a CLIENT span is the method alone: a URL has too many values to be one.
    return f"→ {span.name} /{url.partition('://')[2].partition('/')[2].partition('?')[0]}"


def _status(span: Span) -> str:
    value = span.attributes.get("http.response.status_code")
    return str(value) if isinstance(value, int) else ""


def _failed(span: Span) -> bool:
    value = span.attributes.get("http.response.status_code")
    return span.failed or (isinstance(value, int) and value >= _FAILURE)


def _took(span: Span) -> str:
    milliseconds = (span.end_ns - span.start_ns) / 1e6
    return f"{milliseconds / 1000:.2f} s" if milliseconds >= 1000 else f"{milliseconds:.1f} ms"


def _time(ns: int) -> str:
    return f"{datetime.fromtimestamp(ns // 10**9, UTC):%Y-%m-%dT%H:%M:%S}.{ns // 10**6 % 1000:03}Z"


def _clock(ns: int) -> str:
    return _time(ns)[11:-1]
