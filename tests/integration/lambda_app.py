"""
A function as docs/how-to/lambda.md has it, and a runtime for it: one event a line, an answer a line.
"""

from __future__ import annotations

import json
import logging
import sys
from types import SimpleNamespace
from typing import Any

from fastapi import BackgroundTasks, FastAPI
from mangum import Mangum
from opentelemetry import metrics

from otel_correlation import bootstrap, flush, request_id

app = FastAPI()
bootstrap(app)
log = logging.getLogger("orders")
counter = metrics.get_meter("orders").create_counter("orders")


@app.get("/orders/{number}")
def order(number: int, background: BackgroundTasks) -> dict[str, object]:
    log.warning("order %d", number)
    counter.add(1)
    background.add_task(log.warning, "told the kitchen")
    return {"request_id": request_id()}


asgi = Mangum(app)


def handler(event: Any, context: Any) -> Any:
    try:
        return asgi(event, context)
    finally:
        flush(2)


if __name__ == "__main__":
    for line in sys.stdin:
        context = SimpleNamespace(function_name="orders", aws_request_id="7", get_remaining_time_in_millis=lambda: 9000)
        print("ANSWER", json.dumps(handler(json.loads(line), context)), flush=True)
