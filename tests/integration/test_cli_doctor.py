"""
``otel-correlation doctor``: what it finds, and what it keeps to itself.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError

import pytest

from otel_correlation.cli import main
from otel_correlation.cli.doctor import mixed
from otel_correlation.local import LocalServer
from tests.integration.services import clean_environment, free_port


@dataclass(frozen=True)
class Told:
    status: int
    out: str
    err: str


Doctor = Callable[..., Told]


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """
    Runs the command with exactly these OpenTelemetry variables.
    """

    def run(**variables: str) -> Told:
        for name in set(os.environ) - set(clean_environment()):
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        status = main(["doctor"])
        captured = capsys.readouterr()
        return Told(status, captured.out, captured.err)

    return run


def test_doctor_finds_nothing_wrong_where_nothing_is(doctor: Doctor) -> None:
    """
    With a receiver that listens: status 0, our distribution runs, and the defaults are named.
    """
    with LocalServer(port=0) as local:
        done = doctor(OTEL_EXPORTER_OTLP_ENDPOINT=local.url, OTEL_SERVICE_NAME="shop")
    assert (done.status, done.err) == (0, ""), done.out
    for line in (
        "No problem found",
        "distro         otel_correlation",
        "service        shop",
        "parentbased_traceidratio 1",
    ):
        assert line in done.out


def test_doctor_names_every_problem(doctor: Doctor) -> None:
    """
    Nobody listening, a distribution that is not there, a misspelt setting, a wrong value: each is one marked line, status 1.
    """
    done = doctor(
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{free_port()}",
        OTEL_PYTHON_DISTRO="other",
        OTEL_CORRELATION_MINTT="uuid",
        OTEL_TRACES_SAMPLER_ARG="1.5",
        FASTAPI_OTEL_AUTO_CONFIGURE="true",
    )
    problems = [line for line in done.out.splitlines() if "PROBLEM" in line]
    assert done.status == 1
    for text in (
        "takes the traces",
        "OTEL_PYTHON_DISTRO='other' is not usable",
        "OTEL_CORRELATION_MINTT",
        "OTEL_TRACES_SAMPLER_ARG",
    ):
        assert sum(text in line for line in problems) == 1, (text, problems)
    assert len(problems) == 4
    assert "4 problems found" in done.out
    assert "FASTAPI_OTEL_AUTO_CONFIGURE is on" in done.out


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, ["every caller", "every host", "every host", "every host"]),
        ({"EDGE": "public"}, ["no caller", "internal hosts", "internal hosts", "internal hosts"]),
        (
            {
                "EDGE": "public",
                "TRUSTED_NETWORKS": "10.0.0.0/8,unix",
                "TRUSTED_PROXIES": "127.0.0.1",
                "FORCE_SAMPLE_HEADER": "X-Force",
                "OUTBOUND_TRACEPARENT": "api.example.com",
                "OUTBOUND_BAGGAGE": "none",
                "OUTBOUND_REQUEST_ID": "*",
            },
            [
                "callers in 10.0.0.0/8, unix, also behind 127.0.0.1/32; X-Force of theirs forces sampling",
                "internal hosts, api.example.com",
                "no host",
                "every host",
            ],
        ),
        ({"TRUSTED_NETWORKS": "none", "OUTBOUND_BAGGAGE": "a,b"}, ["no caller", "every host", "a, b", "every host"]),
    ],
)
def test_doctor_tells_who_is_trusted(doctor: Doctor, variables: dict[str, str], told: list[str]) -> None:
    """
    The policy in force: whose ids are continued, and which hosts get which of ours.
    """
    done = doctor(**{f"OTEL_CORRELATION_{name}": value for name, value in variables.items()})
    facts = ("continues", "traceparent to", "baggage to", "request id to")
    shown = [
        line.split(maxsplit=name.count(" ") + 1)[-1]
        for name in facts
        for line in done.out.splitlines()
        if line.startswith(f"  {name} ")
    ]
    assert shown == told


SECRET = f"hunter{1 + 1}"
LONG = "hcaik1QZ9vWxY3TkLmNoPq"


@pytest.mark.parametrize(
    ("log_format", "told"),
    [
        ("auto", "ours, with ids; where the application configures logging, the server's go out without ids, because "),
        ("none", "as without this package; the server's go out without ids, because its own format names none: set "),
        ("json", "json with ids, the server's too, whatever logging the application configures"),
    ],
)
def test_doctor_says_whose_lines_have_ids(doctor: Doctor, log_format: str, told: str) -> None:
    """
    One line says whether the server's lines show their ids, and where not, why and what to do.
    """
    done = doctor(OTEL_TRACES_EXPORTER="none", OTEL_CORRELATION_LOG_FORMAT=log_format)
    assert f"  log lines      {told}" in done.out
    assert ("--log-config" in done.out) == (log_format != "json")


def test_a_log_config_that_cannot_be_made_says_what_can(capsys: pytest.CaptureFixture[str]) -> None:
    """
    ``log-config`` takes ``json``, ``text`` or a format, and a level; anything else is one line and status 2.
    """
    for arguments in (["yaml"], ["json", "--level", "loud"]):
        assert main(["log-config", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("otel-correlation: log_config: ")
        assert captured.err.count("\n") == 1


def test_doctor_shows_no_secret(doctor: Doctor) -> None:
    """
    Values of headers, keys and users in URLs are masked; control characters in a value do not reach the terminal.
    """
    done = doctor(
        OTEL_EXPORTER_OTLP_HEADERS="authorization=Bearer hunter2,x-team=hunter2",
        OTEL_EXPORTER_OTLP_TRACES_HEADERS="api-key=hunter2",
        OTEL_EXPORTER_OTLP_CLIENT_KEY="/home/hunter2/key.pem",
        OTEL_EXPORTER_OTLP_ENDPOINT="http://user:hunter2@127.0.0.1:1",
        OTEL_CORRELATION_STORES="jaeger=http://user:hunter2@127.0.0.1:1",
        OTEL_SERVICE_NAME="shop\x1b[31m",
    )
    assert "hunter2" not in done.out + done.err
    assert "authorization=***,x-team=***" in done.out
    assert "\x1b" not in done.out


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("OTEL_EXPORTER_OTLP_HEADERS", f"Authorization: Bearer {SECRET}", "***"),
        ("OTEL_EXPORTER_OTLP_HEADERS", f"Authorization: Bearer {LONG}==", "***"),
        ("OTEL_EXPORTER_OTLP_HEADERS", f"{LONG}==", "***"),
        ("OTEL_EXPORTER_OTLP_HEADERS", f"x-team={SECRET},{SECRET}", "x-team=***,***"),
        ("OTEL_EXPORTER_OTLP_METRICS_HEADERS", SECRET, "***"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:1/?api_key={SECRET}", "http://127.0.0.1:1/?api_key=***"),
        (
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            f"http://127.0.0.1:1/otlp/{LONG}/v1#{SECRET}",
            "http://127.0.0.1:1/otlp/***/v1#***",
        ),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"http://127.0.0.1:1?{SECRET}", "http://127.0.0.1:1?***"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"http://127.0.0.1:1/{SECRET}", "http://127.0.0.1:1/***"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"http://:{SECRET}@127.0.0.1:1", "http://***@127.0.0.1:1"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"http://u:pa/{SECRET}@127.0.0.1:1", "http://***"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"http://u:12/{SECRET}@127.0.0.1:1", "http://***"),
        ("OTEL_CORRELATION_STORES", f"tempo=http://127.0.0.1:1?token={SECRET}", "tempo=http://127.0.0.1:1?token=***"),
        ("OTEL_CORRELATION_STORES", f"tempo=http://127.0.0.1:1#{SECRET}", "tempo=http://127.0.0.1:1#***"),
        (
            "OTEL_RESOURCE_ATTRIBUTES",
            f"service.version=1.2,api.key={SECRET},{SECRET}",
            "service.version=1.2,api.key=***,***",
        ),
        ("OTEL_TRACES_SAMPLER_ARG", f"endpoint=http://u:{SECRET}@h", "***"),
        ("OTEL_EXPORTER_JAEGER_PASSWORD", SECRET, "***"),
        ("OTEL_CORRELATION_MINTT", SECRET, "***"),
        ("OTEL_VENDOR_SETTING", SECRET, "***"),
        ("OTEL_SERVICE_NAME", LONG, "***"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "10", "10"),
        ("OTEL_PYTHON_FASTAPI_EXCLUDED_URLS", "health,^/live$", "health,^/live$"),
    ],
)
def test_doctor_shows_what_is_known_to_be_no_secret(doctor: Doctor, name: str, value: str, shown: str) -> None:
    """
    Names, numbers and addresses are shown; users, query values, fragments, random parts and unknown variables are not.
    """
    told = doctor(**{"OTEL_TRACES_EXPORTER": "otlp", name: value})
    assert SECRET not in told.out + told.err
    assert LONG not in told.out + told.err or name == "OTEL_SERVICE_NAME"
    assert [line.split()[-1] for line in told.out.splitlines() if line.startswith(f"  {name} ")] == [shown]


def test_doctor_says_how_to_write_headers(doctor: Doctor) -> None:
    """
    The usual mistake is one problem with the right spelling.
    """
    told = doctor(OTEL_TRACES_EXPORTER="none", OTEL_EXPORTER_OTLP_HEADERS=f"Authorization: Bearer {SECRET}")
    (problem,) = [line for line in told.out.splitlines() if "PROBLEM" in line]
    assert "OTEL_EXPORTER_OTLP_HEADERS" in problem
    assert "Authorization=Bearer%20KEY" in problem


def test_doctor_works_where_the_extra_is_missing(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    It is the command that tells what is missing, so it needs nothing of it.
    """
    for name in ("rich", "uvicorn"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "missing uvicorn, rich" in doctor(OTEL_TRACES_EXPORTER="none").out


def test_doctor_is_content_where_nothing_is_sent(doctor: Doctor) -> None:
    """
    Exporters that are off need no receiver; logs that are on are looked for at their own endpoint.
    """
    assert doctor(OTEL_TRACES_EXPORTER="none").status == 0
    told = doctor(
        OTEL_TRACES_EXPORTER="none",
        OTEL_LOGS_EXPORTER="otlp",
        OTEL_EXPORTER_OTLP_LOGS_ENDPOINT=f"http://127.0.0.1:{free_port()}/v1/logs",
    )
    assert (told.status, "nobody takes the logs" in told.out) == (1, True)


def test_doctor_says_what_is_switched_off(doctor: Doctor) -> None:
    """
    A switch that explains why nothing is seen is a problem by name, however odd the endpoint beside it.
    """
    told = doctor(
        OTEL_CORRELATION_ENABLED="false",
        OTEL_SDK_DISABLED="true",
        OTEL_EXPORTER_OTLP_ENDPOINT="localhost:4317",
        OTEL_EXPORTER_OTLP_PROTOCOL="grpc",
        OTEL_PYTHON_DISABLED_INSTRUMENTATIONS="httpx",
    )
    assert told.status == 1
    for text in ("OTEL_CORRELATION_ENABLED is false", "OTEL_SDK_DISABLED is true", "(disabled: httpx)", "otlp (grpc)"):
        assert text in told.out


@pytest.mark.parametrize(
    ("api", "says"),
    [
        ("1.45.2", ""),
        ("1.45.1", "opentelemetry-sdk 1.45.2 wants opentelemetry-api 1.45.2, not 1.45.1 as installed"),
    ],
)
def test_a_mixture_of_opentelemetry_packages_is_named(api: str, says: str) -> None:
    """
    What pip leaves behind where it is told of one package of a family only is a problem; other requirements are not.
    """
    versions = {"opentelemetry-sdk": "1.45.2", "opentelemetry-api": api, "typing-extensions": "4.0"}
    needs = {
        "opentelemetry-sdk": ["opentelemetry-api==1.45.2", "typing-extensions>=4.5", "psutil==1; extra == 'process'"]
    }

    def version(package: str) -> str:
        if package not in versions:
            raise PackageNotFoundError(package)
        return versions[package]

    assert mixed(version, needs.get) == says
    assert mixed(importlib.metadata.version, importlib.metadata.requires) == ""


def test_doctor_says_which_stores_find_can_ask(doctor: Doctor) -> None:
    """
    Where nobody listens or no file is, that is told, without the password; a wrong kind with those that there are.
    """
    gone = f"127.0.0.1:{free_port()}"
    with LocalServer(port=0) as local:
        told = doctor(
            OTEL_EXPORTER_OTLP_ENDPOINT=local.url,
            OTEL_CORRELATION_STORES=f"tempo=http://user:s3cret@{gone}#team,{local.url},logs=/nowhere/*.json,logs=/etc/host*",
        )
        assert told.status == 1
        assert f"find           {local.url}: something listens" in told.out
        assert f"PROBLEM: find cannot ask tempo=http://***@{gone}#***: start it" in told.out
        assert "PROBLEM: find cannot read logs=/nowhere/*.json: no such file" in told.out
        assert "find           logs=/etc/host*: there" in told.out
        told = doctor(
            OTEL_EXPORTER_OTLP_ENDPOINT=local.url, OTEL_CORRELATION_STORES="tempoo=http://user:s3cret@h, user:s3cret@h"
        )
    assert "PROBLEM: OTEL_CORRELATION_STORES: 'tempoo=http://***@h' is no store" in told.out
    assert "KIND is embedded, jaeger, tempo, loki" in told.out
    assert "s3cret" not in told.out
