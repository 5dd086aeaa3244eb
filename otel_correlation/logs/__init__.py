"""
Log records that know their request: five fields on each of them, lines where the application has none, OTLP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from otel_correlation.logs import foreign, loops, output, record
from otel_correlation.logs.lines import JsonLines, TextLines
from otel_correlation.logs.output import active, settle, startup_line, summary

if TYPE_CHECKING:
    from opentelemetry._logs import LoggerProvider

    from otel_correlation.settings import Settings

__all__ = [
    "JsonLines",
    "TextLines",
    "active",
    "install",
    "otlp_handler",
    "settle",
    "startup_line",
    "summary",
    "uninstall",
]


def install(settings: Settings) -> None:
    """
    Put the five fields on every record of the process and watch how it configures logging; twice is once.
    """
    record.install(settings)
    output.install(settings)
    foreign.watch()
    loops.watch()


def uninstall() -> None:
    """
    Leave ``logging`` as it was found.
    """
    loops.unwatch()
    foreign.unwatch()
    output.uninstall()
    record.uninstall()


def otlp_handler(logger_provider: LoggerProvider, settings: Settings) -> None:
    """
    Emit every later record through ``logger_provider``, once, whatever logger made it; nothing without log exporters.
    """
    if settings.logs_exporters:
        from otel_correlation.logs.otlp import Export  # noqa: PLC0415 - most services ship their stdout

        record.seams.export = Export(logger_provider, settings)
