"""
Who the current request is: one record in the OpenTelemetry context, read by logs, spans and clients alike.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any, Final, cast

from opentelemetry import context as otel_context
from opentelemetry.context import Context, create_key

from otel_correlation import guard, semconv
from otel_correlation.upstream.api import RUNTIME_CONTEXT as _RUNTIME_CONTEXT
from otel_correlation.upstream.api import SPAN_KEY as _SPAN_KEY

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from opentelemetry.trace import Span

_KEY: Final = create_key("otel-correlation")
# The identity whose timer's callback runs: what the callback arms once that has ended is not its own. In the context
# itself, so that it goes along into tasks and threads, and is gone where another identity begins.
_ARMED: Final = create_key("otel-correlation-armed")
# Of nobody.
NOTHING: Final = Context()
_FLAGS: Final = tuple(f"{value:02x}" for value in range(256))
_LISTS: Final = (semconv.BAGGAGE.encode(), semconv.TRACESTATE.encode())
# A valid request id has at most 200 bytes, a traceparent 55.
_SHORT: Final = 200
_MAX_FIELDS: Final = 2
# Reentrant: a signal handler or a finalizer may bind while its own thread does.
_bind_lock = threading.RLock()


class Identity:
    """
    One request (or one ``work``): its request id, the fields bound to it and its SERVER span.

    Attributes:
        request_id: The final request id.
        fields: Fields that ``bind`` added, for every later record.
        span: The SERVER span, or None where none is made (excluded, SDK disabled).
        ended: Whether the request, or the ``work``, is over; tasks and timers of it may still run.
        handled: The exception that one of the application's exception handlers answered last, and its traceback.
        received: The headers that name the caller's work, as they came, by lower-case name; after the end of the
            request ``short_ones`` of them.
    """

    __slots__ = ("ended", "fields", "handled", "received", "request_id", "span")

    def __init__(self, request_id: str, span: Span | None = None) -> None:
        self.request_id = request_id
        self.fields: dict[str, Any] = {}
        self.span = span
        self.ended = False
        self.handled: tuple[BaseException, TracebackType | None] | None = None
        self.received: Mapping[bytes, list[bytes]] | None = None


def short_ones(received: Mapping[bytes, list[bytes]] | None) -> Mapping[bytes, list[bytes]] | None:
    """
    Return of a request's own inbound headers those that its tasks may hold for as long as they like, or None.

    A task that outlives its request may pass on ``request.headers``, so a ``traceparent`` must still be known as the
    caller's. Lists (baggage, tracestate) and what is longer than any id go: what a caller sent may be large.
    """
    if not received:
        return None
    # Two traceparents restart a trace; more are nobody's mistake.
    kept = {
        name: values
        for name, values in received.items()
        if len(values) <= _MAX_FIELDS and name not in _LISTS and len(values[0]) + len(values[-1]) <= 2 * _SHORT
    }
    return kept or None


def set_in(context: Context, identity: Identity) -> Context:
    """
    Return ``context`` with this identity.
    """
    return Context({**context, _KEY: identity})


def get_from(context: Context) -> Identity | None:
    """
    Return the identity that ``context`` holds.
    """
    found = context.get(_KEY)
    return found if isinstance(found, Identity) else None


def current() -> Identity | None:
    """
    Return the identity of the request that runs now, or None outside of any.
    """
    found = otel_context.get_current().get(_KEY)
    return found if isinstance(found, Identity) else None


def armed(context: Context) -> Context:
    """
    Return the context for the callback of a timer that is armed in this one: its own, or nobody's.

    What an identity arms is its own. What its timers arm once more is, too, for as long as it has not ended; after that
    the chain would keep it for ever.

    See: ADR-017.
    """
    who = context.get(_KEY)
    if not isinstance(who, Identity):
        return context
    if context.get(_ARMED) is who:
        return NOTHING if who.ended else context
    return Context({**context, _ARMED: who})


class detached:  # noqa: N801 - used as a function is
    """
    A ``with`` block in which there is no request: for what a request starts for the service, not for itself.

    Tasks, threads, timers and jobs that are started in it have no ids, and spans that are made in it begin traces of
    their own. Never raises; outside of a request it changes nothing. Make one for each block.
    """

    def __init__(self) -> None:
        self._tokens: list[Any] = []

    def __enter__(self) -> None:
        """
        Make no request current.
        """
        self._tokens.append(_RUNTIME_CONTEXT.attach(NOTHING))

    def __exit__(self, *_: object) -> None:
        """
        Make current what was before.
        """
        detach(self._tokens.pop())


def request_id() -> str | None:
    """
    Return the request id of the current request, or None outside of any. Usable with FastAPI's ``Depends``.
    """
    found = current()
    return found.request_id if found is not None else None


def trace_id() -> str | None:
    """
    Return the current trace id as 32 hex digits, or None where there is no trace. Usable with FastAPI's ``Depends``.
    """
    return log_ids()[0] or None


def bind(**fields: Any) -> None:
    """
    Put fields on every later log record of this request and on its SERVER span; does nothing outside a request.

    Args:
        **fields: Names and values. Values that are not OpenTelemetry attribute values are put on the span as text.
    """
    found = current()
    if found is None:
        return
    # A new dict: records that were made already keep what they saw. Threads of one request may bind at once.
    with _bind_lock:
        found.fields = {**found.fields, **fields}
    if found.span is not None and found.span.is_recording():
        for name, value in fields.items():
            found.span.set_attribute(name, value if isinstance(value, str | bool | int | float) else _text(value))


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - somebody's __str__; a request does not fail because it is sampled
        return f"<{type(value).__qualname__} without text>"


def log_ids() -> tuple[str, str, str, str]:
    """
    Return trace id, span id, trace flags and request id as a log line shows them; empty where there is none.
    """
    context = otel_context.get_current()
    identity = context.get(_KEY)
    request = identity.request_id if isinstance(identity, Identity) else ""
    span: Span | None = context.get(_SPAN_KEY)  # type: ignore[assignment]
    if span is None:
        return "", "", "", request
    span_context = span.get_span_context()
    if not span_context.trace_id:
        return "", "", "", request
    return (
        f"{span_context.trace_id:032x}",
        f"{span_context.span_id:016x}" if span_context.span_id else "",
        _FLAGS[span_context.trace_flags & 0xFF],
        request,
    )


_STASH: Final = "_otel_correlation_ids"


def stash(error: BaseException) -> None:
    """
    Leave the current ids on an exception, for lines that are logged after the request's context is gone.

    A plain tuple, replaced for each request: ``add_note`` on a shared exception instance would gather other requests'
    ids.
    """
    try:
        # Not past a frozen class, whose copies and pickles have no other fields than its own.
        setattr(error, _STASH, log_ids())
    except Exception:  # noqa: BLE001 - a frozen exception class, or somebody's __setattr__
        return


def stashed(error: BaseException | None) -> tuple[str, str, str, str] | None:
    """
    Return the ids left on ``error``, its cause or its context (at most eight links away), or None.

    A group that somebody made around a request's exception has those of its first member that has any.
    """
    for _ in range(8):
        if error is None:
            return None
        found = getattr(error, _STASH, None)
        if isinstance(found, tuple):
            return cast("tuple[str, str, str, str]", found)
        if isinstance(error, BaseExceptionGroup):
            for member in error.exceptions[:8]:
                found = getattr(member, _STASH, None)
                if isinstance(found, tuple):
                    return cast("tuple[str, str, str, str]", found)
        error = error.__context__ if error.__cause__ is None else error.__cause__
    return None


def detach(token: Any) -> None:
    """
    Leave a context.
    """
    # Not context.detach(): it logs a traceback where a generator was closed in another context, which is no news.
    try:
        _RUNTIME_CONTEXT.detach(token)
    except (ValueError, RuntimeError):
        guard.count("context.detach_failed")


def _after_fork() -> None:
    global _bind_lock  # noqa: PLW0603 - a lock held in the parent at fork would never be released in the child
    _bind_lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
