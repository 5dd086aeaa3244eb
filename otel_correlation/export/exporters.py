"""
Which exporters the settings ask for, built so that no value of a variable can stop the service.

The ``OTEL_EXPORTER_OTLP_*`` variables mean what they mean to the stock exporters; a wrong value is one line in
``problems`` and the default is used instead. Values that may be secrets are never shown.
"""

from __future__ import annotations

import math
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast
from urllib.parse import urlsplit

from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SpanExporter, SpanExportResult

from otel_correlation import _version
from otel_correlation.export.batching import LogPipeline
from otel_correlation.export.forking import in_grpc
from otel_correlation.export.sending import Compression, HttpLogExporter, HttpSpanExporter, Sender
from otel_correlation.export.transport import ByRequests, Direct, needs_requests, session_for_stock
from otel_correlation.policy import quoted
from otel_correlation.semconv import DISTRO_NAME
from otel_correlation.settings import otlp_headers
from otel_correlation.upstream import exporter as upstream
from otel_correlation.upstream.metadata import entry_points
from otel_correlation.upstream.sdk_logs import ConsoleLogRecordExporter, LogRecordExporter, LogRecordExportResult

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    import requests
    from opentelemetry.sdk._logs import ReadableLogRecord
    from opentelemetry.sdk.trace import ReadableSpan

    from otel_correlation.export.transport import Transport
    from otel_correlation.settings import Settings

Signal = Literal["traces", "logs", "metrics"]

_DEFAULT_TIMEOUT_S: Final = 10.0
_DEFAULT_ENDPOINT: Final = "http://localhost:4318"


class _Variables:
    """
    The exporter's own variables for one signal: the signal's name wins over the general one, empty is unset.
    """

    def __init__(self, signal: Signal, problems: list[str]) -> None:
        self.signal: Signal = signal
        self.wrong_names: set[str] = set()
        self._problems = problems

    def first(self, suffix: str) -> tuple[str, str]:
        for name in (f"OTEL_EXPORTER_OTLP_{self.signal.upper()}_{suffix}", f"OTEL_EXPORTER_OTLP_{suffix}"):
            if value := os.environ.get(name, "").strip():
                return name, value
        return "", ""

    def wrong(self, name: str, value: str, used: str, why: str) -> None:
        self.wrong_names.add(name)
        # The same variable may serve spans and logs: one line.
        if not any(problem.startswith((f"{name}=", f"{name} ")) for problem in self._problems):
            self._problems.append(f"{name}{quoted(name, value)} is not usable ({why}); using {used} instead")

    def timeout_s(self) -> float:
        name, value = self.first("TIMEOUT")
        if not value:
            return _DEFAULT_TIMEOUT_S
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if 0 < seconds < 1e6:
            return seconds
        self.wrong(name, value, "10", "a number of seconds above 0")
        return _DEFAULT_TIMEOUT_S

    def compression(self) -> Compression:
        name, value = self.first("COMPRESSION")
        if value.lower() in ("", "none", "gzip", "deflate"):
            return cast("Compression", value.lower() or "none")
        self.wrong(name, value, "none", "none, gzip or deflate")
        return "none"

    def headers(self) -> dict[str, str]:
        name, value = self.first("HEADERS")
        headers, why = otlp_headers(value)
        if why:
            # Not the value: it is where API keys are.
            self.wrong(name, "", "the other entries", why)
        return headers

    def endpoint(self) -> tuple[str, bool]:
        for name in (f"OTEL_EXPORTER_OTLP_{self.signal.upper()}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"):
            value = os.environ.get(name, "").strip()
            if not value:
                continue
            if _is_url(value):
                own = name != "OTEL_EXPORTER_OTLP_ENDPOINT"
                return (value if own else f"{value.rstrip('/')}/v1/{self.signal}"), False
            self.wrong(name, value, _DEFAULT_ENDPOINT, "a URL such as http://collector:4318")
        return f"{_DEFAULT_ENDPOINT}/v1/{self.signal}", True

    def certificates(self) -> tuple[bool | str, str | tuple[str, str] | None]:
        """
        Return what to verify the collector with, and how to identify ourselves.
        """
        import ssl  # noqa: PLC0415 - only services that export need it

        verify: bool | str = True
        name, path = self.first("CERTIFICATE")
        if path:
            try:
                if not Path(path).is_dir():
                    ssl.create_default_context(cafile=path)
                verify = path
            except (OSError, ValueError) as error:  # SSLError is an OSError
                self.wrong(name, path, "the system's certificates", type(error).__name__)
        name, certificate = self.first("CLIENT_CERTIFICATE")
        key = self.first("CLIENT_KEY")[1]
        if not certificate:
            return verify, None
        try:
            # An encrypted key would ask for its passphrase on the terminal.
            ssl.create_default_context().load_cert_chain(certificate, key or None, password=lambda: "")
        except (OSError, ValueError) as error:
            self.wrong(name, certificate, "no client certificate", type(error).__name__)
            return verify, None
        return verify, (certificate, key) if key else certificate

    def session(self) -> Callable[[], requests.Session | None] | None:
        """
        Return a maker of the session of a credential provider, or None if there is none.
        """
        name = f"OTEL_PYTHON_EXPORTER_OTLP_HTTP_{self.signal.upper()}_CREDENTIAL_PROVIDER"
        general = "OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER"
        value = os.environ.get(general) or os.environ.get(name)
        if not value:
            return None

        def load() -> requests.Session | None:
            return cast("requests.Session | None", upstream.session_named(name))

        try:
            load()
        except Exception as error:  # noqa: BLE001 - somebody's entry point
            self.wrong(general if os.environ.get(general) else name, value, "no credentials", type(error).__name__)
            return None
        return load


