"""
The service of the matrix: one path for every form in which a service runs code, and a probe in each.

A probe logs a line, makes a span, sends a request, and asks for the request id. What the line says is what the test
reads; the tag tells which of two simultaneous requests it belongs to, without any id of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import logging
import multiprocessing
import os
import sys
import threading
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import anyio.from_thread
import anyio.to_thread
import httpx
from fastapi import BackgroundTasks, Depends, FastAPI, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import FileResponse, PlainTextResponse, StreamingResponse
from fastapi.sse import EventSourceResponse
from opentelemetry import trace
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.routing import Route

import otel_correlation

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator

ECHO = os.environ.get("MATRIX_ECHO", "")
DEADLINE_S = 20.0
FIELDS = ("trace_id", "span_id", "trace_flags", "request_id", "service_name")
NO_KEEPALIVE = httpx.Limits(max_keepalive_connections=0)  # a forked child must not share a connection

log = logging.getLogger("matrix")
tracer = trace.get_tracer("matrix")
sync_client = httpx.Client(limits=NO_KEEPALIVE, trust_env=False, verify=False)


class Lines(logging.Formatter):
    """
    One JSON object for each record; a record without one of our fields is a logging error and no line.
    """

    def format(self, record: logging.LogRecord) -> str:
        fields = {name: getattr(record, name) for name in FIELDS}
        return "MATRIX " + json.dumps({"what": record.getMessage(), **fields, **getattr(record, "probe", {})})


def configure_logging() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(Lines())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


configure_logging()


def tell(form: str, tag: str, outbound: httpx.Response, **more: Any) -> None:
    """
    Log what this place sees.
    """
    seen = {"form": form, "tag": tag, "seen": otel_correlation.request_id(), "sent": outbound.json(), **more}
    log.info("probe", extra={"probe": seen})


def probe(form: str, tag: str) -> None:
    """
    Look from synchronous code.
    """
    outbound = sync_client.get(ECHO)
    with tracer.start_as_current_span(f"probe {form}", attributes={"tag": tag}):
        pass
    tell(form, tag, outbound)


async def aprobe(form: str, tag: str) -> None:
    """
    Look from asynchronous code; other requests run meanwhile.
    """
    async with httpx.AsyncClient(limits=NO_KEEPALIVE, trust_env=False, verify=False) as client:
        outbound = await client.get(ECHO)
    with tracer.start_as_current_span(f"probe {form}", attributes={"tag": tag}):
        await asyncio.sleep(0)
    tell(form, tag, outbound)


class Pair:
    """
    Lets two requests of one form go on together.
    """

    def __init__(self) -> None:
        self.arrived = 0
        self.both = asyncio.Event()

    async def meet(self) -> None:
        self.arrived += 1
        if self.arrived == 2:
            self.both.set()
        await asyncio.wait_for(self.both.wait(), DEADLINE_S)


pairs: defaultdict[str, Pair] = defaultdict(Pair)


def form_of(scope: Any) -> tuple[str, str]:
    """
    Return form and tag of a request to ``/form/<form>/<tag>``.
    """
    parts = scope["path"].split("/")
    return (parts[2], parts[3]) if len(parts) > 3 and parts[1] == "form" else ("", "")


class Meet:
    """
    Middleware below the edge: both requests of a form are under way before either is handled.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            form, tag = form_of(scope)
            if form:
                await pairs[form].meet()
            if form == "middleware-asgi":
                await aprobe(form, tag)
        await self.app(scope, receive, send)


