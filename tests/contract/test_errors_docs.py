"""
The pages about errors say what happens.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

from tests.contract.wire import TRACE, call

if TYPE_CHECKING:
    from tests.contract.wire import Reply, Wire

HOW_TO = Path(__file__).parents[2] / "docs/how-to"


def blocks(page: str, language: str) -> list[str]:
    """
    Return the code blocks of a page.
    """
    return re.findall(rf"```{language}\n(.*?)```", (HOW_TO / page).read_text(), re.DOTALL)


def app_of(page: str) -> FastAPI:
    """
    Run the only code block of a page, and return the application that it makes.
    """
    (code,) = blocks(page, "python")
    names: dict[str, Any] = {"__name__": "page"}
    exec(code, names)
    app: FastAPI = names["app"]
    return app


class Item(BaseModel):
    """
    What is posted.
    """

    price: int


def with_routes(app: FastAPI) -> FastAPI:
    """
    Add what fails in each way.
    """

    async def boom() -> None:
        raise ValueError("hunter2")

    async def full() -> None:
        raise HTTPException(503, "hunter2", {"retry-after": "7"})

    async def post(item: Item) -> None: ...

    app.add_api_route("/boom", boom)
    app.add_api_route("/full", full)
    app.add_api_route("/items", post, methods=["POST"])
    return app


def test_problem_details_take_twelve_lines() -> None:
    """
    The example is no longer than it says.
    """
    (code,) = blocks("problem-details.md", "python")
    assert len([line for line in code.splitlines() if line]) == 12


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/items", 405),
        ("POST", "/items", 422),
        ("GET", "/full", 503),
        ("GET", "/boom", 500),
    ],
)
def test_problem_details_name_both_ids(wire: Wire, method: str, path: str, status: int) -> None:
    """
    Every error has a body by RFC 9457 with the ids of its request, and nothing of the exception's text.
    """
    app = with_routes(app_of("problem-details.md"))
    headers = [(b"x-request-id", b"order-7"), (b"traceparent", f"00-{TRACE}-b7ad6b7169203331-01".encode())]
    reply = call(app, method, path, headers, body=b'{"price": "hunter2"}')
    assert (reply.status, reply.request_id) == (status, "order-7")
    assert reply.all("content-type") == ["application/problem+json"]
    body = json.loads(reply.body)
    assert (body["status"], body["request_id"], body["trace_id"]) == (status, "order-7", TRACE)
    assert b"hunter2" not in reply.body
    assert reply.all("retry-after") == (["7"] if status == 503 else [])
    assert reply.all("allow") == (["POST"] if status == 405 else [])
    if status == 500:
        (shown,) = blocks("problem-details.md", "json")
        assert json.loads(shown) == body
        assert len(wire.server.events) == 1
        assert isinstance(reply.error, ValueError)


def test_the_fields_of_a_422_are_what_the_page_shows(wire: Wire) -> None:
    """
    The example of errors.md is recorded as the page says.
    """
    (sent,) = re.findall(r"^`(\{.*\})` is recorded", (HOW_TO / "errors.md").read_text(), re.MULTILINE)
    (shown,) = blocks("errors.md", "json")
    reply: Reply = call(
        app_of("errors.md"), "POST", "/items", [(b"content-type", b"application/json")], body=sent.encode()
    )
    assert reply.status == 422
    found: Any = (wire.server.attributes or {})["otel_correlation.validation_errors"]
    assert list(found) == json.loads(shown)
