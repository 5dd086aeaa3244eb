"""
An identity where no request brings one: work of the service's own, and messages from somebody else.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterable, Mapping, MutableMapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast, overload

from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import INVALID_SPAN, Link, NonRecordingSpan, SpanKind

from otel_correlation import guard, identity, ids, logs, outcome, propagators, semconv
from otel_correlation.identity import _KEY as _IDENTITY_KEY
from otel_correlation.identity import Identity
from otel_correlation.request_id import from_headers, parse
from otel_correlation.tracer import Tracer
from otel_correlation.upstream.api import SPAN_KEY as _SPAN_KEY

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from opentelemetry.trace import Span, SpanContext

    from otel_correlation.settings import Settings

    # A mapping of names to values, or pairs as Kafka clients have them; a value may be a list of several.
    Carrier = Mapping[str, Any] | Mapping[bytes, Any] | Iterable[tuple[str, Any]] | Iterable[tuple[bytes, Any]]

SCOPE_NAME: Final = "otel_correlation.tasks"
# More headers than any broker's client makes; what stands behind them is not looked at.
_MAX_HEADERS: Final = 256
_PLAIN: Final = (str, bool, int, float)

_tracer: Final = Tracer(SCOPE_NAME)
_settings: Callable[[], Settings] | None = None
# Says the start-up line, once in a process.
_announce: Callable[[], None] | None = None

_Function = TypeVar("_Function", bound="Callable[..., Any]")
_Carrier = TypeVar("_Carrier", bound=MutableMapping[str, str])


def switch(settings: Callable[[], Settings] | None) -> None:
    """
    Say where settings are found; with None nothing here has an effect.
    """
    global _settings  # noqa: PLW0603 - one process, one set-up
    _settings = settings


def serving(announce: Callable[[], None]) -> None:
    """
    Say ``announce`` where a worker of a queue starts.
    """
    global _announce  # noqa: PLW0603 - one process, one set-up
    _announce = announce


def announce() -> None:
    """
    Say that this process begins to serve.
    """
    if _announce is not None:
        _announce()


class _Begun:
    """
    What one block runs in.
    """

    __slots__ = ("context", "given", "span")

    def __init__(self, context: Context, span: Span | None = None, given: ids.given_trace_id | None = None) -> None:
        self.context = context
        self.span = span
        self.given = given


class Scope:
    """
    An identity for a ``with`` block, or for each call of a decorated function; what is raised passes through.
    """

    def __init__(self, begin: Callable[[Settings], _Begun]) -> None:
        self._begin = begin
        self._entered: list[tuple[_Begun, Any] | None] = []

    def __enter__(self) -> Span:
        """
        Make the identity current; returns its span (one that does nothing where none is made).
        """
        begun: _Begun | None = None
        if _settings is not None:
            try:
                logs.settle()
                begun = self._begin(_settings())
                if begun.given is not None:
                    begun.given.__enter__()
            except Exception:  # noqa: BLE001 - our failure is not the application's
                guard.report("tasks.begin")
                begun = None
        if begun is None:
            self._entered.append(None)
            return INVALID_SPAN
        self._entered.append((begun, otel_context.attach(begun.context)))
        return begun.span or INVALID_SPAN

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """
        End the span and make current what was before.
        """
        entered = self._left()
        if entered is None:
            return
        begun, token = entered
        try:
            if error is not None:
                identity.stash(error)
            if (who := identity.get_from(begun.context)) is not None:
                who.ended = True
            if begun.span is not None:
                _end(begun.span, error)
            if begun.given is not None:
                with contextlib.suppress(ValueError):  # a generator that was closed in another context
                    begun.given.__exit__()
        except Exception:  # noqa: BLE001 - our failure is not the application's
            guard.report("tasks.end")
        finally:
            identity.detach(token)

    def _left(self) -> tuple[_Begun, Any] | None:
        """
        Return what the block began with that ends here: tasks and threads may share one scope, and end in any order.
        """
        current = otel_context.get_current()
        mine = (entered for entered in reversed(self._entered) if entered and entered[0].context is current)
        found = next(mine, self._entered[-1])
        self._entered.remove(found)
        return found

    async def __aenter__(self) -> Span:
        """
        As ``__enter__``.
        """
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """
        As ``__exit__``.
        """
        self.__exit__(kind, error, traceback)

    def __call__(self, function: _Function) -> _Function:
        """
        Decorate a function, or a coroutine function: each call has an identity of its own.
        """
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            message = "a generator outlives its call: use a with block inside it"
            raise TypeError(message)
        begin = self._begin
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def awaited(*args: Any, **kwargs: Any) -> Any:
                with Scope(begin):
                    return await function(*args, **kwargs)

            return cast("_Function", awaited)

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            with Scope(begin):
                return function(*args, **kwargs)

        return cast("_Function", called)


def _end(span: Span, error: BaseException | None) -> None:
    try:
        outcome.show(span, error, may_leave=True)
    finally:
        span.end()


def work(name: str, *, request_id: str | None = None, attributes: Mapping[str, Any] | None = None) -> Scope:
    """
    Give work that no request asked for an identity: a start-up task, a tick of a timer, a turn of a worker.

    Always a new trace with a request id of its own; the span that was current, if any, is linked. A context manager
    (``with`` and ``async with``) and a decorator of functions and coroutine functions.

    Args:
        name: Name of the span.
        request_id: Use this request id, and the trace that it leads to. One that is not valid is replaced.
        attributes: Attributes of the span.
    """
    return Scope(functools.partial(_begin_work, name, request_id, dict(attributes or {})))


def _begin_work(name: str, request_id: str | None, attributes: dict[str, Any], settings: Settings) -> _Begun:
    received = None
    if request_id is not None:
        received = parse(str(request_id).encode("utf-8", "surrogatepass"))
        if received is None:
            _refused()
    return _root(name, SpanKind.INTERNAL, received, attributes, settings, {}, _link_to_current())


def _refused() -> None:
    guard.count("request_id.refused")
    guard.warn_seldom("refused", "A request id that is not valid was replaced (its value is never logged)")


def _link_to_current() -> list[Link]:
    found = trace.get_current_span().get_span_context()
    return [Link(found)] if found.is_valid else []


def _root(
    name: str,
    kind: SpanKind,
    received: str | None,
    attributes: dict[str, Any],
    settings: Settings,
    values: dict[str, Any],
    links: list[Link],
) -> _Begun:
    """
    Begin a trace by the bridge contract.
    """
    new_trace_id = ids.random_trace_id if settings.sdk_disabled else _tracer.new_trace_id
    final, trace_id, minted, reused = ids.root(received, settings.mint, new_trace_id)
    if reused:
        attributes = {**attributes, semconv.REUSED_REQUEST_ID: True}
    return _spanned(name, kind, final, attributes, settings, values, links, trace_id=trace_id, minted=minted)


def _spanned(
    name: str,
    kind: SpanKind,
    final: str,
    attributes: dict[str, Any],
    settings: Settings,
    values: dict[str, Any],
    links: list[Link],
    *,
    trace_id: int | None = None,
    minted: bool = False,
) -> _Begun:
    values[_IDENTITY_KEY] = who = Identity(final)
    if settings.sdk_disabled:
        return _Begun(Context(values))
    # Light spans take clean values at their start; whatever else there is takes the SDK's way.
    plain = {key: value for key, value in attributes.items() if type(value) in _PLAIN and key}
    span = _tracer.start(name, kind, Context(values), plain, trace_id=trace_id, minted=minted, links=links)
    for key, value in attributes.items():
        if key not in plain:
            span.set_attribute(key, value)
    who.span = values[_SPAN_KEY] = span
    return _Begun(Context(values), span)


def producing(name: str, attributes: dict[str, Any], settings: Settings) -> _Begun:
    """
    Begin a PRODUCER span: the child of what is current, or the first of a trace and an identity of its own.
    """
    context = otel_context.get_current()
    if identity.get_from(context) is None:
        caller: Any = context.get(_SPAN_KEY)
        if caller is None or not caller.get_span_context().is_valid:
            return _root(name, SpanKind.PRODUCER, None, attributes, settings, {}, [])
        # A span of the application's own, outside of any request: the request id is the trace id.
        context = identity.set_in(context, Identity(f"{caller.get_span_context().trace_id:032x}", caller))
    if settings.sdk_disabled:
        return _Begun(context)
    span = _tracer.start(name, SpanKind.PRODUCER, context, attributes)
    return _Begun(Context({**context, _SPAN_KEY: span}), span)


@overload
def inject(carrier: None = None) -> dict[str, str]: ...
@overload
def inject(carrier: _Carrier) -> _Carrier: ...
def inject(carrier: MutableMapping[str, str] | None = None) -> MutableMapping[str, str]:
    """
    Write the current identity into a message's headers.

    They are ``traceparent``, ``tracestate``, ``baggage`` and the request id, by ``OTEL_PROPAGATORS``. Those of an
    earlier identity are replaced, all others are left alone. Outside of a request nothing is written.

    Args:
        carrier: What to write to; a new dict if None.

    Returns:
        The carrier.
    """
    target: MutableMapping[str, str] = {} if carrier is None else carrier
    if _settings is None:
        return target
    try:
        settings = _settings()
        if settings.sdk_disabled and "xrequestid" not in settings.propagators:
            return target
        # The propagators leave a request id alone that a carrier has, so they never see this one.
        found: dict[str, str] = {}
        ours = propagators.RequestIdPropagator(settings)
        textmap: Any = ours if settings.sdk_disabled else propagate.get_global_textmap()
        textmap.inject(found)
        if found:
            names = {name.lower() for name in textmap.fields} | {name.lower() for name in found}
            for key in [key for key in target if key.lower() in names]:
                del target[key]
            target.update(found)
    except Exception:  # noqa: BLE001 - our failure is not the application's
        guard.report("tasks.inject")
    return target


def continue_from(
    carrier: Carrier | None,
    name: str | None = None,
    *,
    link: bool | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> Scope:
    """
    Continue the identity that a message carries; never raises, whatever it carries.

    A message without headers that can be used starts fresh, as a request would. A context manager (``with`` and
    ``async with``) and a decorator of functions and coroutine functions.

    Args:
        carrier: A mapping of header names to values, or an iterable of pairs; text or bytes. None says that there is
            no message, so no warning says that its headers are missing.
        name: Name of a CONSUMER span, the producer's child. Without it no span is made and the producer's is current:
            for where an instrumentation makes one.
        link: True: the span is in a trace of its own, linked to the producer's; the request id goes on. None:
            ``OTEL_CORRELATION_MESSAGES``. Needs a name.
        attributes: Attributes of the span.
    """
    return Scope(functools.partial(_continue, carrier, name, link, dict(attributes or {})))


class _Getter(Getter[Any]):
    """
    Reads headers that ``_headers`` made.
    """

    def get(self, carrier: dict[str, list[bytes]], key: str) -> list[str] | None:
        values = carrier.get(key.lower())
        return [value.decode("latin-1") for value in values] if values else None

    def keys(self, carrier: dict[str, list[bytes]]) -> list[str]:
        return list(carrier)


_getter: Final = _Getter()


def _headers(carrier: object) -> tuple[dict[str, list[bytes]], bool]:
    """
    Return the headers by lower-case name, and whether everything in the carrier could be one.
    """
    found: dict[str, list[bytes]] = {}
    pairs = carrier.items() if isinstance(carrier, Mapping) else cast("Iterable[Any]", carrier)
    clean = True
    for count, pair in enumerate(islice(pairs, _MAX_HEADERS + 1)):
        if count == _MAX_HEADERS:
            clean = False
            break
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            clean = False
            continue
        name, value = pair
        if isinstance(name, bytes):
            name = name.decode("latin-1")
        if isinstance(name, str):
            values = value if isinstance(value, list | tuple) else (value,)
            found.setdefault(name.lower(), []).extend([_bytes(part) for part in values])
    return found, clean


def _bytes(value: object) -> bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    # What is no text is no header of ours: two bytes that no grammar takes.
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else b"\xff\xff"


def _continue(
    carrier: object,
    name: str | None,
    link: bool | None,  # noqa: FBT001 - private, as the caller has it
    attributes: dict[str, Any],
    settings: Settings,
) -> _Begun:
    headers: dict[str, list[bytes]] = {}
    clean = True
    if carrier is not None:
        try:
            headers, clean = _headers(carrier)
        except Exception:  # noqa: BLE001 - somebody else's mapping
            clean = False
    wanted = settings.request_id_headers
    pairs = [(key, value) for key in wanted for value in headers.get(key.decode("ascii"), ())]
    received, refused = from_headers(pairs, wanted)
    if refused:
        _refused()
    values: dict[str, Any] = {}
    parent: SpanContext | None = None
    if headers and not settings.sdk_disabled:
        context = _extract(headers)
        values = {key: value for key, value in context.items() if key != _IDENTITY_KEY}
        caller = trace.get_current_span(context).get_span_context()
        parent = caller if caller.is_valid else None
        if parent is None and semconv.TRACEPARENT in headers and "tracecontext" in settings.propagators:
            clean = False
    has_ids = received is not None or refused or semconv.TRACEPARENT in headers or parent is not None
    if clean and carrier is not None and not has_ids:
        guard.count("message.without_ids")
        guard.warn_seldom("bare message", "A message came without trace headers; it starts a trace of its own")
    if not clean:
        guard.count("message.malformed")
        guard.warn_seldom("message", "A message's headers could not be used; it starts a trace of its own")
    if parent is None:
        if name is not None:
            return _root(name, SpanKind.CONSUMER, received, attributes, settings, values, _link_to_current())
        return _unspanned_root(received, settings, values)
    final = received or f"{parent.trace_id:032x}"
    if name is None:
        values[_IDENTITY_KEY] = Identity(final)
        values.setdefault(_SPAN_KEY, NonRecordingSpan(parent))
        return _Begun(Context(values))
    links = [found for found in _link_to_current() if found.context.trace_id != parent.trace_id]
    if settings.messages == "link" if link is None else link:
        values.pop(_SPAN_KEY, None)
        return _spanned(
            name,
            SpanKind.CONSUMER,
            final,
            attributes,
            settings,
            values,
            [Link(parent), *links],
            trace_id=_tracer.new_trace_id(),
            minted=True,
        )
    return _spanned(name, SpanKind.CONSUMER, final, attributes, settings, values, links)


def _extract(headers: dict[str, list[bytes]]) -> Context:
    try:
        return propagate.get_global_textmap().extract(headers, Context(), _getter)
    except Exception:  # noqa: BLE001 - a propagator of somebody else's; the message keeps its id
        guard.report("tasks.extract")
        return Context()


def _unspanned_root(received: str | None, settings: Settings, values: dict[str, Any]) -> _Begun:
    """
    Begin a trace whose first span somebody else makes: it gets the trace id that belongs to the request id.
    """
    new_trace_id = ids.random_trace_id if settings.sdk_disabled else _tracer.new_trace_id
    final, trace_id, minted, _ = ids.root(received, settings.mint, new_trace_id)
    values[_IDENTITY_KEY] = Identity(final)
    given = None if settings.sdk_disabled else ids.given_trace_id(trace_id, random=minted)
    return _Begun(Context(values), given=given)


__all__ = ["Scope", "continue_from", "inject", "switch", "work"]


def sent(name: str, attributes: dict[str, Any], settings: Settings) -> dict[str, str]:
    """
    Make the PRODUCER span of one message, and return the headers that name it.
    """
    begun = producing(name, attributes, settings)
    token = otel_context.attach(begun.context)
    try:
        return inject()
    finally:
        identity.detach(token)
        if begun.span is not None:
            begun.span.end()
