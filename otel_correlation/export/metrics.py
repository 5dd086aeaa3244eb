"""
What `stats()` counts, as metrics, where the service has metrics at all.

Names and attributes are those of the semantic conventions for SDKs (`otel.sdk.*`); what these have no name for is one
counter of ours. Everything is read when the metrics are collected, so nothing here costs a request anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from opentelemetry.metrics import Observation
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE

from otel_correlation import guard
from otel_correlation._version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

    from opentelemetry.metrics import CallbackOptions, MeterProvider
    from opentelemetry.util.types import Attributes

    from otel_correlation.export.batching import Batcher
    from otel_correlation.export.sending import Kind

METER: Final = "otel_correlation"
EVENTS: Final = "otel_correlation.events"
REASON: Final = "otel_correlation.reason"

# Dropped before the exporter saw it; the conventions prescribe the values of error.type.
_BY_PROCESSOR: Final = {
    "queue_full": "queue_full",
    "queue_bytes": "queue_bytes",
    "after_shutdown": "already_shutdown",
}
# What the conventions call by another name than stats() does.
_RENAMED: Final = {"rejected_by_collector": "rejected"}

# By their text: an older package of the conventions, ahead on the path, has no names for them.
_COMPONENT_TYPE: Final = "otel.component.type"
_COMPONENT_NAME: Final = "otel.component.name"


class _Signal(NamedTuple):
    kind: Kind
    # As in the metrics' names, and as their unit.
    noun: Literal["span", "log"]
    # One for all exporters of a kind: the counters do not tell them apart.
    component: dict[str, str]


def _component(name: str) -> dict[str, str]:
    return {_COMPONENT_TYPE: name, _COMPONENT_NAME: f"{name}/0"}


_SIGNALS: Final = (
    _Signal("spans", "span", _component("otel_correlation.export.SpanPipeline")),
    _Signal("logs", "log", _component("otel_correlation.export.LogPipeline")),
)


def observe(provider: MeterProvider, batchers: Sequence[Batcher[Any]]) -> None:
    """
    Offer every counter and the queues as metrics of ``provider``; call it once for each provider.

    Args:
        provider: Where the instruments are made.
        batchers: The queues. Of spans, or of logs, there is no ``otel.sdk.*`` metric where none of them holds any.
    """
    meter = provider.get_meter(METER, __version__)
    for signal in _SIGNALS:
        mine = [batcher for batcher in batchers if batcher.kind == signal.kind]
        if not mine:
            continue
        unit = f"{{{signal.noun}}}"
        meter.create_observable_counter(
            f"otel.sdk.exporter.{signal.noun}.exported",
            [_exported(signal)],
            unit,
            f"The {signal.kind} whose export has ended, by what it failed of.",
        )
        meter.create_observable_counter(
            f"otel.sdk.processor.{signal.noun}.processed",
            [_processed(signal, mine)],
            unit,
            f"The {signal.kind} that the queue has handed to the exporter, or dropped, by why.",
        )
        for name, description, read in (
            ("size", f"The {signal.kind} that wait.", _waiting(mine)),
            ("capacity", f"The {signal.kind} that may wait.", _room(mine)),
        ):
            meter.create_observable_up_down_counter(
                f"otel.sdk.processor.{signal.noun}.queue.{name}", [_one(read, signal.component)], unit, description
            )
    meter.create_observable_counter(EVENTS, [_events], "{event}", "What stats() counts beside spans and logs, by name.")


def _one(read: Callable[[], int], attributes: Attributes) -> Callable[[CallbackOptions], Iterable[Observation]]:
    return lambda _options: [Observation(read(), attributes)]


def _waiting(batchers: Sequence[Batcher[Any]]) -> Callable[[], int]:
    return lambda: sum(batcher.waiting() for batcher in batchers)


def _room(batchers: Sequence[Batcher[Any]]) -> Callable[[], int]:
    return lambda: sum(batcher.room for batcher in batchers)


def _exported(signal: _Signal) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def read(_options: CallbackOptions) -> Iterable[Observation]:
        counters = guard.counters()
        # Zero from the start: a rate needs a value to rise from.
        yield Observation(counters.get(f"{signal.kind}.exported", 0), signal.component)
        for reason, amount in _dropped(signal, counters):
            if reason not in _BY_PROCESSOR:
                yield Observation(amount, {**signal.component, ERROR_TYPE: _RENAMED.get(reason, reason)})

    return read


def _processed(signal: _Signal, batchers: Sequence[Batcher[Any]]) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def read(_options: CallbackOptions) -> Iterable[Observation]:
        dropped = {"queue_full": 0, **dict(_dropped(signal, guard.counters()))}
        yield Observation(sum(batcher.handed_over for batcher in batchers), signal.component)
        for reason, error in _BY_PROCESSOR.items():
            if reason in dropped:
                yield Observation(dropped[reason], {**signal.component, ERROR_TYPE: error})

    return read


def _dropped(signal: _Signal, counters: dict[str, int]) -> Iterable[tuple[str, int]]:
    prefix = f"{signal.kind}.dropped."
    return [(name.removeprefix(prefix), amount) for name, amount in counters.items() if name.startswith(prefix)]


def _events(_options: CallbackOptions) -> Iterable[Observation]:
    counted = tuple(f"{signal.kind}.{name}" for signal in _SIGNALS for name in ("exported", "dropped."))
    for name, amount in guard.counters().items():
        if not name.startswith(counted):
            yield Observation(amount, {REASON: name})