def _is_url(value: str) -> bool:
    try:
        parts = urlsplit(value)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False


def _agent(stock: str) -> str:
    return f"{DISTRO_NAME}/{_version.__version__} {stock}"


def _http_sender(signal: Signal, settings: Settings, problems: list[str]) -> Sender:
    variables = _Variables(signal, problems)
    endpoint, is_default = variables.endpoint()
    if signal == "traces" and settings.traces_protocol != "grpc":
        # Settings may come from code as well.
        endpoint, is_default = settings.traces_endpoint, settings.endpoint_is_default
    stock = {name.lower(): value for name, value in upstream.http_headers().items()}
    verify, certificate = variables.certificates()
    session = variables.session()

    headers = {**stock, "user-agent": _agent(stock["user-agent"]), **variables.headers()}
    by_requests = session is not None or needs_requests(endpoint, headers)

    def transport() -> Transport:
        if not by_requests:
            return Direct(endpoint)
        return ByRequests(
            endpoint, headers, verify=verify, certificate=certificate, session=session() if session else None
        )

    return Sender(
        "spans" if signal == "traces" else "logs",
        endpoint,
        headers=headers,
        transport=transport,
        timeout_s=variables.timeout_s(),
        compression=variables.compression(),
        is_default=is_default,
    )


@contextmanager
def _without(names: set[str]) -> Generator[None]:
    """
    Hide variables with wrong values from a constructor that would raise on them.
    """
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


class _Grpc:
    """
    What the stock gRPC exporter is made with, so that its constructor cannot raise.
    """

    def __init__(self, signal: Signal, problems: list[str]) -> None:
        variables = _Variables(signal, problems)
        variables.timeout_s()
        variables.certificates()
        self.headers = variables.headers()
        name, value = variables.first("COMPRESSION")
        if value.lower() not in ("", "none", "gzip"):
            variables.wrong(name, value, "none", "none or gzip")
        name, value = variables.first("ENDPOINT")
        try:
            urlsplit(value)
        except ValueError:
            variables.wrong(name, value, "http://localhost:4317", "a URL such as http://collector:4317")
        self.hidden = set(variables.wrong_names)
        if variables.first("COMPRESSION")[1].lower() == "none":
            # A standard value, but the stock exporter raises on it.
            self.hidden.add(variables.first("COMPRESSION")[0])

    def build(self, exporter: Callable[..., Any], **arguments: Any) -> Any:
        """
        Make a stock exporter.
        """
        options = tuple((name, _agent(value)) for name, value in upstream.grpc_options() if "user_agent" in name)
        with _without(self.hidden):
            return exporter(headers=self.headers or None, channel_options=options, **arguments)


