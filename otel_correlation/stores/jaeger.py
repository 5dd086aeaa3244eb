"""
Jaeger's query service, asked over its JSON API (the one its page uses; v1 and v2 answer alike).
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, ClassVar, Final

from otel_correlation.semconv import CALLER_REQUEST_ID, REQUEST_ID
from otel_correlation.stores.client import TIMEOUT_S, Http, StoreError, trace_id_of
from otel_correlation.stores.model import Event, Json, Span, Trace, as_int, as_list, as_object, as_text, as_time

if TYPE_CHECKING:
    from collections.abc import Sequence

SEARCH_DAYS: Final = 7
MAX_TRACES: Final = 20
_DAY_US: Final = 24 * 60 * 60 * 1_000_000


class JaegerStore:
    """
    Finds traces in Jaeger, which holds no log lines.
    """

    is_whole: ClassVar[bool] = True

    def __init__(self, url: str) -> None:
        self._http = Http(url)
        self.name = f"Jaeger at {self._http.shown} (the last {SEARCH_DAYS} days; it holds no log lines)"

    def find(self, wanted: str, /) -> list[Trace]:
        """
        Return the trace that the id leads to and those whose spans carry it.
        """
        found: dict[str, Trace] = {}
        try:
            if (trace_id := trace_id_of(wanted)) is not None:
                found.update(self._traces(f"/api/traces/{trace_id}"))
            self._search(wanted, found)
        except StoreError as error:
            raise StoreError(str(error), found.values()) from error
        except ValueError as error:
            raise StoreError(f"{self._http.shown} did not answer as Jaeger does ({error})", found.values()) from error
        return list(found.values())

    def complete(self, known: Sequence[Trace], /) -> list[Trace]:
        """
        Return the traces that another store knew.
        """
        found: dict[str, Trace] = {}
        try:
            for one in known:
                found.update(self._traces(f"/api/traces/{one.trace_id}"))
        except StoreError as error:
            raise StoreError(str(error), found.values()) from error
        except ValueError as error:
            raise StoreError(f"{self._http.shown} did not answer as Jaeger does ({error})", found.values()) from error
        return list(found.values())

    def _search(self, wanted: str, found: dict[str, Trace]) -> None:
        """
        Look for the attributes that hold request ids; Jaeger takes one service and one of them at a time.
        """
        status, answer = self._http.get("/api/services")
        if status == 404:
            raise StoreError(f"{self._http.shown} is something else than Jaeger (no /api/services there)")
        services = as_list(as_object(answer).get("data") or [])
        now_us = time.time_ns() // 1000
        give_up = time.monotonic() + 3 * TIMEOUT_S
        for service in services:
            if time.monotonic() > give_up:
                raise StoreError(
                    f"{self._http.shown} is too slow: gave up before all {len(services)} services were searched"
                )
            for name in (REQUEST_ID, CALLER_REQUEST_ID):
                query: dict[str, str | int] = {
                    "service": as_text(service),
                    "tags": json.dumps({name: wanted}),
                    "start": now_us - SEARCH_DAYS * _DAY_US,
                    "end": now_us,
                    "limit": MAX_TRACES,
                }
                for trace_id, trace in self._traces("/api/traces", query).items():
                    found.setdefault(trace_id, trace)

    def _traces(self, path: str, query: dict[str, str | int] | None = None) -> dict[str, Trace]:
        _, answer = self._http.get(path, query)
        data = [] if answer is None else as_list(as_object(answer).get("data") or [])
        traces = map(_trace, map(as_object, data))
        return {trace.trace_id: trace for trace in traces}


def _trace(data: dict[str, Json]) -> Trace:
    processes = as_object(data.get("processes") or {})
    services = {key: as_text(as_object(value).get("serviceName")) for key, value in processes.items()}
    spans = [_span(as_object(span), services) for span in as_list(data.get("spans") or [])]
    return Trace.of(as_text(data.get("traceID")).zfill(32), spans, ())


def _span(data: dict[str, Json], services: dict[str, str]) -> Span:
    attributes = _tags(data.get("tags"))
    trace_id = as_text(data.get("traceID")).zfill(32)
    start_ns = as_time(data.get("startTime"), 1000)
    parent, links = "", list[tuple[str, str]]()
    for reference in map(as_object, as_list(data.get("references") or [])):
        target = as_text(reference.get("traceID")).zfill(32), as_text(reference.get("spanID")).zfill(16)
        if reference.get("refType") == "CHILD_OF" and target[0] == trace_id and not parent:
            parent = target[1]
        else:
            links.append(target)
    kind = str(attributes.pop("span.kind", "internal")).upper()
    status = attributes.pop("otel.status_code", None)
    message = attributes.pop("otel.status_description", "")
    return Span(
        trace_id=trace_id,
        span_id=as_text(data.get("spanID")).zfill(16),
        parent_id=parent,
        service=services.get(as_text(data.get("processID")), "unknown_service"),
        name=as_text(data.get("operationName")),
        kind=kind,
        start_ns=start_ns,
        end_ns=as_time(as_int(data.get("startTime")) + as_int(data.get("duration")), 1000),
        failed=status == "ERROR" or attributes.pop("error", None) is True,
        status_message=message if isinstance(message, str) else "",
        attributes=attributes,
        events=tuple(_event(as_object(log)) for log in as_list(data.get("logs") or [])),
        links=tuple(links),
    )


def _event(data: dict[str, Json]) -> Event:
    fields = _tags(data.get("fields"))
    return Event(name=str(fields.pop("event", "log")), time_ns=as_time(data.get("timestamp"), 1000), attributes=fields)


def _tags(data: Json) -> dict[str, Json]:
    return {as_text(tag.get("key")): tag.get("value") for tag in map(as_object, as_list(data or []))}
