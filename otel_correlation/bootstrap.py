"""
The composition root: the distro, the configurator and ``bootstrap()``. The only module that sets globals.

However a process comes here, and however often, there is one provider, one exporter and one SERVER span for a request.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace as replaced
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import metrics as metrics_api
from opentelemetry import propagate
from opentelemetry import trace as trace_api
from opentelemetry._logs import get_logger_provider, set_logger_provider
from opentelemetry.instrumentation.distro import BaseDistro  # type: ignore[attr-defined]
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider

from otel_correlation import guard, logs, policy, semconv
from otel_correlation._early import LIMITS, shielded
from otel_correlation._version import __version__
from otel_correlation.clocks import monotonic
from otel_correlation.settings import (
    DISTRO,
    Settings,
    from_environment,
    late_variables,
    variables,
    with_overrides,
)
from otel_correlation.upstream import api as upstream_api
from otel_correlation.upstream import sdk as upstream_sdk

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from opentelemetry.propagators.textmap import TextMapPropagator
    from opentelemetry.sdk.metrics import MeterProvider
    from starlette.types import ASGIApp


@contextmanager
def _without(*names: str) -> Generator[None]:
    """
    Hide variables from code that fails on a wrong value; they are back afterwards, for child processes.
    """
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _is_pattern(text: str) -> bool:
    try:
        re.compile("|".join(part.strip() for part in text.split(",")))
    except re.error:
        return False
    return True


_PATTERNS = ("OTEL_PYTHON_FASTAPI_EXCLUDED_URLS", "OTEL_PYTHON_EXCLUDED_URLS")

# The contrib package compiles these while it is imported, and raises on a wrong one; ours are compiled one by one.
with _without(*(name for name in _PATTERNS if not _is_pattern(os.environ.get(name, "")))):
    from otel_correlation.edge import _fastapi as fastapi_plug

from otel_correlation import clients, export, propagators, sampling, tasks  # noqa: E402
from otel_correlation.edge import _threads as thread_pool  # noqa: E402
from otel_correlation.export import exits  # noqa: E402
from otel_correlation.ids import CorrelationIdGenerator  # noqa: E402
from otel_correlation.tasks import carriers, celery  # noqa: E402

# What sends the request id on: all that is wanted of instrumentations where the SDK is disabled.
_SENDING: Final = tuple(
    f"opentelemetry.instrumentation.{name}" for name in ("httpx", "requests:", "aiohttp_client:", "urllib3:", "urllib:")
)
# The instrumentations that know sqlcommenter, and which of its values a statement gets: of all only the traceparent.
_COMMENTING: Final = tuple(
    f"opentelemetry.instrumentation.{name}:"
    for name in ("sqlalchemy", "psycopg", "psycopg2", "mysql", "mysqlclient", "pymysql", "pymssql", "sqlite3")
)
_COMMENT: Final = dict.fromkeys(
    (
        *("db_driver", "db_framework", "dbapi_threadsafety", "dbapi_level", "driver_paramstyle", "libpq_version"),
        *("mysql_client_version", "tracestate"),
    ),
    False,
)
# Our name among the entry points of the distributions.
_NAME: Final = DISTRO


class _State:
    """
    What this process has set up.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.settings: Settings | None = None
        self.provider: TracerProvider | None = None
        # Providers that are not ours, to be flushed where the process ends.
        self.foreign: tuple[TracerProvider | LoggerProvider, ...] = ()
        # What the start-up line says where OTEL_CONFIG_FILE decides.
        self.by_file = ""
        self.batchers: tuple[Any, ...] = ()
        # Of metrics, whoever made it.
        self.meters: MeterProvider | None = None
        # What exports them, where that is ours.
        self.readers: export.Readers | None = None
        # The global propagator, where it is ours.
        self.textmap: TextMapPropagator | None = None
        self.announced = False
        self.pending: list[str] = []
        # The variables of OpenTelemetry's and ours as they were read, until the process begins to serve.
        self.read: dict[str, str] | None = None
        # Whether OTEL_PYTHON_CONFIGURATOR is ours, until our configurator runs.
        self.named = False


_state = _State()


