"""
The shipped proxy configurations: nginx's for real, the parts of the others that an nginx or a parser can run.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import socket
import subprocess
import threading
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from otel_correlation.request_id import parse, to_trace_id
from tests.stack.conftest import MACHINE
from tests.stack.harness import ROOT, Machine, eventually
from tests.stack.servers import Nginx, program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.needs("servers")

PROXIES = ROOT / "deploy" / "proxies"
HEX32 = re.compile(rb"[0-9a-f]{32}")


class Upstream(http.server.BaseHTTPRequestHandler):
    """
    A service that keeps the header fields of each request, and answers as its path says.
    """

    protocol_version = "HTTP/1.1"
    seen: list[list[tuple[str, str]]]

    def do_GET(self) -> None:
        """
        Answer 200, the status that the path names, or not at all.
        """
        self.seen.append(self.headers.items())
        what = self.path.partition("?")[0].strip("/")
        if what == "hang-up":
            self.close_connection = True
            return
        if what == "hang":
            self.rfile.read(1)  # Until nginx closes the connection.
            return
        body = b'{"answered by": "the service"}'
        self.send_response(int(what) if what.isdigit() else 200)
        self.send_header("X-Request-ID", self.headers.get("X-Own-Id", self.headers.get("X-Request-ID", "none")))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815 - the base class calls it

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
        """
        Keep the terminal clean.
        """


@dataclass(slots=True)
class Answer:
    """
    A response as its bytes say.
    """

    status: int
    fields: list[tuple[bytes, bytes]]
    body: bytes

    def values(self, name: bytes) -> list[bytes]:
        """
        Return the values of all fields of that name.
        """
        return [value for key, value in self.fields if key.lower() == name]


@dataclass(slots=True)
class Proxy:
    """
    A running nginx in front of an ``Upstream``.
    """

    port: int
    log: Path
    seen: list[list[tuple[str, str]]] = field(default_factory=list)

    def ask(self, request: bytes) -> Answer:
        """
        Send the bytes of one request on a connection of its own.
        """
        with socket.create_connection(("127.0.0.1", self.port), 60) as connection:
            connection.sendall(request)
            with connection.makefile("rb") as reader:
                status = int(reader.readline().split()[1])
                fields = []
                while (line := reader.readline()) not in (b"\r\n", b""):
                    name, _, value = line.partition(b":")
                    fields.append((name, value.strip()))
                return Answer(status, fields, reader.read())

    def get(self, path: bytes, *headers: bytes) -> Answer:
        """
        Send a GET with these header lines.
        """
        lines = [b"GET " + path + b" HTTP/1.1", b"Host: shop.example", b"Connection: close", *headers]
        return self.ask(b"\r\n".join(lines) + b"\r\n\r\n")

    def line(self, request_id: bytes) -> dict[str, Any]:
        """
        Return the one line of the access log with this id.
        """

        def lines() -> list[dict[str, Any]]:
            # Decoding is strict: each line must be UTF-8 and JSON.
            every = [json.loads(line) for line in self.log.read_bytes().decode().splitlines()]
            return [line for line in every if line["request_id"] == request_id.decode()]

        (line,) = eventually(f"the line of {request_id!r}", lines)
        return line

    def forwarded(self) -> list[bytes]:
        """
        Return the values of all X-Request-ID fields of the newest request that the service got.
        """
        return [value.encode("latin-1") for name, value in self.seen[-1] if name.lower() == "x-request-id"]


CONFIG = """
events {{}}
http {{
    {head}
    include {proxies}/nginx/request-id.http.conf;
    server {{
        listen 127.0.0.1:{port};
        access_log {directory}/access.log correlated;
        client_max_body_size 1k;
        proxy_read_timeout 1s;
        include {proxies}/nginx/request-id.server.conf;
        location / {{ proxy_pass http://127.0.0.1:{upstream}; }}
        location /gone {{ proxy_pass http://127.0.0.1:{nobody}; }}
        location /static/ {{ root {directory}; }}
    }}
}}
"""


def head(directory: Path) -> str:
    """
    Return what any nginx here needs: folders that it may write, as whoever runs the tests.
    """
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    return " ".join(f"{kind}_temp_path {directory}/temporary;" for kind in kinds)


def as_root(config: str) -> str:
    """
    Let the workers of a root's nginx stay root: the tests' folders are closed to others.
    """
    return config if os.geteuid() else f"user root;\n{config}"


@pytest.fixture(scope="module")
def service() -> Iterator[type[Upstream]]:
    """
    A service on a port of its own; ``port`` and ``seen`` are attributes of its class.
    """
    handler = type("Handler", (Upstream,), {"seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.port = server.server_address[1]  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def proxy(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, service: type[Upstream]
) -> Iterator[Proxy]:
    """
    One nginx with the shipped snippets for the tests of this module.
    """
    directory = tmp_path_factory.mktemp("proxy")
    machine = request.node.stash[MACHINE] = Machine(directory)
    (directory / "static").mkdir()
    (directory / "static" / "shop.css").write_text("body {}\n")
    port = machine.port()
    config = directory / "nginx.conf"
    text = CONFIG.format(
        head=head(directory),
        proxies=PROXIES,
        port=port,
        directory=directory,
        upstream=service.port,  # type: ignore[attr-defined]
        nobody=machine.port(),
    )
    config.write_text(as_root(text))
    try:
        Nginx(machine, config, port).start()
        yield Proxy(port, directory / "access.log", service.seen)
    finally:
        machine.clean_up()


BYTES = st.binary(max_size=260).filter(lambda value: not set(value) & set(b"\r\n\0"))
IDS = st.text("ABCxyz019._~:/+=#-", min_size=1, max_size=210).map(str.encode)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(BYTES | IDS)
@example(b"a" * 200)
@example(b"a" * 201)
@example(b"ada@example.com")
@example(b"a, b")
@example(b"\xc3\xa9")
def test_nginx_takes_exactly_the_ids_that_the_contract_takes(proxy: Proxy, value: bytes) -> None:
    """
    Whatever bytes arrive, the service sees one field: the value where ``request_id.parse`` takes it, else 32 hex digits.
    """
    answer = proxy.get(b"/", b"X-Request-ID: " + value)
    if answer.status == 400:  # Not HTTP for nginx: no service is asked.
        assert parse(value.strip(b" ")) is None
        return
    (forwarded,) = proxy.forwarded()
    valid = parse(value.strip(b" "))
    assert forwarded == (valid.encode() if valid else forwarded)
    assert valid or HEX32.fullmatch(forwarded)
    assert answer.values(b"x-request-id") == [forwarded]


def test_without_an_id_one_is_made_and_is_the_trace(proxy: Proxy) -> None:
    """
    The id is 32 random hex digits, the same on the request, the response and the line, whose trace id it is.
    """
    answers = [proxy.get(b"/lamp?token=s3cret", b"Referer: http://shop.example/?token=s3cret") for _ in range(2)]
    ids = [answer.values(b"x-request-id")[0] for answer in answers]
    assert ids[0] != ids[1]
    assert proxy.forwarded() == [ids[1]]
    line = proxy.line(ids[1])
    assert (line["trace_id"], line["path"], line["status"]) == (ids[1].decode(), "/lamp", 200)
    assert (line["answered_by"], line["upstream_status"]) == ("upstream", "200")
    assert b"s3cret" not in proxy.log.read_bytes()


def test_of_two_ids_the_service_sees_one(proxy: Proxy) -> None:
    """
    An nginx before 1.23 takes the first of two fields, a newer one replaces both; the service never has to choose.
    """
    answer = proxy.get(b"/", b"X-Request-ID: first-of-the-two-ids", b"x-request-id: second-of-the-two-ids")
    (forwarded,) = proxy.forwarded()
    assert forwarded == b"first-of-the-two-ids" or HEX32.fullmatch(forwarded)
    assert answer.values(b"x-request-id") == [forwarded]


@pytest.mark.parametrize(
    "request_id",
    [uuid.uuid4().hex, str(uuid.uuid4()), "f4a2b3c1-dead-beef-0000-aabbccddeeff", "0" * 32, "ticket-4711"],
    ids=["hex", "uuid", "odd-uuid", "zero", "text"],
)
def test_the_lines_trace_id_is_the_one_that_the_services_use(proxy: Proxy, request_id: str) -> None:
    """
    For ids whose bits are the trace id the line has them; for others it is empty rather than wrong.
    """
    proxy.get(b"/", b"X-Request-ID: " + request_id.encode())
    bits = to_trace_id(request_id)
    shown = f"{bits:032x}" if bits and re.fullmatch("[0-9a-f-]{32,36}", request_id) else ""
    assert proxy.line(request_id.encode())["trace_id"] == shown


TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("traceparent", "continued"),
    [
        (f"00-{TRACE}-{PARENT}-01", True),
        (f"00-{'0' * 32}-{PARENT}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE.upper()}-{PARENT}-01", False),
        (f"00-{TRACE}-{PARENT}-01-more", False),
        ("rubbish", False),
    ],
)
def test_a_traceparent_passes_and_names_the_trace(proxy: Proxy, traceparent: str, *, continued: bool) -> None:
    """
    The service sees traceparent and tracestate as sent; the line has the caller's trace id where the field is valid.
    """
    request_id = uuid.uuid4().hex
    proxy.get(
        b"/",
        f"traceparent: {traceparent}".encode(),
        b"tracestate: shop=1",
        f"X-Request-ID: {request_id}".encode(),
    )
    seen = dict(proxy.seen[-1])
    assert (seen["traceparent"], seen["tracestate"]) == (traceparent, "shop=1")
    assert proxy.line(request_id.encode())["trace_id"] == (TRACE if continued else request_id)


REQUESTS = {
    413: b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 9999\r\n\r\n",
    404: b"GET /static/nothing HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    405: b"POST /static/shop.css HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
    502: b"GET /gone HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    504: b"GET /hang HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
}


@pytest.mark.parametrize("status", REQUESTS)
def test_nginxs_own_errors_carry_the_id(proxy: Proxy, status: int) -> None:
    """
    The header, the problem document and the line of nginx's own error agree, and say that the proxy answered.
    """
    answer = proxy.ask(REQUESTS[status])
    (request_id,) = answer.values(b"x-request-id")
    assert answer.status == status
    assert answer.values(b"content-type") == [b"application/problem+json"]
    assert json.loads(answer.body) == {
        "title": "The proxy answered",
        "status": status,
        "request_id": request_id.decode(),
    }
    line = proxy.line(request_id)
    assert (line["status"], line["answered_by"]) == (status, "proxy")


@pytest.mark.parametrize(
    ("status", "request_bytes"),
    [
        (414, b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
        (400, b"rubbish\r\n\r\n"),
    ],
)
def test_what_is_no_request_has_an_id_as_well(proxy: Proxy, status: int, request_bytes: bytes) -> None:
    """
    Before nginx knows what is asked it answers with its own page; the id is on it and in the line.
    """
    answer = proxy.ask(request_bytes)
    (request_id,) = answer.values(b"x-request-id")
    assert (answer.status, proxy.line(request_id)["status"]) == (status, status)


def test_a_service_that_hangs_up_is_told_from_one_that_is_gone(proxy: Proxy) -> None:
    """
    Both are a 502 of nginx; only the one that hung up has a connect time in the line.
    """
    lines = [proxy.line(proxy.get(path).values(b"x-request-id")[0]) for path in (b"/hang-up", b"/gone")]
    assert [(line["status"], line["answered_by"]) for line in lines] == [(502, "proxy")] * 2
    assert [line["upstream_connect_s"] == "-" for line in lines] == [False, True]


@pytest.mark.parametrize("status", [404, 413, 500, 502, 503, 504])
def test_a_services_errors_pass_unchanged(proxy: Proxy, status: int) -> None:
    """
    A service's own error keeps its body, carries the id once although both sent it, and is known as the service's.
    """
    answer = proxy.get(b"/%d" % status)
    (request_id,) = answer.values(b"x-request-id")
    assert (answer.status, answer.body) == (status, b'{"answered by": "the service"}')
    assert proxy.line(request_id)["answered_by"] == "upstream"


@pytest.mark.parametrize(("own", "kept"), [(b"an-id-that-the-service-made", True), (b"two words", False)])
def test_a_services_own_id_is_what_the_caller_is_told(proxy: Proxy, own: bytes, *, kept: bool) -> None:
    """
    A service that restarts ids answers with its own: the caller gets that one if it is safe, and the line has both.
    """
    request_id = uuid.uuid4().hex.encode()
    answer = proxy.get(b"/", b"X-Request-ID: " + request_id, b"X-Own-Id: " + own)
    told = own if kept else request_id
    assert answer.values(b"x-request-id") == [told]
    assert proxy.line(request_id)["response_id"] == told.decode()


@pytest.mark.parametrize("path", [b"/%22%5c%0a%ff", b'/"\\', b"/\xff\xfe", b"/\x7f"])
def test_no_path_breaks_a_line(proxy: Proxy, path: bytes) -> None:
    """
    Quotes, line feeds and bytes that are no UTF-8 leave each line one JSON object.
    """
    answer = proxy.get(path)
    proxy.line(answer.values(b"x-request-id")[0])


def test_nginx_as_the_gate_takes_nothing_from_outside(machine: Machine, service: type[Upstream]) -> None:
    """
    With the two lines taken out and the three put in that the how-to names, neither the caller's id nor its trace gets in.
    """
    snippets = machine.directory / "nginx"
    snippets.mkdir()
    http = (PROXIES / "nginx" / "request-id.http.conf").read_text()
    kept = [line for line in http.splitlines() if '"$http_x_request_id"' not in line and "callers_trace" not in line]
    assert len(kept) == len(http.splitlines()) - 2
    (snippets / "request-id.http.conf").write_text("\n".join(kept))
    cleared = "".join(f'proxy_set_header {name} "";\n' for name in ("traceparent", "tracestate", "baggage"))
    (snippets / "request-id.server.conf").write_text(
        cleared + (PROXIES / "nginx" / "request-id.server.conf").read_text()
    )
    port = machine.port()
    config = machine.directory / "nginx.conf"
    config.write_text(
        as_root(
            CONFIG.format(
                head=head(machine.directory),
                proxies=machine.directory,
                port=port,
                directory=machine.directory,
                upstream=service.port,  # type: ignore[attr-defined]
                nobody=machine.port(),
            )
        )
    )
    Nginx(machine, config, port).start()
    proxy = Proxy(port, machine.directory / "access.log", service.seen)
    answer = proxy.get(
        b"/", b"X-Request-ID: " + b"a" * 32, f"traceparent: 00-{TRACE}-{PARENT}-01".encode(), b"baggage: a=1"
    )
    (request_id,) = answer.values(b"x-request-id")
    assert HEX32.fullmatch(request_id)
    assert request_id != b"a" * 32
    names = {name.lower() for name, _ in proxy.seen[-1]}
    assert not names & {"traceparent", "tracestate", "baggage"}
    assert proxy.line(request_id)["trace_id"] == request_id.decode()


INGRESS = """
events {{}}
http {{
    {head}
    log_format upstreaminfo escape=json '{format}';
    access_log {directory}/ingress.log upstreaminfo;
    map $http_x_request_id $req_id {{
        default   $http_x_request_id;
        ""        $request_id;
    }}
    {snippet}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            set $namespace shop;
            set $ingress_name front;
            set $service_name checkout;
            proxy_set_header X-Request-ID $req_id;
            proxy_hide_header X-Request-ID;
            add_header X-Request-ID {header} always;
            proxy_pass http://127.0.0.1:{upstream};
        }}
    }}
}}
"""


def test_the_ingress_snippet_replaces_the_controllers_own_map(machine: Machine, service: type[Upstream]) -> None:
    """
    Put where ingress-nginx's template puts it, after the controller's map, the snippet decides: unsafe ids are replaced.
    """
    main, headers = yaml.safe_load_all((PROXIES / "ingress-nginx" / "request-id.yaml").read_text())
    assert {type(value) for value in (main["data"] | headers["data"]).values()} == {str}
    assert main["data"]["add-headers"] == f"{headers['metadata']['namespace']}/{headers['metadata']['name']}"
    port = machine.port()
    config = machine.directory / "nginx.conf"
    text = INGRESS.format(
        head=head(machine.directory),
        format=main["data"]["log-format-upstream"],
        snippet=main["data"]["http-snippet"],
        header=headers["data"]["X-Request-ID"],
        directory=machine.directory,
        port=port,
        upstream=service.port,  # type: ignore[attr-defined]
    )
    config.write_text(as_root(text))
    Nginx(machine, config, port).start()
    proxy = Proxy(port, machine.directory / "ingress.log", service.seen)
    for sent, kept in ((b"ticket/4711#a", True), (b"two words", False), (b"", False)):
        answer = proxy.get(b"/lamp?token=s3cret", b"X-Request-ID: " + sent)
        (forwarded,) = proxy.forwarded()
        assert forwarded == sent if kept else HEX32.fullmatch(forwarded)
        assert answer.values(b"x-request-id") == [forwarded]
        line = proxy.line(forwarded)
        assert (line["path"], line["answered_by"], line["ingress"]) == ("/lamp", "upstream", "shop/front")
        assert line["trace_id"] == ("" if kept else forwarded.decode())


def test_the_kong_snippet_is_what_kong_reads() -> None:
    """
    It is declarative configuration of format 3.0; its alphabet and its length are the contract's.
    """
    document = yaml.safe_load((PROXIES / "kong" / "request-id.yaml").read_text())
    assert document["_format_version"] == "3.0"
    plugins = {plugin["name"]: plugin["config"] for plugin in document["plugins"]}
    assert plugins["correlation-id"] == {"header_name": "X-Request-ID", "generator": "uuid", "echo_downstream": True}
    (code,) = plugins["pre-function"]["rewrite"]
    (limit,) = re.findall(r"#id > (\d+)", code)
    assert (parse(b"a" * int(limit)), parse(b"a" * (int(limit) + 1))) == ("a" * 200, None)
    # A class of Lua without escapes means what a class of Python means.
    (alphabet,) = re.findall(r'"\^\[(.+)\]\+\$"', code)
    assert "%" not in alphabet
    for byte in range(256):
        assert bool(re.fullmatch(f"[{alphabet}]", chr(byte))) == (parse(bytes([byte])) is not None)


def test_the_shipped_example_is_a_valid_configuration(tmp_path: Path) -> None:
    """
    The configuration that the how-to shows passes ``nginx -t`` with the shipped snippets beside it.
    """
    page = (ROOT / "docs" / "how-to" / "proxies.md").read_text()
    (shown,) = re.findall(r"```nginx\n(.*?)```", page, re.DOTALL)
    (tmp_path / "nginx.conf").write_text(f"events {{}}\n{shown.replace('/var/log/nginx', str(tmp_path))}")
    for snippet in (PROXIES / "nginx").glob("*.conf"):
        (tmp_path / snippet.name).write_text(snippet.read_text())
    command = [
        str(program("nginx")),
        "-t",
        "-e",
        "stderr",
        "-g",
        f"pid {tmp_path}/pid;",
        "-c",
        str(tmp_path / "nginx.conf"),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stderr
