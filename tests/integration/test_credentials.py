"""
The credentials that the operator configured for the collector are the ones that are sent.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import clean_environment

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

SENDING = """
import logging, os
import otel_correlation
otel_correlation.bootstrap()
from opentelemetry import metrics, trace
metrics.get_meter("m").create_counter("c").add(1)
with trace.get_tracer("t").start_as_current_span("a"):
    logging.getLogger("app").error("said")
metrics.get_meter_provider().force_flush(10_000)
"""
BEARER = "Bearer configured"
FROM_FILE = "Basic ZnJvbTpmaWxl"  # from:file
FROM_URL = "Basic aW46dXJs"  # in:url


def sent(directory: Path, sink: OtlpSink, endpoint: str, **variables: str) -> dict[str, str]:
    """
    Return the ``Authorization`` of each signal's request, of a process whose home has a netrc file.
    """
    (directory / ".netrc").write_text("machine 127.0.0.1 login from password file\ndefault login from password file\n")
    (directory / ".netrc").chmod(0o600)
    subprocess.run(
        [sys.executable, "-c", SENDING],
        cwd=directory,
        env=clean_environment(
            HOME=str(directory),
            OTEL_EXPORTER_OTLP_ENDPOINT=endpoint,
            OTEL_LOGS_EXPORTER="otlp",
            OTEL_METRICS_EXPORTER="otlp",
            **variables,
        ),
        check=True,
        timeout=60,
        capture_output=True,
    )
    return {
        request.path.rpartition("/")[2]: request.headers.get("authorization", "")
        for request in sink.requests
        if request.status == 200
    }


@pytest.mark.parametrize("user", ["", "in:url@"], ids=["", "credentials in the URL"])
@pytest.mark.parametrize("by_proxy", [False, True], ids=["direct", "by a proxy"])
def test_a_configured_authorization_is_what_is_sent(tmp_path: Path, user: str, by_proxy: bool) -> None:
    """
    Neither a netrc file nor the endpoint's own user replaces ``Authorization`` of ``OTEL_EXPORTER_OTLP_HEADERS``.
    """
    with OtlpSink() as sink:
        endpoint = sink.endpoint
        variables = {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20configured"}
        if by_proxy:
            variables["http_proxy"] = endpoint
            endpoint = "http://collector.invalid:4318"
        found = sent(tmp_path, sink, endpoint.replace("http://", f"http://{user}"), **variables)
    assert found == {"traces": BEARER, "logs": BEARER, "metrics": BEARER}


def test_the_authorization_of_one_signal_is_its_own(tmp_path: Path) -> None:
    """
    A header of traces alone is not sent with logs and metrics; those have what requests finds in the netrc file.
    """
    with OtlpSink() as sink:
        variables = {"OTEL_EXPORTER_OTLP_TRACES_HEADERS": "Authorization=Bearer%20configured"}
        found = sent(tmp_path, sink, sink.endpoint, **variables)
    assert found == {"traces": BEARER, "logs": FROM_FILE, "metrics": FROM_FILE}


def test_without_a_header_the_urls_user_is_sent(tmp_path: Path) -> None:
    """
    The endpoint's user and password are credentials where no header is configured; a netrc file does not replace them.
    """
    with OtlpSink() as sink:
        found = sent(tmp_path, sink, sink.endpoint.replace("http://", "http://in:url@"))
    assert found == {"traces": FROM_URL, "logs": FROM_URL, "metrics": FROM_URL}
