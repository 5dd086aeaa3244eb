"""
A service that numbers every span: ``python -m tests.stack.numbered SPANS_PER_S``, with the SDK and the environment of a service.

Each trace is one SERVER span and three below it; each span has the attribute ``number``. Every 100 ms it prints one line of
JSON: how many spans there were (``made``), and every counter of ``otel_correlation.stats()``. SIGTERM ends it: what is left is
delivered as at any service's exit, and the last line is printed after that.
"""

from __future__ import annotations

import itertools
import json
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

import otel_correlation
from tests.stack.harness import get

if TYPE_CHECKING:
    from tests.stack.harness import Machine, Process

SPANS: Final = 4  # Of one trace.
TICK_S: Final = 0.1
NUMBER: Final = "number"


@dataclass(slots=True)
class Numbered:
    """
    That service, started for a test.
    """

    process: Process

    @classmethod
    def start(cls, machine: Machine, spans_per_s: int, environment: dict[str, str]) -> Numbered:
        """
        Start it; it sends where the environment says.
        """
        command = [sys.executable, "-m", "tests.stack.numbered", str(spans_per_s)]
        return cls(machine.start("numbered", command, environment))

    def counters(self) -> dict[str, int]:
        """
        Return its latest line; of one that is not there yet, nothing.
        """
        lines = [
            line for line in self.process.log.read_text().splitlines() if line.startswith("{") and line.endswith("}")
        ]
        return json.loads(lines[-1]) if lines else {}

    def exported(self) -> int:
        """
        Return how many spans the agent has taken.
        """
        return self.counters().get("spans.exported", 0)

    def dropped(self) -> int:
        """
        Return how many spans it has dropped, for whatever reason.
        """
        return sum(count for name, count in self.counters().items() if name.startswith("spans.dropped."))

    def stop(self) -> dict[str, int]:
        """
        End it as a supervisor does, and return its last line.
        """
        assert self.process.stop() == 0
        return self.counters()


def stored(query: str, service: str, limit: int = 100_000) -> Counter[int]:
    """
    Return how often the Jaeger at ``query`` has each numbered span of the service.
    """
    answer = get(f"http://{query}/api/traces", parameters={"service": service, "limit": str(limit)}).raise_for_status()
    tags = (tag for trace in answer.json()["data"] for span in trace["spans"] for tag in span["tags"])
    return Counter(tag["value"] for tag in tags if tag["key"] == NUMBER)


def main(spans_per_s: int) -> None:
    """
    Make spans at an even rate until SIGTERM.
    """
    otel_correlation.bootstrap()
    tracer = trace.get_tracer("numbered")
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    numbers = itertools.count()
    made, due = 0, time.monotonic()
    while not ended.wait(max(0.0, due - time.monotonic())):
        due += TICK_S
        for _ in range(round(spans_per_s * TICK_S / SPANS)):
            with tracer.start_as_current_span(
                "GET /numbered", kind=trace.SpanKind.SERVER, attributes={NUMBER: next(numbers)}
            ):
                for _ in range(SPANS - 1):
                    tracer.start_span("step", attributes={NUMBER: next(numbers)}).end()
            made += SPANS
        print(json.dumps({"made": made, **otel_correlation.stats()}), flush=True)
    provider = trace.get_tracer_provider()
    assert isinstance(provider, TracerProvider)
    provider.shutdown()
    print(json.dumps({"made": made, **otel_correlation.stats()}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
