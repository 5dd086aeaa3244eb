"""
The HTTP side: OTLP in at ``/v1/*``, the query API at ``/api/*``, the page at ``/``.

A plain Starlette router and never FastAPI or the ``Starlette`` class: those are what instrumentations patch, and the
viewer must not trace itself into its own store.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

import uvicorn
from google.rpc.status_pb2 import Status
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from otel_correlation._version import __version__
from otel_correlation.local import otlp
from otel_correlation.local.connections import HEAD_S, IDLE_S, MAX_CONNECTIONS, Connections, Room
from otel_correlation.local.store import LocalStore
from otel_correlation.semconv import DISTRO_NAME
from otel_correlation.stores.bounded import MalformedError, TooBigError
from otel_correlation.stores.story import as_json

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from types import TracebackType
    from typing import Self

    from starlette.requests import Request
    from starlette.types import Message, Receive, Scope, Send

    from otel_correlation.stores.model import Json

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_HOST: Final = "127.0.0.1"
# The port of OTLP/HTTP, so that an SDK without any setting finds it.
DEFAULT_PORT: Final = 4318
MAX_BODY_BYTES: Final = 16 * 1024 * 1024
# As much as an exporter of ours holds back for one signal.
MAX_INFLATED_BYTES: Final = 32 * 1024 * 1024
# What may wait for the store's thread; beyond it senders are told to come again.
MAX_PENDING_BYTES: Final = 64 * 1024 * 1024
# Of bodies that have not arrived whole; beyond it the one that began first is given up.
MAX_ARRIVING_BYTES: Final = 64 * 1024 * 1024
# Of answers that are not read whole; the same.
MAX_LEAVING_BYTES: Final = 64 * 1024 * 1024
# For a body to arrive, and for a request as a whole, its answer read.
BODY_S: Final = 30.0
REQUEST_S: Final = 90.0
# Rows for the store at a time: who asks meanwhile waits for one of these, not for all.
_ROWS: Final = 1000
_PIECE: Final = 64 * 1024
_MAX_HEAD_BYTES: Final = 64 * 1024
MAX_LISTED: Final = 200
_STOP_S: Final = 5
# google.rpc.Code
_INVALID_ARGUMENT: Final = 3
_DEADLINE_EXCEEDED: Final = 4
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
_WRONG_HOST: Final = (
    "not served under this name: use an address such as http://127.0.0.1, or start it with --allow-host NAME"
)
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


class _CrowdedError(Exception):
    """
    A body that was given up because others needed the room.
    """


class Viewer:
    """
    The ASGI application around a store.
    """

    def __init__(
        self, store: LocalStore, *, hosts: frozenset[str] | None = None, connections: Connections | None = None
    ) -> None:
        """
        Answer from ``store``.

        Args:
            store: What is received goes there.
            hosts: Names under which the receiver, the API and the page answer, beside every address written as one;
                None is any. A page of another origin whose name somebody lets point at this machine (DNS rebinding) is
                so kept from reading and from sending. It always comes with its name: an address has none to change.
            connections: Those that requests come over; None where another server has bounds of its own.
        """
        self._store = store
        self._hosts = hosts
        self._connections = connections or new_connections()
        self._pending_bytes = 0
        self._arriving = Room(lambda: MAX_ARRIVING_BYTES)
        self._leaving = Room(lambda: MAX_LEAVING_BYTES)
        # One payload at a time, from its bytes to its rows: what it costs in memory, it costs once.
        self._receiving = asyncio.Lock()
        self._decoder = ThreadPoolExecutor(1, "otel-correlation-decoder")
        self._teller = ThreadPoolExecutor(1, "otel-correlation-teller")
        self._without_trace = 0
        self._refused = 0
        self._slow = 0
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
        key = scope.get("client")
        deadline = asyncio.timeout(REQUEST_S)

        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                # From here on it is the caller that is waited for.
                self._connections.wait(key)
                await send(message)
                return
            body, more = message.get("body", b""), message.get("more_body", False)
            self._leaving.take(deadline, len(body))
            # uvicorn waits between pieces until the caller has read; a whole body it would hold until the end.
            for begin in range(0, max(len(body), 1), _PIECE):
                end = begin + _PIECE
                await send({**message, "body": body[begin:end], "more_body": more or end < len(body)})

        try:
            self._connections.work(key)
            async with deadline:
                await self._router(scope, receive, send_secured)
        except TimeoutError:
            self._slow += 1
            self._connections.end(key)
        except ClientDisconnect:
            pass
        finally:
            self._leaving.give(deadline)
            self._connections.rest(key)

    def close(self) -> None:
        """
        End the threads.
        """
        for threads in (self._decoder, self._teller):
            threads.shutdown(cancel_futures=True)

    def _receiver(self, signal: str) -> Callable[[Request], Awaitable[Response]]:
        decode, answer = _SIGNALS[signal]

        async def receive(request: Request) -> Response:
            media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if not self._is_host(request):
                return self._refuse(
                    421, otlp.JSON if media == otlp.JSON else otlp.PROTOBUF, _INVALID_ARGUMENT, _WRONG_HOST
                )
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
                body = await self._body(request)
            except TooBigError as error:
                return self._refuse(413, media, _INVALID_ARGUMENT, str(error), close=True)
            except _CrowdedError:
                return self._refuse(
                    503, media, _RESOURCE_EXHAUSTED, "too many bodies arrive at once", close=True, again=True
                )
            except TimeoutError:
                self._slow += 1
                return self._refuse(408, media, _DEADLINE_EXCEEDED, "the body did not arrive in time", close=True)
            if self._pending_bytes + len(body) > MAX_PENDING_BYTES:
                return self._refuse(503, media, _RESOURCE_EXHAUSTED, "too much is waiting to be stored", again=True)
            self._pending_bytes += len(body)
            try:
                async with self._receiving:
                    batch = await self._in(self._decoder, _decoded, decode, body, media, coding == "gzip")
                    self._without_trace += batch.without_trace
                    for begin in range(0, max(len(batch.spans), len(batch.logs)), _ROWS):
                        rows = slice(begin, begin + _ROWS)
                        await asyncio.wrap_future(self._store.add(batch.spans[rows], batch.logs[rows]))
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

    async def _body(self, request: Request) -> bytes:
        too_big = TooBigError(f"the body is larger than {MAX_BODY_BYTES} bytes")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and (len(length) > 12 or int(length) > MAX_BODY_BYTES):
            raise too_big
        self._connections.wait(request.scope.get("client"))
        body = bytearray()
        deadline = asyncio.timeout(BODY_S)
        try:
            async with deadline:
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > MAX_BODY_BYTES:
                        raise too_big
                    self._arriving.take(deadline, len(chunk))
        except TimeoutError:
            if body and not self._arriving.has(deadline):
                raise _CrowdedError from None
            raise
        finally:
            self._arriving.give(deadline)
        self._connections.work(request.scope.get("client"))
        return bytes(body)

    def _refuse(
        self, status: int, media: str, code: int, message: str, *, close: bool = False, again: bool = False
    ) -> Response:
        self._refused += 1
        headers: dict[str, str] = {}
        if close:
            # The rest of a refused body is not read.
            headers["connection"] = "close"
        if again:
            headers["retry-after"] = "1"
        return Response(otlp.encode(Status(code=code, message=message), media), status, headers, media)

    async def _in(self, threads: ThreadPoolExecutor, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """
        Return what ``work`` returns: nothing whose time grows with what somebody sent runs on the event loop.
        """
        return await asyncio.wrap_future(threads.submit(work, *args, **kwargs))

    async def _tell(self, work: Callable[P, Json], *args: P.args, **kwargs: P.kwargs) -> Response:
        """
        Return as JSON what ``work`` returns.
        """

        def told() -> bytes:
            return json.dumps(
                work(*args, **kwargs), ensure_ascii=False, allow_nan=False, separators=(",", ":")
            ).encode()

        return Response(await self._in(self._teller, told), media_type="application/json")

    async def _list(self, request: Request) -> Response:
        if refused := self._refuse_host(request):
            return refused
        query = request.query_params
        limit = query.get("limit", "50")
        # int() refuses thousands of digits with an exception.
        if not limit.isdecimal() or len(limit) > 3 or not 0 < int(limit) <= MAX_LISTED:
            return JSONResponse({"error": f"limit must be a number from 1 to {MAX_LISTED}"}, 400)
        conditions = {name: query.get(name, "") for name in ("request_id", "trace_id", "service")}
        found = await asyncio.wrap_future(self._store.recent(**conditions, limit=int(limit)))
        return await self._tell(lambda: {"traces": [*found]})

    async def _trace(self, request: Request) -> Response:
        if refused := self._refuse_host(request):
            return refused
        trace = await asyncio.wrap_future(self._store.trace(request.path_params["trace_id"]))
        return JSONResponse({"error": "no such trace"}, 404) if trace is None else await self._tell(as_json, trace)

    async def _find(self, request: Request) -> Response:
        if refused := self._refuse_host(request):
            return refused
        traces = await asyncio.wrap_future(self._store.find(request.path_params["wanted"]))
        return await self._tell(lambda: {"traces": [as_json(trace) for trace in traces]})

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
                    "slow_requests": self._slow,
                    "connections_ended_for_others": self._connections.ended,
                    "rows_over_size": counts.over_size,
                },
            }
        )

    def _file(self, name: str, media: str) -> Callable[[Request], Awaitable[Response]]:
        content = resources.files("otel_correlation.local").joinpath("page", name).read_bytes()

        async def serve(request: Request) -> Response:
            return self._refuse_host(request) or Response(content, media_type=media)

        return serve

    def _is_host(self, request: Request) -> bool:
        if self._hosts is None:
            return True
        # A browser always sends it.
        name = request.headers.get("host")
        return name is None or is_address(name := _host_name(name)) or name in self._hosts

    def _refuse_host(self, request: Request) -> Response | None:
        return None if self._is_host(request) else JSONResponse({"error": _WRONG_HOST}, 421)


def _host_name(header: str) -> str:
    """
    Return the name or the address in a ``Host`` header.
    """
    name = header.strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    return name.removesuffix(".")


def is_address(name: str) -> bool:
    """
    Return whether ``name`` is an address of IPv4 or IPv6, and so none that DNS could let point elsewhere.
    """
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def new_connections() -> Connections:
    """
    Return the connections of a server, within the bounds that are usual here.
    """
    return Connections(max_connections=MAX_CONNECTIONS, head_s=HEAD_S, idle_s=IDLE_S)


def _decoded(decode: Callable[[bytes, str], otlp.Batch], body: bytes, media: str, inflate: bool) -> otlp.Batch:  # noqa: FBT001 - called by position, in a thread
    return decode(otlp.decompress(body, MAX_INFLATED_BYTES) if inflate else body, media)


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

    def __init__(
        self,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        db: str = ":memory:",
        *,
        allow_hosts: Iterable[str] = (),
    ) -> None:
        """
        Bind and open, so that what cannot work fails here.

        Args:
            host: Address to listen on.
            port: Port; 0 is any free one.
            db: SQLite file, or ``:memory:``. It is made for its owner alone (mode 0600).
            allow_hosts: Names under which it answers, beside ``localhost``, ``host`` and every address.

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
        names = (name.lower().removesuffix(".") for name in ("localhost", host, *allow_hosts) if not is_address(name))
        connections = new_connections()
        self._viewer = Viewer(self.store, hosts=frozenset(names), connections=connections)
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                self._viewer,
                log_config=None,
                log_level="critical",
                access_log=False,
                lifespan="off",
                # uvloop would read 256 kB at a time, whatever the protocol asks for.
                loop="asyncio",
                http=connections.protocol(),
                h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
                ws="none",
                server_header=False,
                proxy_headers=False,
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
        self._viewer.close()
        self.store.close()

    def wait(self, timeout_s: float | None = None) -> bool:
        """
        Wait until the server has ended by itself; return whether it has.
        """
        return self._uvicorn.ended.wait(timeout_s)
