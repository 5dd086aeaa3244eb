"""
Tempo's query frontend, asked over its HTTP API: a trace by its id, and TraceQL for the attributes of request ids.
"""

from __future__ import annotations

import base64
import binascii
import re
import time
from typing import TYPE_CHECKING, ClassVar, Final

from otel_correlation.semconv import CALLER_REQUEST_ID, REQUEST_ID
from otel_correlation.stores.client import Http, StoreError, quoted, trace_id_of
from otel_correlation.stores.model import Event, Json, Span, Trace, as_int, as_list, as_object, as_text, as_time

if TYPE_CHECKING:
    from collections.abc import Sequence

# Of one search Tempo allows 168 h (query_frontend.search.max_duration).
SEARCH_DAYS: Final = 7
MAX_TRACES: Final = 20
_TIMEOUT_S: Final = 30.0
_DAY_S: Final = 24 * 60 * 60
_KINDS: Final = ("INTERNAL", "INTERNAL", "SERVER", "CLIENT", "PRODUCER", "CONSUMER")
_ERROR: Final = 2
_ID_DIGITS: Final = {"traceId": 32, "spanId": 16, "parentSpanId": 16}
_TRACE_ID: Final = re.compile("[0-9a-f]{1,32}")
_MAX_EXACT: Final = 2**53


class TempoStore:
    """
    Finds traces in Tempo, which holds no log lines.
    """

    is_whole: ClassVar[bool] = True

    def __init__(self, url: str) -> None:
        self._http = Http(url, _TIMEOUT_S)
        self.name = f"Tempo at {self._http.shown} (the last {SEARCH_DAYS} days; it holds no log lines)"

    def find(self, wanted: str, /) -> list[Trace]:
        """
        Return the trace that the id leads to and those whose spans carry it.
        """
        first = trace_id_of(wanted)
        found: dict[str, Trace] = {}
        partial: list[str] = []
        try:
            if first is not None:
                self._trace(first, found, partial)
            for trace_id in self._search(wanted):
                if trace_id not in found:
                    self._trace(trace_id, found, partial)
        except (StoreError, ValueError, RecursionError) as error:
            raise self._failure(error, found) from error
        return self._whole(found, partial)

    def complete(self, known: Sequence[Trace], /) -> list[Trace]:
        """
        Return the traces that another store knew.
        """
        found: dict[str, Trace] = {}
        partial: list[str] = []
        try:
            for one in known:
                self._trace(one.trace_id, found, partial)
        except (StoreError, ValueError, RecursionError) as error:
            raise self._failure(error, found) from error
        return self._whole(found, partial)

    def _failure(self, error: Exception, found: dict[str, Trace]) -> StoreError:
        text = str(error)
        if not isinstance(error, StoreError):
            text = f"{self._http.shown} did not answer as Tempo does ({text})"
        return StoreError(text, found.values())

    def _whole(self, found: dict[str, Trace], partial: list[str]) -> list[Trace]:
        if partial:
            raise StoreError(f"{self._http.shown} gave part of trace {', '.join(partial)} only", found.values())
        return list(found.values())

    def _trace(self, trace_id: str, found: dict[str, Trace], partial: list[str]) -> None:
        """
        Put the trace into ``found`` if there is one, and its id into ``partial`` if Tempo says that there is more.
        """
        status, answer = self._http.get(f"/api/v2/traces/{trace_id}")
        if status == 404:
            # Before Tempo 2.7 there was only the first version, whose answer is the trace itself.
            _, answer = self._http.get(f"/api/traces/{trace_id}")
        if answer is None:
            return
        data = as_object(answer)
        if data.get("status") in ("PARTIAL", 1):
            partial.append(trace_id)
        trace = as_object(data.get("trace") or {}) if "trace" in data or "batches" not in data else data
        spans = _spans(trace, trace_id)
        if spans:
            found[trace_id] = Trace.of(trace_id, spans, ())

    def _search(self, wanted: str) -> list[str]:
        """
        Return the ids of the traces in which a span carries ``wanted`` as its request id or its caller's.
        """
        now_s = int(time.time())
        value = quoted(wanted)
        query: dict[str, str | int] = {
            "q": f"{{ span.{REQUEST_ID} = {value} || span.{CALLER_REQUEST_ID} = {value} }}",
            "start": now_s - SEARCH_DAYS * _DAY_S + 60,
            "end": now_s + 60,
            "limit": MAX_TRACES,
            "spss": 1,
        }
        _, answer = self._http.get("/api/search", query)
        if answer is None:
            raise StoreError(f"{self._http.shown} is something else than Tempo (no /api/search there)")
        traces = as_list(as_object(answer).get("traces") or [])
        found = [as_text(as_object(trace).get("traceID")) for trace in traces[:MAX_TRACES]]
        if wrong := [trace_id for trace_id in found if not _TRACE_ID.fullmatch(trace_id)]:
            raise ValueError(f"{wrong[0][:40]!a} is no trace id")
        # Leading zeros are not part of it there.
        return list(dict.fromkeys(trace_id.zfill(32) for trace_id in found))


