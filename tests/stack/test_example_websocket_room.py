"""
The example websocket-room as its users run it: two workers, a real Redis, sockets that come, stay, stall and vanish.
"""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.integration.otlp_sink import OtlpSink
from tests.stack.harness import DEADLINE_S, ROOT, Machine, Process, eventually, get
from tests.stack.servers import Redis
from tests.stack.test_page import FLAGS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from websockets.sync.client import ClientConnection

    from tests.integration.otlp_sink import SinkLog, SinkSpan

pytestmark = pytest.mark.needs("browser", "servers")

FOLDER = ROOT / "examples" / "websocket-room"
SECRET = "the-secret-of-the-test"
SAID = "planted-words-of-a-person-51c7"
UNSET, ERROR = 0, 2


class Client:
    """
    One person in a room.
    """

    def __init__(self, port: int, first: str | bytes | None = None, *, room: str = "lobby", **options: Any) -> None:
        connecting = connect(
            f"ws://127.0.0.1:{port}/rooms/{room}", proxy=None, close_timeout=1, open_timeout=DEADLINE_S, **options
        )
        # Entered and never left: some of these end without a word.
        self.socket: ClientConnection = connecting.__enter__()
        assert self.socket.response is not None
        self.handshake_id = self.socket.response.headers["x-request-id"]
        if first is not None:
            self.socket.send(first)

    def next(self, kind: str) -> dict[str, Any]:
        """
        Return the next message of a kind; others before it are passed over.
        """
        while True:
            message: dict[str, Any] = json.loads(self.socket.recv(timeout=DEADLINE_S))
            if message["type"] == kind:
                return message

    def say(self, text: str) -> None:
        """
        Send one message to the room.
        """
        self.socket.send(json.dumps({"text": text}))

    def closed(self) -> int:
        """
        Return the close code that ends the connection.
        """
        try:
            while True:
                self.socket.recv(timeout=DEADLINE_S)
        except ConnectionClosed as closed:
            return closed.rcvd.code if closed.rcvd is not None else 1006

    def vanish(self) -> None:
        """
        Reset the connection without a word, as a machine does that lost its power and came back.
        """
        self.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.socket.close()

    def __enter__(self) -> Self:
        """
        Use it as a context manager that closes.
        """
        return self

    def __exit__(self, *_: object) -> None:
        """
        Leave politely.
        """
        self.socket.close()


