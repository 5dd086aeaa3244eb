"""
The names and values that Elastic, Google Cloud and Datadog want, in our lines and in those of others.
"""

from __future__ import annotations

import json
import logging
import logging.config
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_correlation import identity, logs, semconv
from otel_correlation.logs import presets
from otel_correlation.settings import Settings
from tests.unit.logs_planted import PASSWORD, fail
from tests.unit.logs_pristine import SPAN_TEXT, TRACE_TEXT, Keep, pristine, request

if TYPE_CHECKING:
    from collections.abc import Iterator

PRESETS = ["otel", "ecs", "gcp", "datadog"]
LOW_BITS = str(int(TRACE_TEXT[16:], 16))
SPAN_BITS = str(int(SPAN_TEXT, 16))


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("GOOGLE_CLOUD_PROJECT", "DD_ENV", "DD_VERSION", "OTEL_RESOURCE_ATTRIBUTES"):
        monkeypatch.delenv(name, raising=False)
    with pristine():
        yield


def one(preset: Any, *, extra: dict[str, Any] | None = None, fields: tuple[str, ...] = (), **more: Any) -> Any:
    """
    One line of ours, of a request, as JSON.
    """
    logs.install(Settings(service_name="orders", log_preset=preset, log_fields=fields))
    kept = Keep(logs.JsonLines())
    logger = logging.getLogger("app")
    logger.handlers = [kept]
    logger.setLevel(logging.DEBUG)
    with request():
        identity.bind(tenant="acme")
        logger.log(more.pop("level", logging.WARNING), "hello %s", 1, extra=extra, **more)
    (line,) = kept.lines
    assert line.isprintable()
    return json.loads(line)


def test_the_default_is_opentelemetrys() -> None:
    """
    Without a preset a line has the names and the order that it always had.
    """
    line = one("otel")
    line.pop("timestamp")
    line.pop("correlation_id", None)
    assert list(line.items()) == [
        ("level", "WARNING"),
        ("logger", "app"),
        ("message", "hello 1"),
        ("trace_id", TRACE_TEXT),
        ("span_id", SPAN_TEXT),
        ("trace_flags", "01"),
        ("request_id", "order-7"),
        ("service_name", "orders"),
        ("tenant", "acme"),
    ]


def test_elastic_common_schema() -> None:
    """
    ECS: ``@timestamp``, ``log.level`` and ``message`` first, ``ecs.version`` always, the ids where Kibana looks for them.
    """
    line = one("ecs")
    assert list(line)[:3] == ["@timestamp", "log.level", "message"]
    assert line.pop("@timestamp").endswith("Z")
    assert line == {
        "log.level": "warning",
        "message": "hello 1",
        "ecs.version": "8.11.0",
        "log.logger": "app",
        "trace.id": TRACE_TEXT,
        "span.id": SPAN_TEXT,
        "trace_flags": "01",
        "http.request.id": "order-7",
        "service.name": "orders",
        "tenant": "acme",
    }


@pytest.mark.parametrize(("project", "trace"), [("shop-1", f"projects/shop-1/traces/{TRACE_TEXT}"), ("", TRACE_TEXT)])
def test_google_cloud(project: str, trace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Google Cloud: ``severity``, ``time`` and the special fields; the trace with its project where that is known.
    """
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", project)
    line = one("gcp")
    assert line.pop("time").endswith("Z")
    assert line == {
        "severity": "WARNING",
        "logger": "app",
        "message": "hello 1",
        "logging.googleapis.com/trace": trace,
        "logging.googleapis.com/spanId": SPAN_TEXT,
        "logging.googleapis.com/trace_sampled": True,
        "request_id": "order-7",
        "service_name": "orders",
        "tenant": "acme",
    }


@pytest.mark.parametrize(
    ("level", "severity"),
    [(5, "DEBUG"), (10, "DEBUG"), (20, "INFO"), (25, "INFO"), (35, "WARNING"), (45, "ERROR"), (60, "CRITICAL")],
)
def test_google_clouds_severity_is_one_of_its_own(level: int, severity: str) -> None:
    """
    A level of the application's own becomes the next lower severity that exists.
    """
    assert one("gcp", level=level)["severity"] == severity if level >= logging.DEBUG else True
    record = logging.makeLogRecord({"levelno": level, "levelname": f"Level {level}"})
    names = presets.build(Settings(log_preset="gcp"), {})
    assert names.level is not None
    assert names.level(record) == severity


@pytest.mark.parametrize(
    ("environ", "tags"),
    [
        ({}, {}),
        ({"DD_ENV": "prod", "DD_VERSION": "1.2"}, {"dd.env": "prod", "dd.version": "1.2"}),
        (
            {"OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=prod, service.version=1%2E2,x"},
            {"dd.env": "prod", "dd.version": "1.2"},
        ),
        ({"OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=old"}, {"dd.env": "old"}),
    ],
)
def test_datadog(environ: dict[str, str], tags: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Datadog: ids as decimal 64 bits, ``status``, and unified service tagging as far as the environment says it.
    """
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    line = one("datadog")
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "status": "warning",
        "logger.name": "app",
        "message": "hello 1",
        "dd.trace_id": LOW_BITS,
        "dd.span_id": SPAN_BITS,
        "trace_flags": "01",
        "http.request_id": "order-7",
        "dd.service": "orders",
        **tags,
        "tenant": "acme",
    }


