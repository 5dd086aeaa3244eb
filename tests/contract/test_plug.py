"""
What contrib's users have: its classes, its keyword arguments, its hooks, whatever was touched first.
"""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from typing import TYPE_CHECKING, Any

import fastapi
import fastapi.routing
import pytest
import starlette._exception_handler
import starlette.routing
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.instrumentation import fastapi as contrib
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.propagators import TraceResponsePropagator, set_global_response_propagator
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.trace import SpanKind
from starlette.background import BackgroundTask
from starlette.middleware.gzip import GZipMiddleware

from otel_correlation import guard
from otel_correlation.edge import _fastapi as plug
from otel_correlation.edge import _http, _websocket
from otel_correlation.identity import log_ids
from tests.contract.wire import PARENT, TRACE, UUID, Wire, call, exchange, http_scope, open_socket, wired

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.sdk.trace import ReadableSpan

Alias = FastAPIInstrumentor


def hello() -> FastAPI:
    """
    Return a small application, without FastAPI's own spans where nobody instruments it.
    """
    app = fastapi.FastAPI(telemetry={"tracing": False})

    @app.get("/hello/{name}")
    async def hello(name: str) -> fastapi.Response:
        return fastapi.Response(name, headers={"x-shop": "1", "set-cookie": "a=b"})

    @app.get("/health")
    async def health() -> list[str]:
        return list(log_ids())

    return app


@pytest.fixture(params=["light", "plain"])
def quiet(request: pytest.FixtureRequest) -> Iterator[Wire]:
    """
    A wired process in which nothing is instrumented yet.
    """
    with wired(request.param, instrument=False) as found:
        yield found


def test_nothing_is_instrumented_by_itself(quiet: Wire) -> None:
    """
    Being active instruments nothing: whoever wants it says so.
    """
    reply = call(hello(), path="/hello/x")
    assert reply.all("x-request-id") == []


def test_instrument_app(quiet: Wire) -> None:
    """
    ``instrument_app`` covers one application, once, and ``uninstrument_app`` ends that.
    """
    app, other = hello(), hello()
    FastAPIInstrumentor.instrument_app(app)
    FastAPIInstrumentor.instrument_app(app)
    call(app, path="/hello/x")
    call(other, path="/hello/x")
    assert len(quiet.spans) == 1
    FastAPIInstrumentor.uninstrument_app(app)
    assert call(app, path="/hello/x").all("x-request-id") == []
    FastAPIInstrumentor().instrument_app(app)
    call(app, path="/hello/x")
    assert len(quiet.spans) == 2


def test_instrument_everything(quiet: Wire) -> None:
    """
    ``instrument()`` covers applications made before and after; ``uninstrument()`` ends that; it can begin again.
    """
    before = hello()
    instrumentor = FastAPIInstrumentor()
    for turn in (1, 2):
        instrumentor.instrument(skip_dep_check=True)
        after = hello()
        for app in (before, after):
            call(app, path="/hello/x")
        assert len(quiet.spans) == 2 * turn
        instrumentor.uninstrument()
        assert call(before, path="/hello/x").all("x-request-id") == []
    FastAPIInstrumentor.instrument_app(before)
    instrumentor.instrument(skip_dep_check=True)
    call(before, path="/hello/x")
    assert len(quiet.spans) == 5
    instrumentor.uninstrument()


def test_one_application_is_left_out(wire: Wire) -> None:
    """
    ``uninstrument_app`` excepts one application from all.
    """
    app = hello()
    FastAPIInstrumentor.uninstrument_app(app)
    call(app, path="/hello/x")
    assert wire.spans == []
    plug.switch_on(app)
    call(app, path="/hello/x")
    assert len(wire.spans) == 1


@pytest.mark.parametrize("first", ["contrib class", "alias", "instance", "instance of ours"])
def test_whichever_class_was_touched_first(first: str) -> None:
    """
    Every name by which the instrumentor is known drives our edge, also an object that was made before us.
    """
    FastAPIInstrumentor._instance = None
    made_before = FastAPIInstrumentor() if first == "instance" else None
    with wired(instrument=False) as wire:
        by: Any = {
            "contrib class": contrib.FastAPIInstrumentor,
            "alias": Alias,
            "instance": made_before,
            "instance of ours": FastAPIInstrumentor(),
        }[first]
        app = hello()
        by.instrument_app(app)
        call(app, path="/hello/x")
        assert [span.name for span in wire.spans] == ["GET /hello/{name}"]
        by.uninstrument_app(app)
        call(app, path="/hello/x")
        assert len(wire.spans) == 1


