"""
Redis pub/sub between real processes, with the redis-py that is locked and with the newest, synchronous and asyncio.
"""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from otel_correlation.tasks.redis import unwrap
from tests.integration.otlp_sink import OtlpSink
from tests.stack.harness import DEADLINE_S, ROOT, Machine, eventually
from tests.stack.servers import Redis

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.otlp_sink import SinkSpan

pytestmark = pytest.mark.needs("servers")

PEER = Path(__file__).with_name("apps") / "pubsub_peer.py"
NEWEST = "redis==8.1.0 --hash=sha256:a4fe1aac3d3b3cc791d4b3d5931c5a956045dc951ee74d1c913ee3ac4d2ee9fb\n"
ID = "order-7781-customer-quote"
BINARY = bytes(range(256)) + b"\n\n" + b"otel-correlation/1\n\n"


@pytest.fixture(scope="module")
def newest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    A directory with the newest redis-py.
    """
    directory = tmp_path_factory.mktemp("newest")
    requirements = directory / "requirements.txt"
    requirements.write_text(NEWEST)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", f"--target={directory / 'site'}", f"--requirement={requirements}"]
    subprocess.run(command, check=True, timeout=600)
    return directory / "site"


@dataclass
class Peer:
    """
    One process at one end of a channel.
    """

    popen: subprocess.Popen[str]
    errors: Path
    told: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """
        Gather what it says.
        """
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        with self.popen.stdout:
            for line in self.popen.stdout:
                self.told.append(json.loads(line))

    def wait(self, count: int) -> list[dict[str, Any]]:
        """
        Return everything it said once that is so many things.
        """

        def enough() -> bool:
            return len(self.told) >= count

        eventually(f"{count} answers, not {self.told}", enough)
        return list(self.told)

    def publish(self, data: bytes, channel: str = "room:7", **more: Any) -> dict[str, Any]:
        """
        Tell a publisher what to publish; returns its answer.
        """
        before = len(self.told)
        assert self.popen.stdin is not None
        line = {"channel": channel, "data": base64.b64encode(data).decode(), **more}
        self.popen.stdin.write(json.dumps(line) + "\n")
        self.popen.stdin.flush()
        return self.wait(before + 1)[before]

    def end(self) -> None:
        """
        Let it end by itself.
        """
        assert self.popen.stdin is not None
        self.popen.stdin.close()
        assert self.popen.wait(DEADLINE_S) == 0

    def clean_up(self) -> None:
        """
        End it in any case.
        """
        self.popen.kill()
        self.popen.wait()
        self._reader.join(DEADLINE_S)
        assert self.popen.stdin is not None
        self.popen.stdin.close()


@dataclass
class Bench:
    """
    A Redis, a place for spans, and the processes that use them.
    """

    redis: Redis
    sink: OtlpSink
    python: Path
    site: Path | None
    peers: list[Peer] = field(default_factory=list)

    def peer(self, *arguments: str, **environment: str) -> Peer:
        """
        Start one process.
        """
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
        settings = {
            "REDIS_URL": self.redis.url,
            "OTEL_SERVICE_NAME": f"{arguments[0]}-{arguments[1]}",
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.sink.endpoint,
            "OTEL_LOGS_EXPORTER": "otlp",
            "OTEL_CORRELATION_LOG_FORMAT": "none",  # its standard output is what it tells
            "OTEL_CORRELATION_STRICT": "1",
            "PYTHONWARNINGS": "error::RuntimeWarning",
            **({"PYTHONPATH": str(self.site)} if self.site is not None else {}),
        }
        errors = self.redis.machine.directory / f"peer-{len(self.peers)}.err"
        with errors.open("w") as stderr:
            popen = subprocess.Popen(
                [str(self.python), str(PEER), *arguments],
                env=inherited | settings | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        peer = Peer(popen, errors)
        self.peers.append(peer)
        if arguments[0] == "receive":
            expected = "8." if self.site is not None else "5."
            assert peer.wait(1).pop()["ready"].startswith(expected)
            peer.told.clear()
        return peer

    def raw(self, channel: str, data: bytes) -> None:
        """
        Publish as a program does that knows nothing of us.
        """
        with socket.create_connection(("127.0.0.1", self.redis.port), 5) as connection:
            parts = [b"PUBLISH", channel.encode(), data]
            connection.sendall(b"*3\r\n" + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts))
            assert connection.recv(100).startswith(b":")

    def spans(self, trace_id: str) -> list[SinkSpan]:
        """
        Return what is stored of one trace.
        """
        return [span for span in self.sink.spans if span.trace_id == trace_id]


@pytest.fixture(params=["locked", "newest"])
def bench(request: pytest.FixtureRequest, machine: Machine, libraries: Path) -> Iterator[Bench]:
    """
    A running Redis and a sink, for the redis-py of the lock and for the newest.
    """
    site = request.getfixturevalue("newest") if request.param == "newest" else None
    redis = Redis(machine)
    redis.start()
    with OtlpSink() as sink:
        bench = Bench(redis, sink, libraries / "python", site)
        yield bench
        for peer in bench.peers:
            peer.clean_up()


def data_of(told: dict[str, Any]) -> bytes:
    return base64.b64decode(told["data"])


@pytest.mark.parametrize("kind", ["sync", "asyncio"])
@pytest.mark.parametrize("link", [False, True])
def test_one_message_many_receivers(bench: Bench, kind: str, link: bool) -> None:
    """
    Every receiver in every process has the sender's request id, and a span of its own under (or linked to) the publish.
    """
    environment = {"OTEL_CORRELATION_MESSAGES": "link"} if link else {}
    receivers = [bench.peer("receive", way, **environment) for way in ("sync", "asyncio")]
    publisher = bench.peer("publish", kind)
    answer = publisher.publish(BINARY, id=ID)
    assert answer["reached"] == 2
    piped = publisher.publish(b"in a pipeline", id=ID, pipeline=True)
    assert piped["reached"] == 2
    for receiver in receivers:
        first, second = receiver.wait(2)
        assert (data_of(first), first["channel"], first["request_id"]) == (BINARY, "room:7", ID)
        assert (data_of(second), second["request_id"]) == (b"in a pipeline", ID)
        assert (first["trace_id"] == answer["trace_id"]) is not link
    publisher.publish(b"stop")
    for peer in [publisher, *receivers]:
        peer.end()
    produced = [span for span in bench.sink.spans if span.kind == "PRODUCER" and span.trace_id == answer["trace_id"]]
    first_produced = min(produced, key=lambda span: span.start_ns)
    assert first_produced.name == "publish room:{room}"
    assert first_produced.attributes["messaging.destination.name"] == "room:7"
    assert first_produced.attributes["otel_correlation.redis.receivers"] == 2
    assert first_produced.attributes["server.port"] == bench.redis.port
    consumed = [
        span
        for span in bench.sink.spans
        if span.kind == "CONSUMER"
        and (
            first_produced.span_id == span.parent_span_id or (span.links and span.links[0][1] == first_produced.span_id)
        )
    ]
    assert {span.resource["service.name"] for span in consumed} == {"receive-sync", "receive-asyncio"}
    assert len(consumed) == 2
    for span in consumed:
        assert span.name == "process room:*"
        assert span.attributes["request_id"] == ID
        if link:
            assert span.parent_span_id == ""
            assert span.links == [(first_produced.trace_id, first_produced.span_id)]
        else:
            assert (span.trace_id, span.parent_span_id) == (first_produced.trace_id, first_produced.span_id)
        lines = [log for log in bench.sink.logs if log.span_id == span.span_id]
        assert [(log.body, log.attributes["request_id"]) for log in lines] == [("received", ID)]
    # The official instrumentation, where it is installed and on, has its own span below ours; here nothing started it.
    assert all(span.kind != "CLIENT" for span in bench.spans(answer["trace_id"]))


@pytest.mark.parametrize("kind", ["sync", "asyncio"])
def test_messages_of_others(bench: Bench, kind: str) -> None:
    """
    Messages without an envelope, and with a broken one, come as they were sent; each starts fresh; receiving goes on.
    """
    receiver = bench.peer("receive", kind)
    strange = [
        b'{"plain": true}',
        b"",
        b"\x00\xff\xfe",
        b"otel-correlation/1\n",
        b"otel-correlation/1\nX-Request-ID: not\x00valid\n\npayload",
        b"otel-correlation/2\n\npayload",
        b"otel-correlation/1\n" + b"a: b\n" * 100_000,
    ]
    for data in strange:
        bench.raw("room:7", data)
    refused = b"otel-correlation/1\nX-Request-ID: two words\ntraceparent: 00-zz\n\npayload"
    bench.raw("room:7", refused)
    bench.raw("room:7", b"otel-correlation/1\nx-request-id: " + ID.encode() + b"\n\npayload")
    *told, last_but_one, last = receiver.wait(len(strange) + 2)
    assert [data_of(one) for one in told] == strange
    assert data_of(last_but_one) == b"payload"
    fresh = [*told, last_but_one]
    assert len({one["request_id"] for one in fresh}) == len(fresh)
    assert all(one["request_id"] == one["trace_id"] for one in fresh)
    assert (data_of(last), last["request_id"]) == (b"payload", ID)
    bench.raw("room:7", b"stop")
    receiver.end()
    warnings = receiver.errors.read_text()
    assert warnings.count("starts like an envelope") == 1
    assert "two words" not in warnings


@pytest.mark.parametrize("kind", ["sync", "asyncio"])
def test_client_that_decodes(bench: Bench, kind: str) -> None:
    """
    With decode_responses=True the payload is text, and the identity is the same.
    """
    receiver = bench.peer("receive", kind, PEER_DECODES="1")
    publisher = bench.peer("publish", kind)
    publisher.publish("größer\n\n".encode(), id=ID)
    (told,) = receiver.wait(1)
    assert (data_of(told).decode(), told["request_id"]) == ("größer\n\n", ID)


@pytest.mark.parametrize("kind", ["sync", "asyncio"])
def test_redis_gone(bench: Bench, kind: str) -> None:
    """
    Without Redis the publisher gets redis-py's own error, which is on the span; when Redis is back it publishes.
    """
    publisher = bench.peer("publish", kind)
    assert publisher.publish(b"nobody is there", id=ID) == {"reached": 0, "trace_id": publisher.told[0]["trace_id"]}
    bench.redis.stop()
    assert publisher.publish(b"lost", id=ID) == {"error": "ConnectionError"}
    bench.redis.start()
    assert publisher.publish(b"back", id=ID)["reached"] == 0
    publisher.end()
    first, lost, back = sorted((s for s in bench.sink.spans if s.kind == "PRODUCER"), key=lambda span: span.start_ns)
    assert first.attributes["otel_correlation.redis.receivers"] == 0
    assert (lost.status_code, lost.attributes["error.type"]) == (2, "redis.exceptions.ConnectionError")
    assert [event.name for event in lost.events] == ["exception"]
    assert back.status_code == 0


DOCUMENTED = (ROOT / "docs/how-to/queues.md").read_text().partition("## Redis pub/sub\n")[2].partition("\n## ")[0]


def test_documented(bench: Bench) -> None:
    """
    What the how-to shows, runs; and the envelope that it shows is one.
    """
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENTED, re.DOTALL)
    assert len(blocks) == 3
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    environment |= {"OTEL_EXPORTER_OTLP_ENDPOINT": bench.sink.endpoint, "REDIS_URL": bench.redis.url}
    if bench.site is not None:
        environment["PYTHONPATH"] = str(bench.site)
    command = [str(bench.python), str(PEER.with_name("pubsub_documented.py"))]
    ended = subprocess.run(
        command,
        env=environment,
        input=json.dumps(blocks),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    (shown,) = re.findall(r"```text\n(.*?)\n```", DOCUMENTED, re.DOTALL)
    envelope = unwrap(shown)
    assert envelope.payload == '{"text": "hello"}'
    assert envelope.headers is not None
    assert envelope.headers["X-Request-ID"] == ID
