"""
An application inside another one's edge: what it was instrumented with is done to the one SERVER span.

Its hooks, excluded URLs and captured headers hold for the requests that reach it. Tracer and meter provider are those
of the outermost application: there is one span for both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from otel_correlation import guard, semconv
from otel_correlation.edge._entry import is_excluded
from otel_correlation.edge._http import spanned_receive, spanned_send
from otel_correlation.edge._record import Record, call_hook
from otel_correlation.identity import detach
from otel_correlation.policy import DEFAULT
from otel_correlation.upstream.api import SPAN_KEY as _SPAN_KEY

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from otel_correlation.edge._record import ASGIApp, Message, Receive, Scope, Send, ServerConfig

# See clients/_seams.py: a test's report shows the user's frames.
__tracebackhide__ = True


async def serve_inner(config: ServerConfig, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """
    Run an application that was instrumented on its own, inside the edge that the request has already.

    Args:
        config: What the application was told.
        app: The application.
        scope: The request's scope; the edge's record stands in it.
        receive: What the application receives by.
        send: What it sends by.
    """
    token: Any = None
    try:
        record = scope[semconv.SCOPE_KEY]
        if isinstance(record, Record) and record.span is not None:
            if config.excludes and is_excluded(config, scope):
                token = _leave_out(record)
            else:
                receive, send = _apply(config, record, scope, receive, send)
    except Exception:  # noqa: BLE001 - our failure is not the application's
        guard.report("edge.inner")
    try:
        await app(scope, receive, send)
    finally:
        if token is not None:
            detach(token)


def _apply(config: ServerConfig, record: Record, scope: Scope, receive: Receive, send: Send) -> tuple[Receive, Send]:
    span = record.span
    if config.server_request_hook is not None and span is not None:
        call_hook(span, config.server_request_hook, scope)
    if config.request_headers is not None and record.recording is not None:
        # What the edge refused is not in the scope any more.
        captured = config.request_headers.attributes(scope["headers"], _bounds(record))
        for key, values in captured.items():
            record.recording.set_attribute(key, values)
    if config.response_headers is not None:
        send = _captured(config, record, send)
    if config.receive_spans:
        receive = spanned_receive(config, record, scope, receive)
    if config.send_spans:
        send = spanned_send(config, record, scope, send)
    return receive, send


def _captured(config: ServerConfig, record: Record, send: Send) -> Send:
    """
    Capture response headers as the application sent them.
    """

    def capturing(message: Message) -> Awaitable[None]:
        capture, span = config.response_headers, record.recording
        if capture is not None and span is not None and "headers" in message:
            try:
                for key, values in capture.attributes(list(message["headers"]), _bounds(record)).items():
                    span.set_attribute(key, values)
            except Exception:  # noqa: BLE001 - our failure is not the application's
                guard.report("edge.inner")
        return send(message)

    return capturing


def _bounds(record: Record) -> Any:
    tracer = record.config.tracer
    return DEFAULT if tracer is None else tracer.bounds


def _leave_out(record: Record) -> Any:
    """
    Take the SERVER span out of its trace, as if the request had been excluded at the edge; return a context's token.

    The span has begun, so it ends, too: every span processor sees both. It is not sampled any more, and what the
    application does belongs to the caller's span, if there is one.
    """
    span: Any = record.span
    held: SpanContext = span.get_span_context()
    flags = TraceFlags(held.trace_flags & TraceFlags.RANDOM_TRACE_ID)
    unsampled = SpanContext(held.trace_id, held.span_id, False, flags, held.trace_state)
    if hasattr(span, "_context"):
        span._context = unsampled
    record.span = record.identity.span = None
    shown = getattr(span, "parent", None) or unsampled
    return otel_context.attach(Context({**otel_context.get_current(), _SPAN_KEY: NonRecordingSpan(shown)}))
