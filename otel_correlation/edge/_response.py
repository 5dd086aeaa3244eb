"""
What the edge writes on a response: the request id, exactly once, and what makes browsers show it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opentelemetry import context as otel_context
from opentelemetry.instrumentation.propagators import get_global_response_propagator
from opentelemetry.propagators.textmap import Setter

from otel_correlation import guard, propagators
from otel_correlation.policy import DEFAULT

if TYPE_CHECKING:
    from otel_correlation.edge._record import Message, Record, ServerConfig

_ALLOW_ORIGIN = b"access-control-allow-origin"
_ALLOW_CREDENTIALS = b"access-control-allow-credentials"
_EXPOSE = b"access-control-expose-headers"


class _MessageSetter(Setter[Any]):
    """
    Writes response headers for a response propagator that is not ours.
    """

    def set(self, carrier: Message, key: str, value: str) -> None:
        name = key.lower().encode("latin-1")
        kept = [pair for pair in carrier.get("headers", ()) if pair[0].lower() != name]
        carrier["headers"] = [*kept, (name, value.encode("latin-1"))]


_setter = _MessageSetter()


def with_ids(record: Record, message: Message) -> Message:
    """
    Return the message that starts a response, with the request id in place of one that the application set.

    A new message: an application may send one and the same for every request.
    """
    config = record.config
    ours = [(config.response_header, record.identity.request_id.encode("ascii"))]
    if config.has_trace_response:
        ours += _trace_response(record)
    headers = message.get("headers", ())
    touched = config.touched
    for name, _ in headers:
        if name.lower() in touched:
            headers = _merged(config, headers)
            break
    message = {**message, "headers": [*headers, *ours]}
    foreign = get_global_response_propagator()  # type: ignore[no-untyped-call]
    if foreign is not None:
        try:
            foreign.inject(message, otel_context.get_current(), setter=_setter)
        except Exception:  # noqa: BLE001 - somebody else's code
            guard.report("edge.response_propagator")
    if config.response_headers is not None and record.recording is not None:
        bounds = DEFAULT if config.tracer is None else config.tracer.bounds
        for key, values in config.response_headers.attributes(message["headers"], bounds).items():
            record.recording.set_attribute(key, values)
    return message


def _merged(config: ServerConfig, headers: Any) -> list[tuple[bytes, bytes]]:
    """
    Leave out what we replace, and name our headers where the response is for another origin's script.
    """
    replaced = {config.response_header}
    names = [config.settings.response_header]
    if config.settings.traceresponse:
        replaced.add(b"traceresponse")
        names.append("traceresponse")
    kept: list[tuple[bytes, bytes]] = []
    exposed: list[bytes] = []
    cors = credentials = False
    for name, value in headers:
        key = name.lower()
        if key == _EXPOSE:
            exposed.append(value)
        elif key not in replaced:
            kept.append((name, value))
            cors = cors or key == _ALLOW_ORIGIN
            credentials = credentials or key == _ALLOW_CREDENTIALS
    if cors:
        listed = [entry for value in exposed for part in value.split(b",") if (entry := part.strip())]
        present = {entry.lower() for entry in listed}
        # With credentials, "*" is a header's name and no wildcard (Fetch standard).
        if b"*" not in present or credentials:
            listed += [name.encode("ascii") for name in names if name.lower().encode("ascii") not in present]
            exposed = [b", ".join(listed)]
    return kept + [(_EXPOSE, value) for value in exposed]


def _trace_response(record: Record) -> list[tuple[bytes, bytes]]:
    if record.span is None:
        return []
    span_context = record.span.get_span_context()
    if not span_context.is_valid:
        return []
    settings = record.config.settings
    value = propagators.format_traceparent(span_context).encode("ascii")
    pairs = [(b"traceresponse", value)] if settings.traceresponse else []
    if settings.server_timing:
        pairs.append((b"server-timing", b"trace;desc=" + value))
    return pairs
