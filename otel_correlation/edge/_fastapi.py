"""
The plug: contrib's FastAPI instrumentation as users know it, driving our edge under FastAPI and plain Starlette.

A FastAPI application meets the edge in ``FastAPI.__call__``, any other Starlette application at the outside of its
middleware stack: a wrapper around ``Starlette.__call__`` would cost every request of a FastAPI application, too.

Contrib's classes keep their names and their objects; their methods are replaced while we are active, so it does not
matter which class was touched first, imported by alias or instrumented before.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

import fastapi
import fastapi.routing
import starlette._exception_handler
import starlette.routing
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor, _InstrumentedFastAPI
from starlette.background import BackgroundTask

from otel_correlation import guard, identity, logs, semconv
from otel_correlation.edge._asgi import Edge, serve, set_default
from otel_correlation.edge._config import STARLETTE, config_for
from otel_correlation.edge._http import serve_http
from otel_correlation.edge._inner import serve_inner
from otel_correlation.edge._peer import forget_socket_peers

if TYPE_CHECKING:
    from collections.abc import Callable

    from otel_correlation.edge._record import ASGIApp, Receive, Record, Scope, Send, ServerConfig
    from otel_correlation.settings import Settings

# See clients/_seams.py: a test's report shows the user's frames.
__tracebackhide__ = True

# What an application knows of its own instrumentation: a ServerConfig, or None where it was switched off.
_APP_CONFIG: Final = "_otel_correlation_config"
_UNSET: Final[Any] = object()


class _Plug:
    """
    What is patched, and how it was before.
    """

    def __init__(self) -> None:
        self.settings: Callable[[], Settings] | None = None
        self.textmap: Any = None
        self.everywhere: ServerConfig | None = None
        self.apps: WeakSet[fastapi.FastAPI] = WeakSet()
        self.originals: list[tuple[Any, str, Any, Any]] = []
        self.serving: Callable[[], None] | None = None

    def patch(self, owner: Any, name: str, replacement: Any) -> None:
        self.originals.append((owner, name, owner.__dict__.get(name, _UNSET), replacement))
        setattr(owner, name, replacement)

    def restore(self) -> None:
        for owner, name, original, replacement in reversed(self.originals):
            if owner.__dict__.get(name) is not replacement:
                continue  # patched by somebody else since: what is theirs stays, and ours below it only forwards
            if original is _UNSET:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        self.originals.clear()


_plug = _Plug()


def _patched_call(original: Any) -> Any:
    @functools.wraps(original)
    async def __call__(self: fastapi.FastAPI, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: N807
        config: ServerConfig | None = self.__dict__.get(_APP_CONFIG, _UNSET)
        if config is _UNSET:
            config = _plug.everywhere
        if semconv.SCOPE_KEY in scope:
            # The edge is outside already. What this application alone was told holds all the same.
            if config is None or not config.options or config is _plug.everywhere or config is _outer(scope):
                await original(self, scope, receive, send)
            else:
                await serve_inner(config, functools.partial(original, self), scope, receive, send)
            return
        if config is None:
            await original(self, scope, receive, send)
            return
        if _plug.serving is not None:
            _begin_to_serve()
        if scope["type"] == "lifespan":
            logs.settle()
            _no_native_exporter(self)
            await original(self, scope, receive, send)
            return
        serve_it = serve_http if scope["type"] == "http" else serve
        await serve_it(config, functools.partial(original, self), scope, receive, send)

    return __call__


def _outer(scope: Scope) -> ServerConfig | None:
    return getattr(scope[semconv.SCOPE_KEY], "config", None)


def _patched_build(original: Any) -> Any:
    @functools.wraps(original)
    def build_middleware_stack(self: Any) -> ASGIApp:
        return _with_edge(self, original(self))

    return build_middleware_stack


def _with_edge(app: Any, stack: ASGIApp) -> ASGIApp:
    return stack if isinstance(stack, Edge) else Edge(stack, functools.partial(_config_of, app))


def _config_of(app: Any) -> ServerConfig | None:
    """
    Return what a plain Starlette application was told, or what all were; it serves now.
    """
    config: ServerConfig | None = app.__dict__.get(_APP_CONFIG, _plug.everywhere)
    if _plug.serving is not None and config is not None:
        _begin_to_serve()
    return config


def _begin_to_serve() -> None:
    callback, _plug.serving = _plug.serving, None
    if callback is not None:
        with guard.never_raise("serving"):
            callback()


def on_serving(callback: Callable[[], None]) -> None:
    """
    Call back once, when the first application starts up or the first request comes.
    """
    _plug.serving = callback


def _no_native_exporter(app: fastapi.FastAPI) -> None:
    """
    Keep ``FASTAPI_OTEL_AUTO_CONFIGURE`` from adding a second exporter to our provider.
    """
    native = getattr(app, "_telemetry", None)
    if isinstance(native, dict) and native.get("auto_configure"):
        native["auto_configure"] = False
        # FastAPI 0.142 exports by itself without being asked; only who asked is told.
        if os.environ.get("FASTAPI_OTEL_AUTO_CONFIGURE"):
            guard.logger.info("FASTAPI_OTEL_AUTO_CONFIGURE is left out: otel-correlation exports already")


def _patched_handle(original: Any, note: Callable[[Record, Any, Scope], None]) -> Any:
    # Not a coroutine function: the original's coroutine is returned as it is, so a request pays one call.
    @functools.wraps(original)
    def handle(self: Any, scope: Scope, receive: Receive, send: Send) -> Any:
        record = scope.get(semconv.SCOPE_KEY)
        if record is not None:
            try:
                note(record, self, scope)
            except Exception:  # noqa: BLE001 - a route of somebody else's, or of a newer version
                guard.report("edge.route")
        return original(self, scope, receive, send)

    return handle


def _note_route(record: Record, route: Any, scope: Scope) -> None:
    record.endpoint = route
    record.matched(scope.get(semconv.SCOPE_MOUNT, "") + (route.path or "/"))


def _note_api_route(record: Record, route: Any, scope: Scope) -> None:
    effective = scope.get("fastapi", {}).get("effective_route_context")
    # An included router's prefix stands in the effective route; any other route is noted by the class below.
    if effective is not None and getattr(effective, "original_route", None) is route:
        _note_route(record, effective, scope)


def _note_mount(record: Record, mount: Any, scope: Scope) -> None:
    scope[semconv.SCOPE_MOUNT] = prefix = scope.get(semconv.SCOPE_MOUNT, "") + mount.path
    if not getattr(mount, "routes", None):
        # An application without routes that we know: static files, WSGI, another framework.
        record.matched(f"{prefix}/{{path}}")


def _instrument_app(app: fastapi.FastAPI, *arguments: Any, **options: Any) -> None:
    """
    Instrument one application; contrib's parameters in contrib's order.
    """
    settings = _plug.settings
    if settings is None:  # deactivated between look-up and call
        return
    if getattr(app, "_is_instrumented_by_opentelemetry", False):
        guard.logger.warning("Attempting to instrument FastAPI app while already instrumented")
        return
    options.update(zip(_PARAMETERS, arguments, strict=False))
    setattr(app, _APP_CONFIG, config_for(settings(), _plug.textmap, **options))
    app._is_instrumented_by_opentelemetry = True  # type: ignore[attr-defined]
    _plug.apps.add(app)


_PARAMETERS: Final = (
    "server_request_hook",
    "client_request_hook",
    "client_response_hook",
    "tracer_provider",
    "meter_provider",
    "excluded_urls",
    "http_capture_headers_server_request",
    "http_capture_headers_server_response",
    "http_capture_headers_sanitize_fields",
    "exclude_spans",
)


def _uninstrument_app(app: fastapi.FastAPI) -> None:
    """
    Switch one application off, also where all are instrumented.
    """
    setattr(app, _APP_CONFIG, None)
    app._is_instrumented_by_opentelemetry = False  # type: ignore[attr-defined]
    _plug.apps.discard(app)


def _instrument(self: Any, **options: Any) -> None:
    del self
    if _plug.settings is not None:
        _plug.everywhere = config_for(_plug.settings(), _plug.textmap, **options)


def _uninstrument(self: Any, **options: Any) -> None:
    del self, options
    _plug.everywhere = None
    for app in list(_plug.apps):
        _uninstrument_app(app)


def _patched_middleware_call(original: Any) -> Any:
    """
    Replace contrib's middleware: inside an edge it forwards, outside of one it is the edge.
    """

    @functools.wraps(original)
    async def __call__(self: OpenTelemetryMiddleware, scope: Any, receive: Any, send: Any) -> None:  # noqa: N807
        app: ASGIApp = self.app
        inner = _told(self)
        if inner is not None:
            app = functools.partial(serve_inner, inner, app)
        if semconv.SCOPE_KEY in scope:
            await app(scope, receive, send)
            return
        config = _config_inside(self.app)
        if config is not None and scope["type"] in ("http", "websocket"):
            await serve(config, app, scope, receive, send)
        else:
            await original(self, scope, receive, send)

    return __call__


_TOLD: Final = "_otel_correlation_told"


def _told(middleware: Any) -> ServerConfig | None:
    """
    Return what contrib's middleware was made with by hand, or None if that is nothing.
    """
    found: ServerConfig | None = middleware.__dict__.get(_TOLD, _UNSET)
    if found is _UNSET:
        found = None
        with guard.never_raise("edge.middleware"):
            options = {
                name: value for name in _PARAMETERS[:3] if (value := getattr(middleware, name, None)) is not None
            }
            excluded = getattr(getattr(middleware, "excluded_urls", None), "_excluded_urls", None)
            if excluded:
                options["excluded_urls"] = ",".join(excluded)
            if options:
                found = config_for(_settings(), _plug.textmap, **options)
        setattr(middleware, _TOLD, found)
    return found


def _config_inside(app: Any) -> ServerConfig | None:
    """
    Return the configuration of the FastAPI application that middleware wraps, or of all of them.
    """
    for _ in range(100):
        if isinstance(app, STARLETTE):
            config: ServerConfig | None = app.__dict__.get(_APP_CONFIG, _plug.everywhere)
            return config
        inner = getattr(app, "app", None)
        if inner is None:
            break
        app = inner
    return _plug.everywhere


def activate(settings: Callable[[], Settings], *, textmap: Any = None) -> None:
    """
    Put our edge under contrib's FastAPI instrumentation; idempotent and reversible.

    Args:
        settings: Called whenever something is instrumented.
        textmap: The propagator that bootstrap made the global one, or None where the application chose its own.
    """
    again = _plug.settings is not None
    _plug.settings = settings
    _plug.textmap = textmap
    if again:
        return
    patch = _plug.patch
    contrib_class = getattr(FastAPIInstrumentor(), "_original_fastapi", None)
    patch(fastapi.FastAPI if contrib_class is None else contrib_class, "__call__", _patched_call(_base().__call__))
    build = getattr(STARLETTE, "build_middleware_stack", None)
    if build is None:
        guard.logger.warning("Starlette has no build_middleware_stack; put edge(app) around what is not FastAPI")
    else:
        patch(STARLETTE, "build_middleware_stack", _patched_build(build))
    _note_routes()
    _note_handled()
    patch(FastAPIInstrumentor, "instrument_app", staticmethod(_instrument_app))
    patch(FastAPIInstrumentor, "uninstrument_app", staticmethod(_uninstrument_app))
    patch(FastAPIInstrumentor, "_instrument", _instrument)
    patch(FastAPIInstrumentor, "_uninstrument", _uninstrument)
    patch(OpenTelemetryMiddleware, "__call__", _patched_middleware_call(OpenTelemetryMiddleware.__call__))
    set_default(lambda: _plug.everywhere)
    _take_over()


def _note_routes() -> None:
    """
    Have each kind of route say which one it is; a seam that a newer version renamed costs names, not requests.
    """
    seams: tuple[tuple[Any, str, Callable[[Record, Any, Scope], None]], ...] = (
        (starlette.routing, "Mount", _note_mount),
        (starlette.routing, "Route", _note_route),
        (starlette.routing, "WebSocketRoute", _note_route),
        (fastapi.routing, "APIRoute", _note_api_route),
    )
    gone: list[str] = []
    # What a route inherits where it has no method of its own only says so.
    nothing = getattr(getattr(starlette.routing, "BaseRoute", None), "handle", None)
    for module, name, note in seams:
        kind = getattr(module, name, None)
        original = getattr(kind, "handle", None)
        if original is None or original is nothing:
            gone.append(f"{name}.handle")
        else:
            _plug.patch(kind, "handle", _patched_handle(original, note))
    if not hasattr(fastapi.routing, "iter_route_contexts"):
        gone.append("iter_route_contexts")
    if gone:
        guard.logger.warning("FastAPI has no %s; some spans go without their route", ", ".join(gone))


def _note_handled() -> None:
    """
    See each exception for which Starlette looks for the application's handler; free for requests without one.
    """
    original = getattr(starlette._exception_handler, "_lookup_exception_handler", None)
    if original is None:
        guard.logger.warning("Starlette has no _lookup_exception_handler; a 422 does not say which fields failed")
        return

    @functools.wraps(original)
    def look_up(handlers: Any, error: Exception) -> Any:
        who = identity.current()
        if who is not None:
            # With its traceback: Starlette takes it off once the handler's response was sent.
            who.handled = error, error.__traceback__
        return original(handlers, error)

    _plug.patch(starlette._exception_handler, "_lookup_exception_handler", look_up)


def _base() -> type[fastapi.FastAPI]:
    """
    Return FastAPI's own class, also where contrib put a subclass in its place.
    """
    return next(kind for kind in fastapi.FastAPI.__mro__ if kind.__module__ == "fastapi.applications")


def _take_over() -> None:
    """
    Continue what contrib instrumented before we came.
    """
    instrumentor = FastAPIInstrumentor()
    if fastapi.FastAPI is _InstrumentedFastAPI and instrumentor._original_fastapi is not None:
        _plug.everywhere = config_for(_settings(), _plug.textmap, **_InstrumentedFastAPI._instrument_kwargs)
        fastapi.FastAPI = instrumentor._original_fastapi  # type: ignore[misc]
    for app in list(_InstrumentedFastAPI._instrumented_fastapi_apps):
        setattr(app, _APP_CONFIG, config_for(_settings(), _plug.textmap, **_take_options(app)))
        _plug.apps.add(app)
    original = getattr(BackgroundTask, "_otel_original_call", None)
    if original is not None:
        _plug.patch(BackgroundTask, "__call__", original)


def _take_options(app: fastapi.FastAPI) -> dict[str, Any]:
    """
    Take contrib's middleware out of an application, and return the options that it was made with.
    """
    original = app.__dict__.pop("_original_build_middleware_stack", None)
    if original is None:
        return {}
    # They stand nowhere but in the closure of the method that contrib put in.
    build: Any = getattr(app.build_middleware_stack, "__func__", None)
    names = getattr(getattr(build, "__code__", None), "co_freevars", ())
    cells = getattr(build, "__closure__", None) or ()
    held: dict[str, Any] = {name: cell.cell_contents for name, cell in zip(names, cells, strict=False)}
    options = {name: held[name] for name in _PARAMETERS if held.get(name) is not None}
    excluded = getattr(held.get("parsed_excluded_urls"), "_excluded_urls", None)
    if excluded:
        options["excluded_urls"] = ",".join(excluded)
    app.build_middleware_stack = original  # type: ignore[method-assign]
    if app.middleware_stack is not None:
        app.middleware_stack = app.build_middleware_stack()
    return options


def _settings() -> Settings:
    settings = _plug.settings
    if settings is None:
        message = "the edge is not active"
        raise RuntimeError(message)
    return settings()


def deactivate() -> None:
    """
    Put everything back as it was; applications that were instrumented are not any more.
    """
    if _plug.settings is None:
        return
    _uninstrument(None)
    forget_socket_peers()
    instrumentor = FastAPIInstrumentor()
    instrumentor._is_instrumented_by_opentelemetry = False
    _plug.restore()
    _plug.settings = None
    _plug.textmap = None
    _plug.serving = None
    set_default(lambda: None)


def instrument_everything() -> None:
    """
    Instrument every FastAPI application of the process, once.
    """
    instrumentor = FastAPIInstrumentor()
    if not instrumentor.is_instrumented_by_opentelemetry:
        instrumentor.instrument(skip_dep_check=True)
    elif _plug.everywhere is None:
        _plug.everywhere = config_for(_settings(), _plug.textmap)


def switch_on(app: Any) -> None:
    """
    Instrument an application that was switched off, or that has built its middleware before we came.
    """
    if not isinstance(app, STARLETTE):
        return
    if app.__dict__.get(_APP_CONFIG, _UNSET) is None:
        delattr(app, _APP_CONFIG)
    stack = getattr(app, "middleware_stack", None)
    if stack is not None and not isinstance(app, fastapi.FastAPI):
        app.middleware_stack = _with_edge(app, stack)


def refresh() -> None:
    """
    Read the settings again, for all applications and for those instrumented one by one; hooks and providers stay.
    """
    if _plug.everywhere is not None:
        _plug.everywhere = config_for(_settings(), _plug.textmap, **_plug.everywhere.options)
    for app in list(_plug.apps):
        config: ServerConfig = app.__dict__[_APP_CONFIG]
        setattr(app, _APP_CONFIG, config_for(_settings(), _plug.textmap, **config.options))
