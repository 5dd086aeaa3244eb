"""
What the ids cost on one line that is made, formatted and thrown away, in a request: without and with them.

    python benchmarks/log_fields.py

logging always; structlog (JSON, own renderer) and loguru (one sink, one format) where they are installed.
"""

from __future__ import annotations

import logging
import timeit
from typing import TYPE_CHECKING

from opentelemetry import context, trace
from opentelemetry.sdk.trace import TracerProvider

from otel_correlation import identity, logs
from otel_correlation.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

NUMBER = 5_000
REPEAT = 60


class Discard(logging.Handler):
    """
    Formats and forgets.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """
        Format ``record``.
        """
        self.format(record)


def with_logging() -> Callable[[], object]:
    logger = logging.getLogger("benchmark")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logger.addHandler(Discard())
    return lambda: logger.info("hello %s", 1)


def with_structlog() -> Callable[[], object]:
    import structlog

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.ReturnLoggerFactory(),
        cache_logger_on_first_use=True,
    )
    logger = structlog.get_logger()
    return lambda: logger.info("hello", number=1)


def with_loguru() -> Callable[[], object]:
    from loguru import logger

    logger.remove()
    logger.add(lambda _: None, format="{time} {level} {message}")
    return lambda: logger.info("hello {}", 1)


def main() -> None:
    """
    Print the best of several runs of each, in microseconds.
    """
    span = TracerProvider().get_tracer("benchmark").start_span("request")
    context.attach(identity.set_in(trace.set_span_in_context(span), identity.Identity("order-7")))
    for name, build in (("logging", with_logging), ("structlog", with_structlog), ("loguru", with_loguru)):
        try:
            log = build()
        except ModuleNotFoundError:
            print(f"{name}: not installed")
            continue
        without: list[float] = []
        with_fields: list[float] = []
        for _ in range(REPEAT):  # in turns, so that a busy machine disturbs both alike
            without.append(timeit.timeit(log, number=NUMBER) / NUMBER * 1e6)
            logs.install(Settings(service_name="benchmark"))
            with_fields.append(timeit.timeit(log, number=NUMBER) / NUMBER * 1e6)
            logs.uninstall()
        added = min(with_fields) - min(without)
        print(f"{name}: without {min(without):.2f} us, with the ids {min(with_fields):.2f} us, added {added:.2f} us")


if __name__ == "__main__":
    main()
