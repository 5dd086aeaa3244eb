"""
The plug: contrib's httpx instrumentation as users know it, driving our attempts.

Contrib's classes keep their names and their objects; their methods are replaced while we are active, so it does not
matter which class was touched first, imported by alias or instrumented before.
"""

from __future__ import annotations

import functools
import re
import sys
from importlib import import_module
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.metrics import get_meter_provider
from opentelemetry.semconv.metrics import http_metrics
from wrapt import register_post_import_hook

from otel_correlation import guard
from otel_correlation._version import __version__
from otel_correlation.clients._attempt import ClientConfig, end_dropped
from otel_correlation.clients._copies import forget_sent
from otel_correlation.clients._seams import (
    CONFIG,
    OFF,
    Library,
    await_hook,
    call_around,
    call_hook,
    is_running,
    running,
    send,
    send_async,
)
from otel_correlation.guard import ConfigError
from otel_correlation.policy import HeaderCapture, outbound_for
from otel_correlation.tracer import Tracer
from otel_correlation.upstream.api import measures

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable
    from types import ModuleType

    from opentelemetry.trace import Span

    from otel_correlation.settings import Settings

SCOPE_NAME: Final = "otel_correlation.client"
# Advisory boundaries of the semantic conventions (http-metrics.md).
BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
# What contrib's flag on a client is called.
_FLAG: Final = "_is_instrumented_by_opentelemetry"
_LIBRARIES: Final = ("httpx", "httpx2")
_CONTRIB: Final = "opentelemetry.instrumentation.httpx"
_HOOKS: Final = ("request_hook", "response_hook", "async_request_hook", "async_response_hook")


class _Plug:
    """
    What is replaced in contrib's module, and how it was before.
    """

    def __init__(self) -> None:
        self.contrib: Any = None
        self.settings: Callable[[], Settings] | None = None
        self.libraries: dict[int, Library] = {}
        # Which libraries are to be instrumented once one of them is imported.
        self.wanted: set[str] = set()
        self._originals: list[tuple[Any, str, Any]] = []

    def replace(self, owner: Any, name: str, replacement: Any) -> None:
        self._originals.append((owner, name, owner.__dict__[name]))
        setattr(owner, name, replacement)

    def restore(self) -> None:
        for owner, name, original in reversed(self._originals):
            setattr(owner, name, original)
        self._originals.clear()

    def library(self, module: ModuleType) -> Library:
        # By the module object: httpx2 can be made to answer to the name httpx, too.
        return self.libraries.setdefault(id(module), Library(module))

    def library_of(self, client: Any) -> Library | None:
        for library in self.libraries.values():
            if isinstance(client, library.module.Client | library.module.AsyncClient):
                return library
        return None


_plug = _Plug()
_hooked = False


def activate(settings: Callable[[], Settings]) -> None:
    """
    Put our attempts under contrib's httpx instrumentation; idempotent, reversible, nothing without httpx and httpx2.

    That instrumentation imports both libraries, so it waits until somebody else imports one of them.

    Args:
        settings: Called whenever something is instrumented.
    """
    again = _plug.settings is not None
    _plug.settings = settings
    if again:
        return
    global _hooked  # noqa: PLW0603 - the hooks stay for the life of the process
    if not _hooked:
        _hooked = True
        for name in _LIBRARIES:
            register_post_import_hook(_on_library, name)
        register_post_import_hook(_on_contrib, _CONTRIB)
    elif (contrib := sys.modules.get(_CONTRIB)) is not None:
        _on_contrib(contrib)
    elif any(name in sys.modules for name in _LIBRARIES):
        import_module(_CONTRIB)


def _on_library(_module: ModuleType) -> None:
    # Contrib may be what imports the library; then it is not complete yet, and its own hook follows.
    if _plug.settings is not None and _CONTRIB not in sys.modules:
        with guard.never_raise("client.plug"):
            import_module(_CONTRIB)


def _on_contrib(contrib: ModuleType) -> None:
    if _plug.settings is not None and _plug.contrib is None:
        with guard.never_raise("client.plug"):
            _plug_in(contrib)
            _instrument_wanted()