@pytest.mark.parametrize("used", [True, False])
def test_contrib_instrumented_before_us(used: bool) -> None:
    """
    What contrib instrumented before we came continues on our edge: one span, no internal ones, its options kept.
    """
    instrumentor = FastAPIInstrumentor()
    seen: list[Any] = []
    instrumentor.instrument(skip_dep_check=True, server_request_hook=lambda span, scope: seen.append(scope["path"]))
    try:
        app = hello()
        if used:
            call(app, path="/hello/x")
        seen.clear()
        with wired(instrument=False) as wire:
            later = hello()
            for one in (app, later):
                reply = call(one, path="/hello/x", headers=[(b"x-request-id", UUID.encode())])
                assert reply.all("x-request-id") == [UUID]
            assert [span.name for span in wire.spans] == ["GET /hello/{name}"] * 2
            assert set(seen) == {"/hello/x"}
            instrumentor.uninstrument()
            call(app, path="/hello/x")
            assert len(wire.spans) == 2
    finally:
        if instrumentor.is_instrumented_by_opentelemetry:
            instrumentor.uninstrument()
        contrib._InstrumentedFastAPI._instrumented_fastapi_apps.clear()
        contrib._InstrumentedFastAPI._instrument_kwargs = {}
        if hasattr(BackgroundTask, "_otel_original_call"):
            BackgroundTask.__call__ = BackgroundTask._otel_original_call  # type: ignore[method-assign]
            del BackgroundTask._otel_original_call


@pytest.mark.parametrize("used", [True, False])
def test_contrib_app_before_us(used: bool) -> None:
    """
    An application that contrib's ``instrument_app`` took before us has one SERVER span, with all that it was told.
    """
    app = hello()
    seen: list[str] = []
    FastAPIInstrumentor.instrument_app(
        app,
        server_request_hook=lambda span, scope: seen.append("server"),
        client_response_hook=lambda span, scope, message: seen.append(message["type"]),
        excluded_urls="health",
        http_capture_headers_server_request=["x-shop"],
        exclude_spans=["receive"],
    )
    if used:
        call(app, path="/hello/x")
        seen.clear()
    with wired(instrument=False) as wire:
        if not used:
            app.add_middleware(GZipMiddleware)  # an application that has not started can still be changed
        call(app, path="/hello/x", headers=[(b"x-shop", b"1")])
        assert wire.server.name == "GET /hello/{name}"
        assert tuple((wire.server.attributes or {})["http.request.header.x-shop"]) == ("1",)  # type: ignore[arg-type]
        assert [span.name for span in wire.spans if span.kind is not SpanKind.SERVER] == [
            "GET /hello/{name} http send"
        ] * 2
        assert seen == ["server", "http.response.start", "http.response.body"]
        wire.clear()
        call(app, path="/health")
        assert wire.spans == []
        FastAPIInstrumentor.uninstrument_app(app)
        call(app, path="/hello/x")
        assert wire.spans == []
    contrib._InstrumentedFastAPI._instrumented_fastapi_apps.clear()
    BackgroundTask.__call__ = BackgroundTask._otel_original_call  # type: ignore[method-assign,attr-defined]
    del BackgroundTask._otel_original_call  # type: ignore[attr-defined]


def test_deactivate_restores_everything() -> None:
    """
    Activating and deactivating leaves every class exactly as it was, twice.
    """
    owners = (
        fastapi.FastAPI,
        starlette.routing.Mount,
        starlette.routing.Route,
        starlette.routing.WebSocketRoute,
        fastapi.routing.APIRoute,
        FastAPIInstrumentor,
        OpenTelemetryMiddleware,
        BackgroundTask,
    )

    def snapshot() -> list[dict[str, Any]]:
        seams = [starlette._exception_handler.__dict__["_lookup_exception_handler"]]
        return [*(dict(vars(owner)) for owner in owners), {"seams": seams}]

    FastAPIInstrumentor()
    before, cls = snapshot(), fastapi.FastAPI
    for _ in range(2):
        with wired() as wire:
            call(hello(), path="/hello/x")
            assert len(wire.spans) == 1
        assert snapshot() == before
        assert fastapi.FastAPI is cls
        assert not FastAPIInstrumentor().is_instrumented_by_opentelemetry
    app = hello()
    assert call(app, path="/hello/x").all("x-request-id") == []


