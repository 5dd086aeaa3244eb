"""
How work ended: one rule for requests, calls and ``work``, for their spans, their metrics and their lines.

| what ended it | ``error.type`` and status ERROR | exception event |
|---|---|---|
| nothing: it returned | no | no |
| an ``Exception``, or a group that holds one | its class | yes |
| ``sys.exit()`` in a request or a call | its class | yes |
| cancelled (asyncio, trio, anyio), ``KeyboardInterrupt``, ``GeneratorExit`` | its class | no |
| ``sys.exit(1)`` inside ``work`` | its class | no |
| ``sys.exit(0)`` inside ``work``, a generator that its reader closed | no | no |
"""

from __future__ import annotations

import sys
from asyncio import CancelledError
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from opentelemetry.semconv.attributes import error_attributes, exception_attributes
from opentelemetry.trace import StatusCode

from otel_correlation.policy import bounds_for, class_name, scrubbed
from otel_correlation.tracer import exception_event

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from opentelemetry.trace import Span

    from otel_correlation.policy import Bounds


class Outcome(NamedTuple):
    """
    How work ended.

    Attributes:
        error_type: The value of ``error.type``: the full name of a class. None for work that did not fail.
        is_bug: Whether a traceback tells somebody something. Who cancelled, or ended the process, wanted to.
    """

    error_type: str | None = None
    is_bug: bool = False


_WELL: Final = Outcome()


def outcome_of(error: BaseException | None, *, may_leave: bool = False) -> Outcome:
    """
    Decide how work ended.

    Args:
        error: What left the work; None if nothing did.
        may_leave: Whether ``sys.exit()`` and the close of a generator are ends like any other. They are for ``work``,
            and not for a request or a call, which has no answer then.
    """
    if error is None:
        return _WELL
    if may_leave and (isinstance(error, GeneratorExit) or (isinstance(error, SystemExit) and not error.code)):
        return _WELL
    is_bug = _holds_exception(error) or (isinstance(error, SystemExit) and not may_leave)
    return Outcome(class_name(type(error)), is_bug)


def show(span: Span, error: BaseException | None, *, may_leave: bool = False) -> str | None:
    """
    Show on a span how its work ended; the span stays open.

    Args:
        span: The span.
        error: What left the work; None if nothing did.
        may_leave: As for ``outcome_of``.

    Returns:
        ``error.type``, for the metric of the same work.
    """
    error_type, is_bug = outcome_of(error, may_leave=may_leave)
    if error_type is not None and span.is_recording():
        if is_bug:
            record_exception(span, cast("BaseException", error))
        else:
            span.set_attribute(error_attributes.ERROR_TYPE, error_type)
            span.set_status(StatusCode.ERROR)
    return error_type


def was_cancelled(error: BaseException | None) -> bool:
    """
    Tell whether an exception says that somebody cancelled the work, or is a group of nothing else.
    """
    # Under trio, anyio's cancel scopes raise its exception.
    return only(error, (CancelledError, getattr(sys.modules.get("trio"), "Cancelled", CancelledError)))


def only(error: BaseException | None, kind: type[BaseException] | tuple[type[BaseException], ...]) -> bool:
    """
    Tell whether an exception is of this kind, or a group of nothing else.
    """
    if isinstance(error, BaseExceptionGroup):
        # Not split(), which makes a group by the user's derive().
        return all(only(member, kind) for member in error.exceptions)
    return isinstance(error, kind)


def _holds_exception(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(_holds_exception(member) for member in error.exceptions)
    return isinstance(error, Exception)


def record_exception(
    span: Span,
    error: BaseException,
    *,
    error_type: str | None = None,
    trace: TracebackType | None = None,
) -> None:
    """
    Record an exception that ended the span's work: one event, status ERROR and ``error.type``.

    Where user code recorded it on this span already, its event is the one.
    """
    if not span.is_recording():
        return
    bounds = bounds_for(getattr(getattr(span, "_limits", None), "max_attribute_length", None))
    values = exception_event(error, trace, bounds=bounds)
    if not any(_tells_of(event, values, bounds) for event in getattr(span, "events", ())):
        span.add_event("exception", values)
    span.set_attribute(
        error_attributes.ERROR_TYPE, error_type or cast("str", values[exception_attributes.EXCEPTION_TYPE])
    )
    span.set_status(StatusCode.ERROR)


def _tells_of(event: Any, values: Mapping[str, Any], bounds: Bounds) -> bool:
    held: Mapping[str, Any] = event.attributes or {}
    if held.get(exception_attributes.EXCEPTION_TYPE) != values[exception_attributes.EXCEPTION_TYPE]:
        return False
    text, told = str(held.get(exception_attributes.EXCEPTION_MESSAGE)), values[exception_attributes.EXCEPTION_MESSAGE]
    # The SDK's own span has the text unscrubbed until it ends, and cut where there is a limit.
    return bool(scrubbed(text, bounds.message, bounds) == told)