@dataclass
class Room:
    """
    Redis, a sink and the workers.
    """

    machine: Machine
    libraries: Path
    redis: Redis
    sink: OtlpSink
    ports: list[int] = field(default_factory=list)
    workers: list[Process] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)

    def start(self, *options: str, **environment: str) -> int:
        """
        Start a worker (or several, with options) and return its port when it listens to Redis.
        """
        port = self.machine.port()
        command: list[str | Path] = [self.libraries / "opentelemetry-instrument", self.libraries / "uvicorn"]
        command += ["main:app", f"--port={port}", *options]
        settings = {
            "REDIS_URL": self.redis.url,
            "ROOM_SECRET": SECRET,
            "ROOM_TICK_S": "3600",
            "OTEL_SERVICE_NAME": "room",
            "OTEL_CORRELATION_WEBSOCKET": "message",
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.sink.endpoint,
            "OTEL_LOGS_EXPORTER": "otlp",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
            "OTEL_BLRP_SCHEDULE_DELAY": "200",
        }
        worker = self.machine.start(f"room-{len(self.workers)}", command, settings | environment, FOLDER)
        eventually("the room", lambda: "listening to Redis" in worker.log.read_text(), while_running=[worker])
        eventually("the room", lambda: get(f"http://127.0.0.1:{port}/state").status_code == 200)
        self.ports.append(port)
        self.workers.append(worker)
        return port

    def token(self, name: str, seconds: int = 3600) -> str:
        """
        Return a token, made as the README says (but with a lifetime); it must be seen nowhere afterwards.
        """
        code = f"import auth; print(auth.token_for({name!r}, {seconds}))"
        command = [str(self.libraries / "python"), "-c", code]
        environment = os.environ | {"ROOM_SECRET": SECRET}
        made = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True, check=True)
        self.tokens.append(made.stdout.strip())
        return self.tokens[-1]

    def join(self, name: str, port: int, **options: Any) -> Client:
        """
        Return somebody who is in the room.
        """
        client = Client(port, json.dumps({"token": self.token(name)}), **options)
        welcome = client.next("welcome")
        assert (welcome["name"], welcome["request_id"]) == (name, client.handshake_id)
        return client

    def state(self, port: int) -> dict[str, int]:
        """
        Return what a worker holds.
        """
        found: dict[str, int] = get(f"http://127.0.0.1:{port}/state").json()
        return found

    def spans(self, count: int, **attributes: Any) -> list[SinkSpan]:
        """
        Return the spans with these fields once there are so many.
        """

        def found() -> list[SinkSpan]:
            return [
                s for s in list(self.sink.spans) if all(getattr(s, name) == value for name, value in attributes.items())
            ]

        arrived = self.sink.wait(lambda: len(found()) >= count, timeout_s=DEADLINE_S)
        assert arrived, f"{attributes}: {found()} of {[(span.name, span.trace_id) for span in self.sink.spans]}"
        assert len(found()) == count
        return found()

    def logs(self, count: int, body: str, trace_id: str | None = None) -> list[SinkLog]:
        """
        Return the lines that match (of one trace) once there are so many.
        """

        def found() -> list[SinkLog]:
            return [
                log
                for log in list(self.sink.logs)
                if re.fullmatch(body, str(log.body)) and trace_id in (None, log.trace_id)
            ]

        arrived = self.sink.wait(lambda: len(found()) >= count, timeout_s=DEADLINE_S)
        assert arrived, f"{body}: {[log.body for log in self.sink.logs]}"
        return found()

    def stop(self) -> None:
        """
        End the workers, and look through everything that is left of them for what must not be there.
        """
        for worker in self.workers:
            if worker.popen.poll() is None:
                worker.stop()
        left = "".join(worker.log.read_text() for worker in self.workers)
        assert "Traceback" not in left
        left += "".join(map(repr, self.sink.spans)) + "".join(map(repr, self.sink.logs))
        assert len(left) > 1000
        for secret in [SECRET, SAID, *self.tokens, *(token.rpartition(".")[2] for token in self.tokens)]:
            assert secret not in left


@pytest.fixture
def room(machine: Machine, libraries: Path) -> Iterator[Room]:
    """
    A room without workers yet; afterwards no token and nothing that was said is in any line or span.
    """
    redis = Redis(machine)
    redis.start()
    with OtlpSink() as sink:
        room = Room(machine, libraries, redis, sink)
        yield room
        room.stop()


def test_one_identity_from_socket_to_sockets(room: Room) -> None:
    """
    A message has one identity: in the receivers' payloads, in the lines of both workers, and in one trace.
    """
    first, second = room.start(), room.start()
    with (
        room.join("ada", first) as ada,
        room.join("bob", second) as bob,
        room.join("cyd", first) as cyd,
        room.join("eve", second, room="elsewhere") as eve,
    ):
        ada.say(SAID)
        seen = [client.next("message") for client in (ada, bob, cyd)]
        bob.say("hello ada")
        answer = ada.next("message")
        eve.say("anybody?")
        assert eve.next("message")["text"] == "anybody?"
    assert seen[0] == seen[1] == seen[2]
    assert (seen[0]["from"], seen[0]["text"], seen[0]["request_id"]) == ("ada", SAID, ada.handshake_id)
    assert (answer["from"], answer["request_id"]) == ("bob", bob.handshake_id)
    assert answer["trace_id"] != seen[0]["trace_id"] != ada.handshake_id

    trace_id = seen[0]["trace_id"]
    received, published, *delivered = sorted(
        (span for span in room.spans(6, trace_id=trace_id) if span.kind != "CLIENT"), key=lambda span: span.start_ns
    )
    assert (received.name, received.kind, received.parent_span_id) == ("GET /rooms/{name} message", "SERVER", "")
    (handshake,) = [
        s for s in room.spans(4, name="GET /rooms/{name}") if s.attributes["request_id"] == ada.handshake_id
    ]
    assert received.links == [(handshake.trace_id, handshake.span_id)]
    assert (published.name, published.kind) == ("publish room:{room}", "PRODUCER")
    assert published.parent_span_id == received.span_id
    assert published.attributes["otel_correlation.redis.receivers"] == 2
    assert [(span.name, span.kind, span.parent_span_id) for span in delivered] == [
        ("process room:*", "CONSUMER", published.span_id)
    ] * 3
    assert len({span.resource["service.instance.id"] for span in delivered}) == 2
    assert {span.attributes["request_id"] for span in (received, published, *delivered)} == {ada.handshake_id}
    lines = room.logs(4, r"(ada said|delivered to) .*", trace_id)
    assert sorted(log.body for log in lines) == [
        f"ada said {len(SAID)} characters to 2 workers",
        *[f"delivered to {name}" for name in ("ada", "bob", "cyd")],
    ]
    assert {log.attributes["request_id"] for log in lines} == {ada.handshake_id}
    assert {log.span_id for log in lines} == {received.span_id, *(span.span_id for span in delivered)}


