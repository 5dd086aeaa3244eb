"""
Every form in which a service runs code, by every property that a request has there.

A test's id says it all: ``test_form[bootstrap-uvloop-timer-span parent]`` is the parent of a span that a timer's
callback makes, in a service that calls ``bootstrap()``, on uvloop. Each form is run by two requests at once.
"""

from __future__ import annotations

import json
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from websockets.sync.client import connect

from tests.integration import matrix_app
from tests.integration.otlp_sink import OtlpSink, SinkSpan
from tests.integration.services import DEADLINE_S, Service, clean_environment

pytestmark = pytest.mark.slow

SERVICES = {f"{start}-{loop}": (start, loop) for start in ("zero-code", "bootstrap") for loop in ("asyncio", "uvloop")}
PROPERTIES = ("log line", "span parent", "outbound header", "request id")
TAGS = ("a", "b")

# Paths below /form/ and what probes there, where that is not one probe of the same name.
PATHS: dict[str, tuple[str, ...]] = {
    "endpoint-async": ("endpoint-async",),
    "endpoint-sync": ("endpoint-sync",),
    "dependency-async": ("dependency-async",),
    "dependency-sync": ("dependency-sync",),
    "dependency-yield-async": ("dependency-yield-async", "dependency-yield-async-exit"),
    "dependency-yield-sync": ("dependency-yield-sync", "dependency-yield-sync-exit"),
    "sub-dependency": ("sub-dependency", "over-sub-dependency"),
    "middleware-asgi": ("middleware-asgi",),
    "middleware-base": ("middleware-base",),
    "exception-handler": ("exception-handler",),
    "exception-handler-sync": ("exception-handler-sync",),
    "exception-handler-500": ("exception-handler-500",),
    "background-tasks": ("background-tasks", "background-tasks-sync"),
    "background": ("background",),
    "file-response": ("file-response",),
    "stream-async": ("stream-async",),
    "stream-sync": ("stream-sync",),
    "sse-async": ("sse-async",),
    "sse-sync": ("sse-sync",),
    "mounted-fastapi": ("mounted-fastapi",),
    "mounted-starlette": ("mounted-starlette",),
    **{name: (name,) for name in matrix_app.forms if name not in ("worker-plain", "worker-work")},
}
SOCKETS = ("websocket-receive", "websocket-broadcast")
INSIDE = [*(form for probes in PATHS.values() for form in probes), *SOCKETS]
# Not in a request, however near one is: fields are there and empty, and nothing is sent.
OUTSIDE = {
    "lifespan": None,
    "middleware-above": "middleware-above",
    "middleware-above-after": "middleware-above-after",
    "worker-plain": "worker-plain",
    "pool-outside": None,
    "process-pool-fork-outside": None,
    "process-pool-spawn-outside": None,
}


class Echo:
    """
    A server that answers with the headers that it got.
    """

    def __enter__(self) -> Self:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps({name.lower(): value for name, value in self.headers.items()}).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/"