class Distro(BaseDistro):  # type: ignore[misc]
    """
    Chooses ours where ``opentelemetry-instrument`` loads an instrumentation that we replace.
    """

    def _configure(self, **_kwargs: Any) -> None:
        try:
            _say_which_distribution()
        except Exception:  # noqa: BLE001 - start-up must go on
            guard.report("distro")

    def load_instrumentor(self, entry_point: Any, **kwargs: Any) -> None:
        """
        Load one instrumentation: FastAPI's and the httpx ones drive our hot path, logging's is ours already.
        """
        settings = _state.settings
        if settings is not None and settings.enabled:
            value = entry_point.value
            if value.startswith("opentelemetry.instrumentation.fastapi:"):
                fastapi_plug.instrument_everything()
                return
            if value.startswith("opentelemetry.instrumentation.httpx:"):
                # Loading it would import httpx, and httpx its command line.
                clients.instrument([entry_point.name])
                return
            if value.startswith("opentelemetry.instrumentation.logging:"):
                # It would put a second OTLP handler beside ours, so that every record is exported twice.
                return
            if settings.patch_threads and value.startswith("opentelemetry.instrumentation.threading:"):
                return  # ours does it, for subclasses that override run(), too
            if settings.sdk_disabled and not value.startswith(_SENDING):
                return
            if settings.sql_comments and value.startswith(_COMMENTING):
                kwargs = {"enable_commenter": True, "commenter_options": _COMMENT, **kwargs}
        elif settings is not None:
            return
        super().load_instrumentor(entry_point, **kwargs)


def _say_which_distribution() -> None:
    from otel_correlation.upstream.metadata import entry_points  # noqa: PLC0415 - only at start

    distros = sorted({entry.name for entry in entry_points(group="opentelemetry_distro")})
    if len(distros) > 1:
        told = bool(os.environ.get("OTEL_PYTHON_DISTRO"))
        line = (
            f"{len(distros)} OpenTelemetry distributions are installed ({', '.join(distros)}); otel_correlation runs, "
            f"chosen by {'OTEL_PYTHON_DISTRO' if told else 'the order of installation'}"
        )
        if told:
            logs.startup_line(line)
        else:
            _state.pending.append(line)
        # The SDK takes the first configurator that it finds; it must be the one of the distribution that was chosen.
        if "OTEL_PYTHON_CONFIGURATOR" not in os.environ:
            os.environ["OTEL_PYTHON_CONFIGURATOR"] = _NAME
            _state.named = True


def _another_was_chosen() -> bool:
    """
    Tell whether the standard variables name another distribution and do not name our configurator.
    """
    distro = os.environ.get("OTEL_PYTHON_DISTRO", "").strip()
    if distro in ("", _NAME) or os.environ.get("OTEL_PYTHON_CONFIGURATOR", "").strip() == _NAME:
        return False
    from otel_correlation.upstream.metadata import entry_points  # noqa: PLC0415 - only at start

    # One that is not installed was chosen by mistake: the settings say so, and ours runs.
    return bool(entry_points(group="opentelemetry_distro", name=distro))


def _stand_back(**kwargs: Any) -> None:
    """
    Let the chosen distribution's configurator run; the SDK takes the first that it finds, and that was ours.
    """
    from otel_correlation.upstream.metadata import entry_points  # noqa: PLC0415 - only at start

    chosen = os.environ["OTEL_PYTHON_DISTRO"].strip()
    others = [entry for entry in entry_points(group="opentelemetry_configurator") if entry.name != _NAME]
    others.sort(key=lambda entry: entry.name != chosen)
    guard.logger.warning("OTEL_PYTHON_DISTRO=%s runs, so otel-correlation is off", ascii(chosen[:100]))
    if others:
        others[0].load()().configure(**kwargs)


class Configurator:
    """
    Sets up the SDK for ``opentelemetry-instrument``; never raises.

    Not a child of the SDK's own: that module imports all of metrics, which most services never use.
    """

    def configure(self, **kwargs: Any) -> None:
        """
        Set up, once in a process.

        Args:
            **kwargs: What ``opentelemetry-instrument`` says about itself.
        """
        try:
            another = _another_was_chosen()
            if _state.named:
                # It has done its work; a process that this one starts has the environment as the user set it.
                _state.named = False
                os.environ.pop("OTEL_PYTHON_CONFIGURATOR", None)
            if another:
                _stand_back(**kwargs)
                return
            if any("multiprocessing.resource_tracker" in argument for argument in sys.orig_argv):
                # Python's own helper beside workers: it runs nothing of the service, but lives as long.
                _state.settings = replaced(from_environment(), enabled=False)
                return
            _start(from_environment(), auto_version=kwargs.get("auto_instrumentation_version"))
        except Exception:  # noqa: BLE001 - start-up must go on
            guard.report("configurator")