@pytest.mark.parametrize("case", ["wrong", "expired", "no token", "no json", "bytes", "nothing", "deep"])
def test_refusals_are_not_errors(room: Room, case: str) -> None:
    """
    Whoever does not say who they are is told its id and leaves with 1008, 4001 or 4002; no span and no line is an error.
    """
    port = room.start(ROOM_AUTH_S="0.5")
    room.tokens.append("planted-password-8f2c")
    cases: dict[str, tuple[str | bytes | None, int]] = {
        "wrong": (json.dumps({"token": "ada.9999999999.planted-password-8f2c"}), 1008),
        "expired": (json.dumps({"token": room.token("ada", -60)}), 4002),
        "no token": (json.dumps({"password": "planted-password-8f2c"}), 4001),
        "no json": ("planted-password-8f2c", 4001),
        "bytes": (b"\xff\x00planted-password-8f2c", 4001),
        "nothing": (None, 4001),
        "deep": ("[" * 100_000, 4001),
    }
    first, code = cases[case]
    client = Client(port, first)
    refused = client.next("refused")
    assert refused["request_id"] == client.handshake_id
    assert client.closed() == code
    (closing,) = room.spans(1, name="GET /rooms/{name} close")
    assert closing.attributes["otel_correlation.websocket.close_code"] == code
    assert closing.attributes["request_id"] == client.handshake_id
    (line,) = room.logs(1, rf"refused with {code}: .*")
    assert (line.severity_text, line.attributes["request_id"]) == ("INFO", client.handshake_id)
    assert {span.status_code for span in room.sink.spans} == {UNSET}
    assert {log.severity_text for log in room.sink.logs} == {"INFO"}
    eventually("the end", lambda: room.state(port)["tasks"] <= 5)


def test_wrong_messages_get_an_answer(room: Room) -> None:
    """
    A message that is none is answered with the id, and the conversation goes on.
    """
    port = room.start()
    with room.join("ada", port) as ada:
        for wrong in ('{"text": ""}', "no json", b"\xff", '{"text": "' + "x" * 16_001 + '"}'):
            ada.socket.send(wrong)
            assert ada.next("error")["request_id"] == ada.handshake_id
        ada.say("now")
        assert ada.next("message")["text"] == "now"


def test_foreign_publishers(room: Room) -> None:
    """
    What other programs publish reaches the sockets as it is, bytes that are no text included, and starts fresh.
    """
    port = room.start()
    with room.join("ada", port) as ada:
        for data in (b'{"type": "message", "text": "plain"}', b"otel-correlation/1\nbroken"):
            raw(room.redis, "PUBLISH", "room:lobby", data)
        assert ada.next("message") == {"type": "message", "text": "plain"}
        assert ada.socket.recv(timeout=DEADLINE_S) == "otel-correlation/1\nbroken"
        raw(room.redis, "PUBLISH", "room:lobby", b'{"type": "message", "text": "\xff"}')
        assert ada.next("message")["text"] == "\ufffd"
    spans = room.spans(3, name="process room:*")
    assert len({span.trace_id for span in spans}) == 3
    assert all(span.attributes["request_id"] == span.trace_id for span in spans)


