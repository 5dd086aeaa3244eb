"""
What a caller sends is cut where it enters: no span of ours holds more of it than is written down.
"""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.sdk.trace import SpanLimits
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, Router

from otel_correlation import logs
from otel_correlation.edge._record import Record
from otel_correlation.export.sizes import span_bytes
from otel_correlation.policy import DEFAULT
from tests.contract.wire import exchange, http_scope
from tests.unit.logs_pristine import pristine

if TYPE_CHECKING:
    from starlette.requests import Request

    from tests.contract.wire import Wire

LONG = 2_000_000


async def fails(request: Request) -> PlainTextResponse:
    """
    Fail with what the caller sent.
    """
    raise RuntimeError(request.headers["user-agent"])


async def answers(_request: Request) -> PlainTextResponse:
    """
    Answer.
    """
    return PlainTextResponse("x", headers={"x-long": "r" * LONG})


def application() -> FastAPI:
    app = FastAPI()
    app.router.routes += [
        Route("/fails", fails),
        Route("/{rest:path}", answers),
    ]
    return app


def hostile_scope(path: str = "/fails") -> dict[str, Any]:
    scope = http_scope("GET", path, scheme="s" * LONG)
    scope["method"] = "M" * LONG if path != "/fails" else "GET"
    scope["query_string"] = b"a=b&token=" + b"t" * LONG
    scope["client"] = ("c" * LONG, 1)
    scope["http_version"] = "v" * LONG
    scope["headers"] = [
        (b"host", b"h" * LONG),
        (b"user-agent", b"u" * LONG),
        *[(b"x-long", b"x" * LONG)] * 3,
        *[(b"x-%d" % number, b"y" * LONG) for number in range(50)],
    ]
    return scope


def texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [text for part in value for text in texts(part)] if isinstance(value, tuple | list) else []


@pytest.mark.parametrize("path", ["/fails", "/" + "p" * LONG])
def test_nothing_that_a_caller_sends_is_held_whole(wire: Wire, path: str) -> None:
    """
    Address, path, query, agent, method, captured headers and exception texts are cut, marked, and small together.
    """
    wire.configure(capture_server_request=("x-.*",))
    failed = path == "/fails"
    asyncio.run(exchange(application(), hostile_scope(path)))
    span = wire.server
    attributes: Any = span.attributes
    for key, limit in {
        "url.scheme": DEFAULT.scheme,
        "url.query": DEFAULT.query,
        "client.address": DEFAULT.address,
        "server.address": DEFAULT.address,
        "network.protocol.version": DEFAULT.scheme,
        "user_agent.original": DEFAULT.user_agent,
    }.items():
        assert len(attributes[key]) <= limit
        assert "...[cut from 20000" in attributes[key], key
    assert attributes["url.query"].startswith("a=b&token=REDACTED...[cut from 2000010 bytes]")
    assert len(attributes["http.request.header.x-long"]) == 3
    if failed:
        (event,) = [event for event in span.events if event.name == "exception"]
        found: Any = event.attributes
        assert found["exception.message"].endswith("\n...[cut from 2000000 characters]")
        assert "in fails" in found["exception.stacktrace"]
        assert len(found["exception.stacktrace"]) <= DEFAULT.stack
    else:
        assert attributes["http.request.method"] == "_OTHER"
        assert attributes["http.request.method_original"] == "M" * 32 + "...[cut from 2000000 characters]"
        assert attributes["url.path"].endswith("p...[cut from 2000001 characters]")
    assert max(len(text) for value in attributes.values() for text in texts(value)) <= DEFAULT.header
    held = sum(len(text) for value in attributes.values() for text in texts(value))
    assert held < span_bytes(span) < 100_000


def test_what_user_code_puts_on_a_span_is_counted(wire: Wire) -> None:
    """
    A SERVER span is as large as what the application set on it, also in place of what was there.
    """

    async def sets(_request: Request) -> PlainTextResponse:
        trace.get_current_span().set_attribute("mine", "x" * LONG)
        trace.get_current_span().set_attribute("user_agent.original", "y" * LONG)
        return PlainTextResponse("x")

    app = FastAPI()
    app.router.routes.append(Route("/", sets))
    asyncio.run(exchange(app, http_scope("GET", "/")))
    assert 2 * LONG < span_bytes(wire.server) < 2 * LONG + 10_000


def test_captured_headers_of_a_response_are_cut(wire: Wire) -> None:
    """
    What the application answers is held no longer than what a caller sends.
    """
    wire.configure(capture_server_response=("x-long",))
    asyncio.run(exchange(application(), http_scope("GET", "/ok")))
    attributes: Any = wire.server.attributes
    (value,) = attributes["http.response.header.x-long"]
    assert len(value) == DEFAULT.header
    assert value.endswith("r...[cut from 2000000 bytes]")


def test_a_span_keeps_nothing_of_its_request_alive(wire: Wire) -> None:
    """
    A span that waits in the queue holds no scope, no header and no exception.
    """
    asyncio.run(exchange(application(), hostile_scope()))
    gc.collect()
    waiting: list[Any] = [wire.server]
    seen: set[int] = set()
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, type) or type(found).__name__ in ("module", "function", "Tracer"):
            continue
        seen.add(id(found))
        assert not isinstance(found, BaseException | Record)
        if isinstance(found, str | bytes):
            assert len(found) < 100_000
        waiting += gc.get_referents(found)


def test_a_mount_that_a_caller_names_is_cut_in_the_route(wire: Wire) -> None:
    """
    Where a mount's path is the caller's, ``http.route`` and the span's name are bounded, too.
    """
    app = FastAPI()
    app.mount("/{tenant}", Router([Mount("/in", Router([Route("/x", answers)]))]))
    asyncio.run(exchange(app, http_scope("GET", "/" + "t" * LONG + "/in/x")))
    attributes: Any = wire.server.attributes
    assert len(attributes.get("http.route", "")) <= DEFAULT.path
    assert len(wire.server.name) <= DEFAULT.path + 10


@pytest.mark.parametrize("limit", [10, 1_000_000])
def test_the_users_own_limit_wins(wire: Wire, limit: int) -> None:
    """
    With a limit of the user's, smaller or larger than ours, values are the first characters of what came, unmarked.
    """
    wire.provider._span_limits = SpanLimits(max_attribute_length=limit)
    for tracer in wire.provider._tracers.values():
        tracer._span_limits = wire.provider._span_limits
    wire.configure(capture_server_request=("x-long",))
    asyncio.run(exchange(application(), hostile_scope()))
    attributes: Any = wire.server.attributes
    assert attributes["user_agent.original"] == "u" * limit
    assert attributes["http.request.header.x-long"][0] == "x" * limit
    assert attributes["server.address"] == "h" * limit
    assert attributes["url.query"] == ("a=b&token=REDACTED"[:limit])
    (event,) = [event for event in wire.server.events if event.name == "exception"]
    found: Any = event.attributes
    assert found["exception.message"] == "u" * limit


def test_the_summary_line_is_cut(wire: Wire) -> None:
    """
    The one line of a request has the path and the method as the span has them.
    """
    with pristine() as lines:
        logs.install(wire.settings)
        logs.settle()
        asyncio.run(exchange(FastAPI(), hostile_scope("/" + "p" * LONG)))
        printed = lines.getvalue()
    assert "ppp...[cut from 2000001 characters]" in printed
    assert "MMM...[cut from 2000000 characters]" in printed
    assert len(printed) < 3 * DEFAULT.path
