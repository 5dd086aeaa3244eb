"""
The environment, read once into one frozen object.

Empty means unset (OpenTelemetry specification, "Parsing empty value"). A wrong value never stops the service: it is
replaced by
the default and described in ``Settings.problems``, one line each. A wrong value passed in code is a ``ConfigError``.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, Literal, cast
from urllib.parse import unquote, urlsplit

from otel_correlation import policy, semconv
from otel_correlation._early import LISTS
from otel_correlation.guard import STRICT_ENV, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")

Protocol = Literal["http/protobuf", "grpc"]

# The name of our entry points.
DISTRO: Final = "otel_correlation"
_CATEGORIES: Final = frozenset({"http", "database", "code", "messaging", "rpc", "k8s", "graphql", "system", "faas"})

LOG_LEVELS: Final = ("debug", "info", "warning", "error", "critical")
SAMPLERS: Final = (
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """
    Everything that this package was told, with defaults filled in.

    Attributes:
        enabled: False: nothing is patched and nothing is exported (``OTEL_CORRELATION_ENABLED``).
        sdk_disabled: No spans; request ids go on (``OTEL_SDK_DISABLED``).
        service_name: From ``OTEL_SERVICE_NAME`` or ``OTEL_RESOURCE_ATTRIBUTES``; empty if neither says it.
        request_id_headers: Lower-case names of the inbound headers, most wanted first.
        response_header: The header that goes out, on responses and requests.
        mint: How a new request id looks: the trace id's 32 hex digits, or a UUIDv4 that is bridged.
        traceresponse: Whether responses carry ``traceresponse``.
        server_timing: Whether responses carry ``Server-Timing: trace;desc=...``.
        log_format: How lines of ours look when the application configured no logging.
        log_preset: How the fields of lines of ours, and what structlog and loguru get, are called and written.
        log_fields: Renames beside the preset's, each ``name=new_name``.
        log_level: From which level on such lines are shown (``OTEL_PYTHON_LOG_LEVEL``).
        logs_export: Whether records of unsampled traces go to OTLP, too.
        query_values: Which query values are kept in spans: ``all``, all but ``sensitive`` ones, or ``none``.
        websocket: One trace per connection, or one per received message.
        sql_comments: Whether ``opentelemetry-instrument`` has SQL statements carry the ``traceparent`` in a comment.
        patch_threads: Whether threads, timers and thread pools take the ids of whoever starts or submits, and timers
            that arm themselves again lose them.
        messages: A consumer's span is in the producer's trace (``continue``), or in one of its own with a link.
        stores: Where ``find`` looks.
        edge: ``open`` continues every caller, or those in ``trusted_networks`` if there are any; ``public`` continues
            only those, and sends ids to internal hosts only.
        trusted_networks: Networks, addresses or ``unix``: callers whose ids are continued.
        trusted_proxies: The same for proxies behind which the caller is looked for.
        force_sample_header: The header by which a caller in ``trusted_networks`` gets its trace sampled; or empty.
        outbound_traceparent: Patterns of hosts that get ``traceparent``; empty is what ``edge`` says.
        outbound_baggage: The same for ``baggage``.
        outbound_request_id: The same for the request id.
        propagators: Names, in order.
        sampler: One of ``SAMPLERS``, or the name of a third-party entry point.
        sampler_arg: The argument as text, for third-party samplers.
        ratio: The head sampling ratio, 0 to 1.
        traces_exporters: Names; empty is ``none``.
        metrics_exporters: Names; empty is ``none``.
        logs_exporters: Names; empty is ``none``.
        traces_protocol: OTLP protocol of spans.
        metrics_protocol: OTLP protocol of metrics.
        logs_protocol: OTLP protocol of logs.
        traces_endpoint: Where spans go, for the start-up line.
        endpoint_is_default: Whether nobody named an endpoint.
        schedule_delay_ms: Longest time that a span waits for its batch (``OTEL_BSP_SCHEDULE_DELAY``).
        max_queue_size: Spans held at most (``OTEL_BSP_MAX_QUEUE_SIZE``).
        max_batch_size: Spans sent at once (``OTEL_BSP_MAX_EXPORT_BATCH_SIZE``).
        queue_bytes: Estimated bytes of spans held at most, and of log records (``OTEL_CORRELATION_QUEUE_BYTES``).
        log_correlation: Whether records get ``otelTraceID`` and its siblings, too (``OTEL_PYTHON_LOG_CORRELATION``).
        semconv_dup: Whether spans carry the old HTTP names as well (``OTEL_SEMCONV_STABILITY_OPT_IN=http/dup``).
        capture_server_request: Request headers to capture on SERVER spans (names or regular expressions).
        capture_server_response: Response headers to capture on SERVER spans.
        capture_client_request: Request headers to capture on CLIENT spans.
        capture_client_response: Response headers to capture on CLIENT spans.
        sanitize_fields: Captured headers whose value is replaced.
        excluded_server: Comma list of patterns of paths that make no SERVER span.
        excluded_client: Comma list of patterns of URLs that make no CLIENT span.
        problems: One line for each wrong value.
    """

    enabled: bool = True
    sdk_disabled: bool = False
    service_name: str = ""
    request_id_headers: tuple[bytes, ...] = (b"x-request-id",)
    response_header: str = semconv.X_REQUEST_ID
    mint: Literal["hex", "uuid"] = "hex"
    traceresponse: bool = False
    server_timing: bool = False
    log_format: Literal["auto", "json", "text", "none"] = "auto"
    log_preset: Literal["otel", "ecs", "gcp", "datadog"] = "otel"
    log_fields: tuple[str, ...] = ()
    log_level: Literal["debug", "info", "warning", "error", "critical"] = "info"
    logs_export: Literal["all", "sampled"] = "all"
    query_values: Literal["all", "sensitive", "none"] = "sensitive"
    websocket: Literal["connection", "message"] = "connection"
    sql_comments: bool = False
    patch_threads: bool = True
    messages: Literal["continue", "link"] = "continue"
    stores: tuple[str, ...] = ()
    edge: Literal["open", "public"] = "open"
    trusted_networks: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    force_sample_header: str = ""
    outbound_traceparent: tuple[str, ...] = ()
    outbound_baggage: tuple[str, ...] = ()
    outbound_request_id: tuple[str, ...] = ()
    propagators: tuple[str, ...] = ("tracecontext", "baggage", "xrequestid")
    sampler: str = "parentbased_traceidratio"
    sampler_arg: str = ""
    ratio: float = 1.0
    traces_exporters: tuple[str, ...] = ("otlp",)
    metrics_exporters: tuple[str, ...] = ()
    logs_exporters: tuple[str, ...] = ()
    traces_protocol: Protocol = "http/protobuf"
    metrics_protocol: Protocol = "http/protobuf"
    logs_protocol: Protocol = "http/protobuf"
    traces_endpoint: str = "http://localhost:4318/v1/traces"
    endpoint_is_default: bool = True
    schedule_delay_ms: int = 500
    max_queue_size: int = 2048
    max_batch_size: int = 512
    queue_bytes: int = policy.QUEUE_BYTES
    log_correlation: bool = False
    semconv_dup: bool = False
    capture_server_request: tuple[str, ...] = ()
    capture_server_response: tuple[str, ...] = ()
    capture_client_request: tuple[str, ...] = ()
    capture_client_response: tuple[str, ...] = ()
    sanitize_fields: tuple[str, ...] = ()
    excluded_server: str = ""
    excluded_client: str = ""
    problems: tuple[str, ...] = field(default=(), compare=False)


_PREFIX: Final = "OTEL_CORRELATION_"
_OURS: Final = frozenset(str(value) for name, value in vars(semconv).items() if name.startswith(_PREFIX))


# What it sets in every pod for a Service whose name begins like our variables (kubernetes.io, "Environment variables").
_OF_KUBERNETES: Final = re.compile(
    r"_SERVICE_HOST$|_SERVICE_PORT(_[A-Z0-9_]+)?$|_PORT(_[0-9]+_(TCP|UDP|SCTP)(_[A-Z]+)?)?$"
)


class _Environment:
    """
    Typed access to one mapping that collects a line for each wrong value.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.problems: list[str] = []

    def text(self, name: str) -> str:
        value = self._environ.get(name, "").strip()
        try:
            value.encode()
        except UnicodeEncodeError:
            # os.environ holds bytes that are not UTF-8 as lone surrogates, which no exporter can encode later.
            self.wrong(name, value, "the default", "not UTF-8")
            return ""
        return value

    def raw(self, name: str) -> str:
        """
        Return the value also where it is not UTF-8: then it is wrong, which is not the same as unset.
        """
        return self._environ.get(name, "").strip()

    def wrong(self, name: str, value: str, used: object, why: str = "") -> None:
        because = f" ({why})" if why else ""
        line = f"{name}{policy.quoted(name, value)} is not usable{because}; using {used} instead"
        # A variable may be read for several signals; it is wrong once.
        if line not in self.problems:
            self.problems.append(line)

    def misspelt(self, ours: frozenset[str]) -> None:
        """
        Tell of variables that begin like ours and are none: a misspelt one may have been meant to close something.
        """
        for name in sorted(name for name, value in self._environ.items() if name.startswith(_PREFIX) and value.strip()):
            if name not in ours and name != STRICT_ENV and not _OF_KUBERNETES.search(name):
                import difflib  # noqa: PLC0415 - rarely needed

                # Without the prefix, which all have in common.
                rests = [known.removeprefix(_PREFIX) for known in sorted(ours)]
                close = difflib.get_close_matches(name.removeprefix(_PREFIX), rests, 1)
                self.problems.append(
                    f"{ascii(name)[1:-1][:100]} is no setting" + (f"; {_PREFIX}{close[0]} is one" if close else "")
                )

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self.text(name)
        if not value:
            return default
        if value.lower() in ("true", "1", "yes", "on"):
            return True
        if value.lower() in ("false", "0", "no", "off"):
            return False
        self.wrong(name, value, str(default).lower(), "true or false")
        return default

    def choice(self, name: str, choices: tuple[str, ...], default: str) -> str:
        value = self.text(name).lower()
        if not value:
            return default
        if value in choices:
            return value
        self.wrong(name, self.text(name), default, "one of " + ", ".join(choices))
        return default

    def integer(self, name: str, default: int, *, least: int = 1) -> int:
        value = self.text(name)
        if not value:
            return default
        if re.fullmatch(r"[0-9]{1,12}", value) and int(value) >= least:
            return int(value)
        self.wrong(name, value, default, f"a whole number, {least} or more")
        return default

    def names(self, name: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in self.text(name).split(",") if part.strip())