class Above:
    """
    An ASGI wrapper above the edge: outside of the request.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        form, tag = form_of(scope) if scope["type"] == "http" else ("", "")
        if form == "middleware-above":
            await aprobe(form, tag)
        try:
            await self.app(scope, receive, send)
        except RuntimeError as error:
            if form != "exception-above":
                raise
            try:
                raise LookupError("above") from error
            except LookupError:
                log.exception("probe", extra={"probe": {"form": form, "tag": tag, "seen": None}})
        if form == "middleware-above-after":
            await aprobe(form, tag)


async def base_middleware(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """
    Middleware below the edge, of Starlette's kind.
    """
    form, tag = form_of(request.scope)
    response = await call_next(request)
    if form == "middleware-base":
        await aprobe(form, tag)
    return response


# What start-up begins and what outlives its request.
jobs: asyncio.Queue[tuple[str, str, dict[str, str], asyncio.Event]] = asyncio.Queue()
release = asyncio.Event()
thread_release = threading.Event()
outliving: list[asyncio.Task[None]] = []
outliving_threads: list[threading.Thread] = []


async def worker() -> None:
    """
    A worker of the service's own: it belongs to no request.
    """
    while True:
        form, tag, carrier, done = await jobs.get()
        if form == "worker-continue":
            with otel_correlation.continue_from(carrier):
                await aprobe(form, tag)
        elif form == "worker-work":
            with otel_correlation.work("tick", request_id=carrier["X-Request-ID"]):
                await aprobe(form, tag)
        else:
            await aprobe(form, tag)
        done.set()


@contextlib.asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """
    Probe at start-up, outside of any request.
    """
    await asyncio.to_thread(probe, "lifespan", "a")
    await aprobe("lifespan", "b")
    async with asyncio.TaskGroup() as group:
        task = group.create_task(worker())
        yield
        task.cancel()
    for workers in process_pools.values():
        await anyio.to_thread.run_sync(workers.shutdown)


app = FastAPI(lifespan=lifespan)
if os.environ.get("MATRIX_BOOTSTRAP"):
    otel_correlation.bootstrap(app)
app.add_middleware(BaseHTTPMiddleware, dispatch=base_middleware)
app.add_middleware(Meet)
served = Above(app)


# Endpoints and what FastAPI runs around them.


@app.get("/form/endpoint-async/{tag}")
async def endpoint_async(tag: str) -> None:
    await aprobe("endpoint-async", tag)


@app.get("/form/endpoint-sync/{tag}")
def endpoint_sync(tag: str) -> None:
    probe("endpoint-sync", tag)


async def dependency_async(tag: str) -> None:
    await aprobe("dependency-async", tag)


def dependency_sync(tag: str) -> None:
    probe("dependency-sync", tag)


async def dependency_yield_async(tag: str) -> AsyncIterator[None]:
    await aprobe("dependency-yield-async", tag)
    yield
    await aprobe("dependency-yield-async-exit", tag)


def dependency_yield_sync(tag: str) -> Iterator[None]:
    probe("dependency-yield-sync", tag)
    yield
    probe("dependency-yield-sync-exit", tag)


async def sub_dependency(tag: str) -> None:
    await aprobe("sub-dependency", tag)


def over_sub_dependency(tag: str, _inner: Annotated[None, Depends(sub_dependency)]) -> None:
    probe("over-sub-dependency", tag)


@app.get("/form/dependency-async/{tag}", dependencies=[Depends(dependency_async)])
@app.get("/form/dependency-sync/{tag}", dependencies=[Depends(dependency_sync)])
@app.get("/form/dependency-yield-async/{tag}", dependencies=[Depends(dependency_yield_async)])
@app.get("/form/dependency-yield-sync/{tag}", dependencies=[Depends(dependency_yield_sync)])
@app.get("/form/sub-dependency/{tag}", dependencies=[Depends(over_sub_dependency)])
async def with_dependencies(tag: str) -> str:
    return tag


class TeapotError(Exception):
    """
    An exception that the application answers itself.
    """


class SyncTeapotError(Exception):
    """
    The same, by a synchronous handler.
    """


@app.exception_handler(TeapotError)
async def on_handled(request: Request, _error: Exception) -> Response:
    await aprobe(*form_of(request.scope))
    return PlainTextResponse("handled", 409)


@app.exception_handler(SyncTeapotError)
def on_handled_sync(request: Request, _error: Exception) -> Response:
    probe(*form_of(request.scope))
    return PlainTextResponse("handled", 409)


@app.exception_handler(500)
async def on_unhandled(request: Request, _error: Exception) -> Response:
    form, tag = form_of(request.scope)
    if form == "exception-handler-500":
        await aprobe(form, tag)
    return PlainTextResponse("sorry", 500)


@app.get("/form/exception-handler/{tag}")
async def raises_handled(tag: str) -> None:
    raise TeapotError(tag)


@app.get("/form/exception-handler-sync/{tag}")
async def raises_handled_sync(tag: str) -> None:
    raise SyncTeapotError(tag)


@app.get("/form/exception-above/{tag}")
@app.get("/form/exception-handler-500/{tag}")
async def raises(tag: str) -> None:
    raise RuntimeError(tag)


@app.get("/form/background-tasks/{tag}")
async def background_tasks(tag: str, background: BackgroundTasks) -> None:
    background.add_task(aprobe, "background-tasks", tag)
    background.add_task(probe, "background-tasks-sync", tag)


@app.get("/form/background/{tag}")
async def background(tag: str) -> Response:
    return PlainTextResponse("later", background=BackgroundTask(aprobe, "background", tag))


@app.get("/form/file-response/{tag}")
async def file_response(tag: str) -> Response:
    return FileResponse(__file__, background=BackgroundTask(probe, "file-response", tag))


async def stream(form: str, tag: str) -> AsyncIterator[str]:
    yield "1"
    await aprobe(form, tag)
    yield "2"


def stream_sync(form: str, tag: str) -> Iterator[str]:
    yield "1"
    probe(form, tag)
    yield "2"


@app.get("/form/stream-async/{tag}")
async def stream_async(tag: str) -> Response:
    return StreamingResponse(stream("stream-async", tag))


@app.get("/form/stream-sync/{tag}")
def stream_in_thread(tag: str) -> Response:
    return StreamingResponse(stream_sync("stream-sync", tag))


@app.get("/form/sse-async/{tag}", response_class=EventSourceResponse)
async def sse_async(tag: str) -> AsyncIterator[str]:
    yield "1"
    await aprobe("sse-async", tag)
    yield "2"


@app.get("/form/sse-sync/{tag}", response_class=EventSourceResponse)
def sse_sync(tag: str) -> Iterator[str]:
    yield "1"
    probe("sse-sync", tag)
    yield "2"


sub = FastAPI()


@sub.get("/{tag}")
async def in_mounted(tag: str) -> None:
    await aprobe("mounted-fastapi", tag)


async def in_starlette(request: Request) -> Response:
    await aprobe("mounted-starlette", request.path_params["tag"])
    return PlainTextResponse("ok")


app.mount("/form/mounted-fastapi", sub)
app.mount("/form/mounted-starlette", Starlette(routes=[Route("/{tag}", in_starlette)]))


# What a handler starts.

forms: dict[str, Callable[[str, str], Coroutine[Any, Any, object]]] = {}


def form(function: Callable[[str, str], Coroutine[Any, Any, object]]) -> None:
    """
    Register a coroutine function as the form of its name.
    """
    forms[function.__name__.replace("_", "-")] = function


@form
async def create_task(name: str, tag: str) -> None:
    await asyncio.create_task(aprobe(name, tag))


@form
async def gather(name: str, tag: str) -> None:
    await asyncio.gather(aprobe(name, tag), asyncio.sleep(0))


@form
async def task_group(name: str, tag: str) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(aprobe(name, tag))


@form
async def to_thread(name: str, tag: str) -> None:
    await asyncio.to_thread(probe, name, tag)


@form
async def run_in_executor(name: str, tag: str) -> None:
    await asyncio.get_running_loop().run_in_executor(None, probe, name, tag)


pool = ThreadPoolExecutor(1)
mapping_pool = ThreadPoolExecutor(1)


@form
async def run_in_executor_own(name: str, tag: str) -> None:
    await asyncio.get_running_loop().run_in_executor(pool, probe, name, tag)


@form
async def executor_submit(name: str, tag: str) -> None:
    await asyncio.wrap_future(pool.submit(probe, name, tag))


@form
async def executor_map(name: str, tag: str) -> None:
    results = mapping_pool.map(probe, [name], [tag])
    await asyncio.to_thread(list, results)


async def called_back(register: Callable[[Callable[[], None]], object], name: str, tag: str) -> None:
    called = asyncio.get_running_loop().create_future()

    def callback() -> None:
        probe(name, tag)
        called.set_result(None)

    register(callback)
    await called


@form
async def call_soon(name: str, tag: str) -> None:
    await called_back(asyncio.get_running_loop().call_soon, name, tag)


@form
async def call_later(name: str, tag: str) -> None:
    loop = asyncio.get_running_loop()
    await called_back(lambda callback: loop.call_later(0.01, callback), name, tag)


@form
async def call_soon_threadsafe(name: str, tag: str) -> None:
    loop = asyncio.get_running_loop()
    await called_back(
        lambda callback: threading.Thread(target=loop.call_soon_threadsafe, args=(callback,)).start(), name, tag
    )


@form
async def thread(name: str, tag: str) -> None:
    started = threading.Thread(target=probe, args=(name, tag))
    started.start()
    await anyio.to_thread.run_sync(started.join)


class Probing(threading.Thread):
    """
    A thread with a ``run`` of its own.
    """

    def __init__(self, name: str, tag: str) -> None:
        super().__init__()
        self.probed = (name, tag)

    def run(self) -> None:
        probe(*self.probed)


@form
async def thread_subclass(name: str, tag: str) -> None:
    started = Probing(name, tag)
    started.start()
    await anyio.to_thread.run_sync(started.join)


@form
async def timer(name: str, tag: str) -> None:
    started = threading.Timer(0.01, probe, (name, tag))
    started.start()
    await anyio.to_thread.run_sync(started.join)


@form
async def thread_in_thread(name: str, tag: str) -> None:
    def outer() -> None:
        inner = threading.Thread(target=probe, args=(name, tag))
        inner.start()
        inner.join()

    await asyncio.get_running_loop().run_in_executor(pool, outer)


@form
async def anyio_task_group(name: str, tag: str) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(aprobe, name, tag)


@form
async def anyio_to_thread(name: str, tag: str) -> None:
    await anyio.to_thread.run_sync(probe, name, tag)


@form
async def anyio_from_thread(name: str, tag: str) -> None:
    await anyio.to_thread.run_sync(anyio.from_thread.run, aprobe, name, tag)


@form
async def context_run(name: str, tag: str) -> None:
    contextvars.copy_context().run(probe, name, tag)


@form
async def context_run_in_pool(name: str, tag: str) -> None:
    await asyncio.wrap_future(pool.submit(contextvars.copy_context().run, probe, name, tag))


async def generator(name: str, tag: str, closed: asyncio.Event) -> AsyncIterator[int]:
    try:
        yield 1
        yield 2
    finally:
        await aprobe(name, tag)
        closed.set()


@form
async def generator_closed_late(name: str, tag: str) -> None:
    closed = asyncio.Event()
    async for _ in generator(name, tag, closed):
        break  # the event loop closes what nobody holds any more
    await closed.wait()


@form
async def generator_sync_closed_late(name: str, tag: str) -> None:
    def numbers() -> Iterator[int]:
        try:
            yield 1
        finally:
            probe(name, tag)

    kept = numbers()
    next(kept)
    await asyncio.sleep(0)
    del kept


@form
async def task_outlives(name: str, tag: str) -> None:
    async def late() -> None:
        await release.wait()
        await aprobe(name, tag)

    outliving.append(asyncio.create_task(late()))


@form
async def thread_outlives(name: str, tag: str) -> None:
    def late() -> None:
        thread_release.wait(DEADLINE_S)
        probe(name, tag)

    started = threading.Thread(target=late)
    started.start()
    outliving_threads.append(started)


async def handed_over(name: str, tag: str) -> None:
    done = asyncio.Event()
    await jobs.put((name, tag, otel_correlation.inject(), done))
    await asyncio.wait_for(done.wait(), DEADLINE_S)


@form
async def worker_plain(name: str, tag: str) -> None:
    await handed_over(name, tag)


@form
async def worker_work(name: str, tag: str) -> None:
    await handed_over(name, tag)


@form
async def worker_continue(name: str, tag: str) -> None:
    await handed_over(name, tag)


async def in_process(method: str, name: str, tag: str) -> None:
    context: Any = multiprocessing.get_context(method)
    child = context.Process(target=otel_correlation.carried(probe), args=(name, tag))
    await anyio.to_thread.run_sync(child.start)
    await anyio.to_thread.run_sync(child.join)


@form
async def process_fork(name: str, tag: str) -> None:
    await in_process("fork", name, tag)


@form
async def process_spawn(name: str, tag: str) -> None:
    await in_process("spawn", name, tag)


@form
async def process_forkserver(name: str, tag: str) -> None:
    await in_process("forkserver", name, tag)


process_pools: dict[str, ProcessPoolExecutor] = {}


async def in_process_pool(method: str, name: str, tag: str) -> None:
    # Made by the first request: its worker process must not keep that one's ids.
    executor = process_pools.setdefault(method, ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)))
    await asyncio.get_running_loop().run_in_executor(executor, otel_correlation.carried(probe), name, tag)


@form
async def process_pool_fork(name: str, tag: str) -> None:
    await in_process_pool("fork", name, tag)


@form
async def process_pool_spawn(name: str, tag: str) -> None:
    await in_process_pool("spawn", name, tag)


@app.get("/form/middleware-asgi/{tag}")
@app.get("/form/middleware-base/{tag}")
@app.get("/form/middleware-above/{tag}")
@app.get("/form/middleware-above-after/{tag}")
async def nothing(tag: str) -> str:
    return tag


@app.get("/form/{name}/{tag}")
async def in_handler(name: str, tag: str) -> None:
    await forms[name](name, tag)


# WebSockets.

room: dict[str, WebSocket] = {}


@app.websocket("/socket/{tag}")
async def socket(websocket: WebSocket, tag: str) -> None:
    await websocket.accept()
    room[tag] = websocket
    if len(room) == 2:
        pairs["socket"].both.set()
    await pairs["socket"].both.wait()
    with contextlib.suppress(WebSocketDisconnect):
        while True:
            name = await websocket.receive_text()
            if name == "websocket-broadcast":
                for member in list(room.values()):
                    await member.send_text(tag)
                await aprobe(name, tag)
            elif name == "websocket-receive":
                await aprobe(name, tag)
            await websocket.send_text(f"done {name}")


@app.post("/release")
async def let_go() -> None:
    """
    A later request, while which everything that outlives its own goes on; nothing of it is this request's.
    """
    release.set()
    thread_release.set()
    await asyncio.gather(*outliving)
    for started in outliving_threads:
        await anyio.to_thread.run_sync(started.join)
    # Submitted outside of any request: the workers of the pools have no ids left, whoever they were started for.
    empty = contextvars.Context()
    for tag in ("a", "b"):
        await asyncio.wrap_future(empty.run(pool.submit, probe, "pool-outside", tag))
        for method, workers in process_pools.items():
            await asyncio.wrap_future(empty.run(workers.submit, probe, f"process-pool-{method}-outside", tag))
