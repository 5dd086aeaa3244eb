"""
What the five log fields cost: one record that is made, formatted and thrown away, in a request, without and with them.

    python benchmarks/log_fields.py
"""

from __future__ import annotations

import logging
import timeit

from opentelemetry import context, trace
from opentelemetry.sdk.trace import TracerProvider

from otel_correlation import identity, logs
from otel_correlation.settings import Settings

NUMBER = 5_000
REPEAT = 100


class Discard(logging.Handler):
    """
    Formats and forgets.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """
        Format ``record``.
        """
        self.format(record)


def main() -> None:
    """
    Print the best of several runs, in microseconds.
    """
    logger = logging.getLogger("benchmark")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logger.addHandler(Discard())
    span = TracerProvider().get_tracer("benchmark").start_span("request")
    context.attach(identity.set_in(trace.set_span_in_context(span), identity.Identity("order-7")))

    def run() -> float:
        return timeit.timeit(lambda: logger.info("hello %s", 1), number=NUMBER) / NUMBER * 1e6

    without: list[float] = []
    with_fields: list[float] = []
    for _ in range(REPEAT):  # in turns, so that a busy machine disturbs both alike
        without.append(run())
        logs.install(Settings(service_name="benchmark"))
        with_fields.append(run())
        logs.uninstall()
    added = min(with_fields) - min(without)
    print(f"without {min(without):.2f} us, with the fields {min(with_fields):.2f} us, added {added:.2f} us")


if __name__ == "__main__":
    main()