def _edge(env: _Environment) -> Literal["open", "public"]:
    name = semconv.OTEL_CORRELATION_EDGE
    value = env.raw(name)
    if value.lower() not in ("", "open", "public"):
        # Whoever says something here wants less trust than there is without it.
        env.wrong(name, value, "public", "one of open, public")
        return "public"
    return "open" if value.lower() in ("", "open") else "public"


def _declared(env: _Environment, name: str, parse: Callable[[str], str]) -> tuple[str, ...]:
    """
    Return the entries of a list that trusts somebody; a wrong one trusts nobody.
    """
    value = env.raw(name)
    good: list[str] = []
    for entry in filter(None, map(str.strip, value.split(","))):
        try:
            good.append(parse(entry))
        except ValueError as error:
            env.wrong(name, entry, "an entry that matches nothing", str(error))
    if value and not good:
        if not value.strip(", \t"):
            env.wrong(name, value, policy.NONE, "a comma list")
        # Declared, and not unset: nobody is in it.
        good.append(policy.NONE)
    return tuple(dict.fromkeys(good))


def _force_sample_header(env: _Environment) -> str:
    name = semconv.OTEL_CORRELATION_FORCE_SAMPLE_HEADER
    value = env.text(name)
    if value and not _TOKEN.fullmatch(value):
        env.wrong(name, value, "none", "one header name")
        return ""
    return value


