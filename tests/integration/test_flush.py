"""
``flush()``: what a process hands over that is frozen or killed when its work is done.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

from tests.integration.otlp_sink import Answer, OtlpSink
from tests.integration.services import DEADLINE_S, clean_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
# Longer than any test: what arrives was flushed.
NEVER_MS = "600000"
RID = "order-7781-customer-quote"


def rest(path: str) -> dict[str, Any]:
    """
    Return an event of API Gateway's REST API.
    """
    return {
        "resource": "/{proxy+}",
        "path": path,
        "httpMethod": "GET",
        "headers": {"Host": "api.example.com", "X-Request-ID": RID},
        "multiValueHeaders": {"Host": ["api.example.com"], "X-Request-ID": [RID]},
        "queryStringParameters": None,
        "multiValueQueryStringParameters": None,
        "requestContext": {"identity": {"sourceIp": "192.0.2.7"}, "stage": "prod"},
        "body": None,
        "isBase64Encoded": False,
    }


def http(path: str) -> dict[str, Any]:
    """
    Return an event of API Gateway's HTTP API, and of a function URL.
    """
    about = {"method": "GET", "path": path, "protocol": "HTTP/1.1", "sourceIp": "192.0.2.7", "userAgent": "curl"}
    return {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": path,
        "rawQueryString": "",
        "headers": {"host": "api.example.com", "x-request-id": RID},
        "requestContext": {"http": about, "stage": "$default"},
        "isBase64Encoded": False,
    }


def balancer(path: str) -> dict[str, Any]:
    """
    Return an event of an application load balancer.
    """
    return {
        "requestContext": {"elb": {"targetGroupArn": "arn:aws:elasticloadbalancing:eu-west-1:1:targetgroup/orders/7"}},
        "httpMethod": "GET",
        "path": path,
        "queryStringParameters": {},
        "headers": {"host": "api.example.com", "x-forwarded-for": "192.0.2.7", "x-request-id": RID},
        "body": "",
        "isBase64Encoded": False,
    }


class Function:
    """
    A function in its runtime, which freezes it between two events.
    """

    def __init__(self, sink: OtlpSink) -> None:
        environment = clean_environment(
            OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint,
            OTEL_LOGS_EXPORTER="otlp",
            OTEL_METRICS_EXPORTER="otlp",
            OTEL_BSP_SCHEDULE_DELAY=NEVER_MS,
            OTEL_BLRP_SCHEDULE_DELAY=NEVER_MS,
            OTEL_METRIC_EXPORT_INTERVAL=NEVER_MS,
        )
        self.process = subprocess.Popen(
            [sys.executable, "lambda_app.py"],
            cwd=HERE,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def invoke(self, event: dict[str, Any]) -> Any:
        """
        Wake it, hand over an event, and freeze it as soon as it has answered.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        os.kill(self.process.pid, signal.SIGCONT)
        self.process.stdin.write(json.dumps(event) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                os.kill(self.process.pid, signal.SIGSTOP)
                return json.loads(line.removeprefix("ANSWER "))
        raise AssertionError("the function ended")


@pytest.fixture
def sink() -> Iterator[OtlpSink]:
    """
    Where everything arrives.
    """
    with OtlpSink() as found:
        yield found


def test_a_function_that_is_frozen_after_each_answer_loses_nothing(sink: OtlpSink) -> None:
    """
    Each event's span, lines and measurements are out before the freeze, also when the collector hung up meanwhile.
    """
    with Function(sink) as function:
        for count, event in enumerate([rest, http, balancer, rest, http], 1):
            answer = function.invoke(event(f"/orders/{count}"))
            assert json.loads(answer["body"]) == {"request_id": RID}
            assert answer["statusCode"] == 200
            # Not waited for: the process is frozen, and flush() has seen the collector's answer.
            assert [span.name for span in sink.spans] == ["GET /orders/{number}"] * count
            assert {span.attributes["request_id"] for span in sink.spans} == {RID}
            lines = [record.body for record in sink.logs if record.scope == "orders"]
            assert lines == [text for number in range(1, count + 1) for text in (f"order {number}", "told the kitchen")]
            assert len({record.trace_id for record in sink.logs if record.scope == "orders"}) == 1
            assert len(sink.metrics) >= count
            if count % 2:
                # A connection does not live through a freeze of minutes.
                sink.close()
                sink.start()


SCRIPT = """
import sys, time
from otel_correlation import bootstrap, flush, stats, work
assert flush() is True and flush(0) is True, "nothing is set up"
bootstrap()
assert flush(2) is True, "nothing waits"
"""


def run(script: str, **environment: str) -> str:
    """
    Run a script that ends without any clean-up, and return what it said.
    """
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT + script + "\nimport os; sys.stdout.flush(); sys.stderr.flush(); os._exit(0)"],
        env=clean_environment(OTEL_BSP_SCHEDULE_DELAY=NEVER_MS, **environment),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def test_a_process_that_ends_by_os_exit_loses_nothing(sink: OtlpSink) -> None:
    """
    After ``flush()`` has said True, everything is with the collector.
    """
    run(
        "with work('job'): pass\nassert flush(10) is True and stats()['spans.exported'] == 1",
        OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint,
    )
    assert [span.name for span in sink.spans] == ["job"]


