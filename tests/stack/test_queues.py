"""
Celery and arq over a real Redis: whatever handles a message answers to the id of the request that sent it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.otlp_sink import OtlpSink, SinkSpan
from tests.stack.harness import Machine, Process, eventually, get
from tests.stack.servers import Redis

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

pytestmark = pytest.mark.needs("servers")

APPS = Path(__file__).parent / "apps"
DOCS = Path(__file__).parents[2] / "docs" / "how-to"
PLANTED = f"hunter{1 + 1}-planted"
PUBLISH = """
import celery_app, gc, json, sys
gc.disable()  # As in celery_web.py.
print(json.dumps([celery_app.tell.apply_async(headers=headers).get(timeout=60) for headers in json.load(sys.stdin)]))
"""
ERROR = 2
SERVER, CLIENT, PRODUCER, CONSUMER, INTERNAL = "SERVER", "CLIENT", "PRODUCER", "CONSUMER", "INTERNAL"


def request_id(path: str) -> str:
    """
    Return a request id that names its own trace.
    """
    return f"queues-{re.sub(r'[^a-z]+', '-', path.partition('?')[0])}-0123456789"


@dataclass(slots=True)
class Stack:
    """
    A service, a worker and what stands between them.
    """

    machine: Machine
    programs: Path
    redis: Redis
    sink: OtlpSink
    environment: dict[str, str] = field(default_factory=dict)
    url: str = ""
    web: Process | None = None
    worker: Process | None = None

    def start(self, web: str, worker: tuple[str, ...] = (), *, in_code: str = "", **environment: str) -> None:
        """
        Start both, under ``opentelemetry-instrument`` unless the application does it in code.
        """
        port = self.machine.port()
        self.url = f"http://127.0.0.1:{port}"
        self.environment = {
            "PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}",
            "REDIS_URL": self.redis.url,
            "PEER_URL": self.url,
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.sink.endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            **({"IN_CODE": in_code} if in_code else {}),
            **environment,
        }
        launcher = [] if in_code else [str(self.programs / "opentelemetry-instrument")]
        programs = [str(self.programs / program) for program in ("uvicorn", *worker[:1])]
        self.web = self.machine.start(
            "web",
            [*launcher, programs[0], f"{web}:app", f"--port={port}"],
            {**self.environment, "OTEL_SERVICE_NAME": "web"},
            APPS,
        )
        if worker:
            self.worker = self.machine.start(
                "worker",
                [*launcher, programs[1], *worker[1:]],
                # Polling is not part of any request; see docs/how-to/queues.md.
                {**self.environment, "OTEL_SERVICE_NAME": "worker", "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "redis"},
                APPS,
            )
        eventually("the service", lambda: get(f"{self.url}/openapi.json").is_success, while_running=[self.web])

    def ask(self, path: str) -> httpx.Response:
        """
        Return the answer to a request that brings its id.
        """
        return get(f"{self.url}/{path}", headers={"X-Request-ID": request_id(path)})

    def spans(self, path: str, *names: str) -> list[SinkSpan]:
        """
        Return the spans of this path's request without Redis's own, once as many as ``names`` have arrived under them.
        """
        wanted = request_id(path)

        def mine() -> list[SinkSpan]:
            spans = [span for span in list(self.sink.spans) if span.attributes.get("request_id") == wanted]
            return [span for span in spans if span.scope != "opentelemetry.instrumentation.redis"]

        def arrived() -> bool:
            return sorted(names) == sorted(span.name for span in mine() if span.name in names)

        assert self.sink.wait(arrived, timeout_s=60), f"{names} of {[span.name for span in mine()]}"
        return mine()

    def lines(self, process: Process | None) -> list[dict[str, Any]]:
        """
        Return what a process logged as JSON.
        """
        assert process is not None
        return [json.loads(line) for line in process.log.read_text().splitlines() if line.startswith("{")]

    def line(self, process: Process | None, message: str, **fields: str) -> dict[str, Any]:
        """
        Wait for the line that has this message and these fields.
        """
        return eventually(
            f"the line {message!r}",
            lambda: next(
                (line for line in self.lines(process) if message in line["message"] and fields.items() <= line.items()),
                None,
            ),
        )

    def stop_worker(self) -> None:
        """
        End the worker as a supervisor does.
        """
        assert self.worker is not None
        assert self.worker.stop() == 0


@pytest.fixture
def stack(machine: Machine, libraries: Path) -> Iterator[Stack]:
    """
    A broker and a receiver of spans; the test starts what it needs.
    """
    redis = Redis(machine)
    redis.start()
    with OtlpSink() as sink:
        yield Stack(machine, libraries, redis, sink)


def celery(pool: str = "prefork", *options: str) -> tuple[str, ...]:
    """
    Return the command of a worker.
    """
    return ("celery", "-A", "celery_app", "worker", "-l", "INFO", "-P", pool, "-c", "2", *options)


def by_name(spans: list[SinkSpan], name: str) -> SinkSpan:
    """
    Return the only span of this name.
    """
    (found,) = [span for span in spans if span.name == name]
    return found


def settled(stack: Stack) -> None:
    """
    Wait until Celery's main process has heard of its children's last results.

    Bare Celery, stopped in between, waits half a minute for each child (billiard: ``_ensure_messages_consumed``).
    """
    ping = "import celery_app; assert celery_app.app.control.ping(timeout=20, limit=1)"
    command = [str(stack.programs / "python"), "-c", ping]
    subprocess.run(command, env={**os.environ, **stack.environment}, cwd=APPS, check=True, timeout=120)


@pytest.mark.parametrize(
    ("pool", "in_code"), [("prefork", ""), ("threads", ""), ("solo", ""), ("prefork", "official"), ("prefork", "late")]
)
def test_a_celery_task_has_the_identity_of_the_request_that_called_it(stack: Stack, pool: str, in_code: str) -> None:
    """
    Tasks, retries and chains, called as functions and by name, stay in the trace under the request id, in every pool.
    """
    stack.start("celery_web", celery(pool), in_code=in_code)
    trees = {
        "tell": ["tell"],
        "named": ["tell"],
        "retried": ["retried", "retried"],
        "chain": ["start_chain", "tell", "follow"],
    }
    for path, tasks in trees.items():
        answer = stack.ask(path).json()
        here, there = answer["here"], answer["there"]
        assert here["request_id"] == request_id(path)
        assert all(seen == here for seen in (there if isinstance(there, list) else [there]))
        names = [f"{verb}/celery_app.{task}" for verb in ("apply_async", "run") for task in tasks]
        spans = stack.spans(path, f"GET /{path}", *names)
        known = {span.span_id: span for span in spans}
        for span in spans:
            assert span.trace_id == here["trace_id"]
            assert span.kind == SERVER or span.parent_span_id in known
            if span.name.startswith("run/"):
                assert span.kind == CONSUMER
                assert known[span.parent_span_id].name == span.name.replace("run", "apply_async")
                assert known[span.parent_span_id].kind == PRODUCER
    # The fields that the task bound are on its span and its line; the task's logger, Celery's own, and its main process.
    assert by_name(stack.spans("tell"), "run/celery_app.tell").attributes["user"] == "ada"
    ids = {"request_id": request_id("tell"), "trace_id": by_name(stack.spans("tell"), "GET /tell").trace_id}
    assert stack.line(stack.worker, "telling", **ids)["user"] == "ada"
    assert "args" not in stack.line(stack.worker, "succeeded in", **ids)
    stack.line(stack.worker, "received", **ids)
    settled(stack)
    stack.stop_worker()


def test_a_task_calls_on_under_the_same_ids(stack: Stack) -> None:
    """
    What a task asks of another service carries the trace and the request id; an eager task is below its caller.
    """
    stack.start("celery_web", celery())
    came = stack.ask("call").json()
    assert came["there"]["x-request-id"] == request_id("call")
    assert came["there"]["traceparent"].split("-")[1] == came["here"]["trace_id"]
    eager = stack.ask("eager").json()
    assert eager["here"] == eager["there"]
    spans = stack.spans("eager", "GET /eager", "run/celery_app.tell")
    assert by_name(spans, "run/celery_app.tell").parent_span_id == by_name(spans, "GET /eager").span_id


def test_a_call_outside_of_any_request_begins_an_identity(stack: Stack) -> None:
    """
    What a script, or beat, calls is a trace from the call on, under the trace id as request id.
    """
    stack.start("celery_web", celery("solo"))
    launcher, python = str(stack.programs / "opentelemetry-instrument"), str(stack.programs / "python")
    ended = subprocess.run(
        [launcher, python, "-c", PUBLISH],
        input="[{}]",
        env={**os.environ, **stack.environment, "OTEL_SERVICE_NAME": "script"},
        cwd=APPS,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (there,) = json.loads(ended.stdout.splitlines()[-1])
    assert there["request_id"] == there["trace_id"]

    def both() -> list[SinkSpan]:
        spans = list(stack.sink.spans)
        return [span for span in spans if span.kind in (PRODUCER, CONSUMER) and span.trace_id == there["trace_id"]]

    assert stack.sink.wait(lambda: len(both()) == 2)
    assert {span.attributes["request_id"] for span in both()} == {there["request_id"]}


def test_a_failed_task_says_why_once_and_leaks_nothing(stack: Stack) -> None:
    """
    The task's span has one exception, its type and an error; no argument of the task is in a span or a line.
    """
    stack.start("celery_web", celery())
    assert stack.ask(f"fail?password={PLANTED}").json()["there"] == "ValueErro"
    failed = by_name(stack.spans("fail", "run/celery_app.fail"), "run/celery_app.fail")
    assert (failed.status_code, failed.attributes["error.type"]) == (ERROR, "ValueError")
    assert [event.attributes["exception.type"] for event in failed.events] == ["ValueError"]
    line = stack.line(stack.worker, "raised unexpected", request_id=request_id("fail"))
    assert line["trace_id"] == failed.trace_id
    assert "REDACTED" in line["exception"]
    assert PLANTED not in repr(stack.sink.spans)
    assert stack.worker is not None
    assert PLANTED not in stack.worker.log.read_text()


def test_a_task_that_no_process_brings_to_an_end_has_lines_with_its_ids(stack: Stack) -> None:
    """
    Killed by its time limit, expired, or unknown to the worker: what the worker's main process says of a task has its ids.
    """
    stack.start("celery_web", celery())
    here = stack.ask("killed").json()["here"]
    stack.line(stack.worker, "Hard time limit (1s) exceeded for celery_app.hang", **here)
    assert "exception" in stack.line(stack.worker, "Task handler raised error: TimeLimitExceeded", **here)
    stack.line(stack.worker, "Discarding revoked task: celery_app.tell", **here)
    stack.line(stack.worker, "Received unregistered task of type 'celery_app.unknown'", **here)
    # Whatever the next task of this process is, it is not inside of these.
    assert stack.ask("tell").json()["there"]["request_id"] == request_id("tell")


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_worker_that_stops_loses_no_span(stack: Stack, pool: str) -> None:
    """
    SIGTERM to an idle worker delivers the spans of all its processes, however long they would have waited.
    """
    stack.start("celery_web", celery(pool), OTEL_BSP_SCHEDULE_DELAY="600000")
    for _ in range(4):
        stack.ask("tell")
    settled(stack)
    assert not [span for span in stack.sink.spans if span.kind == CONSUMER]
    stack.stop_worker()
    spans = [span for span in stack.sink.spans if span.kind == CONSUMER]
    assert [span.name for span in spans] == ["run/celery_app.tell"] * 4
    assert {span.attributes["celery.state"] for span in spans} == {"SUCCESS"}


def test_a_task_can_have_a_trace_of_its_own(stack: Stack) -> None:
    """
    With ``OTEL_CORRELATION_MESSAGES=link`` a task is a root that links to its call, and keeps the request id.
    """
    stack.start("celery_web", celery(), OTEL_CORRELATION_MESSAGES="link")
    answer = stack.ask("tell").json()
    assert answer["there"]["request_id"] == request_id("tell")
    assert answer["there"]["trace_id"] != answer["here"]["trace_id"]
    spans = stack.spans("tell", "apply_async/celery_app.tell", "run/celery_app.tell")
    task, call = by_name(spans, "run/celery_app.tell"), by_name(spans, "apply_async/celery_app.tell")
    assert (task.trace_id, task.parent_span_id) == (answer["there"]["trace_id"], "")
    assert task.links == [(call.trace_id, call.span_id)]


@pytest.mark.parametrize(
    ("in_code", "environment", "traced"),
    [
        ("own", {}, True),
        ("", {"OTEL_SDK_DISABLED": "true"}, False),
    ],
)
def test_the_ids_travel_without_the_official_instrumentation(
    stack: Stack, in_code: str, environment: dict[str, str], traced: bool
) -> None:
    """
    Where nobody makes spans of a queue, or of anything, a task and its lines have the ids all the same.
    """
    stack.start("celery_web", celery(), in_code=in_code, **environment)
    for path in ("tell", "named", "retried"):
        answer = stack.ask(path).json()
        assert answer["here"] == answer["there"]
        assert answer["there"]["request_id"] == request_id(path)
        assert bool(answer["there"]["trace_id"]) == traced
    stack.line(stack.worker, "telling", request_id=request_id("tell"))
    assert not [span for span in stack.sink.spans if span.kind in (PRODUCER, CONSUMER)]


def test_a_task_of_a_producer_without_us_has_ids_by_the_contract(stack: Stack) -> None:
    """
    A bare producer's task continues its traceparent, or what its request id leads to, or starts fresh with one warning.
    """
    stack.start("celery_web", celery("solo"))
    alien, span_id, correlated = (
        "4bf92f3577b34da6a3ce929d0e0e4736",
        "00f067aa0ba902b7",
        "f4a2b3c1-dead-beef-0000-aabbccddeeff",
    )
    sent = [
        {},
        {"traceparent": f"00-{alien}-{span_id}-01"},
        {"x-request-id": correlated},
        {"X-Request-ID": correlated, "traceparent": f"00-{alien}-{span_id}-01"},
        {"traceparent": "00-zz"},
        {"traceparent": "x" * 1_000_000, "X-Request-ID": "forged\r\nid"},
        {"traceparent": {"not": "text"}},
    ]
    # The application's module is found in the directory that the worker has, too; nobody instruments this one.
    ended = subprocess.run(
        [str(stack.programs / "python"), "-c", PUBLISH],
        input=json.dumps(sent),
        env={**os.environ, **stack.environment, "OTEL_CORRELATION_ENABLED": "false"},
        cwd=APPS,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    nothing, traceparent, id_only, both, *wrong = json.loads(ended.stdout)
    assert nothing["request_id"] == nothing["trace_id"]
    assert traceparent == {"trace_id": alien, "request_id": alien}
    assert id_only == {"trace_id": correlated.replace("-", ""), "request_id": correlated}
    assert both == {"trace_id": alien, "request_id": correlated}
    for there in wrong:
        assert there["request_id"] == there["trace_id"] != alien
    settled(stack)
    stack.stop_worker()
    warnings = [line["message"] for line in stack.lines(stack.worker) if line["level"] == "WARNING"]
    assert len([text for text in warnings if "could not be used" in text]) == 1
    tasks = [span for span in stack.sink.spans if span.kind == CONSUMER]
    assert [span.parent_span_id for span in tasks[:4]] == ["", span_id, "", span_id]


@pytest.mark.parametrize("path", ["lost", "lost/unhandled"])
def test_a_broker_that_is_gone_is_the_applications_own_error(stack: Stack, path: str) -> None:
    """
    A call that nobody takes raises Celery's own error; its span says so and is not the parent of what follows.
    """
    stack.start("celery_web")
    stack.redis.stop()
    answer = stack.ask(path)
    assert answer.status_code == (200 if path == "lost" else 500)
    assert answer.json()["error"] == "OperationalError"
    assert answer.headers["X-Request-ID"] == request_id(path)
    spans = stack.spans(path, f"GET /{path}", "apply_async/celery_app.tell")
    call, server = by_name(spans, "apply_async/celery_app.tell"), by_name(spans, f"GET /{path}")
    assert (call.kind, call.status_code, call.parent_span_id) == (PRODUCER, ERROR, server.span_id)
    assert call.attributes["error.type"] == "kombu.exceptions.OperationalError"
    assert len(call.events) == 1
    assert server.status_code == (0 if path == "lost" else ERROR)


def arq(settings: str = "WorkerSettings") -> tuple[str, ...]:
    """
    Return the command of a worker.
    """
    return ("arq", f"arq_app.{settings}")


def test_an_arq_job_has_the_identity_of_the_request_that_enqueued_it(stack: Stack) -> None:
    """
    Jobs, their tries, and the jobs that they enqueue stay in the trace under the request id; so do arq's own lines.
    """
    stack.start("arq_web", arq(), OTEL_BSP_SCHEDULE_DELAY="600000")
    assert stack.ask("run/tell").json()["there"]["request_id"] == request_id("run/tell")
    for path, jobs in (("run/retried", 1), ("run/passed_on", 2)):
        assert stack.ask(path).status_code == 200, jobs
    stack.line(stack.worker, "● ", request_id=request_id("run/passed_on"), user="ada")
    # A job is not done when its line is written, and arq would end with status 1.
    eventually("the end of all jobs", lambda: stack.redis.has_none("arq:in-progress:*"))
    stack.stop_worker()
    assert stack.web is not None
    stack.web.stop()
    for path, tree in {
        "run/tell": {"enqueue tell": 1, "run tell": 1},
        "run/retried": {"enqueue retried": 1, "run retried": 2},
        "run/passed_on": {"enqueue passed_on": 1, "run passed_on": 1, "enqueue tell": 1, "run tell": 1},
    }.items():
        names = [name for name, count in tree.items() for _ in range(count)]
        spans = stack.spans(path, "GET /run/{function}", *names)
        (server,) = [span for span in spans if span.kind == SERVER]
        known = {span.span_id: span for span in spans}
        assert {span.trace_id for span in spans} == {server.trace_id}
        for span in spans:
            if span.name.startswith("run "):
                assert (span.kind, known[span.parent_span_id].kind) == (CONSUMER, PRODUCER)
                assert span.attributes["messaging.system"] == "arq"
                assert span.status_code != ERROR
    tries = [span for span in stack.spans("run/retried") if span.name == "run retried"]
    told = [
        (span.attributes["otel_correlation.arq.try"], span.attributes.get("otel_correlation.arq.retry"))
        for span in tries
    ]
    assert sorted(told, key=str) == [(1, True), (2, None)]
    ids = {"request_id": request_id("run/tell"), "trace_id": stack.spans("run/tell")[0].trace_id}
    for message in ("→ ", "telling", "← "):
        stack.line(stack.worker, message, **ids)


def test_a_failed_arq_job_says_why_once(stack: Stack) -> None:
    """
    A job that raises has one exception, scrubbed, on its span; one that takes too long is an error; no job is lost.
    """
    stack.start("arq_web", arq())
    assert stack.ask("run/fail").json()["there"] == "ValueError"
    failed = by_name(stack.spans("run/fail", "run fail"), "run fail")
    assert (failed.status_code, failed.attributes["error.type"]) == (ERROR, "ValueError")
    assert [event.attributes["exception.message"] for event in failed.events] == ["duplicate key\nDETAIL:  REDACTED"]
    line = stack.line(stack.worker, "fail failed", request_id=request_id("run/fail"), trace_id=failed.trace_id)
    assert PLANTED not in str(line)
    assert stack.ask("run/slow").json()["there"] == "TimeoutError"
    slow = by_name(stack.spans("run/slow", "run slow"), "run slow")
    assert (slow.status_code, slow.attributes["error.type"]) == (ERROR, "asyncio.exceptions.CancelledError")
    assert slow.events == []


def test_an_arq_cron_job_has_an_identity_of_its_own(stack: Stack) -> None:
    """
    What the clock starts is a trace and a request id of its own, without a warning.
    """
    stack.start("arq_web", arq(), CRON="1")
    line = stack.line(stack.worker, "ticking")
    assert line["request_id"] == line["trace_id"]
    assert stack.sink.wait(lambda: any(span.name == "run cron:tick" for span in list(stack.sink.spans)))
    tick = by_name(stack.sink.spans, "run cron:tick")
    assert (tick.kind, tick.trace_id, tick.parent_span_id) == (INTERNAL, line["trace_id"], "")
    stack.stop_worker()
    assert not [line for line in stack.lines(stack.worker) if line["level"] == "WARNING"]


@pytest.mark.parametrize(
    ("path", "settings", "known"),
    [
        ("run/tell?plain=1", "WorkerSettings", True),
        ("run/tell", "PlainSettings", False),
        ("run/tell?plain=1", "PlainSettings", False),
    ],
)
def test_an_arq_job_runs_where_only_one_side_or_none_knows_of_ids(
    stack: Stack, path: str, settings: str, known: bool
) -> None:
    """
    A producer or a worker without ours does its work as before; a job without headers starts fresh in ours.
    """
    stack.start("arq_web", arq(settings))
    answer = stack.ask(path).json()
    assert bool(answer["there"]["request_id"]) == known
    assert answer["there"]["request_id"] != answer["here"]["request_id"]


def test_an_arq_job_with_headers_that_nobody_can_use_starts_fresh(stack: Stack) -> None:
    """
    Malformed, forged, oversized and senseless headers: the job runs under new ids, and one line a minute says so.
    """
    stack.start("arq_web", arq())
    for kind in ("traceparent", "request_id", "oversized", "no_mapping", "traceparent"):
        there = stack.ask(f"forged/{kind}").json()["there"]
        assert there["request_id"] == there["trace_id"]
    stack.stop_worker()
    warnings = [line["message"] for line in stack.lines(stack.worker) if line["level"] == "WARNING"]
    assert len(warnings) == len(set(warnings)) <= 2
    assert any("could not be used" in text for text in warnings)
    assert stack.worker is not None
    assert "forged" not in stack.worker.log.read_text()


def test_a_queue_that_is_gone_is_the_applications_own_error(stack: Stack) -> None:
    """
    With Redis killed, enqueueing raises what redis-py raises, and the answer is the application's 500 with the id.
    """
    stack.start("arq_web")
    stack.redis.stop()
    answer = stack.ask("run/tell")
    assert (answer.status_code, answer.json()) == (
        500,
        {"error": "ConnectionError", "request_id": request_id("run/tell")},
    )


@pytest.mark.parametrize("page", ["queues.md", "databases.md"])
def test_the_code_of_the_how_to_runs(libraries: Path, tmp_path: Path, page: str) -> None:
    """
    Each Python block of the page runs in a process of its own that has the libraries.
    """
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert blocks
    environment = {**os.environ, "OTEL_TRACES_EXPORTER": "none", "PYTHONWARNINGS": "error"}
    for block in blocks:
        code = tmp_path / "main.py"
        # A block that shows one side only has been set up, as opentelemetry-instrument does.
        code.write_text(
            block if "bootstrap()" in block else f"from otel_correlation import bootstrap\nbootstrap()\n{block}"
        )
        ended = subprocess.run(
            [str(libraries / "python"), str(code)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ended.returncode == 0, f"{block}\n{ended.stderr}"