def _header_names(env: _Environment) -> tuple[bytes, ...]:
    name = semconv.OTEL_CORRELATION_REQUEST_ID_HEADERS
    names = env.names(name)
    bad = [entry for entry in names if not _TOKEN.fullmatch(entry)]
    if bad or (env.text(name) and not names):
        env.wrong(name, env.text(name), semconv.X_REQUEST_ID, "a comma list of header names")
        names = ()
    return tuple(dict.fromkeys(entry.lower().encode("ascii") for entry in names)) or (b"x-request-id",)


def _response_header(env: _Environment) -> str:
    name = semconv.OTEL_CORRELATION_RESPONSE_HEADER
    value = env.text(name)
    if value and not _TOKEN.fullmatch(value):
        env.wrong(name, value, semconv.X_REQUEST_ID, "one header name")
        value = ""
    return value or semconv.X_REQUEST_ID


def _ratio(env: _Environment, sampler: str) -> float:
    name = "OTEL_TRACES_SAMPLER_ARG"
    value = env.text(name)
    if not value or not sampler.endswith("traceidratio"):
        return 1.0
    try:
        ratio = float(value)
    except ValueError:
        ratio = math.nan
    if 0.0 <= ratio <= 1.0:
        return ratio
    env.wrong(name, value, "1.0", "a ratio from 0 to 1")
    return 1.0


