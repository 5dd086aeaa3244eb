"""
The how-to's two gates with a real nginx: the blocks of the page are its configuration.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.integration.services import BIN
from tests.stack.harness import ROOT, eventually
from tests.stack.servers import Nginx

if TYPE_CHECKING:
    from pathlib import Path

    from tests.stack.harness import Machine

pytestmark = pytest.mark.needs("servers")

TRACE = "0af7651916cd43dd8448eb211c80319c"
QUOTED = "f4a2b3c1-dead-beef-0000-aabbccddeeff"
SENT = {
    "X-Request-ID": QUOTED,
    "traceparent": f"00-{TRACE}-b7ad6b7169203331-01",
    "tracestate": "vendor=theirs",
    "baggage": "tier=gold",
}
APP = """
from fastapi import FastAPI, Request
from otel_correlation import trace_id

app = FastAPI()

@app.get("/seen")
async def seen(request: Request):
    names = ("x-request-id", "traceparent", "tracestate", "baggage")
    return {"trace": trace_id(), **{name: request.headers[name] for name in names if name in request.headers}}
"""
PAGE = (ROOT / "docs/how-to/public-edge.md").read_text()
SERVICE_IS_GATE, PROXY_IS_GATE = re.findall(r"```nginx\n(.*?)```", PAGE, re.DOTALL)


def start(machine: Machine, location: str, *, unix: bool = False, **variables: str) -> str:
    """
    Run a service behind nginx with this location; return the URL of nginx.
    """
    (machine.directory / "main.py").write_text(APP)
    port, front = machine.port(), machine.port()
    socket = machine.directory / "service.sock"
    listen = ["--uds", str(socket)] if unix else ["--host", "127.0.0.1", "--port", str(port)]
    environment = {"OTEL_TRACES_EXPORTER": "none"}
    environment |= {f"OTEL_CORRELATION_{name}": value for name, value in variables.items()}
    command: list[str | Path] = [BIN / "opentelemetry-instrument", BIN / "uvicorn", *listen, "main:app"]
    service = machine.start("service", command, environment, machine.directory)
    config = machine.directory / "nginx.conf"
    config.write_text(f"""
    user root;
    events {{ }}
    http {{
        access_log off;
        upstream service {{ server {f"unix:{socket}" if unix else f"127.0.0.1:{port}"}; }}
        server {{ listen 127.0.0.1:{front}; {location} }}
    }}
    """)
    nginx = Nginx(machine, config, front)
    process = nginx.start()
    url = f"http://127.0.0.1:{front}"

    def answers() -> bool:
        return httpx.get(f"{url}/seen", trust_env=False).status_code == 200

    eventually("the service behind nginx", answers, while_running=[service, process])
    return url


def ask(url: str, *forwarded: str) -> dict[str, str]:
    """
    Return what the application saw.
    """
    headers = [*SENT.items(), *(("X-Forwarded-For", value) for value in forwarded)]
    # Not from the proxy's own address: who calls from there can name itself anybody.
    with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2"), trust_env=False) as client:
        response = client.get(f"{url}/seen", headers=headers)
    assert response.status_code == 200
    seen: dict[str, str] = response.json()
    assert response.headers["x-request-id"] == seen["x-request-id"]
    return seen


@pytest.mark.parametrize("unix", [False, True])
def test_the_service_is_the_gate(machine: Machine, unix: bool) -> None:
    """
    A caller behind nginx is judged by its own address; one that writes another into the header stays who it is.
    """
    proxies = "unix" if unix else "127.0.0.1"
    url = start(
        machine, SERVICE_IS_GATE, unix=unix, EDGE="public", TRUSTED_NETWORKS="10.0.0.0/8", TRUSTED_PROXIES=proxies
    )
    for forwarded in ([], ["10.1.2.3"], ["10.1.2.3, 10.1.2.3"], ["10.1.2.3", "10.1.2.3"]):
        seen = ask(url, *forwarded)
        assert seen.keys() == {"trace", "x-request-id"}
        assert seen["x-request-id"] == seen["trace"] != TRACE


def test_a_trusted_caller_behind_the_proxy(machine: Machine) -> None:
    """
    The same nginx before a caller that is declared: it is continued.
    """
    url = start(machine, SERVICE_IS_GATE, unix=True, TRUSTED_NETWORKS="127.0.0.0/8", TRUSTED_PROXIES="unix")
    assert ask(url) == {"trace": TRACE, **{name.lower(): value for name, value in SENT.items()}}


def test_the_proxy_is_the_gate(machine: Machine) -> None:
    """
    Nginx ends what comes from outside and mints the id; the service continues nginx.
    """
    url = start(machine, PROXY_IS_GATE, EDGE="public", TRUSTED_NETWORKS="127.0.0.1")
    seen = ask(url)
    assert seen.keys() == {"trace", "x-request-id"}
    assert seen["x-request-id"] == seen["trace"] not in (TRACE, QUOTED)
    assert re.fullmatch("[0-9a-f]{32}", seen["trace"])