def test_tick_reaches_every_socket(room: Room) -> None:
    """
    A tick is work of one worker's own, and one trace up to the sockets of all workers.
    """
    ports = [room.start(ROOM_TICK_S="1"), room.start(ROOM_TICK_S="1")]
    clients = [room.join(f"member-{number}", ports[number % 2]) for number in range(6)]
    # The first tick may have come before the other worker listened: the newest that anybody has is waited for.
    ticks = [client.next("tick") for client in clients]
    while len({tick["request_id"] for tick in ticks}) > 1:
        newest = max(tick["at"] for tick in ticks)
        ticks = [
            tick if tick["at"] == newest else client.next("tick") for client, tick in zip(clients, ticks, strict=True)
        ]
    tick = ticks[0]
    for client in clients:
        client.socket.close()
    trace_id = tick["request_id"]
    delivered = room.spans(6, trace_id=trace_id, name="process dashboard")
    (published,) = room.spans(1, trace_id=trace_id, name="publish dashboard")
    (root,) = room.spans(1, trace_id=trace_id, name="tick")
    assert (root.kind, root.parent_span_id, published.parent_span_id) == ("INTERNAL", "", root.span_id)
    assert {span.parent_span_id for span in delivered} == {published.span_id}
    assert len({span.resource["service.instance.id"] for span in delivered}) == 2
    assert {span.attributes["request_id"] for span in (root, published, *delivered)} == {trace_id}
    lines = room.logs(6, "delivered to member-.*", trace_id)
    assert {log.attributes["request_id"] for log in lines} == {trace_id}


def files(pid: int) -> int:
    """
    Return how many files and sockets a process holds.
    """
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def connections(port: int) -> int:
    """
    Return how many connections a server still has, closed ones aside that the kernel remembers for a minute.
    """
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening, remembered = "0A", "06"
    return sum(row[1].endswith(f":{port:04X}") and row[3] not in (listening, remembered) for row in rows)


def held(room: Room, port: int) -> tuple[int, ...]:
    """
    Return everything that a worker could keep of its clients.
    """
    state = room.state(port)
    counted = tuple(state[name] for name in ("sockets", "rooms", "waiting", "tasks"))
    return (*counted, connections(port), *subscriptions(room.redis))


def raw(redis: Redis, *parts: str | bytes) -> bytes:
    """
    Return Redis's answer to one command.
    """
    encoded = [part.encode() if isinstance(part, str) else part for part in parts]
    with socket.create_connection(("127.0.0.1", redis.port), 5) as connection:
        connection.sendall(
            b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in encoded)
        )
        return connection.recv(65_536)


def subscriptions(redis: Redis) -> tuple[int, int]:
    """
    Return how many patterns are subscribed, and how many connections do so.
    """
    return int(raw(redis, "PUBSUB", "NUMPAT")[1:]), raw(redis, "CLIENT", "LIST", "TYPE", "pubsub").count(b" addr=")


def test_vanished_clients_leak_nothing(room: Room) -> None:
    """
    After clients came and went in every rude way, a worker holds what it held before.
    """
    port = room.start()
    token = json.dumps({"token": room.token("ada")})

    def one_of_each(number: int) -> None:
        Client(port).vanish()
        Client(port, token).vanish()
        client = Client(port, token, room=f"room-{number}")
        client.next("welcome")
        client.say("x" * 10_000)
        client.vanish()
        client = Client(port, token, room=f"room-{number}")
        client.next("welcome")
        client.socket.socket.close()
        with Client(port, token) as client:
            client.next("welcome")
        half = socket.create_connection(("127.0.0.1", port))
        half.sendall(b"GET /rooms/lobby HTTP/1.1\r\nUpgrade: websocket\r\n")
        half.close()

    one_of_each(0)
    # One request's task and its callers; the listener, the ticker, the server and its lifespan. No client's anything.
    empty = (0, 0, 0, 5, 0, 2, 1)
    eventually(f"everybody to leave ({held(room, port)})", lambda: held(room, port) == empty)
    before = files(room.state(port)["worker"])
    for number in range(1, 31):
        one_of_each(number)
    eventually(f"everybody to leave ({held(room, port)})", lambda: held(room, port) == empty)
    # Connections to Redis and to the collector come and go, a handful in all; there were 180 clients.
    assert files(room.state(port)["worker"]) <= before + 8
    with room.join("bob", port) as bob:
        bob.say("still here")
        assert bob.next("message")["text"] == "still here"


