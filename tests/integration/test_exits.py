"""
No end of a process loses what is buffered: every set-up, every signal, with the exit code that it has without us.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.integration.otlp_sink import Answer, OtlpSink
from tests.integration.services import BIN, Service, clean_environment, free_port

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

APP = """
import logging
from fastapi import FastAPI

app = FastAPI()

@app.get("/items/{item_id}")
async def item(item_id: int) -> dict[str, int]:
    logging.getLogger("shop").warning("item %s", item_id)
    return {"item": item_id}

if __name__ == "__main__":
    import sys
    import uvicorn
    uvicorn.run(app, port=int(sys.argv[1]))
"""

ZERO = "opentelemetry-instrument"
UVICORN = ("uvicorn", "main:app", "--port", "{port}")
GUNICORN = ("gunicorn", "main:app", "--bind", "127.0.0.1:{port}", "-k", "uvicorn_worker.UvicornWorker")
STARTS = {
    "uvicorn": (*UVICORN,),
    "uvicorn-workers": (*UVICORN, "--workers", "2"),
    "uvicorn-reload": (*UVICORN, "--reload"),
    "python-m-uvicorn": (sys.executable, "-m", *UVICORN),
    "uvicorn-run": (sys.executable, "main.py", "{port}"),
    "gunicorn": (*GUNICORN, "-w", "2"),
    "gunicorn-preload": (*GUNICORN, "-w", "2", "--preload"),
}
# What these commands end with without us; a negative one is the signal that ended the process (143 to a shell).
CODES = {
    ("uvicorn", signal.SIGTERM): -signal.SIGTERM,
    ("python-m-uvicorn", signal.SIGTERM): -signal.SIGTERM,
    ("uvicorn-run", signal.SIGTERM): -signal.SIGTERM,
}


def buffering(sink: OtlpSink, **variables: str) -> dict[str, str]:
    """
    Return an environment in which nothing leaves but by a flush.
    """
    return clean_environment(
        OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint,
        OTEL_SERVICE_NAME="shop",
        OTEL_LOGS_EXPORTER="otlp",
        OTEL_BSP_SCHEDULE_DELAY="3600000",
        **variables,
    )


def ask(url: str, count: int, *, first: int = 0) -> list[str]:
    with httpx.Client(base_url=url) as client:
        return [client.get(f"/items/{number}").headers["x-request-id"] for number in range(first, first + count)]


def request_ids(sink: OtlpSink) -> list[str]:
    return sorted(str(span.attributes["request_id"]) for span in sink.spans if span.name == "GET /items/{item_id}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("start", STARTS)
def test_a_signal_loses_nothing(start: str, number: signal.Signals, tmp_path: Path) -> None:
    """
    Spans and records that were buffered when the signal came arrive, and the exit code is the one without us.
    """
    (tmp_path / "main.py").write_text(APP)
    with OtlpSink() as sink:
        with Service((ZERO, *STARTS[start]), tmp_path, buffering(sink), ready="/ready") as service:
            ids = ask(service.url, 30)
            assert not sink.spans, "something left before the signal: the test would prove nothing"
            if number == signal.SIGINT:
                # Ctrl-C reaches the whole group. (gunicorn's master alone asks its workers to quit, which uvicorn's
                # worker ignores until it is killed 30 s later; by then everything has left on schedule.)
                os.killpg(service.process.pid, signal.SIGINT)
                code = service.ended()
            else:
                code = service.stop(number)
        assert request_ids(sink) == sorted(ids), service.output()
        items = [record.attributes["request_id"] for record in sink.logs if str(record.body).startswith("item ")]
        assert sorted(items) == sorted(ids)
        assert code == CODES.get((start, number), 0), service.output()


IN_CODE = {
    "uvicorn": STARTS["uvicorn"],
    "uvicorn-workers": STARTS["uvicorn-workers"],
    "uvicorn-run": STARTS["uvicorn-run"],
    "gunicorn-preload": STARTS["gunicorn-preload"],
}


@pytest.mark.parametrize("start", IN_CODE)
def test_a_service_that_starts_from_code_loses_nothing(start: str, tmp_path: Path) -> None:
    """
    With ``bootstrap(app)`` in the application, which the running server imports, SIGTERM loses nothing either.
    """
    source = APP.replace("app = FastAPI()", "import otel_correlation\napp = FastAPI()\notel_correlation.bootstrap(app)")
    (tmp_path / "main.py").write_text(source)
    with OtlpSink() as sink:
        with Service(IN_CODE[start], tmp_path, buffering(sink), ready="/ready") as service:
            ids = ask(service.url, 30)
            assert not sink.spans
            code = service.stop(signal.SIGTERM)
        assert request_ids(sink) == sorted(ids), service.output()
        items = [record.attributes["request_id"] for record in sink.logs if str(record.body).startswith("item ")]
        assert sorted(items) == sorted(ids)
        assert code == CODES.get((start, signal.SIGTERM), 0), service.output()


def test_a_code_reload_loses_nothing(tmp_path: Path) -> None:
    """
    Spans that the old process of ``--reload`` had buffered arrive.
    """
    main = tmp_path / "main.py"
    main.write_text(APP)
    with (
        OtlpSink() as sink,
        Service((ZERO, *STARTS["uvicorn-reload"]), tmp_path, buffering(sink), ready="/ready") as service,
    ):
        ids = ask(service.url, 30)
        main.write_text(APP + "\n# changed\n")
        assert sink.wait(lambda: len(request_ids(sink)) >= 30), service.output()
        assert request_ids(sink) == sorted(ids)


def test_a_worker_that_has_served_its_share_loses_nothing(tmp_path: Path) -> None:
    """
    ``--limit-max-requests`` ends the process by itself; what it buffered arrives.
    """
    (tmp_path / "main.py").write_text(APP)
    with OtlpSink() as sink:
        command = (ZERO, *UVICORN, "--limit-max-requests", "6")
        with Service(command, tmp_path, buffering(sink), ready="/ready") as service:
            ids = ask(service.url, 5)
            assert service.ended() == 0
        assert request_ids(sink) == sorted(ids)


def test_an_absent_collector_does_not_hold_up_the_exit(tmp_path: Path) -> None:
    """
    With nobody listening, SIGTERM ends the service with its code, and one line says what was lost.
    """
    (tmp_path / "main.py").write_text(APP)
    environment = clean_environment(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{free_port()}")
    with Service((ZERO, *UVICORN), tmp_path, environment, ready="/ready") as service:
        ask(service.url, 10)
        code = service.stop()
    assert code == -signal.SIGTERM
    (line,) = [line for line in service.output().splitlines() if "lost" in line]
    assert "11 spans" in line


def test_a_collector_that_hangs_does_not_hold_up_the_exit_for_long(tmp_path: Path) -> None:
    """
    With a collector that never answers, the service ends by itself all the same.
    """
    (tmp_path / "main.py").write_text(APP)
    with OtlpSink(answer=Answer(hang_s=300)) as sink:
        environment = buffering(sink)
        with Service((ZERO, *STARTS["uvicorn"]), tmp_path, environment, ready="/ready") as service:
            ask(service.url, 3)
            # The sink answers long after the time that stop() waits for the end.
            service.stop(signal.SIGINT)


@pytest.mark.parametrize(
    ("ending", "code"),
    [("", 0), ("import sys; sys.exit(3)", 3), ("raise RuntimeError('boom')", 1)],
)
def test_a_script_that_ends_by_itself_loses_nothing(ending: str, code: int, tmp_path: Path) -> None:
    """
    A process without a server flushes at its end, however it ends by itself.
    """
    script = tmp_path / "script.py"
    script.write_text(
        "from opentelemetry import trace\n"
        "for _ in range(30):\n"
        "    trace.get_tracer('script').start_span('step').end()\n" + ending
    )
    with OtlpSink() as sink:
        command = [str(BIN / ZERO), sys.executable, str(script)]
        done = subprocess.run(command, env=buffering(sink), timeout=60, check=False, capture_output=True, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert len(sink.spans) == 30


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_child_process_loses_nothing(method: str, tmp_path: Path) -> None:
    """
    Children of ``multiprocessing`` and the workers of a process pool flush at their end, each its own spans.
    """
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from opentelemetry import trace\n"
        "def step(name):\n"
        "    trace.get_tracer('script').start_span(name).end()\n"
        "if __name__ == '__main__':\n"
        f"    context = multiprocessing.get_context('{method}')\n"
        "    step('parent')\n"
        "    child = context.Process(target=step, args=('child',))\n"
        "    child.start()\n"
        "    child.join()\n"
        "    with ProcessPoolExecutor(1, context) as pool:\n"
        "        pool.submit(step, 'pool').result()\n"
        "    assert child.exitcode == 0\n"
    )
    with OtlpSink() as sink:
        command = [str(BIN / ZERO), sys.executable, str(script)]
        done = subprocess.run(command, env=buffering(sink), timeout=60, check=False, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(span.name for span in sink.spans) == ["child", "parent", "pool"], done.stderr


def test_uvicorn_is_not_imported_for_a_process_without_it(tmp_path: Path) -> None:
    """
    Waiting for the end of servers imports no server.
    """
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom otel_correlation.export import exits\nexits.install(print)\nassert 'uvicorn' not in sys.modules\n"
        "import uvicorn\nassert uvicorn.Server._serve.__wrapped__\n"
        "exits.uninstall()\nassert not hasattr(uvicorn.Server._serve, '__wrapped__')\n"
        "exits.install(print)\nassert uvicorn.Server._serve.__wrapped__\nexits.install(print)\n"
        "assert not hasattr(uvicorn.Server._serve.__wrapped__, '__wrapped__')\n"
    )
    done = subprocess.run([sys.executable, str(script)], timeout=60, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "5.0\n", "one flush at the end"
