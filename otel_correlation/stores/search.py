"""
The search over every store that is configured.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from otel_correlation.policy import shown_store
from otel_correlation.semconv import OTEL_CORRELATION_STORES
from otel_correlation.stores.client import Store, StoreError, trace_id_of
from otel_correlation.stores.embedded import EmbeddedStore
from otel_correlation.stores.jaeger import JaegerStore
from otel_correlation.stores.lines import Wanted
from otel_correlation.stores.logfiles import LogFileStore
from otel_correlation.stores.loki import LokiStore
from otel_correlation.stores.model import Trace
from otel_correlation.stores.tempo import TempoStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from otel_correlation.stores.model import LogLine

DEFAULT_STORE: Final = "http://127.0.0.1:4318"
_LOGS: Final = "logs"
_KINDS: Final[dict[str, Callable[[str], Store]]] = {
    "embedded": EmbeddedStore,
    "jaeger": JaegerStore,
    "tempo": TempoStore,
    "loki": LokiStore,
}
_TRACE_ID: Final = re.compile("[0-9a-f]{32}")
_UNKNOWN_HALF: Final = "0" * 16
# Traces that other stores are asked for.
_MAX_COMPLETED: Final = 20
# Lines of files have milliseconds, and a float is some hundred nanoseconds off.
_MS_NS: Final = 10**6
_OFF_NS: Final = 500


def configured(items: Sequence[str], log_fields: Sequence[str] = ()) -> list[Store]:
    """
    Return the stores that ``OTEL_CORRELATION_STORES`` names.

    Args:
        items: Its items: ``URL`` (embedded), ``KIND=URL``, or ``logs=FILES``.
        log_fields: ``OTEL_CORRELATION_LOG_FIELDS``, what services call the fields of their lines.

    Raises:
        StoreError: An item is not of this form.
    """
    stores: list[Store] = []
    for text in items or (DEFAULT_STORE,):
        kind, _, place = text.partition("=") if "=" in text.partition("://")[0] else ("embedded", "", text)
        if kind == _LOGS and place:
            stores.append(LogFileStore(place, log_fields))
        elif kind not in _KINDS or not _is_url(place):
            raise StoreError(
                f"{OTEL_CORRELATION_STORES}: {shown_store(text)!r} is no store; write http://HOST:PORT for the "
                f"embedded one, KIND=http://HOST:PORT where KIND is {', '.join(_KINDS)}, or logs=FILES"
            )
        elif kind == "loki":
            stores.append(LokiStore(place, log_fields))
        else:
            stores.append(_KINDS[kind](place))
    return stores


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def find(stores: Iterable[Store], wanted: str) -> tuple[list[Trace], list[StoreError]]:
    """
    Ask every store and put together what belongs to one trace id, newest trace first.

    In a second round each store is asked for what it was not asked before: the traces that others found, and their
    request ids. A single store that gives whole traces is asked once.

    Returns:
        The traces, and why a store could not answer, or not with everything.
    """
    asked = list(stores)
    answers: list[list[Trace]] = []
    errors: list[StoreError] = []
    failed: set[int] = set()
    for number, store in enumerate(asked):
        try:
            answers.append(store.find(wanted))
        except StoreError as error:
            answers.append(list(error.traces))
            errors.append(error)
            failed.add(number)
    known = _merged(answers, wanted)
    names = {trace.trace_id for trace in known if _TRACE_ID.fullmatch(trace.trace_id)}
    for number, store in enumerate(asked):
        missing = _missing(store, known, answers[number], wanted, has_failed=number in failed)
        if not missing:
            continue
        try:
            more = store.complete(missing)
        except StoreError as error:
            more = list(error.traces)
            if str(error) not in map(str, errors):
                errors.append(error)
        # A request id may have other traces, which nobody asked for.
        answers.append([trace for trace in more if not trace.trace_id or trace.trace_id in names])
    return _merged(answers, wanted), errors


def _missing(
    store: Store, known: Sequence[Trace], own: Sequence[Trace], wanted: str, *, has_failed: bool
) -> list[Trace]:
    """
    Return the known traces that ``store`` has to be asked for.
    """
    candidates = [trace for trace in known if _TRACE_ID.fullmatch(trace.trace_id)][:_MAX_COMPLETED]
    if store.is_whole:
        had = {trace.trace_id for trace in own}
        return [trace for trace in candidates if trace.trace_id not in had]
    if has_failed:
        return candidates
    before = Wanted.by(wanted)
    now = [(trace, Wanted.of([trace])) for trace in candidates]
    return [trace for trace, ids in now if ids.trace_ids - before.trace_ids or ids.request_ids - before.request_ids]


def _merged(answers: Iterable[Iterable[Trace]], wanted: str) -> list[Trace]:
    """
    Return one trace for each id, newest first, with every span once and lines that name no trace where they belong.
    """
    parts: dict[str, list[Trace]] = {}
    for answer in answers:
        for trace in answer:
            parts.setdefault(trace.trace_id, []).append(trace)
    wholes: dict[str, list[str]] = {}
    for trace_id in parts:
        wholes.setdefault(trace_id[-16:], []).append(trace_id)
    for half in [trace_id for trace_id in parts if trace_id.startswith(_UNKNOWN_HALF)]:
        # Of Datadog's decimal ids only the lower half is known.
        whole = [trace_id for trace_id in wholes[half[16:]][:3] if trace_id != half]
        if len(whole) == 1:
            parts[whole[0]].extend(_named(trace, whole[0]) for trace in parts.pop(half))
    loose = _one("", parts.pop("", [])).logs
    found = {trace_id: _one(trace_id, same) for trace_id, same in parts.items()}
    placed: dict[str, list[LogLine]] = {}
    if loose:
        places = _Places(found.values())
        for line in loose:
            request_id = line.request_id
            trace_id = places.nearest(request_id, line.time_ns) or trace_id_of(request_id or wanted) or ""
            placed.setdefault(trace_id, []).append(line)
    for trace_id, lines in placed.items():
        more = _named(Trace("", (), tuple(lines)), trace_id)
        found[trace_id] = _one(trace_id, [found[trace_id], more] if trace_id in found else [more])
    return sorted(found.values(), key=_began, reverse=True)


def _later(one: tuple[int, int, str], other: tuple[int, int, str]) -> tuple[int, int, str]:
    return other if other[1] > one[1] else one


class _Places:
    """
    Where lines without a trace id belong: of the traces with their request id, the nearest in time.
    """

    def __init__(self, traces: Iterable[Trace]) -> None:
        self._by_request_id: dict[str, list[tuple[int, int, str]]] = {}
        for trace in traces:
            time = _began(trace), _ended(trace), trace.trace_id
            # The empty one is for lines that name no request.
            for request_id in dict.fromkeys(("", *trace.request_ids, *trace.caller_request_ids)):
                self._by_request_id.setdefault(request_id, []).append(time)
        for times in self._by_request_id.values():
            times.sort()
        # Of each place in a list, the one before it or there that ended last.
        self._last = {name: list(accumulate(times, _later)) for name, times in self._by_request_id.items()}

    def nearest(self, request_id: str, time_ns: int) -> str:
        """
        Return the trace id, or an empty text; without a time the newest trace is the nearest.
        """
        times = self._by_request_id.get(request_id)
        if not times:
            return ""
        after = bisect_right(times, time_ns, key=lambda time: time[0]) if time_ns else len(times)
        if not time_ns or not after:
            return times[-1 if not time_ns else 0][2]
        before = self._last[request_id][after - 1]
        if after < len(times) and times[after][0] - time_ns < time_ns - before[1]:
            return times[after][2]
        return before[2]


def _named(trace: Trace, trace_id: str) -> Trace:
    return Trace(
        trace_id,
        tuple(replace(span, trace_id=trace_id) for span in trace.spans),
        tuple(replace(line, trace_id=trace_id) for line in trace.logs),
    )


def _one(trace_id: str, parts: Sequence[Trace]) -> Trace:
    """
    Return the parts as one. A line that several stores have is told once, one that a store has twice twice.
    """
    lines: list[LogLine] = []
    told: Counter[tuple[int, str, str, str]] = Counter()
    for part in parts:
        own: Counter[tuple[int, str, str, str]] = Counter()
        for line in part.logs:
            key = ((line.time_ns + _OFF_NS) // _MS_NS, line.span_id, line.service, line.body)
            own[key] += 1
            if own[key] > told[key]:
                lines.append(line)
        for key, number in own.items():
            told[key] = max(told[key], number)
    return Trace.of(trace_id, (span for part in reversed(parts) for span in part.spans), lines)


def _began(trace: Trace) -> int:
    times = [*(span.start_ns for span in trace.spans), *(line.time_ns for line in trace.logs)]
    return min((time_ns for time_ns in times if time_ns), default=0)


def _ended(trace: Trace) -> int:
    return max([*(span.end_ns for span in trace.spans), *(line.time_ns for line in trace.logs)], default=0)
