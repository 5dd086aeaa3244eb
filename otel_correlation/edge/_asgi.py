"""
The hot path of a request, for any ASGI application.

In order: an empty context, the headers once, exactly one request id, the parent, the sampling decision and the span;
then the application; then the response header, the route and the end of the span.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final, cast

from opentelemetry import context as otel_context
from opentelemetry import propagate
from opentelemetry.context import Context
from opentelemetry.instrumentation.propagators import get_global_response_propagator
from opentelemetry.propagators.textmap import Getter, Setter
from opentelemetry.semconv.attributes import (
    client_attributes,
    error_attributes,
    http_attributes,
    network_attributes,
    server_attributes,
    url_attributes,
    user_agent_attributes,
)
from opentelemetry.trace import (
    INVALID_SPAN_CONTEXT,
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    get_current_span,
)
from opentelemetry.trace.propagation import _SPAN_KEY
from opentelemetry.util.http import sanitize_method

from otel_correlation import guard, identity, ids, logs, propagators, semconv
from otel_correlation.identity import Identity
from otel_correlation.policy import redact_query
from otel_correlation.request_id import from_headers, to_trace_id, to_uuid
from otel_correlation.tracer import record_exception

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    from otel_correlation.policy import HeaderCapture, Patterns
    from otel_correlation.settings import Settings
    from otel_correlation.tracer import Tracer

    Scope = MutableMapping[str, Any]
    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
    Hook = Callable[..., Any]

_METHODS: Final = frozenset({"GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT"})
_PROPAGATION: Final = frozenset({b"traceparent", b"tracestate", b"baggage"})
_CLIENT_GONE: Final = 499  # what nginx logs for a client that went away before its response

_reuse_guard = ids.ReuseGuard()


@dataclass(slots=True)
class ServerConfig:
    """
    What one application's edge does; built once, read for every request.

    Attributes:
        settings: The settings.
        tracer: Starts the SERVER spans; None where the SDK is disabled.
        excluded: Paths without a span.
        textmap: A propagator made of ours alone; while it is the global one, headers take the fast way.
        request_headers: Request headers to capture.
        response_headers: Response headers to capture.
        metrics: Records durations and active requests, or None.
        server_request_hook: Called with the SERVER span and the scope.
        client_request_hook: Called with a receive span, the scope and the message.
        client_response_hook: Called with a send span, the scope and the message.
        receive_spans: Whether ``http receive`` spans are made.
        send_spans: Whether ``http send`` spans are made.
    """

    settings: Settings
    tracer: Tracer | None
    excluded: Patterns
    textmap: Any = None
    request_headers: HeaderCapture | None = None
    response_headers: HeaderCapture | None = None
    metrics: Any = None
    server_request_hook: Hook | None = None
    client_request_hook: Hook | None = None
    client_response_hook: Hook | None = None
    receive_spans: bool = False
    send_spans: bool = False
    id_names: frozenset[bytes] = field(init=False)
    wanted: frozenset[bytes] = field(init=False)
    response_header: bytes = field(init=False)

    def __post_init__(self) -> None:
        """
        Derive what every request needs.
        """
        self.id_names = frozenset(self.settings.request_id_headers)
        self.wanted = self.id_names | _PROPAGATION
        self.response_header = self.settings.response_header.lower().encode("ascii")


class Record:
    """
    One request as the edge sees it; it stands in the ASGI scope, so that inner edges only forward.
    """

    __slots__ = (
        "complete",
        "config",
        "disconnected",
        "error",
        "finished_ns",
        "identity",
        "method",
        "mount",
        "name",
        "opaque_mount",
        "reused",
        "route",
        "span",
        "started_ns",
        "status",
    )

    def __init__(self, config: ServerConfig, method: str) -> None:
        self.config = config
        self.method = method
        self.name = method if method in _METHODS else _span_method(method)
        self.mount = ""
        self.opaque_mount = False
        self.route: str | None = None
        self.status = 0
        self.error: BaseException | None = None
        self.complete = False
        self.disconnected = False
        self.reused = False
        self.started_ns = perf_counter_ns()
        self.finished_ns = 0
        self.span: Span | None = None
        self.identity: Identity | None = None

    def matched(self, path: str) -> None:
        """
        Note the template of the route that handles the request.
        """
        self.route = self.mount + path
        self.opaque_mount = False

    def mounted(self, path: str, *, opaque: bool) -> None:
        """
        Note that an application mounted at ``path`` handles the request; ``opaque`` if it has no routes of its own.
        """
        self.mount += path
        self.opaque_mount = opaque

    def final_route(self) -> str | None:
        """
        Return the template with every static segment, or None where no route matched.
        """
        if self.route is not None:
            return self.route
        return f"{self.mount}/{{path}}" if self.opaque_mount else None

    def span_name(self) -> str:
        """
        Return ``{method} {route}``, or the method alone.
        """
        route = self.final_route()
        return f"{self.name} {route}" if route else self.name


def _span_method(method: str) -> str:
    known = sanitize_method(method)
    return "HTTP" if known == "_OTHER" else known


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


class _MessageSetter(Setter[Any]):
    """
    Writes response headers for a response propagator that is not ours.
    """

    def set(self, carrier: Message, key: str, value: str) -> None:
        name = key.lower().encode("latin-1")
        kept = [pair for pair in carrier.get("headers", ()) if pair[0].lower() != name]
        carrier["headers"] = [*kept, (name, value.encode("latin-1"))]


_getter = _ScopeGetter()
_setter = _MessageSetter()


def _collect(scope: Scope, record: Record, received: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    """
    Return the SERVER span's attributes that are known at its start (semantic conventions, HTTP server).
    """
    config = record.config
    values: dict[str, Any] = {
        http_attributes.HTTP_REQUEST_METHOD: record.method,
        url_attributes.URL_SCHEME: scope.get("scheme", "http"),
        url_attributes.URL_PATH: scope.get("path", ""),
        network_attributes.NETWORK_PROTOCOL_VERSION: scope.get("http_version", "1.1"),
    }
    if record.method not in _METHODS:
        known = sanitize_method(record.method)
        values[http_attributes.HTTP_REQUEST_METHOD] = known
        if known == "_OTHER":
            values[http_attributes.HTTP_REQUEST_METHOD_ORIGINAL] = record.method
    if query := scope.get("query_string"):
        text = query.decode("latin-1") if isinstance(query, bytes) else str(query)
        values[url_attributes.URL_QUERY] = redact_query(text, config.settings.query_values)
    client = scope.get("client")
    if client:
        values[client_attributes.CLIENT_ADDRESS] = client[0]
        values[client_attributes.CLIENT_PORT] = client[1]
    host = b""
    for name, value in received:
        if name == b"host":
            host = value
        elif name == b"user-agent":
            values[user_agent_attributes.USER_AGENT_ORIGINAL] = value.decode("latin-1")
    _add_server(values, host, scope)
    if config.request_headers:
        values.update(config.request_headers.attributes(received))
    if record.reused:
        values[semconv.REUSED_REQUEST_ID] = True
    return values


def _add_server(values: dict[str, Any], host: bytes, scope: Scope) -> None:
    if host:
        name, colon, port = host.decode("latin-1").rpartition(":")
        if colon and port.isascii() and port.isdigit() and len(port) < 6:
            values[server_attributes.SERVER_ADDRESS] = name
            values[server_attributes.SERVER_PORT] = int(port)
        else:
            values[server_attributes.SERVER_ADDRESS] = host.decode("latin-1")
            values[server_attributes.SERVER_PORT] = 443 if scope.get("scheme") in ("https", "wss") else 80
    elif server := scope.get("server"):
        values[server_attributes.SERVER_ADDRESS] = server[0]
        if server[1] is not None:
            values[server_attributes.SERVER_PORT] = server[1]


def _extract(config: ServerConfig, scope: Scope, found: dict[bytes, list[bytes]]) -> tuple[SpanContext | None, Context]:
    """
    Return the caller's span context, if it sent a valid one, and what else it propagates.
    """
    if config.settings.sdk_disabled:
        return None, Context()
    textmap = propagate.get_global_textmap()
    if textmap is not config.textmap:
        context = textmap.extract(scope, Context(), _getter)
        caller = get_current_span(context).get_span_context()
        return (caller if caller.is_valid else None), context
    names = config.settings.propagators
    parent = None
    context = Context()
    if found:
        if b"traceparent" in found and "tracecontext" in names:
            parent = propagators.extract_from_headers(found[b"traceparent"], found.get(b"tracestate", []))
        if b"baggage" in found and "baggage" in names:
            context = propagators.extract_baggage_from_headers(found[b"baggage"], context)
    return parent, context


def _identify(
    config: ServerConfig, record: Record, parent: SpanContext | None, received: str | None
) -> tuple[str, int | None, bool]:
    """
    Apply the mapping table: return the request id, the root's trace id (None below a parent) and whether it is minted.
    """
    if parent is not None:
        return received or f"{parent.trace_id:032x}", None, False
    if received is not None:
        mapped = to_trace_id(received)
        if mapped is not None:
            if _reuse_guard.allows(mapped):
                return received, mapped, False
            record.reused = True
            guard.count("request_id.reused")
            guard.warn_seldom(
                "reuse", "A caller sends one request id again and again; its requests get traces of their own now"
            )
        return received, _new_trace_id(config), True
    trace_id = _new_trace_id(config)
    if config.settings.mint == "uuid":
        minted = to_uuid(trace_id)
        return minted, to_trace_id(minted), False
    return f"{trace_id:032x}", trace_id, True


def _new_trace_id(config: ServerConfig) -> int:
    return ids.random_trace_id() if config.tracer is None else config.tracer.new_trace_id()


def _enter(config: ServerConfig, scope: Scope, method: str) -> tuple[Record, Context]:
    """
    Do everything that comes before the application; never awaits.
    """
    record = Record(config, method)
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    wanted = config.wanted
    found: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        if name in wanted:
            if name in found:
                found[name].append(value)
            else:
                found[name] = [value]
    received, refused = _received_id(config, found)
    parent, context = _extract(config, scope, found)
    final, trace_id, minted = _identify(config, record, parent, received)
    record.identity = who = Identity(final)
    _rewrite_headers(config, scope, headers, found, final, refused=refused)
    scope[semconv.SCOPE_KEY] = record
    scope["fastapi.telemetry"] = None
    state = scope.get("state")
    scope["state"] = {**state, semconv.REQUEST_ID: final} if isinstance(state, dict) else {semconv.REQUEST_ID: final}
    if "app_root_path" in scope:
        # Mounted under an application without an edge: its prefix is all that is known of the outer route.
        record.mount = scope.get("root_path", "")[len(scope["app_root_path"]) :]
    if config.tracer is None:
        return record, identity.set_in(context, who)
    if parent is not None and _SPAN_KEY not in context:
        context = Context({**context, _SPAN_KEY: NonRecordingSpan(parent)})
    context = identity.set_in(context, who)
    if config.excluded and config.excluded.match(scope.get("path", ""), _url(config, scope)):
        if parent is None and trace_id is not None:
            # Ids for the log lines; unsampled, so that nothing below it is exported as an orphan.
            flags = TraceFlags(TraceFlags.RANDOM_TRACE_ID if minted else 0)
            root = SpanContext(trace_id, ids.random_span_id(), False, flags)
            context = Context({**context, _SPAN_KEY: NonRecordingSpan(root)})
        return record, context
    span = config.tracer.start(
        record.name,
        SpanKind.SERVER,
        context,
        partial(_collect, scope, record, headers),
        trace_id=trace_id,
        minted=minted,
    )
    record.span = who.span = span
    return record, Context({**context, _SPAN_KEY: span})


def _url(config: ServerConfig, scope: Scope) -> str:
    if not config.excluded.wants_url:
        return ""
    host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
    return f"{scope.get('scheme', 'http')}://{host}{scope.get('path', '')}"


def _received_id(config: ServerConfig, found: dict[bytes, list[bytes]]) -> tuple[str | None, bool]:
    if not found:
        return None, False
    pairs = [(name, value) for name in found if name in config.id_names for value in found[name]]
    if not pairs:
        return None, False
    received, refused = from_headers(pairs, config.settings.request_id_headers)
    if refused:
        guard.count("request_id.refused")
        guard.warn_seldom("refused", "A request id that is not valid was replaced (its value is never logged)")
    return received, refused


def _rewrite_headers(
    config: ServerConfig,
    scope: Scope,
    headers: list[tuple[bytes, bytes]],
    found: dict[bytes, list[bytes]],
    final: str,
    *,
    refused: bool,
) -> None:
    """
    Make ``request.headers`` carry the final id; a refused value is not seen by the application.
    """
    name = config.settings.request_id_headers[0]
    value = final.encode("ascii")
    if found.get(name) == [value]:
        return
    gone = {name}
    if refused:
        gone.add(next(entry for entry in config.settings.request_id_headers if entry in found))
    scope["headers"] = [pair for pair in headers if pair[0] not in gone] + [(name, value)]


def _response_headers(record: Record, message: Message) -> None:
    """
    Put the request id on a response: exactly once, in place of one that the application set.
    """
    config = record.config
    who = cast("Identity", record.identity)
    name = config.response_header
    ours = [(name, who.request_id.encode("ascii"))]
    settings = config.settings
    if settings.traceresponse or settings.server_timing:
        ours += _trace_response(record)
    kept: list[tuple[bytes, bytes]] = []
    exposed: list[bytes] = []
    cors = False
    for pair in message.get("headers", ()):
        key = pair[0].lower()
        if key == name or (len(ours) > 1 and key == b"traceresponse" and settings.traceresponse):
            continue
        if key.startswith(b"access-control-"):
            if key == b"access-control-expose-headers":
                exposed.append(pair[1])
                continue
            cors = cors or key == b"access-control-allow-origin"
        kept.append(pair)
    if cors:
        listed = b",".join(exposed)
        names = {entry.strip().lower() for entry in listed.split(b",")}
        missing = [
            entry.encode("ascii") for entry in (settings.response_header,) if entry.lower().encode() not in names
        ]
        if settings.traceresponse and b"traceresponse" not in names:
            missing.append(b"traceresponse")
        if b"*" not in names:
            exposed = [b", ".join(([listed] if listed else []) + missing)]
    kept += [(b"access-control-expose-headers", value) for value in exposed]
    message["headers"] = kept + ours
    foreign = get_global_response_propagator()
    if foreign is not None:
        foreign.inject(message, otel_context.get_current(), setter=_setter)
    span = record.span
    if config.response_headers and span is not None and span.is_recording():
        for key, values in config.response_headers.attributes(kept + ours).items():
            span.set_attribute(key, values)


def _trace_response(record: Record) -> list[tuple[bytes, bytes]]:
    span = record.span
    span_context = INVALID_SPAN_CONTEXT if span is None else span.get_span_context()
    if not span_context.is_valid:
        return []
    value = propagators.format_traceparent(span_context).encode("ascii")
    pairs = [(b"traceresponse", value)] if record.config.settings.traceresponse else []
    if record.config.settings.server_timing:
        pairs.append((b"server-timing", b"trace;desc=" + value))
    return pairs


def _finish(record: Record, scope: Scope) -> None:
    """
    Do everything that comes after the application; its context is still current.
    """
    config = record.config
    elapsed_ns = (record.finished_ns or perf_counter_ns()) - record.started_ns
    route = record.final_route()
    status = record.status
    gone = record.disconnected and not record.complete
    span = record.span
    if span is not None and span.is_recording():
        if route:
            span.update_name(f"{record.name} {route}")
            span.set_attribute(http_attributes.HTTP_ROUTE, route)
        if record.error is not None:
            _record_error(span, record.error)
        if gone:
            span.set_attribute(semconv.CLIENT_DISCONNECTED, True)
            span.set_attribute(error_attributes.ERROR_TYPE, "client_disconnected")
        elif status:
            span.set_attribute(http_attributes.HTTP_RESPONSE_STATUS_CODE, status)
            if status >= 500 and record.error is None:
                span.set_attribute(error_attributes.ERROR_TYPE, str(status))
                span.set_status(StatusCode.ERROR)
        start_ns = getattr(span, "start_time", None)
        span.end(start_ns + elapsed_ns if isinstance(start_ns, int) else None)
    if config.metrics is not None and scope["type"] == "http":
        config.metrics.finished(record, scope, elapsed_ns / 1e9)
    shown = _CLIENT_GONE if gone else status or 500
    logs.summary(record.method, route, scope.get("path", ""), shown, elapsed_ns / 1e6)


def _record_error(span: Span, error: BaseException) -> None:
    if isinstance(error, Exception):
        record_exception(span, error)
    else:
        # Cancelled, or the process ends: visible, but no traceback of somebody's bug.
        span.set_attribute(error_attributes.ERROR_TYPE, type(error).__qualname__)
        span.set_status(StatusCode.ERROR)


async def serve(config: ServerConfig, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """
    Run ``app`` behind the edge; anything but http and websocket passes through.
    """
    kind = scope["type"]
    if kind == "http":
        await _serve_http(config, app, scope, receive, send)
    elif kind == "websocket":
        await _serve_websocket(config, app, scope, receive, send)
    else:
        if kind == "lifespan":
            logs.settle()
        await app(scope, receive, send)


async def _serve_http(config: ServerConfig, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    # Whatever context a server leaked into this task (pipelining) is covered by ours until the end.
    try:
        logs.settle()
        record, context = _enter(config, scope, scope["method"])
    except Exception:  # noqa: BLE001 - our failure is not the application's
        guard.report("edge.enter")
        await app(scope, receive, send)
        return
    token = otel_context.attach(context)
    if config.metrics is not None:
        config.metrics.started(record, scope)
    if config.server_request_hook is not None and record.span is not None and record.span.is_recording():
        _call_hook(record.span, config.server_request_hook, scope)

    def edge_send(message: Message) -> Awaitable[None]:
        kind = message["type"]
        if kind == "http.response.start":
            record.status = message["status"]
            try:
                _response_headers(record, message)
            except Exception:  # noqa: BLE001 - our failure is not the application's
                guard.report("edge.response")
        elif (kind == "http.response.body" and not message.get("more_body")) or kind == "http.response.pathsend":
            record.complete = True
            record.finished_ns = perf_counter_ns()
        return send(message)

    async def edge_receive() -> Message:
        message = await receive()
        if message["type"] == "http.disconnect" and not record.complete:
            record.disconnected = True
        return message

    inner_receive: Receive = edge_receive
    inner_send: Send = edge_send
    if config.receive_spans:
        inner_receive = _spanned_receive(config, record, scope, inner_receive)
    if config.send_spans:
        inner_send = _spanned_send(config, record, scope, inner_send)
    try:
        await app(scope, inner_receive, inner_send)
    except BaseException as error:
        record.error = error
        if not record.status:
            record.status = 500
        identity.stash(error)
        raise
    finally:
        try:
            _finish(record, scope)
        except Exception:  # noqa: BLE001 - our failure is not the application's
            guard.report("edge.finish")
        _detach(token)


def _detach(token: Any) -> None:
    # Not context.detach(): it logs a traceback where a generator was closed in another context, which is no news.
    try:
        otel_context._RUNTIME_CONTEXT.detach(token)
    except (ValueError, RuntimeError):
        guard.count("context.detach_failed")


def _call_hook(span: Span, hook: Hook, *arguments: Any) -> None:
    try:
        hook(span, *arguments)
    except Exception as error:  # noqa: BLE001 - a hook's failure is shown on the span, as contrib does
        span.record_exception(error)


def _spanned_receive(config: ServerConfig, record: Record, scope: Scope, receive: Receive) -> Receive:
    """
    Make contrib's internal span for each received message.
    """

    async def spanned() -> Message:
        span = _internal_span(config, record, scope, "receive")
        token = otel_context.attach(Context({**otel_context.get_current(), _SPAN_KEY: span}))
        try:
            message = await receive()
            if config.client_request_hook is not None:
                _call_hook(span, config.client_request_hook, scope, message)
            if message["type"] == "websocket.receive":
                span.set_attribute(http_attributes.HTTP_RESPONSE_STATUS_CODE, 200)
            span.set_attribute("asgi.event.type", message["type"])
            return message
        finally:
            _detach(token)
            span.end()

    return spanned


def _spanned_send(config: ServerConfig, record: Record, scope: Scope, send: Send) -> Send:
    """
    Make contrib's internal span for each sent message.
    """

    async def spanned(message: Message) -> None:
        span = _internal_span(config, record, scope, "send")
        token = otel_context.attach(Context({**otel_context.get_current(), _SPAN_KEY: span}))
        try:
            if config.client_response_hook is not None:
                _call_hook(span, config.client_response_hook, scope, message)
            span.set_attribute("asgi.event.type", message["type"])
            if message["type"] == "http.response.start":
                span.set_attribute(http_attributes.HTTP_RESPONSE_STATUS_CODE, message["status"])
            elif message["type"] == "websocket.send":
                span.set_attribute(http_attributes.HTTP_RESPONSE_STATUS_CODE, 200)
        finally:
            _detach(token)
            span.end()
        await send(message)

    return spanned


def _internal_span(config: ServerConfig, record: Record, scope: Scope, what: str) -> Span:
    name = f"{record.span_name()} {scope['type']} {what}"
    return cast("Tracer", config.tracer).start(name, SpanKind.INTERNAL, otel_context.get_current(), {})


async def _serve_websocket(config: ServerConfig, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    try:
        logs.settle()
        record, context = _enter(config, scope, scope.get("method", "GET"))
    except Exception:  # noqa: BLE001 - our failure is not the application's
        guard.report("edge.enter")
        await app(scope, receive, send)
        return
    token = otel_context.attach(context)
    if config.server_request_hook is not None and record.span is not None and record.span.is_recording():
        _call_hook(record.span, config.server_request_hook, scope)
    socket = _Socket(record, scope, receive, send, context)
    inner_receive: Receive = socket.receive
    inner_send: Send = socket.send
    if config.receive_spans:
        inner_receive = _spanned_receive(config, record, scope, inner_receive)
    if config.send_spans:
        inner_send = _spanned_send(config, record, scope, inner_send)
    try:
        await app(scope, inner_receive, inner_send)
    except BaseException as error:
        record.error = error
        identity.stash(error)
        raise
    finally:
        try:
            socket.finish()
        except Exception:  # noqa: BLE001 - our failure is not the application's
            guard.report("edge.finish")
        _detach(token)


class _Socket:
    """
    One WebSocket: the SERVER span ends with the handshake, a short span tells the close.
    """

    def __init__(self, record: Record, scope: Scope, receive: Receive, send: Send, context: Context) -> None:
        self._record = record
        self._scope = scope
        self._receive = receive
        self._send = send
        self._context = context
        self._accepted = False
        self._handshake_over = False
        self._close_code: int | None = None
        self._message_span: Span | None = None
        self._message_token: Any = None

    async def receive(self) -> Message:
        """
        Receive; in message mode the last message's span ends here and the next one's starts.
        """
        self._end_message()
        message = await self._receive()
        kind = message["type"]
        if kind == "websocket.disconnect":
            if self._close_code is None:
                self._close_code = message.get("code", 1005)
        elif kind == "websocket.receive" and self._record.config.settings.websocket == "message":
            try:
                self._start_message()
            except Exception:  # noqa: BLE001 - our failure is not the application's
                guard.report("edge.message")
        return message

    async def send(self, message: Message) -> None:
        """
        Send; accept and refusal carry the request id and end the handshake.
        """
        kind = message["type"]
        if not self._handshake_over:
            try:
                if kind == "websocket.close" and "websocket.http.response" in (self._scope.get("extensions") or {}):
                    # As a plain close, the server would make a 403 that has no headers.
                    self._close_code = message.get("code", 1000)
                    message = {"type": "websocket.http.response.start", "status": 403, "headers": []}
                    _response_headers(self._record, message)
                    self._end_handshake(403)
                    await self._send(message)
                    message = {"type": "websocket.http.response.body", "body": b"", "more_body": False}
                elif kind == "websocket.accept":
                    self._accepted = True
                    _response_headers(self._record, message)
                    self._end_handshake(101)
                elif kind == "websocket.http.response.start":
                    _response_headers(self._record, message)
                    self._end_handshake(message["status"])
                elif kind == "websocket.close":
                    self._close_code = message.get("code", 1000)
                    self._end_handshake(403)
            except OSError:
                raise
            except Exception:  # noqa: BLE001 - our failure is not the application's
                guard.report("edge.websocket")
        elif kind == "websocket.close" and self._close_code is None:
            self._close_code = message.get("code", 1000)
        await self._send(message)

    def _end_handshake(self, status: int) -> None:
        record = self._record
        self._handshake_over = True
        record.status = status
        record.finished_ns = perf_counter_ns()
        record.complete = True
        _finish(record, self._scope)

    def _start_message(self) -> None:
        record = self._record
        tracer = record.config.tracer
        handshake = record.span
        if tracer is None or handshake is None:
            return
        base = Context({key: value for key, value in self._context.items() if key != _SPAN_KEY})
        span = tracer.start(
            f"{record.span_name()} message",
            SpanKind.SERVER,
            base,
            {},
            links=[Link(handshake.get_span_context())] if handshake.get_span_context().is_valid else (),
        )
        self._message_span = span
        # The handler's own task awaits us, so what is attached here is current in it until its next receive().
        self._message_token = otel_context.attach(Context({**base, _SPAN_KEY: span}))

    def _end_message(self) -> None:
        if self._message_span is not None:
            self._message_span.end()
            _detach(self._message_token)
            self._message_span = None

    def finish(self) -> None:
        """
        End what is open, and tell how the connection ended.
        """
        record = self._record
        span = self._message_span
        if span is not None and isinstance(record.error, Exception):
            record_exception(span, record.error)
        self._end_message()
        if not self._handshake_over:
            if record.error is None and self._close_code is not None:
                record.disconnected = True
            self._end_handshake(500 if record.error is not None else 403)
            return
        tracer = record.config.tracer
        if not self._accepted or tracer is None or record.span is None:
            return
        closing = tracer.start(
            f"{record.span_name()} close",
            SpanKind.INTERNAL,
            self._context,
            {
                semconv.WEBSOCKET_CLOSE_CODE: 1006 if self._close_code is None else self._close_code,
                "otel_correlation.websocket.duration": (perf_counter_ns() - record.finished_ns) / 1e9,
            },
        )
        if record.error is not None and span is None:
            _record_error(closing, record.error)
        closing.end()


class Edge:
    """
    An ASGI application behind the edge.

    Args:
        app: The application.
        config: What the edge does.
    """

    def __init__(self, app: ASGIApp, config: Callable[[], ServerConfig | None]) -> None:
        self.app = app
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """
        Serve one connection; inside another edge only forward.
        """
        config = self._config()
        if config is None or semconv.SCOPE_KEY in scope:
            await self.app(scope, receive, send)
            return
        await serve(config, self.app, scope, receive, send)


_default: Callable[[], ServerConfig | None] = lambda: None  # noqa: E731 - set by the plug


def set_default(config: Callable[[], ServerConfig | None]) -> None:
    """
    Say where ``edge(app)`` finds its configuration.
    """
    global _default  # noqa: PLW0603 - one process, one default
    _default = config


def edge(app: ASGIApp) -> Edge:
    """
    Put the edge around any ASGI application, so that wrappers outside FastAPI are inside the request, too.

    Args:
        app: A FastAPI application with ASGI wrappers around it, or any other ASGI application.
    """
    return Edge(app, lambda: _default())  # noqa: PLW0108 - looked up late: bootstrap may come after