def bootstrap(app: ASGIApp | None = None, **settings: Any) -> None:
    """
    Set everything up from code: provider, exporters, propagators, logs, FastAPI and httpx.

    Idempotent: a second call, or a call under ``opentelemetry-instrument``, keeps what runs, and settings given then
    are applied as far as they do not name exporters or switch everything off.

    Args:
        app: The application. Every FastAPI and Starlette application is covered anyway; naming one switches it on that
            was switched off, or that had begun before.
        **settings: Fields of ``otel_correlation.settings.Settings``; they win over the environment.

    Raises:
        ConfigError: An unknown setting, or a value of the wrong type or out of range.
    """
    with _state.lock:
        before = _state.settings
        wanted = with_overrides(before or from_environment(), settings)
        if before is None or (wanted.enabled and not before.enabled):
            _state.settings = None  # nothing was started where the environment switched everything off
            try:
                _start(wanted, instrument=True)
            except Exception:  # noqa: BLE001 - our failure is not that of the application's import
                guard.report("bootstrap")
            _announce()
        elif settings:
            _apply(before, wanted)
        if _state.settings is not None and _state.settings.enabled:
            _instrument_everything()
            if app is not None:
                fastapi_plug.switch_on(app)


def start_child(settings: Settings) -> None:
    """
    Set this process up as the one that started it was, unless it is set up already (by fork, or by itself).
    """
    with _state.lock:
        if _state.settings is None:
            _start(settings, instrument=True)
            # The parent has said what was wrong.
            _state.pending.clear()


def started() -> bool:
    """
    Tell whether this process has been set up, by ``bootstrap()`` or by ``opentelemetry-instrument``.
    """
    return _state.settings is not None


def activate(settings: Settings | None = None) -> None:
    """
    Put our hot path under contrib's instrumentors without touching any global of the SDK.

    Args:
        settings: What to use; None reads the environment whenever something is instrumented.
    """

    def current() -> Settings:
        return from_environment() if settings is None else settings

    fastapi_plug.activate(current)
    clients.activate(current)
    tasks.activate(current)


def _start(settings: Settings, *, auto_version: str | None = None, instrument: bool = False) -> None:
    # The SDK reads limits and resource detectors where it makes its providers.
    with _state.lock, shielded() as hidden:
        if _state.settings is not None:
            return
        _state.settings = settings
        if not settings.enabled:
            return
        _state.read = {**variables(os.environ), **hidden}
        problems = [*settings.problems, *_without_effect(settings)]
        logs.install(settings)
        policy.mask_stock_lines()
        textmap = None
        file = None if settings.sdk_disabled else _configured_by_file(problems)
        if file is not None:
            settings = _state.settings = _keep_to_file(file, settings)
            exits.install(_flush)
        else:
            textmap = _state.textmap = propagators.build(settings)
            propagate.set_global_textmap(textmap)
        if not settings.sdk_disabled and file is None:
            problems += _wrong_limits(hidden)
            resource = _resource(settings, auto_version)
            _start_metrics(settings, resource, problems)
            _start_traces(settings, resource, problems)
            _start_logs(settings, resource, problems)
            exits.install(_flush)
        _offer_metrics(settings)
        fastapi_plug.activate(_current_settings, textmap=textmap)
        clients.activate(_current_settings)
        tasks.activate(_current_settings, start_child)
        celery.watch(_serving)
        carriers.serving(_serving)
        if instrument:
            _instrument_everything()
        _state.pending += problems
        fastapi_plug.on_serving(_serving)
        atexit.register(_announce_unserved)


def _wrong_limits(hidden: Mapping[str, str]) -> list[str]:
    """
    Say which limits of the SDK cannot be read.
    """
    return [
        f"{name}={hidden[name][:100]!a} is not usable (a whole number); using the default instead"
        for name in LIMITS
        if name in hidden
    ]