@dataclass
class Run:
    """
    What one service did.

    Attributes:
        ids: The request id that the test sent, by path and tag.
        answers: The request id of the response, by path and tag.
        lines: The lines of the probes, by form and tag.
        spans: All spans.
        output: Everything that the service printed.
    """

    ids: dict[tuple[str, str], str] = field(default_factory=dict)
    answers: dict[tuple[str, str], str | None] = field(default_factory=dict)
    lines: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)
    spans: list[SinkSpan] = field(default_factory=list)
    output: str = ""

    def ask(self, service: Service, path: str) -> None:
        """
        Send the two requests of a form at once.
        """

        def one(tag: str) -> None:
            rid = self.ids[path, tag] = str(uuid.uuid4())
            headers = {"x-request-id": rid, "accept-encoding": "identity"}
            reply = httpx.get(f"{service.url}/form/{path}/{tag}", headers=headers, timeout=DEADLINE_S)
            self.answers[path, tag] = reply.headers.get("x-request-id")

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(one, TAGS))

    def talk(self, service: Service) -> None:
        """
        Open two WebSockets and send a message of each kind over each.
        """
        met = threading.Barrier(2)

        def one(tag: str) -> None:
            rid = str(uuid.uuid4())
            url = f"ws{service.url.removeprefix('http')}/socket/{tag}"
            with connect(url, additional_headers={"x-request-id": rid}, open_timeout=DEADLINE_S) as socket:
                for form in SOCKETS:
                    self.ids[form, tag] = rid
                    self.answers[form, tag] = socket.response.headers.get("x-request-id") if socket.response else None
                    met.wait(DEADLINE_S)
                    socket.send(form)
                    while socket.recv(DEADLINE_S) != f"done {form}":
                        continue
                met.wait(DEADLINE_S)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(one, TAGS))

    def line(self, form: str, tag: str) -> dict[str, Any]:
        """
        Return the one line of a probe.
        """
        found = self.lines.get((form, tag), [])
        assert len(found) == 1, f"{len(found)} lines of {form} {tag}:\n{self.output[-4000:]}"
        return found[0]

    def probed(self, form: str, tag: str) -> SinkSpan:
        """
        Return the one span of a probe.
        """
        found = [span for span in self.spans if span.name == f"probe {form}" and span.attributes.get("tag") == tag]
        assert len(found) == 1, f"{len(found)} spans of {form} {tag}"
        return found[0]

    def server(self, path: str, tag: str) -> SinkSpan:
        """
        Return the SERVER span of a request (of ``work``, where that is what the identity came from).
        """
        rid = self.ids[path, tag]
        found = [span for span in self.spans if span.kind == "SERVER" and span.attributes.get("request_id") == rid]
        assert len(found) == 1, f"{len(found)} SERVER spans of {path} {tag}"
        return found[0]

    def sent(self, line: dict[str, Any]) -> tuple[str, SinkSpan]:
        """
        Return the trace id that went out, and the CLIENT span that it named.
        """
        _, trace_id, span_id, _ = line["sent"]["traceparent"].split("-")
        (client,) = [span for span in self.spans if span.span_id == span_id]
        return trace_id, client


def run(start: str, loop: str, directory: Path) -> Run:
    """
    Start one service and run every form.
    """
    done = Run()
    with OtlpSink() as sink, Echo() as echo:
        environment = clean_environment(
            OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint,
            OTEL_SERVICE_NAME="matrix",
            OTEL_BSP_MAX_QUEUE_SIZE="20000",
            MATRIX_ECHO=echo.url,
            PYTHONPATH=str(Path(matrix_app.__file__).parent),
            **({"MATRIX_BOOTSTRAP": "1"} if start == "bootstrap" else {}),
        )
        command = ["uvicorn", "matrix_app:served", "--port", "{port}", "--loop", loop]
        if start == "zero-code":
            command.insert(0, "opentelemetry-instrument")
        with Service(command, directory, environment) as service:
            for path in (*PATHS, "exception-above", "worker-work", *filter(None, OUTSIDE.values())):
                done.ask(service, path)
            done.talk(service)
            httpx.post(f"{service.url}/release", timeout=DEADLINE_S)
            service.stop()
            done.output = service.output()
            for text in service.stdout().splitlines():
                if text.startswith("MATRIX "):
                    line = json.loads(text.removeprefix("MATRIX "))
                    done.lines.setdefault((line["form"], line["tag"]), []).append(line)
        done.spans = list(sink.spans)
    return done


_runs: dict[str, Run] = {}


@pytest.fixture(params=SERVICES)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """
    What one of the four services did; each is started once, in whatever order the tests come.
    """
    name = request.param
    if name not in _runs:
        _runs[name] = run(*SERVICES[name], tmp_path_factory.mktemp(name))
    return _runs[name]


PATH_OF = {form: path for path, probes in PATHS.items() for form in probes} | {form: form for form in SOCKETS}


