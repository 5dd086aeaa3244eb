"""
One physical attempt to send a request: its CLIENT span, the headers that name it, and when it is over.
"""

from __future__ import annotations

import functools
import os
import sys
from collections import deque
from time import time_ns
from typing import TYPE_CHECKING, Any, Final, cast

from opentelemetry import context as otel_context
from opentelemetry import propagate
from opentelemetry.context import Context
from opentelemetry.semconv.attributes import (
    error_attributes,
    http_attributes,
    network_attributes,
    server_attributes,
    url_attributes,
)
from opentelemetry.trace import Link, SpanKind, StatusCode, get_current_span

from otel_correlation import guard, identity, propagators, semconv
from otel_correlation.clients._copies import Names, kept_back, remember_sent
from otel_correlation.clocks import perf_counter
from otel_correlation.outcome import show
from otel_correlation.policy import redact_url
from otel_correlation.upstream.api import SPAN_KEY as _SPAN_KEY
from otel_correlation.upstream.api import SUPPRESS_HTTP_INSTRUMENTATION as _SUPPRESS_HTTP_INSTRUMENTATION_KEY
from otel_correlation.upstream.api import SUPPRESS_INSTRUMENTATION as _SUPPRESS_INSTRUMENTATION_KEY

if TYPE_CHECKING:
    import re
    from collections.abc import Awaitable, Callable, Sequence
    from types import FrameType

    from opentelemetry.metrics import Histogram
    from opentelemetry.propagators.textmap import TextMapPropagator
    from opentelemetry.trace import Span, SpanContext

    from otel_correlation.clients._copies import Entry as _Entry
    from otel_correlation.policy import HeaderCapture, Outbound
    from otel_correlation.settings import Settings
    from otel_correlation.tracer import Tracer