def test_deactivate_leaves_what_others_patched_since() -> None:
    """
    A method that somebody wrapped after us stays theirs; ours below it only forwards from then on.
    """
    original: Any = starlette.routing.Mount.__dict__["handle"]
    seen: list[str] = []
    try:
        with wired():
            ours: Any = starlette.routing.Mount.__dict__["handle"]

            async def theirs(self: Any, scope: Any, receive: Any, send: Any) -> None:
                seen.append(scope["path"])
                await ours(self, scope, receive, send)

            starlette.routing.Mount.handle = theirs  # type: ignore[method-assign]
        assert starlette.routing.Mount.__dict__["handle"] is theirs
        app = fastapi.FastAPI()
        app.mount("/sub", hello())
        assert call(app, path="/sub/hello/x").status == 200
        assert seen == ["/sub/hello/x"]
    finally:
        starlette.routing.Mount.handle = original  # type: ignore[method-assign]


def test_applications_are_not_kept_alive(wire: Wire) -> None:
    """
    An instrumented application that nobody uses any more is collected.
    """
    app = hello()
    FastAPIInstrumentor.instrument_app(app)
    call(app, path="/hello/x")
    reference = weakref.ref(app)
    del app
    gc.collect()
    assert reference() is None


def test_hooks(quiet: Wire) -> None:
    """
    The three hooks get the span and what contrib gives them; asking for message hooks makes the message spans.
    """
    seen: list[tuple[str, str]] = []

    def on_server(span: Any, scope: Any) -> None:
        seen.append(("server", scope["type"]))
        span.set_attribute("mine", 1)
        span.update_name("renamed")

    def on_receive(span: Any, scope: Any, message: Any) -> None:
        seen.append(("receive", message["type"]))

    def on_send(span: Any, scope: Any, message: Any) -> None:
        seen.append(("send", message["type"]))

    app = fastapi.FastAPI()

    @app.post("/x")
    async def post(body: dict[str, int]) -> None: ...

    FastAPIInstrumentor.instrument_app(
        app, server_request_hook=on_server, client_request_hook=on_receive, client_response_hook=on_send
    )
    call(app, "POST", "/x", [(b"content-type", b"application/json")], body=b"{}")
    assert ("server", "http") in seen
    assert ("receive", "http.request") in seen
    assert [kind for which, kind in seen if which == "send"] == ["http.response.start", "http.response.body"]
    assert quiet.server.name == "renamed"
    assert (quiet.server.attributes or {})["mine"] == 1
    names = [span.name for span in quiet.spans if span.kind is SpanKind.INTERNAL]
    assert sorted(set(names)) == ["POST /x http receive", "POST /x http send"]
    assert all(
        span.parent and span.parent.span_id == quiet.server.context.span_id
        for span in quiet.spans
        if span.kind is SpanKind.INTERNAL
    )


def test_raising_hooks(quiet: Wire) -> None:
    """
    A hook that raises breaks nothing.
    """

    def bad(*arguments: Any) -> None:
        raise ValueError(len(arguments))

    app = hello()
    FastAPIInstrumentor.instrument_app(app, bad, bad, bad)
    assert call(app, path="/hello/x").status == 200
    assert (quiet.server.attributes or {})["http.response.status_code"] == 200


@pytest.mark.parametrize(
    ("left_out", "expected"),
    [
        (None, set()),
        ([], {"receive", "send"}),
        (["send"], {"receive"}),
        (["receive"], {"send"}),
        (["receive", "send"], set()),
    ],
)
def test_exclude_spans(quiet: Wire, left_out: Any, expected: set[str]) -> None:
    """
    Unset means none of the internal spans, a list means contrib's without those named, for http and websocket.
    """
    app = fastapi.FastAPI()

    @app.post("/x")
    async def post(body: dict[str, int]) -> None: ...

    @app.websocket("/ws")
    async def ws(websocket: fastapi.WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())

    FastAPIInstrumentor.instrument_app(app, exclude_spans=left_out)
    call(app, "POST", "/x", [(b"content-type", b"application/json")], body=b"{}")
    assert {span.name.split()[-1] for span in quiet.spans} - {"/x"} == expected
    quiet.clear()
    open_socket(app, {"type": "websocket.receive", "text": "x"})
    assert {span.name.split()[-1] for span in quiet.spans} - {"/ws", "close"} == expected


