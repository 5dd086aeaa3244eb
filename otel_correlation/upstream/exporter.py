"""
Private names of the OTLP exporters; each package is imported only by who asks for one of its names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from opentelemetry.exporter.otlp.common import http

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# What a stand-in for the stock exporter calls itself where that does not say what it is called.
_AGENT: Final = "OTel-OTLP-Exporter-Python"

_extract: Any = getattr(http, "_extract_retry_after", None)


def extract_retry_after(result: Any) -> float | None:
    """
    Return the seconds that a collector asks to wait, or None: then our own pauses are kept.
    """
    return None if _extract is None else _extract(result)


def http_headers() -> Mapping[str, str]:
    """
    Return the headers of the stock HTTP exporter: its content type and its name.
    """
    from opentelemetry.exporter.otlp.proto import http as stock  # noqa: PLC0415 - only if HTTP is wanted

    return getattr(stock, "_OTLP_HTTP_HEADERS", {"Content-Type": "application/x-protobuf", "User-Agent": _AGENT})


def session_named(variable: str) -> Any:
    """
    Return the session of a credential provider that a variable names, or None.

    Raises:
        Exception: What the provider raises, or AttributeError where the stock exporter finds it in another way.
    """
    from opentelemetry.exporter.otlp.proto.http import _common  # noqa: PLC0415 - only if there is a provider

    load: Any = _common._load_session_from_envvar
    return load(variable)


def grpc_options() -> Iterable[tuple[str, str]]:
    """
    Return the channel options of the stock gRPC exporter: its name.
    """
    from opentelemetry.exporter.otlp.proto import grpc  # noqa: PLC0415 - only if gRPC is wanted

    return getattr(grpc, "_OTLP_GRPC_CHANNEL_OPTIONS", (("grpc.primary_user_agent", _AGENT),))
