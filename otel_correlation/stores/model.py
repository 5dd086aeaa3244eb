"""
The one shape of a span, a log line and a trace, whatever store they come from, and its JSON form.

Times are nanoseconds since the epoch; JSON carries them as decimal strings, as OTLP/JSON does, because a JavaScript
number cannot hold them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from otel_correlation.semconv import CALLER_REQUEST_ID, REQUEST_ID

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

_MAX_TIME_NS: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Event:
    """
    One span event; an exception is the event named ``exception``.
    """

    name: str
    time_ns: int
    attributes: Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class Span:
    """
    One finished span. Ids are lower-case hex; a root's ``parent_id`` is empty.
    """

    trace_id: str
    span_id: str
    parent_id: str
    service: str
    name: str
    kind: str
    start_ns: int
    end_ns: int
    failed: bool = False
    status_message: str = ""
    attributes: Mapping[str, Json] = field(default_factory=dict[str, Json])
    events: tuple[Event, ...] = ()
    # (trace id, span id) of each span that this one is linked to.
    links: tuple[tuple[str, str], ...] = ()

    @property
    def request_id(self) -> str:
        """
        Return the attribute ``request_id``, or an empty string.
        """
        return _text(self.attributes, REQUEST_ID)

    @property
    def caller_request_id(self) -> str:
        """
        Return what a caller that was not trusted sent as its request id, or an empty string.
        """
        return _text(self.attributes, CALLER_REQUEST_ID)


@dataclass(frozen=True, slots=True)
class LogLine:
    """
    One log record that names a trace.
    """

    trace_id: str
    span_id: str
    time_ns: int
    severity: str
    service: str
    logger: str
    body: str
    attributes: Mapping[str, Json] = field(default_factory=dict[str, Json])

    @property
    def request_id(self) -> str:
        """
        Return the attribute ``request_id``, or an empty string.
        """
        return _text(self.attributes, REQUEST_ID)


@dataclass(frozen=True, slots=True)
class Trace:
    """
    All that is known of one trace id: spans by start, log lines by time.
    """

    trace_id: str
    spans: tuple[Span, ...] = ()
    logs: tuple[LogLine, ...] = ()

    @staticmethod
    def of(trace_id: str, spans: Iterable[Span], logs: Iterable[LogLine]) -> Trace:
        """
        Return the trace with its parts in order and each span once.
        """
        once = {span.span_id: span for span in spans}
        return Trace(
            trace_id,
            tuple(sorted(once.values(), key=lambda span: (span.start_ns, -span.end_ns))),
            tuple(sorted(logs, key=lambda line: line.time_ns)),
        )

    @property
    def parts(self) -> tuple[Span | LogLine, ...]:
        """
        Return the spans, then the log lines.
        """
        return (*self.spans, *self.logs)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """
        Return the request ids that spans and log lines carry, each once, earliest first.
        """
        return tuple(dict.fromkeys(part.request_id for part in self.parts if part.request_id))

    @property
    def caller_request_ids(self) -> tuple[str, ...]:
        """
        Return the request ids of callers that were not trusted, each once, earliest first.
        """
        return tuple(dict.fromkeys(span.caller_request_id for span in self.spans if span.caller_request_id))

    @property
    def services(self) -> tuple[str, ...]:
        """
        Return the services that took part, each once, in order of appearance.
        """
        return tuple(dict.fromkeys(part.service for part in self.parts))


def _text(attributes: Mapping[str, Json], name: str) -> str:
    value = attributes.get(name)
    return value if isinstance(value, str) else ""


def span_to_json(span: Span) -> dict[str, Json]:
    """
    Return ``span`` as ``span_from_json`` reads it.
    """
    return {
        "trace_id": span.trace_id,
        "span_id": span.span_id,
        "parent_id": span.parent_id,
        "service": span.service,
        "name": span.name,
        "kind": span.kind,
        "start_ns": str(span.start_ns),
        "end_ns": str(span.end_ns),
        "failed": span.failed,
        "status_message": span.status_message,
        "attributes": dict(span.attributes),
        "events": [
            {"name": event.name, "time_ns": str(event.time_ns), "attributes": dict(event.attributes)}
            for event in span.events
        ],
        "links": [{"trace_id": trace_id, "span_id": span_id} for trace_id, span_id in span.links],
    }


def span_from_json(data: Json) -> Span:
    """
    Read one span.

    Raises:
        ValueError: ``data`` is not what ``span_to_json`` writes.
    """
    source = as_object(data)
    return Span(
        trace_id=as_text(source.get("trace_id")),
        span_id=as_text(source.get("span_id")),
        parent_id=as_text(source.get("parent_id")),
        service=as_text(source.get("service")),
        name=as_text(source.get("name")),
        kind=as_text(source.get("kind")),
        start_ns=as_time(source.get("start_ns")),
        end_ns=as_time(source.get("end_ns")),
        failed=source.get("failed") is True,
        status_message=as_text(source.get("status_message")),
        attributes=as_object(source.get("attributes")),
        events=tuple(
            Event(
                name=as_text(event.get("name")),
                time_ns=as_time(event.get("time_ns")),
                attributes=as_object(event.get("attributes")),
            )
            for event in map(as_object, as_list(source.get("events")))
        ),
        links=tuple(
            (as_text(link.get("trace_id")), as_text(link.get("span_id")))
            for link in map(as_object, as_list(source.get("links")))
        ),
    )


def log_to_json(line: LogLine) -> dict[str, Json]:
    """
    Return ``line`` as ``log_from_json`` reads it.
    """
    return {
        "trace_id": line.trace_id,
        "span_id": line.span_id,
        "time_ns": str(line.time_ns),
        "severity": line.severity,
        "service": line.service,
        "logger": line.logger,
        "body": line.body,
        "attributes": dict(line.attributes),
    }


def log_from_json(data: Json) -> LogLine:
    """
    Read one log line.

    Raises:
        ValueError: ``data`` is not what ``log_to_json`` writes.
    """
    source = as_object(data)
    return LogLine(
        trace_id=as_text(source.get("trace_id")),
        span_id=as_text(source.get("span_id")),
        time_ns=as_time(source.get("time_ns")),
        severity=as_text(source.get("severity")),
        service=as_text(source.get("service")),
        logger=as_text(source.get("logger")),
        body=as_text(source.get("body")),
        attributes=as_object(source.get("attributes")),
    )


def trace_to_json(trace: Trace) -> dict[str, Json]:
    """
    Return ``trace`` as ``trace_from_json`` reads it.
    """
    return {
        "trace_id": trace.trace_id,
        "spans": [span_to_json(span) for span in trace.spans],
        "logs": [log_to_json(line) for line in trace.logs],
    }


def trace_from_json(data: Json) -> Trace:
    """
    Read one trace.

    Raises:
        ValueError: ``data`` is not what ``trace_to_json`` writes.
    """
    source = as_object(data)
    return Trace.of(
        as_text(source.get("trace_id")),
        map(span_from_json, as_list(source.get("spans"))),
        map(log_from_json, as_list(source.get("logs"))),
    )


def as_object(value: Json) -> dict[str, Json]:
    """
    Return ``value`` if it is an object; raise ValueError otherwise.
    """
    if isinstance(value, dict):
        return value
    raise _unexpected("an object", value)


def as_list(value: Json) -> list[Json]:
    """
    Return ``value`` if it is a list; raise ValueError otherwise.
    """
    if isinstance(value, list):
        return value
    raise _unexpected("a list", value)


def as_text(value: Json) -> str:
    """
    Return ``value`` if it is a string; raise ValueError otherwise.
    """
    if isinstance(value, str):
        return value
    raise _unexpected("a string", value)


def as_int(value: Json) -> int:
    """
    Return ``value`` if it is an integer or its decimal string; raise ValueError otherwise.
    """
    if isinstance(value, int | str) and not isinstance(value, bool):
        return int(value)
    raise _unexpected("an integer", value)


def as_time(value: Json, unit_ns: int = 1) -> int:
    """
    Return a time or a duration in nanoseconds, cut to what can be shown; raise ValueError if ``value`` is no integer.
    """
    return min(max(as_int(value) * unit_ns, 0), _MAX_TIME_NS)


def _unexpected(wanted: str, value: Json) -> ValueError:
    return ValueError(f"{wanted} was expected, not {type(value).__name__}")
