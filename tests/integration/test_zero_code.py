"""
The product as a team starts it: one provider, one SERVER span a request, one export, however it is started.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import Service, clean_environment

if TYPE_CHECKING:
    from pathlib import Path

APP = """
import logging
from fastapi import FastAPI

log = logging.getLogger("shop")
app = FastAPI()

@app.get("/items/{item_id}")
async def item(item_id: int) -> dict[str, int]:
    log.info("looking up %s", item_id)
    return {"item": item_id}
"""

IN_CODE = APP.replace("app = FastAPI()", "import otel_correlation\napp = FastAPI()\notel_correlation.bootstrap(app)")
CONTRIB_TOO = (
    APP
    + """
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
import otel_correlation
FastAPIInstrumentor.instrument_app(app)
HTTPXClientInstrumentor().instrument()
otel_correlation.bootstrap(app)
otel_correlation.bootstrap()
"""
)
BY_HAND = (
    APP
    + """
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
app.add_middleware(OpenTelemetryMiddleware)
"""
)

STARLETTE = """
import logging
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

log = logging.getLogger("shop")

async def item(request):
    log.info("looking up %s", request.path_params["item_id"])
    return JSONResponse({})

app = Starlette(routes=[Route("/items/{item_id}", item)])
"""
STARLETTE_IN_CODE = STARLETTE.replace("app = S", "import otel_correlation\notel_correlation.bootstrap()\napp = S")
STARLETTE_BY_HAND = (
    STARLETTE
    + """
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
app.add_middleware(OpenTelemetryMiddleware)
"""
)
BEHIND_STARLETTE = (
    APP
    + """
from starlette.applications import Starlette
from starlette.routing import Mount
app = Starlette(routes=[Mount("/", app=app)])
"""
)

ZERO = "opentelemetry-instrument"
UVICORN = ("uvicorn", "main:app", "--port", "{port}")
GUNICORN = ("gunicorn", "main:app", "--bind", "127.0.0.1:{port}", "-k", "uvicorn_worker.UvicornWorker")

STARTS = {
    "uvicorn": (APP, (ZERO, *UVICORN)),
    "workers": (APP, (ZERO, *UVICORN, "--workers", "2")),
    "reload": (APP, (ZERO, *UVICORN, "--reload")),
    "python-m": (APP, (ZERO, sys.executable, "-m", *UVICORN)),
    "gunicorn": (APP, (ZERO, *GUNICORN, "-w", "2")),
    "preload": (APP, (ZERO, *GUNICORN, "-w", "2", "--preload")),
    "in-code": (IN_CODE, UVICORN),
    "in-code-preload": (IN_CODE, (*GUNICORN, "-w", "2", "--preload")),
    "both": (IN_CODE, (ZERO, *UVICORN)),
    "contrib-too": (CONTRIB_TOO, UVICORN),
    "contrib-too-zero": (CONTRIB_TOO, (ZERO, *UVICORN)),
    "by-hand": (BY_HAND, (ZERO, *UVICORN)),
    "starlette": (STARLETTE, (ZERO, *UVICORN)),
    "starlette-workers": (STARLETTE, (ZERO, *UVICORN, "--workers", "2")),
    "starlette-preload": (STARLETTE, (ZERO, *GUNICORN, "-w", "2", "--preload")),
    "starlette-in-code": (STARLETTE_IN_CODE, UVICORN),
    "starlette-by-hand": (STARLETTE_BY_HAND, (ZERO, *UVICORN)),
    "behind-starlette": (BEHIND_STARLETTE, (ZERO, *UVICORN)),
}


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_one_span_a_request_however_it_starts(start: str, tmp_path: Path) -> None:
    """
    Each request has exactly one SERVER span, exported once, under the id that its response and its log line carry.
    """
    source, command = STARTS[start]
    (tmp_path / "main.py").write_text(source)
    with OtlpSink() as sink:
        environment = clean_environment(
            OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint, OTEL_SERVICE_NAME="shop", FASTAPI_OTEL_AUTO_CONFIGURE="true"
        )
        with Service(command, tmp_path, environment, ready="/ready") as service:
            with httpx.Client(base_url=service.url) as client:
                ids = [client.get(f"/items/{number}").headers["x-request-id"] for number in range(10)]
            service.stop()
            output = service.stdout()
        spans = [span for span in sink.spans if span.kind == "SERVER" and span.attributes["url.path"] != "/ready"]
    assert sorted(span.trace_id for span in spans) == sorted(ids)
    assert {span.name for span in spans} == {"GET /items/{item_id}"}
    assert {span.attributes["request_id"] for span in spans} == set(ids)
    assert len({span.span_id for span in sink.spans}) == len(sink.spans), "a span came twice"
    assert not [span for span in sink.spans if span.kind != "SERVER"], "no internal spans by default"
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    looked_up = [line for line in lines if line["logger"] == "shop"]
    assert sorted(line["request_id"] for line in looked_up) == sorted(ids)
    assert all(line["trace_id"] == line["request_id"] for line in looked_up)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["OTEL_PYTHON_FASTAPI_EXCLUDED_URLS", "OTEL_PYTHON_EXCLUDED_URLS"])
def test_a_pattern_that_is_no_pattern_leaves_the_identity_on(name: str, tmp_path: Path) -> None:
    """
    An excluded URL that does not compile is left out with a line, never a traceback, and requests keep their ids.
    """
    (tmp_path / "main.py").write_text(APP)
    environment = clean_environment(OTEL_TRACES_EXPORTER="none", **{name: "(,ready"})
    with Service(STARTS["uvicorn"][1], tmp_path, environment, ready="/ready") as service:
        assert httpx.get(service.url + "/items/1").headers["x-request-id"]
        service.stop()
        output = service.output()
    assert "Traceback" not in output
    assert "'(' is not a regular expression" in output
