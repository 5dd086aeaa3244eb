"""
Starting a command under ``opentelemetry-instrument`` with its telemetry sent to one local receiver.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

from otel_correlation.semconv import OTEL_CORRELATION_STORES
from otel_correlation.stores.search import DEFAULT_STORE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# The console script's own function, so that it need not be on PATH. It replaces itself by the command: same process.
# It asks for the propagators before any distribution: ours keeps wrong ones from it (ADR 006).
_INSTRUMENT: Final = (
    "import otel_correlation; from opentelemetry.instrumentation.auto_instrumentation import run; run()"
)
# A general variable yields to one for a signal; headers and certificates are for the receiver they were set for.
_PER_SIGNAL: Final = (
    "ENDPOINT",
    "PROTOCOL",
    "HEADERS",
    "CERTIFICATE",
    "CLIENT_KEY",
    "CLIENT_CERTIFICATE",
    "COMPRESSION",
)


def find_command(url: str) -> str:
    """
    Return how to call ``find`` so that it asks the viewer at ``url``.
    """
    where = "" if url == DEFAULT_STORE else f"{OTEL_CORRELATION_STORES}={url} "
    return f"{where}otel-correlation find ID"


def instrumented(command: Sequence[str]) -> list[str]:
    """
    Return the command line that runs ``command`` as ``opentelemetry-instrument`` does.
    """
    return [sys.executable, "-c", _INSTRUMENT, *command]


def environment(base: Mapping[str, str], endpoint: str) -> dict[str, str]:
    """
    Return ``base`` with traces and logs sent to ``endpoint`` at once, whatever other receiver it named.
    """
    env = dict(base)
    for signal in ("", "TRACES_", "LOGS_", "METRICS_"):
        for name in _PER_SIGNAL:
            env.pop(f"OTEL_EXPORTER_OTLP_{signal}{name}", None)
    # With another distribution installed beside ours, the first one found would run.
    for variable in ("OTEL_PYTHON_DISTRO", "OTEL_PYTHON_CONFIGURATOR"):
        env.setdefault(variable, "otel_correlation")
    env |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_LOGS_EXPORTER": "otlp",
        "OTEL_METRICS_EXPORTER": "none",
        # A person is waiting for the page.
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        "OTEL_BLRP_SCHEDULE_DELAY": "200",
    }
    # The scripts of this very environment come first, so that what is started is what is instrumented.
    env["PATH"] = os.pathsep.join(filter(None, (os.path.dirname(sys.executable), base.get("PATH", os.defpath))))  # noqa: PTH120
    for name in ("NO_PROXY", "no_proxy"):
        env[name] = ",".join(filter(None, (base.get(name), "127.0.0.1", "localhost")))
    return env