def test_own_tracer_provider(quiet: Wire) -> None:
    """
    ``tracer_provider=`` decides where the spans go, with ids and bridging as ever.
    """
    own: list[ReadableSpan] = []
    app = hello()
    FastAPIInstrumentor.instrument_app(app, tracer_provider=quiet.new_provider(own))
    call(app, path="/hello/x", headers=[(b"x-request-id", UUID.encode())])
    (span,) = own
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == UUID.replace("-", "")
    assert quiet.spans == []


def test_noop_tracer_provider(quiet: Wire) -> None:
    """
    A provider that makes no spans leaves the request its id.
    """
    app = hello()
    FastAPIInstrumentor.instrument_app(app, tracer_provider=trace.NoOpTracerProvider())
    reply = call(app, path="/hello/x", headers=[(b"x-request-id", UUID.encode())])
    assert (reply.status, reply.request_id) == (200, UUID)


def points(reader: InMemoryMetricReader) -> dict[str, list[Any]]:
    """
    Return the data points by metric name; check that none is there twice.
    """
    data: Any = reader.get_metrics_data()
    metrics = [
        metric for resource in data.resource_metrics for scope in resource.scope_metrics for metric in scope.metrics
    ]
    assert len({metric.name for metric in metrics}) == len(metrics)
    found = {metric.name: [metric.unit, *metric.data.data_points] for metric in metrics}
    return dict(found)


def test_metrics(quiet: Wire) -> None:
    """
    Two metrics with their stable names, units and attributes, once, also for what was mounted.
    """
    reader = InMemoryMetricReader()
    app = hello()
    app.mount("/sub", hello())
    FastAPIInstrumentor.instrument_app(app, meter_provider=MeterProvider([reader], shutdown_on_exit=False))
    call(app, path="/hello/x")
    call(app, path="/sub/hello/x")
    call(app, path="/none")
    found = points(reader)
    assert set(found) == {"http.server.request.duration", "http.server.active_requests"}
    unit, *durations = found["http.server.request.duration"]
    assert unit == "s"
    common = {"http.request.method": "GET", "url.scheme": "http", "network.protocol.version": "1.1"}
    assert sorted((dict(point.attributes) for point in durations), key=str) == sorted(
        [
            {**common, "http.route": "/hello/{name}", "http.response.status_code": 200},
            {**common, "http.route": "/sub/hello/{name}", "http.response.status_code": 200},
            {**common, "http.response.status_code": 404},
        ],
        key=str,
    )
    assert [point.count for point in durations] == [1, 1, 1]
    assert list(durations[0].explicit_bounds) == [
        0.005,
        0.01,
        0.025,
        0.05,
        0.075,
        0.1,
        0.25,
        0.5,
        0.75,
        1,
        2.5,
        5,
        7.5,
        10,
    ]
    unit, active = found["http.server.active_requests"]
    assert (unit, active.value, dict(active.attributes)) == (
        "{request}",
        0,
        {"http.request.method": "GET", "url.scheme": "http"},
    )


def test_metrics_of_failures(quiet: Wire) -> None:
    """
    A failed request is counted with its error type, an excluded one is not lost.
    """
    reader = InMemoryMetricReader()
    app = hello()

    @app.get("/boom")
    async def boom() -> None:
        raise KeyError("x")

    FastAPIInstrumentor.instrument_app(app, meter_provider=MeterProvider([reader], shutdown_on_exit=False))
    call(app, path="/boom")
    _, point = points(reader)["http.server.request.duration"]
    assert point.attributes["error.type"] == "KeyError"
    assert point.attributes["http.response.status_code"] == 500


