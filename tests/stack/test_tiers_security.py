"""
Agent, gateway, router and sampler keep secrets: nothing planted arrives or lies on disk, and with TLS nobody gets in or reads.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import grpc  # type: ignore[import-untyped]
import httpx
import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue, KeyValueList
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, ResourceLogs, ScopeLogs
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    AggregationTemporality,
    Exemplar,
    Histogram,
    HistogramDataPoint,
    Metric,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status

from tests.stack.conftest import MACHINE
from tests.stack.engines import Tier
from tests.stack.harness import Machine, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

CARD = "4111111111111111"
ID = "5500005555555559"  # An id is for finding, whatever it looks like.
OK = grpc.StatusCode.OK
SIGNALS = {"traces": "trace.v1.TraceService", "logs": "logs.v1.LogsService", "metrics": "metrics.v1.MetricsService"}

# What must not leave, as it stands in texts: messages, names, bodies, attributes that nobody thought of.
TEXTS = [
    f"paid with {CARD}",
    "paid with 5500 0055 5555 5559, thanks",
    "3782-822463-10005",
    "6011000990139424",
    "diners 30569309025904 jcb 3530111333300000 unionpay 6200000000000005",
    f"scan_{CARD}_front.png",
    "Jane <jane.planted@shop.example.co.uk> was not found",
    "mailto:jane.planted%40example.com",
    "GET /login?user=7&password=planted1&page=2",
    "postgresql://shop:planted2@db:5432/shop",
    "Authorization: Bearer planted3",
    "{'Authorization': ['Basic planted4']}",
    "request had Bearer planted5planted5planted5",
    "Set-Cookie: session=planted6; HttpOnly",
    '{"cookie": ["session=planted7"]}',
    '{"clientSecret": "planted8", "user": 7}',
    r'{"body": "{\"accessToken\": \"planted9\", \"n\": 1}"}',
    "SELECT 1 WHERE api_key = 'planted 10'",
    "eyJhbGciOiJub25lIn0.eyJzdWIiOiJwbGFudGVkIn0.c2lnbmF0dXJl",
    "AKIAPLANTED234567890 is the key",
    "ghp_planted11planted11planted11planted11",
    "sk_live_planted12planted12",
    "-----BEGIN PRIVATE KEY-----\nplanted13\nplanted13\n-----END PRIVATE KEY-----",
]
# What must not leave because of the key that it stands under.
KEYS: dict[str, Any] = {
    "http.request.header.authorization": ["Bearer planted21"],
    "http.request.header.cookie": ["session=planted22"],
    "http.response.header.set-cookie": ["session=planted23"],
    "db.password": "planted24",
    "clientSecret": "planted25",
    "access_token": "planted26",
    "x-api-key": "planted27",
    "card.number": int(CARD),
    "cards": [CARD, "none"],
    "login": {
        "user": 7,
        "password": "planted28",
        "nested": {"refreshToken": "planted29", "mail": "jane.planted@a.example"},
    },
}
CARDS = (CARD, "0055 5555", "822463", "6011000990139424", "30569309025904", "3530111333300000", "6200000000000005")
SECRETS = (*CARDS, "planted", "PLANTED", "eyJhbGci")
# What a trace or a line is found by, and what only looks like a secret.
KEPT: dict[str, Any] = {
    "request_id": ID,
    "http.request.header.x-request-id": [ID],
    "http.route": "/tokens/{token}/cookies",
    "url.path": "/customers/00000000-4111-1111-1111-111111111111/orders",
    "session.id": "f4a2b3c1-dead-beef-0000-aabbccddeeff",
    "order": "4bf92f3577b34da6a3ce929d0e0e4736",
    "http.response.status_code": 500,
    "gen_ai.usage.input_tokens": 4111,
    "gen_ai.token.type": "input",
    "messaging.kafka.message.offset": 1763700000000,
    "started": "1763700000123456789 or 20261121110000",
    "db.query.text": "SELECT id FROM secrets WHERE token_count > 3 AND cookies IS NULL",
    "exception.message": "expected 200 tokens, got 199",
}


def any_value(value: Any) -> AnyValue:
    """
    Return a value as OTLP has it.
    """
    if isinstance(value, dict):
        return AnyValue(kvlist_value=KeyValueList(values=pairs(value)))
    if isinstance(value, list):
        return AnyValue(array_value=ArrayValue(values=[any_value(entry) for entry in value]))
    return AnyValue(string_value=value) if isinstance(value, str) else AnyValue(int_value=value)


def pairs(attributes: Mapping[str, Any]) -> list[KeyValue]:
    """
    Return attributes as OTLP has them.
    """
    return [KeyValue(key=key, value=any_value(value)) for key, value in attributes.items()]


PLANTED = pairs({f"text.{number}": text for number, text in enumerate(TEXTS)} | KEYS)
RESOURCE = Resource(attributes=[*pairs({"service.name": "redaction"}), *PLANTED])
SCOPE = InstrumentationScope(name="stack", attributes=PLANTED)


def traces(name: str = "GET /orders", **parts: Any) -> ExportTraceServiceRequest:
    """
    Return a request with one span that is a trace of its own.
    """
    span = Span(
        name=name,
        trace_id=secrets.token_bytes(16),
        span_id=secrets.token_bytes(8),
        start_time_unix_nano=1_763_700_000_000_000_000,
        end_time_unix_nano=1_763_700_000_001_000_000,
        **parts,
    )
    resource = Resource(attributes=pairs({"service.name": "tls"}))
    return ExportTraceServiceRequest(
        resource_spans=[ResourceSpans(resource=resource, scope_spans=[ScopeSpans(spans=[span])])]
    )


def planted_traces() -> ExportTraceServiceRequest:
    """
    Return one span per text, with the text as name, status and event, and everything else in every attribute.
    """
    request = ExportTraceServiceRequest()
    group = request.resource_spans.add(resource=RESOURCE).scope_spans.add(scope=SCOPE)
    for text in [*TEXTS, "kept"]:
        (span,) = (
            traces(
                text,
                attributes=[*PLANTED, *pairs(KEPT)],
                events=[Span.Event(name=text, attributes=[*PLANTED, *pairs(KEPT)])],
                links=[Span.Link(trace_id=b"l" * 16, span_id=b"k" * 8)],
                status=Status(code=Status.STATUS_CODE_ERROR, message=text),
            )
            .resource_spans[0]
            .scope_spans[0]
            .spans
        )
        group.spans.append(span)
    return request


def planted_logs() -> ExportLogsServiceRequest:
    """
    Return one record per text, with the text as body and event name; and bodies that are maps and lists.
    """
    bodies: list[Any] = [*TEXTS, TEXTS, KEYS | KEPT, {"deep": [{"er": KEYS | KEPT}]}]
    records = [
        LogRecord(
            body=any_value(body), event_name=str(body)[:100], attributes=[*PLANTED, *pairs(KEPT)], time_unix_nano=1
        )
        for body in bodies
    ]
    return ExportLogsServiceRequest(
        resource_logs=[ResourceLogs(resource=RESOURCE, scope_logs=[ScopeLogs(scope=SCOPE, log_records=records)])]
    )


def planted_metrics() -> ExportMetricsServiceRequest:
    """
    Return one histogram whose attributes and examples have everything that may not leave.
    """
    point = HistogramDataPoint(
        attributes=[*PLANTED, *pairs({"http.route": "/orders"})],
        count=1,
        sum=0.5,
        bucket_counts=[1, 0],
        explicit_bounds=[1.0],
        time_unix_nano=1_763_700_000_000_000_000,
        exemplars=[Exemplar(filtered_attributes=PLANTED, as_double=0.5, trace_id=b"t" * 16, span_id=b"s" * 8)],
    )
    histogram = Histogram(
        data_points=[point], aggregation_temporality=AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
    )
    metric = Metric(name="http.server.request.duration", unit="s", histogram=histogram)
    return ExportMetricsServiceRequest(
        resource_metrics=[
            ResourceMetrics(resource=RESOURCE, scope_metrics=[ScopeMetrics(scope=SCOPE, metrics=[metric])])
        ]
    )


def post(
    address: str, request: Any, *, context: ssl.SSLContext | None = None, headers: dict[str, str] | None = None
) -> int:
    """
    Send one export request over HTTP and return the status; without a context it is plain text.
    """
    signal = next(name for name in SIGNALS if name in type(request).__name__.lower().replace("trace", "traces"))
    scheme = "https" if context else "http"
    with httpx.Client(trust_env=False, timeout=30, verify=context or True) as client:
        body = request.SerializeToString()
        headers = {"Content-Type": "application/x-protobuf", **(headers or {})}
        return client.post(f"{scheme}://{address}/v1/{signal}", content=body, headers=headers).status_code


def call(
    address: str,
    request: Any,
    *,
    credentials: grpc.ChannelCredentials | None = None,
    metadata: list[tuple[str, str]] | None = None,
) -> grpc.StatusCode:
    """
    Send one export request over gRPC and return the status; without credentials it is plain text.
    """
    make: Callable[..., Any] = grpc.insecure_channel
    arguments = (address,) if credentials is None else (address, credentials)
    if credentials is not None:
        make = grpc.secure_channel
    with make(*arguments) as channel:
        method = channel.unary_unary(f"/opentelemetry.proto.collector.{SIGNALS['traces']}/Export")
        try:
            method(request.SerializeToString(), timeout=30, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
    return OK


class Store:
    """
    Takes spans and records over OTLP/gRPC as a store does, and keeps the bytes.
    """

    def __init__(self, port: int) -> None:
        self.endpoint = f"127.0.0.1:{port}"
        self.received: dict[str, list[bytes]] = {signal: [] for signal in SIGNALS}

    def __enter__(self) -> Self:
        self._server = grpc.server(ThreadPoolExecutor(2))
        for signal, service in SIGNALS.items():
            handler = grpc.unary_unary_rpc_method_handler(partial(self._keep, signal))
            generic = grpc.method_handlers_generic_handler(
                f"opentelemetry.proto.collector.{service}", {"Export": handler}
            )
            self._server.add_generic_rpc_handlers((generic,))
        assert self._server.add_insecure_port(self.endpoint)
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()

    def _keep(self, signal: str, request: bytes, _: object) -> bytes:
        self.received[signal].append(request)
        return b""  # An empty response, which says that all was taken.

    def spans(self) -> list[Span]:
        """
        Return every span so far.
        """
        requests = [ExportTraceServiceRequest.FromString(body) for body in self.received["traces"]]
        return [span for r in requests for group in r.resource_spans for s in group.scope_spans for span in s.spans]

    def records(self) -> list[LogRecord]:
        """
        Return every log record so far.
        """
        requests = [ExportLogsServiceRequest.FromString(body) for body in self.received["logs"]]
        return [log for r in requests for group in r.resource_logs for s in group.scope_logs for log in s.log_records]


class Tap(socketserver.ThreadingTCPServer):
    """
    Somebody on the wire: forwards connections to ``target`` and keeps every byte of both directions.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, target: str) -> None:
        self.target = target
        self.heard = bytearray()
        super().__init__(("127.0.0.1", 0), Listener)
        self.endpoint = f"127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


