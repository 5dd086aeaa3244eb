"""
One CLIENT span for each physical attempt, and headers that name exactly that span.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import traceback
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import baggage, propagate
from opentelemetry import context as otel_context
from opentelemetry.context import _SUPPRESS_HTTP_INSTRUMENTATION_KEY, _SUPPRESS_INSTRUMENTATION_KEY
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.trace import NoOpTracerProvider, SpanKind, StatusCode, get_current_span

from otel_correlation import guard, semconv
from otel_correlation.policy import redact_url
from tests.clients_probe import REQUEST_ID, SIDES, SPAN_ID, TRACE_ID, Probe, Side, attempts, request, traceparent

if TYPE_CHECKING:
    from collections.abc import Iterator

CALLERS = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
OURS = ("traceparent", "tracestate", "baggage", "x-request-id")


@pytest.fixture(params=SIDES, ids=repr)
def side(request: pytest.FixtureRequest) -> Side:
    """
    Each of the four ways to send.
    """
    found: Side = request.param
    return found


@pytest.fixture
def probe() -> Iterator[Probe]:
    """
    Every client is traced.
    """
    with attempts(Probe()) as found:
        yield found


class Server:
    """
    Answers with what it was told, and keeps what it saw.
    """

    def __init__(self, side: Side, *answers: Any) -> None:
        self._side = side
        self._answers = list(answers)
        self.seen: list[list[tuple[str, str]]] = []
        self.requests: list[Any] = []

    def __call__(self, request: Any) -> Any:
        self.requests.append(request)
        self.seen.append([(name, value) for name, value in request.headers.multi_items() if name in OURS])
        answer = self._answers.pop(0) if self._answers else 200
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, int):
            return self._side.library.Response(answer, text="hi", extensions={"http_version": b"HTTP/1.1"})
        if isinstance(answer, str):
            return self._side.library.Response(302, headers={"location": answer})
        return answer

    @property
    def transport(self) -> Any:
        return self._side.mock(self)


def test_one_request_is_one_client_span(side: Side, probe: Probe) -> None:
    """
    Name, kind, parent, attributes and their types, status: exactly the stable conventions.
    """
    with request():
        response = side.fetch(Server(side).transport)
    assert response.text == "hi"
    span = probe.span
    assert (span.name, span.kind, span.status.status_code) == ("GET", SpanKind.CLIENT, StatusCode.UNSET)
    assert (span.parent.trace_id, span.parent.span_id) == (TRACE_ID, SPAN_ID)
    assert span.get_span_context().trace_id == TRACE_ID
    assert dict(span.attributes) == {
        "http.request.method": "GET",
        "url.full": "http://orders:8001/items/3",
        "server.address": "orders",
        "server.port": 8001,
        "http.response.status_code": 200,
        "network.protocol.version": "1.1",
        "request_id": REQUEST_ID,
    }
    assert type(span.attributes["server.port"]) is int
    assert type(span.attributes["http.response.status_code"]) is int
    assert not span.events
    assert not span.links
    assert span.instrumentation_scope.name == "otel_correlation.client"


def test_a_foreign_provider_gets_the_same_span(side: Side) -> None:
    """
    Where the SDK has to make the span itself, it says the same.
    """
    with attempts(Probe(light=False)) as probe, request():
        server = Server(side)
        side.fetch(server.transport)
    assert probe.span.attributes["http.response.status_code"] == 200
    assert dict(server.seen[0])["traceparent"] == traceparent(probe.span)


def test_headers_name_exactly_that_span(side: Side, probe: Probe) -> None:
    """
    traceparent, tracestate, baggage and the request id go out, each once.
    """
    server = Server(side)
    with request(state=[("vendor", "a"), ("ot", "th:0")]):
        token = otel_context.attach(baggage.set_baggage("tier", "gold"))
        side.fetch(server.transport)
        otel_context.detach(token)
    assert server.seen == [
        [
            ("traceparent", traceparent(probe.span)),
            ("tracestate", "vendor=a,ot=th:0"),
            ("baggage", "tier=gold"),
            ("x-request-id", REQUEST_ID),
        ]
    ]


def test_the_span_is_current_for_the_transport_only(side: Side, probe: Probe) -> None:
    """
    What a transport starts is a child of the attempt; afterwards the caller's span is current again.
    """
    inside: list[int] = []

    def handler(_: Any) -> Any:
        inside.append(get_current_span().get_span_context().span_id)
        return side.library.Response(200)

    with request():
        side.fetch(side.mock(handler))
        assert get_current_span().get_span_context().span_id == SPAN_ID
    assert inside == [probe.span.get_span_context().span_id]


def test_outside_of_a_request_the_span_is_a_root(side: Side, probe: Probe) -> None:
    """
    Without a current trace the attempt roots one, and there is no request id to send.
    """
    server = Server(side)
    side.fetch(server.transport)
    assert probe.span.parent is None
    assert [name for name, _ in server.seen[0]] == ["traceparent", "tracestate"]


def test_an_unsampled_trace_goes_on(side: Side, probe: Probe) -> None:
    """
    Without sampling there is no span to export, but a new parent id with flag 00 and the request id leave.
    """
    server = Server(side)
    with request(sampled=False):
        side.fetch(server.transport)
    assert probe.spans == []
    sent = dict(server.seen[0])
    assert sent["traceparent"].startswith(f"00-{TRACE_ID:032x}-")
    assert sent["traceparent"].endswith("-00")
    assert f"{SPAN_ID:016x}" not in sent["traceparent"]
    assert sent["x-request-id"] == REQUEST_ID


def test_without_a_provider_the_request_id_goes_on(side: Side) -> None:
    """
    Where nobody makes spans, only the request id leaves.
    """
    probe = Probe()
    probe.provider = NoOpTracerProvider()  # type: ignore[assignment]
    server = Server(side)
    with attempts(probe), request(traced=False):
        side.fetch(server.transport)
    assert server.seen == [[("x-request-id", REQUEST_ID)]]


def test_with_the_sdk_disabled_the_request_id_goes_on(side: Side) -> None:
    """
    OTEL_SDK_DISABLED: no spans, request id only.
    """
    server = Server(side)
    with attempts(Probe(), environ={"OTEL_SDK_DISABLED": "true"}) as probe, request():
        side.fetch(server.transport)
    assert server.seen == [[("x-request-id", REQUEST_ID)]]
    assert probe.spans == []


@pytest.mark.parametrize("names", ["tracecontext", "baggage", "xrequestid", "none"])
def test_propagators_decide_what_leaves(side: Side, names: str) -> None:
    """
    OTEL_PROPAGATORS names what is written; the span is made either way.
    """
    server = Server(side)
    with attempts(Probe(), environ={"OTEL_PROPAGATORS": names}) as probe, request():
        side.fetch(server.transport)
    expected = {"tracecontext": ["traceparent"], "xrequestid": ["x-request-id"]}
    assert [name for name, _ in server.seen[0]] == expected.get(names, [])
    assert probe.span.name == "GET"


@pytest.mark.parametrize(
    "key", [_SUPPRESS_INSTRUMENTATION_KEY, _SUPPRESS_HTTP_INSTRUMENTATION_KEY, "suppress_instrumentation"]
)
def test_suppressed_means_nothing_at_all(side: Side, probe: Probe, key: str) -> None:
    """
    No span and no header where instrumentation is suppressed.
    """
    server = Server(side)
    with request():
        token = otel_context.attach(otel_context.set_value(key, True))
        side.fetch(server.transport)
        otel_context.detach(token)
    assert server.seen == [[]]
    assert probe.spans == []


def test_a_traceparent_of_the_callers_stays_and_is_linked(side: Side, probe: Probe) -> None:
    """
    What the caller set is sent unchanged, without any part of ours, and the span links to it.
    """
    server = Server(side)
    with request(state=[("vendor", "a")]):
        side.fetch(server.transport, headers={"Traceparent": CALLERS, "X-REQUEST-ID": "mine-0001", "baggage": "a=1"})
    assert server.seen == [[("traceparent", CALLERS), ("x-request-id", "mine-0001"), ("baggage", "a=1")]]
    (link,) = probe.span.links
    assert f"{link.context.trace_id:032x}-{link.context.span_id:016x}" == CALLERS[3:52]
    assert link.context.is_remote
    assert probe.span.get_span_context().trace_id == TRACE_ID


def test_a_wrong_traceparent_of_the_callers_stays(side: Side, probe: Probe) -> None:
    """
    Nonsense of the caller's is sent as it is, and there is nothing to link to.
    """
    server = Server(side)
    with request():
        side.fetch(server.transport, headers={"traceparent": "nonsense"})
    assert dict(server.seen[0])["traceparent"] == "nonsense"
    assert not probe.span.links


def test_each_hop_of_a_redirect_is_an_attempt(side: Side, probe: Probe) -> None:
    """
    A redirect to another host: one span each, headers made anew, never twice, and the ordinal of the re-send.
    """
    server = Server(side, "http://other/landing", "/final")
    with request():
        response = side.fetch(server.transport, follow_redirects=True)
    assert len(response.history) == 2
    assert [span.attributes.get("http.request.resend_count") for span in probe.spans] == [None, 1, 2]
    assert [span.attributes["server.address"] for span in probe.spans] == ["orders", "other", "other"]
    assert [span.attributes["http.response.status_code"] for span in probe.spans] == [302, 302, 200]
    assert [span.parent.span_id for span in probe.spans] == [SPAN_ID] * 3
    assert server.seen == [[("traceparent", traceparent(span)), ("x-request-id", REQUEST_ID)] for span in probe.spans]
    assert all(not span.links for span in probe.spans)


def test_a_redirect_that_is_followed_by_hand(side: Side, probe: Probe) -> None:
    """
    ``response.next_request`` carries headers of ours, and they are replaced.
    """
    server = Server(side, "http://other/landing")

    async def job_async(client: Any) -> None:
        await client.send((await client.get("http://orders/")).next_request)

    def job(client: Any) -> None:
        client.send(client.get("http://orders/").next_request)

    with request():
        side.run(side.client(server.transport), job_async if side.is_async else job)
    assert [dict(seen)["traceparent"] for seen in server.seen] == [traceparent(span) for span in probe.spans]
    assert [len(seen) for seen in server.seen] == [2, 2]


POLICIES = [
    semconv.OTEL_CORRELATION_OUTBOUND_TRACEPARENT,
    semconv.OTEL_CORRELATION_OUTBOUND_BAGGAGE,
    semconv.OTEL_CORRELATION_OUTBOUND_REQUEST_ID,
]


def test_a_redirect_asks_the_policy_again(side: Side) -> None:
    """
    What may not leave for a host is taken off the redirect that httpx copied it to; the span is made either way.
    """
    server = Server(side, "http://outside/")
    with attempts(Probe(), environ=dict.fromkeys(POLICIES, "orders")) as probe, request():
        token = otel_context.attach(baggage.set_baggage("tier", "gold"))
        side.fetch(server.transport, follow_redirects=True)
        otel_context.detach(token)
    assert [[name for name, _ in seen] for seen in server.seen] == [["traceparent", "baggage", "x-request-id"], []]
    assert len(probe.spans) == 2


def test_the_policy_leaves_the_callers_own_headers(side: Side) -> None:
    """
    What the application set itself leaves wherever it sends it, redirects included; the policy only keeps ours back.
    """
    server = Server(side, "http://outside/")
    own = {"traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-01", "x-request-id": "its-own-request-id"}
    with attempts(Probe(), environ=dict.fromkeys(POLICIES, "none")) as probe, request():
        side.fetch(server.transport, headers=own, follow_redirects=True)
    assert [dict(seen) for seen in server.seen] == [own, own]
    assert [span.links[0].context.trace_id for span in probe.spans] == [int("1" * 32, 16)] * 2


@pytest.mark.parametrize("allowed", range(3))
def test_the_policy_decides_for_each_header(side: Side, allowed: int) -> None:
    """
    traceparent, baggage and request id are allowed one by one.
    """
    server = Server(side)
    environ = {name: "orders" if index == allowed else "none" for index, name in enumerate(POLICIES)}
    with attempts(Probe(), environ=environ), request():
        token = otel_context.attach(baggage.set_baggage("tier", "gold"))
        side.fetch(server.transport)
        otel_context.detach(token)
    assert [name for name, _ in server.seen[0]] == [("traceparent", "baggage", "x-request-id")[allowed]]


def test_one_request_object_sent_twice(side: Side, probe: Probe) -> None:
    """
    The same object gets a new traceparent each time, and each call counts from the beginning.
    """
    server = Server(side)
    client = side.client(server.transport)
    same = client.build_request("GET", "http://orders/")
    with request():
        side.send(client, same, same)
    assert [dict(seen)["traceparent"] for seen in server.seen] == [traceparent(span) for span in probe.spans]
    assert [len(seen) for seen in server.seen] == [2, 2]
    assert all("http.request.resend_count" not in span.attributes for span in probe.spans)
    assert all(not span.links for span in probe.spans)


def test_what_we_keep_on_a_request_is_not_the_users_business(side: Side, probe: Probe) -> None:
    """
    The user's extensions stay theirs; what was sent can be read from the response's request.
    """
    extensions = {"trace": None}
    server = Server(side)
    client = side.client(server.transport)
    prepared = client.build_request("GET", "http://orders/", extensions=extensions)
    before = dict(prepared.extensions)
    with request():
        (response,) = side.send(client, prepared)
    assert response.request is prepared
    assert response.request.extensions.keys() == {*before, "timeout"}
    assert extensions == {"trace": None}
    assert response.request.headers["traceparent"] == traceparent(probe.span)
    assert pickle.loads(pickle.dumps(response)).request.headers["traceparent"] == traceparent(probe.span)


def test_an_authentication_flow_counts_its_re_send(side: Side, probe: Probe) -> None:
    """
    The 401 and the authenticated attempt are two spans; the second is a re-send of the first.
    """

    class Challenge(side.library.Auth):  # type: ignore[misc, name-defined]
        def auth_flow(self, request: Any) -> Any:
            response = yield request
            if response.status_code == 401:
                request.headers["Authorization"] = "Bearer x"
                yield request

    server = Server(side, 401)
    with request():
        side.fetch(server.transport, auth=Challenge())
    first, second = probe.spans
    assert (first.attributes["error.type"], first.status.status_code) == ("401", StatusCode.ERROR)
    assert (second.attributes["http.request.resend_count"], second.status.status_code) == (1, StatusCode.UNSET)
    assert [dict(seen)["traceparent"] for seen in server.seen] == [traceparent(first), traceparent(second)]


def retrying(side: Side, inner: Any, *, copies: bool) -> Any:
    """
    Return a user's transport that sends again after failures, the same request or copies of it.
    """

    def again(request: Any) -> Any:
        if not copies:
            return request
        return side.library.Request(request.method, request.url, headers=request.headers, stream=request.stream)

    class Retry(side.library.BaseTransport, side.library.AsyncBaseTransport):  # type: ignore[misc, name-defined]
        def handle_request(self, request: Any) -> Any:
            for _ in range(2):
                with contextlib.suppress(side.library.ConnectError):
                    return inner.handle_request(again(request))
            return inner.handle_request(again(request))

        async def handle_async_request(self, request: Any) -> Any:
            for _ in range(2):
                with contextlib.suppress(side.library.ConnectError):
                    return await inner.handle_async_request(again(request))
            return await inner.handle_async_request(again(request))

    return Retry()


@pytest.mark.parametrize("copies", [False, True])
def test_a_transport_that_sends_again(side: Side, probe: Probe, copies: bool) -> None:
    """
    Each attempt below a retrying transport has its span, its own traceparent and its ordinal, as siblings.
    """
    refused = [side.library.ConnectError("refused"), side.library.ConnectError("refused")]
    server = Server(side, *refused)
    with request():
        response = side.fetch(retrying(side, server.transport, copies=copies))
    assert response.status_code == 200
    failed = f"{side.library.__name__}.ConnectError"
    assert [span.attributes.get("error.type") for span in probe.spans] == [failed, failed, None]
    assert [span.attributes.get("http.request.resend_count") for span in probe.spans] == [None, 1, 2]
    assert [span.parent.span_id for span in probe.spans] == [SPAN_ID] * 3
    assert server.seen == [[("traceparent", traceparent(span)), ("x-request-id", REQUEST_ID)] for span in probe.spans]
    assert not any(span.links for span in probe.spans)


def test_a_transport_inside_a_transport_is_one_attempt(side: Side, probe: Probe) -> None:
    """
    A mock that passes a request on to another transport of httpx's sends it once.
    """
    inner = side.mock(lambda _: side.library.Response(204))

    async def pass_on_async(request: Any) -> Any:
        return await inner.handle_async_request(request)

    with request():
        side.fetch(side.mock(pass_on_async if side.is_async else inner.handle_request))
    assert probe.span.attributes["http.response.status_code"] == 204


def test_a_transport_of_the_users_own(side: Side, probe: Probe) -> None:
    """
    A transport that has nothing to do with httpx's makes a span like any other.
    """

    class Own(side.library.BaseTransport, side.library.AsyncBaseTransport):  # type: ignore[misc, name-defined]
        def handle_request(self, request: Any) -> Any:
            assert request.headers["x-request-id"] == REQUEST_ID
            return side.library.Response(503)

        async def handle_async_request(self, request: Any) -> Any:
            return self.handle_request(request)

    with request():
        side.fetch(Own())
    assert probe.span.attributes["error.type"] == "503"


def test_a_transport_without_a_client(side: Side, probe: Probe) -> None:
    """
    Even a transport that is called directly is an attempt.
    """
    server = Server(side)
    direct = side.library.Request("GET", "http://orders/")
    with request():
        if side.is_async:
            asyncio.run(server.transport.handle_async_request(direct))
        else:
            server.transport.handle_request(direct)
    assert dict(server.seen[0])["traceparent"] == traceparent(probe.span)


def test_clients_however_they_were_made(side: Side) -> None:
    """
    A client from before, a subclass, mounts, event hooks and module functions: one span each.
    """
    server = Server(side)
    early = side.client(server.transport)
    kind = side.library.AsyncClient if side.is_async else side.library.Client

    class Mine(kind):  # type: ignore[misc, valid-type]
        pass

    seen_by_hook: list[bool] = []

    async def hook_async(request: Any) -> None:
        seen_by_hook.append("traceparent" in request.headers)

    def hook(response: Any) -> None:
        seen_by_hook.append("traceparent" in response.request.headers)

    async def response_hook_async(response: Any) -> None:
        hook(response)

    with attempts(Probe()) as probe:
        side.run(early, lambda client: client.get("http://orders/"))
        side.run(Mine(transport=server.transport), lambda client: client.get("http://orders/"))
        side.run(side.client(mounts={"http://": server.transport}), lambda client: client.get("http://orders/"))
        hooks = {"response": [response_hook_async if side.is_async else hook]}
        side.run(side.client(server.transport, event_hooks=hooks), lambda client: client.get("http://orders/"))
    assert len(probe.spans) == 4
    assert seen_by_hook == [True]
    assert [dict(seen)["traceparent"] for seen in server.seen] == [traceparent(span) for span in probe.spans]


@pytest.mark.parametrize("status", [400, 404, 500, 503])
def test_client_and_server_errors_are_errors(side: Side, probe: Probe, status: int) -> None:
    """
    From 400 on the span has the status as text and no description that repeats it.
    """
    side.fetch(Server(side, status).transport)
    assert probe.span.attributes["error.type"] == str(status)
    assert probe.span.attributes["http.response.status_code"] == status
    assert (probe.span.status.status_code, probe.span.status.description) == (StatusCode.ERROR, None)
    assert not probe.span.events


@pytest.mark.parametrize("status", [204, 304, 399])
def test_other_statuses_are_no_errors(side: Side, probe: Probe, status: int) -> None:
    """
    Below 400 the status stays unset.
    """
    side.fetch(Server(side, status).transport)
    assert "error.type" not in probe.span.attributes
    assert probe.span.status.status_code is StatusCode.UNSET


def test_an_exception_ends_the_span_and_passes_unchanged(side: Side, probe: Probe) -> None:
    """
    The application gets the very same exception with its traceback; the span has it once.
    """
    error = side.library.ReadTimeout("too slow")
    with pytest.raises(side.library.ReadTimeout) as caught:
        side.fetch(Server(side, error).transport)
    assert caught.value is error
    assert "__call__" in [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    span = probe.span
    assert span.attributes["error.type"] == f"{side.library.__name__}.ReadTimeout"
    assert "http.response.status_code" not in span.attributes
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "ReadTimeout: too slow")
    (event,) = span.events
    assert event.attributes["exception.type"] == f"{side.library.__name__}.ReadTimeout"


def test_an_exception_of_a_response_keeps_its_status(side: Side, probe: Probe) -> None:
    """
    A transport that raises for a status still tells which one it was, without the URL in its text.
    """
    failed = side.library.Response(502, request=side.library.Request("GET", "http://orders/"))
    text = "502 for url 'http://orders/?token=secret'"
    error = side.library.HTTPStatusError(text, request=failed.request, response=failed)
    with pytest.raises(side.library.HTTPStatusError):
        side.fetch(Server(side, error).transport)
    assert probe.span.attributes["http.response.status_code"] == 502
    assert probe.span.attributes["error.type"] == f"{side.library.__name__}.HTTPStatusError"
    assert probe.span.status.description == "HTTPStatusError"


@pytest.mark.parametrize("side", [side for side in SIDES if side.is_async], ids=repr)
def test_being_cancelled_is_no_success(side: Side, probe: Probe) -> None:
    """
    A call that was cancelled has no answer: ``error.type`` and status ERROR, and nobody's traceback.
    """

    async def main() -> None:
        started = asyncio.Event()

        async def handler(_: Any) -> Any:
            started.set()
            await asyncio.Event().wait()

        async with side.client(side.mock(handler)) as client:
            task = asyncio.create_task(client.get("http://orders/"))
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    assert probe.span.attributes["error.type"] == "asyncio.exceptions.CancelledError"
    assert probe.span.status.status_code is StatusCode.ERROR
    assert not probe.span.events


def test_an_unknown_method(side: Side, probe: Probe) -> None:
    """
    A method outside the known ones never becomes a span name.
    """
    side.fetch(Server(side).transport, method="brew")
    assert probe.span.name == "HTTP"
    assert probe.span.attributes["http.request.method"] == "_OTHER"
    assert probe.span.attributes["http.request.method_original"] == "BREW"


@pytest.mark.parametrize(("url", "port"), [("http://orders/", 80), ("https://orders/", 443), ("http://[::1]:81/", 81)])
def test_the_port_is_always_there(side: Side, probe: Probe, url: str, port: int) -> None:
    """
    A default port is a port.
    """
    side.fetch(Server(side).transport, url)
    assert probe.span.attributes["server.port"] == port
    assert probe.span.attributes["server.address"] in ("orders", "::1")


@pytest.mark.parametrize(
    ("wire", "version"), [(b"HTTP/2", "2"), (b"HTTP/1.0", "1.0"), (b"HTTP/3", "3"), (b"HTTP/9", "9"), (None, "1.1")]
)
def test_the_protocol_version(side: Side, probe: Probe, wire: bytes | None, version: str) -> None:
    """
    The version is what the transport spoke.
    """
    extensions = {} if wire is None else {"http_version": wire}
    side.fetch(Server(side, side.library.Response(200, extensions=extensions)).transport)
    assert probe.span.attributes["network.protocol.version"] == version


@pytest.mark.parametrize(
    ("url", "mode", "shown"),
    [
        ("http://u:p@h/a", "all", "http://REDACTED:REDACTED@h/a"),
        ("http://u@h:81/a@b?c=d@e", "all", "http://REDACTED:REDACTED@h:81/a@b?c=d@e"),
        ("http://a@b:p@h/", "all", "http://REDACTED:REDACTED@h/"),
        ("http://h/a@b", "sensitive", "http://h/a@b"),
        ("http://h/?x=u:p@y", "sensitive", "http://h/?x=u:p@y"),
        ("http://h/a?token=t&q=1", "sensitive", "http://h/a?token=REDACTED&q=1"),
        ("http://h/a?X-Amz-Signature=t&sig=2", "sensitive", "http://h/a?X-Amz-Signature=REDACTED&sig=REDACTED"),
        ("http://h/a?token=t&q=1", "none", "http://h/a?token=REDACTED&q=REDACTED"),
        ("http://h/a?token=t&q=1", "all", "http://h/a?token=t&q=1"),
        ("http://h/a#access_token=t", "sensitive", "http://h/a#access_token=REDACTED"),
        ("http://h/a?q=1#frag", "none", "http://h/a?q=REDACTED#frag"),
        ("http://h/a?#", "none", "http://h/a?#"),
        ("mailto:a@b", "none", "mailto:a@b"),
    ],
)
def test_a_recorded_url_has_no_secrets(url: str, mode: str, shown: str) -> None:
    """
    Credentials always go; query values as the setting says; everything else stays as it was.
    """
    assert redact_url(url, mode) == shown


@given(st.text(), st.sampled_from(["all", "sensitive", "none"]))
def test_redaction_takes_any_text(text: str, mode: str) -> None:
    """
    No text makes it fail, and a password in the right place never survives it.
    """
    redact_url(text, mode)
    assert "hunter2" not in redact_url(f"http://user:hunter2@host/{text}", mode).partition("/host")[0].split("@host")[0]


def test_url_full_is_redacted(side: Side) -> None:
    """
    The setting reaches the span, and the request itself is sent as it was.
    """
    server = Server(side)
    with attempts(Probe(), environ={"OTEL_CORRELATION_QUERY_VALUES": "none"}) as probe:
        side.fetch(server.transport, "http://user:secret@orders/?q=1")
    assert probe.span.attributes["url.full"] == "http://REDACTED:REDACTED@orders/?q=REDACTED"
    assert str(server.requests[0].url) == "http://user:secret@orders/?q=1"


def test_captured_headers(side: Side) -> None:
    """
    Configured headers are lists under their lower-case name with dashes; sanitised ones lose their value.
    """
    captured = "OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_"
    environ = {
        captured + "CLIENT_REQUEST": "X-.*",
        captured + "CLIENT_RESPONSE": "Content-Type,set-cookie",
        captured + "SANITIZE_FIELDS": ".*cookie",
    }
    answer = side.library.Response(200, text="x", headers=[("set-cookie", "a=1"), ("set-cookie", "b=2")])
    with attempts(Probe(), environ=environ) as probe, request():
        side.fetch(Server(side, answer).transport, headers={"X-Tenant": "acme"})
    found = {name: value for name, value in probe.span.attributes.items() if ".header." in name}
    assert found == {
        "http.request.header.x-tenant": ("acme",),
        "http.request.header.x-request-id": (REQUEST_ID,),
        "http.response.header.content-type": ("text/plain; charset=utf-8",),
        "http.response.header.set-cookie": ("[REDACTED]", "[REDACTED]"),
    }


@pytest.mark.parametrize("pattern", ["items/.*", "orders:8001", "nothing,http://orders"])
def test_an_excluded_url_makes_no_span(side: Side, pattern: str) -> None:
    """
    An excluded URL is not an attempt of ours, but the trace of the caller goes on through it.
    """
    server = Server(side)
    with attempts(Probe(), environ={"OTEL_PYTHON_HTTPX_EXCLUDED_URLS": pattern}) as probe, request():
        side.fetch(server.transport)
    assert probe.spans == []
    assert server.seen == [[("traceparent", f"00-{TRACE_ID:032x}-{SPAN_ID:016x}-01"), ("x-request-id", REQUEST_ID)]]


def test_a_wrong_exclusion_is_left_out(side: Side, caplog: pytest.LogCaptureFixture) -> None:
    """
    A pattern that does not compile costs one line, not the service and not the other patterns.
    """
    with attempts(Probe(), environ={"OTEL_PYTHON_HTTPX_EXCLUDED_URLS": "(,items"}) as probe:
        side.fetch(Server(side).transport)
    assert probe.spans == []
    assert "'(' is not a regular expression" in caplog.text


def points(reader: InMemoryMetricReader) -> list[Any]:
    """
    Return the data points of the one metric there is.
    """
    data = reader.get_metrics_data()
    assert data is not None
    (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
    assert (metric.name, metric.unit) == ("http.client.request.duration", "s")
    return list(metric.data.data_points)


@pytest.mark.parametrize("sampled", [True, False])
def test_durations_are_measured_where_there_is_a_meter(side: Side, sampled: bool) -> None:
    """
    One point per attempt with stable names, also for traces that are not sampled.
    """
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    server = Server(side, 500, side.library.ConnectError("x"))
    with attempts(Probe(), meter_provider=provider), request(sampled=sampled):
        side.fetch(server.transport)
        with pytest.raises(side.library.ConnectError):
            side.fetch(server.transport)
    answered, failed = sorted(points(reader), key=lambda point: str(point.attributes["error.type"]))
    common = {"http.request.method": "GET", "server.address": "orders", "server.port": 8001}
    assert dict(answered.attributes) == {
        **common,
        "http.response.status_code": 500,
        "network.protocol.version": "1.1",
        "error.type": "500",
    }
    assert dict(failed.attributes) == {**common, "error.type": f"{side.library.__name__}.ConnectError"}
    assert answered.count == failed.count == 1
    assert answered.explicit_bounds == (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
    provider.shutdown()


class Vendor(TextMapPropagator):
    """
    A propagator of somebody else's, which writes two headers.
    """

    def extract(self, carrier: Any, context: Any = None, getter: Any = None) -> Any:
        return context

    def inject(self, carrier: Any, context: Any = None, setter: Any = None) -> None:
        carrier["X-Vendor-Trace"] = f"{get_current_span(context).get_span_context().span_id:016x}"
        carrier["X-Vendor-Flags"] = "1"

    @property
    def fields(self) -> set[str]:
        return {"X-Vendor-Trace", "X-Vendor-Flags"}


def test_a_propagator_of_somebody_elses(side: Side, probe: Probe) -> None:
    """
    The application's own global propagator writes what it wants; a header that the caller set keeps all of it out.
    """
    propagate.set_global_textmap(Vendor())
    server = Server(side, "/again")
    with request():
        side.fetch(server.transport, follow_redirects=True)
        side.fetch(server.transport, headers={"x-vendor-trace": "mine"})
    found = [
        [value for name, value in each.headers.multi_items() if name.startswith("x-vendor")] for each in server.requests
    ]
    spans = [f"{span.get_span_context().span_id:016x}" for span in probe.spans]
    assert found == [[spans[0], "1"], [spans[1], "1"], ["mine"]]


def test_hooks_get_contribs_arguments(side: Side) -> None:
    """
    Request hooks see the headers as they are sent; response hooks see both.
    """
    calls: list[tuple[Any, ...]] = []

    def request_hook(span: Any, info: Any) -> None:
        calls.append((span, info.method, str(info.url), "traceparent" in info.headers, info.stream, info.extensions))
        info.headers["X-Hook"] = "1"
        span.set_attribute("hook", 1)

    def response_hook(span: Any, info: Any, answer: Any) -> None:
        calls.append((span, info.method, answer.status_code, answer.headers["content-length"], answer.stream))

    async def async_request_hook(span: Any, info: Any) -> None:
        request_hook(span, info)

    async def async_response_hook(span: Any, info: Any, answer: Any) -> None:
        response_hook(span, info, answer)

    server = Server(side)
    prefix = "async_" if side.is_async else ""
    hooks: dict[str, Any] = {
        f"{prefix}request_hook": async_request_hook if side.is_async else request_hook,
        f"{prefix}response_hook": async_response_hook if side.is_async else response_hook,
    }
    with attempts(Probe(), **hooks) as probe:
        side.fetch(server.transport)
    assert [call[1:4] for call in calls] == [(b"GET", "http://orders:8001/items/3", True), (b"GET", 200, "2")]
    assert server.requests[0].headers["x-hook"] == "1"
    assert probe.span.attributes["hook"] == 1


def test_a_hook_that_fails_costs_a_line(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The request is answered although a hook raises.
    """
    monkeypatch.delenv(guard.STRICT_ENV)

    def broken(*_: Any) -> None:
        raise ValueError("hook")

    async def broken_async(*_: Any) -> None:
        raise ValueError("hook")

    hooks: dict[str, Any] = {
        "request_hook": broken,
        "response_hook": broken,
        "async_request_hook": broken_async,
        "async_response_hook": broken_async,
    }
    with attempts(Probe(), **hooks) as probe:
        assert side.fetch(Server(side).transport).status_code == 200
    assert probe.span.name == "GET"
    assert guard.counters()["internal_error.client.hook"] == 2


def test_telemetry_that_fails_is_not_the_applications_problem(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Whatever breaks inside of ours, the request is sent and answered.
    """
    monkeypatch.delenv(guard.STRICT_ENV)

    class Broken(Vendor):
        def inject(self, carrier: Any, context: Any = None, setter: Any = None) -> None:
            raise ValueError("propagator")

    with attempts(Probe()) as probe:
        propagate.set_global_textmap(Broken())
        assert side.fetch(Server(side).transport).status_code == 200
    assert guard.counters()["internal_error.client.begin"] >= 1
    assert all(span.end_time for span in probe.spans)


def test_a_response_that_says_nothing_sensible(side: Side, probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A transport's odd response reaches the application as it would without us.
    """
    monkeypatch.delenv(guard.STRICT_ENV)
    odd = side.library.Response(200, text="hi")
    odd.extensions = None
    with pytest.raises(TypeError):  # httpx's own
        side.fetch(Server(side, odd).transport)
    assert probe.span.end_time
