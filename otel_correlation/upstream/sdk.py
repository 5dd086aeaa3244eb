"""
Names of ``opentelemetry-sdk``'s traces, those of its insides: private, or public where nobody else looks.
"""

from __future__ import annotations

from typing import Any, Final

from otel_correlation.upstream import Unknown

# What we read of a tracer whose spans skip the SDK's own start.
_READ: Final = ("_instrumentation_scope", "_span_limits", "_tracer_config", "id_generator", "sampler", "span_processor")


try:
    from opentelemetry.attributes import BoundedAttributes
except ImportError:
    BoundedAttributes = Unknown  # type: ignore[assignment,misc]

try:
    from opentelemetry.sdk.util import BoundedList
except ImportError:
    BoundedList = Unknown  # type: ignore[assignment,misc]

try:
    from opentelemetry.sdk.trace import SynchronousMultiSpanProcessor
except ImportError:
    SynchronousMultiSpanProcessor = Unknown  # type: ignore[assignment,misc]

try:
    from opentelemetry.sdk.trace._tracer_metrics import NoOpTracerMetrics
except ImportError:
    # A release that counts spans in another way: none is made around it.
    NoOpTracerMetrics = Unknown  # type: ignore[assignment,misc]


def is_open(tracer: Any) -> bool:
    """
    Tell whether we can look behind a tracer of the SDK; where not, it makes plain spans, which cost more.
    """
    return all(hasattr(tracer, name) for name in _READ) and hasattr(tracer.span_processor, "_span_processors")


def counts_nothing(tracer: Any) -> bool:
    """
    Tell whether the SDK keeps no metrics of the spans that a tracer starts.
    """
    return isinstance(getattr(tracer, "_tracer_metrics", None), NoOpTracerMetrics)


def tracers(provider: Any) -> list[Any]:
    """
    Return the tracers that a provider has made so far.
    """
    return list(getattr(provider, "_tracers", {}).values())


def sampler_named(name: str) -> Any:
    """
    Return the sampler of a third party's entry point, made by the SDK; None where it cannot be.
    """
    from opentelemetry.sdk import _configuration  # noqa: PLC0415 - a heavy module, and rarely needed

    make: Any = getattr(_configuration, "_import_sampler", None)
    return None if make is None else make(name)


__all__ = [
    "BoundedAttributes",
    "BoundedList",
    "NoOpTracerMetrics",
    "SynchronousMultiSpanProcessor",
    "counts_nothing",
    "is_open",
    "sampler_named",
    "tracers",
]