def test_a_flush_that_has_too_little_time_says_so_and_loses_nothing(sink: OtlpSink) -> None:
    """
    False after its time at the latest, with one line; what was left goes out at the next call, once.
    """
    sink.answers = [Answer(503), Answer(503)]
    said = run(
        "with work('job'): pass\n"
        "begun = time.monotonic(); assert flush(0.05) is False; assert time.monotonic() - begun < 5\n"
        "assert flush(20) is True",
        OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint,
    )
    assert [span.name for span in sink.spans] == ["job"]
    assert said.count("Not delivered, and lost if the process ends now: 1 spans") == 1


def test_nobody_listens() -> None:
    """
    Where no collector is, ``flush()`` gives up, returns False and raises nothing; the process goes on.
    """
    run("with work('job'): pass\nassert flush(30) is False", OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")


@pytest.mark.parametrize(
    "environment",
    [{"OTEL_TRACES_EXPORTER": "none"}, {"OTEL_SDK_DISABLED": "true"}, {"OTEL_CORRELATION_ENABLED": "false"}],
)
def test_nothing_to_send(environment: dict[str, str]) -> None:
    """
    Where nothing is exported there is nothing left.
    """
    run("with work('job'): pass\nassert flush(2) is True", **environment)


def test_the_applications_own_provider_is_flushed(sink: OtlpSink) -> None:
    """
    Spans that another pipeline exports are flushed, too, and its failure is a False.
    """
    own = (
        "import sys\n"
        "from opentelemetry import trace\n"
        "from opentelemetry.sdk.trace import TracerProvider\n"
        "from opentelemetry.sdk.trace.export import BatchSpanProcessor\n"
        "from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter\n"
        "trace.set_tracer_provider(provider := TracerProvider())\n"
        "provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))\n"
    )
    script = "with work('job'): pass\nassert flush(10) is True"
    ended = subprocess.run(
        [sys.executable, "-c", own + SCRIPT + script + "\nimport os; os._exit(0)"],
        env=clean_environment(OTEL_BSP_SCHEDULE_DELAY=NEVER_MS, OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint),
        timeout=DEADLINE_S,
        check=False,
    )
    assert ended.returncode == 0
    assert [span.name for span in sink.spans] == ["job"]


PAGE = (HERE.parents[1] / "docs/how-to/lambda.md").read_text()
CHECKS = {
    "mangum": f"""
import json
answer = handler(json.loads({json.dumps(json.dumps(http("/orders/7")))}), None)
assert answer["headers"]["x-request-id"] == "{RID}", answer
os = __import__("os"); os._exit(0)
""",
    "job": "",
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_block_of_the_page_runs(name: str, sink: OtlpSink, tmp_path: Path) -> None:
    """
    Each example of the page runs as it stands, and its span arrives although the process ends at once.
    """
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == len(CHECKS)
    (tmp_path / "page.py").write_text(blocks[list(CHECKS).index(name)] + CHECKS[name])
    ended = subprocess.run(
        [sys.executable, "page.py"],
        cwd=tmp_path,
        env=clean_environment(OTEL_BSP_SCHEDULE_DELAY=NEVER_MS, OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint),
        timeout=DEADLINE_S,
        check=False,
    )
    assert ended.returncode == 0
    assert len(sink.spans) == 1