@pytest.mark.parametrize("parent", [True, False])
def test_excluded_urls(quiet: Wire, parent: bool) -> None:
    """
    An excluded route has no span and keeps its ids; the caller's trace goes on, and nothing below becomes an orphan.
    """
    app = hello()

    @app.get("/child")
    async def child() -> list[str]:
        with trace.get_tracer("user").start_as_current_span("child"):
            return list(log_ids())

    FastAPIInstrumentor.instrument_app(app, excluded_urls="health,child")
    headers = [(b"x-request-id", UUID.encode()), *([(b"traceparent", PARENT)] if parent else [])]
    reply = call(app, path="/health", headers=headers)
    ids = json.loads(reply.body)
    assert reply.request_id == ids[3] == UUID
    assert ids[0] == (TRACE if parent else UUID.replace("-", ""))
    assert quiet.spans == []
    ids = json.loads(call(app, path="/child", headers=headers).body)
    assert ids[0] == (TRACE if parent else UUID.replace("-", ""))
    # Below a sampled caller, a span is that caller's child; without one, nothing is exported.
    assert [span.name for span in quiet.spans] == (["child"] if parent else [])
    call(app, path="/healthy")
    assert quiet.server.name == "GET"


def test_excluded_host_is_not_a_path(quiet: Wire) -> None:
    """
    A pattern looks at paths, never at the host; one that begins with http looks at the whole URL.
    """
    app = hello()
    FastAPIInstrumentor.instrument_app(app, excluded_urls="shop,http://shop.example:8080/hello/y")
    call(app, path="/hello/x")
    call(app, path="/hello/y")
    assert [(span.attributes or {})["url.path"] for span in quiet.spans] == ["/hello/x"]


def test_header_capture(quiet: Wire) -> None:
    """
    Named headers become attributes with dashes kept and lists as values; those to sanitise lose their value.
    """
    app = hello()
    FastAPIInstrumentor.instrument_app(
        app,
        http_capture_headers_server_request=["X-Shop-.*", "authorization", "x-request-id"],
        http_capture_headers_server_response=["x-shop", "set-cookie", "x-request-id"],
        http_capture_headers_sanitize_fields=["auth.*", "set-cookie"],
    )
    sent = [
        (b"x-shop-a", b"1"),
        (b"x-shop-a", b"2"),
        (b"authorization", b"Bearer x"),
        (b"other", b"3"),
        (b"x-request-id", b"42"),
    ]
    call(app, path="/hello/x", headers=sent)
    values = quiet.server.attributes or {}
    captured = {key: tuple(value) for key, value in values.items() if ".header." in key}  # type: ignore[arg-type]
    assert captured == {
        "http.request.header.x-shop-a": ("1", "2"),
        "http.request.header.authorization": ("[REDACTED]",),
        "http.request.header.x-request-id": ("42",),
        "http.response.header.x-shop": ("1",),
        "http.response.header.set-cookie": ("[REDACTED]",),
        "http.response.header.x-request-id": ("42",),
    }


def test_header_capture_by_settings(wire: Wire) -> None:
    """
    The settings capture for every application, and no header is captured unasked.
    """
    app = hello()
    call(app, path="/hello/x", headers=[(b"x-shop-a", b"1")])
    assert not [key for key in wire.server.attributes or {} if ".header." in key]
    wire.clear()
    wire.configure(capture_server_request=["x-shop-a"], sanitize_fields=["x-shop.*"])
    call(app, path="/hello/x", headers=[(b"x-shop-a", b"1")])
    assert (wire.server.attributes or {})["http.request.header.x-shop-a"] == ("[REDACTED]",)


def test_refused_id_is_not_captured(quiet: Wire) -> None:
    """
    Header capture does not bring a refused request id back.
    """
    app = hello()
    FastAPIInstrumentor.instrument_app(app, http_capture_headers_server_request=[".*"])
    reply = call(app, path="/hello/x", headers=[(b"x-request-id", b"not valid")])
    assert (quiet.server.attributes or {})["http.request.header.x-request-id"] == (reply.request_id,)


def test_response_propagator(wire: Wire) -> None:
    """
    A response propagator that the application set goes on writing its header.
    """
    set_global_response_propagator(TraceResponsePropagator())  # type: ignore[no-untyped-call]
    try:
        reply = call(hello(), path="/hello/x")
        assert wire.server.context is not None
        assert f"{wire.server.context.trace_id:032x}" in reply.all("traceresponse")[0]
        assert reply.all("x-request-id")
    finally:
        set_global_response_propagator(None)  # type: ignore[no-untyped-call]