def _plug_in(contrib: Any) -> None:
    _plug.contrib = contrib
    for name in ("_httpx_module", "_httpx2_module"):
        module = getattr(contrib, name, None)
        if module is not None:
            _plug.library(module)
    base = contrib._BaseHTTPXClientInstrumentor
    stock_uninstrument = base._uninstrument
    _plug.replace(base, "_instrument", _instrument)
    _plug.replace(base, "_uninstrument", _uninstrument)
    _plug.replace(base, "instrument_client", classmethod(_instrument_client))
    _plug.replace(base, "uninstrument_client", staticmethod(_uninstrument_client(base.uninstrument_client)))
    # What contrib wrapped before we came, and what a user wraps by hand, asks this first: inside of one of our
    # attempts it only forwards.
    stock_enabled: Callable[[], bool] = contrib.__dict__["is_http_instrumentation_enabled"]
    _plug.replace(contrib, "is_http_instrumentation_enabled", lambda: not is_running() and stock_enabled())
    sync_base, async_base = contrib._SyncOpenTelemetryTransportBase, contrib._AsyncOpenTelemetryTransportBase
    _plug.replace(sync_base, "__init__", _transport_init(sync_base.__init__))
    _plug.replace(async_base, "__init__", _transport_init(async_base.__init__))
    _plug.replace(sync_base, "handle_request", _transport_request(sync_base.handle_request))
    _plug.replace(async_base, "handle_async_request", _transport_async_request(async_base.handle_async_request))
    _take_over(stock_uninstrument)


def _instrumentors() -> list[Any]:
    found = (getattr(_plug.contrib, name, None) for name in ("HTTPXClientInstrumentor", "HTTPX2ClientInstrumentor"))
    return [kind() for kind in found if kind is not None and kind._module is not None]


def _take_over(stock_uninstrument: Callable[[Any], None]) -> None:
    """
    Continue what contrib instrumented before we came, with its hooks.
    """
    for instrumentor in _instrumentors():
        if instrumentor.is_instrumented_by_opentelemetry:
            module = instrumentor._module
            options = {
                **_hooks_of(module.AsyncHTTPTransport.__dict__.get("handle_async_request")),
                **_hooks_of(module.HTTPTransport.__dict__.get("handle_request")),
            }
            with guard.never_raise("client.take_over"):
                stock_uninstrument(instrumentor)
            instrumentor._instrument(**options)


def _hooks_of(wrapper: Any) -> dict[str, Any]:
    keywords: dict[str, Any] = getattr(getattr(wrapper, "_self_wrapper", None), "keywords", {})
    return {name: keywords[name] for name in _HOOKS if keywords.get(name) is not None}


def deactivate() -> None:
    """
    Put everything back as it was; clients that were instrumented are not any more.
    """
    if _plug.settings is None:
        return
    for library in _plug.libraries.values():
        for client in list(library.clients):
            client.__dict__.pop(CONFIG, None)
            setattr(client, _FLAG, False)
        library.clients.clear()
        library.everywhere = None
        library.settle()
    for instrumentor in _instrumentors():
        instrumentor._is_instrumented_by_opentelemetry = False
    _plug.restore()
    _plug.libraries.clear()
    _plug.wanted.clear()
    _plug.contrib = None
    _plug.settings = None
    end_dropped()
    forget_sent()


def instrument_everything(left_out: Collection[str] = ()) -> None:
    """
    Instrument every client of the process, of each library that is installed and not in ``left_out``, once.
    """
    instrument(name for name in _LIBRARIES if name not in left_out)


def instrument(names: Iterable[str]) -> None:
    """
    Instrument every client of the process of these libraries, once: now, or when somebody imports the library.
    """
    _plug.wanted.update(names)
    _instrument_wanted()


def _instrument_wanted() -> None:
    for instrumentor in _instrumentors():
        if instrumentor._module_name in _plug.wanted and not instrumentor.is_instrumented_by_opentelemetry:
            instrumentor.instrument(skip_dep_check=True)
    if _plug.contrib is not None:
        _plug.wanted.clear()  # who uninstruments later means it


def refresh() -> None:
    """
    Build every configuration again, after the settings have changed.
    """
    for library in _plug.libraries.values():
        if library.everywhere is not None:
            library.everywhere = _config(**library.everywhere.options)
        for client in list(library.clients):
            setattr(client, CONFIG, _config(**client.__dict__[CONFIG].options))


