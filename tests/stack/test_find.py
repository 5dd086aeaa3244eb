"""
``find`` over the real stores: Jaeger and a Loki with tenants together, log files alone, and lines that an agent shipped.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from otel_correlation.logs import presets
from otel_correlation.logs.lines import JsonLines, TextLines
from otel_correlation.semconv import LOG_PRESETS
from otel_correlation.settings import Settings, with_overrides
from tests.stack.conftest import MACHINE
from tests.stack.engines import Loki
from tests.stack.harness import BIN, Jaeger, Machine, eventually
from tests.stack.test_shop import FAILS, SERVICES, launch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.needs("jaeger", "loki")

CALLER_ID = "what-a-stranger-sent/2026#1"
TENANT, AGENT_TENANT = "team-a", "agents"
DIVIDES = "ZeroDivisionError: integer division or modulo by zero"


class LokiWithTenants(Loki):
    """
    The shipped Loki as a shared one: a request without a tenant is refused.
    """

    def command(self) -> list[str]:
        """
        Return Loki with its file and the one switch.
        """
        return [*super().command(), "-auth.enabled=true"]


@dataclass(slots=True)
class Stores:
    """
    What one failed checkout left behind, and where.
    """

    jaeger: str
    loki: str
    files: Path
    request_id: str

    def find(self, wanted: str, *stores: str) -> dict[str, Any]:
        """
        Return what ``otel-correlation find --json`` says of the id.
        """
        ended = run(["--json", wanted], *stores)
        answer: dict[str, Any] = json.loads(ended.stdout)
        return answer

    @property
    def logs(self) -> str:
        """
        Return the store of the services' own outputs.
        """
        return f"logs={self.files}/*.log"


def run(arguments: list[str], *stores: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OTEL_CORRELATION_STORES": ",".join(stores)}
    command = [str(BIN / "otel-correlation"), "find", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def stores(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    """
    Both stores and the shop, whose gateway trusts no caller; one checkout has failed and arrived everywhere.
    """
    machine = request.node.stash[MACHINE] = Machine(tmp_path_factory.mktemp("find"))
    try:
        yield open_stores(machine)
    finally:
        machine.clean_up()


def open_stores(machine: Machine) -> Stores:
    """
    Start everything, send the one request, and wait until the stores have it.
    """
    jaeger, loki = Jaeger(machine), LokiWithTenants(machine)
    loki.launch()
    jaeger.start()
    loki.wait()
    urls: dict[str, str] = {}
    for name, more in (("inventory", {}), ("orders", {}), ("gateway", {"OTEL_CORRELATION_EDGE": "public"})):
        environment = {
            "OTEL_SERVICE_NAME": name,
            "OTEL_LOGS_EXPORTER": "otlp",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://{jaeger.otlp}",
            "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": f"{loki.otlp}/v1/logs",
            "OTEL_EXPORTER_OTLP_LOGS_HEADERS": f"X-Scope-OrgID={TENANT}",
        }
        _, urls[name] = launch(machine, name, environment | more | urls_for(urls))
    with httpx.Client(trust_env=False, timeout=60) as client:
        response = client.post(f"{urls['gateway']}/checkout", json=FAILS, headers={"X-Request-ID": CALLER_ID})
        request_id = response.headers["x-request-id"]
        assert (response.status_code, request_id != CALLER_ID) == (502, True)
        push(client, loki)
    made = Stores(f"jaeger=http://{jaeger.query}", f"loki=http://{loki.http}#{TENANT}", machine.directory, request_id)

    def arrived() -> bool:
        found = made.find(request_id, made.jaeger, made.loki)["traces"]
        return (
            len(found) == 1
            and len(found[0]["spans"]) == 5
            and {line["body"][:3] for line in found[0]["logs"]}
            >= {
                "che",
                "res",
                "POS",
            }
        )

    eventually("the checkout in both stores", arrived)
    return made


def urls_for(urls: dict[str, str]) -> dict[str, str]:
    return {f"{name.upper()}_URL": url for name, url in urls.items()}


def push(client: httpx.Client, loki: Loki) -> None:
    """
    Ship lines to Loki as an agent does that reads stdout: every preset's, our text, a proxy's, and many of one request.
    """
    now = time.time()
    lines = {preset: preset_line(preset, now) for preset in LOG_PRESETS}
    lines["text"] = TextLines(colours=False).format(record(now))
    lines["proxy"] = json.dumps({"request_id": "shipped-by-an-agent", "status": 502})
    streams = [{"stream": {"app": name}, "values": [[str(int(now * 1e9)), text]]} for name, text in lines.items()]
    many = [
        [
            str(int(now * 1e9) + number),
            json.dumps({"msg": f"line {number}", "request_id": "4711", "trace_id": "7" * 32}),
        ]
        for number in range(2500)
    ]
    noise = [[str(int(now * 1e9) + number), f"took 4711 ms, {number}"] for number in range(100)]
    streams += [{"stream": {"app": "batch"}, "values": many}, {"stream": {"app": "noise"}, "values": noise}]
    answer = client.post(
        f"http://{loki.http}/loki/api/v1/push", json={"streams": streams}, headers={"X-Scope-OrgID": AGENT_TENANT}
    )
    assert answer.status_code == 204, answer.text


def record(created: float) -> logging.LogRecord:
    made = logging.LogRecord("shop.orders", logging.WARNING, "/srv/orders.py", 7, "late", None, None)
    made.created = created
    made.__dict__.update(trace_id="7" * 31 + "8", span_id="8" * 16, trace_flags="01", request_id="shipped-by-an-agent")
    return made


def preset_line(preset: str, created: float) -> str:
    names = presets.build(with_overrides(Settings(), {"log_preset": preset}), {"GOOGLE_CLOUD_PROJECT": "p"})
    return JsonLines(names=names).format(record(created))


def bodies(trace: dict[str, Any]) -> list[tuple[str, str]]:
    return sorted((line["service"], line["body"]) for line in trace["logs"])


def test_what_a_stranger_sent_leads_to_spans_and_lines(stores: Stores) -> None:
    """
    Only a span has the caller's own id: Jaeger leads to the trace, and Loki, which never saw that id, tells its lines.
    """
    answer = stores.find(CALLER_ID, stores.jaeger, stores.loki)
    (trace,) = answer["traces"]
    assert answer["errors"] == []
    assert {span["service"] for span in trace["spans"]} == {line["service"] for line in trace["logs"]} == set(SERVICES)
    assert trace["request_ids"] == [stores.request_id]
    assert (trace["cause"]["service"], trace["cause"]["type"]) == ("inventory", "ZeroDivisionError")
    assert {line["trace_id"] for line in trace["logs"]} == {trace["trace_id"]}
    # Loki alone, asked for the id of the response, has the same lines.
    (alone,) = stores.find(stores.request_id, stores.loki)["traces"]
    assert bodies(alone) == bodies(trace)


def test_log_files_alone_tell_the_same(stores: Stores) -> None:
    """
    The services' outputs as they lie on disk have the same lines as Loki, the same cause, and the same order.
    """
    (files,) = stores.find(stores.request_id, stores.logs)["traces"]
    (loki,) = stores.find(stores.request_id, stores.loki)["traces"]
    assert bodies(files) == bodies(loki)
    assert files["cause"] == {**loki["cause"], "span_id": files["cause"]["span_id"]}
    ended = run([stores.request_id], stores.logs)
    assert ended.returncode == 0
    assert "Log lines only: no store of spans was asked" in ended.stdout
    assert DIVIDES in ended.stdout


def test_a_line_in_two_stores_is_told_once(stores: Stores) -> None:
    """
    Who ships stdout and exports over OTLP has every line twice, with other times; the story has it once.
    """
    (both,) = stores.find(stores.request_id, stores.jaeger, stores.loki, stores.logs)["traces"]
    (loki,) = stores.find(stores.request_id, stores.loki)["traces"]
    assert bodies(both) == bodies(loki)


def test_a_store_that_refuses_leaves_the_others_story(stores: Stores) -> None:
    """
    Without its tenant Loki refuses: that is one line with its reason, and what Jaeger has is told.
    """
    ended = run([stores.request_id], stores.jaeger, stores.loki.partition("#")[0])
    assert ended.returncode == 0
    assert DIVIDES in ended.stdout
    (line,) = (line for line in ended.stdout.splitlines() if line.startswith("Not complete: "))
    assert "answered with status 401 (no org id: name the tenant, URL#TENANT)" in line


def test_lines_that_an_agent_shipped_are_found_by_what_is_in_them(stores: Stores) -> None:
    """
    Every preset's line, our text and a proxy's are one story; Datadog's half of the trace id is the whole one.
    """
    loki = f"{stores.loki.partition('#')[0]}#{AGENT_TENANT}"
    for wanted in ("shipped-by-an-agent", "7" * 31 + "8"):
        (trace,) = stores.find(wanted, loki)["traces"]
        assert trace["trace_id"] == "7" * 31 + "8"
        assert len(trace["logs"]) == len(LOG_PRESETS) + 2
        by_severity = sorted(line["severity"] for line in trace["logs"])
        assert by_severity == ["", *["WARNING"] * (len(LOG_PRESETS) + 1)]


def test_pages_of_a_short_id_are_put_together(stores: Stores) -> None:
    """
    More lines than one answer may have come whole and in order, without the lines that have the number as a number.
    """
    loki = f"{stores.loki.partition('#')[0]}#{AGENT_TENANT}"
    answer = stores.find("4711", loki)
    (trace,) = answer["traces"]
    assert answer["errors"] == []
    assert [line["body"] for line in trace["logs"]] == [f"line {number}" for number in range(2500)]


@pytest.mark.parametrize("wanted", ['x" or "1"="1', "a\\", "{}|=`", "ü\n", "%2e/../.."])
def test_an_id_is_never_more_than_an_id(stores: Stores, wanted: str) -> None:
    """
    What is no id is looked for as it is: the real parsers of both stores find nothing in it, and nothing wrong with it.
    """
    answer = stores.find(wanted, stores.jaeger, stores.loki)
    assert (answer["traces"], answer["errors"]) == ([], [])
