"""
Spans at the cost of the hot path: a light span where everything behind it is ours, a plain SDK span otherwise.

The SDK's own span costs about 13 us with eleven attributes, a light one about 2 (``benchmarks/``). A foreign span
processor, sampler, id generator or provider sees spans and attributes at start, so with one of those the SDK makes the
span.
"""

from __future__ import annotations

import threading
from time import time_ns
from typing import TYPE_CHECKING, Any, Final, cast

from opentelemetry import trace as trace_api
from opentelemetry.sdk.trace import Span
from opentelemetry.sdk.trace import Tracer as SdkTracer
from opentelemetry.sdk.trace import TracerProvider as SdkTracerProvider
from opentelemetry.semconv.attributes import exception_attributes
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from otel_correlation import identity, semconv
from otel_correlation._version import __version__
from otel_correlation.export.sizes import SHORT, text_bytes
from otel_correlation.ids import CorrelationIdGenerator, given_trace_id, random_span_id, random_trace_id, take_given
from otel_correlation.policy import DEFAULT, bounds_for, class_name, scrubbed, stack_of, text_of
from otel_correlation.sampling import RatioSampler, without_threshold
from otel_correlation.upstream import sdk as upstream
from otel_correlation.upstream.api import SPAN_KEY as _SPAN_KEY
from otel_correlation.upstream.sdk import BoundedAttributes, BoundedList, SynchronousMultiSpanProcessor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from opentelemetry.context import Context
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import TracerProvider
    from opentelemetry.util.types import AnyValue, Attributes

    from otel_correlation.policy import Bounds

    Lazy = dict[str, Any] | Callable[[], dict[str, Any]]

SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.44.0"

_UNSET: Final = Status(StatusCode.UNSET)
_FLAGS: Final = tuple(TraceFlags(value) for value in range(4))
_PLAIN: Final = (str, bool, int, float)


class LightSpan(Span):
    """
    An SDK span that keeps its attributes in a plain dict until someone asks for more.

    To processors, exporters and user code it is an ``opentelemetry.sdk.trace.Span``; ``on_end`` gets the span itself.
    """

    # What the SDK's __init__ would set on each span is the same for all of ours.
    _events: Any = ()
    _links: Any = ()
    _status: Status = _UNSET
    _end_time: int | None = None
    _record_exception = True
    _set_status_on_exception = True
    _sampler = None
    _trace_config = None
    _instrumentation_info = None
    _record_end_metrics = None
    # Bytes of long texts: what set_attribute put there; and of all attributes, where whoever made the span has counted.
    _long_set = 0
    _long: int | None = None
    # Only code of the SDK that we did not override would take it; nothing here is held for long.
    _lock: Any = threading.RLock()

    def __init__(
        self,
        owner: Tracer,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        kind: SpanKind,
        attributes: dict[str, Any],
        links: Sequence[Link],
        start_time: int | None = None,
    ) -> None:
        self._owner = owner
        self._name = name
        self._context = context
        self._parent = parent
        self._kind = kind
        self._attributes: Any = attributes
        if len(attributes) > owner.room:
            self._bounded()
        if links:
            self._links = BoundedList.from_seq(owner.limits.max_links, links)
        self._start_time = time_ns() if start_time is None else start_time
        self._open = True

    @property
    def _resource(self) -> Resource:  # type: ignore[override]
        return self._owner.resource

    @property
    def _instrumentation_scope(self) -> InstrumentationScope:  # type: ignore[override]
        return cast("InstrumentationScope", self._owner.scope)

    @property
    def _limits(self) -> Any:
        return self._owner.limits

    @property
    def _span_processor(self) -> Any:  # type: ignore[override]
        return self._owner.processor

    def _bounded(self) -> BoundedAttributes:
        """
        Turn the plain dict into the SDK's attributes: a limit is near, or a value wants cleaning.
        """
        held = self._attributes
        if not isinstance(held, BoundedAttributes):
            limits = self._owner.limits
            held = BoundedAttributes(
                limits.max_span_attributes,
                held,
                immutable=False,
                max_value_len=limits.max_span_attribute_length,
            )
            self._attributes = held
        return held

    def set_attribute(self, key: str, value: AnyValue) -> None:
        """
        Set one attribute; ignored after the end, as in the SDK.
        """
        if self._end_time is not None:
            return
        held = self._attributes
        kind = type(value)
        if type(held) is dict and kind in _PLAIN and type(key) is str and key and len(held) < self._owner.room:
            held[key] = value
            if kind is str and len(value) > SHORT:  # type: ignore[arg-type] # it is a str
                self._long_set += text_bytes(value)  # type: ignore[arg-type]
        else:
            self._bounded()[key] = value

    def counted(self, long: int) -> None:
        """
        Say how many bytes the long texts have that the span was started with, so that its end need not look for them.

        Args:
            long: Bytes of texts of more than ``export.sizes.SHORT`` characters.
        """
        self._long = self._long_set + long

    def set_attributes(self, attributes: Mapping[str, AnyValue]) -> None:
        """
        Set several attributes.
        """
        for key, value in attributes.items():
            self.set_attribute(key, value)

    def _add_event(self, event: Any) -> None:
        if self._end_time is None:
            if not isinstance(self._events, BoundedList):
                self._events = BoundedList(self._owner.limits.max_events)
            self._events.append(event)

    def _add_link(self, link: Link) -> None:
        if self._end_time is None:
            if not isinstance(self._links, BoundedList):
                self._links = BoundedList(self._owner.limits.max_links)
            self._links.append(link)

    def update_name(self, name: str) -> None:
        """
        Rename the span; ignored after the end.
        """
        if self._end_time is None:
            self._name = name

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """
        Set the status by the SDK's rules: OK is final, UNSET changes nothing.
        """
        if self._end_time is not None:
            return
        wanted = status if isinstance(status, Status) else Status(status, description)
        if self._status.status_code is StatusCode.OK or wanted.status_code is StatusCode.UNSET:
            return
        self._status = wanted

    def record_exception(
        self,
        exception: BaseException,
        attributes: Attributes = None,
        timestamp: int | None = None,
        escaped: bool = False,  # noqa: FBT001, FBT002 - the SDK's signature
    ) -> None:
        """
        Record an exception as a span event.
        """
        values = exception_event(exception, bounds=bounds_for(self._owner.limits.max_attribute_length))
        values["exception.escaped"] = str(escaped)
        self.add_event("exception", {**values, **(attributes or {})}, timestamp)

    def end(self, end_time: int | None = None) -> None:
        """
        End the span and hand it to the pipeline; a second call changes nothing.
        """
        try:
            # Deleting is one step of the interpreter: of two threads that end a span, one gets it.
            del self._open
        except AttributeError:
            return
        self._end_time = time_ns() if end_time is None else end_time
        self._owner.on_end(self)


