"""
The socket's peer, kept where a server's wrapper replaces it by an address that a header claims.

uvicorn believes ``X-Forwarded-For`` from 127.0.0.1 by default, and from everybody with ``--forwarded-allow-ips='*'``,
where it takes the leftmost address, which any caller can write; Granian's and Hypercorn's wrappers are put around an
application by hand. Trust starts from what the socket says.
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

# What each module wraps an application with: a class, or a function.
_WRAPPERS: Final = {
    "uvicorn.middleware.proxy_headers": "ProxyHeadersMiddleware",
    "hypercorn.middleware.proxy_fix": "ProxyFixMiddleware",
    "granian.utils.proxies": "wrap_asgi_with_proxy_headers",
}
_ORIGINAL: Final = "_otel_correlation_original"

_wanted = False
_hooked = False


def keep_socket_peers() -> None:
    """
    Keep the socket's peer in the scope from now on; no server is imported by this. Idempotent.
    """
    global _wanted, _hooked  # noqa: PLW0603 - one process, one server
    _wanted = True
    if not _hooked:
        _hooked = True
        for name in _WRAPPERS:
            register_post_import_hook(_on_import, name)
        return
    for name in _WRAPPERS:
        if (module := sys.modules.get(name)) is not None:
            _on_import(module)


def forget_socket_peers() -> None:
    """
    Leave the servers as they were.
    """
    global _wanted  # noqa: PLW0603 - see keep_socket_peers
    _wanted = False
    for name, wrapper in _WRAPPERS.items():
        module = sys.modules.get(name)
        found: Any = getattr(module, wrapper, None)
        owner, attribute = (found, "__call__") if isinstance(found, type) else (module, wrapper)
        original = getattr(vars(owner or object).get(attribute), _ORIGINAL, None)
        if original is not None:
            setattr(owner, attribute, original)


def _on_import(module: ModuleType) -> None:
    if _wanted:
        with guard.never_raise("edge.peer"):
            _wrap(module)


def _wrap(module: ModuleType) -> None:
    wrapper = _WRAPPERS[module.__name__]
    found: Any = getattr(module, wrapper, None)
    if isinstance(found, type):
        original: Any = vars(found).get("__call__")
        if original is not None and not hasattr(original, _ORIGINAL):

            @functools.wraps(original)
            async def __call__(self: Any, scope: Scope, receive: Receive, send: Send) -> Any:  # noqa: N807
                _keep(scope)
                return await original(self, scope, receive, send)

            setattr(__call__, _ORIGINAL, original)
            setattr(found, "__call__", __call__)  # noqa: B010 - a class that is known by its name only
    elif found is not None and not hasattr(found, _ORIGINAL):

        @functools.wraps(found)
        def wrap(*args: Any, **kwargs: Any) -> Any:
            wrapped = found(*args, **kwargs)

            @functools.wraps(wrapped)
            def keeping(scope: Scope, receive: Receive, send: Send) -> Any:
                _keep(scope)
                return wrapped(scope, receive, send)

            return keeping

        setattr(wrap, _ORIGINAL, found)
        setattr(module, wrapper, wrap)


def _keep(scope: Scope) -> None:
    # The first one counts: it is the outermost.
    if scope["type"] != "lifespan" and semconv.SCOPE_PEER not in scope:
        scope[semconv.SCOPE_PEER] = scope.get("client")
