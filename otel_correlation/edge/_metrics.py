"""
Server metrics with their stable names, made only where a meter provider exists.
"""

from __future__ import annotations

from asyncio import _get_running_loop
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.semconv.attributes import (
    error_attributes,
    http_attributes,
    network_attributes,
    url_attributes,
)
from opentelemetry.trace.propagation import set_span_in_context

from otel_correlation._version import __version__
from otel_correlation.edge import _threads
from otel_correlation.edge._record import error_type
from otel_correlation.policy import DEFAULT

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import MutableMapping

    from opentelemetry.metrics import MeterProvider

    from otel_correlation.edge._record import Record

# Advisory boundaries of the semantic conventions (http-metrics.md).
BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)


class ServerMetrics:
    """
    ``http.server.request.duration`` and ``http.server.active_requests``.
    """

    def __init__(self, provider: MeterProvider) -> None:
        self._loop: AbstractEventLoop | None = None
        meter = provider.get_meter("otel_correlation.server", __version__)
        self._duration = meter.create_histogram(
            "http.server.request.duration",
            unit="s",
            description="Duration of HTTP server requests.",
            explicit_bucket_boundaries_advisory=BUCKETS,
        )
        self._active = meter.create_up_down_counter(
            "http.server.active_requests",
            unit="{request}",
            description="Number of active HTTP server requests.",
        )

    def started(self, record: Record, scope: MutableMapping[str, Any]) -> None:
        """
        Count a request that begins.
        """
        self._active.add(1, _common(record, scope))
        loop = _get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            if loop is not None:  # trio has none
                _threads.watch(loop)

    def finished(self, record: Record, scope: MutableMapping[str, Any], duration_s: float) -> None:
        """
        Count a request that is over, with its duration in seconds.
        """
        common = _common(record, scope)
        self._active.add(-1, common)
        values: dict[str, Any] = {
            **common,
            network_attributes.NETWORK_PROTOCOL_VERSION: DEFAULT.cut(scope.get("http_version", "1.1"), DEFAULT.scheme),
        }
        if route := record.route:
            values[http_attributes.HTTP_ROUTE] = route
        if record.status and not record.gone:
            values[http_attributes.HTTP_RESPONSE_STATUS_CODE] = record.status
        if failed := error_type(record):
            values[error_attributes.ERROR_TYPE] = failed
        # The span that has just ended, so that exemplars point to it.
        context = None if record.span is None else set_span_in_context(record.span)
        self._duration.record(duration_s, values, context=context)


def _common(record: Record, scope: MutableMapping[str, Any]) -> dict[str, Any]:
    return {
        http_attributes.HTTP_REQUEST_METHOD: "_OTHER" if record.name == "HTTP" else record.name,
        url_attributes.URL_SCHEME: DEFAULT.cut(scope.get("scheme", "http"), DEFAULT.scheme),
    }