def read(heard: bytes | bytearray) -> bytes:
    """
    Return what somebody on the wire can read: the bytes themselves, and whatever in them is compressed.
    """
    data = bytes(heard)
    texts = [data]
    for start in (match.start() for match in re.finditer(b"\x1f\x8b\x08", data)):
        with contextlib.suppress(zlib.error):
            texts.append(zlib.decompressobj(wbits=31).decompress(data[start:]))
    return b"\n".join(texts)


class Listener(socketserver.BaseRequestHandler):
    """
    One connection through the tap.
    """

    def handle(self) -> None:
        """
        Forward until either side closes.
        """
        tap = self.server
        assert isinstance(tap, Tap)
        host, _, port = tap.target.rpartition(":")
        try:
            onward = socket.create_connection((host, int(port)))
        except OSError:
            return
        with onward:
            back = threading.Thread(target=self._pump, args=(tap, onward, self.request), daemon=True)
            back.start()
            self._pump(tap, self.request, onward)
            back.join()

    @staticmethod
    def _pump(tap: Tap, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                tap.heard += data
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True, slots=True)
class Identity:
    """
    The files of one side: certificate, key, and the authority whose certificates it accepts.
    """

    certificate: Path
    key: Path
    authority: Path

    def environment(self) -> dict[str, str]:
        """
        Return what the TLS overlays read.
        """
        return {
            "COLLECTOR_TLS_CERT": str(self.certificate),
            "COLLECTOR_TLS_KEY": str(self.key),
            "COLLECTOR_TLS_CA": str(self.authority),
        }

    def context(self, *, show: bool = True) -> ssl.SSLContext:
        """
        Return a client's context, with the certificate to show or without.
        """
        context = ssl.create_default_context(cafile=self.authority)
        if show:
            context.load_cert_chain(self.certificate, self.key)
        return context

    def credentials(self, *, show: bool = True) -> grpc.ChannelCredentials:
        """
        Return the same for gRPC.
        """
        authority = self.authority.read_bytes()
        if not show:
            return grpc.ssl_channel_credentials(authority)
        return grpc.ssl_channel_credentials(authority, self.key.read_bytes(), self.certificate.read_bytes())


