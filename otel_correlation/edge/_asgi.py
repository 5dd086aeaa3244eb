"""
The edge around any ASGI application.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from otel_correlation import logs, semconv
from otel_correlation.edge._http import serve_http
from otel_correlation.edge._websocket import serve_websocket

if TYPE_CHECKING:
    from collections.abc import Callable

    from otel_correlation.edge._record import ASGIApp, Receive, Scope, Send, ServerConfig

# See clients/_seams.py: a test's report shows the user's frames.
__tracebackhide__ = True


async def serve(config: ServerConfig, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """
    Run ``app`` behind the edge; anything but http and websocket passes through.
    """
    kind = scope["type"]
    if kind == "http":
        await serve_http(config, app, scope, receive, send)
    elif kind == "websocket":
        await serve_websocket(config, app, scope, receive, send)
    else:
        if kind == "lifespan":
            logs.settle()
        await app(scope, receive, send)


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
        config = None if semconv.SCOPE_KEY in scope else self._config()
        if config is None:
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
