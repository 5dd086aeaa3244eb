"""
What a line of ours may show of the environment, of an address and of a failure: what is known to hold no credential.

Everything here names what is shown; whatever it does not know becomes ``***``.
"""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

from otel_correlation import semconv
from otel_correlation.policy.scrubbing import scrub

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

HIDDEN: Final = "***"
# What to write, where nothing of what is there can be shown.
HEADERS_HINT: Final = (
    "write NAME=VALUE with each space as %20, such as Authorization=Bearer%20KEY, and a comma between two"
)

_SCHEME: Final = re.compile("[A-Za-z][A-Za-z0-9+.-]{0,31}")
_HOST: Final = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}")
# A part of a path that is no key: words of letters in one case, and versions.
_WORD: Final = r"(?:[A-Z]?[a-z]{1,19}|[A-Z]{1,10})"
_SEGMENT: Final = re.compile(
    rf"{_WORD}(?:[._-]{_WORD}){{0,3}}|v[0-9]{{1,2}}(?:(?:alpha|beta)[0-9]{{1,2}})?|[0-9]{{1,3}}"
)
_MAX_SEGMENTS: Final = 12
_NAME: Final = re.compile(rf"{_WORD}(?:[._-]{_WORD}){{0,5}}")
# The name of a header before its value: as above, and camelCase.
_HEADER: Final = re.compile(r"[A-Za-z]{1,20}(?:[-_.][A-Za-z]{1,20}){0,5}")
# Twenty letters and digits in one piece with both among them: a key, and no word.
_MADE: Final = re.compile(r"(?=[A-Za-z]{0,64}[0-9])(?=[0-9]{0,64}[A-Za-z])[A-Za-z0-9]{20,}")
_MAX_VALUE: Final = 100
# Shorter ones are not looked for in texts: they are in any.
_SHORTEST_SECRET: Final = 4

_HEADERS: Final = re.compile(r"OTEL_EXPORTER_OTLP_(?:[A-Z]+_)?HEADERS")
_ENDPOINTS: Final = re.compile(r"OTEL_EXPORTER_[A-Z_]*ENDPOINT")
# Numbers, switches, names of headers, packages and hosts; of ours all but the stores.
_PLAIN: Final = re.compile(
    "FASTAPI_OTEL_AUTO_CONFIGURE|OTEL_SDK_DISABLED|OTEL_SERVICE_NAME|OTEL_LOG_LEVEL|OTEL_PROPAGATORS|OTEL_TRACES_SAMPLER"
    "|OTEL_(?:TRACES|METRICS|LOGS)_EXPORTER|OTEL_SEMCONV_STABILITY_OPT_IN|OTEL_METRICS_EXEMPLAR_FILTER"
    "|OTEL_(?:BSP|BLRP|METRIC_EXPORT)_[A-Z_]+|OTEL_[A-Z_]+_LIMIT|OTEL_EXPERIMENTAL_RESOURCE_DETECTORS|OTEL_CONFIG_FILE"
    "|OTEL_EXPORTER_OTLP_(?:[A-Z_]+_)?(?:PROTOCOL|TIMEOUT|COMPRESSION|INSECURE|CERTIFICATE)"
    "|OTEL_EXPORTER_OTLP_METRICS_(?:TEMPORALITY_PREFERENCE|DEFAULT_HISTOGRAM_AGGREGATION)"
    "|OTEL_PYTHON_EXPORTER_OTLP_(?:[A-Z]+_){1,2}CREDENTIAL_PROVIDER"
    "|OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_[A-Z_]+|OTEL_PYTHON_(?:[A-Z]+_)?EXCLUDED_URLS"
    "|OTEL_PYTHON_(?:DISTRO|CONFIGURATOR|CONTEXT|ID_GENERATOR|LOG_CORRELATION|LOG_LEVEL|DISABLED_INSTRUMENTATIONS"
    "|LOGGING_AUTO_INSTRUMENTATION_ENABLED|TRACER_PROVIDER|METER_PROVIDER|LOGGER_PROVIDER|AUTO_INSTRUMENTATION_[A-Z_]+)"
)
_OURS: Final = frozenset(
    str(value) for name, value in vars(semconv).items() if name.startswith("OTEL_CORRELATION_")
) - {semconv.OTEL_CORRELATION_STORES}
_NUMBER: Final = re.compile(r"[0-9.eE+%,-]{1,20}|[a-z]{1,8}")
# Attributes of a resource that say what runs where.
_RESOURCE: Final = re.compile(
    r"service\.(?:name|namespace|version)|deployment\.environment(?:\.name)?|telemetry\.[a-z.]+|host\.(?:name|arch)"
    r"|os\.type|cloud\.(?:provider|region|platform|availability_zone)|k8s\.[a-z.]+\.name|container\.name"
)


