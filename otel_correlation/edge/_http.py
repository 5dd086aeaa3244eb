"""
One HTTP request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.semconv.attributes import http_attributes
from opentelemetry.trace import SpanKind

from otel_correlation import guard, identity, logs, semconv
from otel_correlation.clocks import perf_counter_ns
from otel_correlation.edge._entry import enter
from otel_correlation.edge._record import call_hook, comes_from, finish, leave
from otel_correlation.edge._response import with_ids
from otel_correlation.identity import detach
from otel_correlation.upstream.api import SPAN_KEY as _SPAN_KEY

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from opentelemetry.trace import Span

    from otel_correlation.edge._record import ASGIApp, Message, Receive, Record, Scope, Send, ServerConfig
    from otel_correlation.tracer import Tracer

# See clients/_seams.py: a test's report shows the user's frames.
__tracebackhide__ = True


async def serve_http(config: ServerConfig, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """
    Run the application for one request; what it raises passes through unchanged.
    """
    try:
        logs.settle()
        record, context = enter(config, scope, scope["method"])
    except Exception:  # noqa: BLE001 - our failure is not the application's
        scope.pop(semconv.SCOPE_KEY, None)
        guard.report("edge.enter")
        await app(scope, receive, send)
        return
    if config.metrics is not None:
        with guard.never_raise("edge.metrics"):
            config.metrics.started(record, scope)
    # Whatever context a server leaked into this task (pipelining) is covered by ours until the end.
    token = otel_context.attach(context)
    if config.server_request_hook is not None and record.span is not None:
        call_hook(record.span, config.server_request_hook, scope)

    def edge_send(message: Message) -> Awaitable[None]:
        kind = message["type"]
        if kind == "http.response.body":
            if message.get("more_body"):
                record.flowing = True
            else:
                record.complete = True
                record.finished_ns = perf_counter_ns()
        elif kind == "http.response.start":
            try:
                record.status = message["status"]
                message = with_ids(record, message)
            except Exception:  # noqa: BLE001 - our failure is not the application's
                guard.report("edge.response")
        elif kind == "http.response.pathsend":
            record.complete = True
            record.finished_ns = perf_counter_ns()
        return send(message)

    async def edge_receive() -> Message:
        message = await receive()
        if message["type"] == "http.disconnect":
            record.left()
        return message

    inner_receive: Receive = edge_receive
    inner_send: Send = edge_send
    if config.receive_spans:
        inner_receive = spanned_receive(config, record, scope, inner_receive)
    if config.send_spans:
        inner_send = spanned_send(config, record, scope, inner_send)
    try:
        await app(scope, inner_receive, inner_send)
    except BaseException as error:
        if isinstance(error, OSError) and comes_from(error, send):
            record.lost()
            record.forgive()
        else:
            record.error = error
            record.status = record.status or 500
        identity.stash(error)
        raise
    finally:
        try:
            _ask_server(record, receive)
            finish(record, scope)
        except Exception:  # noqa: BLE001 - our failure is not the application's
            guard.report("edge.finish")
        leave(record, scope, token)


def _ask_server(record: Record, receive: Receive) -> None:
    """
    Ask whether the server saw the client go before the response was complete, and whether it had sent anything.

    A handler that reads nothing more is told of it by nobody: uvicorn drops what it sends. ``receive`` is a method of
    uvicorn's request object, which keeps these flags (all HTTP implementations); other servers have none.
    """
    cycle = getattr(receive, "__self__", None)
    if getattr(cycle, "disconnected", False) is True:
        record.disconnected = True
        record.unsent = getattr(cycle, "response_started", True) is False


def spanned_receive(config: ServerConfig, record: Record, scope: Scope, receive: Receive) -> Receive:
    """
    Make contrib's internal span for each received message.
    """

    async def spanned() -> Message:
        span = _internal_span(config, record, scope, "receive")
        token = otel_context.attach(Context({**otel_context.get_current(), _SPAN_KEY: span}))
        try:
            message = await receive()
            if config.client_request_hook is not None:
                call_hook(span, config.client_request_hook, scope, message)
            if message["type"] == "websocket.receive":
                span.set_attribute(http_attributes.HTTP_RESPONSE_STATUS_CODE, 200)
            span.set_attribute("asgi.event.type", message["type"])
            return message
        finally:
            detach(token)
            span.end()

    return spanned


def spanned_send(config: ServerConfig, record: Record, scope: Scope, send: Send) -> Send:
    """
    Make contrib's internal span for each sent message.
    """

    async def spanned(message: Message) -> None:
        span = _internal_span(config, record, scope, "send")
        token = otel_context.attach(Context({**otel_context.get_current(), _SPAN_KEY: span}))
        try:
            if config.client_response_hook is not None:
                call_hook(span, config.client_response_hook, scope, message)
            span.set_attribute("asgi.event.type", message["type"])
            if message["type"] == "http.response.start":
                span.set_attribute(http_attributes.HTTP_RESPONSE_STATUS_CODE, message.get("status", 0))
            elif message["type"] == "websocket.send":
                span.set_attribute(http_attributes.HTTP_RESPONSE_STATUS_CODE, 200)
        finally:
            detach(token)
            span.end()
        await send(message)

    return spanned


def _internal_span(config: ServerConfig, record: Record, scope: Scope, what: str) -> Span:
    name = f"{record.span_name()} {scope['type']} {what}"
    return cast("Tracer", config.tracer).start(name, SpanKind.INTERNAL, otel_context.get_current(), {})
