"""
The page in a real browser: hostile telemetry is text, and the story can be read.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest

from otel_correlation.local import LocalServer
from tests.local_payloads import REQUEST_ID, TRACE_ID, checkout, exception, log, span

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from otel_correlation.stores import Json

pytestmark = pytest.mark.needs("browser")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=3000",
    "--dump-dom",
]


@pytest.fixture
def local() -> Iterator[LocalServer]:
    with LocalServer(port=0) as running:
        yield running


@pytest.fixture
def page(chromium: str, local: LocalServer, tmp_path: Path) -> Callable[[str], str]:
    """
    Returns the document as the browser has it once scripts have run.
    """

    def dump(route: str) -> str:
        command = [chromium, *FLAGS, f"--user-data-dir={tmp_path}", f"{local.url}/#{route}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    return dump


def test_the_story_is_on_the_page(local: LocalServer, page: Callable[[str], str]) -> None:
    """
    The id leads to the request, the cause, a bar for every span and the log lines of all services.
    """
    local.store.add(checkout().spans, checkout().logs).result()
    document = page("/find/" + quote(REQUEST_ID, safe=""))
    for text in (
        "POST /checkout 502",
        TRACE_ID,
        "Cause",
        "/srv/inventory.py:24 in days_left",
        "reserving 1 of 25 x chair",
    ):
        assert text in document
    assert document.count('class="bar failed"') == 5
    assert f"<title>{REQUEST_ID} · otel-correlation</title>" in document
    assert REQUEST_ID in page("/")


def test_hostile_telemetry_is_text(local: LocalServer, page: Callable[[str], str]) -> None:
    """
    Markup in any field is shown and not run: no element of it is in the document, and the title stays ours.
    """
    evil = "<img src=x onerror=\"document.title='OWNED'\"><script>document.title='OWNED'</script><svg onload=alert(1)>\u202e"
    local.store.add(
        (
            replace(
                span("a", "", evil, evil, "SERVER", (0, 1), failed=True, status_message=evil),
                attributes={
                    evil: evil,
                    "request_id": evil,
                    "http.request.method": evil,
                    "http.response.status_code": evil,
                },
                events=(exception(1, evil, evil, evil),),
            ),
        ),
        (log(0, evil, evil, severity=evil, attributes={"exception.type": evil, "exception.stacktrace": evil}),),
    ).result()
    for route in ("/", f"/trace/{TRACE_ID}", "/find/" + quote(evil, safe="")):
        document = page(route)
        assert "&lt;img src=x" in document, route
        assert re.findall(r"<(?:img|svg)|<script(?! src=\"/viewer.js\")|<title>OWNED", document) == [], route
        assert "\u202e" not in document.partition("<main")[2], route


def test_attributes_that_are_no_words_leave_the_page_standing(local: LocalServer, page: Callable[[str], str]) -> None:
    """
    A map whose own ``toString`` is no function, a list and null in every attribute that the page reads: all is shown.
    """
    names = ("http.request.method", "http.route", "url.path", "url.full", "http.response.status_code")
    values: tuple[Json, ...] = ({"toString": 1, "valueOf": 1}, [{"toString": 1}], None, True, {"__proto__": None})
    for number, value in enumerate(values, start=1):
        trace_id = f"{number:032x}"
        attributes: dict[str, Json] = dict.fromkeys(names, value)
        told: dict[str, Json] = {"exception.type": value, "exception.message": value, "exception.stacktrace": value}
        event = replace(exception(1, "x", "y", "z"), attributes=told)
        server = span("a", "", "s", f"GET /{number}", "SERVER", (0, 2), trace_id=trace_id, failed=True)
        call = span("b", "a", "s", "GET", "CLIENT", (0, 1), trace_id=trace_id)
        local.store.add(
            (
                replace(server, attributes={"request_id": "one-id-for-all", **attributes}, events=(event,)),
                replace(call, attributes=attributes),
            ),
            (replace(log(0, "s", f"line {number}", attributes=told), trace_id=trace_id),),
        ).result()
    for route in ("/", "/find/one-id-for-all"):
        document = page(route)
        assert "No answer from the server" not in document, route
        assert all(f"GET /{number}" in document for number in range(1, 6)), route
