"""
Logging as a fresh process has it, for the time of a block.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from typing import TYPE_CHECKING

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from otel_correlation import identity, logs

if TYPE_CHECKING:
    from collections.abc import Iterator

TRACE_ID = 0x0AF7651916CD43DD8448EB211C80319C
SPAN_ID = 0xB7AD6B7169203331
TRACE_TEXT = "0af7651916cd43dd8448eb211c80319c"
SPAN_TEXT = "b7ad6b7169203331"
# What a line of ``request()`` has in the service "orders".
IDS = {
    "trace_id": TRACE_TEXT,
    "span_id": SPAN_TEXT,
    "trace_flags": "01",
    "request_id": "order-7",
    "service_name": "orders",
}


@contextlib.contextmanager
def pristine() -> Iterator[io.StringIO]:
    """
    Take away every handler and level (pytest has handlers on the root logger); give back what goes to stdout.
    """
    root = logging.root
    loggers = [logger for logger in logging.Logger.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    saved = [
        (logger, logger.handlers, logger.level, logger.propagate, logger.disabled, list(logger.filters))
        for logger in [root, *loggers]
    ]
    last, factory, klass = logging.lastResort, logging.getLogRecordFactory(), logging.getLoggerClass()
    for logger in [root, *loggers]:
        logger.handlers = []
        logger.setLevel(logging.WARNING if logger is root else logging.NOTSET)
        logger.propagate, logger.disabled = True, False
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            yield out
    finally:
        logs.uninstall()
        made = [logger for logger in logging.Logger.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
        saved += [(logger, [], logging.NOTSET, True, False, []) for logger in made if logger not in loggers]
        for logger, handlers, level, propagate, disabled, filters in saved:
            logger.handlers, logger.propagate, logger.disabled, logger.filters = handlers, propagate, disabled, filters
            logger.setLevel(level)
        logging.lastResort = last
        logging.setLogRecordFactory(factory)
        logging.setLoggerClass(klass)
        assert sys.stdout is not out


@contextlib.contextmanager
def request(request_id: str = "order-7", *, sampled: bool = True, trace_id: int = TRACE_ID) -> Iterator[None]:
    """
    Be inside a request with these ids.
    """
    span = NonRecordingSpan(SpanContext(trace_id, SPAN_ID, is_remote=False, trace_flags=TraceFlags(int(sampled))))
    context = trace.set_span_in_context(span, otel_context.Context())
    token = otel_context.attach(identity.set_in(context, identity.Identity(request_id)))
    try:
        yield
    finally:
        otel_context.detach(token)


class Keep(logging.Handler):
    """
    Keeps every record, and every line in the given format.
    """

    def __init__(self, formatter: logging.Formatter | None = None) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.records: list[logging.LogRecord] = []
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.lines.append(self.format(record))
