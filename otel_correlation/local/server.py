"""
The HTTP side: OTLP in at ``/v1/*``, the query API at ``/api/*``, the page at ``/``.

A plain Starlette router and never FastAPI or the ``Starlette`` class: those are what instrumentations patch, and the
viewer must not trace itself into its own store.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import sqlite3
import threading
from importlib import resources
from typing import TYPE_CHECKING, Final

import uvicorn
from google.rpc.status_pb2 import Status
from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from otel_correlation._version import __version__
from otel_correlation.local import otlp
from otel_correlation.local.store import LocalStore
from otel_correlation.semconv import DISTRO_NAME
from otel_correlation.stores.bounded import MalformedError, TooBigError
from otel_correlation.stores.story import as_json

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType
    from typing import Self

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


DEFAULT_HOST: Final = "127.0.0.1"
# The port of OTLP/HTTP, so that an SDK without any setting finds it.
DEFAULT_PORT: Final = 4318
MAX_BODY_BYTES: Final = 16 * 1024 * 1024
MAX_INFLATED_BYTES: Final = 64 * 1024 * 1024
# What may wait for the store's thread; beyond it senders are told to come again.
MAX_PENDING_BYTES: Final = 64 * 1024 * 1024
MAX_LISTED: Final = 200
_STOP_S: Final = 5
# google.rpc.Code
_INVALID_ARGUMENT: Final = 3
_RESOURCE_EXHAUSTED: Final = 8
_UNAVAILABLE: Final = 14

_SIGNALS: Final = {
    "traces": (otlp.decode_traces, otlp.trace_response),
    "logs": (otlp.decode_logs, otlp.log_response),
    "metrics": (otlp.check_metrics, otlp.metric_response),
}
_PAGE: Final = {
    "": ("index.html", "text/html; charset=utf-8"),
    "viewer.css": ("viewer.css", "text/css; charset=utf-8"),
    "viewer.js": ("viewer.js", "text/javascript; charset=utf-8"),
}
# Telemetry is other people's text: nothing but our own three files may run or load.
_SECURITY_HEADERS: Final = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Viewer:
    """
    The ASGI application around a store.
    """

    def __init__(self, store: LocalStore, *, hosts: frozenset[str] | None = None) -> None:
        """
        Answer from ``store``.

        Args:
            store: What is received goes there.
            hosts: Host names under which the API and the page answer; None is any. A page of another origin whose name
                resolves to this machine (DNS rebinding) is so kept from reading.
        """
        self._store = store
        self._hosts = hosts
        self._pending_bytes = 0
        self._without_trace = 0
        self._refused = 0
        self._router = Router(
            [
                *(Route(f"/v1/{signal}", self._receiver(signal), methods=["POST"]) for signal in _SIGNALS),
                Route("/api/traces", self._list),
                Route("/api/traces/{trace_id}", self._trace),
                Route("/api/find/{wanted:path}", self._find),
                Route("/healthz", self._health),
                *(Route(f"/{path}", self._file(*file)) for path, file in _PAGE.items()),
            ],
            redirect_slashes=False,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """
        Answer one request; every response carries the security headers.
        """

        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._router(scope, receive, send_secured)

    def _receiver(self, signal: str) -> Callable[[Request], Awaitable[Response]]:
        decode, answer = _SIGNALS[signal]

        async def receive(request: Request) -> Response:
            media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if media not in (otlp.PROTOBUF, otlp.JSON):
                return self._refuse(
                    415, otlp.JSON, _INVALID_ARGUMENT, f"content-type must be {otlp.PROTOBUF} or {otlp.JSON}"
                )
            coding = request.headers.get("content-encoding", "identity").strip().lower()
            if coding not in ("gzip", "identity", ""):
                response = self._refuse(415, media, _INVALID_ARGUMENT, "content-encoding must be gzip or none")
                response.headers["accept-encoding"] = "gzip"
                return response
            try:
                body = await _body(request)
            except TooBigError as error:
                return self._refuse(413, media, _INVALID_ARGUMENT, str(error), close=True)
            if self._pending_bytes + len(body) > MAX_PENDING_BYTES:
                response = self._refuse(503, media, _RESOURCE_EXHAUSTED, "too much is waiting to be stored")
                response.headers["retry-after"] = "1"
                return response
            self._pending_bytes += len(body)
            try:
                batch = await asyncio.to_thread(_decoded, decode, body, media, inflate=coding == "gzip")
                self._without_trace += batch.without_trace
                if batch.spans or batch.logs:
                    await asyncio.wrap_future(self._store.add(batch.spans, batch.logs))
            except TooBigError as error:
                return self._refuse(413, media, _INVALID_ARGUMENT, str(error))
            except MalformedError as error:
                return self._refuse(400, media, _INVALID_ARGUMENT, str(error))
            except sqlite3.Error as error:
                return self._refuse(503, media, _UNAVAILABLE, f"the store cannot write: {error}")
            finally:
                self._pending_bytes -= len(body)
            return Response(answer(batch, media), media_type=media)

        return receive

    def _refuse(self, status: int, media: str, code: int, message: str, *, close: bool = False) -> Response:
        self._refused += 1
        # The rest of a refused body is not read.
        headers = {"connection": "close"} if close else None
        return Response(otlp.encode(Status(code=code, message=message), media), status, headers, media)

    async def _list(self, request: Request) -> Response:
        if refused := self._refuse_host(request):
            return refused
        query = request.query_params
        limit = query.get("limit", "50")
        # int() refuses thousands of digits with an exception.
        if not limit.isdecimal() or len(limit) > 3 or not 0 < int(limit) <= MAX_LISTED:
            return JSONResponse({"error": f"limit must be a number from 1 to {MAX_LISTED}"}, 400)
        conditions = {name: query.get(name, "") for name in ("request_id", "trace_id", "service")}
        return JSONResponse({"traces": await asyncio.wrap_future(self._store.recent(**conditions, limit=int(limit)))})

    async def _trace(self, request: Request) -> Response:
        if refused := self._refuse_host(request):
            return refused
        trace = await asyncio.wrap_future(self._store.trace(request.path_params["trace_id"]))
        return JSONResponse({"error": "no such trace"}, 404) if trace is None else JSONResponse(as_json(trace))

    async def _find(self, request: Request) -> Response:
        if refused := self._refuse_host(request):
            return refused
        traces = await asyncio.wrap_future(self._store.find(request.path_params["wanted"]))
        return JSONResponse({"traces": [as_json(trace) for trace in traces]})

    async def _health(self, _request: Request) -> Response:
        counts = self._store.counts
        return JSONResponse(
            {
                "service": DISTRO_NAME,
                "version": __version__,
                "rows": counts.rows,
                "bytes": counts.bytes,
                "duplicates": counts.duplicates,
                "dropped": {
                    "oldest_traces": counts.dropped_traces,
                    "rows_of_oldest_traces": counts.dropped_rows,
                    "rows_over_trace_limit": counts.over_trace_limit,
                    "logs_without_trace": self._without_trace,
                    "refused_requests": self._refused,
                },
            }
        )

    def _file(self, name: str, media: str) -> Callable[[Request], Awaitable[Response]]:
        content = resources.files("otel_correlation.local").joinpath("page", name).read_bytes()

        async def serve(request: Request) -> Response:
            return self._refuse_host(request) or Response(content, media_type=media)

        return serve

    def _refuse_host(self, request: Request) -> Response | None:
        if self._hosts is None or (request.url.hostname or "").lower() in self._hosts:
            return None
        return JSONResponse(
            {"error": "not served under this name: open it as http://127.0.0.1, or bind with --host"}, 421
        )


def _decoded(decode: Callable[[bytes, str], otlp.Batch], body: bytes, media: str, *, inflate: bool) -> otlp.Batch:
    return decode(otlp.decompress(body, MAX_INFLATED_BYTES) if inflate else body, media)


async def _body(request: Request) -> bytes:
    too_big = TooBigError(f"the body is larger than {MAX_BODY_BYTES} bytes")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and (len(length) > 12 or int(length) > MAX_BODY_BYTES):
        raise too_big
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise too_big
    return bytes(body)


class _Uvicorn(uvicorn.Server):
    """
    A uvicorn that says when it has started and when it has ended, for a thread other than its own.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.running = threading.Event()
        self.ended = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.running.set()