def _fork_safe(exporter: Any) -> Any:
    """
    Return a class of a stock gRPC exporter whose calls into gRPC's core do not overlap with a fork.
    """

    class ForkSafe(exporter):  # type: ignore[misc]
        _client: Any

        def _initialize_channel_and_stub(self) -> None:
            with in_grpc:
                super()._initialize_channel_and_stub()
            if self._client is not None:
                self._client = _Stub(self._client)

    return ForkSafe


class _Stub:
    """
    The one call of a stub.
    """

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    def Export(self, *args: Any, **kwargs: Any) -> Any:  # noqa: N802 - as the stock exporter calls it
        with in_grpc:
            return self._stub.Export(*args, **kwargs)


class _PerProcess:
    """
    A gRPC exporter that is made when first used in a process: a channel must not cross a fork.
    """

    def __init__(self, build: Callable[[], Any]) -> None:
        self._build = build
        self._pid = 0
        self._made: Any = None
        self._inherited: list[Any] = []

    def get(self) -> Any:
        if self._pid != os.getpid():
            if self._made is not None:
                self._inherited.append(self._made)  # kept: closing it would end the parent's channel
            self._made = self._build()
            self._pid = os.getpid()
        return self._made

    def close(self) -> None:
        if self._pid == os.getpid():
            self._made.shutdown()


class GrpcSpanExporter(SpanExporter):
    """
    Exports spans with the stock gRPC exporter and its retry policy.
    """

    def __init__(self, made_with: _Grpc, endpoint: str | None) -> None:
        # Imported here, by the thread that sets us up; made by the one that exports.
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415

        kind = _fork_safe(OTLPSpanExporter)
        self._stock = _PerProcess(lambda: made_with.build(kind, endpoint=endpoint))

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """
        Deliver one batch.
        """
        return cast("SpanExportResult", self._stock.get().export(spans))

    def shutdown(self) -> None:
        """
        Close the channel.
        """
        self._stock.close()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:  # noqa: ARG002 - the interface
        """
        Nothing is buffered here.
        """
        return True


class GrpcLogExporter(LogRecordExporter):
    """
    Exports log records with the stock gRPC exporter and its retry policy.
    """

    def __init__(self, made_with: _Grpc) -> None:
        from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter  # noqa: PLC0415 - as above

        kind = _fork_safe(OTLPLogExporter)
        self._stock = _PerProcess(lambda: made_with.build(kind))

    def export(self, batch: Sequence[ReadableLogRecord]) -> LogRecordExportResult:
        """
        Deliver one batch.
        """
        return cast("LogRecordExportResult", self._stock.get().export(batch))

    def shutdown(self) -> None:
        """
        Close the channel.
        """
        self._stock.close()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:  # noqa: ARG002 - the interface
        """
        Nothing is buffered here.
        """
        return True


def _protocol(name: str, configured: str) -> str:
    fixed = {"otlp": configured, "otlp_proto_http": "http/protobuf", "otlp_proto_grpc": "grpc"}
    return fixed.get(name, "")


def _third_party(signal: Signal, name: str, wanted: type[Any], problems: list[str]) -> Any:
    try:
        found = next(iter(entry_points(group=f"opentelemetry_{signal}_exporter", name=name)))
        made = found.load()()
        if not isinstance(made, wanted):
            raise TypeError(name)
        return made
    except Exception as error:  # noqa: BLE001 - somebody's constructor
        why = f"{type(error).__name__} while making that exporter"
        _Variables(signal, problems).wrong(f"OTEL_{signal.upper()}_EXPORTER", name, "the others", why)
        return None