def _without_effect(settings: Settings) -> list[str]:
    """
    Say what was declared about trust and does nothing, because nobody is trusted.
    """
    if settings.trusted_networks:
        return []
    said = (
        (semconv.OTEL_CORRELATION_FORCE_SAMPLE_HEADER, settings.force_sample_header, "names nobody who may use it"),
        (semconv.OTEL_CORRELATION_TRUSTED_PROXIES, ",".join(settings.trusted_proxies), "names nobody behind them"),
    )
    return [
        f"{name}={value} has no effect: {semconv.OTEL_CORRELATION_TRUSTED_NETWORKS} {why}"
        for name, value, why in said
        if value
    ]


def _configured_by_file(problems: list[str]) -> Any:
    """
    Apply OTEL_CONFIG_FILE, where it is set, and return what it says; the environment is used where that fails.
    """
    path = _config_file()
    if not path:
        return None
    try:
        # The extra [config]; nobody else pays for its import.
        from opentelemetry.configuration import configure_sdk, load_config_file  # noqa: PLC0415

        found = load_config_file(path)
        configure_sdk(found)
    except ModuleNotFoundError:
        why = "pip install 'otel-correlation[config]'"
    except Exception as error:  # noqa: BLE001 - whatever is wrong with the file, the service serves
        why = policy.file_problem(error)
    else:
        return found
    problems.append(f"OTEL_CONFIG_FILE={path[:200]!a} is not usable ({why}); using the environment instead")
    return None


def _config_file() -> str:
    return os.environ.get("OTEL_CONFIG_FILE", "").strip()


def _keep_to_file(file: Any, settings: Settings) -> Settings:
    """
    Leave the file's providers, exporters, samplers and propagators as they are: ours are the edge, clients and logs.

    Returns:
        The settings with what the file says in place of the variables.
    """
    tracers, loggers = trace_api.get_tracer_provider(), get_logger_provider()
    _keep_foreign_provider(tracers)
    made = [found for found in (tracers, loggers) if isinstance(found, TracerProvider | LoggerProvider)]
    # One resource for all of them.
    service = str(made[0].resource.attributes.get("service.name", "")) if made else ""
    exports_logs = file.logger_provider is not None
    _state.by_file = f"{_spans_of_file(file)}, sampler and propagators of {_config_file()[:200]!a}"
    settings = replaced(
        settings,
        service_name="" if service.startswith("unknown_service") else service,
        logs_exporters=("otlp",) if exports_logs else (),
    )
    logs.install(settings)
    if exports_logs and isinstance(loggers, LoggerProvider):
        _state.foreign = (*_state.foreign, loggers)
        logs.otlp_handler(loggers, settings)
    return settings


def _spans_of_file(file: Any) -> str:
    """
    Say where the spans of a configuration file go.
    """
    processors = file.tracer_provider.processors if file.tracer_provider is not None and not file.disabled else ()
    said = []
    for processor in processors:
        exporter = getattr(processor.batch or processor.simple, "exporter", None)
        http, grpc = getattr(exporter, "otlp_http", None), getattr(exporter, "otlp_grpc", None)
        if http is not None:
            said.append(f"{policy.shown_url(http.endpoint or 'http://localhost:4318/v1/traces')} (http/protobuf)")
        elif grpc is not None:
            said.append(f"{policy.shown_url(grpc.endpoint or 'http://localhost:4317')} (grpc)")
        elif getattr(exporter, "console", None) is not None:
            said.append("console")
        else:
            said.append("an exporter of another package")
    return f"spans to {', '.join(said)}" if said else "spans are not exported"


def _keep_foreign_provider(provider: Any) -> None:
    """
    Leave a provider that is not ours as it is; its spans get the request id, and it is flushed where the process ends.
    """
    if isinstance(provider, TracerProvider):
        limits = getattr(provider, "_span_limits", None)
        length = getattr(limits, "max_attribute_length", None)
        provider.add_span_processor(export.SpanPipeline([], attribute_length=length))
        _state.foreign = (*_state.foreign, provider)


