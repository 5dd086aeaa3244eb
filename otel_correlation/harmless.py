"""
What stands in for us where another package does not fit: nothing is traced, and nothing of the service fails.

Request ids go on, by an edge that needs no other package: read or minted, in ``request_id()``, in ``request.headers``
and on the response. All else passes through. One line says why. See ADR 014.
"""

from __future__ import annotations

import os
import sys
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from otel_correlation import guard, semconv, upstream
from otel_correlation._version import __version__
from otel_correlation.request_id import from_headers, to_uuid
from otel_correlation.settings import Settings, from_environment, with_overrides

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    Scope = MutableMapping[str, Any]
    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_request_id: Final[ContextVar[str | None]] = ContextVar("otel_correlation_request_id", default=None)


class _State:
    said = False
    settings: Settings | None = None


def say() -> None:
    """
    Write the one line that says what does not fit, once in a process.
    """
    if _State.said:
        return
    _State.said = True
    if not from_environment().enabled:
        return
    guard.logger.warning(
        "otel-correlation %s is off, but for request ids: %s (see the reference, 'Other versions')",
        __version__,
        upstream.trouble(),
    )


def begin(settings: Settings | None = None) -> None:
    """
    Say the line, and give every FastAPI application the edge; does nothing where we are switched off.
    """
    wanted = from_environment() if settings is None else settings
    if not wanted.enabled:
        return
    say()
    placed = _State.settings is not None
    _State.settings = wanted
    if not placed:
        try:
            _place()
        except Exception as error:  # noqa: BLE001 - FastAPI, too, may be one that does not fit
            guard.logger.warning("There is no edge, either (%s: %s)", type(error).__name__, error)


def _place() -> None:
    from fastapi.applications import FastAPI  # noqa: PLC0415 - only where it is needed

    original: Any = FastAPI.__call__

    async def __call__(self: Any, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: N807
        await _serve(partial(original, self), scope, receive, send)

    FastAPI.__call__ = __call__  # type: ignore[method-assign]


def bootstrap(app: object = None, **settings: Any) -> None:
    """
    Check what was passed, and begin.

    Raises:
        ConfigError: As where everything fits: an unknown setting, or a value that is not usable.
    """
    del app
    begin(with_overrides(_State.settings or from_environment(), settings))


class Edge:
    """
    An ASGI application behind the edge.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """
        Serve one connection; inside another edge only forward.
        """
        await _serve(self.app, scope, receive, send)


edge = Edge


async def _serve(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    settings = _State.settings
    if settings is None or scope["type"] not in ("http", "websocket") or semconv.SCOPE_KEY in scope:
        await app(scope, receive, send)
        return
    name = settings.response_header.lower().encode("ascii")
    final = _identify(settings, scope, name)

    async def edge_send(message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.accept", "websocket.http.response.start"):
            kept = [pair for pair in message.get("headers") or () if pair[0].lower() != name]
            message = {**message, "headers": [*kept, (name, final.encode("ascii"))]}
        await send(message)

    leave = _enter(final)
    try:
        await app(scope, receive, edge_send)
    finally:
        leave()


def _identify(settings: Settings, scope: Scope, name: bytes) -> str:
    """
    Keep the caller's request id if it is valid, mint one otherwise; ``request.headers`` has the final one.
    """
    headers = list(scope["headers"])
    received = None
    # Who declared trust is asked for an address, which is the work of what does not run: nobody is trusted.
    if settings.edge == "open" and not settings.trusted_networks:
        received, _ = from_headers(headers, settings.request_id_headers)
    final = received or (to_uuid if settings.mint == "uuid" else "{:032x}".format)(_random())
    gone = {name, *settings.request_id_headers}
    scope["headers"] = [pair for pair in headers if pair[0].lower() not in gone] + [(name, final.encode("ascii"))]
    scope[semconv.SCOPE_KEY] = final
    return final


def _random() -> int:
    return int.from_bytes(os.urandom(16)) or 1


def _enter(final: str) -> Callable[[], None]:
    """
    Make a request id current, for our functions here and for those of ``identity`` where that could be imported.
    """
    token = _request_id.set(final)
    identity = sys.modules.get("otel_correlation.identity")
    if identity is None or not hasattr(identity, "set_in"):
        return lambda: _request_id.reset(token)
    from opentelemetry import context as otel_context  # noqa: PLC0415 - a part of OpenTelemetry that fits

    attached = otel_context.attach(identity.set_in(otel_context.get_current(), identity.Identity(final)))

    def leave() -> None:
        identity.detach(attached)
        _request_id.reset(token)

    return leave


def request_id() -> str | None:
    """
    Return the request id of the current request, or None outside of any.
    """
    return _request_id.get()


def trace_id() -> str | None:
    """
    Return the trace id of the current span, which another distribution may have made, or None.
    """
    try:
        from opentelemetry.trace import get_current_span  # noqa: PLC0415 - a part that every release has

        found = get_current_span().get_span_context()
    except Exception:  # noqa: BLE001 - not even that fits
        return None
    return f"{found.trace_id:032x}" if found.trace_id else None


def bind(**fields: Any) -> None:
    """
    Do nothing.
    """


def stats() -> dict[str, int]:
    """
    Return the counters.
    """
    return guard.counters()


def flush(*_arguments: Any, **_options: Any) -> bool:
    """
    Return True: nothing waits.
    """
    return True


class _NoScope:
    """
    A ``with`` or ``async with`` block, or a decorator, around which nothing happens.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        del arguments, options

    def __enter__(self) -> Any:
        try:
            from opentelemetry.trace import INVALID_SPAN  # noqa: PLC0415 - a part that every release has
        except ImportError:
            return None
        return INVALID_SPAN

    def __exit__(self, *error: object) -> None:
        del error

    async def __aenter__(self) -> Any:
        return self.__enter__()

    async def __aexit__(self, *error: object) -> None:
        del error

    def __call__(self, function: Any) -> Any:
        """
        Return the function itself.
        """
        return function


work = continue_from = detached = _NoScope


def inject(carrier: Any = None) -> Any:
    """
    Return the carrier as it is.
    """
    return {} if carrier is None else carrier


def carried(function: Any) -> Any:
    """
    Return the function itself.
    """
    return function


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    return _nothing  # any other public function


def _nothing(*_arguments: Any, **_options: Any) -> None:
    """
    Do nothing.
    """