def span_exporters(settings: Settings, problems: list[str]) -> list[SpanExporter]:
    """
    Return the exporters that ``OTEL_TRACES_EXPORTER`` names; never raises.

    Args:
        settings: As read.
        problems: Gets one line for each wrong value of the exporters' own variables.
    """
    exporters: list[SpanExporter] = []
    for name in settings.traces_exporters:
        protocol = _protocol(name, settings.traces_protocol)
        if protocol == "grpc":
            # Settings has checked the endpoint; None: the stock exporter's own default and variables.
            endpoint = settings.traces_endpoint if settings.traces_protocol == "grpc" else None
            exporters.append(GrpcSpanExporter(_Grpc("traces", problems), endpoint))
        elif protocol:
            exporters.append(HttpSpanExporter(_http_sender("traces", settings, problems)))
        elif name == "console":
            exporters.append(ConsoleSpanExporter())
        elif (exporter := _third_party("traces", name, SpanExporter, problems)) is not None:
            exporters.append(exporter)
    return exporters


def arguments_of_metrics(exporters: Mapping[str, type[Any]]) -> dict[type[Any], dict[str, Any]]:
    """
    Return what the stock exporters of metrics are made with, so that their threads import nothing.

    Args:
        exporters: The classes, by name.
    """
    found: dict[type[Any], dict[str, Any]] = {}
    for kind in exporters.values():
        if kind.__module__.startswith("opentelemetry.exporter.otlp.proto.http."):
            variables = _Variables("metrics", [])  # the stock exporter says what is wrong with them
            session = session_for_stock(variables.endpoint()[0], variables.headers())
            if session is not None and variables.session() is None:
                found[kind] = {"session": session}
    return found


def log_exporters(settings: Settings, problems: list[str]) -> list[LogRecordExporter]:
    """
    Return the exporters that ``OTEL_LOGS_EXPORTER`` names; never raises.

    Args:
        settings: As read.
        problems: Gets one line for each wrong value of the exporters' own variables.
    """
    exporters: list[LogRecordExporter] = []
    for name in settings.logs_exporters:
        protocol = _protocol(name, settings.logs_protocol)
        if protocol == "grpc":
            exporters.append(GrpcLogExporter(_Grpc("logs", problems)))
        elif protocol:
            exporters.append(HttpLogExporter(_http_sender("logs", settings, problems)))
        elif name == "console":
            exporters.append(ConsoleLogRecordExporter())
        elif (exporter := _third_party("logs", name, LogRecordExporter, problems)) is not None:
            exporters.append(exporter)
    return exporters


def _positive(name: str, default: int, problems: list[str], *, least: int = 1) -> int:
    value = os.environ.get(name, "").strip()
    if not value:
        return default
    if re.fullmatch(r"[0-9]{1,12}", value) and int(value) >= least:
        return int(value)
    problems.append(
        f"{name}{quoted(name, value)} is not usable (a whole number, {least} or more); using {default} instead"
    )
    return default


def log_pipeline(settings: Settings, problems: list[str]) -> LogPipeline:
    """
    Return the pipeline for log records as ``OTEL_LOGS_EXPORTER`` and ``OTEL_BLRP_*`` ask; never raises.

    Args:
        settings: As read.
        problems: Gets one line for each wrong value.
    """
    return LogPipeline(
        log_exporters(settings, problems),
        # Records wait as long as spans do, so that both halves of a story arrive together.
        schedule_delay_ms=_positive("OTEL_BLRP_SCHEDULE_DELAY", settings.schedule_delay_ms, problems, least=0),
        max_queue_size=_positive("OTEL_BLRP_MAX_QUEUE_SIZE", 2048, problems),
        max_batch_size=_positive("OTEL_BLRP_MAX_EXPORT_BATCH_SIZE", 512, problems),
        queue_bytes=settings.queue_bytes,
    )
