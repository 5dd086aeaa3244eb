"""
The environment and code, read into one frozen object: every variable's default, good and wrong values.
"""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_correlation import semconv
from otel_correlation.guard import ConfigError
from otel_correlation.settings import SAMPLERS, Settings, from_environment, with_overrides

CAPTURE = "OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_"
TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
GRPC = {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}


def installed(group: str, name: str) -> bool:
    """
    The entry points of a process that has one package more than ours.
    """
    return (group, name) in {
        ("opentelemetry_propagator", "b3"),
        ("opentelemetry_traces_sampler", "mine"),
        ("opentelemetry_traces_exporter", "zipkin"),
        ("opentelemetry_distro", "other"),
        ("opentelemetry_resource_detector", "gcp"),
    }


def read(**environ: str) -> Settings:
    """
    Settings from this environment and no other.
    """
    return from_environment(environ, known=installed)


def test_defaults() -> None:
    """
    With nothing set, every field has the default that the dataclass states.
    """
    assert read() == Settings()
    assert read().problems == ()
    assert Settings().propagators == ("tracecontext", "baggage", "xrequestid")
    assert (Settings().traces_exporters, Settings().logs_exporters, Settings().metrics_exporters) == (("otlp",), (), ())
    assert (Settings().schedule_delay_ms, Settings().ratio) == (500, 1.0)