def _config(**options: Any) -> ClientConfig:
    """
    Build a configuration from contrib's keyword arguments; what is not given comes from the settings.

    Raises:
        ConfigError: A hook that cannot be called, or something that is no provider.
    """
    hooks = [options.get(name) for name in _HOOKS]
    for name, hook in zip(_HOOKS, hooks, strict=True):
        if hook is not None and not callable(hook):
            raise ConfigError(f"{name}={hook!r}: pass a function, or None")
    tracer_provider, meter_provider = options.get("tracer_provider"), options.get("meter_provider")
    if tracer_provider is not None and not hasattr(tracer_provider, "get_tracer"):
        raise ConfigError(f"tracer_provider={tracer_provider!r}: pass a TracerProvider, or None")
    if meter_provider is not None and not hasattr(meter_provider, "get_meter"):
        raise ConfigError(f"meter_provider={meter_provider!r}: pass a MeterProvider, or None")
    if _plug.settings is None:
        raise ConfigError("otel-correlation was deactivated: activate it again first")
    settings = _plug.settings()
    excluded = options.get("excluded_urls")
    sanitize = settings.sanitize_fields
    requests, responses = settings.capture_client_request, settings.capture_client_response
    return ClientConfig(
        settings,
        tracer=None if settings.sdk_disabled else Tracer(SCOPE_NAME, tracer_provider),
        excluded=_excluded(settings.excluded_client if excluded is None else excluded),
        request_headers=HeaderCapture(requests, sanitize, "http.request.header.") if requests else None,
        response_headers=HeaderCapture(responses, sanitize, "http.response.header.") if responses else None,
        duration=None if settings.sdk_disabled else _duration(meter_provider or get_meter_provider()),
        on_request=_request_hook(hooks[0], is_async=False),
        on_response=_response_hook(hooks[1], is_async=False),
        on_async_request=_request_hook(hooks[2], is_async=True),
        on_async_response=_response_hook(hooks[3], is_async=True),
        outbound=outbound_for(
            settings.edge, settings.outbound_traceparent, settings.outbound_baggage, settings.outbound_request_id
        ),
        options=options,
    )


def _excluded(text: str) -> re.Pattern[str] | None:
    """
    Return contrib's meaning of a comma list: each pattern is searched in the whole URL.
    """
    good: list[str] = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        try:
            re.compile(entry)
        except re.error as error:
            guard.logger.warning("excluded client URLs: %r is not a regular expression (%s); left out", entry, error)
            continue
        good.append(f"(?:{entry})")
    return re.compile("|".join(good)) if good else None


def _duration(provider: Any) -> Any:
    if not measures(provider):
        return None
    return provider.get_meter(SCOPE_NAME, __version__).create_histogram(
        http_metrics.HTTP_CLIENT_REQUEST_DURATION,
        unit="s",
        description="Duration of HTTP client requests.",
        explicit_bucket_boundaries_advisory=BUCKETS,
    )


def _request_info(request: Any) -> Any:
    return _plug.contrib.RequestInfo(
        request.method.encode(), request.url, request.headers, request.stream, request.extensions
    )


def _response_info(response: Any) -> Any:
    return _plug.contrib.ResponseInfo(response.status_code, response.headers, response.stream, response.extensions)


def _request_hook(hook: Any, *, is_async: bool) -> Any:
    """
    Return a hook that gets contrib's arguments, or None where contrib would not call it.
    """
    if hook is None or iscoroutinefunction(hook) is not is_async:
        return None

    def call(span: Span, request: Any) -> Any:
        return hook(span, _request_info(request))

    return call


def _response_hook(hook: Any, *, is_async: bool) -> Any:
    if hook is None or iscoroutinefunction(hook) is not is_async:
        return None

    def call(span: Span, request: Any, response: Any) -> Any:
        return hook(span, _request_info(request), _response_info(response))

    return call


def _instrument(self: Any, **options: Any) -> None:
    module = self._module
    if module is None:
        message = f"{self._module_name} must be installed"
        raise ModuleNotFoundError(message)
    library = _plug.library(module)
    library.everywhere = _config(**options)
    library.settle()


def _uninstrument(self: Any, **options: Any) -> None:
    del options
    module = self._module
    if module is None:
        message = f"{self._module_name} must be installed"
        raise ModuleNotFoundError(message)
    library = _plug.library(module)
    library.everywhere = None
    library.settle()


