"""
``otel-correlation doctor``: what is installed, what the environment says, and what can be reached.

Works without the extra ``[local]``: it is what one runs when something is missing.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import platform
import re
import socket
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from otel_correlation import semconv
from otel_correlation.cli import FAILED, LOCAL_MODULES, OK
from otel_correlation.formats import HOW, HOW_SERVER
from otel_correlation.policy import ALL, NONE, reason_of, shown_store, shown_url, shown_variable
from otel_correlation.settings import from_environment

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping

    from otel_correlation.settings import Settings

_PACKAGES: Final = (
    "otel-correlation",
    "opentelemetry-sdk",
    "opentelemetry-exporter-otlp",
    "opentelemetry-instrumentation-fastapi",
    "opentelemetry-instrumentation-httpx",
    "fastapi",
    "httpx",
    "httpx2",
)
# They make a SERVER or CLIENT span of their own around the same call when they are switched on.
_OVERLAPPING: Final = ("starlette", "asgi_middleware", "urllib3")
_CONNECT_S: Final = 2.0


class _Report:
    """
    Lines for a person; a problem is marked, counted, and says what to do.
    """

    def __init__(self) -> None:
        self.problems = 0

    def head(self, text: str) -> None:
        print(f"\n{_plain(text)}")

    def fact(self, name: str, value: object) -> None:
        print(f"  {_plain(name):<14} {_plain(value)}")

    def problem(self, text: str) -> None:
        self.problems += 1
        print(f"  PROBLEM: {_plain(text)}")


def run(_arguments: argparse.Namespace) -> int:
    """
    Print the state of this environment; return 0, or 1 if there is a problem.
    """
    report = _Report()
    settings = from_environment(os.environ)
    print(f"otel-correlation {version('otel-correlation')}, Python {platform.python_version()} on {platform.system()}")
    _installed(report)
    _started_by(report, os.environ)
    _effective(report, settings)
    _reachable(report, settings, os.environ)
    _variables(report, os.environ)
    for problem in settings.problems:
        report.problem(problem)
    print(
        f"\n{report.problems} problem{'s' * (report.problems != 1)} found" if report.problems else "\nNo problem found"
    )
    print("Next: otel-correlation demo shows everything at work; otel-correlation run -- CMD starts a service of yours")
    return FAILED if report.problems else OK


def _installed(report: _Report) -> None:
    report.head("Installed")
    for package in _PACKAGES:
        try:
            report.fact(version(package), package)
        except PackageNotFoundError:
            report.fact("-", package)
    if mixture := mixed(version, requires):
        report.problem(
            f"{mixture}: `python -m pip check` names all of them, and `python -m pip install otel-correlation "
            "opentelemetry-sdk==VERSION` with that version makes them one family"
        )
    missing = [name for name in LOCAL_MODULES if importlib.util.find_spec(name) is None]
    report.fact(
        "[local]", f"missing {', '.join(missing)}: demo, run, serve and find need it" if missing else "complete"
    )


def mixed(version: Callable[[str], str], requires: Callable[[str], list[str] | None]) -> str:
    """
    Return how the OpenTelemetry packages do not fit together, or an empty string if they do.

    They pin each other exactly, and pip leaves a mixture behind where it is not told of all of them at once.
    """
    for package in _PACKAGES:
        try:
            for requirement in requires(package) or ():
                pinned = re.fullmatch(r"(opentelemetry[a-z-]*)\s*==\s*([0-9][0-9a-z.]*)", requirement)
                if pinned and version(pinned[1]) != pinned[2]:
                    return (
                        f"{package} {version(package)} wants {pinned[1]} {pinned[2]}, not {version(pinned[1])} "
                        "as installed"
                    )
        except PackageNotFoundError:
            continue
    return ""


def _started_by(report: _Report, environ: Mapping[str, str]) -> None:
    report.head("opentelemetry-instrument runs")
    for kind, variable in (("distro", "OTEL_PYTHON_DISTRO"), ("configurator", "OTEL_PYTHON_CONFIGURATOR")):
        names = [point.name for point in entry_points(group=f"opentelemetry_{kind}")]
        wanted = environ.get(variable)
        if kind == "distro" and wanted not in names:
            wanted = None  # Ours runs all the same, see bootstrap; that the name is wrong is said below.
        # As the loader does it: the first one unless the variable names one.
        chosen = next((name for name in names if wanted in (None, name)), None)
        report.fact(kind, f"{chosen or 'none'} (installed: {', '.join(names) or 'none'})")
        if chosen != "otel_correlation":
            report.problem(f"the {kind} that runs is not ours: set {variable}=otel_correlation")
    disabled = environ.get("OTEL_PYTHON_DISABLED_INSTRUMENTATIONS", "")
    instrumentors = sorted(point.name for point in entry_points(group="opentelemetry_instrumentor"))
    report.fact("instruments", ", ".join(instrumentors) + (f" (disabled: {disabled})" if disabled else ""))
    for name in sorted(set(instrumentors) & set(_OVERLAPPING) - {part.strip() for part in disabled.split(",")}):
        report.fact(
            "duplicates?", f"instrumentation {name} may make a second span for one call; switch it off if it does"
        )
    if environ.get("FASTAPI_OTEL_AUTO_CONFIGURE", "").strip().lower() in ("1", "true", "yes", "on"):
        report.fact(
            "duplicates?",
            "FASTAPI_OTEL_AUTO_CONFIGURE is on: FastAPI's own telemetry is kept off under this distribution",
        )


def _effective(report: _Report, settings: Settings) -> None:
    report.head("Effective settings")
    if not settings.enabled:
        report.problem(f"{semconv.OTEL_CORRELATION_ENABLED} is false: nothing is traced, no id is set")
    if settings.sdk_disabled:
        report.problem("OTEL_SDK_DISABLED is true: no spans; request ids go on")
    report.fact("service", settings.service_name or "unknown_service (set OTEL_SERVICE_NAME)")
    for signal in ("traces", "logs", "metrics"):
        exporters: tuple[str, ...] = getattr(settings, f"{signal}_exporters")
        protocol = f" ({getattr(settings, f'{signal}_protocol')})" if "otlp" in exporters else ""
        report.fact(signal, (", ".join(exporters) or "none") + protocol)
    ratio = f" {settings.ratio:g}" if settings.sampler.endswith("ratio") else ""
    report.fact("sampler", settings.sampler + ratio)
    report.fact("propagators", ", ".join(settings.propagators) or "none")
    headers = ", ".join(name.decode("ascii") for name in settings.request_id_headers)
    report.fact("request id", f"in: {headers}; out: {settings.response_header}")
    report.fact("log lines", _log_lines(settings))
    report.fact("continues", _continued(settings))
    for header in ("traceparent", "baggage", "request_id"):
        report.fact(f"{header.replace('_', ' ')} to", _sent_to(settings, getattr(settings, f"outbound_{header}")))
    report.fact(
        "find asks", ", ".join(map(shown_store, settings.stores)) or "http://127.0.0.1:4318 (the embedded store)"
    )


def _log_lines(settings: Settings) -> str:
    if settings.log_format in ("json", "text"):
        return f"{settings.log_format} with ids, the server's too, whatever logging the application configures"
    without = f"the server's go out without ids, because its own format names none: {HOW}, or {HOW_SERVER}"
    if settings.log_format == "none":
        return f"as without this package; {without}"
    return f"ours, with ids; where the application configures logging, {without}"


def _continued(settings: Settings) -> str:
    networks = [entry for entry in settings.trusted_networks if entry != NONE]
    proxies = [entry for entry in settings.trusted_proxies if entry != NONE]
    if settings.edge == "open" and not settings.trusted_networks:
        return "every caller"
    if not networks:
        return "no caller"
    behind = f", also behind {', '.join(proxies)}" if proxies else ""
    forces = f"; {settings.force_sample_header} of theirs forces sampling" if settings.force_sample_header else ""
    return f"callers in {', '.join(networks)}{behind}{forces}"


def _sent_to(settings: Settings, patterns: tuple[str, ...]) -> str:
    public = settings.edge == "public"
    if ALL in patterns or not (patterns or public):
        return "every host"
    internal = ["internal hosts"] if public and NONE not in patterns else []
    return ", ".join([*internal, *(entry for entry in patterns if entry != NONE)]) or "no host"


def _reachable(report: _Report, settings: Settings, environ: Mapping[str, str]) -> None:
    report.head("Reachable")
    endpoints: dict[str, str] = {}
    if "otlp" in settings.traces_exporters:
        endpoints["traces"] = settings.traces_endpoint
    if "otlp" in settings.logs_exporters:
        base = environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or "http://localhost:4318"
        endpoints["logs"] = environ.get("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT") or base
    if not endpoints:
        report.fact("-", "nothing is sent over OTLP")
    for signal, endpoint in endpoints.items():
        why = _connect(endpoint)
        report.fact(signal, f"{shown_url(endpoint)}: {why or 'something listens'}")
        if why:
            report.problem(
                f"nobody takes the {signal}: start `otel-correlation serve`, "
                "or set OTEL_EXPORTER_OTLP_ENDPOINT to your collector"
            )
    if settings.stores and importlib.util.find_spec("httpx") is not None:
        _stores(report, settings)


def _stores(report: _Report, settings: Settings) -> None:
    from otel_correlation.stores import StoreError, configured  # noqa: PLC0415 - needs the extra
    from otel_correlation.stores.logfiles import STDIN  # noqa: PLC0415

    try:
        configured(settings.stores, settings.log_fields)
    except StoreError as error:
        report.problem(str(error))
        return
    for entry in settings.stores:
        place = entry.partition("=")[2] if "=" in entry.partition("://")[0] else entry
        if "://" in place:
            why = _connect(place)
            shown = shown_store(entry)
            report.fact("find", f"{shown}: {why or 'something listens'}")
            if why:
                report.problem(f"find cannot ask {shown}: start it, or change {semconv.OTEL_CORRELATION_STORES}")
        elif place != STDIN:
            there = os.path.exists(place) or bool(glob.glob(place, recursive=True))  # noqa: PTH110, PTH207
            report.fact("find", f"{entry}: {'there' if there else 'no such file'}")
            if not there:
                report.problem(f"find cannot read {entry}: no such file; change {semconv.OTEL_CORRELATION_STORES}")


def _connect(endpoint: str) -> str:
    """
    Return why nobody answers at ``endpoint``, or an empty string if somebody does.
    """
    try:
        parts = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with socket.create_connection((parts.hostname or "", port), _CONNECT_S):
            return ""
    except (OSError, ValueError) as error:
        return reason_of(error)


def _variables(report: _Report, environ: Mapping[str, str]) -> None:
    report.head("Variables")
    names = sorted(name for name in environ if name.startswith(("OTEL_", "FASTAPI_OTEL_")))
    for name in names:
        report.fact(name, shown_variable(name, environ[name]))
    if not names:
        report.fact("-", "none is set: the defaults hold")


def _plain(text: object) -> str:
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in str(text))
