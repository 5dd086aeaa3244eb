"""
One application and one set of requests, under stock, FastAPI's own telemetry, or ours; prints what came of it as JSON.

    python migration_traffic.py stock|native|ours
"""

from __future__ import annotations

import http.client
import json
import logging
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

VARIANT = sys.argv[1]
PATHS = ("/items/3?q=x", "/mail", "/sub/items/3", "/boom", "/items/none")

reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader], resource=Resource({})))
memory = InMemorySpanExporter()
if VARIANT == "ours":
    import otel_correlation

    otel_correlation.bootstrap(traces_exporters=())
else:
    trace.set_tracer_provider(TracerProvider(shutdown_on_exit=False))
trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(memory))  # type: ignore[attr-defined]
if VARIANT == "stock":
    # As opentelemetry-instrument does it: before anything of FastAPI is imported by name.
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
    from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor

    FastAPIInstrumentor().instrument()
    HTTPXClientInstrumentor().instrument()

import fastapi  # noqa: E402
import httpx  # noqa: E402
import uvicorn  # noqa: E402
from websockets.sync.client import connect  # noqa: E402


class Upstream(BaseHTTPRequestHandler):
    """
    What the application calls.
    """

    def do_GET(self) -> None:
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        return


upstream = HTTPServer(("127.0.0.1", 0), Upstream)
threading.Thread(target=upstream.serve_forever, daemon=True).start()
app = fastapi.FastAPI()
sub = fastapi.FastAPI()
log = logging.getLogger("shop")
records: list[dict[str, Any]] = []


class Keep(logging.Handler):
    """
    Keeps what is on the records.
    """

    def emit(self, record: logging.LogRecord) -> None:
        records.append(dict(record.__dict__))


log.addHandler(Keep())


def send_mail() -> None:
    pass


@app.get("/items/{item_id}")
def item(item_id: int) -> dict[str, int]:
    log.warning("looked up")
    httpx.get(f"http://127.0.0.1:{upstream.server_port}/stock?sku=lamp")
    return {"item": item_id}


@app.get("/mail")
def mail(tasks: fastapi.BackgroundTasks) -> dict[str, str]:
    tasks.add_task(send_mail)
    return {}


@app.get("/boom")
def boom() -> None:
    raise ValueError("boom")


@app.websocket("/ws")
async def websocket(socket: fastapi.WebSocket) -> None:
    await socket.accept()
    await socket.send_text(await socket.receive_text())
    await socket.close()


@sub.get("/items/{item_id}")
def sub_item(item_id: int) -> dict[str, int]:
    return {"item": item_id}


app.mount("/sub", sub)
server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
serving = threading.Thread(target=server.run)
serving.start()
while not server.started:
    time.sleep(0.01)
port: int = server.servers[0].sockets[0].getsockname()[1]

client_ports: set[int] = set()
responses = {}
for path in PATHS:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.connect()
    client_ports.add(connection.sock.getsockname()[1])
    connection.request("GET", path, body=b"{}", headers={"User-Agent": "probe/1", "X-Tenant": "acme"})
    response = connection.getresponse()
    response.read()
    responses[path] = {"status": response.status, "request_id": response.headers.get("x-request-id")}
    connection.close()
with connect(f"ws://127.0.0.1:{port}/ws") as socket:
    client_ports.add(socket.local_address[1])
    socket.send("hello")
    socket.recv()
server.should_exit = True
serving.join()  # Everything that belongs to the requests is over now.


def shown(value: object) -> object:
    """
    Return an attribute's value with the ports of this run by name, so that runs can be compared.
    """
    names = {port: "<port>", upstream.server_port: "<upstream port>"} | dict.fromkeys(client_ports, "<client port>")
    if isinstance(value, str):
        for number, name in names.items():
            value = value.replace(f":{number}", f":{name}")
        return value
    if isinstance(value, tuple):
        return [shown(entry) for entry in value]
    return names.get(value, value) if type(value) is int else value


def described(span: ReadableSpan) -> dict[str, Any]:
    """
    Return what the pages tell of a span.
    """
    entry: dict[str, Any] = {
        "name": span.name,
        "kind": span.kind.name,
        "scope": span.instrumentation_scope.name if span.instrumentation_scope else "",
        "attributes": {name: shown(value) for name, value in (span.attributes or {}).items()},
        "events": [event.name for event in span.events],
    }
    if VARIANT == "ours":
        from otel_correlation.export import with_old_names

        both = with_old_names(span).attributes or {}
        entry["with_old_names"] = {name: shown(value) for name, value in both.items()}
    return entry


# No request carried an id, so each has a trace of its own; they came one after the other.
finished = memory.get_finished_spans()
roots = sorted((span for span in finished if span.kind.name == "SERVER"), key=lambda span: span.start_time or 0)
spans = {
    path: [described(span) for span in finished if span.context.trace_id == root.context.trace_id]
    for path, root in zip((*PATHS, "/ws"), roots, strict=True)
}
data = reader.get_metrics_data()
units = {
    metric.name: metric.unit
    for resource in (data.resource_metrics if data else ())
    for scope in resource.scope_metrics
    for metric in scope.metrics
}
print(json.dumps({"spans": spans, "metrics": units, "responses": responses, "record": records[0]}, default=str))