def shown_url(text: str) -> str:
    """
    Return an address as it may be shown: scheme, host, port, and the parts of the path that are plain words.

    Users, passwords, values of the query, the fragment and any other part of the path become ``***``; so does all of
    what is no address.
    """
    scheme, mark, rest = text.strip().partition("://")
    if not mark:
        scheme, rest = "", text.strip()
    try:
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return f"{scheme}://{HIDDEN}" if mark and _SCHEME.fullmatch(scheme) else HIDDEN
    if not rest and _SCHEME.fullmatch(scheme):
        return text.strip()
    is_address = _HOST.fullmatch(host) and (_SCHEME.fullmatch(scheme) if mark else port)
    if not is_address:
        return HIDDEN
    shown = f"{scheme}{mark}"
    if "@" in rest[len(parts.netloc) :] or not parts.netloc.isascii():
        # A password with a slash: what looks like the host is the user.
        return f"{shown}{HIDDEN}"
    shown += f"{HIDDEN}@" if "@" in parts.netloc else ""
    shown += f"[{host}]" if ":" in host else host
    shown += f":{port}" if port is not None else ""
    segments = parts.path.split("/")
    shown += "/".join(
        segment if not segment or _SEGMENT.fullmatch(segment) else HIDDEN for segment in segments[:_MAX_SEGMENTS]
    )
    shown += f"/{HIDDEN}" if len(segments) > _MAX_SEGMENTS else ""
    if parts.query:
        names = [pair.partition("=")[::2] for pair in parts.query.split("&")[:_MAX_SEGMENTS]]
        shown += "?" + "&".join(
            f"{name}={HIDDEN}" if value and _NAME.fullmatch(name) else HIDDEN for name, value in names
        )
    return shown + (f"#{HIDDEN}" if parts.fragment else "")


def shown_store(entry: str) -> str:
    """
    Return an entry of ``OTEL_CORRELATION_STORES`` as it may be shown: a kind and an address, or where log files are.
    """
    kind, equals, place = entry.partition("=") if "=" in entry.partition("://")[0] else ("", "", entry)
    if kind == "logs" and "@" not in place:
        return entry
    if kind and not _SEGMENT.fullmatch(kind):
        kind = HIDDEN
    return f"{kind}{equals}{shown_url(place) if place else ''}"


def shown_headers(value: str) -> str:
    """
    Return the names of headers of a list ``NAME=VALUE,...``; an entry of another form becomes ``***``.
    """
    shown: list[str] = []
    for entry in filter(None, map(str.strip, value.split(","))):
        name, equals, text = entry.partition("=")
        # Without a value, the = may be the padding of a key in base64.
        is_pair = equals and text.strip("=") and _HEADER.fullmatch(name.strip())
        shown.append(f"{name.strip()}={HIDDEN}" if is_pair else HIDDEN)
    return ",".join(shown)


def shown_variable(name: str, value: str) -> str:
    """
    Return a variable's value as it may be shown.
    """
    if _HEADERS.fullmatch(name):
        return shown_headers(value)
    if name == semconv.OTEL_CORRELATION_STORES:
        return ",".join(map(shown_store, value.split(",")))
    if _ENDPOINTS.fullmatch(name):
        return shown_url(value)
    if name == "OTEL_RESOURCE_ATTRIBUTES":
        return ",".join(_attribute(pair) for pair in value.split(",") if pair.strip())
    if name == "OTEL_TRACES_SAMPLER_ARG":
        return value if _NUMBER.fullmatch(value) else HIDDEN
    return _piece_by_piece(value) if name in _OURS or _PLAIN.fullmatch(name) else HIDDEN


def quoted(name: str, value: str) -> str:
    """
    Return ``='value'`` for a line about a wrong value, or nothing where a part of the value must not be shown.

    At most 100 characters, in ASCII.
    """
    shown = shown_variable(name, value)
    return "" if not value or HIDDEN in shown else f"={shown[:_MAX_VALUE]!a}"


def shown_text(text: str) -> str:
    """
    Return another's text without the credentials that the environment holds, and without what ``scrub`` knows.
    """
    text = scrub(text)
    for secret in known_secrets(os.environ):
        text = text.replace(secret, HIDDEN)
    return text


