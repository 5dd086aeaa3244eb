"""
Names of the logs of ``opentelemetry-api`` and ``opentelemetry-sdk``: all are private, and many are younger than 1.30.
"""

from __future__ import annotations

from opentelemetry._logs import SeverityNumber

from otel_correlation.upstream import Unknown

try:
    from opentelemetry._logs._internal import ProxyLoggerProvider
except ImportError:
    ProxyLoggerProvider = Unknown  # type: ignore[assignment,misc]

try:
    from opentelemetry.sdk._logs import LogRecordProcessor, ReadableLogRecord, ReadWriteLogRecord
except ImportError:
    LogRecordProcessor = ReadableLogRecord = ReadWriteLogRecord = Unknown  # type: ignore[assignment,misc]

try:
    from opentelemetry.sdk._logs.export import ConsoleLogRecordExporter, LogRecordExporter, LogRecordExportResult
except ImportError:
    ConsoleLogRecordExporter = LogRecordExporter = LogRecordExportResult = Unknown  # type: ignore[assignment,misc]

try:
    from opentelemetry.sdk._logs._internal import Logger as SdkLogger
except ImportError:
    SdkLogger = Unknown  # type: ignore[assignment,misc]

try:
    from opentelemetry.sdk._logs._internal import std_to_otel
except ImportError:

    def std_to_otel(levelno: int) -> SeverityNumber:
        """
        Return the severity of a level of ``logging`` (specification, logs data model, "SeverityNumber").
        """
        if levelno < 10:
            return SeverityNumber.UNSPECIFIED
        band, step = divmod(min(levelno, 53) - 10, 10)
        return SeverityNumber(5 + 4 * band + min(step, 3))


__all__ = [
    "ConsoleLogRecordExporter",
    "LogRecordExportResult",
    "LogRecordExporter",
    "LogRecordProcessor",
    "ProxyLoggerProvider",
    "ReadWriteLogRecord",
    "ReadableLogRecord",
    "SdkLogger",
    "std_to_otel",
]
