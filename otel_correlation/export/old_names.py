"""
The HTTP attribute names of before the stable conventions, beside the new ones (``OTEL_SEMCONV_STABILITY_OPT_IN``).

One table, applied while exporting, so that the hot path knows one set of names only.

See: OpenTelemetry semantic conventions, docs/non-normative/http-migration.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind

from otel_correlation.upstream.sdk import BoundedAttributes

if TYPE_CHECKING:
    from collections.abc import Mapping

_BOTH: Final = {
    "http.request.method": ("http.method",),
    "http.response.status_code": ("http.status_code",),
    "network.protocol.version": ("http.flavor",),
    "user_agent.original": ("http.user_agent",),
    "url.scheme": ("http.scheme",),
}
OLD_NAMES: Final[dict[SpanKind, dict[str, tuple[str, ...]]]] = {
    SpanKind.SERVER: {
        **_BOTH,
        "server.address": ("net.host.name",),
        "server.port": ("net.host.port",),
        "client.address": ("net.peer.ip", "http.client_ip"),
        "client.port": ("net.peer.port",),
    },
    SpanKind.CLIENT: {
        **_BOTH,
        "url.full": ("http.url",),
        "server.address": ("http.host", "net.peer.name"),
        "server.port": ("net.peer.port",),
    },
    # Contrib's spans around single ASGI messages, which only exclude_spans=[] asks for.
    SpanKind.INTERNAL: {"http.response.status_code": ("http.status_code",)},
}


def _composed(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the old attributes of a SERVER span that are made of several new ones.
    """
    path = attributes.get("url.path")
    if not path:
        return {}
    query = attributes.get("url.query")
    target = f"{path}?{query}" if query else path
    # The path alone, against the old convention's letter: contrib's spans, which this is for, never had the query here.
    old = {"http.target": path}
    scheme, host, port = (attributes.get(name) for name in ("url.scheme", "server.address", "server.port"))
    if scheme and host:
        default = {"http": 80, "https": 443, "ws": 80, "wss": 443}.get(scheme)
        shown = f"[{host}]" if ":" in host else host
        authority = shown if port in (None, default) else f"{shown}:{port}"
        old["http.url"] = f"{scheme}://{authority}{target}"
        old["http.host"] = old["http.server_name"] = authority
    return old


def with_old_names(span: ReadableSpan) -> ReadableSpan:
    """
    Return an HTTP span with the old names added, any other span unchanged. Attributes that are there are kept.
    """
    table = OLD_NAMES.get(span.kind)
    attributes = span.attributes or {}
    mark = "asgi.event.type" if span.kind is SpanKind.INTERNAL else "http.request.method"
    if table is None or mark not in attributes:
        return span
    old = _composed(attributes) if span.kind is SpanKind.SERVER else {}
    for name, names in table.items():
        if name in attributes:
            old.update(dict.fromkeys(names, attributes[name]))
    both = BoundedAttributes(attributes={**old, **attributes}, immutable=True)
    both.dropped = span.dropped_attributes
    return ReadableSpan(
        name=span.name,
        context=span.get_span_context(),
        parent=span.parent,
        resource=span.resource,
        attributes=both,
        events=span._events,
        links=span._links,
        kind=span.kind,
        status=span.status,
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )
