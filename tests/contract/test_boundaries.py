"""
Failures at the edges of the edge: what breaks in telemetry, or is unusual around it, costs no span and no id.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections import UserDict
from typing import TYPE_CHECKING, Any

import fastapi.routing
import starlette.responses
import starlette.routing
from fastapi import FastAPI
from starlette.routing import Route

from otel_correlation import guard
from otel_correlation.edge import _fastapi as plug
from otel_correlation.edge import serve
from otel_correlation.tracer import Tracer
from tests.contract.wire import call, exchange, http_scope

if TYPE_CHECKING:
    import pytest

    from tests.contract.wire import Wire


class SpeechlessError(Exception):
    """
    An exception whose text cannot be made.
    """

    def __str__(self) -> str:
        message = "no text"
        raise RuntimeError(message)


def build() -> FastAPI:
    app = FastAPI()

    @app.get("/x")
    async def x() -> dict[str, str]:
        return {}

    return app


def test_scope_that_is_used_twice(wire: Wire) -> None:
    """
    A wrapper that calls the application again with the same scope gets a whole second request.
    """
    app = build()
    scope = http_scope("GET", "/x")

    async def run() -> list[Any]:
        return [await exchange(app, scope), await exchange(app, scope)]

    first, second = asyncio.run(run())
    assert second.request_id == first.request_id
    assert len(wire.servers) == 2


def test_exception_without_text_ends_the_span(wire: Wire) -> None:
    """
    An exception whose ``__str__`` raises is recorded by its type, and the span ends.
    """
    app = FastAPI()

    @app.get("/x")
    async def x() -> None:
        raise SpeechlessError

    reply = call(app, path="/x")
    assert type(reply.error) is SpeechlessError
    assert str((wire.server.attributes or {})["error.type"]).endswith("SpeechlessError")


def test_route_that_cannot_be_matched_ends_the_span(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Where middleware answers and a route's own ``matches`` raises, the request has its span all the same.
    """
    monkeypatch.delenv(guard.STRICT_ENV, raising=False)

    class Odd(Route):
        def matches(self, scope: Any) -> Any:
            message = "no match"
            raise RuntimeError(message)

    async def endpoint(request: Any) -> Any:
        return request

    app = FastAPI(routes=[Odd("/x", endpoint)])

    @app.middleware("http")
    async def answer(request: Any, call_next: Any) -> Any:
        del request, call_next
        return starlette.responses.Response()

    reply = call(app, path="/x")
    assert reply.status == 200
    assert reply.request_id
    assert wire.server.name == "GET"


def test_metrics_that_fail_cost_no_span(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A meter that raises takes neither the id from the response nor the span.
    """
    monkeypatch.delenv(guard.STRICT_ENV, raising=False)

    class Broken:
        def started(self, *arguments: Any) -> None:
            raise RuntimeError

        finished = started

    app = build()
    config = plug._plug.everywhere
    assert config is not None
    config.metrics = Broken()
    assert call(app, path="/x").request_id
    assert wire.server.name == "GET /x"


def test_state_that_is_no_dict_is_kept(wire: Wire) -> None:
    """
    A server's state of another mapping type keeps what the lifespan put there.
    """
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        del receive, send
        seen.append(dict(scope["state"]))

    config = plug._plug.everywhere
    assert config is not None
    asyncio.run(serve(config, app, http_scope(state=UserDict({"pool": 1})), None, None))  # type: ignore[arg-type]
    assert seen[0]["pool"] == 1
    assert seen[0]["request_id"]
    assert len(wire.servers) == 1


def test_failed_request_leaves_no_cycle(wire: Wire) -> None:
    """
    What a request that failed held is free without the garbage collector.
    """

    class Held:
        pass

    gone: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        del scope, receive, send
        held = Held()
        gone.append(weakref.ref(held))
        raise ValueError

    async def run() -> None:
        config = plug._plug.everywhere
        assert config is not None
        with contextlib.suppress(ValueError):
            await serve(config, app, http_scope(), None, None)  # type: ignore[arg-type]

    gc.collect()
    gc.disable()
    try:
        asyncio.run(run())
        assert gone[0]() is None
    finally:
        gc.enable()
    assert len(wire.servers) == 1


def test_renamed_seams_cost_one_line(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """
    Where a newer FastAPI or Starlette renamed what we look at, requests have their spans and one line says what is gone.
    """
    plug.deactivate()
    monkeypatch.delattr(starlette.routing.Mount, "handle")
    monkeypatch.delattr(fastapi.routing, "iter_route_contexts")
    wire.configure()
    plug.instrument_everything()
    app = build()
    assert call(app, path="/x").request_id
    assert wire.server.name == "GET /x"
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if "Mount.handle, iter_route_contexts" in line]) == 1


def test_a_start_that_fails_leaves_no_mark(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Where a span cannot be started, the application answers; the same scope, called again, is a request like any other.
    """
    monkeypatch.delenv(guard.STRICT_ENV, raising=False)
    app = build()
    scope = http_scope("GET", "/x")

    def fail(*_arguments: Any, **_options: Any) -> Any:
        message = "no span"
        raise RuntimeError(message)

    async def run() -> list[Any]:
        with monkeypatch.context() as patched:
            patched.setattr(Tracer, "start", fail)
            first = await exchange(app, scope)
        return [first, await exchange(app, scope)]

    first, second = asyncio.run(run())
    assert (first.status, second.status) == (200, 200)
    assert second.request_id
    assert len(wire.servers) == 1