SUMMARIES: dict[str, dict[str, Any]] = {
    "otel": {"method": "GET", "route": "/items/{n}", "status": 200, "duration_ms": 12.5},
    "ecs": {
        "http.request.method": "GET",
        "http.route": "/items/{n}",
        "http.response.status_code": 200,
        "event.duration": 12_500_000,
    },
    "gcp": {
        "httpRequest": {"requestMethod": "GET", "requestUrl": "/items/{n}", "status": 200, "latency": "0.012500s"},
        "route": "/items/{n}",
    },
    "datadog": {"http.method": "GET", "http.route": "/items/{n}", "http.status_code": 200, "duration": 12_500_000},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_summary_line_and_bound_fields(preset: Any) -> None:
    """
    The one line of a request, and what ``bind`` put on it, are right under every preset.
    """
    with pristine() as out:
        logs.install(Settings(service_name="orders", log_preset=preset, log_format="json"))
        logs.settle()
        with request():
            identity.bind(tenant="acme")
            logs.summary("GET", "/items/{n}", "/items/3", 200, 12.5, extra={"close_code": 1000})
            logs.summary("GET", None, "/nowhere", 404, 1.0)
        first, second = (json.loads(line) for line in out.getvalue().splitlines())
    names = presets.build(Settings(log_preset=preset), {})
    shown = {name: first[name] for name in SUMMARIES[preset]}
    assert shown == SUMMARIES[preset]
    assert (first["tenant"], first["close_code"]) == ("acme", 1000)
    assert first[names.keys["request_id"]] == "order-7"
    assert "duration_ms" not in first or preset == "otel"
    assert "/nowhere" in json.dumps(second)


@pytest.mark.parametrize("preset", PRESETS)
def test_exceptions(preset: Any) -> None:
    """
    Tracebacks stand where the platform looks for them, and lose what a user sent.
    """
    try:
        fail("pydantic")
    except ValueError:
        line = one(preset, exc_info=True, stack_info=True)
    text = json.dumps(line)
    assert PASSWORD not in text
    key = {"otel": "exception", "ecs": "error.stack_trace", "gcp": "stack_trace", "datadog": "error.stack"}[preset]
    assert "ValidationError" in line[key]
    assert line["stack"].startswith("Stack (most recent call last)")
    if preset in {"ecs", "datadog"}:
        assert line["error.message"].startswith("1 validation error for User")
        kind = "error.type" if preset == "ecs" else "error.kind"
        assert line[kind].endswith("ValidationError")


def test_renames() -> None:
    """
    Renames come on top of a preset, for the ids and for every other field of a line.
    """
    line = one("otel", fields=("trace_id=traceId", "request_id=req", "level=lvl", "timestamp=ts", "message=msg"))
    assert (line["traceId"], line["req"], line["lvl"], line["msg"]) == (TRACE_TEXT, "order-7", "WARNING", "hello 1")
    assert not {"trace_id", "request_id", "level", "timestamp", "message"} & set(line)
    assert one("ecs", fields=("request_id=labels.request",))["labels.request"] == "order-7"


@pytest.mark.parametrize("preset", PRESETS)
def test_the_users_own_fields(preset: Any) -> None:
    """
    An extra that has the name of an id wins; one that has the name of another field is shown beside it.
    """
    names = presets.build(Settings(log_preset=preset), {})
    key, level = names.keys["request_id"], names.keys["level"]
    line = one(preset, extra={key: "mine", level: "loud"})
    assert line[key] == "mine"
    assert line[f"extra.{level}"] == "loud"
    assert one(preset, extra={"trace_id": "not hex"})[names.keys["trace_id"]] == "not hex"


@pytest.mark.parametrize("preset", PRESETS)
def test_records_stay_what_they_are(preset: Any) -> None:
    """
    Formats of the application's own name ``trace_id`` and ``request_id`` whatever the preset is.
    """
    logs.install(Settings(service_name="orders", log_preset=preset))
    kept = Keep(logging.Formatter("%(trace_id)s %(request_id)s %(message)s"))
    logging.getLogger("app").addHandler(kept)
    with request():
        logging.getLogger("app").warning("hello")
    assert kept.lines == [f"{TRACE_TEXT} order-7 hello"]


def test_an_applications_configuration_can_name_our_lines() -> None:
    """
    ``dictConfig`` gets our JSON lines by name, before we are installed, too, with the preset that is set then.
    """
    with pristine():
        logging.config.dictConfig(
            {
                "version": 1,
                "disable_existing_loggers": False,
                "formatters": {"json": {"()": "otel_correlation.logs.JsonLines"}},
                "handlers": {"out": {"()": Keep, "formatter": "json"}},
                "root": {"handlers": ["out"], "level": "INFO"},
            }
        )
        logs.install(Settings(service_name="orders", log_preset="datadog"))
        with request():
            logging.getLogger("app").info("hello")
        (kept,) = logging.getLogger().handlers
    assert isinstance(kept, Keep)
    assert json.loads(kept.lines[0])["dd.trace_id"] == LOW_BITS


ANY = st.text(max_size=40) | st.sampled_from([TRACE_TEXT, SPAN_TEXT, "", "0" * 32, "F" * 16, "01", "zz"])


@given(st.sampled_from(PRESETS), st.tuples(ANY, ANY, ANY, ANY, ANY))
def test_no_value_is_too_odd(preset: Any, values: tuple[str, str, str, str, str]) -> None:
    """
    Whatever an id's field holds, naming it does not raise, and nothing empty is named.
    """
    named = presets.build(Settings(log_preset=preset), {"GOOGLE_CLOUD_PROJECT": "p"}).named(values)
    assert len(named) == len([value for value in values if value])
    json.dumps(named)


def test_every_preset_names_fields_that_exist() -> None:
    """
    The tables rename fields of a line only, and never two to one name.
    """
    for preset, table in semconv.LOG_PRESETS.items():
        assert set(table) <= set(semconv.LOG_FIELDS), preset
        names = presets.build(Settings(log_preset=preset), {})  # type: ignore[arg-type]
        assert len(set(names.keys.values())) == len(semconv.LOG_FIELDS), preset
