"""
The receiver and viewer over real HTTP: status codes and bodies of OTLP/HTTP, the query API, and who may read.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import socket
import sqlite3
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, cast
from urllib.parse import quote

import httpx
import pytest
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from otel_correlation.local import LocalServer, server
from otel_correlation.stores import as_json
from otel_correlation.stores.model import trace_from_json
from tests.local_payloads import REQUEST_ID, TRACE_ID, as_otlp_json, checkout, log, logs, span, traces

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otel_correlation.local import LocalStore
    from otel_correlation.stores import Json, Trace

PROTOBUF = "application/x-protobuf"
JSON = "application/json"


@pytest.fixture
def local() -> Iterator[LocalServer]:
    with LocalServer(port=0) as running:
        yield running


@pytest.fixture
def client(local: LocalServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=local.url, trust_env=False) as ready:
        yield ready


def send(client: httpx.Client, path: str, body: bytes, media: str = PROTOBUF, **headers: str) -> httpx.Response:
    more = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post(path, content=body, headers={"content-type": media, **more})


def send_checkout(client: httpx.Client) -> None:
    assert send(client, "/v1/traces", traces(checkout().spans).SerializeToString()).status_code == 200
    assert send(client, "/v1/logs", logs(checkout().logs).SerializeToString()).status_code == 200


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
@pytest.mark.parametrize("media", [PROTOBUF, JSON])
def test_what_was_sent_is_found(client: httpx.Client, media: str, encoding: str) -> None:
    """
    Spans and logs in any encoding are answered in the same encoding, empty for full success, and are found at once.
    """
    for path, message in (("/v1/traces", traces(checkout().spans)), ("/v1/logs", logs(checkout().logs))):
        body = json.dumps(as_otlp_json(message)).encode() if media == JSON else message.SerializeToString()
        response = send(
            client, path, gzip.compress(body) if encoding == "gzip" else body, media, content_encoding=encoding
        )
        assert (response.status_code, response.headers["content-type"]) == (200, media)
        assert response.content == (b"{}" if media == JSON else b"")
    (found,) = client.get("/api/find/" + quote(REQUEST_ID, safe="")).json()["traces"]
    assert trace_from_json(found) == checkout()
    assert found["cause"]["place"] == "/srv/inventory.py:24 in days_left"


def test_metrics_are_accepted_and_dropped(client: httpx.Client) -> None:
    """
    A service that also exports metrics gets no error.
    """
    response = send(client, "/v1/metrics", ExportMetricsServiceRequest().SerializeToString())
    assert (response.status_code, response.content) == (200, b"")


def test_a_partly_bad_request_is_a_partial_success(client: httpx.Client) -> None:
    """
    The good spans are kept, and the sender is told how many were not, in its own encoding.
    """
    message = traces([span("a", "", "s", "good", "SERVER", (0, 1)), span("b", "", "s", "bad", "SERVER", (0, 1))])
    message.resource_spans[1].scope_spans[0].spans[0].trace_id = b"short"
    response = send(client, "/v1/traces", message.SerializeToString())
    answer = ExportTraceServiceResponse.FromString(response.content)
    assert (response.status_code, answer.partial_success.rejected_spans) == (200, 1)
    assert client.get(f"/api/traces/{TRACE_ID}").json()["spans"][0]["name"] == "good"


@pytest.mark.parametrize("media", [PROTOBUF, JSON])
def test_malformed_is_400_with_a_status_message(client: httpx.Client, media: str) -> None:
    """
    OTLP/HTTP: a body that cannot be decoded is not to be sent again, and the answer says why in a Status.
    """
    for body, encoding in ((b"\xff\xff", "identity"), (b"no gzip", "gzip"), (gzip.compress(b"{}")[:-4], "gzip")):
        response = send(client, "/v1/traces", body, media, content_encoding=encoding)
        assert (response.status_code, response.headers["content-type"]) == (400, media)
        message = response.json()["message"] if media == JSON else Status.FromString(response.content).message
        assert message


def test_an_unknown_type_or_coding_is_415(client: httpx.Client) -> None:
    """
    Only what the protocol names is read; a parameter of the content type does no harm.
    """
    assert send(client, "/v1/traces", b"", "text/plain").status_code == 415
    assert client.post("/v1/traces", content=b"").status_code == 415
    response = send(client, "/v1/traces", b"", content_encoding="br")
    assert (response.status_code, response.headers["accept-encoding"]) == (415, "gzip")
    assert send(client, "/v1/traces", b"{}", "application/json; charset=utf-8").status_code == 200
    assert client.get("/v1/traces").status_code == 405


def test_too_big_is_413(client: httpx.Client) -> None:
    """
    A body beyond the bound is refused: announced, streamed without a length, and after decompression.
    """
    big = server.MAX_BODY_BYTES + 1
    assert send(client, "/v1/traces", b"x" * big).status_code == 413
    pieces = (b"x" * 1_000_000 for _ in range(big // 1_000_000 + 1))
    assert client.post("/v1/traces", content=pieces, headers={"content-type": PROTOBUF}).status_code == 413
    bomb = gzip.compress(b"\0" * (server.MAX_INFLATED_BYTES + 1))
    assert send(client, "/v1/traces", bomb, content_encoding="gzip").status_code == 413
    assert client.get("/healthz").json()["dropped"]["refused_requests"] == 3


def test_the_query_api(client: httpx.Client) -> None:
    """
    Traces are listed, narrowed, and read whole; what is not there is 404, a wrong limit 400.
    """
    send_checkout(client)
    for query in ("", f"?request_id={quote(REQUEST_ID)}", f"?trace_id={TRACE_ID}", "?service=orders&limit=1"):
        (summary,) = client.get(f"/api/traces{query}").json()["traces"]
        assert (summary["trace_id"], summary["spans"], summary["logs"]) == (TRACE_ID, 5, 3)
    assert client.get("/api/traces?service=nobody").json() == {"traces": []}
    assert trace_from_json(client.get(f"/api/traces/{TRACE_ID}").json()) == checkout()
    assert client.get("/api/traces/" + "f" * 32).status_code == 404
    assert client.get("/api/find/nothing").json() == {"traces": []}
    for limit in ("0", "-1", "x", "", "201", "9" * 5000):
        assert client.get(f"/api/traces?limit={limit}").status_code == 400


@pytest.mark.parametrize(
    "wanted", ["a/b/../c-and-much-more", "..", "a#b=c+d~e:f", "%2F", "é", "' OR 1=1 --", "x" * 5000]
)
def test_any_id_can_be_asked_for(client: httpx.Client, wanted: str) -> None:
    """
    Ids with slashes, dots, quotes and other alphabets are looked up as they are, never taken for a path or for SQL.
    """
    send_checkout(client)
    path = "/api/find/" + quote(wanted, safe="").replace(".", "%2E")
    assert client.get(path).json() == {"traces": []}


def test_the_page_allows_nothing_but_its_own_files(client: httpx.Client) -> None:
    """
    The page is served with a policy that no injected markup gets around, and loads nothing from elsewhere.
    """
    for path in ("/", "/viewer.js", "/viewer.css", "/api/traces", "/nothing-here"):
        response = client.get(path)
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
    page = client.get("/").text
    assert "http://" not in page
    assert "https://" not in page
    script = client.get("/viewer.js").text
    assert not [
        sink for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(") if sink in script
    ]


PATHS = ("/", "/viewer.js", "/api/traces", f"/api/traces/{TRACE_ID}", f"/api/find/{TRACE_ID}")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_another_sites_page_can_neither_read_nor_send(host: str) -> None:
    """
    A name that somebody lets point at this machine (DNS rebinding) gets no data and leaves none, on any interface.

    Names that were given count, and so does every address: a page has the address as its own name only if it is ours.
    """
    body = traces(checkout().spans).SerializeToString()
    with (
        LocalServer(host, 0, allow_hosts=["Viewer.internal", "host.docker.internal."]) as local,
        httpx.Client(base_url=local.url, trust_env=False) as client,
    ):
        send_checkout(client)
        for name in ("evil.example:4318", "evil.example", "viewer.internal.evil.example", "127.0.0.1.evil.example", ""):
            assert {client.get(path, headers={"host": name}).status_code for path in PATHS} == {421}, name
            response = send(client, "/v1/traces", body, host=name)
            assert (response.status_code, response.headers["content-type"]) == (421, PROTOBUF)
            assert "--allow-host" in Status.FromString(response.content).message
        for name in (
            "localhost:4318",
            "LOCALHOST.",
            "viewer.internal:1",
            "host.docker.internal",
            "192.0.2.7",
            "[::1]:5",
        ):
            assert {client.get(path, headers={"host": name}).status_code for path in PATHS} == {200}, name
            assert send(client, "/v1/traces", body, host=name).status_code == 200


def half_open(local: LocalServer, data: bytes = b"POST /v1/traces HTTP/1.1\r\nhost: x") -> socket.socket:
    raw = socket.create_connection(("127.0.0.1", local.port), timeout=60)
    raw.sendall(data)
    return raw


def all_of(raw: socket.socket) -> bytes:
    """
    Returns what comes until the server ends the connection.
    """
    told = b""
    try:
        while data := raw.recv(65536):
            told += data
    except ConnectionResetError:
        pass
    return told


def test_half_open_connections_take_nobodys_place(local: LocalServer, client: httpx.Client) -> None:
    """
    More connections than the server keeps, each with half a request: everybody else is answered all the same.
    """
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(half_open(local))
        send_checkout(client)
        with httpx.Client(base_url=local.url, trust_env=False) as other:
            assert other.get(f"/api/find/{TRACE_ID}").status_code == 200
            assert other.get("/healthz").json()["dropped"]["connections_ended_for_others"] >= 300 - 200


def test_a_request_that_never_ends_loses_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Neither a head nor a body may take for ever, and bytes that drip give it no more time; the sender of a body is told.
    """
    monkeypatch.setattr(server, "HEAD_S", 0.3)
    monkeypatch.setattr(server, "BODY_S", 0.3)
    announced = b"POST /v1/traces HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/x-protobuf\r\n"
    answered = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with LocalServer(port=0) as local:
        for begin, drop in ((b"", b"G"), (answered, b"G"), (announced + b"content-length: 100000\r\n\r\n", b"x")):
            with half_open(local, begin) as raw:
                raw.settimeout(0.01)
                told = b""
                with contextlib.suppress(ConnectionError):
                    for _ in range(6000):
                        raw.sendall(drop)
                        with contextlib.suppress(TimeoutError):
                            data = raw.recv(65536)
                            told += data
                            if not data:
                                break
                    else:
                        pytest.fail("the connection is still there")
            if begin.startswith(b"POST"):
                assert told.startswith(b"HTTP/1.1 408 ")
                assert b"did not arrive in time" in told
        assert httpx.get(f"{local.url}/healthz", trust_env=False).json()["dropped"]["slow_requests"] == 1