def _flush(timeout_s: float) -> bool:
    clients.end_dropped()
    deadline = monotonic() + timeout_s
    foreign = _state.foreign

    def flush_foreign(left_ms: int) -> bool:
        flushed = [provider.force_flush(left_ms) for provider in foreign]
        return False not in flushed

    left_nothing = not foreign or _flush_beside(flush_foreign, timeout_s, timeout_s)
    sent = export.leave(_state.batchers, timeout_s)
    meters = _state.meters
    if meters is not None:
        if _state.readers is not None:
            _state.readers.start_unless_supervising()
        # After the spans, so that it counts them, too. Where those found nobody, the metrics will not, either.
        left_s = max(deadline - monotonic(), 0.1)
        left_nothing = _flush_beside(meters.force_flush, left_s, left_s if sent else 0.1) and left_nothing
    return sent and left_nothing


def _flush_beside(flush: Callable[[int], object], timeout_s: float, wait_s: float) -> bool:
    """
    Flush on a thread: the SDK's own processors and readers do not keep to the timeout that they are given.

    Returns:
        Whether it came to an end in time, and did not say that it failed.
    """
    results: list[object] = []

    def flushing() -> None:
        with guard.never_raise("export.flush"):
            results.append(flush(int(timeout_s * 1000)))

    thread = threading.Thread(target=flushing, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter is shutting down, which Python 3.12.1 takes as a reason
        flushing()
    else:
        thread.join(wait_s)
    return bool(results) and results[0] is not False


def _instrument_everything() -> None:
    """
    Instrument what ``OTEL_PYTHON_DISABLED_INSTRUMENTATIONS`` does not name, as ``opentelemetry-instrument`` would.
    """
    left_out = {name.strip() for name in os.environ.get("OTEL_PYTHON_DISABLED_INSTRUMENTATIONS", "").split(",")}
    if "*" in left_out:
        return
    if "fastapi" not in left_out:
        fastapi_plug.instrument_everything()
    clients.instrument_everything(left_out)


def _current_settings() -> Settings:
    return _state.settings or from_environment()


def _apply(before: Settings, wanted: Settings) -> None:
    """
    Apply what code asked for after the start; an exporter that runs is kept.
    """
    if not before.enabled:
        _state.settings = wanted
        return
    names = ("enabled", "traces_exporters", "logs_exporters", "metrics_exporters", "traces_protocol", "logs_protocol")
    for name in names:
        if getattr(before, name) != getattr(wanted, name):
            guard.logger.warning(
                "bootstrap(%s=...) came after the start and is left out; set it at the first call, or by its variable",
                name,
            )
    for line in _without_effect(wanted):
        if line not in _without_effect(before):
            guard.logger.warning("%s", line)
    _state.settings = wanted = replaced(wanted, enabled=True)
    provider = _state.provider
    if provider is not None and (before.ratio, before.sampler) != (wanted.ratio, wanted.sampler):
        sampler = sampling.from_settings(wanted)
        if sampler is not None:
            provider.sampler = sampler
            for tracer in upstream_sdk.tracers(provider):
                tracer.sampler = sampler
    logs.install(wanted)
    if _state.textmap is not None and propagate.get_global_textmap() is _state.textmap:
        # Made of the settings as they were; one that the application has set since stays.
        _state.textmap = propagators.build(wanted)
        propagate.set_global_textmap(_state.textmap)
        fastapi_plug.activate(_current_settings, textmap=_state.textmap)
    fastapi_plug.refresh()
    clients.refresh()
    tasks.activate(_current_settings, start_child)


def _sdk_configuration() -> Any:
    """
    Return what reads names of samplers, exporters and generators; importing it imports all of the SDK.
    """
    from opentelemetry.sdk import _configuration  # noqa: PLC0415 - see above

    return _configuration


def _resource(settings: Settings, auto_version: str | None) -> Resource:
    attributes = {
        "telemetry.distro.name": semconv.DISTRO_NAME,
        "telemetry.distro.version": __version__,
    }
    if settings.service_name:  # from the environment, or passed in code
        attributes["service.name"] = settings.service_name
    if auto_version:
        attributes["telemetry.auto.version"] = auto_version
    return Resource.create(attributes)


def _start_traces(settings: Settings, resource: Resource, problems: list[str]) -> None:
    existing = upstream_api.tracer_provider()
    if isinstance(existing, TracerProvider):
        # The application made its own before us: its sampler and its exporters stand, ours would send everything twice.
        _keep_foreign_provider(existing)
        _state.pending.append("The application's own tracer provider is kept, with its sampler and its exporters")
        return
    sampler = sampling.from_settings(settings) or upstream_sdk.sampler_named(settings.sampler)
    limits = SpanLimits()
    provider = TracerProvider(
        sampler=sampler or sampling.RatioSampler(1.0),
        resource=resource,
        id_generator=_id_generator(problems),
        span_limits=limits,
        shutdown_on_exit=False,
    )
    pipeline = export.SpanPipeline(
        export.span_exporters(settings, problems),
        schedule_delay_ms=settings.schedule_delay_ms,
        max_queue_size=settings.max_queue_size,
        max_batch_size=settings.max_batch_size,
        queue_bytes=settings.queue_bytes,
        attribute_length=limits.max_attribute_length,
        translate=export.with_old_names if settings.semconv_dup else None,
    )
    provider.add_span_processor(pipeline)
    _state.batchers += pipeline.batchers
    trace_api.set_tracer_provider(provider)
    _state.provider = provider


def _id_generator(problems: list[str]) -> CorrelationIdGenerator:
    name = os.environ.get("OTEL_PYTHON_ID_GENERATOR", "").strip()
    if not name or name == "random":
        return CorrelationIdGenerator()
    try:
        return CorrelationIdGenerator(_sdk_configuration()._import_id_generator(name))
    except Exception:  # noqa: BLE001 - a third party's entry point
        problems.append(f"OTEL_PYTHON_ID_GENERATOR={name!a} is not usable (it cannot be loaded); using random instead")
        return CorrelationIdGenerator()


@contextmanager
def _protocol_of_metrics(settings: Settings) -> Generator[None]:
    """
    Have the SDK choose the exporter of our default protocol; nobody else, and no child process, sees the variable.
    """
    name = "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL"
    if settings.metrics_protocol != "http/protobuf" or name in os.environ:
        yield
        return
    os.environ[name] = settings.metrics_protocol
    try:
        yield
    finally:
        os.environ.pop(name, None)


def _start_metrics(settings: Settings, resource: Resource, problems: list[str]) -> None:
    if not settings.metrics_exporters:
        return
    if upstream_api.meter_provider() is not None:
        # The application made its own before us: a second one would export beside it, and measure nothing.
        return
    from opentelemetry.sdk.metrics import MeterProvider  # noqa: PLC0415 - only services that measure pay for it
    from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader  # noqa: PLC0415

    try:
        sdk_configuration = _sdk_configuration()
        with _protocol_of_metrics(settings):
            names = [
                sdk_configuration._get_exporter_entry_point(name, "metrics") for name in settings.metrics_exporters
            ]
        _, found, _ = sdk_configuration._import_exporters([], names, [])
        arguments = export.arguments_of_metrics(found)
        sdk_configuration._init_metrics({}, resource)
    except Exception as error:  # noqa: BLE001 - a third party's exporter
        problems.append(_unusable_metrics(settings, error))
        metrics_api.set_meter_provider(metrics_api.NoOpMeterProvider())
        return
    provider = metrics_api.get_meter_provider()
    if isinstance(provider, MeterProvider):
        # Its own end may last 30 seconds, and never comes under uvicorn; ours does, and has a budget.
        atexit.unregister(provider.shutdown)

    def make() -> list[Any]:
        # As the SDK would, which makes them at once.
        made = [kind(**arguments.get(kind, {})) for kind in found.values()]
        return [one if isinstance(one, MetricReader) else PeriodicExportingMetricReader(one) for one in made]

    def failed(error: Exception) -> None:
        line = _unusable_metrics(settings, error)
        if _state.announced:
            guard.logger.warning("%s", line)
        else:
            _state.pending.append(line)

    _state.readers = export.Readers(provider, make, failed)


def _unusable_metrics(settings: Settings, error: Exception) -> str:
    names = ",".join(settings.metrics_exporters)
    return f"OTEL_METRICS_EXPORTER={names!a} is not usable ({policy.shown_text(str(error))}); using none instead"


def _offer_metrics(settings: Settings) -> None:
    """
    Offer the counters and the thread pool as metrics where somebody collects metrics.
    """
    provider = upstream_api.meter_provider()
    if settings.sdk_disabled or provider is None or isinstance(provider, metrics_api.NoOpMeterProvider):
        return
    from opentelemetry.sdk.metrics import MeterProvider  # noqa: PLC0415 - as above

    if isinstance(provider, MeterProvider):
        _state.meters = provider
    with guard.never_raise("metrics"):
        export.observe(provider, _state.batchers)
        thread_pool.observe(provider)


def _start_logs(settings: Settings, resource: Resource, problems: list[str]) -> None:
    if not settings.logs_exporters:
        return
    provider = LoggerProvider(resource=resource, shutdown_on_exit=False)
    pipeline = export.log_pipeline(settings, problems)
    provider.add_log_record_processor(pipeline)
    _state.batchers += pipeline.batchers
    set_logger_provider(provider)
    logs.otlp_handler(provider, settings)


def _serving() -> None:
    """
    Do what waits until this process begins to serve: export metrics from now on, and say what there is to say.
    """
    if _state.readers is not None:
        with guard.never_raise("metrics"):
            _state.readers.start()
    _announce()
    read, _state.read = _state.read, None
    if read is not None and (late := late_variables(read, os.environ)):
        guard.logger.warning(
            "%s came after the start and %s no effect. Set %s before the process starts, of a file by "
            "'set -a; . ./.env'; or start without opentelemetry-instrument, and call bootstrap() after that",
            ", ".join(late),
            *(("has", "it") if len(late) == 1 else ("have", "them")),
        )


def _announce() -> None:
    """
    Say the one start-up line, and what was wrong, where this process begins to serve.
    """
    with _state.lock:
        settings = _state.settings
        if _state.announced or settings is None or not settings.enabled:
            return
        _announce_problems()
        _state.announced = True
    service = settings.service_name or "unknown_service"
    if settings.sdk_disabled:
        where = "no spans (OTEL_SDK_DISABLED)"
    elif not settings.traces_exporters:
        where = "spans are not exported"
    elif "otlp" in settings.traces_exporters:
        where = f"spans to {policy.shown_url(settings.traces_endpoint)} ({settings.traces_protocol})"
    else:
        where = f"spans to {', '.join(settings.traces_exporters)}"
    sampler = f"ratio {settings.ratio:g}" if settings.sampler.endswith("ratio") else settings.sampler
    what = _state.by_file or f"{where}, {sampler}"
    logs.startup_line(f"otel-correlation {__version__}: service {service}, {what}, header {settings.response_header}")


def _announce_problems() -> None:
    pending, _state.pending = _state.pending, []
    for line in pending:
        guard.logger.warning("%s", line)


def _announce_unserved() -> None:
    """
    Say at its end what was wrong, in a process that never served: a script or a worker of a queue.

    A server's process that never served is the parent of those that did, and they have said it.
    """
    if not {"uvicorn", "gunicorn"} & sys.modules.keys():
        _announce_problems()


def flush(timeout_s: float = export.EXIT_BUDGET_S) -> bool:
    """
    Send the spans, log records and metrics that wait now: for a process that is frozen or killed when its work is done.

    Blocks its thread; in async code, ``await asyncio.to_thread(flush)``. A service that runs on has no need of it: what
    waits is sent within half a second, and where the process ends. Never raises for what happens to the telemetry.

    Args:
        timeout_s: Seconds that it may take, for all of them together. Where nobody could connect to the collector for
            two seconds, it gives up before.

    Returns:
        Whether nothing is left: all was taken, or refused for good and counted (``stats()``). True where nothing is set
        up or exported. False where the time was not enough: what is left stays in its queue, one line says how much,
        and it is sent when the process goes on or at the next call.
    """
    if _state.settings is None or not _state.settings.enabled:
        return True
    try:
        return _flush(max(timeout_s, 0.0))
    except Exception:  # noqa: BLE001 - our failure is not the application's
        guard.report("flush")
        return False


def stats() -> dict[str, int]:
    """
    Return every counter by reason: spans exported and dropped, request ids refused and reused, internal errors.
    """
    return guard.counters()
