"""
Classes of the standard library that somebody replaced before or after us: gevent, and anybody's subclass.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.integration.otlp_sink import OtlpSink
from tests.integration.services import Service, clean_environment

if TYPE_CHECKING:
    from pathlib import Path

GEVENT = "gevent==26.9.0"


@pytest.fixture(scope="session")
def gevent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    A folder with the real gevent.
    """
    target = tmp_path_factory.mktemp("gevent")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(target)]
    done = subprocess.run([*pip, "--only-binary", ":all:", GEVENT], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot install {GEVENT}: {done.stderr[-200:]}")
    return target


def run(source: str, *, path: Path | None = None) -> dict[str, object]:
    """
    Run a script and return what it prints as JSON; nothing else may be printed.
    """
    environment = clean_environment(OTEL_TRACES_EXPORTER="none", **({"PYTHONPATH": str(path)} if path else {}))
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert " is off" not in done.stderr, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


# Run with the classes replaced: who carries what, and whether taking us out leaves each class as it was.
CARRIES = """
import concurrent.futures, json, logging, threading
kinds = [threading.Thread, concurrent.futures.ThreadPoolExecutor, logging.Logger, logging.Handler, logging.Formatter]
kinds = [kind for replaced in kinds for kind in replaced.__mro__[:-1]]
before = [dict(vars(kind)) for kind in kinds]
from otel_correlation import bootstrap, request_id, work
bootstrap(log_format="none")
records = []
class Keep(logging.Handler):
    def emit(self, record):
        records.append(record.request_id)
logging.getLogger("shop").addHandler(Keep())
seen = {}
with work("w", request_id="order-4711-of-today"):
    thread = threading.Thread(target=lambda: seen.update(thread=request_id()))
    thread.start()
    thread.join()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        seen["pool"] = pool.submit(request_id).result()
    logging.getLogger("shop").warning("looked up")
seen["record"] = records
from otel_correlation import logs, tasks
tasks.deactivate()
logs.uninstall()
seen["restored"] = all(
    vars(kind).get(name) is value for kind, kept in zip(kinds, before) for name, value in kept.items()
    if name in ("start", "submit", "handle", "callHandlers", "addHandler", "format", "formatException")
) and all(set(vars(kind)) - set(kept) <= {"__abstractmethods__"} for kind, kept in zip(kinds, before))
print(json.dumps(seen))
"""
WANTED = {
    "thread": "order-4711-of-today",
    "pool": "order-4711-of-today",
    "record": ["order-4711-of-today"],
    "restored": True,
}
REPLACED = {
    "nothing": "",
    "a thread": "import threading\nclass Thread(threading.Thread): pass\nthreading.Thread = Thread\n",
    "a thread with a start of its own": (
        "import threading\nclass Thread(threading.Thread):\n"
        "    def start(self): return super().start()\nthreading.Thread = Thread\n"
    ),
    "a pool": (
        "import concurrent.futures as c, concurrent.futures.thread as t\n"
        "class Pool(c.ThreadPoolExecutor): pass\nc.ThreadPoolExecutor = t.ThreadPoolExecutor = Pool\n"
    ),
    "a logger": (
        "import logging\nclass Logger(logging.Logger): pass\nlogging.Logger = Logger\nlogging.setLoggerClass(Logger)\n"
    ),
    "a formatter": "import logging\nclass Formatter(logging.Formatter): pass\nlogging.Formatter = Formatter\n",
    "a handler": "import logging\nclass Handler(logging.Handler): pass\nlogging.Handler = Handler\n",
}


@pytest.mark.parametrize("what", REPLACED)
def test_a_subclass_in_place_is_no_obstacle(what: str) -> None:
    """
    Whoever put a subclass in the place of a class that we wrap gets the ids, and the class as it was when we go.
    """
    assert run(REPLACED[what] + CARRIES) == WANTED


def test_gevent_before_us(gevent: Path) -> None:
    """
    After ``gevent.monkey.patch_all()`` threads are greenlets, which carry the identity all the same.
    """
    assert run("from gevent import monkey\nmonkey.patch_all()\n" + CARRIES, path=gevent) == WANTED


GREENLETS = """
{before}
from otel_correlation import bootstrap, request_id, work
bootstrap()
{after}
import gevent, json
def one(number):
    with work("w", request_id=f"order-{{number:012d}}"):
        seen = []
        for _ in range(3):
            gevent.sleep(0.001)
            seen.append(request_id())
        return set(seen) == {{f"order-{{number:012d}}"}}
jobs = [gevent.spawn(one, number) for number in range(50)]
gevent.joinall(jobs)
print(json.dumps({{"own": [job.value for job in jobs].count(True), "outside": request_id()}}))
"""
PATCH = "from gevent import monkey\nmonkey.patch_all()"


@pytest.mark.parametrize("first", ["gevent", "ours"])
def test_each_greenlet_has_its_own_identity(first: str, gevent: Path) -> None:
    """
    Fifty greenlets that take turns never see each other's ids, whoever came first.
    """
    before, after = (PATCH, "") if first == "gevent" else ("", PATCH)
    assert run(GREENLETS.format(before=before, after=after), path=gevent) == {"own": 50, "outside": None}


WSGI = """
import json, threading, time
from otel_correlation import request_id, trace_id, work

def app(environ, start_response):
    with work("GET " + environ["PATH_INFO"], request_id=environ.get("HTTP_X_REQUEST_ID")):
        seen = []
        thread = threading.Thread(target=lambda: seen.append(request_id()))
        thread.start()
        thread.join()
        time.sleep(0.02)
        body = json.dumps({"ids": [request_id(), *seen], "trace": trace_id(), "thread": str(threading.Thread)}).encode()
    start_response("200 OK", [("content-type", "application/json")])
    return [body]
"""
GUNICORN = ("opentelemetry-instrument", "gunicorn", "-k", "gevent", "-b", "127.0.0.1:{port}", "main:app")


@pytest.mark.slow
def test_gunicorns_gevent_worker_sends_its_spans(gevent: Path, tmp_path: Path) -> None:
    """
    Twenty requests at once keep their ids apart, and each one's span arrives.
    """
    (tmp_path / "main.py").write_text(WSGI)
    wanted = [f"order-{number:012d}" for number in range(20)]
    with OtlpSink() as sink:
        environment = clean_environment(PYTHONPATH=str(gevent), OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint)
        with Service(GUNICORN, tmp_path, environment, ready="/") as service:

            def get(name: str) -> dict[str, object]:
                found: dict[str, object] = httpx.get(service.url + "/a", headers={"x-request-id": name}).json()
                return found

            with ThreadPoolExecutor(20) as pool:
                answers = list(pool.map(get, wanted))
            service.stop()
            output = service.output()
        spans = {span.attributes["request_id"]: span.trace_id for span in sink.spans if span.name == "GET /a"}
    assert [answer["ids"] for answer in answers] == [[name, name] for name in wanted]
    assert spans == {name: answer["trace"] for name, answer in zip(wanted, answers, strict=True)}
    assert "gevent" in str(answers[0]["thread"])
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_collector_that_is_down_stops_no_greenlet(gevent: Path, tmp_path: Path) -> None:
    """
    While the exporter waits for its next attempt requests are answered, also where gevent came after us.
    """
    (tmp_path / "main.py").write_text(WSGI)
    environment = clean_environment(PYTHONPATH=str(gevent), OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    with Service(GUNICORN, tmp_path, environment, ready="/") as service:
        answered = 0
        deadline = time.monotonic() + 30
        # The exporter's waits grow to seconds; held up by them, three requests took eight seconds, not a fifth of one.
        while answered < 100 and time.monotonic() < deadline:
            answered += httpx.get(service.url).status_code == 200
    assert answered == 100
