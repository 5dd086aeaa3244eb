"""
taskiq and dramatiq with the middlewares that docs/how-to/queues.md shows, by the libraries themselves.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.otlp_sink import OtlpSink, SinkSpan

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.needs("servers")

PAGE = (Path(__file__).parents[2] / "docs/how-to/queues.md").read_text()
RID = "order-7781-customer-quote"
TASKIQ = """
import asyncio, json
from otel_correlation import bootstrap, work

bootstrap()


@broker.task
async def fail() -> None:
    raise LookupError("no")


@broker.task
def blocking() -> str | None:
    return request_id()


@broker.task
async def passed_on() -> str | None:
    return (await (await send.kiq("ada")).wait_result()).return_value


async def main() -> None:
    found = {}
    await broker.startup()
    with work("request", request_id="order-7781-customer-quote"):
        tasks = {"send": await send.kiq("ada"), "blocking": await blocking.kiq(), "passed_on": await passed_on.kiq()}
        tasks["fail"] = await fail.kiq()
    tasks["nobody"] = await send.kiq("ada")
    for name, task in tasks.items():
        result = await task.wait_result()
        found[name] = result.return_value if result.error is None else type(result.error).__name__
    await broker.shutdown()
    print("FOUND", json.dumps([found, request_id()]))


asyncio.run(main())
"""
DRAMATIQ = """
import json
from otel_correlation import bootstrap, work

bootstrap()
seen = {}


@dramatiq.actor
def note(name: str) -> None:
    seen[name] = request_id()


@dramatiq.actor
def passed_on() -> None:
    note.send("passed_on")


@dramatiq.actor(max_retries=1, min_backoff=1, max_backoff=1)
def fail() -> None:
    seen.setdefault("fail", []).append(request_id())
    raise LookupError("no")


worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=2)
worker.start()
with work("request", request_id="order-7781-customer-quote"):
    note.send("send")
    passed_on.send()
    note.send_with_options(args=("delayed",), delay=50)
    fail.send()
    send.send("ada")
note.send("nobody")
broker.join("default", fail_fast=False)
worker.join()
worker.stop()
print("FOUND", json.dumps([seen, request_id()]))
"""


@pytest.fixture
def sink() -> Iterator[OtlpSink]:
    """
    Where spans arrive.
    """
    with OtlpSink() as found:
        yield found


def run(libraries: Path, sink: OtlpSink, name: str, script: str) -> Any:
    """
    Run the page's example and a script behind it, and return what that found.
    """
    (block,) = re.findall(rf"^## {name}\n.*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)[:1]
    ended = subprocess.run(
        [str(libraries / "python"), "-c", block + script],
        env={**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": sink.endpoint},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = [line for line in ended.stdout.splitlines() if line.startswith("FOUND ")]
    assert found, ended.stdout + ended.stderr
    return json.loads(found[0].removeprefix("FOUND "))


def spans(sink: OtlpSink, name: str, count: int) -> list[SinkSpan]:
    """
    Return the CONSUMER spans of this name.
    """
    found = [span for span in list(sink.spans) if span.name.endswith(name) and span.kind == "CONSUMER"]
    assert len(found) == count, [span.name for span in sink.spans]
    return found


def test_taskiq(libraries: Path, sink: OtlpSink) -> None:
    """
    Tasks, blocking ones and the tasks that they send, too, continue the request; a failed one says why on its span.
    """
    found, after = run(libraries, sink, "taskiq", TASKIQ)
    nobody = found.pop("nobody")
    assert found == {"send": RID, "blocking": RID, "passed_on": RID, "fail": "LookupError"}
    assert nobody not in (RID, None)
    assert after is None
    (request,) = [span for span in sink.spans if span.name == "request"]
    (failed,) = spans(sink, "fail", 1)
    assert (failed.trace_id, failed.parent_span_id) == (request.trace_id, request.span_id)
    assert failed.attributes["error.type"] == "LookupError"
    assert {span.trace_id == request.trace_id for span in spans(sink, "send", 3)} == {True, False}


def test_dramatiq(libraries: Path, sink: OtlpSink) -> None:
    """
    Messages, delayed, retried and sent by actors, too, continue the request; a failed one says why on its spans.
    """
    found, after = run(libraries, sink, "dramatiq", DRAMATIQ)
    nobody = found.pop("nobody")
    assert found == {"send": RID, "passed_on": RID, "delayed": RID, "fail": [RID, RID]}
    assert nobody not in (RID, None)
    assert after is None
    (request,) = [span for span in sink.spans if span.name == "request"]
    for failed in spans(sink, "fail", 2):
        assert (failed.trace_id, failed.parent_span_id) == (request.trace_id, request.span_id)
        assert failed.attributes["error.type"] == "LookupError"
    assert len(spans(sink, "note", 4)) == 4