def never_reads(port: int, token: str) -> socket.socket:
    """
    Return the socket of a member that takes nothing after the handshake.
    """
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.sendall(
        b"GET /rooms/lobby HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += client.recv(4096)
    first = json.dumps({"token": token}).encode()
    assert len(first) < 126
    client.sendall(bytes([0x81, 0x80 | len(first), 0, 0, 0, 0]) + first)  # masked with zeros
    return client


def test_slow_client(room: Room) -> None:
    """
    A client that takes nothing costs its own messages, which are counted, then its connection; nobody else waits.
    """
    port = room.start(ROOM_SEND_S="2")
    with room.join("ada", port) as ada:
        slow = never_reads(port, room.token("slow"))
        eventually("both", lambda: room.state(port)["sockets"] == 2)
        sent = 0
        while room.state(port)["dropped"] == 0:
            for _ in range(20):
                ada.say(f"{sent:<16000}")
                assert ada.next("message")["text"].strip() == str(sent)
                sent += 1
            assert sent < 5000
        eventually("the slow one to be cut off", lambda: room.state(port)["sockets"] == 1)
        ada.say("1")
        assert ada.next("message")["text"] == "1"
        slow.close()
        eventually("its socket to close", lambda: connections(port) == 1)
        assert room.state(port)["waiting"] == 0
    (warning,) = room.logs(1, "slow is too slow, messages are dropped")
    assert warning.severity_text == "WARN"
    assert room.logs(1, "slow took nothing for 2 s and is cut off")
    assert room.logs(1, r"slow left, [1-9]\d* messages were dropped")
    assert room.logs(1, r"ada left, 0 messages were dropped")


def test_redis_gone(room: Room) -> None:
    """
    Without Redis the sockets stay and are told; who says something gets an answer with its id; then it goes on.
    """
    ports = [room.start(), room.start()]
    with room.join("ada", ports[0]) as ada, room.join("bob", ports[1]) as bob:
        room.redis.stop()
        assert ada.next("status")["redis"] == bob.next("status")["redis"] == "down"
        ada.say("lost")
        answer = ada.next("error")
        assert (answer["request_id"], answer["detail"]) == (ada.handshake_id, "not delivered, please try again")
        assert len(answer["trace_id"]) == 32
        room.redis.start()
        for client in (ada, bob):
            while client.next("status")["redis"] != "up":
                pass
        ada.say("back")
        assert bob.next("message")["text"] == "back"
    (line,) = room.logs(1, "a message was not delivered .*")
    assert (line.severity_text, line.trace_id, line.attributes["request_id"]) == (
        "WARN",
        answer["trace_id"],
        ada.handshake_id,
    )
    failed = [span for span in room.spans(3, trace_id=answer["trace_id"]) if span.kind == "PRODUCER"]
    assert [span.attributes["error.type"] for span in failed] == ["redis.exceptions.ConnectionError"]
    servers = [span for span in room.sink.spans if span.kind == "SERVER"]
    assert {span.status_code for span in servers} == {UNSET}


def test_uvicorn_workers(room: Room) -> None:
    """
    The README's command: two workers behind one port, and a message between sockets of both.
    """
    port = room.start("--workers=2")
    token = json.dumps({"token": room.token("ada")})
    by_worker: dict[int, Client] = {}
    opened: list[Client] = []

    def both() -> bool:
        batch = [Client(port) for _ in range(8)]
        opened.extend(batch)
        for client in batch:
            client.socket.send(token)
        for client in batch:
            by_worker.setdefault(client.next("welcome")["worker"], client)
        return len(by_worker) == 2

    eventually("sockets in both workers", both)
    sender, receiver = by_worker.values()
    sender.say("across")
    message = receiver.next("message")
    assert (message["text"], message["request_id"]) == ("across", sender.handshake_id)
    for client in opened:
        client.socket.close()


class Browser:
    """
    A headless Chromium with one page, driven over the DevTools protocol.
    """

    def __init__(self, machine: Machine, chromium: str) -> None:
        profile = machine.directory / "profile"
        flags = [flag for flag in FLAGS if not flag.startswith(("--virtual-time-budget", "--dump-dom"))]
        command = [chromium, *flags, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
        process = machine.start("chromium", command, {})
        told = profile / "DevToolsActivePort"
        eventually("Chromium", lambda: told.exists() and "\n" in told.read_text(), while_running=[process])
        port = int(told.read_text().split()[0])

        def page() -> str | None:
            targets = get(f"http://127.0.0.1:{port}/json/list").json()
            return next((target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page"), None)

        self._connecting = connect(
            eventually("a page", page), proxy=None, max_size=None, open_timeout=DEADLINE_S, close_timeout=1
        )
        self._socket = self._connecting.__enter__()
        self._number = 0

    def __enter__(self) -> Self:
        """
        Use it as a context manager that closes.
        """
        return self

    def __exit__(self, *_: object) -> None:
        """
        Let go of the page; the process ends with the test.
        """
        self._socket.close()

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """
        Return the result of one command.
        """
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(timeout=DEADLINE_S))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def run(self, script: str) -> Any:
        """
        Return the value of an expression in the page.
        """
        result = self.command("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def text(self) -> str:
        """
        Return what a person sees.
        """
        return str(self.run("document.body ? document.body.innerText : ''"))

    def sees(self, what: str) -> None:
        """
        Wait until a person sees it.
        """
        eventually(f"{what!r} on the page", lambda: what in self.text())


def test_browser(room: Room, machine: Machine, chromium: str) -> None:
    """
    In a real browser: the id after joining, one's own and others' messages with their ids, markup as text, a refusal.
    """
    port = room.start()
    with room.join("ada", port) as ada, Browser(machine, chromium) as browser:
        browser.command("Page.navigate", url=f"http://127.0.0.1:{port}/")
        eventually("the page", lambda: browser.run("!!document.getElementById('join')"))

        def fill(form: str, field: str, value: str) -> None:
            browser.run(f"document.getElementById({field!r}).value = {json.dumps(value)}")
            browser.run(f"document.querySelector('#{form} button').click()")

        fill("join", "token", room.token("bob"))
        browser.sees("You are bob")
        quoted = re.search(r"Quote ([0-9a-f]{32})", browser.text())
        assert quoted is not None
        fill("say", "text", "hello from a browser")
        message = ada.next("message")
        assert (message["from"], message["text"]) == ("bob", "hello from a browser")
        assert message["request_id"] == quoted[1]
        browser.sees(f"request {quoted[1]} · trace {message['trace_id']}")
        ada.say("<img src=x onerror=\"document.title='OWNED'\">")
        mine = ada.next("message")
        browser.sees("ada: <img src=x onerror=")
        browser.sees(f"request {ada.handshake_id} · trace {mine['trace_id']}")
        assert browser.run("document.title") == "websocket-room"
        if "WEBSOCKET_ROOM_SCREENSHOT" in os.environ:
            shot = browser.command("Page.captureScreenshot", format="png")["data"]
            Path(os.environ["WEBSOCKET_ROOM_SCREENSHOT"]).write_bytes(base64.b64decode(shot))
        room.workers[0].stop()
        browser.sees("The connection ended (1012).")
        room.start()
        browser.command("Page.navigate", url=f"http://127.0.0.1:{room.ports[-1]}/")
        eventually("the page", lambda: browser.run("!!document.getElementById('join')"))
        fill("join", "token", "not-a-token-of-ours")
        browser.sees("Refused: the token is wrong. Quote ")
