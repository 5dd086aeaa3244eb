"""
A 422 says which fields failed, by location and type, and never what was sent.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
import pytest
from fastapi import APIRouter, Depends, FastAPI, Header, Query, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.trace import StatusCode
from starlette.middleware.base import BaseHTTPMiddleware

from otel_correlation.edge._validation import describe
from tests.contract.wire import call, open_socket, wired

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.contract.wire import Reply, Wire

SECRET = "hunter2"


class Item(pydantic.BaseModel):
    """
    A line of an order.
    """

    price: int
    kind: Literal["book", "tea"] = "book"


class Book(pydantic.BaseModel):
    """
    One member of a tagged union.
    """

    shape: Literal["book"]
    pages: int


class Tea(pydantic.BaseModel):
    """
    The other member.
    """

    shape: Literal["tea"]
    grams: int


class Order(pydantic.BaseModel):
    """
    What a client posts.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    items: list[Item]
    card: int = pydantic.Field(default=1, validation_alias="cardNumber")
    labels: dict[str, int] = {}
    either: int | list[int] = 0
    thing: Annotated[Book | Tea, pydantic.Field(discriminator="shape")] | None = None


class Filters(pydantic.BaseModel):
    """
    A model of query parameters.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    page: int = 1


class Tokens(pydantic.BaseModel):
    """
    A model of headers.
    """

    x_page: int = 1


async def order(order: Order) -> dict[str, str]:
    """
    Take an order.
    """
    return {}


async def offset(start: int) -> int:
    """
    Stand for a dependency with a parameter of its own.
    """
    return start


async def depends(page: Annotated[int, Depends(offset)]) -> None:
    """
    Depend.
    """


async def filtered(filters: Annotated[Filters, Query()], tokens: Annotated[Tokens, Header()]) -> None:
    """
    Take models of parameters.
    """


def shop() -> FastAPI:
    """
    Return the application.
    """
    app = FastAPI()
    app.add_api_route("/orders", order, methods=["POST"])
    app.add_api_route("/items/{item_id}", depends)
    app.add_api_route("/filtered", filtered)
    return app


def post(app: FastAPI, body: Any, path: str = "/orders") -> Reply:
    """
    Post a body.
    """
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return call(app, "POST", path, [(b"content-type", b"application/json")], body=text)


def failed(wire: Wire) -> list[str]:
    """
    Return what the SERVER span says of the fields, and check that the request is no error of the server.
    """
    span = wire.server
    assert span.status.status_code is StatusCode.UNSET
    assert span.events == ()
    attributes = dict(span.attributes or {})
    assert "error.type" not in attributes
    found: Any = attributes.get("otel_correlation.validation_errors", ())
    assert SECRET not in repr(found)
    return list(found)


BODIES: list[tuple[Any, list[str]]] = [
    ({"items": [{"price": SECRET}]}, ["body.items.0.price: int_parsing"]),
    ({}, ["body.items: missing"]),
    ({"items": [], "cardNumber": SECRET}, ["body.cardNumber: int_parsing"]),
    ({"items": [], SECRET: 1}, ["body.*: extra_forbidden"]),
    ({"items": [], "labels": {SECRET: "x"}}, ["body.labels.*: int_parsing"]),
    ({"items": [{"price": 1, "kind": SECRET}]}, ["body.items.0.kind: literal_error"]),
    ({"items": [], "either": SECRET}, ["body.either.int: int_parsing", "body.either.list: list_type"]),
    ({"items": [], "thing": {"shape": SECRET}}, ["body.thing: union_tag_invalid"]),
    ({"items": [], "thing": {"shape": "tea", "grams": SECRET}}, ["body.thing.tea.grams: int_parsing"]),
    (b'{"items": "' + SECRET.encode(), ["body.10: json_invalid"]),
]


@pytest.mark.parametrize(("body", "wanted"), BODIES)
def test_a_422_names_the_fields(wire: Wire, body: Any, wanted: list[str]) -> None:
    """
    Location and type of each field stand on the SERVER span; a key that the client made up is ``*``.
    """
    assert post(shop(), body).status == 422
    assert failed(wire) == wanted


def test_parameters_are_named_where_they_were_read(wire: Wire) -> None:
    """
    Query, header and dependency parameters are named as the client spells them; a made-up one is ``*``.
    """
    call(shop(), path=f"/items/1?start={SECRET}")
    assert failed(wire) == ["query.start: int_parsing"]
    wire.clear()
    call(shop(), path=f"/filtered?page={SECRET}&{SECRET}=1", headers=[(b"x-page", SECRET.encode())])
    # FastAPI 0.142 spells the header as the model does.
    found = sorted(line.replace("x_page", "x-page") for line in failed(wire))
    assert found == ["header.x-page: int_parsing", "query.*: extra_forbidden", "query.page: int_parsing"]


def mounted() -> FastAPI:
    """
    Return an application with the shop below it.
    """
    app = FastAPI()
    app.mount("/shop", shop())
    return app


def included() -> FastAPI:
    """
    Return an application with the shop's route in a router.
    """
    app, router = FastAPI(), APIRouter()
    router.add_api_route("/orders", order, methods=["POST"])
    app.include_router(router, prefix="/shop")
    return app


def overridden() -> FastAPI:
    """
    Return an application that answers validation errors itself, with a status of its own.
    """
    app = mounted()

    def plain(_request: Any, error: Any) -> JSONResponse:
        return JSONResponse({"count": len(error.errors())}, status_code=400)

    sub: Any = app.routes[-1]
    sub.app.add_exception_handler(RequestValidationError, plain)
    return app


def behind() -> FastAPI:
    """
    Return an application behind middleware that runs it in another task.
    """

    async def passthrough(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    app = mounted()
    app.add_middleware(BaseHTTPMiddleware, dispatch=passthrough)
    return app


@pytest.mark.parametrize("build", [mounted, included, overridden, behind])
def test_the_fields_are_named_whoever_answers(wire: Wire, build: Any) -> None:
    """
    A mounted application, an included router, a handler of the application's own, middleware in front: all the same.
    """
    reply = post(build(), {"items": [{"price": SECRET}]}, "/shop/orders")
    assert reply.status == (400 if build is overridden else 422)
    assert failed(wire) == ["body.items.0.price: int_parsing"]


@pytest.mark.parametrize("denial", [True, False])
def test_a_refused_websocket_names_the_fields(wire: Wire, denial: bool) -> None:
    """
    The handshake that failed in validation says so on its SERVER span.
    """
    app = FastAPI()

    @app.websocket("/ws")
    async def ws(websocket: WebSocket, room: int) -> None:
        await websocket.accept()

    open_socket(app, path=f"/ws?room={SECRET}", denial=denial)
    assert failed(wire) == ["query.room: int_parsing"]


def test_valid_requests_say_nothing(wire: Wire) -> None:
    """
    A valid request has no such attribute, and the next one on the same route has only its own.
    """
    app = shop()
    post(app, {})
    wire.clear()
    assert post(app, {"items": []}).status == 200
    assert failed(wire) == []


def test_many_errors_are_bounded(wire: Wire) -> None:
    """
    However many fields fail, sixteen are named and the rest is counted.
    """
    post(shop(), {"items": [{"price": SECRET}] * 100})
    found = failed(wire)
    assert len(found) == 17
    assert found[-1] == "and 84 more"


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=12,
)
NAMES = {"items", "price", "kind", "cardNumber", "card", "labels", "either", "thing", "shape", "pages", "grams"}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.dictionaries(st.sampled_from(sorted(NAMES)) | st.text(max_size=20), JSONS, max_size=5))
def test_nothing_that_was_sent_is_shown(body: dict[str, Any]) -> None:
    """
    Whatever a client posts, what is shown is made of declared names, positions and types.
    """
    with wired() as wire:
        post(shop(), body)
        lines = failed(wire)
    # The words that stand in every location anyway say nothing about a client that sends one.
    everywhere = {"path", "query", "header", "cookie", "body", "response", "[key]", "return"}
    words = {"*", "int", "list", "book", "tea", *everywhere, *NAMES}
    for line in lines:
        if line.startswith("and "):
            continue
        location, _, kind = line.partition(": ")
        assert kind.replace("_", "").isascii()
        assert all(part in words or part.isdigit() for part in location.split("."))


@pytest.mark.parametrize(
    ("errors", "wanted"),
    [
        ([{"type": "x" * 100, "loc": ("body", SECRET)}], ["body.*: " + "x" * 64]),
        ([{"loc": ["query", 1.5, None, -3]}], ["query.*.*.-3: "]),
        ([{"type": "t", "loc": "body"}], ["body: t"]),
        ([{"type": "t", "loc": range(40)}], [".".join(map(str, range(12))) + "....: t"]),
        ([{}], [": "]),
        ([], []),
    ],
)
def test_odd_errors_are_described(errors: Sequence[Any], wanted: list[str]) -> None:
    """
    Errors that user code made by hand, without a route that is known, are cut and shown as far as that is safe.
    """
    assert list(describe(errors, None)) == wanted
