"""
The store's door: forwards OTLP to the real store and counts, per span id, what the store acknowledged.

Jaeger's badger keeps one copy of a span that arrives twice, so what arrived twice is not to be seen in it. Here it is. The
door refuses nothing and answers what the store answered; it can be made slow, as a store is that has too much to do.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import grpc  # type: ignore[import-untyped]
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.proto.trace.v1.trace_pb2 import Span

SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"
ANSWER_S = 30.0  # What the collector's exporters wait for an answer, too.
CHANNEL = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)


def spans_of(request: ExportTraceServiceRequest) -> list[Span]:
    """
    Return every span of a request.
    """
    return [span for group in request.resource_spans for scope in group.scope_spans for span in scope.spans]


def listen(
    endpoint: str,
    export: Callable[[ExportTraceServiceRequest, grpc.ServicerContext], ExportTraceServiceResponse],
    threads: int,
) -> Any:
    """
    Return a started gRPC server that gives each OTLP request for spans to ``export``.
    """
    server = grpc.server(ThreadPoolExecutor(threads), options=(("grpc.max_receive_message_length", -1),))
    handler = grpc.unary_unary_rpc_method_handler(
        export,
        request_deserializer=ExportTraceServiceRequest.FromString,
        response_serializer=ExportTraceServiceResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Export": handler}),))
    server.add_insecure_port(endpoint)
    server.start()
    return server


@dataclass(slots=True)
class Door:
    """
    OTLP over gRPC on ``endpoint``, forwarded to ``store``.
    """

    endpoint: str
    store: str
    first: dict[bytes, float] = field(default_factory=dict)  # Span id, and when the store first acknowledged it.
    again: Counter[bytes] = field(default_factory=Counter)  # How often after that.
    spans_per_s: float = 0.0  # How much the store manages; 0: as much as it does.
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _pace: threading.Lock = field(default_factory=threading.Lock)
    _server: Any = None
    _channel: Any = None
    _forward: Callable[..., ExportTraceServiceResponse] | None = None

    def __enter__(self) -> Self:
        """
        Listen.
        """
        self._channel = grpc.insecure_channel(self.store, options=CHANNEL)
        self._forward = self._channel.unary_unary(
            f"/{SERVICE}/Export",
            request_serializer=ExportTraceServiceRequest.SerializeToString,
            response_deserializer=ExportTraceServiceResponse.FromString,
        )
        self._server = listen(self.endpoint, self._export, threads=32)
        return self

    def __exit__(self, *_: object) -> None:
        """
        Stop listening.
        """
        self._server.stop(0).wait()
        self._channel.close()

    def _export(self, request: ExportTraceServiceRequest, context: grpc.ServicerContext) -> ExportTraceServiceResponse:
        spans = spans_of(request)
        # One after the other, as a store does that is at its limit; it does not know who has given up waiting.
        with self._pace:
            done = 0.0
            while self.spans_per_s and done < len(spans):
                time.sleep(0.05)
                done += 0.05 * self.spans_per_s
        assert self._forward is not None
        try:
            answer = self._forward(request, timeout=ANSWER_S)
        except grpc.RpcError as error:
            context.abort(error.code(), error.details() or "")
        now = time.time()
        with self._lock:
            for span in spans:
                if span.span_id in self.first:
                    self.again[span.span_id] += 1
                else:
                    self.first[span.span_id] = now
        return answer
