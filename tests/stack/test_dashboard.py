"""
The dashboard, the alerts and the scrape configuration of docker-compose.yml, on a real Prometheus, Loki and collectors.

Grafana cannot be had here. What it would ask is asked in its place: every query of every panel, every link's query. What it
would make of its files (the looks, the links' clicks) is not tested; that they name only what exists is.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

import httpx
import pytest
import yaml

from otel_correlation.request_id import to_trace_id
from tests.stack import servers
from tests.stack.conftest import MACHINE
from tests.stack.engines import Loki, Tempo, Tier
from tests.stack.harness import BIN, ROOT, SHOP, Jaeger, Machine, eventually, get

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.needs("collector", "jaeger", "loki", "servers")

COMPOSE: Final = ROOT / "deploy" / "compose"
PROMETHEUS: Final = COMPOSE / "prometheus"
DASHBOARD: Final = json.loads((COMPOSE / "grafana" / "dashboards" / "services.json").read_text())
SOURCES: Final = yaml.safe_load((COMPOSE / "grafana" / "datasources.yml").read_text())["datasources"]
PANELS: Final[dict[str, dict[str, Any]]] = {
    panel["title"]: panel for panel in DASHBOARD["panels"] if panel["type"] != "row"
}
RATIO: Final = 0.01
# At this ratio its trace is dropped: a function of the id, so always.
TICKET: Final = "ticket-2026-000123"
SAMPLED: Final = "00-{:032x}-00f067aa0ba902b7-01"
# Not there before it happens, and it happens to nobody here: a store that refuses spans for good.
NEVER_SEEN: Final = ("otelcol_exporter_send_failed_spans",)


class Stack:
    """
    The services, agent, gateway, Loki and Prometheus, and somebody who never stops asking.
    """

    def __init__(self, machine: Machine, libraries: Path) -> None:
        self.machine = machine
        self.jaeger = Jaeger(machine)
        self.jaeger.start()
        self.loki = Loki(machine)
        self.loki.start()
        self.tempo = Tempo(machine)
        stores = "[otlp_grpc/jaeger]"
        if os.environ.get("TEMPO_BIN"):
            self.tempo.start()
            stores = "[otlp_grpc/jaeger, otlp_grpc/tempo]"
        self.gateway = Tier(
            machine,
            "gateway",
            {
                "TRACES_EXPORTERS": stores,
                "JAEGER_OTLP_ENDPOINT": self.jaeger.otlp,
                "TEMPO_OTLP_ENDPOINT": self.tempo.otlp,
                "LOGS_OTLP_ENDPOINT": self.loki.otlp,
                "SAMPLER_DECISION_WAIT": "2s",
            },
        )
        self.gateway.start()
        self.agent = Tier(machine, "agent", {"NEXT_OTLP_ENDPOINT": self.gateway.grpc})
        self.agent.start()
        self.prometheus = servers.Prometheus(machine, self._configuration(), self._options())
        self.prometheus.start()
        inventory = self._service("inventory", SHOP, BIN)
        orders = self._service("orders", SHOP, BIN, INVENTORY_URL=inventory)
        self.shop = self._service("gateway", SHOP, BIN, ORDERS_URL=orders)
        for name in ("rows", "astray"):
            (machine.directory / f"{name}.py").write_text(ROWS)
        self.rows = self._service("rows", machine.directory, libraries)
        # Somebody who mistook the address: whatever he sends is refused for good.
        wrong = f"http://{self.prometheus.address}/nobody"
        self.astray = self._service(
            "astray",
            machine.directory,
            libraries,
            OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=wrong,
            OTEL_EXPORTER_OTLP_LOGS_ENDPOINT=wrong,
            OTEL_TRACES_SAMPLER_ARG="1",
        )
        self._stop = threading.Event()
        self._asking = threading.Thread(target=self._ask_for_ever, daemon=True)
        self._asking.start()

    def _configuration(self) -> Path:
        """
        Copy the shipped files; only the addresses in the list of targets are this machine's.
        """
        copy = self.machine.directory / "prometheus-files"
        shutil.copytree(PROMETHEUS, copy)
        targets = (PROMETHEUS / "full.yml").read_text()
        for name, address in {
            "next-tier:9464": self.gateway.environment["METRICS_ENDPOINT"],
            "agent:8888": self.agent.metrics_address,
            "next-tier:8888": self.gateway.metrics_address,
        }.items():
            assert name in targets
            targets = targets.replace(name, address)
        (copy / "targets.yml").write_text(targets)
        return copy / "prometheus.yml"

    @staticmethod
    def _options() -> list[str]:
        """
        Return the options of docker-compose.yml that are no path.
        """
        command = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["prometheus"]["command"]
        return [option for option in command if not option.startswith(("--config.file=", "--storage.tsdb.path="))]

    def _service(self, name: str, directory: Path, programs: Path, **more: str) -> str:
        port = self.machine.port()
        environment = self.agent.exports(name) | {
            "OTEL_METRICS_EXPORTER": "otlp",
            "OTEL_METRIC_EXPORT_INTERVAL": "2000",
            "OTEL_TRACES_SAMPLER_ARG": str(RATIO),
            **more,
        }
        command: list[str | Path] = [programs / "opentelemetry-instrument", programs / "uvicorn", f"{name}:app"]
        command += ["--port", str(port)]
        process = self.machine.start(name, command, environment, directory)
        url = f"http://127.0.0.1:{port}"
        eventually(name, lambda: get(f"{url}/openapi.json").status_code == 200, while_running=[process])
        return url

    def _ask_for_ever(self) -> None:
        with httpx.Client(trust_env=False, timeout=30) as client:
            for number in itertools.count(1):
                if self._stop.wait(0.2):
                    return
                # Every fourth caller has a sampled trace already: some exemplars, whatever the ratio.
                headers = {} if number % 4 else {"traceparent": SAMPLED.format(number)}
                client.get(f"{self.shop}/docs", headers=headers)
                client.get(f"{self.rows}/rows")
                client.get(f"{self.astray}/rows")
                if number % 10 == 0:  # There are 120 lamps, and a shop without any would answer 500.
                    client.post(f"{self.shop}/checkout", json={"sku": "lamp"})

    def fail_once(self) -> None:
        """
        Ask for what divides by zero, under an id whose trace is dropped.
        """
        answer = httpx.post(
            f"{self.shop}/checkout", json={"sku": "chair-2027"}, headers={"x-request-id": TICKET}, trust_env=False
        )
        assert (answer.status_code, answer.headers["x-request-id"]) == (502, TICKET)

    def close(self) -> None:
        self._stop.set()
        self._asking.join()
        self.machine.clean_up()


ROWS: Final = """
import logging
from fastapi import FastAPI
from sqlalchemy import create_engine, text