def reason_of(error: BaseException | None) -> str:
    """
    Return what the operating system said, such as "Connection refused", or the kind of error; never its own text.
    """
    kind = type(error).__name__
    for _ in range(8):
        if error is None:
            break
        said = getattr(error, "strerror", None)
        if isinstance(said, str) and said:
            return said
        error = error.__cause__ or error.__context__
    return kind


def known_secrets(environ: Mapping[str, str]) -> list[str]:
    """
    Return what the variables of exporters and stores hold that must not be shown, the longest first.
    """
    found: set[str] = set()
    for name, value in environ.items():
        if _HEADERS.fullmatch(name):
            found.update(_of_headers(value))
        elif _ENDPOINTS.fullmatch(name) or name == semconv.OTEL_CORRELATION_STORES:
            for entry in value.split(","):
                found.update(_of_url(entry))
    forms = {form for text in found for form in (text.strip(), unquote(text).strip())}
    return sorted((form for form in forms if len(form) >= _SHORTEST_SECRET), key=len, reverse=True)


def _of_headers(value: str) -> Iterator[str]:
    for entry in value.split(","):
        name, equals, text = entry.partition("=")
        yield text if equals and _HEADER.fullmatch(name.strip()) else entry
        # Without the scheme, such as Bearer, and where = was meant to be a colon.
        yield unquote(text or entry).strip().rpartition(" ")[2]


def _of_url(entry: str) -> Iterator[str]:
    rest = entry.partition("://")[2] or entry
    user, at, _ = rest.rpartition("@")
    if at:
        yield user
        yield from user.split(":", 1)
    address, _, query = rest[len(user) :].partition("?")
    for pair in query.partition("#")[0].split("&"):
        yield pair.partition("=")[2] or pair
    for segment in address.split("/")[1:]:
        if not _SEGMENT.fullmatch(segment):
            yield segment


def _attribute(pair: str) -> str:
    key, equals, value = (part.strip() for part in pair.partition("="))
    if not equals or not re.fullmatch("[a-z0-9_.]{1,60}", key):
        return HIDDEN
    return f"{key}={_piece_by_piece(value) if _RESOURCE.fullmatch(key) else HIDDEN}"


def _piece_by_piece(value: str) -> str:
    pieces: Iterable[str] = value.split(",")
    return ",".join(
        shown_url(piece) if "://" in piece or "@" in piece else _MADE.sub(HIDDEN, piece) for piece in pieces
    )


def file_problem(error: BaseException) -> str:
    """
    Return what is wrong with a configuration file: where, and of which kind; never what stands there.
    """
    cause = error.__cause__
    if cause is None:
        return shown_text(" ".join(str(error).split()))[:300] or type(error).__name__
    path = getattr(cause, "absolute_path", None)
    if path:
        return f"it does not match the schema at {'.'.join(map(str, path))[:200]}"
    line = getattr(getattr(cause, "problem_mark", None), "line", None)
    return f"{reason_of(cause)} in line {line + 1}" if isinstance(line, int) else reason_of(cause)


class _StockLines(logging.Filter):
    """
    Shows of each argument of a line what may be shown; no line is dropped.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "opentelemetry.util.re":
            # Its argument is the header, or what was meant to be one.
            record.args = (f"{HIDDEN} ({HEADERS_HINT})",)
        elif isinstance(record.args, tuple):
            record.args = tuple(_argument(value) for value in record.args)
        if record.exc_info and record.exc_info[1] is not None:
            # Its text quotes where it was sent, or the file that could not be read.
            record.msg = f"{record.msg} (%s)"
            record.args = (*(record.args if isinstance(record.args, tuple) else ()), reason_of(record.exc_info[1]))
            record.exc_info = record.exc_text = None
        return True


def _argument(value: object) -> object:
    if isinstance(value, BaseException):
        return reason_of(value)
    return shown_text(value) if isinstance(value, str) else value


_stock_lines = _StockLines()


def mask_stock_lines() -> None:
    """
    Keep credentials out of what OpenTelemetry's own exporters and parsers log, from now on; once more changes nothing.
    """
    for name in (
        "opentelemetry.util.re",
        "opentelemetry.exporter.otlp.common.http",
        "opentelemetry.exporter.otlp.proto.grpc.exporter",
        "opentelemetry.exporter.otlp.proto.http._common",
        "opentelemetry.exporter.otlp.proto.http._log_exporter",
        "opentelemetry.exporter.otlp.proto.http.metric_exporter",
        "opentelemetry.exporter.otlp.proto.http.trace_exporter",
        "opentelemetry.configuration.file._loader",
        "opentelemetry.sdk.metrics._internal.export",
    ):
        logging.getLogger(name).addFilter(_stock_lines)
