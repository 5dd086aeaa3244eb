"""
``otel-correlation serve``, ``run`` and ``doctor`` as processes: what they print, pass on and leave behind.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import httpx
import pytest

from otel_correlation.local import LocalServer, LocalStore
from tests.integration.services import clean_environment, free_port

if TYPE_CHECKING:
    from pathlib import Path

MAIN = [sys.executable, "-c", "from otel_correlation.cli import main; raise SystemExit(main())"]
DEADLINE_S = 60


def call(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MAIN, *arguments],
        env=clean_environment(**variables),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*MAIN, *arguments],
        env=clean_environment(**variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_serve_serves_until_it_is_told_to_end(number: signal.Signals, tmp_path: Path) -> None:
    """
    It says where it is and what to do next; Ctrl-C, kill and a closed terminal end it with status 0.
    """
    with start("serve", "--port", "0", "--db", str(tmp_path / "spans.db")) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            url = next(word for word in first.split() if word.startswith("http://"))
            assert httpx.get(f"{url}/healthz", trust_env=False).json()["service"] == "otel-correlation"
        finally:
            process.send_signal(number)
        # Not communicate(): it would miss what readline() has buffered.
        out = process.stdout.read()
        _, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, err) == (0, "")
    assert "OTEL_EXPORTER_OTLP_ENDPOINT=" + url in out
    assert f"OTEL_CORRELATION_STORES={url} otel-correlation find" in out
    assert (tmp_path / "spans.db").exists()


def test_serve_warns_when_others_can_read() -> None:
    """
    Bound beyond loopback, it says so on stderr.
    """
    with start("serve", "--host", "0.0.0.0", "--port", "0") as process:
        assert process.stderr is not None
        assert "0.0.0.0 can be reached from other machines" in process.stderr.readline()
        process.terminate()


def test_serve_answers_under_the_names_that_it_was_given() -> None:
    """
    On every interface, too, another name gets nothing; ``--allow-host`` gives one, as often as it is needed.
    """
    arguments = ("--host", "0.0.0.0", "--port", "0", "--allow-host", "viewer", "--allow-host", "lab.example")
    with start("serve", *arguments) as process:
        assert process.stdout is not None
        url = next(word for word in process.stdout.readline().split() if word.startswith("http://"))
        try:
            with httpx.Client(base_url=url, trust_env=False) as client:
                names = ("viewer:4318", "lab.example", "127.0.0.1", "192.0.2.1:80", "localhost", "evil.example")
                statuses = [client.get("/api/traces", headers={"host": name}).status_code for name in names]
        finally:
            process.terminate()
    assert statuses == [200, 200, 200, 200, 200, 421]


@pytest.mark.parametrize("command", [("serve",), ("demo",)])
def test_a_port_in_use_is_one_line(command: tuple[str, ...]) -> None:
    """
    No traceback: the address, the reason, and what to do, with a status that is not 0.
    """
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = call(*command, "--port", port)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"port {port}" in done.stderr
    assert "--port" in done.stderr


def test_a_file_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    """
    The database's own words and the file's name, with status 2.
    """
    for command in (("serve", "--db", str(tmp_path)), ("run", "--db", str(tmp_path), "--port", "0", "--", "true")):
        done = call(*command)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert str(tmp_path) in done.stderr


def test_run_sends_the_commands_telemetry_to_the_viewer() -> None:
    """
    The command runs under opentelemetry-instrument with both signals sent here, whatever receiver the shell had named.
    """
    script = """
import json, os, sys, urllib.request
url = os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"]
from opentelemetry import trace
with urllib.request.urlopen(url + "/healthz") as response:
    health = json.load(response)
print(json.dumps({"provider": type(trace.get_tracer_provider()).__module__, "health": health["service"],
                  "env": {k: v for k, v in os.environ.items() if k.startswith("OTEL_")}}))