def test_a_connection_is_read_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A body in chunks of one byte takes long to parse: others have their turn every 4 KiB, whatever was sent at once.
    """
    sizes: list[int] = []
    parse = H11Protocol.data_received

    def counted(protocol: H11Protocol, data: bytes) -> None:
        sizes.append(len(data))
        parse(protocol, data)

    monkeypatch.setattr(H11Protocol, "data_received", counted)
    head = b"POST /v1/traces HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    chunks = b"1\r\n{\r\n" + b"1\r\n \r\n" * 20_000 + b"1\r\n}\r\n0\r\n\r\n"
    with LocalServer(port=0) as local, half_open(local, head + b"transfer-encoding: chunked\r\n\r\n" + chunks) as raw:
        assert all_of(raw).startswith(b"HTTP/1.1 200 ")
    assert max(sizes) <= 4096
    assert sum(sizes) > len(chunks)


def test_an_answer_that_nobody_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A caller that asks for megabytes and reads none of them holds neither a connection nor the bytes.
    """
    monkeypatch.setattr(server, "REQUEST_S", 1.0)
    with LocalServer(port=0) as local:
        local.store.add(
            tuple(replace(checkout().spans[0], span_id=f"{n:016x}", name="x" * 9000) for n in range(900)), ()
        )
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.settimeout(60)
            raw.connect(("127.0.0.1", local.port))
            raw.sendall(f"GET /api/traces/{TRACE_ID} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
            with httpx.Client(base_url=local.url, trust_env=False) as client:
                for _ in range(6000):
                    if client.get("/healthz").json()["dropped"]["slow_requests"]:
                        break
                    assert not local.wait(0.01)
            assert len(all_of(raw)) < 900 * 9000


def test_of_bodies_that_arrive_slowly_the_first_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Bytes of unfinished bodies are bounded together; what is given up is told to come again, and the newcomer is taken.
    """
    monkeypatch.setattr(server, "MAX_ARRIVING_BYTES", 100_000)
    head = (
        b"POST /v1/traces HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    )
    with LocalServer(port=0) as local, half_open(local, head % 90_000 + b" " * 60_000) as first:
        body = b"{" + b" " * 79_998 + b"}"
        assert httpx.post(f"{local.url}/v1/traces", content=body, headers={"content-type": JSON}).status_code == 200
        told = all_of(first)
    assert told.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 1" in told


@pytest.mark.parametrize("media", [PROTOBUF, JSON])
def test_a_small_body_that_becomes_millions_of_messages_is_413(client: httpx.Client, media: str) -> None:
    """
    65 kB of gzip that hold 64 MiB of empty messages are refused with a Status; the next payload is taken.
    """
    many = b'{"resourceSpans":[' + b"{}," * 5_000_000 + b"{}]}" if media == JSON else b"\x0a\x00" * (32 * 1024 * 1024)
    response = send(client, "/v1/traces", gzip.compress(many), media, content_encoding="gzip")
    assert (response.status_code, response.headers["content-type"]) == (413, media)
    send_checkout(client)


def test_nothing_that_grows_runs_on_the_event_loop(
    local: LocalServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A story is told in a thread of its own, so that a large one keeps nobody waiting.
    """
    seen: list[str] = []

    def told(trace: Trace) -> dict[str, Json]:
        seen.append(threading.current_thread().name)
        return as_json(trace)

    monkeypatch.setattr(server, "as_json", told)
    send_checkout(client)
    for path in (f"/api/traces/{TRACE_ID}", f"/api/find/{TRACE_ID}"):
        assert client.get(path).status_code == 200
    assert [name.startswith("otel-correlation-teller") for name in seen] == [True, True]


def test_log_lines_without_a_trace_are_counted(client: httpx.Client) -> None:
    """
    Start-up lines are no error of the sender, and what is not kept is counted.
    """
    response = send(client, "/v1/logs", logs([log(0, "s", "start-up", trace_id="")]).SerializeToString())
    assert (response.status_code, response.content) == (200, b"")
    assert client.get("/healthz").json()["dropped"]["logs_without_trace"] == 1


def test_raw_bytes_on_the_port_do_no_harm(
    local: LocalServer, client: httpx.Client, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    What is no HTTP (a browser's TLS, a gRPC sender) is refused without a word on the terminal, and the server goes on.
    """
    for data in (b"\x16\x03\x01\x02\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0" * 100 + b"\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", local.port), timeout=10) as raw:
            raw.sendall(data)
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(65536):
                pass
    assert client.get("/healthz").status_code == 200
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_port_in_use_fails_at_once() -> None:
    """
    The second server on a port says so when it is made, not later in a thread; the first one goes on.
    """
    with LocalServer(port=0) as first, httpx.Client(trust_env=False) as client:
        with pytest.raises(OSError, match="in use"):
            LocalServer(port=first.port)
        assert client.get(f"{first.url}/healthz").status_code == 200


def test_the_server_ends_with_its_block() -> None:
    """
    After the block nothing listens and no thread is left, an idle keep-alive connection notwithstanding.
    """
    with httpx.Client(trust_env=False) as client:
        with LocalServer(port=0) as local:
            client.get(f"{local.url}/healthz")
        assert local.wait(0)
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", local.port)) != 0


def test_urls_are_ones_that_a_browser_takes() -> None:
    """
    An address for all interfaces is shown as loopback, IPv6 in brackets.
    """
    with LocalServer("0.0.0.0", 0) as everywhere:
        assert everywhere.url == f"http://127.0.0.1:{everywhere.port}"
        assert not everywhere.loopback
    if socket.has_ipv6:
        try:
            six = LocalServer("::1", 0)
        except OSError:
            return
        with six, httpx.Client(trust_env=False) as client:
            assert six.url == f"http://[::1]:{six.port}"
            assert client.get(f"{six.url}/").status_code == 200


def test_uvicorns_loggers_are_left_to_the_application(local: LocalServer) -> None:
    """
    Serving inside another program adds no handler to its logging.
    """
    assert local.url
    assert logging.getLogger("uvicorn").handlers == []


def test_a_flood_is_told_to_come_again(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    When too much waits for the store, the sender gets a retryable 503 with Retry-After, and nothing is lost silently.
    """
    monkeypatch.setattr(server, "MAX_PENDING_BYTES", 0)
    response = send(client, "/v1/traces", traces(checkout().spans).SerializeToString())
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    monkeypatch.undo()
    send_checkout(client)


def test_a_store_that_cannot_write_is_503() -> None:
    """
    A full disk is the sender's reason to try again, not to drop: 503 with the database's own words.
    """

    class FullDisk:
        def add(self, *_parts: object) -> Future[None]:
            done: Future[None] = Future()
            done.set_exception(sqlite3.OperationalError("database or disk is full"))
            return done

    async def post() -> httpx.Response:
        viewer = server.Viewer(cast("LocalStore", FullDisk()))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(viewer), base_url="http://viewer") as client:
            body = traces(checkout().spans).SerializeToString()
            return await client.post("/v1/traces", content=body, headers={"content-type": PROTOBUF})

    response = asyncio.run(post())
    assert (response.status_code, "disk is full" in Status.FromString(response.content).message) == (503, True)


def test_many_senders_at_once(local: LocalServer) -> None:
    """
    Batches of many connections are all found afterwards, each trace whole.
    """

    def send_one(number: int) -> int:
        made = [
            replace(part, trace_id=f"{number:032x}", attributes={"request_id": f"r{number}"})
            for part in checkout().spans
        ]
        with httpx.Client(base_url=local.url, trust_env=False) as client:
            return send(client, "/v1/traces", traces(made).SerializeToString()).status_code

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(send_one, range(1, 101))) == {200}
    for number in range(1, 101):
        (found,) = local.store.find(f"r{number}").result()
        assert (found.trace_id, len(found.spans)) == (f"{number:032x}", 5)