def _instrument_client(
    kind: Any,
    /,
    client: Any,
    tracer_provider: Any = None,
    meter_provider: Any = None,
    request_hook: Any = None,
    response_hook: Any = None,
    **options: Any,
) -> None:
    """
    Instrument one client; contrib's parameters in contrib's order.
    """
    if kind._module is None:
        message = f"{kind._module_name} must be installed"
        raise ModuleNotFoundError(message)
    library = _plug.library_of(client)
    if library is None:
        raise ConfigError(f"client={client!r}: pass a Client or an AsyncClient")
    if getattr(client, _FLAG, False) and client.__dict__.get(CONFIG) is not None:
        guard.logger.warning("Attempting to instrument Httpx client while already instrumented")
        return
    options.setdefault("async_request_hook", request_hook)
    options.setdefault("async_response_hook", response_hook)
    config = _config(
        tracer_provider=tracer_provider,
        meter_provider=meter_provider,
        request_hook=request_hook,
        response_hook=response_hook,
        **options,
    )
    setattr(client, CONFIG, config)
    setattr(client, _FLAG, True)
    library.clients.add(client)
    library.settle()


def _uninstrument_client(stock: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(stock)
    def uninstrument_client(client: Any) -> None:
        library = _plug.library_of(client)
        if library is None:
            raise ConfigError(f"client={client!r}: pass a Client or an AsyncClient")
        # Contrib's own wrappers, if it came before us; nothing otherwise.
        stock(client)
        setattr(client, CONFIG, OFF)
        setattr(client, _FLAG, False)
        library.clients.discard(client)
        library.settle()

    return uninstrument_client


def _transport_init(original: Any) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, transport: Any, *arguments: Any, **options: Any) -> None:  # noqa: N807
        original(self, transport, *arguments, **options)
        given = dict(zip(("tracer_provider", "meter_provider", *_HOOKS[:2]), arguments, strict=False)) | options
        given["async_request_hook"] = given.get("request_hook")
        given["async_response_hook"] = given.get("response_hook")
        setattr(self, CONFIG, _config(**given))

    return __init__


def _transport_config(transport: Any) -> ClientConfig:
    """
    Return what a hand-made contrib transport was told, also if it was made before we came.
    """
    found: ClientConfig | None = transport.__dict__.get(CONFIG)
    if found is None:
        hooks = {"request_hook": transport._request_hook, "response_hook": transport._response_hook}
        found = _config(**hooks, **{f"async_{name}": hook for name, hook in hooks.items()})
        setattr(transport, CONFIG, found)
    return found


def _transport_request(original: Any) -> Any:
    @functools.wraps(original)
    def handle_request(self: Any, request: Any) -> Any:
        if is_running():
            if (around := call_around()) is not None:
                # Below a transport of the user's that has sent nothing yet: the attempt begins here.
                send_it = functools.partial(handle_request, self)
                return send(around.config, send_it, request, _plug.library(self._module).body, None, around)
            # One span: contrib's code forwards now, and the transport's own hooks get the span there is.
            attempt, config = running(), _transport_config(self)
            if attempt is not None:
                call_hook(config.on_request, attempt.span, request)
            response = original(self, request)
            if attempt is not None:
                call_hook(config.on_response, attempt.span, request, response)
            return response
        library = _plug.library(self._module)
        return send(_transport_config(self), self._transport.handle_request, request, library.body, None)

    return handle_request


def _transport_async_request(original: Any) -> Any:
    @functools.wraps(original)
    async def handle_async_request(self: Any, request: Any) -> Any:
        if is_running():
            if (around := call_around()) is not None:
                send_it = functools.partial(handle_async_request, self)
                body = _plug.library(self._module).async_body
                return await send_async(around.config, send_it, request, body, None, around)
            attempt, config = running(), _transport_config(self)
            if attempt is not None:
                await await_hook(config.on_async_request, attempt.span, request)
            response = await original(self, request)
            if attempt is not None:
                await await_hook(config.on_async_response, attempt.span, request, response)
            return response
        library = _plug.library(self._module)
        call = self._transport.handle_async_request
        return await send_async(_transport_config(self), call, request, library.async_body, None)

    return handle_async_request