sys.exit(7)
"""
    done = call(
        *("run", "--port", "0", "--", sys.executable, "-c", script),
        OTEL_EXPORTER_OTLP_ENDPOINT="https://prod.example:4318",
        OTEL_EXPORTER_OTLP_TRACES_ENDPOINT="https://prod.example:4318/v1/traces",
        OTEL_EXPORTER_OTLP_HEADERS="authorization=secret",
        OTEL_EXPORTER_OTLP_PROTOCOL="grpc",
        OTEL_TRACES_SAMPLER_ARG="0.5",
        HTTP_PROXY="http://127.0.0.1:9",
    )
    assert done.returncode == 7, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["provider"].startswith("opentelemetry.sdk")
    assert told["health"] == "otel-correlation"
    env = told["env"]
    assert env["OTEL_EXPORTER_OTLP_ENDPOINT"] in done.stderr
    assert (env["OTEL_TRACES_EXPORTER"], env["OTEL_LOGS_EXPORTER"]) == ("otlp", "otlp")
    assert env["OTEL_EXPORTER_OTLP_PROTOCOL"] == "http/protobuf"
    assert env["OTEL_TRACES_SAMPLER_ARG"] == "0.5"
    assert not {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_HEADERS"} & set(env)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_run_passes_signals_on(number: signal.Signals) -> None:
    """
    The command gets the signal once and its own status comes back.
    """
    script = f"""
import signal, sys
signal.signal({int(number)}, lambda *_: sys.exit(40))
print("ready", flush=True)
while True:
    signal.pause()
"""
    with start("run", "--port", "0", "--", sys.executable, "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 40


def test_ctrl_c_on_a_terminal_reaches_the_command_once() -> None:
    """
    A terminal sends Ctrl-C to the command itself; passed on as well, it would end uvicorn without its graceful stop.
    """
    script = """
import signal, sys
count = 0
def again(*_):
    global count
    count += 1
signal.signal(signal.SIGINT, again)
print("ready", flush=True)
while not count:
    signal.pause()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
second = signal.sigtimedwait([signal.SIGINT], 1)
sys.exit(50 + count + (second is not None))
"""
    terminal = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    command = [*MAIN, "run", "--port", "0", "--", sys.executable, "-c", script]
    with subprocess.Popen(
        [sys.executable, "-c", terminal, *command],
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        while b"ready" not in (line := process.stdout.readline()):
            assert line
        process.stdin.write(b"\x03")
        process.stdin.flush()
        assert process.wait(DEADLINE_S) == 51


def test_run_tells_of_a_signal_as_a_shell_does() -> None:
    """
    A command that a signal ended gives 128 and its number.
    """
    script = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert call("run", "--port", "0", "--", sys.executable, "-c", script).returncode == 128 + signal.SIGKILL


def test_run_uses_what_already_listens() -> None:
    """
    With a viewer on the port the command sends there; with another program there, too, and it says which it is.
    """

    def talk(listener: socket.socket) -> None:
        with listener.accept()[0] as connection:
            connection.sendall(b"220 no HTTP here\r\n")

    with LocalServer(port=0) as local:
        done = call("run", "--port", str(local.port), "--", "true")
        assert (done.returncode, "a viewer that already runs" in done.stderr) == (0, True)
    with socket.create_server(("127.0.0.1", 0)) as other:
        talker = threading.Thread(target=talk, args=(other,))
        talker.start()
        done = call("run", "--port", str(other.getsockname()[1]), "--", "true")
        talker.join()
        assert (done.returncode, "something else" in done.stderr) == (0, True)


def test_run_without_a_command_or_with_an_unknown_one() -> None:
    """
    One line each: an example of use with status 2, and a shell's status 127.
    """
    for arguments, status in (
        (("run",), 2),
        (("run", "--"), 2),
        (("run", "--port", "0", "--", "no-such-program"), 127),
    ):
        done = call(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (status, 1), done.stderr


def test_the_viewer_does_not_trace_itself(tmp_path: Path) -> None:
    """
    Started under opentelemetry-instrument and told to export to itself, it answers requests and its store stays empty.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_LOGS_EXPORTER": "otlp", "OTEL_BSP_SCHEDULE_DELAY": "10"}
    instrument = "from opentelemetry.instrumentation.auto_instrumentation import run; run()"
    # Exporter and viewer flush before they end, into one file that is read afterwards.
    path = str(tmp_path / "spans.db")
    command = [sys.executable, "-c", instrument, *MAIN, "serve", "--port", str(port), "--db", path]
    with subprocess.Popen(command, env=clean_environment(**variables), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            while url not in process.stdout.readline():
                pass
            with httpx.Client(base_url=url, trust_env=False) as client:
                for asked in ("/", "/api/traces", "/nothing", f"/api/find/{'a' * 32}"):
                    assert client.get(asked).status_code in (200, 404)
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    store = LocalStore(path)
    assert store.recent().result() == []
    store.close()