class LocalServer:
    """
    The embedded collector and viewer in a thread of its own, for the time of a ``with`` block.
    """

    def __init__(self, host: str = DEFAULT_HOST, port: int = DEFAULT_PORT, db: str = ":memory:") -> None:
        """
        Bind and open, so that what cannot work fails here.

        Args:
            host: Address to listen on.
            port: Port; 0 is any free one.
            db: SQLite file, or ``:memory:``.

        Raises:
            OSError: The address is in use or not of this machine.
            StoreFileError: The file cannot be used.
        """
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self._socket = socket.create_server(address[:2], family=family)
        try:
            self.store = LocalStore(db)
        except BaseException:
            self._socket.close()
            raise
        bound = ipaddress.ip_address(self._socket.getsockname()[0])
        self.port: int = self._socket.getsockname()[1]
        self.loopback = bound.is_loopback
        shown = ("::1" if ":" in str(bound) else "127.0.0.1") if bound.is_unspecified else str(bound)
        self.url = f"http://[{shown}]:{self.port}" if ":" in shown else f"http://{shown}:{self.port}"
        hosts = frozenset({"localhost", "127.0.0.1", "::1", str(bound), host.lower()}) if self.loopback else None
        app: ASGIApp = Viewer(self.store, hosts=hosts)
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="critical",
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                proxy_headers=False,
                limit_concurrency=256,
                timeout_graceful_shutdown=_STOP_S,
            )
        )
        self._thread = threading.Thread(target=self._run, name="otel-correlation-server", daemon=True)

    def _run(self) -> None:
        try:
            self._uvicorn.run(sockets=[self._socket])
        finally:
            self._uvicorn.ended.set()
            self._uvicorn.running.set()

    def __enter__(self) -> Self:
        self._thread.start()
        self._uvicorn.running.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._uvicorn.should_exit = True
        self._thread.join()
        self.store.close()

    def wait(self, timeout_s: float | None = None) -> bool:
        """
        Wait until the server has ended by itself; return whether it has.
        """
        return self._uvicorn.ended.wait(timeout_s)