# field, environment, value
GOOD: list[tuple[str, dict[str, str], object]] = [
    ("enabled", {semconv.OTEL_CORRELATION_ENABLED: "false"}, False),
    ("enabled", {semconv.OTEL_CORRELATION_ENABLED: "ON"}, True),
    ("sdk_disabled", {"OTEL_SDK_DISABLED": "TRUE"}, True),
    ("sdk_disabled", {"OTEL_SDK_DISABLED": "false"}, False),
    ("service_name", {"OTEL_SERVICE_NAME": "shop"}, "shop"),
    ("service_name", {"OTEL_RESOURCE_ATTRIBUTES": "a=1, service.name = my%20shop ,b"}, "my shop"),
    ("service_name", {"OTEL_RESOURCE_ATTRIBUTES": "service.name=a", "OTEL_SERVICE_NAME": "b"}, "b"),
    ("service_name", {"OTEL_RESOURCE_ATTRIBUTES": "service.name,x=service.name"}, ""),
    (
        "request_id_headers",
        {semconv.OTEL_CORRELATION_REQUEST_ID_HEADERS: "X-Kong-Request-ID, x-request-id,X-Request-ID"},
        (b"x-kong-request-id", b"x-request-id"),
    ),
    ("response_header", {semconv.OTEL_CORRELATION_RESPONSE_HEADER: "X-Correlation-ID"}, "X-Correlation-ID"),
    ("mint", {semconv.OTEL_CORRELATION_MINT: "UUID"}, "uuid"),
    ("traceresponse", {semconv.OTEL_CORRELATION_TRACERESPONSE: "true"}, True),
    ("traceresponse", {semconv.OTEL_CORRELATION_TRACERESPONSE: "traceresponse"}, True),
    ("traceresponse", {semconv.OTEL_CORRELATION_TRACERESPONSE: "both"}, True),
    ("traceresponse", {semconv.OTEL_CORRELATION_TRACERESPONSE: "server-timing"}, False),
    ("server_timing", {semconv.OTEL_CORRELATION_TRACERESPONSE: "server-timing"}, True),
    ("server_timing", {semconv.OTEL_CORRELATION_TRACERESPONSE: "both"}, True),
    ("server_timing", {semconv.OTEL_CORRELATION_TRACERESPONSE: "true"}, False),
    ("log_format", {semconv.OTEL_CORRELATION_LOG_FORMAT: "json"}, "json"),
    ("log_preset", {semconv.OTEL_CORRELATION_LOG_PRESET: "ECS"}, "ecs"),
    (
        "log_fields",
        {semconv.OTEL_CORRELATION_LOG_FIELDS: "trace_id=traceId, request_id=req,"},
        ("trace_id=traceId", "request_id=req"),
    ),
    ("logs_export", {semconv.OTEL_CORRELATION_LOGS_EXPORT: "sampled"}, "sampled"),
    ("query_values", {semconv.OTEL_CORRELATION_QUERY_VALUES: "none"}, "none"),
    ("websocket", {semconv.OTEL_CORRELATION_WEBSOCKET: "message"}, "message"),
    ("sql_comments", {semconv.OTEL_CORRELATION_SQL_COMMENTS: "true"}, True),
    ("patch_threads", {semconv.OTEL_CORRELATION_PATCH_THREADS: "off"}, False),
    ("messages", {semconv.OTEL_CORRELATION_MESSAGES: "Link"}, "link"),
    ("edge", {semconv.OTEL_CORRELATION_EDGE: "open"}, "open"),
    ("edge", {semconv.OTEL_CORRELATION_EDGE: "PUBLIC"}, "public"),
    (
        "trusted_networks",
        {semconv.OTEL_CORRELATION_TRUSTED_NETWORKS: "10.0.0.0/8, FD00::/8,192.0.2.7 , UNIX,::ffff:10.0.0.0/104"},
        ("10.0.0.0/8", "fd00::/8", "192.0.2.7/32", "unix"),
    ),
    ("trusted_networks", {semconv.OTEL_CORRELATION_TRUSTED_NETWORKS: "none"}, ("none",)),
    ("trusted_proxies", {semconv.OTEL_CORRELATION_TRUSTED_PROXIES: "127.0.0.1,::1"}, ("127.0.0.1/32", "::1/128")),
    ("force_sample_header", {semconv.OTEL_CORRELATION_FORCE_SAMPLE_HEADER: "X-Force"}, "X-Force"),
    (
        "outbound_traceparent",
        {semconv.OTEL_CORRELATION_OUTBOUND_TRACEPARENT: "*.Internal, localhost,10.0.0.0/8,API.example.com."},
        ("*.internal", "localhost", "10.0.0.0/8", "api.example.com"),
    ),
    ("outbound_baggage", {semconv.OTEL_CORRELATION_OUTBOUND_BAGGAGE: "none"}, ("none",)),
    ("outbound_request_id", {semconv.OTEL_CORRELATION_OUTBOUND_REQUEST_ID: "*"}, ("*",)),
    ("stores", {semconv.OTEL_CORRELATION_STORES: "http://a , b=http://b,,"}, ("http://a", "b=http://b")),
    ("propagators", {"OTEL_PROPAGATORS": "baggage,b3,baggage"}, ("baggage", "b3")),
    ("propagators", {"OTEL_PROPAGATORS": "none"}, ()),
    ("propagators", {"OTEL_PROPAGATORS": "None"}, ()),
    *[("sampler", {"OTEL_TRACES_SAMPLER": name.upper()}, name) for name in SAMPLERS],
    ("sampler", {"OTEL_TRACES_SAMPLER": "mine"}, "mine"),
    ("sampler_arg", {"OTEL_TRACES_SAMPLER": "mine", "OTEL_TRACES_SAMPLER_ARG": "x=1"}, "x=1"),
    ("ratio", {"OTEL_TRACES_SAMPLER": "mine", "OTEL_TRACES_SAMPLER_ARG": "x=1"}, 1.0),
    ("ratio", {"OTEL_TRACES_SAMPLER": "always_on", "OTEL_TRACES_SAMPLER_ARG": "x"}, 1.0),
    ("ratio", {"OTEL_TRACES_SAMPLER_ARG": "0.25"}, 0.25),
    ("ratio", {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"}, 0.0),
    ("ratio", {"OTEL_TRACES_SAMPLER_ARG": "1"}, 1.0),
    ("traces_exporters", {"OTEL_TRACES_EXPORTER": "none"}, ()),
    ("traces_exporters", {"OTEL_TRACES_EXPORTER": "console, otlp,zipkin,otlp"}, ("console", "otlp", "zipkin")),
    ("metrics_exporters", {"OTEL_METRICS_EXPORTER": "otlp"}, ("otlp",)),
    ("logs_exporters", {"OTEL_LOGS_EXPORTER": "otlp_proto_grpc"}, ("otlp_proto_grpc",)),
    ("traces_protocol", GRPC, "grpc"),
    ("metrics_protocol", GRPC, "grpc"),
    ("logs_protocol", GRPC, "grpc"),
    ("logs_protocol", {**GRPC, "OTEL_EXPORTER_OTLP_LOGS_PROTOCOL": "http/protobuf"}, "http/protobuf"),
    ("traces_endpoint", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, "http://c:4318/v1/traces"),
    ("traces_endpoint", {"OTEL_EXPORTER_OTLP_ENDPOINT": "https://c/x/"}, "https://c/x/v1/traces"),
    ("traces_endpoint", {TRACES_ENDPOINT: "http://c:4318/own"}, "http://c:4318/own"),
    ("traces_endpoint", {TRACES_ENDPOINT: "http://a", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://b"}, "http://a"),
    ("traces_endpoint", {**GRPC, "OTEL_EXPORTER_OTLP_ENDPOINT": "c:4317"}, "c:4317"),
    ("traces_endpoint", {**GRPC, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, "http://c:4317"),
    ("traces_endpoint", GRPC, "http://localhost:4317"),
    ("endpoint_is_default", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, False),
    ("endpoint_is_default", GRPC, True),
    ("schedule_delay_ms", {"OTEL_BSP_SCHEDULE_DELAY": "0"}, 0),
    ("max_queue_size", {"OTEL_BSP_MAX_QUEUE_SIZE": "10000"}, 10_000),
    ("max_batch_size", {"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "7"}, 7),
    ("max_batch_size", {"OTEL_BSP_MAX_QUEUE_SIZE": "100"}, 100),
    ("queue_bytes", {semconv.OTEL_CORRELATION_QUEUE_BYTES: "1000000"}, 1_000_000),
    ("log_level", {"OTEL_PYTHON_LOG_LEVEL": "WARNING"}, "warning"),
    ("log_correlation", {"OTEL_PYTHON_LOG_CORRELATION": "true"}, True),
    ("semconv_dup", {"OTEL_SEMCONV_STABILITY_OPT_IN": "database, HTTP/dup"}, True),
    ("semconv_dup", {"OTEL_SEMCONV_STABILITY_OPT_IN": "http"}, False),
    ("capture_server_request", {CAPTURE + "SERVER_REQUEST": "accept, x-.*"}, ("accept", "x-.*")),
    ("capture_server_response", {CAPTURE + "SERVER_RESPONSE": "a"}, ("a",)),
    ("capture_client_request", {CAPTURE + "CLIENT_REQUEST": "a"}, ("a",)),
    ("capture_client_response", {CAPTURE + "CLIENT_RESPONSE": "a"}, ("a",)),
    ("sanitize_fields", {CAPTURE + "SANITIZE_FIELDS": "cookie,.*secret.*"}, ("cookie", ".*secret.*")),
    ("excluded_server", {"OTEL_PYTHON_EXCLUDED_URLS": "health"}, "health"),
    ("excluded_server", {"OTEL_PYTHON_EXCLUDED_URLS": "a", "OTEL_PYTHON_FASTAPI_EXCLUDED_URLS": "b"}, "b"),
    ("excluded_client", {"OTEL_PYTHON_EXCLUDED_URLS": "a", "OTEL_PYTHON_HTTPX_EXCLUDED_URLS": "c"}, "c"),
    ("excluded_client", {"OTEL_PYTHON_FASTAPI_EXCLUDED_URLS": "b"}, ""),
]


@pytest.mark.parametrize(("field", "environ", "value"), GOOD)
def test_good_values(field: str, environ: dict[str, str], value: object) -> None:
    """
    A good value is used and nothing is reported, with whitespace around it, too.
    """
    for spaced in (environ, {name: f" {text}\n" for name, text in environ.items()}):
        settings = from_environment(spaced, known=installed)
        assert getattr(settings, field) == value
        assert settings.problems == ()


def test_every_field_is_read() -> None:
    """
    The table of good values covers every setting.
    """
    assert {field for field, _, _ in GOOD} == {entry.name for entry in fields(Settings)} - {"problems"}


@pytest.mark.parametrize("environ", [environ for _, environ, _ in GOOD])
def test_empty_is_unset(environ: dict[str, str]) -> None:
    """
    An empty or blank variable is an unset one (OpenTelemetry specification).
    """
    for blank in ("", "  \t"):
        settings = from_environment(dict.fromkeys(environ, blank), known=installed)
        assert settings == Settings()
        assert settings.problems == ()


# variable, wrong value, what the line says is used, field, its value then
WRONG: list[tuple[str, str, str, str, object]] = [
    (semconv.OTEL_CORRELATION_ENABLED, "maybe", "true", "enabled", True),
    ("OTEL_SDK_DISABLED", "1", "false", "sdk_disabled", False),
    ("OTEL_PYTHON_LOG_LEVEL", "loud", "info", "log_level", "info"),
    (
        semconv.OTEL_CORRELATION_REQUEST_ID_HEADERS,
        "x-a,bad name",
        "X-Request-ID",
        "request_id_headers",
        (b"x-request-id",),
    ),
    (semconv.OTEL_CORRELATION_REQUEST_ID_HEADERS, ", ,", "X-Request-ID", "request_id_headers", (b"x-request-id",)),
    (semconv.OTEL_CORRELATION_RESPONSE_HEADER, "a,b", "X-Request-ID", "response_header", "X-Request-ID"),
    (semconv.OTEL_CORRELATION_RESPONSE_HEADER, "x\r\nSet-Cookie: a", "X-Request-ID", "response_header", "X-Request-ID"),
    (semconv.OTEL_CORRELATION_MINT, "ulid", "hex", "mint", "hex"),
    (semconv.OTEL_CORRELATION_TRACERESPONSE, "yes please", "none", "traceresponse", False),
    (semconv.OTEL_CORRELATION_LOG_FORMAT, "xml", "auto", "log_format", "auto"),
    (semconv.OTEL_CORRELATION_LOG_PRESET, "splunk", "otel", "log_preset", "otel"),
    *[
        (semconv.OTEL_CORRELATION_LOG_FIELDS, value, "its own name", "log_fields", ())
        for value in ("trace", "trace=t", "trace_id=", "trace_id=a b", "trace_id=" + "x" * 61, "trace_id=span_id")
    ],
    (semconv.OTEL_CORRELATION_LOGS_EXPORT, "some", "all", "logs_export", "all"),
    (semconv.OTEL_CORRELATION_QUERY_VALUES, "no", "sensitive", "query_values", "sensitive"),
    (semconv.OTEL_CORRELATION_WEBSOCKET, "frame", "connection", "websocket", "connection"),
    (semconv.OTEL_CORRELATION_SQL_COMMENTS, "some", "false", "sql_comments", False),
    (semconv.OTEL_CORRELATION_PATCH_THREADS, "some", "true", "patch_threads", True),
    (semconv.OTEL_CORRELATION_MESSAGES, "join", "continue", "messages", "continue"),
    ("OTEL_PROPAGATORS", "jaeger", "tracecontext,baggage,xrequestid", "propagators", Settings().propagators),
    ("OTEL_PROPAGATORS", "none,baggage", "none", "propagators", ()),
    ("OTEL_TRACES_SAMPLER", "sometimes", "parentbased_traceidratio", "sampler", "parentbased_traceidratio"),
    *[("OTEL_TRACES_SAMPLER_ARG", value, "1.0", "ratio", 1.0) for value in ("1.5", "-0.1", "abc", "nan", "50%", "0,5")],
    ("OTEL_TRACES_EXPORTER", "jaeger", "otlp", "traces_exporters", ("otlp",)),
    ("OTEL_TRACES_EXPORTER", "otlp,none", "none", "traces_exporters", ()),
    ("OTEL_METRICS_EXPORTER", "statsd", "none", "metrics_exporters", ()),
    ("OTEL_LOGS_EXPORTER", "syslog", "none", "logs_exporters", ()),
    ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "http/protobuf", "traces_protocol", "http/protobuf"),
    ("OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", "tcp", "http/protobuf", "logs_protocol", "http/protobuf"),
    *[
        (
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            value,
            Settings().traces_endpoint,
            "traces_endpoint",
            Settings().traces_endpoint,
        )
        for value in (
            "collector:4318",
            "ftp://c",
            "http://",
            "http://:4318",
            "http://c:port",
            "http://c:0",
            "http://c:99999",
            "http://[::1",
            "http://a b:4318",
        )
    ],
    ("OTEL_BSP_SCHEDULE_DELAY", "-1", "500", "schedule_delay_ms", 500),
    ("OTEL_BSP_MAX_QUEUE_SIZE", "0", "2048", "max_queue_size", 2_048),
    ("OTEL_BSP_MAX_QUEUE_SIZE", "many", "2048", "max_queue_size", 2_048),
    ("OTEL_BSP_MAX_QUEUE_SIZE", "1e3", "2048", "max_queue_size", 2_048),
    ("OTEL_BSP_MAX_QUEUE_SIZE", "\u0661\u0662", "2048", "max_queue_size", 2_048),
    ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "0.5", "512", "max_batch_size", 512),
    *[
        (semconv.OTEL_CORRELATION_QUEUE_BYTES, value, "33554432", "queue_bytes", 33_554_432)
        for value in ("0", "-1", "32MiB", "1e6", "9" * 13)
    ],
    ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4096", "2048", "max_batch_size", 2_048),
    ("OTEL_PYTHON_LOG_CORRELATION", "2", "false", "log_correlation", False),
    *[("OTEL_SEMCONV_STABILITY_OPT_IN", value, "http", "semconv_dup", False) for value in ("htpp/dup", "old", "/dup")],
    *[
        (semconv.OTEL_CORRELATION_STORES, value, "no store", "stores", (value,))
        for value in ("lala", "ftp://a", "http:/")
    ],
    ("OTEL_PYTHON_DISTRO", "bogus", "otel_correlation", "enabled", True),
    ("OTEL_EXPERIMENTAL_RESOURCE_DETECTORS", "bogus", "the other detectors", "enabled", True),
    # Who says something about trust wants less of it than there is by default: the closed side is the safe one.
    (semconv.OTEL_CORRELATION_EDGE, "pubic", "public", "edge", "public"),
    *[
        (
            semconv.OTEL_CORRELATION_TRUSTED_NETWORKS,
            value,
            "an entry that matches nothing",
            "trusted_networks",
            ("none",),
        )
        for value in ("10.0.0.1/8", "10.0.0.0/33", "internal", "10.*", "http://10.0.0.1", "*", "fe80::1%eth0")
    ],
    (semconv.OTEL_CORRELATION_TRUSTED_NETWORKS, ",", "none", "trusted_networks", ("none",)),
    (semconv.OTEL_CORRELATION_TRUSTED_PROXIES, "nginx", "an entry that matches nothing", "trusted_proxies", ("none",)),
    (semconv.OTEL_CORRELATION_FORCE_SAMPLE_HEADER, "X-Force: 1", "none", "force_sample_header", ""),
    *[
        (
            semconv.OTEL_CORRELATION_OUTBOUND_TRACEPARENT,
            value,
            "an entry that matches nothing",
            "outbound_traceparent",
            ("none",),
        )
        for value in ("http://a", "a:80", "10.*", "10.0.0.256", "10.0.0.1/8", "2130706433", "0x7f.0x1", "*a", "a.*")
    ],
    (semconv.OTEL_CORRELATION_OUTBOUND_BAGGAGE, "-a", "an entry that matches nothing", "outbound_baggage", ("none",)),
    (
        semconv.OTEL_CORRELATION_OUTBOUND_REQUEST_ID,
        "b\xfccher.de",
        "an entry that matches nothing",
        "outbound_request_id",
        ("none",),
    ),
]


# Of what should be an address and is none, any part may be a password or a key.
HIDDEN = {
    *(("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{rest}") for rest in (":4318", "c:port", "c:99999", "[::1", "a b:4318")),
    *((semconv.OTEL_CORRELATION_STORES, value) for value in ("lala", "http:/")),
}


@pytest.mark.parametrize(("name", "value", "used", "field", "replacement"), WRONG)
def test_wrong_values(name: str, value: str, used: str, field: str, replacement: object) -> None:
    """
    A wrong value is one line that names the variable, the value and what is used instead; no value that may be a secret.
    """
    settings = read(**{name: value})
    assert getattr(settings, field) == replacement
    (line,) = settings.problems
    shown = "" if (name, value) in HIDDEN else f"={value!a}"
    assert line.startswith(f"{name}{shown} is not usable")
    assert line.endswith(f"; using {used} instead")
    assert line.isprintable()
    assert line.isascii()


CLOSED: dict[str, dict[str, Any]] = {
    semconv.OTEL_CORRELATION_EDGE: {"edge": "public"},
    semconv.OTEL_CORRELATION_TRUSTED_NETWORKS: {"trusted_networks": ("none",)},
    semconv.OTEL_CORRELATION_TRUSTED_PROXIES: {"trusted_proxies": ("none",)},
    semconv.OTEL_CORRELATION_OUTBOUND_TRACEPARENT: {"outbound_traceparent": ("none",)},
    semconv.OTEL_CORRELATION_OUTBOUND_BAGGAGE: {"outbound_baggage": ("none",)},
    semconv.OTEL_CORRELATION_OUTBOUND_REQUEST_ID: {"outbound_request_id": ("none",)},
}
NAMES = sorted({name for _, environ, _ in GOOD for name in environ} | {row[0] for row in WRONG})


@pytest.mark.parametrize("name", NAMES)
def test_not_utf8(name: str) -> None:
    """
    Bytes that are not UTF-8 are one line, whichever variable has them; the default is used, for trust the closed one.
    """
    settings = read(**{name: "caf\udce9"})
    assert settings == replace(Settings(), **CLOSED.get(name, {}))
    assert len(settings.problems) == 1
    hides = name.endswith(("ENDPOINT", "STORES", "ATTRIBUTES", "SAMPLER_ARG"))
    assert settings.problems[0].startswith(f"{name} is" if hides else f"{name}='caf\\udce9' is not usable")


@pytest.mark.parametrize(
    "environ",
    [
        {"OTEL_SEMCONV_STABILITY_OPT_IN": "HTTP/dup,database,code/dup,messaging,gen_ai_latest_experimental"},
        {"OTEL_PYTHON_DISTRO": "otel_correlation"},
        {"OTEL_EXPERIMENTAL_RESOURCE_DETECTORS": "otel,process,*,gcp"},
        {"OTEL_PYTHON_DISTRO": "other"},
    ],
)
def test_what_stock_packages_know_is_no_problem(environ: dict[str, str]) -> None:
    """
    A category of the conventions, an installed distribution or resource detector: nothing is said.
    """
    assert read(**environ).problems == ()


def test_partly_wrong_lists() -> None:
    """
    Of a list the good names are used, and each wrong one is a line.
    """
    settings = read(OTEL_PROPAGATORS="b3,x,tracecontext,y", OTEL_TRACES_EXPORTER="console,z")
    assert (settings.propagators, settings.traces_exporters) == (("b3", "tracecontext"), ("console",))
    assert sorted(line.split(" ")[0] for line in settings.problems) == [
        "OTEL_PROPAGATORS='x'",
        "OTEL_PROPAGATORS='y'",
        "OTEL_TRACES_EXPORTER='z'",
    ]
    settings = read(
        OTEL_CORRELATION_TRUSTED_NETWORKS="10.0.0.0/8,10.0.0.1/8,x", OTEL_CORRELATION_OUTBOUND_BAGGAGE="a:1,orders"
    )
    assert (settings.trusted_networks, settings.outbound_baggage) == (("10.0.0.0/8",), ("orders",))
    assert len(settings.problems) == 3


def test_a_wrong_endpoint_of_one_signal() -> None:
    """
    Where the signal's own endpoint is wrong the general one is used, and the line says so.
    """
    settings = read(**{TRACES_ENDPOINT: "c:1", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://good:4318"})
    assert (settings.traces_endpoint, settings.endpoint_is_default) == ("http://good:4318/v1/traces", False)
    (line,) = settings.problems
    assert line.endswith("using http://good:4318/v1/traces instead")


def test_long_values_are_cut_in_the_line() -> None:
    """
    A line stays a line, however long the value is.
    """
    (line,) = read(**{semconv.OTEL_CORRELATION_MINT: "x" * 10_000}).problems
    assert len(line) < 300


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "OTEL_CORRELATION_TRUSTED_NETWORK",
            "OTEL_CORRELATION_TRUSTED_NETWORK is no setting; OTEL_CORRELATION_TRUSTED_NETWORKS is one",
        ),
        ("OTEL_CORRELATION_EGDE", "OTEL_CORRELATION_EGDE is no setting; OTEL_CORRELATION_EDGE is one"),
        ("OTEL_CORRELATION_", "OTEL_CORRELATION_ is no setting"),
        ("OTEL_CORRELATION_QQQ\n\udc80", "OTEL_CORRELATION_QQQ\\n\\udc80 is no setting"),
    ],
)
def test_a_misspelt_name_is_one_line(name: str, line: str) -> None:
    """
    A variable that begins like ours and is none is told, with the one that may be meant; an empty one is unset.
    """
    assert read(**{name: "x"}).problems == (line,)
    assert read(**{name: ""}).problems == ()
    assert read(OTEL_CORRELATION_STRICT="1").problems == ()


def test_what_kubernetes_sets_is_not_misspelt() -> None:
    """
    In a cluster with a Service whose name begins like our variables, pods start without a warning of them.
    """
    service, port = "OTEL_CORRELATION_VIEWER", "tcp://10.96.0.12:4318"
    names = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_OTLP_HTTP", "PORT", "PORT_4318_TCP", "PORT_4318_TCP_ADDR")
    assert from_environment({f"{service}_{name}": port for name in names}).problems == ()


def test_the_real_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Without arguments the process's environment and its installed entry points count.
    """
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "no-such-sampler")
    monkeypatch.setenv("OTEL_PROPAGATORS", "tracecontext,xrequestid")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    settings = from_environment()
    assert (settings.propagators, settings.traces_exporters) == (("tracecontext", "xrequestid"), ("console",))
    assert any("no-such-sampler" in line for line in settings.problems)


ANY_TEXT = st.text(st.characters(codec=None), max_size=40) | st.from_regex(r"[ -~]{0,20}", fullmatch=True)


@given(st.dictionaries(st.sampled_from(NAMES), ANY_TEXT))
def test_never_raises(environ: dict[str, str]) -> None:
    """
    No environment makes it raise; what comes out can be encoded, and every line names its variable.
    """
    settings = from_environment(environ, known=installed)
    repr(settings).encode("ascii", "backslashreplace")
    settings.service_name.encode()
    settings.sampler_arg.encode()
    assert 0 <= settings.ratio <= 1
    assert settings.max_batch_size <= settings.max_queue_size
    for line in settings.problems:
        assert re.split("[= ]", line)[0] in environ
        assert line.isascii()
        assert line.isprintable()


SENT = f"hunter{1 + 1}"


@pytest.mark.parametrize(
    "value",
    [
        f"Authorization: Bearer {SENT}",
        f"Authorization: Bearer {SENT}==",
        f"Bearer {SENT}",
        SENT,
        f"{SENT}==",
        f"api-key={SENT},Authorization: {SENT}",
        f"x y={SENT}",
        f"api-key={SENT}%0d%0aInjected: 1",
    ],
)
@pytest.mark.parametrize("signal", ["", "TRACES_", "METRICS_", "LOGS_"])
def test_headers_that_cannot_be_read_are_not_shown(signal: str, value: str) -> None:
    """
    One line says how to write them, and shows nothing of them; doctor and the service say the same.
    """
    name = f"OTEL_EXPORTER_OTLP_{signal}HEADERS"
    (line,) = read(**{name: value}).problems if value != f"{SENT}==" else (name,)
    assert line.startswith(name)
    assert SENT not in line
    if value != f"{SENT}==":  # A header of that name, with = as its value.
        assert "Authorization=Bearer%20KEY" in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", f"htp://user:{SENT}@h:4318"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", f"user:{SENT}@h:4318"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://user:{SENT}/x@h:4318"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"h:4318/v1/traces?api_key={SENT}"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"ftp://h/{SENT}"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", SENT),
        (semconv.OTEL_CORRELATION_STORES, f"tempo:http://u:{SENT}@h"),
        (semconv.OTEL_CORRELATION_STORES, f"ftp://h?token={SENT}"),
        (semconv.OTEL_CORRELATION_TRUSTED_NETWORKS, f"http://u:{SENT}@h"),
        ("OTEL_CORRELATION_TOKEN", SENT),
    ],
)
def test_a_wrong_address_shows_no_credential(name: str, value: str) -> None:
    """
    Wherever in it the credential stands, and whichever variable it was put into.
    """
    problems = read(**{name: value}).problems
    assert problems
    assert SENT not in "".join(problems)


@pytest.mark.parametrize("name", ["stores", "traces_endpoint", "sampler_arg"])
def test_an_address_of_a_wrong_type_in_code_is_not_shown(name: str) -> None:
    """
    The error names the setting and the type to pass; what was passed may hold a password.
    """
    with pytest.raises(ConfigError, match=f"^{name}: pass a ") as caught:
        with_overrides(Settings(), {name: {f"http://u:{SENT}@h"}})
    assert SENT not in str(caught.value)


def test_frozen() -> None:
    """
    Settings do not change after they were read.
    """
    settings: Any = Settings()
    with pytest.raises(FrozenInstanceError):
        settings.ratio = 0.5


class TestOverrides:
    @pytest.mark.parametrize(
        ("name", "given_value", "value"),
        [
            ("enabled", False, False),
            ("service_name", "shop", "shop"),
            ("request_id_headers", ["X-Kong-Request-ID", b"X-Request-ID"], (b"x-kong-request-id", b"x-request-id")),
            ("request_id_headers", "X-Request-ID", (b"x-request-id",)),
            ("response_header", "X-Correlation-ID", "X-Correlation-ID"),
            ("mint", "uuid", "uuid"),
            ("ratio", 0.5, 0.5),
            ("ratio", 1, 1.0),
            ("ratio", 0, 0.0),
            ("propagators", ["baggage"], ("baggage",)),
            ("propagators", (), ()),
            ("traces_protocol", "grpc", "grpc"),
            ("schedule_delay_ms", 0, 0),
            ("max_queue_size", 1, 1),
            ("trusted_networks", ["10.0.0.0/8", "::1"], ("10.0.0.0/8", "::1/128")),
            ("outbound_baggage", ("API.example.com",), ("api.example.com",)),
            ("force_sample_header", "X-Force", "X-Force"),
            ("edge", "public", "public"),
            ("log_preset", "gcp", "gcp"),
            ("log_fields", ["trace_id=traceId"], ("trace_id=traceId",)),
        ],
    )
    def test_good(self, name: str, given_value: object, value: object) -> None:
        """
        A value passed in code wins, in its canonical form; the rest and the problems stay.
        """
        before = Settings(sampler="always_on", problems=("a line",))
        after = with_overrides(before, {name: given_value})
        assert getattr(after, name) == value
        assert type(getattr(after, name)) is type(value)
        assert (after.sampler, after.problems) == ("always_on", ("a line",))

    @pytest.mark.parametrize(
        ("name", "value", "says"),
        [
            ("no_such", 1, "no_such"),
            ("problems", ("x",), "problems"),
            ("enabled", "yes", "bool"),
            ("enabled", 1, "bool"),
            ("service_name", None, "str"),
            ("service_name", b"shop", "str"),
            ("request_id_headers", [], "list of header names"),
            ("request_id_headers", 5, "list of header names"),
            ("request_id_headers", b"x-request-id", "list of header names"),
            ("request_id_headers", ["bad name"], "'bad name'"),
            ("request_id_headers", [b"caf\xe9"], "xe9"),
            ("request_id_headers", [7], "7"),
            ("response_header", "a b", "one header name"),
            ("response_header", None, "one header name"),
            ("mint", "ulid", "one of hex, uuid"),
            ("log_preset", "splunk", "one of otel, ecs, gcp, datadog"),
            ("log_fields", "trace_id=traceId", "tuple"),
            ("log_fields", ["trace_id=span_id"], "another field has that name"),
            ("log_fields", ["trace=t"], "name=new_name"),
            ("mint", ["hex"], "one of hex, uuid"),
            ("traces_protocol", "http/json", "one of http/protobuf, grpc"),
            ("ratio", 1.5, "0 to 1"),
            ("ratio", -0.1, "0 to 1"),
            ("ratio", float("nan"), "0 to 1"),
            ("ratio", True, "0 to 1"),
            ("ratio", "0.5", "0 to 1"),
            ("propagators", "tracecontext", "tuple"),
            ("propagators", [1], "tuple"),
            ("max_queue_size", 0, "1 or more"),
            ("max_batch_size", -1, "1 or more"),
            ("queue_bytes", 0, "1 or more"),
            ("queue_bytes", "32MiB", "pass a int"),
            ("schedule_delay_ms", -1, "0 or more"),
            ("schedule_delay_ms", 1.5, "int"),
            ("schedule_delay_ms", True, "int"),
            ("edge", "pubic", "one of open, public"),
            ("trusted_networks", ["10.0.0.1/8"], "host bits"),
            ("trusted_networks", "10.0.0.0/8", "tuple"),
            ("trusted_proxies", ["nginx"], "not an address"),
            ("outbound_baggage", ["a:80"], "no port"),
            ("outbound_traceparent", [1], "tuple"),
            ("force_sample_header", "X-Force: 1", "one header name"),
            ("force_sample_header", None, "one header name"),
        ],
    )
    def test_wrong(self, name: str, value: object, says: str) -> None:
        """
        A wrong name, type or value in code is a ConfigError that names the setting and the fix.
        """
        with pytest.raises(ConfigError) as caught:
            with_overrides(Settings(), {name: value})
        assert name in str(caught.value)
        assert says in str(caught.value)
