"""
Loki, asked over its HTTP API for log lines: those that came over OTLP, and those that an agent read from stdout.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, ClassVar, Final

from otel_correlation.semconv import CALLER_REQUEST_ID, REQUEST_ID, SPAN_ID, TRACE_ID
from otel_correlation.stores.client import Http, StoreError, quoted
from otel_correlation.stores.lines import Reader, Wanted
from otel_correlation.stores.model import LogLine, Trace, as_list, as_object, as_text, as_time

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from otel_correlation.stores.model import Json

SEARCH_DAYS: Final = 7
MAX_LINES: Final = 10_000
# Of one answer; Loki allows 5000 (limits_config.max_entries_limit_per_query).
PAGE: Final = 1000
_TIMEOUT_S: Final = 30.0
_DAY_NS: Final = 24 * 60 * 60 * 10**9
# Around the spans of a trace: a line may be stamped by another clock, or written by work that goes on.
_AROUND_NS: Final = 60 * 60 * 10**9
# Every stream has this label since Loki 3.0, and a selector has to match something.
_SELECTOR: Final = '{service_name=~".+"}'
# Structured metadata apart from the stream's labels, as Loki has it since 2.9.
_HEADERS: Final = {"X-Loki-Response-Encoding-Flags": "categorize-labels"}
# What Loki makes of an OTLP record itself, and of its resource.
_RECORD: Final = frozenset(
    {
        TRACE_ID,
        SPAN_ID,
        "flags",
        "observed_timestamp",
        "severity_number",
        "severity_text",
        "detected_level",
        "scope_name",
        "scope_version",
        "service_name",
    }
)
_RESOURCE: Final = (
    "telemetry_",
    "service_",
    "deployment_environment",
    "k8s_",
    "host_",
    "process_",
    "os_",
    "container_",
)
# Dots become underscores there; these are read by name.
_DOTTED: Final = {
    name.replace(".", "_"): name
    for name in (
        "exception.type",
        "exception.message",
        "exception.stacktrace",
        "code.file.path",
        "code.line.number",
        "code.function.name",
        CALLER_REQUEST_ID,
    )
}


class LokiStore:
    """
    Finds log lines in Loki; there are no spans in it.

    Args:
        url: As for ``Http``; the tenant of a Loki with ``auth_enabled`` is its fragment.
        renames: ``OTEL_CORRELATION_LOG_FIELDS`` of services whose lines were read from stdout.
    """

    is_whole: ClassVar[bool] = False

    def __init__(self, url: str, renames: Iterable[str] = ()) -> None:
        self._http = Http(url, _TIMEOUT_S)
        self._reader = Reader(renames)
        self.name = f"Loki at {self._http.shown} (the last {SEARCH_DAYS} days)"

    def find(self, wanted: str, /) -> list[Trace]:
        """
        Return the lines that carry the id or the trace that it leads to.
        """
        now_ns = time.time_ns()
        return self._scan(Wanted.by(wanted), now_ns - SEARCH_DAYS * _DAY_NS, now_ns + _AROUND_NS)

    def complete(self, known: Sequence[Trace], /) -> list[Trace]:
        """
        Return the lines of the traces, and those of their request ids that name no trace, of the hours around them.
        """
        times = [part.start_ns for trace in known for part in trace.spans if part.start_ns]
        times += [part.end_ns for trace in known for part in trace.spans if part.end_ns]
        times += [line.time_ns for trace in known for line in trace.logs if line.time_ns]
        now_ns = time.time_ns()
        # Loki holds nothing of the future, and refuses a range of more than 721 h (limits_config.max_query_length).
        end_ns = min(max(times, default=now_ns), now_ns)
        begin_ns = max(min(times, default=0), end_ns - 4 * SEARCH_DAYS * _DAY_NS)
        return self._scan(Wanted.of(known), min(begin_ns, end_ns) - _AROUND_NS, end_ns + _AROUND_NS)

    def _scan(self, wanted: Wanted, begin_ns: int, end_ns: int) -> list[Trace]:
        found: dict[str, dict[tuple[int, str, str], LogLine]] = {}
        values = [(TRACE_ID, trace_id) for trace_id in sorted(wanted.trace_ids)]
        values += [(REQUEST_ID, request_id) for request_id in sorted(wanted.request_ids)]
        fields = " or ".join(f"{name}={quoted(value)}" for name, value in values)
        # Over OTLP the ids are structured metadata; in a line that an agent read from stdout they are text.
        queries = [f"{_SELECTOR} | {fields}"]
        if wanted.spellings:
            queries.append(f"{_SELECTOR} |= {' or '.join(map(quoted, wanted.spellings))}")
        for request_id in sorted(wanted.short_ids):
            # "42 ms" is no id: it has to stand behind the name of one.
            names = "|".join(map(re.escape, self._reader.names(REQUEST_ID)))
            queries.append(f"{_SELECTOR} |~ " + quoted(rf"(?i)(?:{names})\W{{1,8}}{re.escape(request_id)}(?:\W|$)"))
        try:
            for query in queries:
                self._query(query, begin_ns, end_ns, wanted, found)
        except StoreError as error:
            raise StoreError(str(error), _traces(found)) from error
        except ValueError as error:
            raise StoreError(f"{self._http.shown} did not answer as Loki does ({error})", _traces(found)) from error
        return _traces(found)

    def _query(
        self,
        query: str,
        begin_ns: int,
        end_ns: int,
        wanted: Wanted,
        found: dict[str, dict[tuple[int, str, str], LogLine]],
    ) -> None:
        """
        Put the lines that ``query`` selects into ``found``, page by page, the newest first.
        """
        seen = 0
        last_ns = -1
        while True:
            parameters: dict[str, str | int] = {
                "query": query,
                "start": begin_ns,
                "end": end_ns,
                "limit": PAGE,
                "direction": "backward",
            }
            status, answer = self._http.get("/loki/api/v1/query_range", parameters, _HEADERS)
            if status == 404:
                raise StoreError(f"{self._http.shown} is something else than Loki (no /loki/api/v1/query_range there)")
            data = as_object(as_object(answer).get("data"))
            times: list[int] = []
            for stream in map(as_object, as_list(data.get("result") or [])):
                labels = as_object(stream.get("stream") or {})
                for entry in map(as_list, as_list(stream.get("values") or [])):
                    time_ns, body, fields = _entry(entry, labels)
                    times.append(time_ns)
                    line = self._line(time_ns, body, fields, wanted)
                    if line is not None:
                        found.setdefault(line.trace_id, {})[(time_ns, line.span_id, body)] = line
            seen += len(times)
            if len(times) < PAGE:
                return
            if seen >= MAX_LINES:
                raise StoreError(f"{self._http.shown} has more than {MAX_LINES} lines of it: the newest are told")
            # What is left of the page's oldest nanosecond comes again, unless the page had nothing else.
            oldest_ns = min(times)
            end_ns = oldest_ns if oldest_ns == last_ns else oldest_ns + 1
            last_ns = oldest_ns

    def _line(self, time_ns: int, body: str, fields: dict[str, Json], wanted: Wanted) -> LogLine | None:
        service = _text(fields, "service_name") or "unknown_service"
        line = LogLine(
            trace_id=_text(fields, TRACE_ID),
            span_id=_text(fields, SPAN_ID),
            time_ns=time_ns,
            severity=(_text(fields, "severity_text") or _level(fields)).upper(),
            service=service,
            logger=_text(fields, "scope_name"),
            body=body,
            attributes={
                _DOTTED.get(name, name): value
                for name, value in fields.items()
                if name not in _RECORD and not name.startswith(_RESOURCE)
            },
        )
        if "observed_timestamp" not in fields:
            # Not over OTLP: what it says itself comes first.
            read = self._reader.read(body, wanted, service, time_ns)
            if read is not None:
                return LogLine(
                    read.trace_id or line.trace_id,
                    read.span_id or line.span_id,
                    read.time_ns or time_ns,
                    read.severity or line.severity,
                    service if read.service == "unknown_service" else read.service,
                    read.logger,
                    read.body,
                    read.attributes,
                )
        trace_id = wanted.trace_of(line)
        if trace_id is None:
            return None
        return LogLine(trace_id, line.span_id, time_ns, line.severity, service, line.logger, body, line.attributes)


def _entry(entry: list[Json], labels: dict[str, Json]) -> tuple[int, str, dict[str, Json]]:
    """
    Return the time, the text and the fields of one entry: its stream's labels and its structured metadata.
    """
    if len(entry) < 2:
        raise ValueError("an entry without a text")
    fields = dict(labels)
    if len(entry) > 2:
        for metadata in as_object(entry[2]).values():
            fields |= as_object(metadata)
    return as_time(entry[0]), as_text(entry[1]), fields


def _traces(found: dict[str, dict[tuple[int, str, str], LogLine]]) -> list[Trace]:
    # In Loki's order where lines say the same time themselves.
    return [Trace.of(trace_id, (), [lines[key] for key in sorted(lines)]) for trace_id, lines in found.items()]


def _text(fields: dict[str, Json], name: str) -> str:
    value = fields.get(name)
    return value if isinstance(value, str) else ""


def _level(fields: dict[str, Json]) -> str:
    level = _text(fields, "detected_level")
    return "" if level == "unknown" else level
