"""
The socket's peer, kept where uvicorn replaces it by an address that a header claims.

uvicorn believes ``X-Forwarded-For`` from 127.0.0.1 by default, and from everybody with ``--forwarded-allow-ips='*'``,
where it takes the leftmost address, which any caller can write. Trust starts from what the socket says.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any, Final

from wrapt import register_post_import_hook

from otel_correlation import guard, semconv

if TYPE_CHECKING:
    from types import ModuleType

    from otel_correlation.edge._record import Receive, Scope, Send

_MODULE: Final = "uvicorn.middleware.proxy_headers"
_ORIGINAL: Final = "_otel_correlation_original"

_wanted = False
_hooked = False


def keep_socket_peers() -> None:
    """
    Keep the socket's peer in the scope from now on; uvicorn is not imported by this. Idempotent.
    """
    global _wanted, _hooked  # noqa: PLW0603 - one process, one uvicorn
    _wanted = True
    if not _hooked:
        _hooked = True
        register_post_import_hook(_on_import, _MODULE)
    elif (module := sys.modules.get(_MODULE)) is not None:
        _on_import(module)


def forget_socket_peers() -> None:
    """
    Leave uvicorn as it was.
    """
    global _wanted  # noqa: PLW0603 - see keep_socket_peers
    _wanted = False
    middleware = getattr(sys.modules.get(_MODULE), "ProxyHeadersMiddleware", None)
    original = getattr(vars(middleware or object).get("__call__"), _ORIGINAL, None)
    if middleware is not None and original is not None:
        middleware.__call__ = original


def _on_import(module: ModuleType) -> None:
    if _wanted:
        with guard.never_raise("edge.peer"):
            _wrap(module)


def _wrap(module: ModuleType) -> None:
    middleware = getattr(module, "ProxyHeadersMiddleware", None)
    original: Any = vars(middleware or object).get("__call__")
    if middleware is None or original is None or hasattr(original, _ORIGINAL):
        return

    @functools.wraps(original)
    async def __call__(self: Any, scope: Scope, receive: Receive, send: Send) -> Any:  # noqa: N807
        # The first one counts: it is the outermost.
        if semconv.SCOPE_PEER not in scope:
            scope[semconv.SCOPE_PEER] = scope.get("client")
        return await original(self, scope, receive, send)

    setattr(__call__, _ORIGINAL, original)
    middleware.__call__ = __call__