# RFC 9110, PATCH (RFC 5789) and QUERY; anything else is _OTHER (semantic conventions, http.request.method).
_METHODS: Final = frozenset(
    {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"},
)
_PORTS: Final = {"http": 80, "https": 443, "ws": 80, "wss": 443}
_VERSIONS: Final = {b"HTTP/1.1": "1.1", b"HTTP/1.0": "1.0", b"HTTP/2": "2", b"HTTP/3": "3"}
# An older key of contrib's, which its own suppress_instrumentation() still sets.
_SUPPRESS_PLAIN: Final = "suppress_instrumentation"

_TRACEPARENT: Final = semconv.TRACEPARENT.encode()
_TRACESTATE: Final = semconv.TRACESTATE.encode()
_BAGGAGE: Final = semconv.BAGGAGE.encode()

# On the request object: how often it was sent in this call, which headers we put on it, and the fields of others that
# stand in one of those. Plain values, because httpx pickles what a request holds.
_SENT: Final = "_otel_correlation_sent"


class ClientConfig:
    """
    What one client, or all of them, were told.

    Attributes:
        settings: The settings.
        tracer: Starts the CLIENT spans; None where the SDK is disabled.
        excluded: URLs that make no span; the caller's context goes on all the same.
        request_headers: Request headers to capture, or None.
        response_headers: Response headers to capture, or None.
        duration: ``http.client.request.duration``, or None where nobody measures.
        on_request: Called with span and request, when the headers are there.
        on_response: Called with span, request and response.
        on_async_request: As ``on_request``, awaited, for asynchronous clients.
        on_async_response: As ``on_response``, awaited, for asynchronous clients.
        outbound: Tells for a URL whether traceparent, baggage and request id may leave; everything may if None.
        options: The keyword arguments that all this was built from.
    """

    __slots__ = (
        "_without_spans",
        "duration",
        "excluded",
        "injector",
        "on_async_request",
        "on_async_response",
        "on_request",
        "on_response",
        "options",
        "outbound",
        "request_headers",
        "response_headers",
        "settings",
        "tracer",
    )

    def __init__(
        self,
        settings: Settings,
        *,
        tracer: Tracer | None,
        excluded: re.Pattern[str] | None = None,
        request_headers: HeaderCapture | None = None,
        response_headers: HeaderCapture | None = None,
        duration: Histogram | None = None,
        on_request: Callable[[Span, Any], object] | None = None,
        on_response: Callable[[Span, Any, Any], object] | None = None,
        on_async_request: Callable[[Span, Any], Awaitable[object]] | None = None,
        on_async_response: Callable[[Span, Any, Any], Awaitable[object]] | None = None,
        outbound: Outbound | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.options = options or {}
        self.settings = settings
        self.tracer = tracer
        self.excluded = excluded
        self.request_headers = request_headers
        self.response_headers = response_headers
        self.duration = duration
        self.on_request = on_request
        self.on_response = on_response
        self.on_async_request = on_async_request
        self.on_async_response = on_async_response
        self.outbound = outbound
        self.injector: _Injector | None = None
        self._without_spans: ClientConfig | None = None

    def without_spans(self) -> ClientConfig:
        """
        Return the same for a client that makes neither span nor measurement; the context that is current goes on.
        """
        found = self._without_spans
        if found is None:
            found = self._without_spans = ClientConfig(self.settings, tracer=None, outbound=self.outbound)
        return found


class Attempt:
    """
    One request on its way; ends exactly once.

    Attributes:
        checked: The headers that were found free of what may not leave; None where all may.
        config: What its client was told.
        context: What is current while the transport works.
        outer: What was current before.
        recording: Whether the span takes attributes.
        request: The request object.
        sends: How often the call sent so far, this attempt included.
        merged: The fields that somebody else wrote and that stand in one of ours now, as they were.
        sent: The headers that we put on it, and those of its repetitions by a transport.
        url: The URL that the outbound policy was asked about; None where there is no policy.
        used: Whether a transport of httpx's own carries it already.
    """

    __slots__ = (
        "_began_s",
        "_ended",
        "_generation",
        "_measured",
        "_responded",
        "checked",
        "config",
        "context",
        "merged",
        "outer",
        "recording",
        "request",
        "sends",
        "sent",
        "span",
        "url",
        "used",
    )

    def __init__(
        self, config: ClientConfig, request: Any, span: Span, outer: Context, context: Context, sends: int
    ) -> None:
        self.config = config
        self.request = request
        self.span = span
        self.outer = outer
        self.sends = sends
        self.context = context
        self.sent: list[_Entry] = []
        self.merged: Sequence[_Entry] = ()
        self.checked: list[_Entry] | None = None
        self.url: Any = None
        self.used = False
        self._generation = _generation
        self._responded = False
        self.recording = span.is_recording()
        self._measured: dict[str, Any] | None = None
        self._began_s = 0.0
        if config.duration is not None:
            self._began_s = perf_counter()
            self._measured = _common_attributes(request)
        # Nothing is waited for where nobody would see it.
        self._ended = not self.recording and self._measured is None

    def observe(self, response: Any) -> bool:
        """
        Take what the response's head says; tells whether this was the first one.
        """
        if self._responded:
            return False
        self._responded = True
        if not self._ended:
            try:
                self._note(response.status_code, response.extensions.get("http_version"))
                capture = self.config.response_headers
                if capture is not None and self.recording:
                    self.span.set_attributes(cast("Any", capture.attributes(response.headers.raw)))
            except Exception:  # noqa: BLE001 - the boundary
                guard.report("client.response")
        return True

    def _note(self, status: int, version: bytes | None) -> None:
        values: dict[str, Any] = {http_attributes.HTTP_RESPONSE_STATUS_CODE: status}
        # httpx, too, takes a transport that says nothing for HTTP/1.1.
        values[network_attributes.NETWORK_PROTOCOL_VERSION] = (
            "1.1" if version is None else _VERSIONS.get(version) or version.decode("ascii", "ignore").partition("/")[2]
        )
        if status >= 400:
            values[error_attributes.ERROR_TYPE] = str(status)
        if self.recording:
            span = self.span
            for name, value in values.items():
                span.set_attribute(name, value)
            if status >= 400:
                span.set_status(StatusCode.ERROR)
        if self._measured is not None:
            self._measured.update(values)

    def release(self, response: Any, stream_class: Any) -> None:
        """
        End with the response's body: now if there is nothing left to read, else when it was read, closed or dropped.
        """
        if self._ended:
            return
        try:
            stream = response.stream
            # A WebSocket's handshake ends with its 101 (contract point 8); the connection may stay open for hours.
            if not response.is_closed and response.status_code != 101 and isinstance(stream, stream_class.base):
                response.stream = stream_class(stream, self)
                return
        except Exception:  # noqa: BLE001 - the boundary
            guard.report("client.body")
        self.end()

    def fail(self, error: BaseException) -> None:
        """
        End with what left the transport, or the body of the response.
        """
        if self._ended:
            return
        try:
            # An exception that a transport made of a response, such as raise_for_status().
            response = getattr(error, "response", None)
            if not self._responded and isinstance(status := getattr(response, "status_code", None), int):
                self._note(status, getattr(response, "extensions", {}).get("http_version"))
            error_type = show(self.span, error)
            if isinstance(error, Exception):
                # A text with a URL in it, such as raise_for_status() makes, may hold what url.full must not.
                text, name = str(error), type(error).__name__
                self.span.set_status(StatusCode.ERROR, name if "://" in text else f"{name}: {text}")
            if self._measured is not None and error_type is not None:
                self._measured[error_attributes.ERROR_TYPE] = error_type
        except Exception:  # noqa: BLE001 - the boundary
            guard.report("client.error")
        self.end()

    def end(self, end_time: int | None = None) -> None:
        """
        End the span; a second call changes nothing.
        """
        if self._ended:
            return
        self._ended = True
        try:
            self.span.end(end_time)
            duration = self.config.duration
            if duration is not None:
                duration.record(max(perf_counter() - self._began_s, 0.0), self._measured, self.context)
        except Exception:  # noqa: BLE001 - the boundary
            guard.report("client.end")

    def drop(self) -> None:
        """
        End because nobody can read the response any more; called by the garbage collector, wherever it runs.
        """
        if self._ended or self._generation != _generation:
            return
        if _may_hold_a_lock():
            _dropped.append((self, time_ns()))
        else:
            self.end()


class Call:
    """
    One send of a client whose transport sends by another one: a cache, a retry. The attempts are that one's, if any.

    It has what an attempt below reads of the one that it repeats.

    Attributes:
        config: What the client was told.
        merged: As an attempt's.
        outer: None: an attempt's parent is what is current where it is sent.
        request: The request that the client sends.
        sends: How often the call sent so far.
        sent: The headers that we put on its requests.
        used: True: nothing of ours is under way until the transport below is used.
    """

    __slots__ = ("config", "merged", "request", "sends", "sent")

    outer: Final = None
    used: Final = True

    def __init__(self, config: ClientConfig, request: Any) -> None:
        self.config = config
        self.request = request
        # The transport sees ids on the request, and may send it by other means than httpx's.
        begin(config, request, bare=True)
        self.sends: int
        self.sent: list[_Entry]
        self.merged: Sequence[_Entry]
        self.sends, self.sent, self.merged = getattr(request, "__dict__", {}).get(_SENT) or (0, [], ())


class _Nested:
    """
    True while an attempt is open: for other HTTP instrumentations inside of a transport that sends by another client.

    Not just True: what such a transport starts, such as a task that renews its token, keeps the context afterwards.
    """

    __slots__ = ("_attempt",)

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt

    def __bool__(self) -> bool:
        return not self._attempt._ended


# Attempts whose response was collected in the middle of telemetry's own work; the next attempt ends them, so there are
# never more than responses were open at once.
_dropped: deque[tuple[Attempt, int]] = deque()
_LOCKING: Final = (
    "opentelemetry.sdk",
    "opentelemetry.exporter",
    "otel_correlation.export",
    "otel_correlation.guard",
    "otel_correlation.tracer",
    "queue",
    "threading",
)
# Every thread but the main one starts in these, without a lock.
_BOOTSTRAP: Final = frozenset({"_bootstrap", "_bootstrap_inner", "run"})


def _may_hold_a_lock() -> bool:
    """
    Tell whether this thread was interrupted inside a span processor: ending a span there could wait for itself.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith(_LOCKING) and not (name == "threading" and frame.f_code.co_name in _BOOTSTRAP):
            return True
        frame = frame.f_back
    return False


# How many forks lie between the first process and this one: what the parent has open, only the parent ends.
_generation = 0


def _after_fork() -> None:
    global _generation  # noqa: PLW0603 - one number per process
    _generation += 1
    _dropped.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def end_dropped() -> None:
    """
    End the spans of responses that nobody can read any more; for shutdown and for the next attempt.
    """
    while _dropped:
        try:
            attempt, when = _dropped.popleft()
        except IndexError:  # another thread was faster
            return
        attempt.end(when)


class _Injector:
    """
    What one propagator writes; ours are asked for values directly.
    """

    def __init__(self, textmap: TextMapPropagator, settings: Settings) -> None:
        self.textmap = textmap
        self._settings = settings
        self._names: Names | None = None
        self._trace = False
        self._baggage = False
        self._request_id: tuple[bytes, bytes] | None = None
        self._own = type(textmap) is propagators._Composite
        self._request_id_name = settings.response_header.lower().encode()
        self._only_request_id = settings.sdk_disabled
        for part in textmap._propagators if isinstance(textmap, propagators._Composite) else ():
            if type(part) is propagators.TraceContextPropagator:
                self._trace = not settings.sdk_disabled
            elif type(part) is propagators.BaggagePropagator:
                self._baggage = not settings.sdk_disabled
            elif type(part) is propagators.RequestIdPropagator:
                self._request_id = (part._name.encode(), part._name.lower().encode())
            else:
                self._own = False
        # What stands beside the headers by which a span is named, and these.
        self._beside = frozenset({_TRACESTATE, _BAGGAGE, self._request_id_name})
        self._spans = self._names_of_spans()
        self.watched = self._spans | self._beside

    @property
    def names(self) -> Names:
        """
        What can carry something of ours; made where a host may not have everything.
        """
        if self._names is None:
            fields: set[str] = set()
            with guard.never_raise("client.fields"):
                fields |= self.textmap.fields
            self._names = Names(self._settings, fields)
        return self._names

    def _names_of_spans(self) -> frozenset[bytes]:
        if self._own:
            return frozenset({_TRACEPARENT} if self._trace else ())
        written: set[bytes] = set()
        if not self._only_request_id:
            with guard.never_raise("client.fields"):
                written |= {name.lower().encode("latin-1") for name in self.textmap.fields}
        return frozenset(written - self._beside)

    def passed_on(self, context: Context, present: dict[bytes, bytes], kept: list[_Entry]) -> frozenset[bytes]:
        """
        Return the names of the headers that are the caller's own and go on with a request, so that ours replace them.

        Of the headers that name a span all are, or none: one that differs was chosen.

        Args:
            context: What runs now.
            present: The headers of the request, by lower-case name.
            kept: The same with every field.
        """
        who = identity.get_from(context)
        received = None if who is None else who.received
        if not received:
            return _NONE
        # Sets: a caller may send thousands of fields, and a gateway pass on thousands.
        there: dict[bytes, set[bytes]] = {}
        for _, lower, value in kept:
            if lower in received and lower in self.watched:
                there.setdefault(lower, set()).add(value.strip(_SPACE))
        came = {lower for lower, values in there.items() if values.issubset(received[lower])}
        found = self._spans.intersection(present)
        if not found:
            return self._beside.intersection(came)
        passed = self._beside.intersection(came) - {_TRACESTATE}
        return passed | found | {_TRACESTATE} if found <= came else passed

    def headers(
        self,
        context: Context,
        span_context: SpanContext | None,
        present: dict[bytes, bytes],
        kept: list[_Entry],
        passed: frozenset[bytes],
        allowed: tuple[bool, bool, bool] | None,
    ) -> list[_Entry]:
        """
        Return the headers that may leave and that the caller did not set; of a list, what it set and what we add.

        Args:
            context: What to propagate.
            span_context: The valid span of ``context``, or None.
            present: The headers that the caller set, by lower-case name.
            kept: The same with every field.
            passed: Those that were passed on, so that ours replace them.
            allowed: Whether traceparent, baggage and request id may leave; all may if None.
        """
        if not self._own:
            return self._foreign(context, present, kept, passed, allowed)
        found: list[_Entry] = []
        if span_context is not None and self._trace and (allowed is None or allowed[0]):
            chosen = _TRACEPARENT in present and _TRACEPARENT not in passed
            if not chosen:
                found.append((_TRACEPARENT, _TRACEPARENT, propagators.format_traceparent(span_context).encode()))
                if state := span_context.trace_state:
                    theirs = _fields_of(_TRACESTATE, present, kept, passed)
                    header = (
                        propagators.merge_tracestate(theirs, state) if theirs else propagators.format_tracestate(state)
                    )
                    if header:
                        found.append((_TRACESTATE, _TRACESTATE, header.encode("latin-1")))
        if self._baggage and (allowed is None or allowed[1]):
            baggage = propagators.format_baggage(context)
            if baggage:
                theirs = _fields_of(_BAGGAGE, present, kept, passed)
                merged = propagators.merge_baggage(theirs, baggage) if theirs else baggage.encode("latin-1")
                found.append((_BAGGAGE, _BAGGAGE, merged))
        name = self._request_id
        if name is not None and (name[1] not in present or name[1] in passed) and (allowed is None or allowed[2]):
            known = identity.get_from(context)
            if known is not None:
                found.append((*name, known.request_id.encode("latin-1")))
        return found

    def without_replaced(
        self, kept: list[_Entry], sent: list[_Entry], passed: frozenset[bytes]
    ) -> tuple[list[_Entry], list[_Entry]]:
        """
        Return the headers that stay beside what is sent, and those that stand in it now, merged.
        """
        gone = {entry[1] for entry in sent}
        if not self._spans.isdisjoint(gone):
            # A caller's tracestate beside our traceparent would be one of our span's.
            gone |= passed & {_TRACESTATE}
        gone = gone.intersection([entry[1] for entry in kept])
        if not gone:
            return kept, []
        left = [entry for entry in kept if entry[1] not in gone]
        return left, [entry for entry in kept if entry[1] in gone and entry[1] not in passed]

    def _foreign(
        self,
        context: Context,
        present: dict[bytes, bytes],
        kept: list[_Entry],
        passed: frozenset[bytes],
        allowed: tuple[bool, bool, bool] | None,
    ) -> list[_Entry]:
        carrier: dict[str, str] = {}
        cast("Any", self.textmap).inject(carrier, context)
        found: list[_Entry] = []
        # Half of a trace context of the caller's and half of ours would name no span at all.
        blocked = not {name.lower().encode("latin-1") for name in carrier}.isdisjoint(
            present.keys() - passed - self._beside
        )
        for name, text in carrier.items():
            raw = name.encode("latin-1")
            lower = raw.lower()
            value = text.encode("latin-1")
            kind = 1 if lower == _BAGGAGE else 2 if lower == self._request_id_name else 0
            if (kind != 2 and self._only_request_id) or not (allowed is None or allowed[kind]):
                continue
            if not kind and blocked:
                continue
            if lower == _BAGGAGE and (theirs := _fields_of(lower, present, kept, passed)):
                value = propagators.merge_baggage(theirs, text)
            elif lower == _TRACESTATE and (theirs := _fields_of(lower, present, kept, passed)):
                state = get_current_span(context).get_span_context().trace_state
                value = propagators.merge_tracestate(theirs, state).encode("latin-1")
            elif lower in present and lower not in passed:
                continue
            found.append((raw, lower, value))
        return found


_NONE: Final[frozenset[bytes]] = frozenset()
_SPACE: Final = b" \t"


def _fields_of(lower: bytes, present: dict[bytes, bytes], kept: list[_Entry], passed: frozenset[bytes]) -> list[bytes]:
    """
    Return every field of a name that somebody else wrote, and did not pass on.
    """
    if lower not in present or lower in passed:
        return []
    return [value for _, each, value in kept if each == lower]


def _injector(config: ClientConfig) -> _Injector:
    textmap = propagate.get_global_textmap()
    found = config.injector
    if found is None or found.textmap is not textmap:
        found = config.injector = _Injector(textmap, config.settings)
    return found


def begin(
    config: ClientConfig,
    request: Any,
    again: Attempt | Call | None = None,
    *,
    bare: bool = False,
    nested: bool = False,
) -> Attempt | None:
    """
    Start an attempt and put its headers on the request; never raises.

    Args:
        config: What the client was told.
        request: The request. What we put on it for an earlier attempt is replaced, what the caller set stays.
        again: An earlier attempt of the same call that a transport repeats, or the call.
        bare: Nothing is sent yet: only the headers are put on the request, and they name what is current.
        nested: Whether a transport that is none of httpx's sends it, by another client perhaps: that one's own
            instrumentation makes no second span.

    Returns:
        The attempt, or None where there is no span: bare, suppressed, excluded, SDK disabled.
    """
    if _dropped:
        end_dropped()
    span: Span | None = None
    try:
        outer = None if again is None else again.outer
        if outer is None:
            outer = otel_context.get_current()
        allowed = None if config.outbound is None else config.outbound(request.url)
        if outer and (
            outer.get(_SUPPRESS_INSTRUMENTATION_KEY)
            or ((found_there := outer.get(_SUPPRESS_HTTP_INSTRUMENTATION_KEY)) and type(found_there) is not _Nested)
            or outer.get(_SUPPRESS_PLAIN)
        ):
            if allowed is not None:
                keep_back(config, request, outer, allowed)
            return None
        memory = request.__dict__.get(_SENT)
        if memory is not None:
            sends, ours, merged = memory
        elif again is not None:
            sends, ours, merged = again.sends, again.sent, again.merged
        else:
            sends, ours, merged = 0, None, ()
        held = kept = _entries(request.headers)
        present = {entry[1]: entry[2] for entry in held}
        if ours and (stale := {lower for _, lower, value in ours if present.get(lower) == value}):
            kept = [entry for entry in held if entry[1] not in stale]
            if merged:
                kept += [entry for entry in merged if entry[1] in stale]
                present = {entry[1]: entry[2] for entry in kept}
            else:
                for name in stale:
                    del present[name]
        injector = _injector(config)
        limited = allowed if allowed is not None and False in allowed else None
        if limited is not None:
            left = kept_back(injector.names, outer, kept, limited)
            if left is not None:
                guard.count("outbound.copies_kept_back")
                kept = left
                present = {entry[1]: entry[2] for entry in kept}
        passed = _NONE if injector.watched.isdisjoint(present) else injector.passed_on(outer, present, kept)
        context = outer
        attempt: Attempt | None = None
        tracer = config.tracer
        if (
            not bare
            and tracer is not None
            and (config.excluded is None or not config.excluded.search(str(request.url)))
        ):
            links: Sequence[Link] = ()
            if _TRACEPARENT in present and _TRACEPARENT not in passed:
                set_by_caller = propagators.extract_from_headers([present[_TRACEPARENT]], [])
                links = () if set_by_caller is None else (Link(set_by_caller),)
            method = request.method
            span = tracer.start(
                method if method in _METHODS else "HTTP",
                SpanKind.CLIENT,
                outer,
                functools.partial(_request_attributes, config, request, sends),
                links=links,
            )
            found = span.get_span_context()
            if found.is_valid:
                context = Context({**outer, _SPAN_KEY: span})
            attempt = Attempt(config, request, span, outer, context, sends + 1)
            if nested:
                attempt.context = Context({**context, _SUPPRESS_HTTP_INSTRUMENTATION_KEY: _Nested(attempt)})
        else:
            found = get_current_span(outer).get_span_context()
        sent = injector.headers(context, found if found.is_valid else None, present, kept, passed, allowed)
        merged = ()
        if sent and not injector.watched.isdisjoint(present):
            kept, merged = injector.without_replaced(kept, sent, passed)
        _write(request, held, kept, sent)
        request.__dict__[_SENT] = (sends if bare else sends + 1, sent, merged)
        if allowed is not None and sent:
            remember_sent(sent)
        if attempt is not None:
            attempt.sent, attempt.merged = sent, merged
            if allowed is not None:
                attempt.url = request.url
                if limited is not None:
                    attempt.checked = [*_entries(request.headers)]
            if again is not None:
                # All of them: a transport may copy the request of any earlier attempt, or put its headers back.
                again.sends, again.sent = sends + 1, again.sent + sent
                again.merged = again.merged or merged
                # The next hop of a redirect is made of the client's request.
                for each in (request, again.request):
                    each.__dict__[_SENT] = (again.sends, again.sent, again.merged)
            capture = config.request_headers
            if capture is not None and attempt.recording:
                attempt.span.set_attributes(cast("Any", capture.attributes(request.headers.raw)))
        return attempt
    except Exception:  # noqa: BLE001 - the boundary
        if span is not None:
            with guard.never_raise("client.begin"):
                span.end()
        guard.report("client.begin")
        return None


def _entries(headers: Any) -> list[_Entry]:
    """
    Return raw name, lower-case name and value of each header: httpx's own list if it has that shape.
    """
    held = getattr(headers, "_list", None)
    if type(held) is list and held and len(held[0]) == 3:
        return held
    return [(name, name.lower(), value) for name, value in headers.raw]


def _write(request: Any, held: list[_Entry], kept: list[_Entry], sent: list[_Entry]) -> None:
    """
    Put the headers of this attempt where those of the last one were.

    Args:
        request: The request.
        held: Its headers, as ``_entries`` returned them.
        kept: Those of them that stay; the same list where all do.
        sent: What is added.
    """
    headers = request.headers
    if getattr(headers, "_list", None) is held:
        if kept is not held:
            held[:] = kept
        held.extend(sent)
        return
    # The private list is gone or has another shape: slower, and the same for everybody who reads the headers.
    request.headers = type(headers)([(raw, value) for raw, _, value in kept + sent])


def keep_back(config: ClientConfig, request: Any, context: Context, allowed: tuple[bool, bool, bool]) -> None:
    """
    Take off a request what is ours and may not leave for its host.
    """
    if False not in allowed:
        return
    held = _entries(request.headers)
    left = kept_back(_injector(config).names, context, held, allowed)
    if left is not None:
        guard.count("outbound.copies_kept_back")
        _write(request, held, left, [])


def ask_again(attempt: Attempt, request: Any) -> None:
    """
    Hold to the outbound policy what a transport of httpx's own is about to send; never raises.

    A transport of the user's above it may have changed the host or the headers, or made a request of its own.
    """
    try:
        outbound = attempt.config.outbound
        if outbound is not None and (request.url is not attempt.url or _entries(request.headers) != attempt.checked):
            keep_back(attempt.config, request, attempt.context, outbound(request.url))
    except Exception:  # noqa: BLE001 - the boundary
        guard.report("client.policy")


def forget_sends(request: Any) -> None:
    """
    Begin a new call with this request: what we put on it is remembered, how often it was sent is not.
    """
    state: dict[str, Any] | None = getattr(request, "__dict__", None)
    if state is not None and (memory := state.get(_SENT)) is not None:
        state[_SENT] = (0, *memory[1:])


def remember(request: Any, new: Any) -> None:
    """
    Pass on what we put on a request to the one that was made of it (httpx copies headers to the next hop).
    """
    memory = getattr(request, "__dict__", {}).get(_SENT)
    if memory is not None:
        new.__dict__[_SENT] = memory


def _common_attributes(request: Any) -> dict[str, Any]:
    url = request.url
    method = request.method
    values: dict[str, Any] = {
        http_attributes.HTTP_REQUEST_METHOD: method if method in _METHODS else "_OTHER",
        server_attributes.SERVER_ADDRESS: url.host,
    }
    port = url.port or _PORTS.get(url.scheme)
    if port is not None:
        values[server_attributes.SERVER_PORT] = port
    return values


def _request_attributes(config: ClientConfig, request: Any, sends: int) -> dict[str, Any]:
    values = _common_attributes(request)
    if values[http_attributes.HTTP_REQUEST_METHOD] == "_OTHER":
        values[http_attributes.HTTP_REQUEST_METHOD_ORIGINAL] = request.method
    values[url_attributes.URL_FULL] = redact_url(str(request.url), config.settings.query_values)
    if sends:
        values[http_attributes.HTTP_REQUEST_RESEND_COUNT] = sends
    return values