@pytest.mark.parametrize("cell", PROPERTIES)
@pytest.mark.parametrize("form", INSIDE)
def test_form(ran: Run, form: str, cell: str) -> None:
    """
    In every form of execution a request's line, span, outbound call and ``request_id()`` are its own.
    """
    path = PATH_OF[form]
    for tag in TAGS:
        expected = ran.ids[path, tag]
        trace_id = uuid.UUID(expected).hex
        line = ran.line(form, tag)
        server = ran.server(path, tag)
        if cell == "log line":
            assert line["request_id"] == expected
            assert line["trace_id"] == trace_id
            assert line["span_id"] == server.span_id
            assert line["trace_flags"] == "01"
            assert line["service_name"] == "matrix"
        elif cell == "span parent":
            probe = ran.probed(form, tag)
            assert (probe.trace_id, probe.parent_span_id) == (trace_id, server.span_id)
            assert probe.attributes["request_id"] == expected
        elif cell == "outbound header":
            sent, client = ran.sent(line)
            assert line["sent"]["x-request-id"] == expected
            assert sent == trace_id
            assert client.parent_span_id == server.span_id
        else:
            assert line["seen"] == expected
            assert ran.answers[path, tag] == expected


@pytest.mark.parametrize("cell", PROPERTIES)
@pytest.mark.parametrize("form", OUTSIDE)
def test_outside(ran: Run, form: str, cell: str) -> None:
    """
    Outside of a request the fields are there and empty, spans are roots and calls carry no request id.
    """
    for tag in TAGS:
        line = ran.line(form, tag)
        if cell == "log line":
            assert [line[name] for name in matrix_app.FIELDS] == ["", "", "", "", "matrix"]
        elif cell == "span parent":
            probe = ran.probed(form, tag)
            assert probe.parent_span_id == ""
            assert "request_id" not in probe.attributes
        elif cell == "outbound header":
            _, client = ran.sent(line)
            assert client.parent_span_id == ""
            assert "x-request-id" not in line["sent"]
        else:
            assert line["seen"] is None


def test_an_exception_carries_the_ids_to_wrappers_above(ran: Run) -> None:
    """
    A line with the exception of a request has the request's ids where its context is gone, through ``__cause__``, too.
    """
    for tag in TAGS:
        expected = ran.ids["exception-above", tag]
        line = ran.line("exception-above", tag)
        assert line["request_id"] == expected
        assert line["trace_id"] == uuid.UUID(expected).hex
        assert line["span_id"] == ran.server("exception-above", tag).span_id


@pytest.mark.parametrize("cell", PROPERTIES)
def test_work_in_a_long_lived_task(ran: Run, cell: str) -> None:
    """
    A worker that was started at start-up has an identity inside ``work``: here, the request id that it was told.
    """
    for tag in TAGS:
        expected = ran.ids["worker-work", tag]
        line = ran.line("worker-work", tag)
        (work,) = [span for span in ran.spans if span.name == "tick" and span.attributes["request_id"] == expected]
        if cell == "log line":
            assert (line["request_id"], line["span_id"]) == (expected, work.span_id)
            assert line["trace_id"] == work.trace_id == uuid.UUID(expected).hex
        elif cell == "span parent":
            assert ran.probed("worker-work", tag).parent_span_id == work.span_id
            assert (work.kind, work.parent_span_id) == ("INTERNAL", "")
        elif cell == "outbound header":
            assert line["sent"]["x-request-id"] == expected
            assert ran.sent(line)[1].parent_span_id == work.span_id
        else:
            assert line["seen"] == expected


def test_nothing_went_wrong_beside(ran: Run) -> None:
    """
    No form leaves a warning, a logging error or an internal error behind.
    """
    assert "Logging error" not in ran.output
    assert "Telemetry failed" not in ran.output
    assert "was created in a different Context" not in ran.output
    assert "Failed to detach context" not in ran.output