def _sampler(env: _Environment, known: Callable[[str, str], bool]) -> str:
    name = "OTEL_TRACES_SAMPLER"
    value = env.text(name)
    if not value:
        return "parentbased_traceidratio"
    if value.lower() in SAMPLERS:
        return value.lower()
    if known("opentelemetry_traces_sampler", value):
        return value
    env.wrong(name, value, "parentbased_traceidratio", "no sampler of that name is installed")
    return "parentbased_traceidratio"


def _exporters(
    env: _Environment, signal: str, default: tuple[str, ...], known: Callable[[str, str], bool]
) -> tuple[str, ...]:
    name = f"OTEL_{signal.upper()}_EXPORTER"
    names = env.names(name)
    if not names:
        return default
    if "none" in (entry.lower() for entry in names):
        if len(names) > 1:
            env.wrong(name, env.text(name), "none", "none stands alone")
        return ()
    good = tuple(entry for entry in names if known(f"opentelemetry_{signal}_exporter", entry))
    for entry in names:
        if entry not in good:
            used = ",".join(good or default) or "none"
            env.wrong(name, entry, used, "no exporter of that name is installed")
    return tuple(dict.fromkeys(good or default))


def _protocol(env: _Environment, signal: str) -> Protocol:
    for name in (f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if env.text(name):
            return cast("Protocol", env.choice(name, ("http/protobuf", "grpc"), "http/protobuf"))
    return "http/protobuf"


def _good_url(value: str) -> bool:
    try:
        parts = urlsplit(value)
        return (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
            and not re.search(r"\s", value)
        )
    except ValueError:
        return False


def _endpoint(env: _Environment, protocol: Protocol) -> tuple[str, bool]:
    used = "http://localhost:4317" if protocol == "grpc" else "http://localhost:4318/v1/traces"
    is_default = True
    # The signal's own variable comes last and wins.
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        value = env.text(name)
        if not value:
            continue
        # gRPC also takes host:port without a scheme (specification: protocol/exporter.md, Endpoint).
        if _good_url(value) or (protocol == "grpc" and _good_url("http://" + value) and "//" not in value):
            whole = protocol == "grpc" or name == "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
            used, is_default = value if whole else value.rstrip("/") + "/v1/traces", False
        else:
            env.wrong(name, value, policy.shown_url(used), "a URL such as http://collector:4318")
    return used, is_default


# A header's name, and what no header's value may contain (RFC 9110, 5.5).
_CONTROL: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


def otlp_headers(text: str) -> tuple[dict[str, str], str]:
    """
    Return the headers of ``OTEL_EXPORTER_OTLP_HEADERS``, and what is wrong with the other entries; no part of a value.

    Args:
        text: ``NAME=VALUE,...``, both percent-encoded (OpenTelemetry specification, protocol/exporter.md).
    """
    headers: dict[str, str] = {}
    bad = 0
    for entry in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = entry.partition("=")
        key, value = unquote(key).strip(), unquote(value).strip()
        if not equals or not _TOKEN.fullmatch(key) or _CONTROL.search(value):
            bad += 1
            continue
        # The transport writes Latin-1; this way UTF-8 arrives as UTF-8.
        headers[key.lower()] = value.encode("utf-8", "replace").decode("latin-1")
    return headers, f"{bad} of its entries are not NAME=VALUE; {policy.HEADERS_HINT}" if bad else ""


def _check_headers(env: _Environment) -> None:
    for signal in ("", "TRACES_", "METRICS_", "LOGS_"):
        name = f"OTEL_EXPORTER_OTLP_{signal}HEADERS"
        _, why = otlp_headers(env.text(name))
        if why:
            # Not the value: it is where API keys are.
            env.wrong(name, "", "the other entries", why)


def _propagators(env: _Environment, known: Callable[[str, str], bool]) -> tuple[str, ...]:
    name = "OTEL_PROPAGATORS"
    default = ("tracecontext", "baggage", "xrequestid")
    names = tuple(dict.fromkeys(env.names(name)))
    if not names:
        return default
    if "none" in (entry.lower() for entry in names):
        if len(names) > 1:
            env.wrong(name, env.text(name), "none", "none stands alone")
        return ()
    good = tuple(entry for entry in names if entry in default or known("opentelemetry_propagator", entry))
    for entry in names:
        if entry not in good:
            env.wrong(name, entry, ",".join(good or default), "no propagator of that name is installed")
    return good or default


_FIELD: Final = re.compile(r"[A-Za-z_@][A-Za-z0-9_.@/:-]{0,59}")


def renamed(preset: str, renames: Iterable[str]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """
    Return what each field of a line is called, and each rename that cannot be used, with the reason.
    """
    names = {name: name for name in semconv.LOG_FIELDS} | semconv.LOG_PRESETS[preset]
    bad: list[tuple[str, str]] = []
    for entry in renames:
        name, _, new = (part.strip() for part in entry.partition("="))
        if name not in names:
            bad.append((entry, "name=new_name, where name is one of " + ", ".join(names)))
        elif not _FIELD.fullmatch(new):
            bad.append((entry, "a new name starts with a letter and has letters, digits and _ . @ / : - only"))
        elif any(new == other for field_name, other in names.items() if field_name != name):
            bad.append((entry, "another field has that name"))
        else:
            names[name] = new
    return names, bad


def _log_fields(env: _Environment, preset: str) -> tuple[str, ...]:
    name = semconv.OTEL_CORRELATION_LOG_FIELDS
    entries = env.names(name)
    _, bad = renamed(preset, entries)
    for entry, why in bad:
        env.wrong(name, entry, "its own name", why)
    refused = {entry for entry, _ in bad}
    return tuple(entry for entry in entries if entry not in refused)


def _service_name(env: _Environment) -> str:
    if name := env.text("OTEL_SERVICE_NAME"):
        return name
    for pair in env.names("OTEL_RESOURCE_ATTRIBUTES"):
        key, equals, value = pair.partition("=")
        if equals and key.strip() == "service.name":
            return unquote(value.strip())
    return ""


def _sdk_disabled(env: _Environment) -> bool:
    name = "OTEL_SDK_DISABLED"
    value = env.text(name)
    # The specification: only a case-insensitive "true" is true.
    if value and value.lower() not in ("true", "false"):
        env.wrong(name, value, "false", "true or false")
    return value.lower() == "true"


def _opt_in(env: _Environment) -> set[str]:
    name = "OTEL_SEMCONV_STABILITY_OPT_IN"
    words = {entry.lower(): entry for entry in env.names(name)}
    for word, entry in words.items():
        # Whatever the conventions call a category, with or without its old names; and what gen_ai opts into.
        if word.removesuffix("/dup") not in _CATEGORIES and not word.startswith("gen_ai"):
            env.wrong(name, entry, "http", "http, http/dup or another category of the semantic conventions")
    return set(words)


def _stores(env: _Environment) -> tuple[str, ...]:
    name = semconv.OTEL_CORRELATION_STORES
    entries = env.names(name)
    for entry in entries:
        if "=" not in entry.partition("://")[0] and not _good_url(entry):
            env.wrong(
                name, entry, "no store", "http://HOST:PORT, KIND=http://HOST:PORT or logs=FILES; `find` refuses it"
            )
    return entries


def _check_plugs(env: _Environment, known: Callable[[str, str], bool]) -> None:
    """
    Tell of names that stock packages look for and do not find: they say nothing, or print a traceback.
    """
    name = "OTEL_PYTHON_DISTRO"
    distro = env.text(name)
    if distro and distro != DISTRO and not known("opentelemetry_distro", distro):
        env.wrong(name, distro, DISTRO, "no distribution of that name is installed")
    name = "OTEL_EXPERIMENTAL_RESOURCE_DETECTORS"
    group, built_in = LISTS[name]
    for entry in env.names(name):
        if entry not in built_in and not known(group, entry):
            env.wrong(name, entry, "the other detectors", "no resource detector of that name is installed")


def _first(env: _Environment, *names: str) -> str:
    return next((value for name in names if (value := env.text(name))), "")


def _installed(group: str, name: str) -> bool:
    from otel_correlation.upstream.metadata import entry_points  # noqa: PLC0415 - rarely needed

    return bool(entry_points(group=group, name=name))


def from_environment(
    environ: Mapping[str, str] | None = None, *, known: Callable[[str, str], bool] | None = None
) -> Settings:
    """
    Read every setting; never raises.

    Args:
        environ: The mapping to read; ``os.environ`` if None.
        known: Tells whether an entry point (group, name) is installed.
    """
    env = _Environment(os.environ if environ is None else environ)

    def is_known(group: str, name: str) -> bool:
        if name in ("otlp", "otlp_proto_http", "otlp_proto_grpc", "console") and group.endswith("_exporter"):
            return True
        return (known or _installed)(group, name)

    sampler = _sampler(env, is_known)
    traces_protocol = _protocol(env, "traces")
    endpoint, endpoint_is_default = _endpoint(env, traces_protocol)
    traceresponse = env.choice(
        semconv.OTEL_CORRELATION_TRACERESPONSE,
        ("true", "false", "none", "traceresponse", "server-timing", "both"),
        "none",
    )
    captured = "OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_"
    queue_size = env.integer("OTEL_BSP_MAX_QUEUE_SIZE", 2048)
    batch_size = env.integer("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512)
    if batch_size > queue_size:
        if env.text("OTEL_BSP_MAX_EXPORT_BATCH_SIZE"):
            env.wrong("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", str(batch_size), queue_size, "at most the queue's size")
        batch_size = queue_size
    opt_in = _opt_in(env)
    _check_plugs(env, is_known)
    _check_headers(env)
    env.misspelt(_OURS)
    choice = cast("Any", env.choice)
    preset = choice(semconv.OTEL_CORRELATION_LOG_PRESET, tuple(semconv.LOG_PRESETS), "otel")
    return Settings(
        enabled=env.boolean(semconv.OTEL_CORRELATION_ENABLED, default=True),
        sdk_disabled=_sdk_disabled(env),
        service_name=_service_name(env),
        request_id_headers=_header_names(env),
        response_header=_response_header(env),
        mint=choice(semconv.OTEL_CORRELATION_MINT, ("hex", "uuid"), "hex"),
        traceresponse=traceresponse in ("true", "traceresponse", "both"),
        server_timing=traceresponse in ("server-timing", "both"),
        log_format=choice(semconv.OTEL_CORRELATION_LOG_FORMAT, ("auto", "json", "text", "none"), "auto"),
        log_preset=preset,
        log_fields=_log_fields(env, preset),
        log_level=choice("OTEL_PYTHON_LOG_LEVEL", LOG_LEVELS, "info"),
        logs_export=choice(semconv.OTEL_CORRELATION_LOGS_EXPORT, ("all", "sampled"), "all"),
        query_values=choice(semconv.OTEL_CORRELATION_QUERY_VALUES, ("all", "sensitive", "none"), "sensitive"),
        websocket=choice(semconv.OTEL_CORRELATION_WEBSOCKET, ("connection", "message"), "connection"),
        sql_comments=env.boolean(semconv.OTEL_CORRELATION_SQL_COMMENTS, default=False),
        patch_threads=env.boolean(semconv.OTEL_CORRELATION_PATCH_THREADS, default=True),
        messages=choice(semconv.OTEL_CORRELATION_MESSAGES, ("continue", "link"), "continue"),
        stores=_stores(env),
        edge=_edge(env),
        trusted_networks=_declared(env, semconv.OTEL_CORRELATION_TRUSTED_NETWORKS, policy.peers),
        trusted_proxies=_declared(env, semconv.OTEL_CORRELATION_TRUSTED_PROXIES, policy.peers),
        force_sample_header=_force_sample_header(env),
        outbound_traceparent=_declared(env, semconv.OTEL_CORRELATION_OUTBOUND_TRACEPARENT, policy.host_pattern),
        outbound_baggage=_declared(env, semconv.OTEL_CORRELATION_OUTBOUND_BAGGAGE, policy.host_pattern),
        outbound_request_id=_declared(env, semconv.OTEL_CORRELATION_OUTBOUND_REQUEST_ID, policy.host_pattern),
        propagators=_propagators(env, is_known),
        sampler=sampler,
        sampler_arg=env.text("OTEL_TRACES_SAMPLER_ARG"),
        ratio=_ratio(env, sampler),
        traces_exporters=_exporters(env, "traces", ("otlp",), is_known),
        metrics_exporters=_exporters(env, "metrics", (), is_known),
        logs_exporters=_exporters(env, "logs", (), is_known),
        traces_protocol=traces_protocol,
        metrics_protocol=_protocol(env, "metrics"),
        logs_protocol=_protocol(env, "logs"),
        traces_endpoint=endpoint,
        endpoint_is_default=endpoint_is_default,
        schedule_delay_ms=env.integer("OTEL_BSP_SCHEDULE_DELAY", 500, least=0),
        max_queue_size=queue_size,
        max_batch_size=batch_size,
        queue_bytes=env.integer(semconv.OTEL_CORRELATION_QUEUE_BYTES, policy.QUEUE_BYTES),
        log_correlation=env.boolean("OTEL_PYTHON_LOG_CORRELATION", default=False),
        semconv_dup="http/dup" in opt_in,
        capture_server_request=env.names(captured + "SERVER_REQUEST"),
        capture_server_response=env.names(captured + "SERVER_RESPONSE"),
        capture_client_request=env.names(captured + "CLIENT_REQUEST"),
        capture_client_response=env.names(captured + "CLIENT_RESPONSE"),
        sanitize_fields=env.names(captured + "SANITIZE_FIELDS"),
        excluded_server=_first(env, "OTEL_PYTHON_FASTAPI_EXCLUDED_URLS", "OTEL_PYTHON_EXCLUDED_URLS"),
        excluded_client=_first(env, "OTEL_PYTHON_HTTPX_EXCLUDED_URLS", "OTEL_PYTHON_EXCLUDED_URLS"),
        problems=tuple(env.problems),
    )


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """
    Return the variables of OpenTelemetry's and ours that are set; one that is empty is not.
    """
    return {name: value for name, value in environ.items() if name.startswith("OTEL_") and value.strip()}


def late_variables(read: Mapping[str, str], environ: Mapping[str, str]) -> list[str]:
    """
    Return the names of those that were set, or set to something else, since they were read; at most 20.

    One that was taken away is not among them.
    """
    # Strictness is read whenever it is needed.
    late = [name for name, value in variables(environ).items() if read.get(name) != value and name != STRICT_ENV]
    return [ascii(name)[1:-1][:100] for name in sorted(late)[:20]]


def with_overrides(settings: Settings, overrides: Mapping[str, Any]) -> Settings:
    """
    Return ``settings`` with values that were passed in code.

    Raises:
        ConfigError: An unknown name, a wrong type or a value out of range.
    """
    known = {entry.name: entry for entry in fields(Settings) if entry.name != "problems"}
    values = {name: getattr(settings, name) for name in known}
    for name, value in overrides.items():
        if name not in known:
            message = f"unknown setting {name!r}; one of {', '.join(sorted(known))}"
            raise ConfigError(message)
        values[name] = _checked(name, value, getattr(settings, name))
    _, bad = renamed(values["log_preset"], values["log_fields"])
    if bad:
        message = f"log_fields: {bad[0][0]!r} is not usable ({bad[0][1]})"
        raise ConfigError(message)
    return Settings(**values, problems=settings.problems)


_DECLARED: Final[dict[str, Callable[[str], str]]] = {
    "trusted_networks": policy.peers,
    "trusted_proxies": policy.peers,
    "outbound_traceparent": policy.host_pattern,
    "outbound_baggage": policy.host_pattern,
    "outbound_request_id": policy.host_pattern,
}
_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "mint": ("hex", "uuid"),
    "log_format": ("auto", "json", "text", "none"),
    "log_preset": tuple(semconv.LOG_PRESETS),
    "log_level": LOG_LEVELS,
    "logs_export": ("all", "sampled"),
    "query_values": ("all", "sensitive", "none"),
    "websocket": ("connection", "message"),
    "messages": ("continue", "link"),
    "edge": ("open", "public"),
    "traces_protocol": ("http/protobuf", "grpc"),
    "metrics_protocol": ("http/protobuf", "grpc"),
    "logs_protocol": ("http/protobuf", "grpc"),
}


def _checked(name: str, value: object, present: object) -> object:
    if name == "request_id_headers":
        return _checked_headers(value)
    if name == "response_header" and not (isinstance(value, str) and _TOKEN.fullmatch(value)):
        message = f"response_header={value!r}: pass one header name, such as 'X-Request-ID'"
        raise ConfigError(message)
    if name in _CHOICES and value not in _CHOICES[name]:
        message = f"{name}={value!r}: pass one of {', '.join(_CHOICES[name])}"
        raise ConfigError(message)
    if name == "ratio":
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            message = f"ratio={value!r}: pass a number from 0 to 1"
            raise ConfigError(message)
        return float(value)
    if name == "force_sample_header" and not (isinstance(value, str) and (not value or _TOKEN.fullmatch(value))):
        message = f"force_sample_header={value!r}: pass one header name, such as 'X-Force-Sample', or ''"
        raise ConfigError(message)
    if name in _DECLARED and isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        try:
            return tuple(_DECLARED[name](part) for part in value)
        except ValueError as error:
            message = f"{name}={value!r}: {error}"
            raise ConfigError(message) from error
    if isinstance(present, tuple) and isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        return tuple(value)
    if type(value) is not type(present):
        # Of a wrong type, nobody knows where in it a password is.
        shown = "" if name in ("stores", "traces_endpoint", "sampler_arg") else f"={value!r}"
        message = f"{name}{shown}: pass a {type(present).__name__}"
        raise ConfigError(message)
    least = 0 if name == "schedule_delay_ms" else 1
    if isinstance(value, int) and not isinstance(value, bool) and value < least:
        message = f"{name}={value!r}: pass {least} or more"
        raise ConfigError(message)
    return value


def _checked_headers(value: object) -> tuple[bytes, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names:
        message = f"request_id_headers={value!r}: pass a list of header names, such as ['X-Request-ID']"
        raise ConfigError(message)
    good: list[bytes] = []
    for entry in names:
        text = entry.decode("latin-1") if isinstance(entry, bytes) else entry
        if not isinstance(text, str) or not _TOKEN.fullmatch(text):
            message = f"request_id_headers: {entry!r} is not a header name"
            raise ConfigError(message)
        good.append(text.lower().encode("ascii"))
    return tuple(good)
