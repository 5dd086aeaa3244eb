"""
Ids on the access lines of Granian, which writes them when the application has returned and its context is gone.

The traceback of a failed request needs nothing here: Granian logs it while it handles the exception, which has the ids.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import context as otel_context
from opentelemetry.context import Context
from wrapt import register_post_import_hook

from otel_correlation import guard, semconv
from otel_correlation.identity import _KEY as _IDENTITY_KEY
from otel_correlation.identity import detach
from otel_correlation.upstream.api import SPAN_KEY as _SPAN_KEY

if TYPE_CHECKING:
    from types import ModuleType

_MODULE: Final = "granian.asgi"
# Granian looks it up when it starts to serve, after the application was imported; private, so guarded.
_NAME: Final = "_build_access_logger"
_ORIGINAL: Final = "_otel_correlation_original"


class _Granian:
    """
    What is known of the Granian that serves, if one does.
    """

    def __init__(self) -> None:
        self.hooked = False
        self.wanted = False
        # Whether it writes access lines: then a request leaves its record in the scope.
        self.logs_access = False


granian: Final = _Granian()


def watch() -> None:
    """
    Put the ids on access lines from now on; Granian is not imported by this. Idempotent.
    """
    granian.wanted = True
    if not granian.hooked:
        granian.hooked = True
        register_post_import_hook(_on_import, _MODULE)
    elif (module := sys.modules.get(_MODULE)) is not None:
        _on_import(module)


def unwatch() -> None:
    """
    Leave Granian as it was.
    """
    granian.wanted = granian.logs_access = False
    module = sys.modules.get(_MODULE)
    original = getattr(getattr(module, _NAME, None), _ORIGINAL, None)
    if module is not None and original is not None:
        setattr(module, _NAME, original)


def _on_import(module: ModuleType) -> None:
    original: Any = getattr(module, _NAME, None)
    if not granian.wanted or original is None or hasattr(original, _ORIGINAL):
        return

    def build(fmt: str | None) -> Any:
        write = original(fmt)
        if not fmt or not granian.wanted:
            return write
        granian.logs_access = True

        def access_log(started_s: float, clock_s: float, scope: Any, status: int) -> None:
            token = None
            with guard.never_raise("edge.granian"):
                token = _enter(scope)
            try:
                write(started_s, clock_s, scope, status)
            finally:
                if token is not None:
                    detach(token)

        return access_log

    setattr(build, _ORIGINAL, original)
    setattr(module, _NAME, build)


def _enter(scope: Any) -> Any:
    record = scope.pop(semconv.SCOPE_LEFT, None)
    if record is None:
        return None
    values = {_IDENTITY_KEY: record.identity}
    if record.span is not None:
        values[_SPAN_KEY] = record.span
    return otel_context.attach(Context(values))
