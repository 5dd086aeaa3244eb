"""
``otel-correlation demo``: three services, real requests, and the one that fails as ``find`` shows it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import httpx

from otel_correlation.cli import FAILED, OK, CommandError, on_signals
from otel_correlation.cli.find import tell
from otel_correlation.cli.launch import environment, instrumented
from otel_correlation.cli.serve import open_server
from otel_correlation.cli.terminal import Screen, safe
from otel_correlation.request_id import to_trace_id
from otel_correlation.stores import cause, entry
from otel_correlation.stores.embedded import EmbeddedStore

if TYPE_CHECKING:
    import argparse
    from collections.abc import Generator, Iterator

    from otel_correlation.stores import Trace

HOST: Final = "127.0.0.1"
# A service is started after the one that it calls.
SERVICES: Final = ("inventory", "orders", "gateway")
FAILING_ID: Final = "order-7781-customer-quote"
START_S: Final = 40.0
ARRIVE_S: Final = 15.0
STOP_S: Final = 5.0
_POLL_S: Final = 0.05
_SERVER_SPANS: Final = 3
_CLIENT_SPANS: Final = 2
_ATTEMPTS: Final = 3
_NOT_OURS: Final = ("OTEL_", "FASTAPI_OTEL_", "UVICORN_", "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS")
_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _PortTakenError(Exception):
    """
    A port that was free a moment ago is not any more.
    """


@dataclass(frozen=True, slots=True)
class Sent:
    """
    One request of the demo and what came back.
    """

    wanted: str
    status: int
    request_id: str
    expected_status: int


def run(arguments: argparse.Namespace) -> int:
    """
    Show the product on three real services; return 0 only if everything that was shown is really there.
    """
    shop = shop_directory()
    screen = Screen()
    with open_server(HOST, arguments.port) as server:
        screen.line(("1  The viewer and OTLP receiver", "bold"), f"  {server.url}")
        with _services(screen, shop, server.url, arguments.port) as gateway:
            screen.line()
            screen.line(("3  Four requests", "bold"), f"  POST {gateway}/checkout")
            sent = [_send(screen, gateway, *request) for request in _requests()]
            if wrong := [text for one in sent for text in _wrong(one)]:
                raise CommandError("; ".join(wrong), FAILED)
            store = EmbeddedStore(server.url)
            traces, missing = _arrived(store, sent)
            screen.line()
            screen.line(("4  The one that failed", "bold"), f"  otel-correlation find {FAILING_ID}")
            screen.line()
            if failing := traces.get(FAILING_ID):
                tell(screen, FAILING_ID, [failing], [store], [])
            if missing:
                for text in missing:
                    print(f"otel-correlation: {text}", file=sys.stderr)
                return FAILED
            screen.line()
            screen.line(("Your own application:", "bold"), "  otel-correlation run -- uvicorn main:app")
            screen.line(f"                       curl -i -H 'X-Request-ID: {FAILING_ID}' http://127.0.0.1:8000/...")
            screen.line(f"                       otel-correlation find {FAILING_ID}")
            if arguments.keep:
                with contextlib.suppress(KeyboardInterrupt):
                    screen.line()
                    screen.line(("The page:", "bold"), f"  {server.url}  (Ctrl-C ends the demo)")
                    server.wait()
    return OK


def shop_directory() -> Path:
    """
    Return where the example services are: in the wheel beside this package, in a checkout under ``examples``.
    """
    package = Path(__file__).resolve().parents[1]
    for shop in (package / "_shop", package.parent / "examples" / "shop"):
        if (shop / "gateway.py").is_file():
            return shop
    raise CommandError("the demo's services (examples/shop) are not here: run `make demo` in a checkout")


def _requests() -> Iterator[tuple[str, str | None, str, int]]:
    yield "a caller's id", "shop-app-1.4/checkout/000173", "lamp", 201
    yield "a UUID", str(uuid.uuid4()), "desk", 201
    yield "no id", None, "lamp", 201
    yield "a customer's id", FAILING_ID, "chair-2027", 502


@contextlib.contextmanager
def _services(screen: Screen, shop: Path, endpoint: str, port: int) -> Generator[str]:
    """
    Run the three services; yield the gateway's URL. No process is left, whatever happens.
    """
    with tempfile.TemporaryDirectory(prefix="otel-correlation-") as logs:
        for attempt in range(1, _ATTEMPTS + 1):
            processes: dict[str, subprocess.Popen[bytes]] = {}
            try:
                ports = {name: _port(port and port + 1 + offset) for offset, name in enumerate(reversed(SERVICES))}
                try:
                    for name in SERVICES:
                        with _signals_later():
                            processes[name] = _start(name, shop, endpoint, ports, Path(logs, name))
                    _wait_until_ready(processes, ports, Path(logs))
                except _PortTakenError as error:
                    if port or attempt == _ATTEMPTS:
                        raise CommandError(f"{error}: name another with --port", FAILED) from error
                    continue
                screen.line()
                screen.line(("2  Three services without a line of telemetry code", "bold"), f"  {shop}")
                for name in reversed(SERVICES):
                    screen.line(f"   opentelemetry-instrument uvicorn {name}:app --port {ports[name]}")
                yield f"http://{HOST}:{ports['gateway']}"
                return
            finally:
                try:
                    _stop(processes)
                finally:
                    # A signal may have come before the first call was ready for one.
                    _stop(processes)


def _port(wanted: int) -> int:
    """
    Return ``wanted`` if it can be had, or any free port for 0.
    """
    try:
        with socket.create_server((HOST, wanted)) as listener:
            port: int = listener.getsockname()[1]
            return port
    except (OSError, OverflowError) as error:
        raise CommandError(
            f"cannot listen on {HOST} port {wanted} ({getattr(error, 'strerror', error)}): name another with --port"
        ) from error


def _start(name: str, shop: Path, endpoint: str, ports: dict[str, int], log: Path) -> subprocess.Popen[bytes]:
    # Nothing of this shell's own settings: the demo shows the defaults, and checks that every trace is there.
    base = {key: value for key, value in os.environ.items() if not key.startswith(_NOT_OURS)}
    env = environment(base, endpoint) | {
        "OTEL_SERVICE_NAME": name,
        "ORDERS_URL": f"http://{HOST}:{ports['orders']}",
        "INVENTORY_URL": f"http://{HOST}:{ports['inventory']}",
    }
    command = [sys.executable, "-m", "uvicorn", f"{name}:app", "--host", HOST, "--port", str(ports[name])]
    with log.open("wb") as output:
        # A session of its own: Ctrl-C is for the demo, which then stops each service once.
        return subprocess.Popen(  # noqa: S603 - our own interpreter and example
            instrumented(command),
            cwd=shop,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait_until_ready(processes: dict[str, subprocess.Popen[bytes]], ports: dict[str, int], logs: Path) -> None:
    deadline = time.monotonic() + START_S
    for name, process in processes.items():
        # Somebody else may listen on the port: then the service ends.
        while not _listens(ports[name]) or process.poll() is not None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise _not_started(name, process.poll(), Path(logs, name).read_text(errors="replace"))
            time.sleep(_POLL_S)


def _not_started(name: str, status: int | None, output: str) -> Exception:
    if "address already in use" in output.lower():
        return _PortTakenError(f"the port of {name} was taken by another program")
    why = "did not start in time" if status is None else f"ended with status {status}"
    last = "\n".join(map(safe, output.splitlines()[-15:]))
    return CommandError(f"the service {name} {why}; its last lines:\n{last}", FAILED)


def _listens(port: int) -> bool:
    # A connection, not a request: a request would be a trace.
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0


@contextlib.contextmanager
def _signals_later() -> Generator[None]:
    """
    Let a signal wait for the end of the block: one inside Popen would lose the process that was just started.
    """
    came: list[int] = []
    with on_signals(_ENDING, lambda number, _frame: came.append(number)):
        yield
    for number in came:
        signal.raise_signal(number)


def _stop(processes: dict[str, subprocess.Popen[bytes]]) -> None:
    """
    End every process: gracefully, then for certain; an impatient second Ctrl-C must not leave one behind.
    """
    with on_signals(_ENDING, signal.SIG_IGN):
        for process in processes.values():
            process.terminate()
        deadline = time.monotonic() + STOP_S
        for process in processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _send(screen: Screen, gateway: str, label: str, request_id: str | None, sku: str, expected: int) -> Sent:
    headers = {} if request_id is None else {"X-Request-ID": request_id}
    try:
        response = httpx.post(f"{gateway}/checkout", json={"sku": sku}, headers=headers, timeout=20, trust_env=False)
    except httpx.HTTPError as error:
        raise CommandError(f"the gateway did not answer ({error or type(error).__name__})", FAILED) from error
    returned = response.headers.get("X-Request-ID", "")
    bad = response.status_code != expected
    screen.line(
        f"   {label:<16} {sku:<11} → ",
        (str(response.status_code), "bold red" if response.is_error else "green"),
        f"  X-Request-ID: {returned or '(none)'}",
        f"  (expected {expected})" if bad else "",
    )
    return Sent(request_id or "", response.status_code, returned, expected)


def _arrived(store: EmbeddedStore, sent: list[Sent]) -> tuple[dict[str, Trace], list[str]]:
    """
    Wait until every request's trace and log lines are in the store; return them by request id, and what is missing.
    """
    deadline = time.monotonic() + ARRIVE_S
    while True:
        traces: dict[str, Trace] = {}
        missing: list[str] = []
        for one in sent:
            found = store.find(one.request_id)
            if found:
                traces[one.request_id] = found[0]
            missing.extend(_missing(one, found))
        if not missing or time.monotonic() > deadline:
            return traces, missing
        time.sleep(_POLL_S)


def _wrong(sent: Sent) -> Iterator[str]:
    name = sent.wanted or "the request without an id"
    if sent.status != sent.expected_status:
        yield f"{name}: status {sent.status} came back, not {sent.expected_status}"
    if not sent.request_id or (sent.wanted and sent.request_id != sent.wanted):
        yield f"{name}: the response carries the X-Request-ID {sent.request_id!r}"


def _missing(sent: Sent, found: list[Trace]) -> Iterator[str]:
    name = sent.request_id
    if len(found) != 1:
        yield f"{name}: {len(found)} traces are in the store after {ARRIVE_S:.0f} s, not 1"
        return
    trace = found[0]
    kinds = [span.kind for span in trace.spans]
    if (kinds.count("SERVER"), kinds.count("CLIENT")) != (_SERVER_SPANS, _CLIENT_SPANS):
        yield (
            f"{name}: {kinds.count('SERVER')} SERVER and {kinds.count('CLIENT')} CLIENT spans arrived, "
            f"not {_SERVER_SPANS} and {_CLIENT_SPANS}"
        )
    if trace.trace_id != f"{to_trace_id(sent.request_id):032x}":
        yield f"{name}: its trace id is {trace.trace_id}, not the one that the request id leads to"
    silent = set(SERVICES) - {line.service for line in trace.logs}
    if silent:
        yield f"{name}: no log line of {', '.join(sorted(silent))} arrived"
    if any(part.request_id != sent.request_id for part in trace.parts):
        yield f"{name}: a span or log line does not carry the request id"
    begin, why = entry(trace), cause(trace)
    if sent.request_id == FAILING_ID and (
        begin is None or why is None or why.service != "inventory" or "inventory.py" not in why.place
    ):
        yield f"{name}: the cause in inventory.py was not found"
