"""
The old HTTP attribute names beside the stable ones.
"""

from __future__ import annotations

from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from otel_correlation.export import with_old_names

CONTEXT = SpanContext(1, 2, is_remote=False, trace_flags=TraceFlags(1))


def translated(kind: SpanKind, attributes: dict[str, Any]) -> dict[str, Any]:
    return dict(with_old_names(ReadableSpan("s", CONTEXT, kind=kind, attributes=attributes)).attributes or {})


def test_a_server_span_gets_the_old_names() -> None:
    """
    A SERVER span has every old attribute beside its own.
    """
    new = {
        "http.request.method": "GET",
        "http.response.status_code": 200,
        "http.route": "/items/{id}",
        "url.path": "/items/1",
        "url.query": "q=x",
        "url.scheme": "http",
        "server.address": "localhost",
        "server.port": 8000,
        "client.address": "127.0.0.1",
        "client.port": 50000,
        "network.protocol.version": "1.1",
        "user_agent.original": "curl/8",
    }
    old = {
        "http.method": "GET",
        "http.status_code": 200,
        "http.target": "/items/1",
        "http.url": "http://localhost:8000/items/1?q=x",
        "http.scheme": "http",
        "http.host": "localhost:8000",
        "http.server_name": "localhost:8000",
        "net.host.name": "localhost",
        "net.host.port": 8000,
        "net.peer.ip": "127.0.0.1",
        "http.client_ip": "127.0.0.1",
        "net.peer.port": 50000,
        "http.flavor": "1.1",
        "http.user_agent": "curl/8",
    }
    assert translated(SpanKind.SERVER, new) == {**new, **old}


def test_a_client_span_gets_the_old_names() -> None:
    """
    A CLIENT span has every old attribute beside its own.
    """
    new = {
        "http.request.method": "POST",
        "url.full": "https://api.example.com/x?a=1",
        "server.address": "api.example.com",
        "server.port": 443,
        "http.response.status_code": 503,
    }
    old = {
        "http.method": "POST",
        "http.url": "https://api.example.com/x?a=1",
        "http.host": "api.example.com",
        "net.peer.name": "api.example.com",
        "net.peer.port": 443,
        "http.status_code": 503,
    }
    assert translated(SpanKind.CLIENT, new) == {**new, **old}


def test_other_spans_are_handed_through() -> None:
    """
    A span that is no HTTP span, or an application's own, is the same object.
    """
    others: list[tuple[SpanKind, dict[str, Any]]] = [
        (SpanKind.CLIENT, {"db.system": "x"}),
        (SpanKind.INTERNAL, {"http.request.method": "GET", "http.response.status_code": 200}),
    ]
    for kind, attributes in others:
        span = ReadableSpan("s", CONTEXT, kind=kind, attributes=attributes)
        assert with_old_names(span) is span


def test_contribs_message_spans_get_the_old_status() -> None:
    """
    The span around the sending of a response's start has the old status beside the new one.
    """
    new = {"asgi.event.type": "http.response.start", "http.response.status_code": 500}
    assert translated(SpanKind.INTERNAL, new) == {**new, "http.status_code": 500}


def test_the_rest_of_the_span_stays_and_own_values_win() -> None:
    """
    Name, ids, times, status, resource and an old attribute set by hand are kept.
    """
    span = ReadableSpan(
        "GET /",
        CONTEXT,
        parent=SpanContext(1, 3, is_remote=True),
        resource=Resource({"service.name": "s"}),
        attributes={"http.request.method": "GET", "url.path": "/", "http.method": "own"},
        kind=SpanKind.SERVER,
        status=Status(StatusCode.ERROR, "why"),
        start_time=1,
        end_time=2,
    )
    found = with_old_names(span)
    assert (found.attributes or {})["http.method"] == "own"
    for name in ("name", "context", "parent", "resource", "kind", "status", "start_time", "end_time"):
        assert getattr(found, name) == getattr(span, name)