def test_settings_in_code_reach_running_applications(wire: Wire) -> None:
    """
    Settings that change reach applications that are covered with all others.
    """
    app = hello()
    wire.configure(response_header="X-Own")
    assert call(app, path="/hello/x").all("x-own")


def test_serving_is_announced_once() -> None:
    """
    The first start-up or request says so, once.
    """
    with wired() as wire:
        said: list[int] = []
        plug.on_serving(lambda: said.append(1))
        app = hello()
        asyncio.run(exchange(app, http_scope("GET", "/hello/x")))
        asyncio.run(exchange(app, http_scope("GET", "/hello/x")))
        assert said == [1]
        assert len(wire.spans) == 2


def test_hooks_are_called_for_unsampled_requests(quiet: Wire) -> None:
    """
    A hook is called for every request, as contrib's are: users do more in them than to set attributes.
    """
    quiet.configure(ratio=0.0)
    seen: list[str] = []
    app = hello()
    FastAPIInstrumentor.instrument_app(
        app, lambda span, scope: seen.append("server"), None, lambda span, scope, message: seen.append(message["type"])
    )
    call(app, path="/hello/x")
    assert seen == ["server", "http.response.start", "http.response.body"]
    assert quiet.spans == []


@pytest.mark.parametrize("where", ["enter", "with_ids", "finish"])
def test_our_failure_is_not_the_applications(quiet: Wire, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    If the edge itself fails, at any point, the request is served and the failure is counted.
    """
    monkeypatch.delenv(guard.STRICT_ENV)

    def broken(*arguments: Any) -> Any:
        raise RuntimeError(len(arguments))

    app = hello()

    @app.websocket("/ws")
    async def ws(websocket: fastapi.WebSocket) -> None:
        await websocket.accept()
        await websocket.close(4000)

    FastAPIInstrumentor.instrument_app(app)
    for module in (_http, _websocket):
        monkeypatch.setattr(module, where, broken)
    assert call(app, path="/hello/x").body == b"x"
    kinds = [message["type"] for message in open_socket(app).messages]
    assert kinds == ["websocket.accept", "websocket.close"]
    assert [name for name in guard.counters() if name.startswith("internal_error.edge.")]


def test_metrics_of_clients_that_left(quiet: Wire) -> None:
    """
    A client that went away is no 200 in metrics either.
    """
    reader = InMemoryMetricReader()
    app = fastapi.FastAPI()

    @app.get("/x")
    async def x(request: fastapi.Request) -> bool:
        return await request.is_disconnected()

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None: ...

    FastAPIInstrumentor.instrument_app(app, meter_provider=MeterProvider([reader], shutdown_on_exit=False))
    asyncio.run(app(http_scope("GET", "/x"), receive, send))
    _, point = points(reader)["http.server.request.duration"]
    assert point.attributes["error.type"] == "client_disconnected"
    assert "http.response.status_code" not in point.attributes


def test_no_answer_at_all(wire: Wire) -> None:
    """
    An application that returns without an answer gets the server's 500, and its span says so.
    """

    async def silent(scope: Any, receive: Any, send: Any) -> None: ...

    app = hello()
    app.mount("/silent", silent)
    call(app, path="/silent/x")
    assert (wire.server.attributes or {})["http.response.status_code"] == 500
    assert (wire.server.attributes or {})["error.type"] == "500"


def test_later_settings_reach_an_application_instrumented_by_itself(quiet: Wire) -> None:
    """
    What a later ``bootstrap(edge="public")`` says holds for an application of ``instrument_app``, with its hooks.
    """
    app = hello()
    named: list[str] = []
    FastAPIInstrumentor.instrument_app(app, server_request_hook=lambda span, scope: named.append(scope["path"]))
    assert call(app, path="/hello/x", headers=[(b"x-request-id", UUID.encode())]).request_id == UUID
    quiet.configure(edge="public")
    assert call(app, path="/hello/y", headers=[(b"x-request-id", UUID.encode())]).request_id != UUID
    assert named == ["/hello/x", "/hello/y"]