def _spans(trace: dict[str, Json], trace_id: str) -> list[Span]:
    """
    Return the spans of OTLP's resource spans, which Tempo's first version calls batches.
    """
    spans: list[Span] = []
    batches = trace.get("resourceSpans") or trace.get("batches") or []
    for batch in map(as_object, as_list(batches)):
        resource = as_object(batch.get("resource") or {})
        service = _attributes(resource.get("attributes")).get("service.name")
        scopes = batch.get("scopeSpans") or batch.get("instrumentationLibrarySpans") or []
        for scope in map(as_object, as_list(scopes)):
            spans.extend(
                _span(as_object(span), trace_id, service if isinstance(service, str) and service else "unknown_service")
                for span in as_list(scope.get("spans") or [])
            )
    return spans


def _span(data: dict[str, Json], trace_id: str, service: str) -> Span:
    status = as_object(data.get("status") or {})
    start_ns = as_time(data.get("startTimeUnixNano") or 0)
    return Span(
        trace_id=trace_id,
        span_id=_id(data, "spanId"),
        parent_id=_id(data, "parentSpanId"),
        service=service,
        name=as_text(data.get("name") or ""),
        kind=_kind(data.get("kind") or 0),
        start_ns=start_ns,
        end_ns=max(as_time(data.get("endTimeUnixNano") or 0), start_ns),
        failed=status.get("code") in ("STATUS_CODE_ERROR", _ERROR),
        status_message=as_text(status.get("message") or ""),
        attributes=_attributes(data.get("attributes")),
        events=tuple(
            Event(
                name=as_text(event.get("name") or ""),
                time_ns=as_time(event.get("timeUnixNano") or 0),
                attributes=_attributes(event.get("attributes")),
            )
            for event in map(as_object, as_list(data.get("events") or []))
        ),
        links=tuple(
            (_id(link, "traceId"), _id(link, "spanId")) for link in map(as_object, as_list(data.get("links") or []))
        ),
    )


def _kind(value: Json) -> str:
    if isinstance(value, str):
        return value.removeprefix("SPAN_KIND_").replace("UNSPECIFIED", "INTERNAL")
    number = as_int(value)
    return _KINDS[number] if 0 <= number < len(_KINDS) else "INTERNAL"


def _id(data: dict[str, Json], name: str) -> str:
    """
    Return an id as hex: OTLP/JSON writes it so, protobuf's JSON mapping, which Tempo uses, in base64.
    """
    text = as_text(data.get(name) or "")
    digits = _ID_DIGITS[name]
    if len(text) == digits and re.fullmatch("[0-9A-Fa-f]+", text):
        found = text.lower()
    else:
        try:
            found = base64.b64decode(text, validate=True).hex()
        except (binascii.Error, ValueError):
            raise ValueError(f"{text[:40]!a} is no {name}") from None
    if len(found) not in (0, digits):
        raise ValueError(f"{text[:40]!a} is no {name}")
    return found if found.strip("0") else ""


def _attributes(pairs: Json) -> dict[str, Json]:
    return {as_text(pair.get("key")): _value(pair.get("value")) for pair in map(as_object, as_list(pairs or []))}


def _value(value: Json) -> Json:
    """
    Return what an AnyValue holds; an integer that JavaScript would not keep exactly stays text.
    """
    for kind, inner in as_object(value or {}).items():
        match kind:
            case "intValue":
                number = as_int(inner)
                return number if -_MAX_EXACT <= number <= _MAX_EXACT else str(number)
            case "arrayValue":
                return [_value(item) for item in as_list(as_object(inner).get("values") or [])]
            case "kvlistValue":
                return _attributes(as_object(inner).get("values"))
            case _:
                return inner
    return None
