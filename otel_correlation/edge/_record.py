"""
What the edge knows of one request, and what it writes about it: the span's attributes, its route, its end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from operator import itemgetter
from time import time_ns
from typing import TYPE_CHECKING, Any, Final

from fastapi.exceptions import RequestValidationError, WebSocketRequestValidationError
from opentelemetry.semconv.attributes import (
    client_attributes,
    error_attributes,
    http_attributes,
    network_attributes,
    server_attributes,
    url_attributes,
    user_agent_attributes,
)
from opentelemetry.trace import StatusCode
from opentelemetry.util.http import sanitize_method
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from otel_correlation import guard, logs, semconv
from otel_correlation.clocks import perf_counter_ns
from otel_correlation.edge._validation import describe
from otel_correlation.export.sizes import SHORT, text_bytes, value_bytes
from otel_correlation.identity import detach, short_ones
from otel_correlation.outcome import only, outcome_of, record_exception, show, was_cancelled
from otel_correlation.policy import CUT, DEFAULT, FORWARDING, redact_query
from otel_correlation.tracer import LightSpan

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, MutableMapping
    from types import TracebackType

    from opentelemetry.trace import Span

    from otel_correlation.identity import Identity
    from otel_correlation.policy import Bounds, HeaderCapture, Patterns, Trust
    from otel_correlation.settings import Settings
    from otel_correlation.tracer import Tracer

    Scope = MutableMapping[str, Any]
    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
    Hook = Callable[..., Any]

_METHODS: Final = frozenset({"GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "QUERY"})
_PROPAGATION: Final = frozenset({b"traceparent", b"tracestate", b"baggage"})
# What the span shows of the headers.
_SHOWN: Final = frozenset({b"host", b"user-agent"})
# What a public gate ends whatever is configured, because services behind it may believe it: the request id by its usual
# name, and what the specification's propagators read (OpenTelemetry, context/api-propagators.md: B3, Jaeger, X-Ray).
_STANDARD: Final = frozenset(
    {
        *(b"x-request-id", b"x-amzn-trace-id", b"uber-trace-id"),
        *(b"b3", b"x-b3-traceid", b"x-b3-spanid", b"x-b3-parentspanid", b"x-b3-sampled", b"x-b3-flags"),
    }
)
_CLIENT_GONE: Final = 499  # what nginx logs for a client that went away before its response
_GONE: Final = "client_disconnected"
_INVALID_FIELD: Final = "validation_errors"
_ERROR_FIELD: Final = "error_type"


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
        trust: Whose ids are continued; everybody's if None.
        look_up: Finds the route of a request that no route told of.
        options: The keyword arguments that all this was built from.
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
    trust: Trust | None = None
    look_up: Callable[[Scope], str | None] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    id_names: frozenset[bytes] = field(init=False)
    wanted: frozenset[bytes] = field(init=False)
    told: frozenset[bytes] = field(init=False)
    read: frozenset[bytes] = field(init=False)
    ending: frozenset[bytes] = field(init=False)
    judged: frozenset[bytes] = field(init=False)
    id_name: bytes = field(init=False)
    response_header: bytes = field(init=False)
    excludes: bool = field(init=False)
    has_trace_response: bool = field(init=False)
    touched: frozenset[bytes] = field(init=False)

    def __post_init__(self) -> None:
        """
        Derive what every request needs.
        """
        settings = self.settings
        self.id_names = frozenset(settings.request_id_headers)
        # The name to send, too: where a caller has something there that we do not read, passing it on would hide ours.
        self.wanted = self.id_names | _PROPAGATION | {settings.response_header.lower().encode("latin-1", "replace")}
        self.told = self.id_names | {b"traceparent"}
        self.id_name = settings.request_id_headers[0]
        self.response_header = settings.response_header.lower().encode("ascii")
        force = settings.force_sample_header.lower().encode("latin-1", "replace")
        self.ending = frozenset(map(folded, self.wanted | _STANDARD | {self.response_header, force})) - {b""}
        self.read = self.wanted | _SHOWN
        self.judged = self.ending | self.read | FORWARDING
        self.excludes = bool(self.excluded)
        self.has_trace_response = settings.traceresponse or settings.server_timing
        touched = {self.response_header, b"access-control-allow-origin"}
        self.touched = frozenset(touched | {b"traceresponse"} if settings.traceresponse else touched)


# Upper case as lower case, and "_" as "-": a mounted WSGI application reads X_Request_ID and X-Request-ID as one.
_FOLD: Final = bytes.maketrans(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ_", b"abcdefghijklmnopqrstuvwxyz-")


_first: Final[Callable[[tuple[bytes, bytes]], bytes]] = itemgetter(0)


def folded(name: bytes) -> bytes:
    """
    Return a header's name in the one spelling that all its spellings share.
    """
    return name.translate(_FOLD)


def spelling(headers: list[tuple[bytes, bytes]], wanted: frozenset[bytes]) -> list[tuple[bytes, bytes]]:
    """
    Return the headers whose folded name is one of ``wanted``.

    All names are folded at once, in C: one by one, 16,000 headers cost more than a millisecond.
    """
    names = [*map(_first, headers)]
    folds = folded(b"\n".join(names)).split(b"\n")
    if len(folds) != len(names):  # no header, or a name with a line feed, which no server lets through
        folds = [folded(name) for name in names]
    return [pair for pair, fold in zip(headers, folds, strict=True) if fold in wanted]


def names_of(headers: list[tuple[bytes, bytes]]) -> set[bytes]:
    """
    Return the names of the headers, each spelling once.
    """
    return {*map(_first, headers)}


class Record:
    """
    One request as the edge sees it; it stands in the ASGI scope, so that inner edges only forward.

    Attributes:
        config: What this application's edge does.
        identity: The request's ids.
        method: The method as received; cut if it is longer than any method is.
        name: The method as span names show it.
        span: The SERVER span; None where none is made.
        recording: The same, where somebody will see it.
        status: The response's status; 0 before it is known.
        error: What the application raised.
        complete: Whether the whole response was sent.
        flowing: Whether a part of a body followed the response's head.
        disconnected: Whether the client went away before the response was complete.
        unsent: Whether it went away before anything was sent to it.
        reused: Whether the reuse guard refused the request id as a root.
        refused: Whether a request id was refused.
        caller_id: The valid request id of a caller that is not trusted.
        forced: Whether a trusted caller asked for its trace.
        endpoint: The route that was matched.
        answered: The exception behind a 5xx that an exception handler of the application made, and its traceback.
        invalid: What a validation error says, ``location: type`` each.
        long: Bytes of the long texts that the span was started with; None where it was not.
    """

    identity: Identity
    span: Span | None = None
    recording: Span | None = None
    status = 0
    error: BaseException | None = None
    complete = False
    flowing = False
    disconnected = False
    unsent = False
    reused = False
    refused = False
    caller_id: str | None = None
    forced = False
    finished_ns = 0
    endpoint: Any = None
    answered: tuple[BaseException, TracebackType | None] | None = None
    invalid: tuple[str, ...] = ()
    long: int | None = None
    _route: str | None = None

    def __init__(self, config: ServerConfig, method: str) -> None:
        self.config = config
        if method in _METHODS:
            self.method = self.name = self._span_name = method
        else:
            self.method = DEFAULT.cut(method, DEFAULT.method)
            self.name = self._span_name = _span_method(self.method)
        self.start_time = time_ns()
        self.started_ns = perf_counter_ns()

    @property
    def route(self) -> str | None:
        """
        The route's template with every static segment, or None where no route matched.
        """
        return self._route

    @property
    def gone(self) -> bool:
        """
        Whether the client went away before it was sent anything, and nothing failed.

        A status that was sent stays, whoever leaves then; a server that failed has failed, whoever waits.
        """
        return self.unsent and self.status < 500

    def left(self) -> None:
        """
        Take it that the client went away, if that matters: before the last part of its response.
        """
        if not (self.complete or self.disconnected):
            self.disconnected, self.unsent = True, not self.status

    def lost(self) -> None:
        """
        Take it that the server could not send because the client went away.
        """
        if not self.disconnected:
            # The head was sent if anything came after it.
            self.disconnected, self.unsent = True, not (self.complete or self.flowing)

    def forgive(self) -> None:
        """
        Forget what the application raised, and the answer that was made of it and reached nobody.
        """
        self.error = None
        if self.unsent:
            self.status = 0

    def matched(self, route: str) -> None:
        """
        Take the route's template, as soon as it is known, for the span's name; a name that user code chose stays.
        """
        if len(route) > DEFAULT.path:  # what a mount matched may be the caller's
            route = DEFAULT.cut(route, DEFAULT.path)
        self._route = route
        span = self.recording
        if span is not None:
            if getattr(span, "name", None) == self._span_name:
                self._span_name = f"{self.name} {route}"
                span.update_name(self._span_name)
            span.set_attribute(http_attributes.HTTP_ROUTE, route)

    def span_name(self) -> str:
        """
        Return ``{method} {route}``, or the method alone.
        """
        return f"{self.name} {self._route}" if self._route else self.name


def _span_method(method: str) -> str:
    known = sanitize_method(method)
    return "HTTP" if known == "_OTHER" else known


def collect(
    scope: Scope, record: Record, received: list[tuple[bytes, bytes]], read: list[tuple[bytes, bytes]]
) -> dict[str, Any]:
    """
    Return the SERVER span's attributes that are known at its start (semantic conventions, HTTP server).

    Args:
        scope: The request's scope.
        record: The request.
        received: The headers as they came.
        read: Those of them that we read.
    """
    config = record.config
    bounds = DEFAULT if config.tracer is None else config.tracer.bounds
    method = record.method
    scheme = scope.get("scheme", "http")
    path = scope.get("path", "")
    version = scope.get("http_version", "1.1")
    values: dict[str, Any] = {
        http_attributes.HTTP_REQUEST_METHOD: method,
        url_attributes.URL_SCHEME: scheme,
        url_attributes.URL_PATH: path,
        network_attributes.NETWORK_PROTOCOL_VERSION: version,
    }
    long = 0
    if len(path) > SHORT:
        values[url_attributes.URL_PATH] = path = bounds.cut(path, bounds.path)
        long = text_bytes(path)
    if len(scheme) + len(version) > SHORT:
        values[url_attributes.URL_SCHEME] = bounds.cut(scheme, bounds.scheme)
        values[network_attributes.NETWORK_PROTOCOL_VERSION] = bounds.cut(version, bounds.scheme)
    if method not in _METHODS:
        known = sanitize_method(method)
        values[http_attributes.HTTP_REQUEST_METHOD] = known
        if known == "_OTHER":
            values[http_attributes.HTTP_REQUEST_METHOD_ORIGINAL] = method
    query = scope.get("query_string")
    if query:
        values[url_attributes.URL_QUERY] = shown = _shown_query(query, config.settings.query_values, bounds)
        long += len(shown) * 2  # Latin-1 has at most two bytes for a character in UTF-8
    client = scope.get("client")
    if client:
        address = client[0]
        if len(address) > SHORT:
            address = bounds.cut(address, bounds.address)
            long += text_bytes(address)
        values[client_attributes.CLIENT_ADDRESS] = address
        if client[1]:
            values[client_attributes.CLIENT_PORT] = client[1]
    host = None
    for name, value in read:
        if name == b"host":
            host = value
        elif name == b"user-agent":
            values[user_agent_attributes.USER_AGENT_ORIGINAL] = agent = (
                value.decode("latin-1") if len(value) <= bounds.user_agent else bounds.decode(value, bounds.user_agent)
            )
            long += len(agent) * 2
    if host:
        if len(host) <= DEFAULT.address:
            address, port = _authority(host)
        elif len(host) <= bounds.address:
            address, port = _authority.__wrapped__(host)
        else:
            address, port = bounds.decode(host, bounds.address), None
        values[server_attributes.SERVER_ADDRESS] = address
        long += len(address)
        values[server_attributes.SERVER_PORT] = port or (443 if scheme in ("https", "wss") else 80)
    elif server := scope.get("server"):
        values[server_attributes.SERVER_ADDRESS] = server[0]
        if server[1] is not None:
            values[server_attributes.SERVER_PORT] = server[1]
    if config.request_headers is not None:
        # A refused value must not come back by this way.
        captured = config.request_headers.attributes(scope["headers"] if record.refused else received, bounds)
        long += value_bytes(captured)
        values.update(captured)
    if record.reused:
        values[semconv.REUSED_REQUEST_ID] = True
    if record.refused:
        values[semconv.REFUSED_REQUEST_ID] = True
    if record.caller_id is not None:
        values[semconv.CALLER_REQUEST_ID] = record.caller_id
    if record.forced:
        values[semconv.FORCED] = True
    record.long = long
    return values


def _shown_query(query: bytes | str, mode: str, bounds: Bounds) -> str:
    """
    Return a query without the values that must not be recorded; it is cut before they are looked for.
    """
    limit = bounds.query
    length = len(query)
    if length <= limit:
        text = redact_query(query.decode("latin-1") if isinstance(query, bytes) else str(query), mode)
        return text if len(text) <= limit else bounds.cut(text, limit)
    mark = f"{CUT}{length} bytes]" if bounds.marked else ""
    head = query[: limit - len(mark)]
    text = redact_query(head.decode("latin-1") if isinstance(head, bytes) else str(head), mode)
    # The mark comes last: in a value that is hidden it would be hidden, too.
    return text[: limit - len(mark)] + mark


@lru_cache(maxsize=256)
def _authority(host: bytes) -> tuple[str, int | None]:
    """
    Split a Host header into address and port; the brackets of an IPv6 address do not belong to it.
    """
    text = host.decode("latin-1")
    name, colon, port = text.rpartition(":")
    if colon and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536:
        return name.strip("[]"), int(port)
    return (text[1:-1] if text.startswith("[") and text.endswith("]") else text), None


def finish(record: Record, scope: Scope) -> None:
    """
    Do everything that comes after the application; its context is still current.
    """
    elapsed_ns = (record.finished_ns or perf_counter_ns()) - record.started_ns
    if only(record.error, ClientDisconnect):
        # The body that the handler waited for, or the response that it sent, lost its client: nobody's bug.
        record.lost()
        record.forgive()
    elif record.disconnected and was_cancelled(record.error):
        record.forgive()  # a server may cancel what it runs for a client that is gone
    # Servers answer 500 for an application that returns without an answer.
    status = record.status = record.status or (0 if record.unsent else 500)
    if record.route is None and record.config.look_up is not None:
        # Each part behind a boundary of its own: a route, processor or meter of somebody else's costs only itself.
        with guard.never_raise("edge.route"):
            route = record.config.look_up(scope)
            if route is not None:
                record.matched(route)
    handled = record.identity.handled
    if handled is not None:
        with guard.never_raise("edge.handled"):
            _look_at_handled(record, handled)
    span = record.recording
    if span is not None:
        try:
            _tell(span, record)
        except Exception:  # noqa: BLE001 - the span ends all the same
            guard.report("edge.span")
        if record.long is not None and type(span) is LightSpan:
            span.counted(record.long)
        try:
            # Monotonic: a clock that is set while a request runs makes no negative or endless span.
            span.end(record.start_time + elapsed_ns)
        except Exception:  # noqa: BLE001 - a span processor of somebody else's
            guard.report("edge.span")
    metrics = record.config.metrics
    if metrics is not None and scope["type"] == "http":
        with guard.never_raise("edge.metrics"):
            metrics.finished(record, scope, elapsed_ns / 1e9)
    shown = _CLIENT_GONE if record.gone else status
    extra: dict[str, Any] = {}
    if record.disconnected:
        extra[_GONE] = True
    if record.invalid:
        extra[_INVALID_FIELD] = list(record.invalid)
    if record.error is not None or record.answered is not None:
        # Where a handler answered, and the trace is not sampled, nothing else says it.
        extra[_ERROR_FIELD] = error_type(record)
    path = scope.get("path", "")
    if len(path) > DEFAULT.path:
        path = DEFAULT.cut(path, DEFAULT.path)
    logs.summary(record.method, record.route, path, shown, elapsed_ns / 1e6, extra=extra)


def _look_at_handled(record: Record, handled: tuple[BaseException, TracebackType | None]) -> None:
    """
    Keep what the answered exception says: the fields of a validation error, or what is behind a 5xx.
    """
    error = handled[0]
    if isinstance(error, RequestValidationError | WebSocketRequestValidationError):
        record.invalid = describe(error.errors(), record.endpoint)
    if record.error is not None or record.status < 500:
        return
    if isinstance(error, HTTPException):
        # An answer of the endpoint's own says all in its status, unless it was raised in place of another exception.
        hides = error.__cause__ is not None or (error.__context__ is not None and not error.__suppress_context__)
        if error.status_code < 500 or not hides:
            return
    record.answered = handled


def _tell(span: Span, record: Record) -> None:
    """
    Show on the SERVER span how its request ended.
    """
    error, status = record.error, record.status
    if record.invalid:
        span.set_attribute(semconv.VALIDATION_ERRORS, record.invalid)
    if error is not None:
        show(span, error)
    if record.disconnected:
        span.set_attribute(semconv.CLIENT_DISCONNECTED, True)
    if record.gone:
        if error is None:
            span.set_attribute(error_attributes.ERROR_TYPE, _GONE)
    else:
        span.set_attribute(http_attributes.HTTP_RESPONSE_STATUS_CODE, status)
        if status >= 500 and error is None:
            kind = error_type(record) or str(status)
            if record.answered is not None:
                record_exception(span, record.answered[0], error_type=kind, trace=record.answered[1])
            span.set_attribute(error_attributes.ERROR_TYPE, kind)
            span.set_status(StatusCode.ERROR)


def error_type(record: Record) -> str | None:
    """
    Return ``error.type`` as metrics have it, or None for a request that did not fail.
    """
    if record.error is not None:
        return outcome_of(record.error).error_type
    if record.gone:
        return _GONE
    if record.answered is not None and not isinstance(record.answered[0], HTTPException):
        return outcome_of(record.answered[0]).error_type
    return str(record.status) if record.status >= 500 else None


def comes_from(error: BaseException, send: Send) -> bool:
    """
    Tell whether the server's own ``send`` raised, as ASGI 2.4 has it do when the client is gone.
    """
    code = getattr(getattr(send, "__func__", send), "__code__", None)
    at = error.__traceback__
    while at is not None and code is not None:
        if at.tb_frame.f_code is code:
            return True
        at = at.tb_next
    return False


def call_hook(span: Span, hook: Hook, *arguments: Any) -> None:
    """
    Call a user's hook; what it raises is shown on the span and goes no further.
    """
    try:
        hook(span, *arguments)
    except Exception as error:  # noqa: BLE001 - somebody else's code
        with guard.never_raise("edge.hook"):  # an exception without a text
            span.record_exception(error)


def leave(record: Record, scope: Scope, token: Any) -> None:
    """
    Leave a request behind: its context, its mark in the scope, and the exception that holds its frames.
    """
    detach(token)
    # A wrapper may call the application again with the same scope; that is another request.
    scope.pop(semconv.SCOPE_KEY, None)
    record.error = record.answered = record.identity.handled = None
    # What a caller sent may be large, and tasks of the request may keep its identity.
    if record.identity.received:
        record.identity.received = short_ones(record.identity.received)
    record.identity.ended = True
