"""
What comes before the application: an empty context, the headers once, exactly one request id, the parent, the span.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from opentelemetry import propagate
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, TraceFlags, get_current_span

from otel_correlation import guard, ids, propagators, semconv
from otel_correlation.edge._record import Record, collect, folded, names_of, spelling
from otel_correlation.identity import _KEY as _IDENTITY_KEY
from otel_correlation.identity import Identity, short_ones
from otel_correlation.request_id import from_fields
from otel_correlation.upstream.api import RANDOM_TRACE_ID
from otel_correlation.upstream.api import SPAN_KEY as _SPAN_KEY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from otel_correlation.edge._record import Scope, ServerConfig


class _ScopeGetter(Getter[Any]):
    """
    Reads ASGI headers for propagators that are not ours.
    """

    def get(self, carrier: Scope, key: str) -> list[str] | None:
        wanted = key.lower().encode("latin-1")
        found = [value.decode("latin-1") for name, value in carrier.get("headers", ()) if name.lower() == wanted]
        return found or None

    def keys(self, carrier: Scope) -> list[str]:
        return [name.decode("latin-1") for name, _ in carrier.get("headers", ())]


_getter = _ScopeGetter()


def enter(config: ServerConfig, scope: Scope, method: str) -> tuple[Record, Context]:
    """
    Identify a request and start its span; never awaits.

    Returns:
        The request's record, which is in the scope now, and the context to run the application in.
    """
    record = Record(config, method)
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    if type(headers) is not list:
        scope["headers"] = headers = list(headers)
    trust = config.trust
    # One pass over what may be 16,000 headers; everything below looks at the few that are read.
    if trust is None:
        names = config.read
        read = [pair for pair in headers if pair[0] in names]
    else:
        read = spelling(headers, config.judged)
    # Asked first: of a caller whose context is thrown away nothing is parsed but two ids, for a link and an attribute.
    restarted = trust is not None and not trust.continues(scope, semconv.SCOPE_PEER, read)
    wanted = config.told if restarted else config.wanted
    found: dict[bytes, list[bytes]] = {}
    for name, value in read:
        if name in wanted:
            if name in found:
                found[name].append(value)
            else:
                found[name] = [value]
    parent: SpanContext | None = None
    received: str | None = None
    values: dict[str, Any] = {}
    links: Sequence[Link] = ()
    if found and not config.id_names.isdisjoint(found):
        received = _received_id(config, record, found)
    if restarted:
        links = _restart(config, scope, record, found, received, read)
        received = None
    else:
        ours = propagate.get_global_textmap() is config.textmap
        if (found or not ours) and not config.settings.sdk_disabled:
            parent, values = _extract(config, found) if ours else _extract_foreign(scope, found)
        if trust is not None:
            record.forced = trust.forces(read)
    trace_id: int | None = None
    minted = False
    if parent is None:
        new_trace_id = ids.random_trace_id if config.tracer is None else config.tracer.new_trace_id
        final, trace_id, minted, record.reused = ids.root(received, config.settings.mint, new_trace_id)
    else:
        final = received or f"{parent.trace_id:032x}"
    if restarted:
        scope["headers"].append((config.id_name, final.encode("ascii")))
    else:
        _show_id(config, scope, record, found, final)
    scope[semconv.SCOPE_KEY] = record
    scope["fastapi.telemetry"] = None  # FastAPI's own telemetry steps aside, for mounted applications, too
    state = scope.get("state")
    if state is None:
        scope["state"] = {semconv.REQUEST_ID: final}
    elif type(state) is dict or isinstance(state, Mapping):
        scope["state"] = {**state, semconv.REQUEST_ID: final}
    if "app_root_path" in scope:
        # Mounted under an application without an edge: its prefix is all that is known of the outer route.
        scope[semconv.SCOPE_MOUNT] = scope.get("root_path", "")[len(scope["app_root_path"]) :]
    record.identity = values[_IDENTITY_KEY] = who = Identity(final)
    if not restarted:
        who.received = found
    else:
        # Nothing is made of them, but a wrapper around the application may have kept them, and pass them on.
        who.received = short_ones(found)
    tracer = config.tracer
    if tracer is None:
        return record, Context(values)
    if parent is not None and _SPAN_KEY not in values:
        values[_SPAN_KEY] = NonRecordingSpan(parent)
    if config.excludes and is_excluded(config, scope):
        if parent is None and trace_id is not None:
            # Ids for the log lines; unsampled, so that nothing below it is exported as an orphan.
            flags = TraceFlags(RANDOM_TRACE_ID if minted else 0)
            values[_SPAN_KEY] = NonRecordingSpan(SpanContext(trace_id, ids.random_span_id(), False, flags))
        return record, Context(values)
    span = tracer.start(
        record.name,
        SpanKind.SERVER,
        Context(values),
        partial(collect, scope, record, headers, read),
        trace_id=trace_id,
        minted=minted,
        links=links,
        start_time=record.start_time,
        forced=record.forced,
    )
    record.span = who.span = values[_SPAN_KEY] = span
    if span.is_recording():
        record.recording = span
    return record, Context(values)


def _extract(config: ServerConfig, found: dict[bytes, list[bytes]]) -> tuple[SpanContext | None, dict[str, Any]]:
    """
    Return the caller's span context, if it sent a valid one, and what else it propagates.
    """
    names = config.settings.propagators
    parent = None
    if b"traceparent" in found and "tracecontext" in names:
        parent = propagators.extract_from_headers(found[b"traceparent"], found.get(b"tracestate", []))
    if b"baggage" in found and "baggage" in names:
        return parent, {**propagators.extract_baggage_from_headers(found[b"baggage"], Context())}
    return parent, {}


def _extract_foreign(scope: Scope, found: dict[bytes, list[bytes]]) -> tuple[SpanContext | None, dict[str, Any]]:
    """
    Ask the propagator that somebody else made the global one; what came in its format is added to ``found``.
    """
    textmap = propagate.get_global_textmap()
    with guard.never_raise("edge.fields"):
        names = {name.lower().encode("latin-1") for name in textmap.fields}.difference(found)
        for name, value in scope["headers"]:
            if name in names:
                found.setdefault(name, []).append(value)
    try:
        context = textmap.extract(scope, Context(), _getter)
    except Exception:  # noqa: BLE001 - somebody else's code; the request keeps its id
        guard.report("edge.extract")
        return None, {}
    caller = get_current_span(context).get_span_context()
    return (caller if caller.is_valid else None), {**context}


def _received_id(config: ServerConfig, record: Record, found: dict[bytes, list[bytes]]) -> str | None:
    received, record.refused = from_fields(found, config.settings.request_id_headers)
    if record.refused:
        guard.count("request_id.refused")
        guard.warn_seldom("refused", "A request id that is not valid was replaced (its value is never logged)")
    return received


def _restart(
    config: ServerConfig,
    scope: Scope,
    record: Record,
    found: dict[bytes, list[bytes]],
    received: str | None,
    read: list[tuple[bytes, bytes]],
) -> Sequence[Link]:
    """
    End what a caller that is not trusted propagates: the application sees none of it, the span links to its trace.

    What ends is every header that this service, or one behind it, would believe, in any spelling (as Envoy's edge does
    with ``x-envoy-force-trace``).

    The link is made of ``traceparent`` alone, which has a fixed length: neither the caller's tracestate nor its baggage
    is parsed, and no propagator of another library is asked.
    """
    ending = config.ending
    headers = scope["headers"]
    if propagate.get_global_textmap() is not config.textmap:
        with guard.never_raise("edge.restart"):
            fields = propagate.get_global_textmap().fields
            ending = ending | {folded(name.encode("latin-1")) for name in fields}
            read = spelling(headers, ending)
    gone = {name for name in names_of(read) if folded(name) in ending}
    # A list of its own, also where nothing goes: the final id is added to it.
    scope["headers"] = [pair for pair in headers if pair[0] not in gone] if gone else [*headers]
    record.caller_id = received
    caller: SpanContext | None = None
    if not config.settings.sdk_disabled and "tracecontext" in config.settings.propagators:
        caller = propagators.extract_from_headers(found.get(b"traceparent", []), [])
    if caller is None and received is None:
        return ()
    guard.count("caller.restarted")
    return () if caller is None else (Link(caller),)


def _show_id(config: ServerConfig, scope: Scope, record: Record, found: dict[bytes, list[bytes]], final: str) -> None:
    """
    Make ``request.headers`` carry the final id; a refused value is not seen by the application.
    """
    name = config.id_name
    value = final.encode("ascii")
    headers = scope["headers"]
    if name not in found and not record.refused:
        scope["headers"] = [*headers, (name, value)]
    elif found.get(name) != [value]:
        gone = {name}
        if record.refused:
            gone.add(next(entry for entry in config.settings.request_id_headers if entry in found))
        scope["headers"] = [pair for pair in headers if pair[0] not in gone] + [(name, value)]


def is_excluded(config: ServerConfig, scope: Scope) -> bool:
    """
    Tell whether an application wants no span for this request.
    """
    return config.excluded.match(scope.get("path", ""), _url(config, scope))


def _url(config: ServerConfig, scope: Scope) -> str:
    if not config.excluded.wants_url:
        return ""
    host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
    return f"{scope.get('scheme', 'http')}://{host}{scope.get('path', '')}"
