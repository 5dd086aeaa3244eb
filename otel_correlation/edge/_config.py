"""
An edge's configuration, made of contrib's keyword arguments and the settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import fastapi
import fastapi.routing
import starlette.routing
from opentelemetry import metrics as metrics_api
from starlette.routing import Match

from otel_correlation import semconv
from otel_correlation.edge._metrics import ServerMetrics
from otel_correlation.edge._peer import keep_socket_peers
from otel_correlation.edge._record import ServerConfig
from otel_correlation.policy import HeaderCapture, Patterns, trust_for
from otel_correlation.tracer import Tracer
from otel_correlation.upstream.api import measures

if TYPE_CHECKING:
    from otel_correlation.edge._record import Scope
    from otel_correlation.settings import Settings

SCOPE_NAME: Final = "otel_correlation.server"
# Starlette's own class, also where contrib put a subclass in its place.
STARLETTE: Final[Any] = next(kind for kind in fastapi.FastAPI.__mro__ if kind.__module__ == "starlette.applications")


def config_for(settings: Settings, textmap: Any, **options: Any) -> ServerConfig:
    """
    Build an edge's configuration from contrib's keyword arguments; what is not given comes from the settings.

    Args:
        settings: The settings.
        textmap: The propagator that bootstrap made the global one, or None.
        **options: The keyword arguments of ``FastAPIInstrumentor.instrument_app``.
    """
    excluded = options.get("excluded_urls")
    sanitize = options.get("http_capture_headers_sanitize_fields") or settings.sanitize_fields
    requests = options.get("http_capture_headers_server_request") or settings.capture_server_request
    responses = options.get("http_capture_headers_server_response") or settings.capture_server_response
    left_out = options.get("exclude_spans")
    on_receive = options.get("client_request_hook")
    on_send = options.get("client_response_hook")
    meter_provider = options.get("meter_provider") or metrics_api.get_meter_provider()
    has_meter = measures(meter_provider)
    trust = trust_for(settings.edge, settings.trusted_networks, settings.trusted_proxies, settings.force_sample_header)
    if trust is not None:
        keep_socket_peers()
    ours = ("tracecontext", "baggage", "xrequestid")
    return ServerConfig(
        settings=settings,
        tracer=None if settings.sdk_disabled else Tracer(SCOPE_NAME, options.get("tracer_provider")),
        excluded=(
            Patterns(settings.excluded_server, "OTEL_PYTHON_FASTAPI_EXCLUDED_URLS or OTEL_PYTHON_EXCLUDED_URLS")
            if excluded is None
            else Patterns(excluded, "excluded_urls")
        ),
        textmap=textmap if all(name in ours for name in settings.propagators) else None,
        request_headers=HeaderCapture(requests, sanitize, "http.request.header.") if requests else None,
        response_headers=HeaderCapture(responses, sanitize, "http.response.header.") if responses else None,
        metrics=ServerMetrics(meter_provider) if has_meter and not settings.sdk_disabled else None,
        server_request_hook=options.get("server_request_hook"),
        client_request_hook=on_receive,
        client_response_hook=on_send,
        # Unset means none, unless a hook asks for the span that it is called with; [] means contrib's.
        receive_spans=on_receive is not None if left_out is None else "receive" not in left_out,
        send_spans=on_send is not None if left_out is None else "send" not in left_out,
        trust=trust,
        look_up=_look_up,
        options=options,
    )


def _look_up(scope: Scope) -> str | None:
    """
    Find the route of a request that no route told of: one that answered by itself, or that middleware answered.
    """
    if "router" in scope:
        return _answered_itself(scope)
    app: Any = scope.get("app")
    if not isinstance(app, STARLETTE):
        template = scope.get("path_template")  # Litestar's
        return template if isinstance(template, str) and template else None
    partial = None
    # FastAPI documents it nowhere; without it such a request has no route.
    contexts = getattr(fastapi.routing, "iter_route_contexts", None)
    if contexts is None:
        return None
    for route in contexts(app.routes):
        match, _ = route.matches(scope)
        if match is Match.FULL:
            return None if isinstance(route.original_route, starlette.routing.Mount) else route.path or None
        if match is Match.PARTIAL and partial is None:
            partial = route.path or None  # empty in FastAPI 0.142 for a plain route of an included router
    return partial


def _answered_itself(scope: Scope) -> str | None:
    """
    Return the route that a router chose and whose class has a ``handle`` of its own, or None.
    """
    route = scope.get("route")
    if route is None or isinstance(route, starlette.routing.Mount):
        return None
    effective = scope.get("fastapi", {}).get("effective_route_context")
    if effective is not None and getattr(effective, "original_route", None) is route:
        route = effective  # with the prefix of the router that it was included in
    path = getattr(route, "path", None)
    return None if path is None else scope.get(semconv.SCOPE_MOUNT, "") + (path or "/")