engine = create_engine("sqlite:///rows.db")
app = FastAPI()

@app.get("/rows")
def rows() -> int:
    with engine.connect() as connection:
        return connection.execute(text("SELECT 1")).scalar_one()

@app.post("/long")
def long_line() -> None:
    # Each is as long as the service sends at most; together they are twice what Loki takes beside a line.
    logging.getLogger("rows").warning("long", extra={f"part_{number}": "x" * 16_000 for number in range(8)})
"""


@pytest.fixture(scope="module")
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, libraries: Path) -> Iterator[Stack]:
    """
    All of it, running, with two things that went wrong: one failed request, and one line that Loki refuses.
    """
    machine = request.node.stash[MACHINE] = Machine(tmp_path_factory.mktemp("dashboard"))
    try:
        stack = Stack(machine, libraries)
        stack.fail_once()
        httpx.post(f"{stack.rows}/long", trust_env=False)
        yield stack
        stack.close()
    finally:
        machine.clean_up()


def filled(expression: str, service: str = ".+") -> str:
    """
    Return a query with what Grafana puts in the place of its variables.
    """
    values = {"service": service, "route": ".*", "__rate_interval": "1m", "__range": "5m"}
    filled = re.sub(r"\$(\w+)", lambda name: values[name[1]], expression)
    assert "$" not in filled
    return filled


def queries(source: str) -> list[tuple[str, str]]:
    """
    Return title and expression of every query of a data source.
    """
    return [
        (title, target["expr"])
        for title, panel in PANELS.items()
        for target in panel["targets"]
        if target["datasource"]["uid"] == source
    ]


def test_every_query_of_every_panel_has_an_answer(stack: Stack) -> None:
    """
    Prometheus takes each query of the dashboard, and each finds something to draw.
    """
    assert len(queries("prometheus")) > 25
    for title, expression in queries("prometheus"):
        asked = filled(expression)
        if any(name in expression for name in NEVER_SEEN):
            stack.prometheus.query(asked)
            continue
        eventually(f"{title}: {asked}", partial(stack.prometheus.query, asked))


def test_one_failed_request_is_told_at_a_ratio_of_one_in_a_hundred(stack: Stack) -> None:
    """
    The alert fires for the route of each service that failed, counts exactly one, and no trace of it was kept.
    """

    def firing() -> list[dict[str, Any]]:
        alerts = stack.prometheus.ask("alerts")["alerts"]
        return [
            alert for alert in alerts if alert["labels"]["alertname"] == "ServerError" and alert["state"] == "firing"
        ]

    alerts = eventually("three alerts", lambda: firing() if len(firing()) >= 3 else None)
    told = {alert["labels"]["job"]: alert for alert in alerts}
    assert {(job, alert["labels"]["http_route"], alert["labels"]["error_type"]) for job, alert in told.items()} == {
        ("gateway", "/checkout", "502"),
        ("orders", "/orders", "httpx.HTTPStatusError"),
        ("inventory", "/reservations", "ZeroDivisionError"),
    }
    assert {float(alert["value"]) for alert in alerts} == {1.0}
    assert told["gateway"]["annotations"]["summary"] == "gateway: POST /checkout answered 502 (502)"
    (stat,) = PANELS["Failed in five minutes"]["targets"]
    (shown,) = stack.prometheus.query(filled(stat["expr"]))
    assert float(shown["value"][1]) == 3.0
    trace_id = to_trace_id(TICKET)
    assert not stack.jaeger.trace(f"{trace_id:032x}")


def test_the_panel_of_failed_requests_has_the_line(stack: Stack) -> None:
    """
    The log panel's query finds the failed request's line in Loki, with the customer's id and the trace's.
    """
    ((_, expression),) = queries("loki")
    services = {"gateway", "orders", "inventory"}  # Each sends its own when it likes.

    def complete() -> list[tuple[str, dict[str, str]]] | None:
        lines = stack.loki.lines(filled(expression))
        return lines if {labels["service_name"] for _, labels in lines} >= services else None

    found = eventually("the lines", complete)
    assert {labels["request_id"] for _, labels in found} == {TICKET}
    assert {labels["service_name"] for _, labels in found} == services


def test_lines_and_traces_lead_to_each_other(stack: Stack) -> None:
    """
    The query that Grafana makes of a span finds its lines, and every line has the label that the link back reads.
    """
    for source in SOURCES:
        if "tracesToLogsV2" not in source["jsonData"]:
            continue
        link = source["jsonData"]["tracesToLogsV2"]
        assert link["datasourceUid"] == "loki"
        (tag,) = link["tags"]
        # As Grafana does: `$$` is its file's `$`, the tags become matchers.
        query = link["query"].replace("$$", "$").replace("${__tags}", f'{tag["value"]}="gateway"')
        query = query.replace("${__trace.traceId}", f"{to_trace_id(TICKET):032x}")
        lines = eventually("lines", partial(stack.loki.lines, query))
        (loki,) = (source for source in SOURCES if source["uid"] == "loki")
        for field in loki["jsonData"]["derivedFields"]:
            assert field["matcherType"] == "label"
            assert {labels[field["matcherRegex"]] for _, labels in lines} == {f"{to_trace_id(TICKET):032x}"}


def test_a_point_on_the_graph_leads_to_a_trace(stack: Stack) -> None:
    """
    The durations have exemplars with the name that the data source reads, and the trace of one is in the store.
    """
    (source,) = (source for source in SOURCES if source["uid"] == "prometheus")
    (destination,) = source["jsonData"]["exemplarTraceIdDestinations"]
    assert destination["datasourceUid"] in {source["uid"] for source in SOURCES}

    def exemplars() -> list[str]:
        now = time.time()
        series = stack.prometheus.ask(
            "query_exemplars",
            query=filled(PANELS["Duration"]["targets"][0]["expr"], "gateway"),
            start=str(now - 600),
            end=str(now),
        )
        return [entry["labels"][destination["name"]] for one in series for entry in one["exemplars"]]

    ids = eventually("exemplars", exemplars)
    eventually("their traces", lambda: all(stack.jaeger.trace(trace_id) for trace_id in ids[:3]))


def behind_the_links(uid: str, service: str, route: str) -> list[str]:
    """
    Return what the panels' links ask of a data source when somebody clicks on a service's route.
    """
    asked = []
    for panel in PANELS.values():
        for link in panel["fieldConfig"]["defaults"]["links"]:
            (query,) = json.loads(parse_qs(urlsplit(link["url"]).query)["panes"][0])["a"]["queries"]
            if query["datasource"]["uid"] == uid:
                text = query.get("expr") or query["query"]
                text = text.replace("${__field.labels.job}", service).replace("${__field.labels.http_route}", route)
                assert "$" not in text
                asked.append(text)
    assert asked
    return asked


def test_a_click_on_a_failure_finds_its_lines(stack: Stack) -> None:
    """
    What the link on a route's errors asks of Loki is that route's failed requests, and there they are.
    """
    for query in behind_the_links("loki", "gateway", "/checkout"):
        found = eventually("the lines of the route", partial(stack.loki.lines, query))
        assert {labels["request_id"] for _, labels in found} == {TICKET}


@pytest.mark.needs("tempo")
def test_a_click_on_a_route_finds_its_traces(stack: Stack) -> None:
    """
    What the links ask of Tempo is TraceQL that it takes, and the traces of a route are found by it.
    """
    every, *narrower = sorted(behind_the_links("tempo", "gateway", "/docs"), key=len)
    eventually("the traces of the route", partial(stack.tempo.search, every))
    for query in narrower:
        stack.tempo.search(query)


def test_what_a_service_loses_is_told(stack: Stack) -> None:
    """
    A service whose spans and records are refused for good fires an alert for each, with the cause; no other service does.
    """

    def lost() -> set[tuple[str, str, str]]:
        return {
            (alert["labels"]["alertname"], alert["labels"]["job"], alert["labels"]["error_type"])
            for alert in stack.prometheus.ask("alerts")["alerts"]
            if alert["labels"]["alertname"].startswith("ServiceLoses") and alert["state"] == "firing"
        }

    expected = {("ServiceLosesSpans", "astray", "http_404"), ("ServiceLosesLogs", "astray", "http_404")}
    eventually("the alerts", lambda: lost() >= expected)
    assert lost() == expected


def test_what_a_store_refuses_is_told_as_lost(stack: Stack) -> None:
    """
    One record that Loki takes from nobody fires the alert of the collector that had it.
    """

    def lost() -> set[str]:
        alerts = stack.prometheus.ask("alerts")["alerts"]
        return {
            alert["labels"]["exporter"]
            for alert in alerts
            if alert["labels"]["alertname"] == "CollectorLosesData" and alert["state"] == "firing"
        }

    assert eventually("the alert", lost) == {"otlp_http/logs"}


@pytest.mark.parametrize("targets", ["full.yml", "scale.yml"])
def test_promtool_accepts_what_prometheus_reads(targets: str, tmp_path: Path) -> None:
    """
    Configuration, targets and rules pass Prometheus's own check, and a broken rule does not.
    """
    copy = tmp_path / "prometheus"
    shutil.copytree(PROMETHEUS, copy)
    shutil.copy(PROMETHEUS / targets, copy / "targets.yml")
    promtool = [str(servers.program("promtool")), "check", "config", str(copy / "prometheus.yml")]
    good = subprocess.run(promtool, capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stdout + good.stderr
    alerts = copy / "alerts.yml"
    alerts.write_text(alerts.read_text().replace("histogram_quantile(0.99,", "histogram_quantile(", 1))
    assert subprocess.run(promtool, capture_output=True, check=False).returncode != 0


def test_every_alert_fires_at_its_threshold_and_not_below() -> None:
    """
    `promtool test rules` plays time: one failed request, slow routes, busy threads, full queues, losses, and none of them.
    """
    cases = ROOT / "tests" / "stack" / "alerts_test.yml"
    ended = subprocess.run(
        [str(servers.program("promtool")), "test", "rules", str(cases)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rules = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())
    names = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    asked = {
        case["alertname"]
        for test in yaml.safe_load(cases.read_text())["tests"]
        for case in test.get("alert_rule_test", [])
        if case["exp_alerts"]
    }
    assert asked == names
    page = (ROOT / "docs" / "how-to" / "compose.md").read_text()
    assert names == set(re.findall(r"`([A-Z]\w+)`(?=[,| ][^.]*\|)", page))


def test_grafanas_files_name_only_what_exists() -> None:
    """
    Every data source, variable and panel that is named is there, once; links are what Explore reads; nothing overlaps.
    """
    uids = {source["uid"] for source in SOURCES}
    assert len(uids) == len(SOURCES) == 4
    named = re.findall(
        r'"uid": "(\w+)"', json.dumps([DASHBOARD["panels"], DASHBOARD["templating"], DASHBOARD["annotations"]])
    )
    assert set(named) <= uids
    assert {uid for source in SOURCES for uid in re.findall(r"'datasourceUid': '(\w+)'", str(source))} <= uids
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = {
        name
        for _, expression in [*queries("prometheus"), *queries("loki")]
        for name in re.findall(r"\$(\w+)", expression)
    }
    assert used - {"__rate_interval"} == variables
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [
        (column, line)
        for panel in DASHBOARD["panels"]
        for column in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for line in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(column for column, _ in cells) < 24
    for panel in PANELS.values():
        for link in panel["fieldConfig"]["defaults"]["links"]:
            panes = json.loads(unquote(parse_qs(urlsplit(link["url"]).query)["panes"][0]))
            assert panes["a"]["datasource"] in uids


def test_the_containers_get_the_files_where_grafana_looks() -> None:
    """
    The provisioning directory, the provider's path and the home page are where docker-compose.yml mounts them.
    """
    grafana = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["grafana"]
    mounts = dict(volume.removesuffix(":ro").split(":") for volume in grafana["volumes"])
    for source in mounts:
        assert (ROOT / source).exists(), source
    (provider,) = yaml.safe_load((COMPOSE / "grafana" / "dashboards.yml").read_text())["providers"]
    inside = {target: source for source, target in mounts.items()}
    assert provider["options"]["path"] in inside
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / inside[home.rpartition("/")[0]] / home.rpartition("/")[2]).exists()