def exception_event(
    error: BaseException, trace: TracebackType | None = None, *, bounds: Bounds = DEFAULT
) -> dict[str, Any]:
    """
    Return the attributes of an ``exception`` event (semantic conventions, exceptions on spans).

    Args:
        error: The exception.
        trace: Its traceback, where the exception itself has lost it.
        bounds: How long its texts may be.
    """
    return {
        exception_attributes.EXCEPTION_TYPE: class_name(type(error)),
        exception_attributes.EXCEPTION_MESSAGE: scrubbed(text_of(error), bounds.message, bounds),
        exception_attributes.EXCEPTION_STACKTRACE: stack_of(error, trace or error.__traceback__, bounds),
    }


class Tracer:
    """
    Starts the spans of one instrumentation scope.

    Args:
        scope: Name of the instrumentation scope.
        provider: The provider to use; the global one, asked again for each span, if None.
        version: Version of the scope.

    Attributes:
        bounds: How long the values of attributes may be, by the provider's limits.
    """

    def __init__(self, scope: str, provider: TracerProvider | None = None, *, version: str = __version__) -> None:
        self._name = scope
        self._version = version
        self._fixed = provider
        self._provider: TracerProvider | None = None
        self._processors: Sequence[Any] = ()
        self._tracer: trace_api.Tracer = trace_api.NoOpTracer()
        # The same tracer where it is an SDK one, and its sampler as it was seen.
        self._sdk: Any = None
        self._seen_sampler: Any = None
        self._sampler: RatioSampler | None = None
        self._new_trace_id: Callable[[], int] = random_trace_id
        self.limits: Any = None
        self.bounds = DEFAULT
        self.room = 0
        self.processor: Any = None
        self.on_end: Callable[[Any], None] = _drop
        self.scope: Any = None

    @property
    def resource(self) -> Resource:
        """
        The provider's resource as it is now (the SDK renews it after a fork).
        """
        return cast("Resource", self._sdk.resource)

    def _resolve(self, provider: TracerProvider) -> None:
        """
        Look once at what stands behind the provider, and again when it changes.
        """
        self._sampler = None
        self.processor = None
        self._sdk = None
        self.bounds = DEFAULT
        self._new_trace_id = random_trace_id
        self._tracer = provider.get_tracer(self._name, self._version, SCHEMA_URL)
        self._provider = provider
        tracer = self._tracer
        if not isinstance(provider, SdkTracerProvider) or not isinstance(tracer, SdkTracer):
            return
        if not upstream.is_open(tracer):
            return
        if not isinstance(tracer.id_generator, CorrelationIdGenerator):
            # This tracer object is ours alone: its scope has our name. No other tracer of the provider is touched.
            tracer.id_generator = CorrelationIdGenerator(tracer.id_generator)
            own_ids = False
        else:
            own_ids = tracer.id_generator._inner is None
        if not own_ids:
            self._new_trace_id = tracer.id_generator.generate_trace_id
        self._sdk = tracer
        self.processor = multi = tracer.span_processor
        self.limits = tracer._span_limits
        self.bounds = bounds_for(self.limits.max_span_attribute_length)
        self.scope = tracer._instrumentation_scope
        self._seen_sampler = tracer.sampler
        self._processors = processors = multi._span_processors
        limits = self.limits
        if (
            own_ids
            and isinstance(multi, SynchronousMultiSpanProcessor)
            and type(tracer.sampler) is RatioSampler
            and all(getattr(processor, "accepts_light_spans", False) for processor in processors)
            and upstream.counts_nothing(tracer)
            and limits.max_span_attribute_length is None
        ):
            self._sampler = tracer.sampler
            self.on_end = processors[0].on_end if len(processors) == 1 else multi.on_end
            self.room = limits.max_span_attributes if limits.max_span_attributes is not None else 1 << 30

    def new_trace_id(self) -> int:
        """
        Return a new trace id, from the provider's own generator where it has one (X-Ray's, for instance).
        """
        if self._provider is None:
            self._resolve(self._fixed or trace_api.get_tracer_provider())
        return self._new_trace_id()

    def start(
        self,
        name: str,
        kind: SpanKind,
        context: Context,
        attributes: Lazy,
        *,
        trace_id: int | None = None,
        minted: bool = False,
        links: Sequence[Link] = (),
        start_time: int | None = None,
        forced: bool = False,
    ) -> trace_api.Span:
        """
        Start a span.

        Args:
            name: Span name.
            kind: Span kind.
            context: Where the parent and the identity are.
            attributes: Clean attribute values, or a function that collects them, called only when somebody will see
                them. The dict belongs to the span afterwards.
            trace_id: The trace id of a root span; ignored when there is a parent; random if None.
            minted: Whether ``trace_id`` is random, and not taken from a request id.
            links: Valid links.
            start_time: Nanoseconds since the epoch; now if None.
            forced: Whether our sampler samples it whatever the ratio; a third party's decides as it does.
        """
        provider = self._fixed or trace_api.get_tracer_provider()
        sdk = self._sdk
        if provider is not self._provider or (
            sdk is not None
            and (self.processor._span_processors is not self._processors or sdk.sampler is not self._seen_sampler)
        ):
            self._resolve(provider)
        sampler = self._sampler
        if sampler is None or not self._sdk._tracer_config.is_enabled:
            return self._start_plain(name, kind, context, attributes, trace_id, minted, links, start_time, forced)
        parent_span: Any = context.get(_SPAN_KEY)
        parent: SpanContext | None = None if parent_span is None else parent_span.get_span_context()
        if parent is None or not parent.is_valid:
            parent = None
            if trace_id is None and (taken := take_given()) is not None:
                trace_id, minted = taken
            given = trace_id is not None and not minted
            chosen = trace_id if trace_id is not None else random_trace_id()
            random_bit = 0 if given else 2
        else:
            given = False
            chosen = parent.trace_id
            random_bit = parent.trace_flags & 2
        sampled, state = sampler.decide(parent, chosen, given=given)
        if forced and not sampled:
            sampled, state = True, without_threshold(state)
        span_context = SpanContext(chosen, random_span_id(), False, _FLAGS[random_bit | sampled], state)
        if not sampled:
            return NonRecordingSpan(span_context)
        values = attributes if isinstance(attributes, dict) else attributes()
        found = identity.get_from(context)
        if found is not None:
            values[semconv.REQUEST_ID] = found.request_id
        return LightSpan(self, name, span_context, parent, kind, values, links, start_time)

    def _start_plain(
        self,
        name: str,
        kind: SpanKind,
        context: Context,
        attributes: Lazy,
        trace_id: int | None,
        minted: bool,  # noqa: FBT001 - private, as the caller has it
        links: Sequence[Link],
        start_time: int | None,
        forced: bool,  # noqa: FBT001
    ) -> trace_api.Span:
        values = attributes if isinstance(attributes, dict) else attributes()
        found = identity.get_from(context)
        if found is not None:
            values[semconv.REQUEST_ID] = found.request_id
        if trace_id is None and not forced:
            return self._tracer.start_span(name, context, kind, values, links, start_time)
        with given_trace_id(trace_id, random=minted, forced=forced):
            return self._tracer.start_span(name, context, kind, values, links, start_time)


def _drop(span: Any) -> None:
    del span


__all__ = ["LightSpan", "Tracer", "class_name", "exception_event"]
