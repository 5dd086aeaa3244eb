"""
Log lines as services write them: JSON of ours under any preset, of others, behind a prefix or in an envelope, and text.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Final

from otel_correlation import semconv
from otel_correlation.request_id import MAX_LENGTH, MIN_ROOT_LENGTH
from otel_correlation.stores.bounded import read_json
from otel_correlation.stores.client import trace_id_of
from otel_correlation.stores.model import LogLine
from otel_correlation.stores.tracebacks import frames

if TYPE_CHECKING:
    from collections.abc import Iterable

    from otel_correlation.stores.model import Json, Trace

_HEX32: Final = re.compile("[0-9a-f]{32}")
_HEX16: Final = re.compile("[0-9a-f]{16}")
_DECIMAL: Final = re.compile("[0-9]{1,20}")
_UNKNOWN_HALF: Final = "0" * 16
_MAX_TIME_NS: Final = 2**63 - 1

# What other libraries call the fields of a line, beside ``semconv.LOG_PRESETS``; an earlier name wins.
_OTHERS: Final[dict[str, tuple[str, ...]]] = {
    "timestamp": ("ts", "asctime", "datetime", "date"),
    "level": ("levelname", "severity_text", "lvl"),
    "logger": ("logger_name", "name"),
    "message": ("msg", "event", "short_message", "body"),
    semconv.TRACE_ID: ("traceId", "traceID", "traceid", "otelTraceID"),
    semconv.SPAN_ID: ("spanId", "spanID", "spanid", "otelSpanID"),
    semconv.REQUEST_ID: (
        "requestId",
        "requestID",
        "request-id",
        "x_request_id",
        "x-request-id",
        "X-Request-ID",
        "correlation_id",
        "correlationId",
    ),
    semconv.SERVICE_NAME: ("service", "otelServiceName", "app"),
    "exception": ("exc_info", "exception.stacktrace", "stacktrace", "traceback"),
}
_NOT_TEXT: Final = frozenset({"timestamp", "message", semconv.TRACE_ID, semconv.SPAN_ID})
_ERRORS: Final = (("error.type", "error.message"), ("error.kind", "error.message"))

_RAISED: Final = re.compile(r"^[\s|]*(?P<type>[A-Za-z_][\w.]*)(?:: (?P<message>.*))?$")
_STAMP: Final = re.compile(
    r"(?P<iso>\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?:Z|[+-]\d\d:?\d\d)?)"
    r"|(?P<clf>\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4})"
    r"|^(?P<clock>\d\d:\d\d:\d\d(?:[.,]\d{1,9})?)"
)
# Lines of ours where OTEL_CORRELATION_LOG_FORMAT is text.
_OWN_TEXT: Final = re.compile(r"\d\d:\d\d:\d\d\.\d{3} (?P<level>\w+) +(?P<logger>[^ ]+)  (?P<rest>.*)")
_LEVEL: Final = re.compile(r"\b(TRACE|DEBUG|INFO|NOTICE|WARNING|WARN|ERROR|CRITICAL|FATAL)\b")
_NAMED: Final = r"(?<![A-Za-z0-9])(?:{names})[\"']?\s*[=:]\s*[\"']?(?P<value>{value})(?![A-Za-z0-9])"
_TRACE_FIELD: Final = re.compile(_NAMED.format(names="trace[._-]?id|oteltraceid", value="[0-9a-f]{32}"), re.IGNORECASE)
_SPAN_FIELD: Final = re.compile(_NAMED.format(names="span[._-]?id|otelspanid", value="[0-9a-f]{16}"), re.IGNORECASE)
_TRACEPARENT: Final = re.compile(r"(?<![0-9a-f])[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(?![0-9a-f])")
_REQUEST_NAMES: Final = "(?:x[._-])?request[._-]?id|correlation[._-]?id|trace[._-]?id"
_REQUEST_FIELD: Final = re.compile(
    _NAMED.format(names="(?:x[._-])?request[._-]?id|correlation[._-]?id", value="[A-Za-z0-9._~:/+=#-]{1,200}"),
    re.IGNORECASE,
)
# Of one line, which has at most 1 MiB.
_MAX_VALUES: Final = 100_000
# Of all request ids that a search goes on with: a trace has one or a few, and each is looked for in every line.
MAX_REQUEST_IDS: Final = 64
_WORD: Final = "[A-Za-z0-9]"
_STAMP_WITHIN: Final = 160


@dataclass(frozen=True, slots=True)
class Wanted:
    """
    The ids that lines are searched for.
    """

    trace_ids: frozenset[str]
    request_ids: frozenset[str]

    @staticmethod
    def by(wanted: str) -> Wanted:
        """
        Return what ``find`` looks for: the id itself, and the trace that it names.
        """
        trace_id = trace_id_of(wanted)
        return Wanted(frozenset([trace_id] if trace_id else []), frozenset([wanted]))

    @staticmethod
    def of(known: Iterable[Trace]) -> Wanted:
        """
        Return what names the traces: their ids, and those of their request ids that are long enough to be of one only.

        Of these the first 64: no honest trace has more.
        """
        traces = list(known)
        # Half a character, as JSON may hold it, is neither in a line nor in a URL.
        request_ids = dict.fromkeys(
            request_id
            for trace in traces
            for request_id in trace.request_ids
            if MIN_ROOT_LENGTH <= len(request_id) <= MAX_LENGTH and request_id.isprintable()
        )
        return Wanted(frozenset(trace.trace_id for trace in traces), frozenset(islice(request_ids, MAX_REQUEST_IDS)))

    @property
    def spellings(self) -> tuple[str, ...]:
        """
        Return every text of which one must stand in a line that has one of the ids that are no ``short_ids``.
        """
        found: dict[str, None] = {}
        for request_id in sorted(self.request_ids - self.short_ids):
            # Encoders of other languages escape these two.
            found |= dict.fromkeys((request_id, request_id.replace("/", r"\/"), request_id.replace("=", r"\u003d")))
        for trace_id in sorted(self.trace_ids):
            # As it is, as the UUID that it may have been made of, and its lower half as Datadog's decimal.
            half = trace_id[16:]
            own = (half,) if trace_id.startswith(_UNKNOWN_HALF) else (trace_id, str(uuid.UUID(trace_id)))
            found |= dict.fromkeys((*own, str(int(half, 16))))
        return tuple(found)

    @property
    def short_ids(self) -> frozenset[str]:
        """
        Return the request ids that are words and numbers of every other line, too.
        """
        return frozenset(request_id for request_id in self.request_ids if len(request_id) < MIN_ROOT_LENGTH)

    def trace_of(self, line: LogLine) -> str | None:
        """
        Return the trace that ``line`` belongs to (empty: none is known) if it is wanted, else None.
        """
        trace_id, request_id = line.trace_id, line.request_id
        if trace_id.startswith(_UNKNOWN_HALF):
            trace_id = next((whole for whole in self.trace_ids if whole.endswith(trace_id[16:])), trace_id)
        if trace_id in self.trace_ids or request_id in self.request_ids:
            return trace_id
        if not trace_id and request_id and (named := trace_id_of(request_id)) in self.trace_ids:
            return named
        return None


class Reader:
    """
    Reads single lines.

    Args:
        renames: ``OTEL_CORRELATION_LOG_FIELDS`` of the services, as far as it is known.
    """

    def __init__(self, renames: Iterable[str] = ()) -> None:
        self._names: dict[str, tuple[str, ...]] = {}
        new = [tuple(part.strip() for part in entry.split("=", 1)) for entry in renames]
        for field in semconv.LOG_FIELDS:
            named = [entry[1] for entry in new if entry[0] == field and len(entry) > 1]
            presets = [preset[field] for preset in semconv.LOG_PRESETS.values() if field in preset]
            self._names[field] = tuple(dict.fromkeys([*named, field, *presets, *_OTHERS.get(field, ())]))

    def names(self, field: str) -> tuple[str, ...]:
        """
        Return what ``field`` may be called.
        """
        return self._names[field]

    def read(self, text: str, wanted: Wanted, service: str, near_ns: int) -> LogLine | None:
        """
        Return the line if it has one of the ids, else None.

        Args:
            text: One line, which has one of ``wanted.spellings`` or ``wanted.short_ids``.
            wanted: The ids.
            service: What the service is called if the line does not say it.
            near_ns: When the line was written at the latest, for lines that have a clock time and no date.
        """
        # What stands in front is CRI's "TIME stdout F " or compose's "service-1  | ".
        begin = text.find("{")
        data = _object(text[begin:]) if begin >= 0 else None
        if data is None:
            return _of_text(text, wanted, service, _stamp_ns(text, near_ns))
        prefix_ns = _stamp_ns(text[:begin], near_ns)
        if isinstance(inner := data.get("log"), str) and "stream" in data:  # Docker's json-file driver
            prefix_ns, content = _time_ns(data.get("time")), _object(inner)
            if content is None:
                return _of_text(inner.rstrip("\n"), wanted, service, prefix_ns)
            data = content
        return self._of_json(data, wanted, service, prefix_ns)

    def _of_json(self, data: dict[str, Json], wanted: Wanted, service: str, prefix_ns: int) -> LogLine | None:
        if isinstance(record := data.get("record"), dict) and isinstance(record.get("extra"), dict):
            data = _of_loguru(record)
        used: set[str] = set()
        taken = {field: self._take(data, field, used) for field in self._names}
        message, stack, request_id = taken["message"], taken["exception"], _plain(taken[semconv.REQUEST_ID])
        attributes = {key: value for key, value in data.items() if key not in used}
        if request_id:
            attributes[semconv.REQUEST_ID] = request_id
        if isinstance(stack, str):
            put_exception(attributes, stack)
        line = LogLine(
            trace_id=_trace_id(taken[semconv.TRACE_ID]),
            span_id=_span_id(taken[semconv.SPAN_ID]),
            time_ns=_time_ns(taken["timestamp"]) or prefix_ns,
            severity=_plain(taken["level"]).upper(),
            service=_plain(taken[semconv.SERVICE_NAME]) or service,
            logger=_plain(taken["logger"]),
            # A proxy's line has fields and no message.
            body=message if isinstance(message, str) else json.dumps(data if message is None else message),
            attributes=attributes,
        )
        trace_id = wanted.trace_of(line)
        if trace_id is not None:
            return replace(line, trace_id=trace_id)
        # A line of no request that we know of belongs to what it mentions.
        return None if line.trace_id or request_id else _mentioning(line, json.dumps(data, ensure_ascii=False), wanted)

    def _take(self, data: dict[str, Json], field: str, used: set[str]) -> Json:
        for name in self._names[field]:
            key, value = name, data.get(name)
            if value is None and "." in name:
                key, _, rest = name.partition(".")
                value = data.get(key)
                for part in rest.split("."):
                    value = value.get(part) if isinstance(value, dict) else None
            # "status" is a level to Datadog and a number to everybody else.
            if value and (isinstance(value, str) or field in _NOT_TEXT):
                used.add(name)
                return value
        return None


def _of_loguru(record: dict[str, Json]) -> dict[str, Json]:
    """
    Return a record of loguru's ``serialize=True`` as the line that its extra fields make it.
    """
    extra, level, stamp = record.get("extra"), record.get("level"), record.get("time")
    return {
        "message": record.get("message"),
        "logger": record.get("name"),
        "level": level.get("name") if isinstance(level, dict) else level,
        "timestamp": stamp.get("timestamp") if isinstance(stamp, dict) else stamp,
        **(extra if isinstance(extra, dict) else {}),
    }


def _object(text: str) -> dict[str, Json] | None:
    try:
        data = read_json(text, max_values=_MAX_VALUES)
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


def _of_text(text: str, wanted: Wanted, service: str, time_ns: int) -> LogLine | None:
    parent = _TRACEPARENT.search(text)
    trace, span, request = _TRACE_FIELD.search(text), _SPAN_FIELD.search(text), _REQUEST_FIELD.search(text)
    own = _OWN_TEXT.fullmatch(text)
    level = None if own else _LEVEL.search(text, 0, _STAMP_WITHIN)
    line = LogLine(
        trace_id=trace["value"].lower() if trace else parent[1] if parent else "",
        span_id=span["value"].lower() if span else "",
        time_ns=time_ns,
        severity=own["level"] if own else level[0] if level else "",
        service=service,
        logger=own["logger"] if own else "",
        body=own["rest"] if own else text,
        attributes={semconv.REQUEST_ID: request["value"]} if request else {},
    )
    for request_id in wanted.request_ids:
        if re.search(_NAMED.format(names=_REQUEST_NAMES, value=re.escape(request_id)), text, re.IGNORECASE):
            line = replace(line, attributes={semconv.REQUEST_ID: request_id})
    trace_id = wanted.trace_of(line)
    if trace_id is not None:
        return replace(line, trace_id=trace_id)
    return None if line.trace_id else _mentioning(line, text, wanted)


def _mentioning(line: LogLine, text: str, wanted: Wanted) -> LogLine | None:
    """
    Return ``line`` under the wanted id that ``text`` has as a word; a short one is none ("42 ms").
    """
    for wanted_id in (*sorted(wanted.trace_ids), *sorted(wanted.request_ids)):
        if len(wanted_id) >= MIN_ROOT_LENGTH and re.search(f"(?<!{_WORD}){re.escape(wanted_id)}(?!{_WORD})", text):
            if wanted_id in wanted.trace_ids:
                return replace(line, trace_id=wanted_id)
            return replace(line, attributes={**line.attributes, semconv.REQUEST_ID: wanted_id})
    return None


def _trace_id(value: Json) -> str:
    """
    Return a trace id as 32 hex digits, whatever a platform makes of it, or an empty text.

    Of Datadog's decimal only the lower half is known: the other is zeros.
    """
    text = _plain(value).rpartition("/")[2].lower()  # projects/P/traces/T
    if _HEX32.fullmatch(text):
        return text if text.strip("0") else ""
    half = _span_id(value)
    return _UNKNOWN_HALF + half if half else ""


def _span_id(value: Json) -> str:
    text = _plain(value).lower()
    if _DECIMAL.fullmatch(text) and (len(text) != 16 or not isinstance(value, str)) and int(text) < 2**64:
        text = f"{int(text):016x}"
    return text if _HEX16.fullmatch(text) and text.strip("0") else ""


def _plain(value: Json) -> str:
    if isinstance(value, str):
        return value
    return str(value) if type(value) is int and 0 <= value < 2**64 else ""


def put_exception(attributes: dict[str, Json], stack: str) -> None:
    """
    Put a traceback's text, and the type and message at its end, under the names that the conventions have for them.
    """
    attributes["exception.stacktrace"] = stack
    for kind, message in _ERRORS:
        if isinstance(named := attributes.pop(kind, None), str):
            attributes["exception.type"] = named
            told = attributes.pop(message, "")
            attributes["exception.message"] = told if isinstance(told, str) else ""
            return
    found = frames(stack)
    rows = stack[found[-1].start() :].splitlines()[1:] if found else stack.splitlines()[-1:]
    for number, row in enumerate(rows):
        if row[:1] not in ("", " ", "\t", "|") or (found and row.startswith("  | ") and row[4:5] not in (" ", "")):
            if raised := _RAISED.match(row):
                attributes["exception.type"] = raised["type"]
                attributes["exception.message"] = "\n".join([raised["message"] or "", *rows[number + 1 :]]).strip()
            return


def _time_ns(value: Json) -> int:
    """
    Return a time of a field in nanoseconds, or 0: RFC 3339 and its relatives, or a number since the epoch.
    """
    if isinstance(value, str):
        try:
            return _epoch_ns(datetime.fromisoformat(value))
        except ValueError:
            return _stamp_ns(value, 0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 10**20:
        return 0
    # Seconds, milliseconds, microseconds or nanoseconds: the epoch of this century tells which.
    for unit_ns in (10**9, 10**6, 10**3, 1):
        if value < 10**11 * (10**9 // unit_ns):
            return min(int(value * unit_ns), _MAX_TIME_NS)
    return 0


def _stamp_ns(text: str, near_ns: int) -> int:
    """
    Return the time that stands at the beginning of ``text``, or 0. One without a zone is this machine's.
    """
    found = _STAMP.search(text[:_STAMP_WITHIN])
    if found is None:
        return 0
    try:
        if found["iso"]:
            return _epoch_ns(datetime.fromisoformat(found["iso"]))
        if found["clf"]:
            return _epoch_ns(datetime.strptime(found["clf"], "%d/%b/%Y:%H:%M:%S %z"))
        if not near_ns:
            return 0
        latest = datetime.fromtimestamp(near_ns / 1e9).astimezone()
        clock = datetime.fromisoformat(f"{latest:%Y-%m-%d}T{found['clock']}").astimezone()
        # A minute: the file's time and the line's are not taken at once.
        return _epoch_ns(clock if clock <= latest + timedelta(minutes=1) else clock - timedelta(days=1))
    except (ValueError, OverflowError, OSError):
        return 0


def _epoch_ns(moment: datetime) -> int:
    try:
        return max(int(moment.timestamp() * 1e6) * 1000, 0)
    except (ValueError, OverflowError, OSError):
        return 0
