"""
Every parser of foreign text in the package, and how it is driven: by the outermost function that takes the text.

``growth.py`` runs each entry at growing sizes, ``fuzz/`` runs it on whatever coverage leads to, and
``tests/unit/test_parsers.py`` holds the table equal to what ``inventory.py`` finds in the source. A new parser gets an entry
here, or joins the ``reads`` of the entry that reaches it, or a line in ``reads.NOT_FOREIGN`` that says who writes its input.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gzip
import json
import logging
import math
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Final

import httpx
from fastapi import FastAPI, Request, Response
from opentelemetry import baggage, propagate
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context
from opentelemetry.instrumentation.propagators import TraceResponsePropagator, set_global_response_propagator
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from otel_correlation import identity, policy, propagators, semconv
from otel_correlation.cli import find as cli_find
from otel_correlation.cli import terminal
from otel_correlation.clients import _attempt
from otel_correlation.export import encoding, sending
from otel_correlation.local import otlp
from otel_correlation.local.server import Viewer
from otel_correlation.local.store import LocalStore
from otel_correlation.logs import lines as log_lines
from otel_correlation.logs import otlp as logs_otlp
from otel_correlation.logs import presets
from otel_correlation.policy import outbound, recording, sensitive, showing, trust
from otel_correlation.request_id import parse, to_trace_id
from otel_correlation.sampling import RatioSampler
from otel_correlation.settings import Settings
from otel_correlation.stores import (
    Event,
    LogLine,
    Span,
    StoreError,
    Trace,
    as_json,
    bounded,
    cause,
    entry,
    find,
    waterfall,
)
from otel_correlation.stores.client import MAX_VALUES, Http
from otel_correlation.stores.embedded import EmbeddedStore
from otel_correlation.stores.jaeger import JaegerStore
from otel_correlation.stores.lines import Reader, Wanted
from otel_correlation.stores.logfiles import LogFileStore
from otel_correlation.stores.loki import LokiStore
from otel_correlation.stores.tempo import TempoStore
from otel_correlation.tasks import carriers, continue_from, inject
from otel_correlation.tasks import redis as pubsub
from otel_correlation.tracer import Tracer
from tests import local_payloads
from tests.contract.wire import exchange, http_scope, talk, websocket_scope, wired
from tests.http_answers import http_server
from tests.parsers.reads import READS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from otel_correlation.stores.model import Json

TRACE_ID: Final = "0af7651916cd43dd8448eb211c80319c"
SPAN_ID: Final = "b7ad6b7169203331"
REQUEST_ID: Final = "customer-quote/2026#000123"
PARENT: Final = f"00-{TRACE_ID}-{SPAN_ID}-01"
_WORDS: Final = (
    "a",
    " ",
    "=",
    ";",
    ",",
    ":",
    '"',
    "\\",
    "%",
    "/",
    "&",
    "?",
    "@",
    "#",
    "-",
    ".",
    "[",
    "]",
    "(",
    ")",
    "0",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parser:
    """
    One entry.

    Attributes:
        name: What it is called.
        call: Takes the text, through the outermost function that does; never raises, whatever the text.
        tokens: What its grammar is made of.
        frames: What stands before and after the repeated part, for tokens that mean something at one place only.
        ends: What makes the whole fail at its end.
        examples: Valid inputs, which together reach everything in ``reads``; the seeds of the fuzzer.
        size: The smaller size that is compared, in characters.
        cases: How many families of inputs the fast suite takes; all of them otherwise.
        of_patterns: Whether the tokens of the regular expressions that it reads belong to its grammar.
        check: What the fuzzer calls in place of ``call``: it asserts what has to hold for every text.
        wide: Whether the text may hold more than bytes: what it is made of is no wire.
        prepare: Forgets what earlier cases left behind, before each.
    """

    name: str
    call: Callable[[str], object]
    tokens: tuple[str, ...]
    frames: tuple[tuple[str, str], ...] = (("", ""),)
    ends: tuple[str, ...] = ("\x00",)
    examples: tuple[str, ...] = ()
    size: int = 1024
    cases: int = 100
    of_patterns: bool = True
    check: Callable[[str], object] | None = None
    wide: bool = False
    prepare: Callable[[], object] | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """
        The readers (see ``inventory.py``) that this entry stands for.
        """
        return READS[self.name]


def _bytes(text: str) -> bytes:
    return text.encode("latin-1", "replace")


# --- one request, through the whole edge ---


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    return loop


@functools.cache
def _application() -> FastAPI:
    """
    Return an application behind a public edge with every switch on that reads headers; for the life of this process.
    """
    app = FastAPI()

    @app.get("/x")
    async def x() -> dict[str, str]:
        return {}

    @app.get("/exposed")
    async def exposed(request: Request) -> Response:
        listed = request.headers.get("x-listed", "")
        return Response(headers={"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": listed})

    @app.post("/items")
    async def items(body: list[dict[str, int]]) -> None:
        pass

    @app.websocket("/ws")
    async def ws(websocket: Any) -> None:
        await websocket.accept()

    settings: dict[str, Any] = {
        "edge": "public",
        "trusted_networks": ["127.0.0.0/8"],
        "trusted_proxies": ["10.0.0.0/8"],
        "force_sample_header": "X-Force",
        "request_id_headers": ["X-Request-ID", "X-Correlation-ID", "X-Amzn-Trace-Id"],
        "capture_server_request": ["x-tenant", "x-.*", ".*-id"],
        "capture_server_response": ["x-.*", "access-.*"],
        "sanitize_fields": ["cookie", "x-.*key"],
        "excluded_server": "health,/internal/.*,https?://[^/]*/metrics",
        "ratio": 0.5,
        "traceresponse": True,
        "server_timing": True,
    }
    _kept.append(wired("light", **settings))
    _kept[-1].__enter__()
    return app


# What stays entered or open until this process ends.
_kept: list[Any] = []


def _request(
    path: str = "/x", query: str = "", method: str = "GET", client: str = "127.0.0.1", body: str = "", **headers: str
) -> Any:
    return _pairs(
        path, query, method, client, body, [(name.replace("_", "-"), value) for name, value in headers.items()]
    )


def _pairs(path: str, query: str, method: str, client: str, body: str, pairs: Sequence[tuple[str, str]]) -> Any:
    app = _application()
    scope = http_scope(method, "/")
    scope.update(path=path, query_string=_bytes(query), client=(client, 50000))
    scope["headers"] = [(b"user-agent", b"test/1"), *((_bytes(name), _bytes(value)) for name, value in pairs)]
    reply = _loop().run_until_complete(exchange(app, scope, _bytes(body)))
    assert reply.error is None
    assert reply.status < 500
    assert parse(_bytes(reply.request_id)) == reply.request_id
    return reply


def _lines_of_headers(text: str) -> Any:
    pairs = [
        (name.strip().lower(), value.strip()) for name, _, value in (line.partition(":") for line in text.split("\n"))
    ]
    return _pairs("/x", "", "GET", "10.0.0.1", "", pairs)


def _handshake(text: str) -> None:
    _application()
    scope = websocket_scope(
        "/ws", [(b"baggage", _bytes(text)), (b"traceparent", _bytes(PARENT)), (b"tracestate", _bytes(text))]
    )
    assert _loop().run_until_complete(talk(_application(), scope)).error is None


# --- propagation without a server ---

_TEXTMAP: Final = propagators.build(Settings())


def _propagated(text: str) -> dict[str, str]:
    found = _TEXTMAP.extract({"traceparent": PARENT, "tracestate": text, "baggage": text}, Context())
    carrier: dict[str, str] = {}
    _TEXTMAP.inject(carrier, found)
    # What user code adds, and a second extraction on top of it.
    more = baggage.set_baggage("added", text[:99], context=found)
    again = _TEXTMAP.extract({"baggage": text}, more)
    _TEXTMAP.inject({"Baggage": text}, again)
    # What others wrote before us.
    propagators.merge_baggage([_bytes(text), b"added=1"], propagators.format_baggage(again))
    propagators.merge_tracestate([_bytes(text)], propagators.EMPTY)
    return carrier


def _round_trip(text: str) -> None:
    first = _propagated(text)
    again = _TEXTMAP.extract(first, Context())
    carrier: dict[str, str] = {}
    _TEXTMAP.inject(carrier, again)
    assert carrier == first, "what is sent is read as it was sent"
    assert first["traceparent"] == PARENT
    assert len(first.get("baggage", "")) <= propagators.MAX_BAGGAGE_BYTES
    assert len(first.get("tracestate", "")) <= propagators.MAX_TRACESTATE_OUT
    # W3C Baggage and tracestate allow a tab as optional whitespace, and what was received is sent on as it is.
    assert "".join(first.values()).replace("\t", " ").isprintable()


_FOREIGN: Final = CompositePropagator([TraceContextTextMapPropagator(), W3CBaggagePropagator()])


def _under_foreign_propagators(text: str) -> None:
    """
    Send a request where somebody else made the stock propagators the global ones, and one that writes response headers.
    """
    app, ours = _application(), propagate.get_global_textmap()
    propagate.set_global_textmap(_FOREIGN)
    set_response_propagator: Any = set_global_response_propagator
    set_response_propagator(TraceResponsePropagator())
    try:
        _request(traceparent=text, x_tenant=text, user_agent=text)
        assert app is _application()
    finally:
        propagate.set_global_textmap(ours)
        set_response_propagator(None)


def _message(text: str) -> dict[str, str]:
    pairs = [line.partition(": ")[::2] for line in text.split("\n")]
    carriers.switch(Settings)
    propagate.set_global_textmap(_TEXTMAP)
    headers = [(name, _bytes(value)) for name, value in pairs]
    with continue_from(headers):
        inject({})
    with continue_from(headers, "process", attributes={"a": text[:99]}):
        return inject({})


def _tracestate(text: str) -> object:
    found = propagators.extract_from_headers([_bytes(PARENT)], [_bytes(text)])
    state = None if found is None else found.trace_state
    propagators.TraceState([(text[:9], text), ("a", text), *([("b", text[:9])] * 40)])
    sampler = RatioSampler(0.5)
    context = _TEXTMAP.extract({"traceparent": PARENT, "tracestate": text}, Context())
    sampler.should_sample(context, int(TRACE_ID, 16), "name")
    sampler.should_sample(Context(), int(TRACE_ID, 16), "name", trace_state=state)
    return None if state is None else propagators.format_tracestate(state.update("ot", "th:8"))


class _Subscribed:
    def __init__(self, *data: object) -> None:
        self._data = data

    def listen(self) -> Any:
        return ({"type": "message", "channel": data, "data": data} for data in self._data)


def _envelope(text: str) -> pubsub.Envelope:
    for message in pubsub.messages(_Subscribed(text, _bytes(text))):
        with message.continued("process"):
            pass
    found = pubsub.unwrap(_bytes(text))
    if found.headers is not None:
        pubsub.wrap(found.headers, found.payload if isinstance(found.payload, bytes) else b"")
    return found


def _envelope_round_trip(text: str) -> None:
    found = pubsub.unwrap(_bytes(text))
    if found.headers:
        assert isinstance(found.payload, bytes)
        assert pubsub.unwrap(pubsub.wrap(found.headers, found.payload)) == found
    payload = pubsub.unwrap(pubsub.wrap({"x": text, text: "y"}, _bytes(text))).payload
    assert payload == _bytes(text), "a payload comes out as it went in"


# --- policy ---

_MARKED: Final = "Zq8NeverShown"


def _redact(text: str) -> None:
    for mode in ("sensitive", "none"):
        policy.redact_query(text, mode)
        policy.redact_url(text, mode)
        policy.redact_url(f"https://user:word@host/path?{text}#{text}", mode)


def _never_shown(text: str) -> None:
    _redact(text)
    text = text.replace(_MARKED, "")
    for query in (f"{text}&password={_MARKED}", f"token={_MARKED}&{text}", f"{text}&api_key={_MARKED}&{text}"):
        assert _MARKED not in policy.redact_query(query, "sensitive")
        assert _MARKED not in policy.redact_query(query, "none")
        if "#" not in text and "?" not in text:
            assert _MARKED not in policy.redact_url(f"https://host/?{query}", "sensitive")


_PATHS: Final = recording.Patterns("health,/internal/.*,/items/[0-9]+/live,https?://[^/]*/metrics")
_ENDING: Final = recording.Patterns(".*foo")
_CAPTURE: Final = recording.HeaderCapture(
    ["x-tenant", "x-.*", ".*-id", ".*foo"], ["cookie", "x-.*key"], "http.request.header."
)


def _captured(text: str) -> object:
    return _CAPTURE.attributes(
        [(_bytes(name), _bytes(value)) for name, _, value in (line.partition(":") for line in text.split("\n"))]
    )


_HOSTS: Final = outbound.Outbound(
    outbound.Hosts(["api.example.com", "*.example.com", "10.0.0.0/8"]),
    outbound.Hosts([], internal=True),
    outbound.Hosts(["*"]),
)


class _Url:
    def __init__(self, host: str) -> None:
        self.raw_host = _bytes(host)


def _forwarded(text: str) -> None:
    assert len(trust.forwarded(text)) <= trust.MAX_HOPS + 1
    assert len(trust.x_forwarded_for(text)) <= trust.MAX_HOPS + 1
    _request(client="10.0.0.1", x_forwarded_for=text, forwarded=text)


# --- log lines and exceptions, as services write them ---

_JSON_LINES: Final = log_lines.JsonLines()
_TEXT_LINES: Final = log_lines.TextLines(colours=False)
_DATADOG: Final = log_lines.JsonLines(names=presets.build(Settings(log_preset="datadog")))
_EXPORT_PROVIDER: Final = LoggerProvider(shutdown_on_exit=False)


def _log_record(
    message: str, level: int = logging.WARNING, name: str = "app", args: Any = (), **more: Any
) -> logging.LogRecord:
    record = logging.LogRecord(name, level, "app.py", 1, message, args, more.pop("exc_info", None))
    record.__dict__.update(more)
    return record


def _raised(text: str) -> Any:
    try:
        raise ValueError(text)
    except ValueError:
        return sys.exc_info()


def _written(text: str) -> list[str]:
    records = [
        _log_record(text, trace_id=text[:32], span_id=text[:16], request_id=text, extra_field=text, stack_info=None),
        _log_record("%s - %s", name="uvicorn.access", args=("1.1.1.1", f"/x?{text}")),
        _log_record("failed", exc_info=_raised(text)),
        _log_record("failed", exc_text=text, many=[text[:9]] * 3, nested={"a": {"b": text}}, ratio=math.nan),
        _log_record({"row": [text, text.encode("utf-8", "replace")]}),  # type: ignore[arg-type] # as user code does
    ]
    export = logs_otlp.Export(_EXPORT_PROVIDER, Settings())
    for record in records:
        export(record)
    written = [lines.format(record) for lines in (_JSON_LINES, _DATADOG, _TEXT_LINES) for record in records]
    return [*written, log_lines.ascii_only(text), terminal.safe(text)]


def _one_object(text: str) -> None:
    count = 4
    written = _written(text)
    for line in written[: 2 * count]:
        assert isinstance(json.loads(line), dict)
        assert len(line.splitlines()) == 1
    for line in written[2 * count : 3 * count]:
        _, *rest = line.split("\n")
        assert all(part.startswith("  | ") for part in rest), "what follows a line stands behind a bar"
    assert written[-2].isascii()
    assert written[-1].isprintable() or all(
        character.isprintable() or character == "\u3000" for character in written[-1]
    )


def _scrubbed(text: str) -> None:
    policy.scrub(text)
    policy.hide_quoted(text)
    # Cut in its middle, however long it is: what is looked for at the cut is looked for in half of the text.
    half = len(text) // 2 + 64
    for marked in (True, False):
        bounds = replace(policy.DEFAULT, stack=half, marked=marked)
        policy.scrubbed(text, half, bounds)
        policy.scrubbed_stack(text, bounds)


# One character is one step: a cause, a context, a group with it once, with it twice, a large group, a note, a frame, a
# long text, an error of the parser.
_LINKS: Final = "cxg2GnftS"


def _raised_from(text: str) -> BaseException:
    error: BaseException = ValueError("first")
    frame = sys._getframe()
    for step in text:
        match step:
            case "g":
                error = BaseExceptionGroup("group", [error])
            case "2":
                error = BaseExceptionGroup("twice", [error, error])
            case "G":
                error = BaseExceptionGroup("many", [error, *(ValueError(number) for number in range(70))])
            case "n":
                error.add_note(f"token={step} note")
            case "f":
                error.__traceback__ = TracebackType(error.__traceback__, frame, 0, 1)
            case _:
                shown = SyntaxError("x" * 9_000, ("app.py", 1, 1, "y" * 9_000)) if step == "S" else None
                behind, error = error, shown or ValueError("password=x " * 800 if step == "t" else step)
                if step == "c":
                    error.__cause__ = behind
                else:
                    error.__context__ = behind
    return error


def _formatted(text: str) -> None:
    error = _raised_from(text)
    for bounds in (policy.DEFAULT, policy.LINES):
        assert len(policy.stack_of(error, error.__traceback__, bounds)) <= bounds.stack


# --- names and values that may be shown or not ---


def _named_secret(text: str) -> None:
    for told in (sensitive.is_secret, sensitive.is_secret_in_query, sensitive.is_secret_in_text):
        # What was asked before is remembered, and would cost nothing.
        told.cache_clear()
        told(text)


class _Place:
    line = 3


def _shown_setting(text: str) -> None:
    """
    Show the text as an address, a store, a list of headers and any other variable, and in lines of OpenTelemetry.
    """
    policy.shown_url(text)
    policy.shown_store(text)
    for name in (
        "OTEL_EXPORTER_OTLP_HEADERS",
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "OTEL_RESOURCE_ATTRIBUTES",
        "OTEL_TRACES_SAMPLER_ARG",
        "OTEL_SERVICE_NAME",
        semconv.OTEL_CORRELATION_STORES,
        text,
    ):
        policy.shown_variable(name, text)
        showing.known_secrets({name: text})
    policy.shown_text(text)
    policy.mask_stock_lines()
    error = OSError(1, text)
    placed = ValueError(text)
    placed.__cause__ = RuntimeError(text)
    placed.__cause__.problem_mark = _Place()  # type: ignore[attr-defined]  # as PyYAML's errors have one
    for failed in (error, ValueError(text), placed):
        policy.file_problem(failed)
    stock = logging.getLogger("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    for of in (stock.name, "opentelemetry.util.re"):
        record = _log_record("%s", name=of, args=(text, error), exc_info=(OSError, error, None))
        assert all(each.filter(record) for each in stock.filters if isinstance(each, logging.Filter))


def _never_quoted(text: str) -> None:
    _scrubbed(text)
    text = text.replace(_MARKED, "")
    assert _MARKED not in policy.scrub(f"{text}\nredis://user:{_MARKED}@host/0")


# --- spans that are sent ---


@functools.cache
def _ended() -> list[Any]:
    from tests.contract.wire import LightProcessor

    spans: list[Any] = []
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(LightProcessor(spans))
    _kept.append(provider)
    return spans


def _span_with(text: str) -> bytes:
    spans = _ended()
    spans.clear()
    tracer = (
        _kept[-1].get_tracer("parsers") if isinstance(_kept[-1], TracerProvider) else TracerProvider().get_tracer("x")
    )
    with tracer.start_as_current_span(text) as span:
        span.set_attribute(text[:100] or "x", text)
        span.set_attribute("list", [text, text])
        span.add_event(text, {"a": text})
        span.record_exception(ValueError(text))
    body, _ = encoding.encode_spans(list(spans))
    return body


def _is_otlp(text: str) -> None:
    request = ExportTraceServiceRequest.FromString(_span_with(text))
    (found,) = [span for group in request.resource_spans for scope in group.scope_spans for span in scope.spans]
    assert found.name == text.encode("utf-8", "replace").decode()


def _partial_success(text: str) -> None:
    sending.partial_success(_bytes(text))


# --- what a client sends and gets ---


@functools.cache
def _client_config() -> _attempt.ClientConfig:
    import re

    return _attempt.ClientConfig(
        Settings(),
        tracer=Tracer("parsers", TracerProvider(shutdown_on_exit=False)),
        excluded=re.compile("(?:health)|(?:/internal/.*)"),
        request_headers=_CAPTURE,
        response_headers=_CAPTURE,
        outbound=_HOSTS,
    )


def _sent(text: str) -> None:
    """
    Send to a URL with the text in it, as a redirect may name one; the answer carries it in its headers.
    """
    quoted = "".join(character if "!" <= character <= "~" else "_" for character in text)[:60_000]
    try:
        url = httpx.URL(f"https://host.example/{quoted}")
    except httpx.InvalidURL:
        return
    propagate.set_global_textmap(_TEXTMAP)
    request = httpx.Request("GET", url, headers={"x-tenant": quoted})
    attempt = _attempt.begin(_client_config(), request)
    if attempt is not None:
        version = {"http_version": _bytes(text)}
        attempt.observe(httpx.Response(500, headers=[("x-tenant", quoted), ("x-a-id", quoted)], extensions=version))
        attempt.end()


def _copied(text: str) -> None:
    """
    Send on what a request came with, where none of it may leave: as it came, within lists, and as many fields.
    """
    propagate.set_global_textmap(_TEXTMAP)
    raw = _bytes(text.replace("\r", "").replace("\n", ""))
    fields = [_bytes(line.replace("\r", "")) for line in text.split("\n")]
    came = {"traceparent": PARENT, "tracestate": f"a=b,{text[::2]}", "baggage": f"a=b,{text[::2]}"}
    who = identity.Identity(REQUEST_ID)
    who.received = {b"x-request-id": [raw, *fields], b"x-amzn-trace-id": [raw]}
    who.received |= {name.encode(): [_bytes(value)] for name, value in came.items()}
    context = identity.set_in(_TEXTMAP.extract(came, Context()), who)
    ids = [
        *(("x-request-id", value) for value in (*fields, raw + b"," + REQUEST_ID.encode())),
        ("x-correlation-id", raw),
    ]
    traces = [(name, b"c=d," + raw) for name in ("tracestate", "baggage")]
    traces += [("traceparent", raw), ("traceparent", PARENT.upper().encode()), ("x-amzn-trace-id", raw)]
    for headers in ([*ids, *traces], [*ids, *traces[:2]]):
        request = httpx.Request(
            "GET", "https://stranger.example/", headers=[(_bytes(name), value) for name, value in headers]
        )
        _attempt.keep_back(_client_config(), request, context, (False, False, False))
        left = request.headers
        assert PARENT.upper() not in left.get_list("traceparent")
        assert REQUEST_ID not in (left.get("x-request-id", "") + "," + left.get("x-correlation-id", "")).split(",")


# --- the embedded collector ---


@functools.cache
def _viewer() -> Viewer:
    _kept.append(LocalStore())
    return Viewer(_kept[-1], hosts=frozenset({"localhost"}))


def _forget_viewer() -> None:
    if _viewer.cache_info().currsize:
        _viewer().close()
        _viewer.cache_clear()
        _kept.pop().close()


def _received(text: str, media: str, signal: str, coding: str = "identity") -> int:
    scope = http_scope("POST", f"/v1/{signal}")
    scope["headers"] = [(b"content-type", media.encode()), (b"content-encoding", coding.encode())]
    reply = _loop().run_until_complete(exchange(_viewer(), scope, _bytes(text)))
    assert reply.error is None, repr(reply.error)
    asked = http_scope("GET", "/api/traces")
    asked["headers"] = [(b"host", b"localhost")]
    listed = _loop().run_until_complete(exchange(_viewer(), asked))
    assert listed.error is None, repr(listed.error)
    return reply.status


def _otlp(media: str, text: str) -> None:
    for signal in ("traces", "logs", "metrics"):
        assert _received(text, media, signal) in (200, 400, 413)


def _gzip(text: str) -> None:
    body = _bytes(text)
    with contextlib.suppress(bounded.MalformedError, bounded.TooBigError):
        assert len(otlp.decompress(body, 1 << 20)) <= 1 << 20


def _asked(text: str) -> None:
    """
    Ask the viewer for what the page asks for, with the text in the place of every value.
    """
    for path, query in (
        (f"/api/find/{text}", ""),
        (f"/api/traces/{text}", ""),
        ("/api/traces", f"request_id={text}&limit={text}"),
        (f"/{text}", text),
    ):
        scope = http_scope("GET", "/")
        scope.update(path=path, query_string=_bytes(query), raw_path=_bytes(path))
        for host in (_bytes(text), b"localhost"):
            scope["headers"] = [(b"host", host), (b"content-type", _bytes(text))]
            reply = _loop().run_until_complete(exchange(_viewer(), scope))
            assert reply.error is None, repr(reply.error)


# --- traces, whoever sent their spans: one character is one span or one line ---

_SHAPES: Final = "SsCceroylwhn"


def _parts(text: str) -> tuple[list[Span], list[LogLine]]:
    spans: list[Span] = []
    logs: list[LogLine] = []
    count = len(text)
    for number, shape in enumerate(text):
        span_id = f"{number + 1:016x}"
        before = f"{number:016x}" if number else ""
        failed: dict[str, Json] = {
            "http.response.status_code": 500,
            "url.full": f"http://h/{number}?a=b",
            "request_id": REQUEST_ID,
        }
        match shape:
            case "S":  # a root of its own, behind a service that drops the traceparent
                spans.append(Span(TRACE_ID, span_id, "", "b", "GET", "SERVER", number, number + 1, failed=True))
            case "C":  # a call that lasts as long as everything
                spans.append(
                    Span(TRACE_ID, span_id, "", "a", "GET", "CLIENT", 0, count, failed=True, attributes=failed)
                )
            case "s":
                spans.append(Span(TRACE_ID, span_id, before, "a", "GET", "SERVER", number, count, failed=True))
            case "c":
                spans.append(Span(TRACE_ID, span_id, before, "a", "GET", "CLIENT", number, count, attributes=failed))
            case "e":
                event = Event(
                    "exception", number, {"exception.type": "E", "exception.stacktrace": local_payloads.STACK[:200]}
                )
                spans.append(
                    Span(TRACE_ID, span_id, before, "a", "work", "INTERNAL", number, count, True, events=(event,))
                )
            case "o":  # its parent is nowhere
                spans.append(Span(TRACE_ID, span_id, "f" * 16, "c", "GET", "SERVER", number, number + 1))
            case "y":  # a cycle with the next one
                spans.append(Span(TRACE_ID, span_id, f"{number + 2:016x}", "a", "loop", "INTERNAL", number, number))
            case "r":
                own: dict[str, Json] = {
                    "request_id": f"{REQUEST_ID}{number}",
                    "otel_correlation.caller.request_id": f"{number}",
                }
                spans.append(Span(TRACE_ID, span_id, "", "a", "GET", "SERVER", number, number, attributes=own))
            case "l":
                logs.append(
                    LogLine(TRACE_ID, span_id, number, "INFO", "a", "app", f"line {number}", {"request_id": REQUEST_ID})
                )
            case "w":  # a line with a traceback
                stack = {"exception.type": "E", "exception.stacktrace": local_payloads.STACK[:200]}
                logs.append(LogLine(TRACE_ID, before, number, "ERROR", "a", "app", "failed", stack))
            case "h":  # of a trace id the lower half is known
                half = "0" * 16 + f"{number:016x}"
                logs.append(LogLine(half, "", number, "INFO", "a", "app", "half", {"request_id": REQUEST_ID}))
            case _:  # a line of no trace
                logs.append(
                    LogLine(
                        "",
                        "",
                        number,
                        "INFO",
                        "a",
                        "app",
                        f"loose {number}",
                        {"request_id": f"{REQUEST_ID}{number % 7}"},
                    )
                )
    return spans, logs


def _trace(text: str) -> Trace:
    spans, logs = _parts(text)
    return Trace.of(TRACE_ID, spans, [line for line in logs if line.trace_id == TRACE_ID])


def _understood(text: str) -> None:
    trace = _trace(text)
    cause(trace)
    waterfall(trace)
    entry(trace)


def _told(text: str) -> None:
    trace = _trace(text)
    as_json(trace)
    held = _Held([trace])
    cli_find.tell(terminal.Screen(), REQUEST_ID, [trace] * 5, [held], [])


class _Held:
    """
    A store that has these traces.
    """

    is_whole: ClassVar[bool] = False
    name = "held"

    def __init__(self, traces: list[Trace]) -> None:
        self._traces = traces

    def find(self, _wanted: str, /) -> list[Trace]:
        return self._traces

    def complete(self, _known: Sequence[Trace], /) -> list[Trace]:
        return self._traces


def _merged(text: str) -> None:
    spans, logs = _parts(text)
    by_trace: dict[str, tuple[list[Span], list[LogLine]]] = {}
    for span in spans:
        by_trace.setdefault(span.trace_id, ([], []))[0].append(span)
    for line in logs:
        by_trace.setdefault(line.trace_id, ([], []))[1].append(line)
    traces = [Trace.of(trace_id, *parts) for trace_id, parts in by_trace.items()]
    # What has no span is one trace each, as a store of lines may give it.
    find([_Held(traces), _Held([Trace.of(TRACE_ID, spans, ())])], REQUEST_ID)


def _many_traces(text: str) -> None:
    """
    Each character is a trace of its own: whole, or one of which half the id is known.
    """
    traces = []
    for number, shape in enumerate(text):
        low = f"{number + 1:016x}"
        trace_id = ("0" * 16 if shape == "h" else "a" * 16) + low
        line = LogLine(trace_id, "", number, "INFO", "a", "app", "x", {"request_id": REQUEST_ID})
        traces.append(Trace.of(trace_id, [], [line]))
    find([_Held(traces)], REQUEST_ID)


# --- answers of stores ---


class _Told:
    """
    A store's HTTP side that always answers with the same JSON.
    """

    url = shown = "http://store"

    def __init__(self, text: str) -> None:
        self._text = text

    def get(self, _path: str, *_more: Any) -> tuple[int, Any]:
        try:
            return 200, bounded.read_json(self._text, max_values=MAX_VALUES)
        except (bounded.MalformedError, bounded.TooBigError):
            raise StoreError("no JSON") from None


def _answer(kind: Any, wanted: str, text: str) -> None:
    store = kind("http://store")
    store._http = _Told(text)
    with contextlib.suppress(StoreError):
        store.find(wanted)
    with contextlib.suppress(StoreError):
        store.complete([Trace(TRACE_ID)])


def _answers(kind: Any, text: str) -> None:
    for wanted in (REQUEST_ID, TRACE_ID, "42"):
        _answer(kind, wanted, text)


_EMPTY: Final = {"body": b"", "status": 200}


def _over_http(text: str) -> None:
    """
    Get the text as an answer, and as the reason of an error, over a real connection.
    """
    if "url" not in _SERVED:
        server = http_server(lambda path: (500 if path == "/error" else 200, _SERVED["body"]))
        _kept.append(server)
        _SERVED["url"] = server.__enter__()[0]
    _SERVED["body"] = _bytes(text)
    for path in ("/", "/error"):
        with contextlib.suppress(StoreError):
            Http(_SERVED["url"]).get(path)


_SERVED: dict[str, Any] = {}
_ONE: Final = {"data": [{"traceID": TRACE_ID, "spans": []}]}
_TAG: Final = '{"key":"a","type":"string","value":"b"},'
_SPAN_OF_JAEGER: Final = (
    f'{{"traceID":"{TRACE_ID}","spanID":"a1","operationName":"x","processID":"p1","startTime":1,"duration":1,'
    f'"references":[{{"refType":"CHILD_OF","traceID":"{TRACE_ID}","spanID":"a2"}}],"tags":[],"logs":[]}},'
)
_SPAN_OF_TEMPO: Final = '{"traceId":"AAAAAAAAAAAAAAAAAAAAAQ==","spanId":"AAAAAAAAAAE=","name":"x","attributes":[]},'
_LINE_OF_LOKI: Final = '["1",' + json.dumps(f"request_id={REQUEST_ID}") + ',{"structuredMetadata":{"a":"b"}}],'
_JSON_TOKENS: Final = ("[", "]", "{", "}", '"', ":", ",", "1", "\\", "\\u0000", "null", " ")

# --- log files ---

_READER: Final = Reader(["trace_id=trace", "request_id=rid.value"])
_WANTED: Final = Wanted(frozenset([TRACE_ID]), frozenset([REQUEST_ID, "42"]))


def _read(text: str) -> None:
    for line in text.split("\n") or [text]:
        _READER.read(line, _WANTED, "service", 1_795_000_000_000_000_000)
    _READER.read(text, _WANTED, "service", 1_795_000_000_000_000_000)


def _stack_of_line(text: str) -> None:
    from otel_correlation.stores.lines import put_exception

    attributes: dict[str, Any] = {}
    put_exception(attributes, text)
    event = Event("exception", 1, {"exception.type": "E", "exception.message": text, "exception.stacktrace": text})
    span = Span(TRACE_ID, SPAN_ID, "", "a", "x", "SERVER", 0, 1, True, "", {}, (event, event))
    log = LogLine(TRACE_ID, SPAN_ID, 1, "ERROR", "a", "app", text, {**attributes, "exception.type": "E"})
    trace = Trace.of(TRACE_ID, [span], [log])
    as_json(trace)


@functools.cache
def _directory() -> Path:
    _kept.append(tempfile.TemporaryDirectory(prefix="parsers-"))
    return Path(_kept[-1].name)


def _file(text: str, *, zipped: bool = False) -> None:
    path = _directory() / f"{os.getpid()}.log{'.gz' if zipped else ''}"
    path.write_bytes(_bytes(text))
    for wanted in (REQUEST_ID, "42"):
        with contextlib.suppress(StoreError):
            LogFileStore(str(path)).find(wanted)


_TRACEBACK: Final = (
    "Traceback (most recent call last):\n",
    '  File "/srv/app.py", line 1, in f\n',
    '  + File "',
    '", line ',
    ", in ",
    "\n",
    "  | ",
    "+-",
    " ",
    "|",
    "    raise\n",
    "ValueError: x\n",
    "<frozen ",
    "/site-packages/",
    "\\",
    "E",
    ": ",
)
_QUOTES: Final = (
    "input_value=",
    ", input_type=",
    "Input tag '",
    "' found using ",
    "'loc': ",
    "'msg': ",
    "[parameters: ",
    "]",
    "[SQL: ",
    "DETAIL:  ",
    "CONTEXT:  ",
    "invalid input syntax for ",
    ': "',
    "out of range",
    "invalid input for query argument $",
    "Duplicate entry '",
    "' for key ",
    "Command # ",
    " (",
    ") of pipeline caused error",
    "\n",
    "postgres://u:p@h/?a=b ",
    "://",
    "a",
    "?",
    "@",
    "=",
    "&",
    " ",
    "x+.-",
    "password=",
    "token: ",
    "'api_key', ",
    "cookie: ",
    '"',
    "'",
    "\\",
    ",",
    '  File "a.py", line 1\n',
)


def _checkout() -> str:
    return str(local_payloads.traces(local_payloads.checkout().spans).SerializeToString(), "latin-1")


def _checkout_logs() -> str:
    return str(local_payloads.logs(local_payloads.checkout().logs).SerializeToString(), "latin-1")


def _checkout_json() -> str:
    return json.dumps(local_payloads.as_otlp_json(local_payloads.traces(local_payloads.checkout().spans)))


def _wire(field: int, body: bytes) -> bytes:
    return bytes([field << 3 | 2, len(body)]) + body


# Three levels that hold each other: resource, scope, span.
_A_SPAN: Final = _wire(1, b"a" * 16) + _wire(2, b"b" * 8)
_NESTED: Final = _wire(1, _wire(2, _wire(2, _A_SPAN))).decode("latin-1")

_MEMBERS: Final = ("a", "=", "b", ";", "p", ",", " ", "\t", "%20", '"', "a=b", "a=b,", ";p=", ";p= ")

TABLE: Final[tuple[Parser, ...]] = (
    Parser(
        name="edge: traceparent",
        call=lambda text: _request(traceparent=text),
        tokens=("00", "-", "0", "f", TRACE_ID, SPAN_ID, PARENT, " ", "\t", "ff-", "-x", "\n"),
        frames=(("", ""), (PARENT, ""), ("01-" + PARENT[3:] + "-", "")),
        examples=(PARENT, "01-" + PARENT[3:] + "-more"),
        cases=40,
    ),
    Parser(
        name="edge: tracestate",
        call=lambda text: _request(traceparent=PARENT, tracestate=text),
        tokens=("a", "=", "b", ",", " ", "\t", "ot=", "th:", "rv:", ";", "a=b", "a=b,", "@", "*"),
        frames=(("", ""), ("ot=th:8;", ""), ("a=", "")),
        examples=("ot=th:8;rv:0123456789abcd,a=b", "a=b, c=d ,e=f"),
        cases=60,
    ),
    Parser(
        name="edge: baggage",
        call=lambda text: _request(traceparent=PARENT, baggage=text),
        tokens=_MEMBERS,
        frames=(("", ""), ("a=b", ""), ("a=b;p=", "")),
        ends=("\x00", '"'),
        examples=("a=b;p=1;q,c=%20d", "a = b , c=d"),
        cases=40,
    ),
    Parser(
        name="edge: request ids",
        call=lambda text: _request(x_request_id=text) and _request(x_correlation_id=text),
        tokens=("a", "0", "-", "/", " ", "%", TRACE_ID, "f4a2b3c1-dead-beef-0000-aabbccddeeff", "\t", "\n"),
        examples=(REQUEST_ID, "f4a2b3c1-dead-beef-0000-aabbccddeeff", TRACE_ID, "42"),
        cases=30,
    ),
    Parser(
        name="edge: X-Amzn-Trace-Id",
        call=lambda text: _request(x_amzn_trace_id=text),
        tokens=("Root=", ";", " ", "\t", "1-67891233-abcdef012345678912345678", "Self=", "a", "=", "Root=1-", "0"),
        frames=(
            ("", ""),
            ("Root=1-67891233-abcdef012345678912345678", ""),
            ("", "Root=1-67891233-abcdef012345678912345678"),
        ),
        examples=("Self=1; Root=1-67891233-abcdef012345678912345678;x", "Root=1-67891233-abcdef012345678912345678"),
        cases=60,
    ),
    Parser(
        name="edge: forwarding headers",
        call=lambda text: (
            _request(client="10.0.0.1", x_forwarded_for=text) and _request(client="10.0.0.1", forwarded=text)
        ),
        tokens=(
            "for=",
            ",",
            ";",
            " ",
            "\t",
            '"',
            "\\",
            "1.1.1.1",
            "10.0.0.1,",
            "[::1]",
            ":",
            "by=",
            "a",
            "for=1.1.1.1,",
            "1",
            ".",
        ),
        frames=(("", ""), ('for="', '"'), ("1.1.1.1:", "")),
        ends=("\x00", '"'),
        examples=("10.0.0.2, 127.0.0.1", 'for="[::1]:80";by=10.0.0.1, for=10.0.0.1', "::ffff:1.2.3.4, 10.1.1.1"),
        cases=60,
        check=_forwarded,
    ),
    Parser(
        name="edge: host, user agent, other headers",
        call=lambda text: _request(
            host=text, user_agent=text, cookie=text, x_tenant=text, x_force=text, accept=text, origin=text
        ),
        tokens=("a", ".", ":", "[", "]", "0", "1", "/", " ", "@", "é", "%"),
        examples=("host.example:8080", "[::1]:80", "true"),
        cases=30,
    ),
    Parser(
        name="edge: path and query",
        call=lambda text: _request(path="/" + text, query=text),
        tokens=(
            "a",
            "/",
            "=",
            "&",
            ";",
            "%",
            "+",
            "token",
            "health",
            ".",
            "?",
            "code=",
            "a=b&",
            "session=x;",
            "internal",
        ),
        frames=(("", ""), ("internal/", "")),
        examples=("a=b&token=secret;rest&code=1", "health", "internal/x"),
        cases=60,
    ),
    Parser(
        name="edge: method and peer",
        call=lambda text: _request(method=text or "GET", client=text),
        tokens=("G", "GET", "a", ".", ":", "1", " "),
        examples=("QUERY", "10.0.0.1", "x"),
        cases=30,
    ),
    Parser(
        name="edge: many headers",
        call=_lines_of_headers,
        tokens=(
            *(
                "x-a: 1\n",
                "x-tenant: 1\n",
                "x-request-id: a\n",
                "baggage: a=b\n",
                f"traceparent: {PARENT}\n",
                "tracestate: a=b\n",
            ),
            *(
                "x-forwarded-for: 1.1.1.1\n",
                "forwarded: for=1.1.1.1\n",
                "host: a\n",
                "user-agent: a\n",
                "cookie: a=b\n",
                "x-force: 1\n",
            ),
            *("x-amzn-trace-id: a\n", "accept: a\n", "\n"),
        ),
        ends=(),
        examples=(f"traceparent: {PARENT}\nx-force: 1\nx-tenant: a\nx-tenant: b\nx-forwarded-for: 127.0.0.1",),
        size=8192,
        cases=40,
        of_patterns=False,
    ),
    Parser(
        name="edge: exposed headers",
        call=lambda text: _request("/exposed", x_listed=text),
        tokens=("a", ",", " ", "*", "a,", "X-Request-ID", "\t"),
        ends=(),
        examples=("a, b", "*"),
        cases=30,
    ),
    Parser(
        name="edge: validation errors",
        call=lambda text: _request("/items", method="POST", body=text, content_type="application/json"),
        tokens=(*_JSON_TOKENS, '{"a":"x"},', '{"a":1},', '"a":"b",'),
        frames=(("", ""), ("[", '{"a":"x"}]'), ('[{"', '":"x"}]')),
        examples=('[{"a":"x"},{"b":1}]', "[1]"),
        cases=30,
    ),
    Parser(
        name="edge: WebSocket handshake",
        call=_handshake,
        tokens=_MEMBERS,
        frames=(("", ""), ("a=b", "")),
        examples=("a=b",),
        cases=20,
    ),
    Parser(
        name="edge: under foreign propagators",
        call=_under_foreign_propagators,
        tokens=("0", "-", " ", PARENT, "a", "=", ","),
        examples=(PARENT,),
        cases=20,
    ),
    Parser(
        name="propagators",
        call=_propagated,
        tokens=_MEMBERS,
        frames=(("", ""), ("a=b", ""), ("a=b;p=", "")),
        ends=("\x00", '"'),
        examples=("a=b;p=1,c=d", "ot=th:8,x=y"),
        check=_round_trip,
    ),
    Parser(
        name="tracestate and sampling",
        call=_tracestate,
        tokens=("a", "=", ",", " ", "ot=", "th:", "rv:", ";", "8", "a=b,", "x:", "@"),
        frames=(("", ""), ("ot=th:", ""), ("ot=", ""), ("ot=th:8;", "")),
        examples=(
            "ot=th:8;rv:0123456789abcd;x:y,a=b",
            ",".join(f"{'k' * 200}{number}={'v' * 200}" for number in range(31)),
        ),
        cases=60,
    ),
    Parser(
        name="message headers",
        call=_message,
        tokens=(
            "a: b\n",
            "traceparent: ",
            "baggage: ",
            "x-request-id: ",
            "\n",
            ": ",
            "a",
            "=",
            ",",
            ";p= ",
            f"traceparent: {PARENT}\n",
        ),
        frames=(("", ""), ("baggage: ", ""), ("baggage: a=b", ""), (f"traceparent: {PARENT}\ntracestate: ", "")),
        examples=(f"traceparent: {PARENT}\nX-Request-ID: {REQUEST_ID}\nbaggage: a=b",),
        cases=60,
        of_patterns=False,
    ),
    Parser(
        name="pub/sub envelope",
        call=_envelope,
        tokens=("otel-correlation/1\n", "a: b\n", "\n", ": ", "a", " ", "otel-correlation/"),
        frames=(("", ""), ("otel-correlation/1\n", ""), ("otel-correlation/1\na: ", "\n\nx")),
        examples=("otel-correlation/1\ntraceparent: x\nb: c\n\npayload", "otel-correlation/1\n\npayload"),
        check=_envelope_round_trip,
    ),
    Parser(
        name="request id",
        call=lambda text: (parse(_bytes(text)), to_trace_id(text)),
        tokens=("a", "0", "-", "/", "Root=", "1-", "f4a2b3c1-", " "),
        examples=(
            REQUEST_ID,
            "Root=1-67891233-abcdef012345678912345678",
            TRACE_ID,
            "f4a2b3c1-dead-beef-0000-aabbccddeeff",
        ),
    ),
    Parser(
        name="query redaction",
        call=_redact,
        tokens=("a", "=", "&", ";", "%", "%20", "+", "token", "#", "?", "@", "://", "/", "a=b&", "code=x;", "key"),
        frames=(("", ""), ("token=", ""), ("https://", "@host/"), ("https://h/?", "")),
        examples=("a=b&token=x;y&code=1", "https://u:p@h/p?a=b#token=c", "next=%68ttps%3A%2F%2Fh%2F%3Ftoken%3Dx"),
        check=_never_shown,
    ),
    Parser(
        name="excluded paths",
        call=lambda text: _PATHS.match("/" + text, "http://host/" + text),
        tokens=("/", "a", "health", "/health", "internal/", "items/", "0", "live", "metrics", "//", ".", "http://"),
        frames=(("", ""), ("internal/", ""), ("items/", "")),
        examples=("health", "api/metrics"),
    ),
    Parser(
        name="excluded paths: .*foo",
        call=lambda text: _ENDING.match("/" + text),
        tokens=("/", "a", "foo", "/foo", "fo"),
        examples=("a/foo",),
    ),
    Parser(
        name="captured headers",
        call=_captured,
        tokens=("x-a: 1\n", "x-tenant: 1\n", "x-", "-id", "foo", "a", ":", "\n", "-", "key", " ", "x-api-key: 1\n"),
        frames=(("", ""), ("x-", ""), ("x-tenant: ", "")),
        examples=("x-tenant: a\nx-tenant: b\nx-api-key: c\nmy-id: d",),
        size=4096,
    ),
    Parser(
        name="outbound hosts",
        call=lambda text: _HOSTS(_Url(text)),
        tokens=("a", ".", "-", "_", "0", "0x", "a.", ":", "%", "example.com", "1.", "::"),
        frames=(("", ""), ("", ".example.com")),
        examples=("api.example.com", "10.0.0.1", "fe80::1%eth0", "2130706433", "localhost"),
    ),
    Parser(
        name="exception texts",
        wide=True,
        call=_scrubbed,
        tokens=_QUOTES,
        frames=(("", ""), ("[parameters: ", ""), ("x://", "")),
        ends=("\n", "]"),
        examples=(
            "1 validation error\nx\n  Input should be 1 [type=x, input_value='a', input_type=str]",
            "[SQL: x]\n[parameters: ('a',\n'b')]\n(Background on this error",
            "redis://user:word@host/0?a=b",
            "token=a&password='b\\'c', Authorization: Bearer d, (b'api_key', b'e')",
            "token=a&" * 60 + "x://",
            local_payloads.STACK * 3,
            f"https://h/?next={'%68ttps%3A%2F%2Fh%2F%3Ftoken%3Dx'}&u=//u:p@h",
        ),
        cases=80,
        check=_never_quoted,
    ),
    Parser(
        name="exceptions that are raised from others",
        call=_formatted,
        tokens=tuple(_LINKS),
        ends=(),
        examples=(_LINKS, _LINKS * 9, "f" * 300, "2" * 70, "G", "tS"),
        size=128,
        cases=20,
        of_patterns=False,
    ),
    Parser(
        name="names of secrets",
        wide=True,
        call=_named_secret,
        tokens=("a", "token", "[", "]", "_", "aB", "key", "email"),
        ends=("Count",),
        examples=("accessToken", "code", "token_count", "x[]"),
        size=4096,
        cases=60,
    ),
    Parser(
        name="settings that are shown",
        wide=True,
        call=_shown_setting,
        tokens=(
            *(
                "a",
                "a=b",
                ",",
                "=",
                "://",
                "//",
                "/",
                "@",
                ":",
                "?",
                "&",
                "#",
                "%20",
                " ",
                "-",
                ".",
                "A",
                "0",
                "[",
                "]",
            ),
            *(
                "https://h/",
                "logs=",
                "Authorization=Bearer%20",
                "service.name=",
                "token=",
                "OTEL_",
                "a1b2c3d4e5f6a7b8c9d0",
            ),
        ),
        frames=(("", ""), ("https://h/", ""), ("a=", "@h:1/"), ("https://h/?", "")),
        examples=(
            "https://user:word@host.example:4318/v1/word?a=b&c#d",
            "tempo=http://h:1/a,logs=/var/log/x",
            "Authorization=Bearer%20x,a",
            "service.name=x,a.b=c",
            "0.5",
        ),
        size=512,
        cases=40,
        of_patterns=False,
    ),
    Parser(
        name="log lines that are written",
        wide=True,
        call=_written,
        tokens=(
            "a",
            "%",
            "%s",
            "{",
            "\n",
            "\r",
            "\t",
            "\x1b",
            "\u2028",
            "\ud800",
            "é",
            '"',
            "\\",
            "?",
            "a=b&",
            "token=",
            " ",
            "://",
            "0",
        ),
        frames=(("", ""), ("https://h/?", ""), ("input_value=", "")),
        examples=("a\x1b[0m\u2028é?token=x", TRACE_ID, "redis://u:p@h/0 failed, input_value='x', input_type=str"),
        size=512,
        cases=25,
        check=_one_object,
    ),
    Parser(
        name="spans that are sent",
        wide=True,
        call=_span_with,
        tokens=("a", "é", "\ud800", "\x00", "\n", "\u2028"),
        examples=("name", "\ud800"),
        cases=30,
        check=_is_otlp,
    ),
    Parser(
        name="answers of collectors",
        call=_partial_success,
        tokens=("\x0a", "\x00", "\x0a\x00", "\x0a\x02\x08\x01", "\x12\x01a", "\xff", "\x0b", "\x0c", "\x80"),
        examples=("\x0a\x05\x08\x02\x12\x01x",),
        cases=60,
    ),
    Parser(
        name="URLs and answers of clients",
        call=_sent,
        tokens=("a", "/", "?", "=", "&", "#", "%", "token=", ";", "health", "internal/", "."),
        frames=(("", ""), ("?", ""), ("internal/", "")),
        examples=("x?token=a&b=c#code=d", "x"),
        cases=60,
    ),
    Parser(
        name="headers that are copied",
        call=_copied,
        tokens=(
            *(
                "a",
                ",",
                "=",
                ";",
                " ",
                "-",
                "a=b,",
                "\n",
                "a\n",
                f"{REQUEST_ID},",
                f"{TRACE_ID}-",
                f"{PARENT}\n",
                "rv:",
                "%20",
            ),
        ),
        frames=(("", ""), ("Root=1-", "")),
        examples=(f"{REQUEST_ID}, a=b\n{PARENT}", f"a=b,ot=th:8,{REQUEST_ID}", PARENT),
        size=1024,
        cases=30,
    ),
    Parser(
        name="OTLP as protobuf",
        call=functools.partial(_otlp, otlp.PROTOBUF),
        tokens=(
            "\x0a\x00",
            "\x0a\x02\x12\x00",
            "\x0a\x04\x12\x02\x12\x00",
            _NESTED,
            "\x0b",
            "\x0c",
            "\x80",
            "\xff",
            "\x08\x01",
            "\x0a",
        ),
        examples=(_checkout(), _checkout_logs(), _NESTED),
        cases=40,
        prepare=_forget_viewer,
    ),
    Parser(
        name="OTLP as JSON",
        call=functools.partial(_otlp, otlp.JSON),
        tokens=(
            *_JSON_TOKENS,
            *(
                '{"resourceSpans":[',
                '{"scopeSpans":[',
                "{},",
                '{"traceId":"00","spanId":"00"},',
                '"a":1,',
                '"traceId":"0a",',
            ),
            *('{"key":"a","value":{"stringValue":"b"}},', '{"arrayValue":{"values":[', '{"kvlistValue":{"values":['),
        ),
        frames=(
            ("", ""),
            ('{"resourceSpans":[', "{}]}"),
            ('{"resourceSpans":[{"scopeSpans":[{"spans":[', "{}]}]}]}"),
            ('{"resourceSpans":[{"resource":{"attributes":[', "{}]}}]}"),
        ),
        examples=(
            _checkout_json(),
            '{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"traceId":"' + TRACE_ID + '"}]}]}]}',
        ),
        cases=25,
        of_patterns=False,
        prepare=_forget_viewer,
    ),
    Parser(
        name="gzip",
        call=_gzip,
        tokens=(
            gzip.compress(b"", mtime=0).decode("latin-1"),
            gzip.compress(b"a" * 50, mtime=0).decode("latin-1"),
            "\x1f\x8b",
            "\x00",
            "\x08",
        ),
        ends=("\x00", "\x1f\x8b\x08"),
        examples=(gzip.compress(b"x", mtime=0).decode("latin-1") * 2,),
        size=32_768,
        cases=30,
    ),
    Parser(
        name="the viewer's questions",
        call=_asked,
        tokens=("a", "/", "..", "%", "&", "=", "0", "9", ":", ";", TRACE_ID),
        examples=(TRACE_ID, REQUEST_ID, "9"),
        cases=20,
        prepare=_forget_viewer,
    ),
    Parser(
        name="traces that are understood",
        call=_understood,
        tokens=(*"SsCceroylw", "CS", "Sc", "le", "we"),
        ends=(),
        frames=(("", ""), ("S", ""), ("C", "S")),
        examples=("SCsceew", "Sslrwoy", "yyy", "wl"),
        size=512,
        cases=20,
        of_patterns=False,
    ),
    Parser(
        name="traces that are told",
        call=_told,
        tokens=tuple("SsCceroylw"),
        ends=(),
        examples=("SCsceew", "Sslrwoy", "yyy", "wl"),
        size=16,
        cases=18,
        of_patterns=False,
    ),
    Parser(
        name="traces that are put together",
        call=_merged,
        tokens=(*"SsCerolwhn", "ne", "wh"),
        ends=(),
        examples=("SCshnlw", "hhn"),
        size=128,
        cases=30,
        of_patterns=False,
    ),
    Parser(
        name="traces by half an id",
        call=_many_traces,
        tokens=("h", "w"),
        ends=(),
        examples=("hwh",),
        size=256,
        of_patterns=False,
    ),
    Parser(
        name="answers over HTTP",
        call=_over_http,
        tokens=(*_JSON_TOKENS, "<", "\n"),
        examples=('{"a": 1}', "no org id"),
        size=4096,
        cases=20,
    ),
    Parser(
        name="answers of Jaeger",
        call=functools.partial(_answers, JaegerStore),
        tokens=(*_JSON_TOKENS, _SPAN_OF_JAEGER, _TAG, '{"traceID":"1","spans":[', '"a",'),
        frames=(
            ("", ""),
            ('{"data":[{"traceID":"1","spans":[', _SPAN_OF_JAEGER[:-1] + "]}]}"),
            (
                '{"data":[{"traceID":"1","spans":[{"traceID":"1","spanID":"1","operationName":"x","startTime":1,"duration":1,"tags":[',
                _TAG[:-1] + "]}]}]}",
            ),
        ),
        examples=(
            '{"data":[{"traceID":"1","processes":{"p1":{"serviceName":"a"}},"spans":[' + _SPAN_OF_JAEGER[:-1] + "]}]}",
            '{"data":["a"]}',
        ),
        cases=40,
        of_patterns=False,
    ),
    Parser(
        name="answers of Tempo",
        call=functools.partial(_answers, TempoStore),
        tokens=(
            *_JSON_TOKENS,
            _SPAN_OF_TEMPO,
            '{"key":"a","value":{"stringValue":"b"}},',
            '{"arrayValue":{"values":[',
            "{},",
            "A",
            "=",
        ),
        frames=(
            ("", ""),
            ('{"trace":{"resourceSpans":[{"scopeSpans":[{"spans":[', _SPAN_OF_TEMPO[:-1] + "]}]}]}}"),
            ('{"trace":{"resourceSpans":[{"scopeSpans":[{"spans":[{"spanId":"', '"}]}]}]}}'),
            ('{"trace":{"resourceSpans":[{"resource":{"attributes":[', '{"key":"a","value":{}}]}}]}}'),
        ),
        examples=(
            '{"trace":{"resourceSpans":[{"resource":{"attributes":[{"key":"service.name","value":{"stringValue":"a"}},{"key":"l","value":'
            '{"arrayValue":{"values":[{"intValue":"1"},{"kvlistValue":{"values":[]}}]}}}]},"scopeSpans":[{"spans":['
            + _SPAN_OF_TEMPO[:-1]
            + "]}]}]}}",
            '{"traces":[{"traceID":"1"}]}',
            '{"batches":[{"scopeSpans":[{"spans":[{"traceId":"'
            + TRACE_ID
            + '","spanId":"00000000000000B1","kind":3}]}]}]}',
        ),
        cases=40,
        of_patterns=False,
    ),
    Parser(
        name="answers of Loki",
        call=functools.partial(_answers, LokiStore),
        tokens=(*_JSON_TOKENS, _LINE_OF_LOKI, '{"stream":{},"values":[', '["1","x"],', '"a":"b",'),
        frames=(
            ("", ""),
            ('{"data":{"result":[{"stream":{},"values":[', _LINE_OF_LOKI[:-1] + "]}]}}"),
            ('{"data":{"result":[{"stream":{', '"a":"b"},"values":[["1","x"]]}]}}'),
        ),
        examples=('{"data":{"result":[{"stream":{"service_name":"a"},"values":[' + _LINE_OF_LOKI + '["2","{}"]]}]}}',),
        cases=40,
        of_patterns=False,
    ),
    Parser(
        name="answers of the embedded store",
        call=functools.partial(_answers, EmbeddedStore),
        tokens=(*_JSON_TOKENS, '{"trace_id":"1","spans":[],"logs":[]},'),
        frames=(("", ""), ('{"traces":[', '{"trace_id":"1","spans":[],"logs":[]}]}')),
        examples=(json.dumps({"traces": [as_json(local_payloads.checkout())]}),),
        cases=40,
        of_patterns=False,
    ),
    Parser(
        name="log lines that are read",
        wide=True,
        call=_read,
        tokens=(
            *(
                "{",
                "}",
                '"',
                ":",
                ",",
                " ",
                "=",
                "a",
                "\\",
                "\t",
                "[",
                "trace_id=",
                "request_id",
                "request_id: ",
                "request_id=",
            ),
            *(
                "2026-01-01T00:00:00",
                "12:00:00.000 ",
                "INFO",
                "ERROR ",
                TRACE_ID,
                REQUEST_ID,
                SPAN_ID,
                "0",
                "-",
                "span_id=",
                PARENT,
                "42",
            ),
        ),
        frames=(
            ("", ""),
            (f"{REQUEST_ID} ", ""),
            ("12:00:00.000 INFO", ""),
            ("request_id", "=42"),
            ('{"request_id":"' + REQUEST_ID + '","exception":"', '"}'),
        ),
        examples=(
            f"12:00:00.123 INFO     app  hello request_id={REQUEST_ID} trace_id={TRACE_ID} span_id={SPAN_ID}",
            f'2026-01-01T00:00:00.1Z stdout F {{"message":"x","request_id":"{REQUEST_ID}","exception":"E: x","timestamp":"2026-01-01T00:00:00Z"}}',
            '{"log":"request_id=42 x\\n","stream":"stdout","time":"2026-01-01T00:00:00Z"}',
            '{"log":"{\\"a\\":1}","stream":"stdout","time":17}',
            f'{{"record":{{"extra":{{"request_id":"{REQUEST_ID}"}},"level":{{"name":"INFO"}},"time":{{"timestamp":1.5}}}}}}',
            f'1.1.1.1 - - [10/Oct/2026:13:55:36 +0000] "GET / HTTP/1.1" 200 {PARENT}',
            f'{{"dd.trace_id":"{int(TRACE_ID[16:], 16)}","logging.googleapis.com/trace":"projects/p/traces/{TRACE_ID}"}}',
            f'{{"msg":"about {REQUEST_ID}"}}',
            f"about {REQUEST_ID} it is",
            "42 request_id: 42",
        ),
        cases=50,
    ),
    Parser(
        name="tracebacks that are read",
        wide=True,
        call=_stack_of_line,
        tokens=_TRACEBACK,
        frames=(("", ""), ("Traceback (most recent call last):\n", "\nValueError: x")),
        ends=("\n", "x"),
        examples=(local_payloads.STACK, "  | " + local_payloads.STACK.replace("\n", "\n  | ")),
        cases=120,
    ),
    Parser(
        name="log files",
        call=_file,
        tokens=(
            "\n",
            "a",
            f"{REQUEST_ID}\n",
            "42 ",
            "request_id=42\n",
            "  | ",
            " x\n",
            "{",
            "Traceback (most recent call last):\n",
            "\r",
        ),
        frames=(("", ""), (f"{REQUEST_ID}\nTraceback (most recent call last):\n", "")),
        ends=("\nValueError: x",),
        examples=(f"x {REQUEST_ID}\n{local_payloads.STACK}next", "request_id=42\n"),
        size=4096,
        cases=28,
        of_patterns=False,
    ),
    Parser(
        name="log files in gzip",
        call=functools.partial(_file, zipped=True),
        tokens=(
            gzip.compress(b"", mtime=0).decode("latin-1"),
            gzip.compress(f"{REQUEST_ID}\n".encode(), mtime=0).decode("latin-1"),
            *("\x1f\x8b", "\x00"),
        ),
        ends=("\x00",),
        examples=(gzip.compress(f"x {REQUEST_ID}\n".encode(), mtime=0).decode("latin-1"),),
        size=8192,
        cases=20,
        of_patterns=False,
    ),
)
