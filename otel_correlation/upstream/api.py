"""
Private names of ``opentelemetry-api``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from opentelemetry import baggage
from opentelemetry import context as context_api
from opentelemetry import trace as trace_api
from opentelemetry.context import Context
from opentelemetry.trace import propagation

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider


def _only_key(context: Context) -> str:
    """
    Return the key of the one value in a context that a public function made.
    """
    return next(iter(context))


# The key of the current span in a context, which carries a random suffix.
SPAN_KEY: Final[str] = getattr(propagation, "_SPAN_KEY", None) or _only_key(
    propagation.set_span_in_context(trace_api.INVALID_SPAN, Context())
)
BAGGAGE_KEY: Final[str] = getattr(baggage, "_BAGGAGE_KEY", None) or _only_key(
    baggage.set_baggage("name", "value", Context())
)

# What holds the current context: attach, detach, get_current. The module's own detach logs what ours only counts.
RUNTIME_CONTEXT: Final[Any] = getattr(context_api, "_RUNTIME_CONTEXT", context_api)

# What tells instrumentations to make no spans. A stand-in is heeded by ours alone.
SUPPRESS_INSTRUMENTATION: Final[str] = getattr(context_api, "_SUPPRESS_INSTRUMENTATION_KEY", "suppress_instrumentation")
SUPPRESS_HTTP_INSTRUMENTATION: Final[str] = getattr(
    context_api, "_SUPPRESS_HTTP_INSTRUMENTATION_KEY", "suppress_http_instrumentation"
)

# Level 2 of W3C Trace Context; releases before 1.4x have no name for it.
RANDOM_TRACE_ID: Final[int] = getattr(trace_api.TraceFlags, "RANDOM_TRACE_ID", 0x02)


def tracer_provider() -> object:
    """
    Return the tracer provider that somebody made the global one, or None; asking makes none, as the public way would.
    """
    return getattr(trace_api, "_TRACER_PROVIDER", None)


def meter_provider() -> MeterProvider | None:
    """
    Return the meter provider that somebody made the global one, or None; asking makes none, as the public way would.
    """
    from opentelemetry.metrics import _internal  # noqa: PLC0415 - of use to services with metrics only

    return getattr(_internal, "_METER_PROVIDER", None)


def measures(provider: object) -> bool:
    """
    Tell whether a meter provider keeps what is measured: it is neither the one that does nothing nor a stand-in.
    """
    from opentelemetry.metrics import NoOpMeterProvider, _internal  # noqa: PLC0415 - see above

    return not isinstance(provider, (NoOpMeterProvider, getattr(_internal, "_ProxyMeterProvider", ())))


def context_variable() -> Any:
    """
    Return the ``contextvars.ContextVar`` that holds the current context, or None where it is not known.
    """
    return getattr(RUNTIME_CONTEXT, "_current_context", None)
