"""
Exporters from variables: good values as the stock exporters read them, wrong ones without stopping anything.
"""

from __future__ import annotations

import logging
import shutil
from typing import TYPE_CHECKING, Any

import certifi
import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk._logs.export import ConsoleLogRecordExporter
from opentelemetry.sdk.trace.export import ConsoleSpanExporter

from otel_correlation import export, settings
from otel_correlation._version import __version__
from otel_correlation.export.exporters import GrpcLogExporter, GrpcSpanExporter
from otel_correlation.export.sending import HttpLogExporter, HttpSpanExporter

if TYPE_CHECKING:
    from pathlib import Path

PREFIX = "OTEL_EXPORTER_OTLP_"


def made(monkeypatch: pytest.MonkeyPatch, **variables: str) -> tuple[list[Any], list[Any], list[str]]:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OTEL_LOGS_EXPORTER", variables.get("OTEL_LOGS_EXPORTER", "otlp"))
    read = settings.from_environment()
    problems: list[str] = list(read.problems)
    return export.span_exporters(read, problems), export.log_exporters(read, problems), problems


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"ENDPOINT": "http://collector:4318"},
        {"ENDPOINT": "https://collector/base/", "COMPRESSION": "gzip", "TIMEOUT": "3.5"},
        {
            "TRACES_ENDPOINT": "http://one/custom/path",
            "ENDPOINT": "http://other",
            "TRACES_TIMEOUT": "2",
            "TIMEOUT": "9",
        },
        {"HEADERS": "api-key=secret,x-tenant=a%20b", "TRACES_COMPRESSION": "deflate"},
        {"HEADERS": "general=1", "TRACES_HEADERS": "Authorization=Bearer a=b"},
        {"HEADERS": "user-agent=mine", "COMPRESSION": "none"},
        {"ENDPOINT": "", "TIMEOUT": "", "HEADERS": "", "COMPRESSION": ""},
    ],
)
def test_variables_mean_what_they_mean_to_the_stock_exporter(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    """
    Endpoint, headers, timeout and compression come out as in the stock exporter, but for our user agent.
    """
    spans, _, problems = made(monkeypatch, **{PREFIX + name: value for name, value in variables.items()})
    stock = OTLPSpanExporter()._client
    sender = spans[0].sender
    assert problems == []
    assert sender.endpoint == stock._endpoint
    assert sender._timeout_s == stock._timeout
    assert sender._compression == stock._compression.value
    ours = {name.lower(): value for name, value in sender._headers.items()}
    theirs = {name.lower(): value for name, value in stock._headers.items()}
    if "mine" not in theirs["user-agent"]:
        theirs["user-agent"] = f"otel-correlation/{__version__} {theirs['user-agent']}"
    assert ours == theirs


def test_logs_have_their_own_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The logs' own variables win over the general ones, and the general endpoint gets the logs' path.
    """
    _, logs, problems = made(monkeypatch, **{PREFIX + "ENDPOINT": "http://c:1/x/", PREFIX + "LOGS_TIMEOUT": "4"})
    assert problems == []
    assert (logs[0].sender.endpoint, logs[0].sender._timeout_s) == ("http://c:1/x/v1/logs", 4.0)
    monkeypatch.setenv(PREFIX + "LOGS_ENDPOINT", "http://logs/exactly")
    _, logs, problems = made(monkeypatch)
    assert logs[0].sender.endpoint == "http://logs/exactly"


@pytest.mark.parametrize(
    ("name", "value", "used"),
    [
        ("TIMEOUT", "abc", "using 10"),
        ("TRACES_TIMEOUT", "-1", "using 10"),
        ("TIMEOUT", "nan", "using 10"),
        ("TIMEOUT", "inf", "using 10"),
        ("COMPRESSION", "snappy", "using none"),
        ("TRACES_COMPRESSION", "\udcff", "using none"),
        ("HEADERS", "secret-without-a-name", "using the other entries"),
        ("HEADERS", "good=1,bad name=secret", "using the other entries"),
        ("HEADERS", "k=secret%0d%0ainjected: 1", "using the other entries"),
        ("CERTIFICATE", "/does/not/exist.pem", "using the system's certificates"),
        ("TRACES_CERTIFICATE", "nul\\0", "using the system's certificates"),
        ("CLIENT_CERTIFICATE", "/does/not/exist.pem", "using no client certificate"),
        ("LOGS_ENDPOINT", "collector:4318", "using http://localhost:4318"),
        ("LOGS_ENDPOINT", "http://host:99999", "using http://localhost:4318"),
        ("ENDPOINT", "nonsense", "using http://localhost:4318"),
        ("LOGS_ENDPOINT", "http://[bad", "using http://localhost:431"),
    ],
)
@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_wrong_value_is_one_line_and_the_default(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, used: str, protocol: str
) -> None:
    """
    A wrong value of an exporter's variable gives one line with variable and replacement; both exporters are there.
    """
    if protocol == "grpc" and "ENDPOINT" in name and "[" not in value:
        return  # to gRPC these are names of hosts
    variable = PREFIX + name
    spans, logs, problems = made(monkeypatch, **{variable: value, PREFIX + "PROTOCOL": protocol})
    assert len(spans) == len(logs) == 1
    (problem,) = problems
    assert problem.startswith(variable)
    assert used in problem
    assert "secret" not in problem
    assert problem.isascii()
    if protocol == "grpc":
        for exporter in (spans[0], logs[0]):
            exporter._stock.get()  # the stock constructor raises on some of these values
            exporter.shutdown()


def test_wrong_headers_are_not_logged_with_their_values(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """
    The stock parser's warning, which prints the value, is never reached; good entries beside a bad one are kept.
    """
    caplog.set_level(logging.DEBUG)
    spans, _, _ = made(monkeypatch, **{PREFIX + "HEADERS": "secret-value,good=1,name=%E2%82%AC"})
    assert "secret-value" not in caplog.text
    assert spans[0].sender._headers["good"] == "1"
    assert spans[0].sender._headers["name"].encode("latin-1").decode() == "€"


def test_a_bad_certificate_file_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """
    A file that holds no certificate is as wrong as a missing one.
    """
    path = tmp_path / "ca.pem"
    path.write_text("not a certificate")
    _, _, problems = made(monkeypatch, **{PREFIX + "CERTIFICATE": str(path)})
    assert len(problems) == 1


@pytest.mark.parametrize(("own", "expected"), [(True, "own"), (False, "bundle")])
def test_the_exporters_certificate_wins_over_the_one_for_all_requests(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: bool, expected: str
) -> None:
    """
    ``OTEL_EXPORTER_OTLP_CERTIFICATE`` is used although ``REQUESTS_CA_BUNDLE`` is set; without it the bundle is.
    """
    paths = {"own": tmp_path / "own.pem", "bundle": tmp_path / "bundle.pem"}
    for path in paths.values():
        shutil.copy(certifi.where(), path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(paths["bundle"]))
    variables = {PREFIX + "CERTIFICATE": str(paths["own"])} if own else {}
    variables[PREFIX + "ENDPOINT"] = "https://collector:4318"
    spans, _, problems = made(monkeypatch, **variables)
    session = spans[0].sender._build().session
    used = session.merge_environment_settings("https://collector/", {}, None, None, None)["verify"]
    assert (problems, used) == ([], str(paths[expected]))


def test_an_unknown_credential_provider_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A credential provider that is not installed is one line; the exporters work without it.
    """
    spans, _, problems = made(monkeypatch, OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER="missing")
    assert len(spans) == 1
    assert len(problems) == 1


def test_the_protocol_decides_the_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Protocol and exporter names choose HTTP, gRPC or console; several exporters may run side by side.
    """
    spans, logs, _ = made(monkeypatch)
    assert (type(spans[0]), type(logs[0])) == (HttpSpanExporter, HttpLogExporter)
    spans, logs, _ = made(monkeypatch, OTEL_EXPORTER_OTLP_PROTOCOL="grpc")
    assert (type(spans[0]), type(logs[0])) == (GrpcSpanExporter, GrpcLogExporter)
    spans, logs, _ = made(
        monkeypatch, OTEL_TRACES_EXPORTER="otlp_proto_http,console", OTEL_LOGS_EXPORTER="console,otlp_proto_grpc"
    )
    assert [type(exporter) for exporter in spans] == [HttpSpanExporter, ConsoleSpanExporter]
    assert [type(exporter) for exporter in logs] == [ConsoleLogRecordExporter, GrpcLogExporter]


def test_a_third_party_exporter_that_cannot_be_made_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A named exporter whose entry point fails is one line; the others are there.
    """
    read = settings.from_environment({"OTEL_TRACES_EXPORTER": "broken,console"}, known=lambda _group, _name: True)
    problems: list[str] = []
    exporters = export.span_exporters(read, problems)
    assert [type(exporter) for exporter in exporters] == [ConsoleSpanExporter]
    assert len(problems) == 1
    assert "broken" in problems[0]


@pytest.mark.parametrize("name", ["SCHEDULE_DELAY", "MAX_QUEUE_SIZE", "MAX_EXPORT_BATCH_SIZE"])
def test_wrong_batch_variables_of_logs_are_said(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """
    A wrong ``OTEL_BLRP_*`` value is one line and the default.
    """
    monkeypatch.setenv(f"OTEL_BLRP_{name}", "abc")
    problems: list[str] = []
    export.log_pipeline(settings.from_environment({"OTEL_LOGS_EXPORTER": "console"}), problems)
    assert len(problems) == 1
    assert problems[0].startswith(f"OTEL_BLRP_{name}='abc'")