def certify(directory: Path, name: str, *extensions: str, issuer: str = "") -> None:
    """
    Make ``name.crt`` and ``name.key``, signed by ``issuer`` or by itself.
    """
    config = directory / "openssl.cnf"
    config.write_text("[req]\ndistinguished_name=dn\nprompt=no\n[dn]\nCN=stack\n")
    command = [
        "openssl",
        "req",
        "-x509",
        "-config",
        str(config),
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
    ]
    command += ["-noenc", "-days", "2", "-subj", f"/CN={name}"]
    command += ["-out", f"{directory}/{name}.crt", "-keyout", f"{directory}/{name}.key"]
    for extension in ("subjectKeyIdentifier=hash", "authorityKeyIdentifier=keyid", *extensions):
        command += ["-addext", extension]
    if issuer:
        command += ["-CA", f"{directory}/{issuer}.crt", "-CAkey", f"{directory}/{issuer}.key"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    """
    Two authorities, ours and a stranger's, and from each a certificate for 127.0.0.1.
    """
    directory = tmp_path_factory.mktemp("certificates")
    made = {}
    for name in ("ours", "stranger"):
        certify(directory, f"{name}-ca", "basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign")
        certify(directory, name, "subjectAltName=IP:127.0.0.1", issuer=f"{name}-ca")
        made[name] = Identity(directory / f"{name}.crt", directory / f"{name}.key", directory / "ours-ca.crt")
    return made


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """
    A machine for the tests that look at one run of agent and gateway.
    """
    machine = request.node.stash[MACHINE] = Machine(tmp_path_factory.mktemp("shared"))
    yield machine
    machine.clean_up()


@dataclass(frozen=True, slots=True)
class Run:
    """
    What one run left behind: the queue as it lay on disk, the store, and the pages for Prometheus.
    """

    queue: bytes
    store: Store
    pages: list[str]


def gateway(machine: Machine, store: Store, *overlays: str, **environment: str) -> Tier:
    """
    Return a gateway that decides after a second and sends everything to ``store``.
    """
    settings = {"JAEGER_OTLP_ENDPOINT": store.endpoint, "COLLECTOR_LOGS_EXPORTER": "otlp_grpc/jaeger"}
    return Tier(machine, "gateway", settings | {"SAMPLER_DECISION_WAIT": "1s"} | environment, overlays=overlays)


@pytest.fixture(scope="module")
def run(shared: Machine) -> Iterator[Run]:
    """
    Everything that may not leave, sent to the agent while the gateway is down, and to the gateway itself.
    """
    with Store(shared.port()) as store:
        last = gateway(shared, store)
        agent = Tier(shared, "agent", {"NEXT_OTLP_ENDPOINT": last.grpc})
        agent.start()
        requests = [planted_traces(), planted_logs(), planted_metrics()]
        assert [post(agent.http, request) for request in requests] == [200, 200, 200]
        count = len(TEXTS) + 1 + len(TEXTS) + 3
        eventually("the queue", lambda: agent.queued() >= count)
        queue = b"".join(path.read_bytes() for path in agent.directory.iterdir())
        last.start()
        assert [post(last.http, request) for request in requests] == [200, 200, 200]
        eventually("all spans", lambda: len(store.spans()) >= 2 * (len(TEXTS) + 1))
        eventually("all records", lambda: len(store.records()) >= 2 * (len(TEXTS) + 3))
        pages: list[str] = []

        def page() -> bool:
            url = f"http://{last.environment['METRICS_ENDPOINT']}/metrics"
            kinds = ("text/plain", "application/openmetrics-text; version=1.0.0")
            pages[:] = [httpx.get(url, headers={"Accept": kind}, trust_env=False).text for kind in kinds]
            return all("traces_span_metrics_calls" in text and "http_server_request" in text for text in pages)

        eventually("the metrics", page)
        yield Run(queue, store, pages)


def found_in(text: str | bytes) -> list[str]:
    """
    Return the planted secrets that are in the text.
    """
    data = text if isinstance(text, bytes) else text.encode()
    return [secret for secret in SECRETS if secret.encode() in data]


def test_nothing_planted_arrives(run: Run) -> None:
    """
    No card number, address or credential reaches a store, whichever field of a span or a record it was in.
    """
    found = {signal: found_in(b"".join(bodies)) for signal, bodies in run.store.received.items()}
    assert found == {"traces": [], "logs": [], "metrics": []}


def test_nothing_planted_lies_on_disk(run: Run) -> None:
    """
    The agent's queue has the spans, and no secret, while the gateway is down.
    """
    assert b"f4a2b3c1-dead-beef-0000-aabbccddeeff" in run.queue
    assert found_in(run.queue) == []


def test_nothing_planted_is_offered_to_prometheus(run: Run) -> None:
    """
    Labels, examples and the metrics of spans have no secret either, and examples still lead to a trace.
    """
    assert [found_in(page) for page in run.pages] == [[], []]
    assert (b"t" * 16).hex() in run.pages[1]


def kept(attributes: Any) -> dict[str, AnyValue]:
    """
    Return those attributes that are to arrive as they were.
    """
    return {pair.key: pair.value for pair in attributes if pair.key in KEPT}


def test_what_traces_are_found_by_survives(run: Run) -> None:
    """
    Request ids of digits, paths, timestamps, counts and links arrive unchanged, value and type, through both tiers.
    """
    expected = {key: any_value(value) for key, value in KEPT.items()}
    for span in run.store.spans():
        assert kept(span.attributes) == expected
        assert kept(span.events[0].attributes) == expected
        assert [(link.trace_id, link.span_id) for link in span.links] == [(b"l" * 16, b"k" * 8)]
    for record in run.store.records():
        assert kept(record.attributes) == expected
    bodies = [record.body.kvlist_value for record in run.store.records() if record.body.HasField("kvlist_value")]
    flat = [body for body in bodies if any(pair.key == "request_id" for pair in body.values)]
    assert flat
    assert {pair.value.string_value for body in flat for pair in body.values if pair.key == "request_id"} == {ID}


def test_only_the_secret_part_of_a_text_is_masked(run: Run) -> None:
    """
    Span names, statuses, events, bodies and event names keep what is around a secret; nothing lent is left over.
    """
    expected = {
        "paid with ****",
        "Jane <****> was not found",
        "GET /login?user=7&****&page=2",
        "kept",
        "**** is the key",
    }
    spans = run.store.spans()
    for texts in (
        {span.name for span in spans},
        {span.status.message for span in spans},
        {span.events[0].name for span in spans},
    ):
        assert expected <= texts
    bodies = {record.body.string_value for record in run.store.records()}
    assert expected - {"kept"} <= bodies
    assert expected - {"kept"} <= {record.event_name for record in run.store.records()}
    assert b"lent" not in b"".join(body for bodies in run.store.received.values() for body in bodies)


def assert_not_in_plain(endpoint: str, **options: Any) -> None:
    """
    Assert that a TLS port takes no plain HTTP: 400, or a reset that overtook it, since the server leaves the body unread.
    """
    with contextlib.suppress(httpx.TransportError):
        assert post(endpoint, traces("refused"), **options) == 400


def test_only_the_invited_get_in(machine: Machine, identities: dict[str, Identity]) -> None:
    """
    Inside, a certificate of our authority; outside, a token over TLS: everybody else is refused, on gRPC and on HTTP.

    A token that is added to the file gets in without a restart.
    """
    ours, stranger = identities["ours"], identities["stranger"]
    outside = {"COLLECTOR_OUTSIDE_GRPC_ENDPOINT": f"127.0.0.1:{machine.port()}"}
    outside["COLLECTOR_OUTSIDE_HTTP_ENDPOINT"] = f"127.0.0.1:{machine.port()}"
    tokens = machine.directory / "tokens"
    tokens.write_text("open-sesame\n")
    with Store(machine.port()) as store:
        door = gateway(machine, store, "tls-receiver", "tls-outside", **ours.environment(), **outside)
        door.start(COLLECTOR_TOKEN_FILE=str(tokens))
        g, h = outside.values()
        right, wrong = "Bearer open-sesame", "Bearer open-says-me"

        assert call(door.grpc, traces("refused")) is grpc.StatusCode.UNAVAILABLE
        assert (
            call(door.grpc, traces("refused"), credentials=ours.credentials(show=False)) is grpc.StatusCode.UNAVAILABLE
        )
        assert call(door.grpc, traces("refused"), credentials=stranger.credentials()) is grpc.StatusCode.UNAVAILABLE
        assert_not_in_plain(door.http)
        for context in (ours.context(show=False), stranger.context()):
            with pytest.raises(httpx.TransportError):
                post(door.http, traces("refused"), context=context)

        bare = ours.credentials(show=False)
        assert call(g, traces("refused")) is grpc.StatusCode.UNAVAILABLE
        assert call(g, traces("refused"), credentials=bare) is grpc.StatusCode.UNAUTHENTICATED
        for header in (wrong, "Bearer", "open-sesame", ""):
            metadata = [("authorization", header)]
            assert call(g, traces("refused"), credentials=bare, metadata=metadata) is grpc.StatusCode.UNAUTHENTICATED
            assert post(h, traces("refused"), context=ours.context(show=False), headers=dict(metadata)) == 401
        assert post(h, traces("refused"), context=ours.context(show=False)) == 401
        assert_not_in_plain(h, headers={"authorization": right})

        metadata = [("authorization", right)]
        assert call(door.grpc, traces("inside-grpc"), credentials=ours.credentials()) is OK
        assert post(door.http, traces("inside-http"), context=ours.context()) == 200
        assert call(g, traces("outside-grpc"), credentials=bare, metadata=metadata) is OK
        assert post(h, traces("outside-http"), context=ours.context(show=False), headers=dict(metadata)) == 200
        eventually("four spans", lambda: len(store.spans()) >= 4)
        names = ["inside-grpc", "inside-http", "outside-grpc", "outside-http"]
        assert sorted(span.name for span in store.spans()) == names
        assert door.metrics().total("otelcol_receiver_accepted_spans") == 4

        tokens.write_text("open-says-me\nopen-sesame\n")
        headers = {"authorization": wrong}
        eventually("the new token", lambda: call(g, traces(), credentials=bare, metadata=[*headers.items()]) is OK)
        assert post(h, traces(), context=ours.context(show=False), headers=headers) == 200
        assert call(g, traces(), credentials=bare, metadata=metadata) is OK


def test_our_own_exporter_comes_in_by_the_token(machine: Machine, identities: dict[str, Identity]) -> None:
    """
    A service outside needs three standard variables, over HTTP and over gRPC: endpoint, certificate, headers with the token.
    """
    ours = identities["ours"]
    ports = {"grpc": f"127.0.0.1:{machine.port()}", "http/protobuf": f"127.0.0.1:{machine.port()}"}
    outside = {
        "COLLECTOR_OUTSIDE_GRPC_ENDPOINT": ports["grpc"],
        "COLLECTOR_OUTSIDE_HTTP_ENDPOINT": ports["http/protobuf"],
    }
    with Store(machine.port()) as store:
        door = gateway(machine, store, "tls-outside", **ours.environment(), **outside)
        door.start(COLLECTOR_TOKEN="open-sesame")
        program = "import sys, otel_correlation as o; o.bootstrap()\nwith o.work(sys.argv[1]): pass"
        for protocol, endpoint in ports.items():
            environment = {
                "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
                "OTEL_EXPORTER_OTLP_ENDPOINT": f"https://{endpoint}",
                "OTEL_EXPORTER_OTLP_CERTIFICATE": str(ours.authority),
                "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20open-sesame",
            }
            machine.start("service", [sys.executable, "-c", program, protocol], environment)
        eventually("both spans", lambda: {span.name for span in store.spans()} == set(ports))


def test_the_wire_between_the_tiers_cannot_be_read(machine: Machine, identities: dict[str, Identity]) -> None:
    """
    With the overlays spans go from agent to router to sampler, and a listener reads nothing; without them it reads them all.
    """
    secured = {"agent": ["tls-agent"], "router": ["tls-receiver", "tls-router"], "sampler": ["tls-receiver"]}
    with Store(machine.port()) as store, contextlib.ExitStack() as taps:

        def listened(name: str, overlays: dict[str, list[str]], environment: dict[str, str]) -> list[bytes]:
            def tier(file: str, **settings: str) -> Tier:
                made = Tier(
                    machine, file, environment | settings, name=f"{file}-{name}", overlays=overlays.get(file, [])
                )
                made.start()
                return made

            sampler = tier(
                "sampler", JAEGER_OTLP_ENDPOINT=store.endpoint, SAMPLER_DECISION_WAIT="1s", SAMPLER_RATIO="1.0"
            )
            second = taps.enter_context(Tap(sampler.grpc))
            router = tier("router", ROUTER_SAMPLERS=f"[{second.endpoint}]")
            first = taps.enter_context(Tap(router.grpc))
            agent = tier("agent", NEXT_OTLP_ENDPOINT=first.endpoint)
            assert post(agent.http, traces(name)) == 200
            eventually(name, lambda: name in [span.name for span in store.spans()])
            return [read(tap.heard) for tap in (first, second)]

        for heard in listened("in-the-clear", {}, {}):
            assert b"in-the-clear" in heard
        for heard in listened("under-seal", secured, identities["ours"].environment()):
            assert len(heard) > 500
            assert b"HTTP/2" not in heard
            assert b"under-seal" not in heard


def test_a_wrong_certificate_delays_and_loses_nothing(machine: Machine, identities: dict[str, Identity]) -> None:
    """
    An agent whose certificate the gateway refuses keeps its spans on disk, and delivers them once it has the right one.
    """
    with Store(machine.port()) as store:
        door = gateway(machine, store, "tls-receiver", **identities["ours"].environment())
        door.start()
        next_endpoint = {"NEXT_OTLP_ENDPOINT": door.grpc}
        agent = Tier(machine, "agent", next_endpoint | identities["stranger"].environment(), overlays=["tls-agent"])
        agent.start()
        assert post(agent.http, traces("patient")) == 200
        eventually("the refusal", lambda: "Exporting failed. Will retry" in agent.running().log.read_text())
        assert agent.queued() == 1
        assert store.spans() == []
        agent.running().stop()
        agent.start(**identities["ours"].environment())
        eventually("the span", lambda: [span.name for span in store.spans()] == ["patient"])


def test_a_stopped_gateway_decides_and_a_killed_one_forgets_its_window(machine: Machine) -> None:
    """
    SIGTERM decides about every open trace at once; kill -9 loses those that are open, and none that is decided.
    """
    with Store(machine.port()) as store:
        door = gateway(machine, store, SAMPLER_DECISION_WAIT="1h")
        door.start()
        assert post(door.http, traces("stopped")) == 200
        assert door.running().stop() == 0
        door.start()
        eventually("the span", lambda: [span.name for span in store.spans()] == ["stopped"])
        assert post(door.http, traces("killed")) == 200
        door.kill()
        door.start()
        assert post(door.http, traces("later")) == 200
        assert door.running().stop() == 0
        door.start()
        eventually("the last one", lambda: [span.name for span in store.spans()] == ["stopped", "later"])
