"""
PostgreSQL, Redis and other HTTP clients through their official instrumentations, beside our distribution, for real.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.otlp_sink import OtlpSink, SinkSpan
from tests.stack.conftest import MACHINE
from tests.stack.harness import Collector, Jaeger, Machine, Process, eventually, get
from tests.stack.servers import Postgres, Redis

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

pytestmark = pytest.mark.needs("collector", "jaeger", "servers")

APPS = Path(__file__).parent / "apps"
PLANTED = f"hunter{1 + 1}-planted"
# Whom the application asks, and the instrumentations that tell of it.
ASKED = {
    "sqlalchemy": {"sqlalchemy", "psycopg"},
    "sqlalchemy-async": {"sqlalchemy", "asyncpg"},
    "asyncpg": {"asyncpg"},
    "psycopg": {"psycopg"},
    "redis": {"redis"},
    "redis-sync": {"redis"},
}
SERVER, CLIENT, ERROR = "SERVER", "CLIENT", 2


def request_id(path: str) -> str:
    """
    Return a request id that names its own trace.
    """
    return f"databases-{re.sub(r'[^a-z]+', '-', path.partition('?')[0])}-0123456789"


@dataclass(slots=True)
class Stack:
    """
    The service and what stands behind it.
    """

    machine: Machine
    programs: Path
    postgres: Postgres
    redis: Redis
    sink: OtlpSink
    url: str = ""
    process: Process | None = None

    def start(self, **environment: str) -> None:
        """
        Start the service as a user does who knows of the variables only.
        """
        port = self.machine.port()
        self.url = f"http://127.0.0.1:{port}"
        command = [str(self.programs / "opentelemetry-instrument"), "uvicorn", "databases:app", f"--port={port}"]
        variables = {
            "PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}",
            "POSTGRES_URL": self.postgres.url(),
            "REDIS_URL": self.redis.url,
            "PEER_URL": self.url,
            "OTEL_SERVICE_NAME": "databases",
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.sink.endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        }
        self.process = self.machine.start("databases", command, variables | environment, APPS)
        eventually("the service", lambda: get(f"{self.url}/echo").status_code == 200, while_running=[self.process])

    def ask(self, path: str) -> httpx.Response:
        """
        Return the answer to a request that brings its id.
        """
        return get(f"{self.url}/{path}", headers={"X-Request-ID": request_id(path)})

    def spans(self, path: str) -> list[SinkSpan]:
        """
        Return every span of this path's request, once its SERVER span, the last to end, has arrived.
        """
        route = f"GET /{path.partition('?')[0]}"
        wanted = request_id(path)

        def mine() -> list[SinkSpan]:
            return [span for span in list(self.sink.spans) if span.attributes.get("request_id") == wanted]

        def root() -> SinkSpan | None:
            return next((span for span in mine() if span.name == route), None)

        assert self.sink.wait(lambda: root() is not None), f"no SERVER span of {route}"
        found = root()
        assert found is not None
        # What ended before the SERVER span was queued before it, but may be in a batch that came later.
        assert self.sink.wait(lambda: len({span.span_id for span in mine()}) > 1)
        return [span for span in mine() if span.trace_id == found.trace_id]


@pytest.fixture(scope="module")
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, libraries: Path) -> Iterator[Stack]:
    """
    One service for all tests that leave it as it is.
    """
    machine = request.node.stash[MACHINE] = Machine(tmp_path_factory.mktemp("databases"))
    try:
        postgres, redis = Postgres(machine), Redis(machine)
        postgres.start()
        redis.start()
        with OtlpSink() as sink:
            stack = Stack(machine, libraries, postgres, redis, sink)
            stack.start()
            yield stack
    finally:
        machine.clean_up()


def scopes(spans: list[SinkSpan]) -> set[str]:
    """
    Return the libraries that the CLIENT spans tell of.
    """
    return {span.scope.removeprefix("opentelemetry.instrumentation.") for span in spans if span.kind == CLIENT}


@pytest.mark.parametrize("path", ASKED)
def test_what_the_official_instrumentations_tell_is_in_the_requests_trace(stack: Stack, path: str) -> None:
    """
    Every query's span is below the SERVER span, carries the request id, and has the statement without its parameters.
    """
    answer = stack.ask(f"{path}?token={PLANTED}")
    assert answer.json() == PLANTED
    assert answer.headers["X-Request-ID"] == request_id(path)
    spans = stack.spans(path)
    assert scopes(spans) == ASKED[path]
    known = {span.span_id for span in spans}
    (server,) = [span for span in spans if span.kind == SERVER]
    for span in spans:
        assert span.trace_id == server.trace_id
        assert span.attributes["request_id"] == request_id(path)
        assert span is server or span.parent_span_id in known
    assert any("SELECT" in span.attributes.get("db.statement", "") for span in spans) or "redis" in path
    assert PLANTED not in repr(spans)


@pytest.mark.parametrize("path", ["requests", "aiohttp"])
def test_other_clients_send_the_trace_and_the_request_id(stack: Stack, path: str) -> None:
    """
    A call through requests or aiohttp carries the CLIENT span's traceparent and the request id; the callee continues.
    """
    came = stack.ask(path).json()
    assert came["x-request-id"] == request_id(path)
    spans = stack.spans(path)
    (client,) = [span for span in spans if span.kind == CLIENT]
    assert came["traceparent"].split("-")[1:3] == [client.trace_id, client.span_id]
    assert client.attributes["request_id"] == request_id(path)
    assert stack.sink.wait(lambda: any(span.parent_span_id == client.span_id for span in list(stack.sink.spans)))


def test_without_the_sdk_other_clients_send_the_request_id(stack: Stack) -> None:
    """
    With OTEL_SDK_DISABLED a call through requests or aiohttp carries the request id and no trace, as one through httpx does.
    """
    disabled = replace(stack)
    disabled.start(OTEL_SDK_DISABLED="true")
    for path in ("requests", "aiohttp"):
        came = disabled.ask(path).json()
        assert came["x-request-id"] == request_id(path)
        assert "traceparent" not in came


@pytest.mark.parametrize("path", ["sqlalchemy", "sqlalchemy-async", "asyncpg", "psycopg", "null", "redis"])
def test_a_password_that_a_database_quotes_is_nowhere(stack: Stack, path: str) -> None:
    """
    The application answers its own 500; neither a span nor a line holds the value that made the statement fail.
    """
    answer = stack.ask(f"leak/{path}?password={PLANTED}")
    assert (answer.status_code, answer.json()["request_id"]) == (500, request_id(f"leak/{path}"))
    spans = stack.spans(f"leak/{path}")
    assert [span.name for span in spans if span.kind == CLIENT and span.status_code == ERROR]
    (server,) = [span for span in spans if span.kind == SERVER]
    assert server.status_code == ERROR
    (event,) = server.events
    assert event.attributes["exception.type"].endswith(answer.json()["error"])
    assert "REDACTED" in repr(spans)
    assert PLANTED not in repr(spans)
    assert stack.process is not None
    log = stack.process.log
    # The server's own line is the last, and later than the answer.
    mine = f'"request_id": "{request_id(f"leak/{path}")}"'
    failed = "Exception in ASGI application"
    eventually("its line", lambda: [one for one in log.read_text().splitlines() if mine in one and failed in one])
    lines = log.read_text()
    assert PLANTED not in lines


COMMENT = re.compile(r"SELECT .*/\*traceparent='00-([0-9a-f]{32})-([0-9a-f]{16})-0[0-3]'\*/")


def _log_with(process: Process, trace_id: str) -> str | None:
    """
    Return what PostgreSQL has logged, once a statement of this trace is there.
    """
    log = process.log.read_text()
    return log if trace_id in dict(COMMENT.findall(log)) else None


def test_a_statement_tells_the_database_its_trace(stack: Stack, libraries: Path) -> None:
    """
    With one variable PostgreSQL's own log names the trace and the span that each statement of a request belongs to.

    The spans have the stable names where the standard variable asks for them.
    """
    with OtlpSink() as sink:
        commenting = Stack(stack.machine, libraries, stack.postgres, stack.redis, sink)
        commenting.start(OTEL_CORRELATION_SQL_COMMENTS="true", OTEL_SEMCONV_STABILITY_OPT_IN="http,database")
        for path in ("sqlalchemy", "psycopg"):
            commenting.ask(path)
            spans = commenting.spans(path)
            assert stack.postgres.process is not None
            log = eventually("PostgreSQL's line", partial(_log_with, stack.postgres.process, spans[0].trace_id))
            comments = COMMENT.findall(log)
            assert {span for trace, span in comments if trace == spans[0].trace_id} <= {span.span_id for span in spans}
            assert "ot=th" not in log
            texts = [span.attributes["db.query.text"] for span in spans if "db.query.text" in span.attributes]
            assert any(text.startswith("SELECT") for text in texts)
            assert not [span for span in spans if "db.statement" in span.attributes]
        assert commenting.process is not None
        commenting.process.stop()


@pytest.mark.parametrize("path", ASKED)
def test_a_database_that_is_gone_is_the_applications_own_error(machine: Machine, libraries: Path, path: str) -> None:
    """
    With PostgreSQL or Redis killed, the user sees the application's 500 with the id, the spans say error, and it heals.
    """
    postgres, redis = Postgres(machine), Redis(machine)
    postgres.start()
    redis.start()
    gone = redis if "redis" in path else postgres
    with OtlpSink() as sink:
        stack = Stack(machine, libraries, postgres, redis, sink)
        stack.start()
        assert stack.ask(path).status_code == 200
        gone.stop()
        answer = get(f"{stack.url}/{path}", headers={"X-Request-ID": "while-it-was-gone"})
        assert answer.status_code == 500
        assert answer.json()["request_id"] == "while-it-was-gone" == answer.headers["X-Request-ID"]
        assert stack.sink.wait(lambda: any(span.status_code == ERROR and span.kind == SERVER for span in sink.spans))
        (server,) = [span for span in sink.spans if span.status_code == ERROR and span.kind == SERVER]
        (event,) = server.events
        assert server.attributes["request_id"] == "while-it-was-gone"
        assert event.attributes["exception.type"].endswith(answer.json()["error"])
        assert not re.search(r"otel_correlation/(?!edge/)", event.attributes["exception.stacktrace"])
        gone.start()
        eventually("the service to heal", lambda: stack.ask(path).status_code == 200)
        assert stack.process is not None
        assert "Telemetry failed" not in stack.process.log.read_text()


def test_a_query_is_found_in_jaeger_by_the_request_id(
    machine: Machine, libraries: Path, collector: Collector, jaeger: Jaeger
) -> None:
    """
    Through the real collector, Jaeger shows the statement when asked for the customer's request id.
    """
    postgres, redis = Postgres(machine), Redis(machine)
    postgres.start()
    redis.start()
    with OtlpSink() as unused:
        stack = Stack(machine, libraries, postgres, redis, unused)
        stack.start(**collector.exports("databases"))
        stack.ask("sqlalchemy")
        wanted = {"request_id": request_id("sqlalchemy")}
        names = eventually(
            "the statement in Jaeger",
            lambda: (
                {"SELECT postgres", "GET /sqlalchemy"}
                & (found := {span.name for span in jaeger.search("databases", **wanted)})
                and found
            ),
        )
        assert "SELECT" in names or eventually(
            "the driver's span", lambda: "SELECT" in {span.name for span in jaeger.search("databases", **wanted)}
        )
