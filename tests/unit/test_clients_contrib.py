"""
contrib's httpx instrumentation, as users call it, drives our attempts; and everything can be put back.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import httpx
import httpx2
import pytest
from opentelemetry import propagate
from opentelemetry.instrumentation import httpx as contrib
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor as Alias

from otel_correlation import clients, propagators
from otel_correlation.guard import ConfigError
from otel_correlation.settings import Settings, from_environment, with_overrides
from tests.clients_probe import INSTRUMENTORS, SIDES, Probe, Side, attempts

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=SIDES, ids=repr)
def side(request: pytest.FixtureRequest) -> Side:
    """
    Each of the four ways to send.
    """
    found: Side = request.param
    return found


@pytest.fixture
def active() -> Iterator[None]:
    """
    Ours are under contrib's classes, and nothing is instrumented.
    """
    before = propagate.get_global_textmap()
    propagate.set_global_textmap(propagators.build(Settings()))
    clients.activate(lambda: from_environment({}))
    yield
    clients.deactivate()
    propagate.set_global_textmap(before)


def instrumentor(side: Side) -> Any:
    """
    Return contrib's object for this side's library.
    """
    return INSTRUMENTORS[side.library.__name__]()


def ok(side: Side) -> Any:
    """
    Return a transport that answers 200.
    """
    return side.mock(lambda _: side.library.Response(200))


def surface() -> dict[str, Any]:
    """
    Return everything that we may replace, as it is now.
    """
    owners: list[Any] = [
        contrib,
        contrib._BaseHTTPXClientInstrumentor,
        contrib._SyncOpenTelemetryTransportBase,
        contrib._AsyncOpenTelemetryTransportBase,
    ]
    for library in (httpx, httpx2):
        owners += [library.Client, library.AsyncClient, library.Client.__mro__[1]]
        owners += [library.HTTPTransport, library.AsyncHTTPTransport, library.MockTransport]
        owners += [library.ASGITransport, library.WSGITransport]
    return {f"{owner!r}.{name}": value for owner in owners for name, value in vars(owner).items() if callable(value)}


def test_deactivation_puts_everything_back() -> None:
    """
    After deactivation every function of httpx, httpx2 and contrib is the one it was; twice changes nothing.
    """
    before = surface()
    with attempts(Probe()):
        clients.activate(lambda: from_environment({}))
        clients.instrument_everything()
        assert surface() != before
    assert surface() == before
    clients.deactivate()
    assert surface() == before
    assert not any(kind().is_instrumented_by_opentelemetry for kind in INSTRUMENTORS.values())


def test_uninstrumented_means_unpatched(active: None, side: Side) -> None:
    """
    Activation alone touches no client, and the last uninstrument() leaves httpx as it was.
    """
    before = vars(side.library.Client)["_send_single_request"]
    probe = Probe()
    instrumentor(side).instrument(tracer_provider=probe.provider, skip_dep_check=True)
    assert vars(side.library.Client)["_send_single_request"] is not before
    side.fetch(ok(side))
    instrumentor(side).uninstrument()
    assert vars(side.library.Client)["_send_single_request"] is before
    side.fetch(ok(side))
    assert len(probe.spans) == 1


def test_instrumenting_twice_is_one_span(active: None, side: Side, caplog: pytest.LogCaptureFixture) -> None:
    """
    The second call only says so, as contrib's does; an alias and a second object are the same instrumentor.
    """
    probe = Probe()
    instrumentor(side).instrument(tracer_provider=probe.provider, skip_dep_check=True)
    instrumentor(side).instrument(tracer_provider=probe.provider, skip_dep_check=True)
    assert "already instrumented" in caplog.text
    assert Alias() is INSTRUMENTORS["httpx"]()
    side.fetch(ok(side))
    assert len(probe.spans) == 1


def test_uninstrument_one_client(active: None, side: Side) -> None:
    """
    One client can be left out while all others are traced, and be taken in again.
    """
    probe = Probe()
    instrumentor(side).instrument(tracer_provider=probe.provider, skip_dep_check=True)
    left_out, other = side.client(ok(side)), side.client(ok(side))
    instrumentor(side).uninstrument_client(left_out)

    async def twice_async(client: Any) -> None:
        await client.get("http://a/")
        instrumentor(side).instrument_client(client, tracer_provider=probe.provider)
        await client.get("http://again/")

    def twice(client: Any) -> None:
        client.get("http://a/")
        instrumentor(side).instrument_client(client, tracer_provider=probe.provider)
        client.get("http://again/")

    side.run(left_out, twice_async if side.is_async else twice)
    side.run(other, lambda client: client.get("http://other/"))
    assert [span.attributes["server.address"] for span in probe.spans] == ["again", "other"]


def test_instrument_one_client(active: None, side: Side, caplog: pytest.LogCaptureFixture) -> None:
    """
    Only the client that was named is traced, with its own hooks of its own kind; twice is once.
    """
    probe = Probe()
    called: list[str] = []

    def hook(span: Any, *_: Any) -> None:
        called.append(span.name)

    async def async_hook(span: Any, *_: Any) -> None:
        called.append(span.name)

    own = async_hook if side.is_async else hook
    traced, other = side.client(ok(side)), side.client(ok(side))
    for _ in range(2):
        instrumentor(side).instrument_client(traced, probe.provider, None, own, own)
    assert "already instrumented" in caplog.text
    assert traced._is_instrumented_by_opentelemetry
    side.run(traced, lambda client: client.get("http://traced/"))
    side.run(other, lambda client: client.get("http://other/"))
    assert [span.attributes["server.address"] for span in probe.spans] == ["traced"]
    assert called == ["GET", "GET"]
    instrumentor(side).uninstrument_client(traced)
    assert not traced._is_instrumented_by_opentelemetry


def test_hooks_of_the_other_kind_are_not_called(active: None, side: Side) -> None:
    """
    As in contrib, a plain hook is for plain clients and a coroutine function for asynchronous ones.
    """
    called: list[str] = []

    def hook(*_: Any) -> None:
        called.append("sync")

    async def async_hook(*_: Any) -> None:
        called.append("async")

    wrong = hook if side.is_async else async_hook
    client = side.client(ok(side))
    instrumentor(side).instrument_client(client, Probe().provider, request_hook=wrong, response_hook=wrong)
    side.run(client, lambda client: client.get("http://a/"))
    assert called == []


@pytest.mark.parametrize(
    "options", [{"request_hook": 1}, {"async_response_hook": "x"}, {"tracer_provider": 3}, {"meter_provider": "m"}]
)
def test_wrong_arguments_fail_at_once(active: None, side: Side, options: dict[str, Any]) -> None:
    """
    A wrong value passed in code names itself.
    """
    with pytest.raises(ConfigError, match=next(iter(options))):
        instrumentor(side).instrument(skip_dep_check=True, **options)
    with pytest.raises(ConfigError, match="client="):
        instrumentor(side).instrument_client(object())
    with pytest.raises(ConfigError, match="client="):
        instrumentor(side).uninstrument_client(object())


def traced_transport(side: Side, inner: Any, **options: Any) -> Any:
    """
    Return contrib's own transport around another one.
    """
    name = ("Async" if side.is_async else "Sync") + "OpenTelemetryTransport"
    return getattr(contrib, name + ("Httpx2" if side.library is httpx2 else ""))(inner, **options)


def hooks(side: Side, called: list[Any]) -> dict[str, Any]:
    """
    Return hooks of this side's kind that note the spans they get.
    """

    def hook(span: Any, *infos: Any) -> None:
        called.append((span, len(infos)))

    async def async_hook(span: Any, *infos: Any) -> None:
        called.append((span, len(infos)))

    return dict.fromkeys(("request_hook", "response_hook"), async_hook if side.is_async else hook)


def test_a_hand_made_transport_in_a_traced_client(active: None, side: Side) -> None:
    """
    Contrib's transport never makes a second span; its hooks get the span there is.
    """
    probe = Probe()
    instrumentor(side).instrument(tracer_provider=probe.provider, skip_dep_check=True)
    called: list[Any] = []
    side.fetch(traced_transport(side, ok(side), tracer_provider=probe.provider, **hooks(side, called)))
    assert called == [(probe.span, 1), (probe.span, 2)]


def test_a_hand_made_transport_alone(active: None, side: Side) -> None:
    """
    Where nothing else is instrumented, contrib's transport makes our span, with its own provider and hooks.
    """
    probe = Probe()
    called: list[Any] = []
    side.fetch(traced_transport(side, ok(side), tracer_provider=probe.provider, **hooks(side, called)))
    assert probe.span.attributes["http.request.method"] == "GET"
    assert called == [(probe.span, 1), (probe.span, 2)]


def test_a_hand_made_transport_from_before(side: Side) -> None:
    """
    A transport that was made before us is ours from now on.
    """
    called: list[Any] = []
    early = traced_transport(side, ok(side), **hooks(side, called))
    with attempts(Probe()) as probe:
        side.fetch(early)
    assert called == [(probe.span, 1), (probe.span, 2)]


def test_contrib_instrumented_before_us(side: Side) -> None:
    """
    What contrib instrumented first is continued by us with its hooks: one span, also in a client that it wrapped.
    """
    stock, probe = Probe(), Probe()
    called: list[Any] = []
    given = hooks(side, called)
    if side.is_async:
        given = {f"async_{name}": hook for name, hook in given.items()}
    instrumentor(side).instrument(tracer_provider=stock.provider, skip_dep_check=True, **given)
    wrapped = side.client(ok(side))
    instrumentor(side).instrument_client(wrapped, tracer_provider=stock.provider)
    before = propagate.get_global_textmap()
    propagate.set_global_textmap(propagators.build(Settings()))
    clients.activate(lambda: from_environment({}))
    try:
        assert instrumentor(side).is_instrumented_by_opentelemetry
        instrumentor(side).uninstrument()
        instrumentor(side).instrument(tracer_provider=probe.provider, skip_dep_check=True, **given)
        side.run(wrapped, lambda client: client.get("http://wrapped/"))
        side.fetch(ok(side))
    finally:
        clients.deactivate()
        propagate.set_global_textmap(before)
    assert stock.spans == []
    assert len(probe.spans) == 2
    assert [span for span, _ in called] == [probe.spans[0]] * 2 + [probe.spans[1]] * 2
    assert not hasattr(side.library.HTTPTransport.handle_request, "__wrapped__")


def test_hooks_survive_the_take_over(side: Side) -> None:
    """
    Activation after contrib's instrument() keeps the hooks, without a second call of the user's.
    """
    called: list[Any] = []
    given = hooks(side, called)
    if side.is_async:
        given = {f"async_{name}": hook for name, hook in given.items()}
    instrumentor(side).instrument(skip_dep_check=True, **given)
    clients.activate(lambda: from_environment({}))
    try:
        side.fetch(ok(side))
    finally:
        clients.deactivate()
    assert len(called) == 2


def test_excluded_urls_can_be_passed(active: None, side: Side) -> None:
    """
    ``excluded_urls`` is a keyword here, too, and wins over the environment.
    """
    probe = Probe()
    instrumentor(side).instrument(tracer_provider=probe.provider, excluded_urls="items", skip_dep_check=True)
    side.fetch(ok(side))
    side.fetch(ok(side), "http://orders/other")
    assert [span.attributes["url.full"] for span in probe.spans] == ["http://orders/other"]


def test_settings_that_change_later(side: Side) -> None:
    """
    ``refresh()`` reads the settings again; providers and hooks stay.
    """
    current = [from_environment({})]
    probe = Probe()
    clients.activate(lambda: current[0])
    try:
        instrumentor(side).instrument(tracer_provider=probe.provider, skip_dep_check=True)
        client = side.client(ok(side))
        instrumentor(side).instrument_client(client, tracer_provider=probe.provider)
        current[0] = with_overrides(current[0], {"query_values": "none"})
        clients.refresh()
        side.run(client, lambda client: client.get("http://orders/?q=1"))
        side.fetch(ok(side), "http://orders/?q=1")
    finally:
        clients.deactivate()
    assert [span.attributes["url.full"] for span in probe.spans] == ["http://orders/?q=REDACTED"] * 2


@pytest.mark.parametrize("name", ["send", "_send_single_request"])
def test_somebody_elses_patch_stays(active: None, side: Side, name: str) -> None:
    """
    What another package patched after us is not undone; our part below it is inert, and never a second span.
    """
    probe = Probe()
    kind = side.library.AsyncClient if side.is_async else side.library.Client
    original = vars(kind)[name]
    instrumentor(side).instrument(tracer_provider=probe.provider, skip_dep_check=True)
    ours = vars(kind)[name]

    def theirs(client: Any, *arguments: Any, **options: Any) -> Any:
        return ours(client, *arguments, **options)

    setattr(kind, name, theirs)
    try:
        instrumentor(side).uninstrument()
        assert vars(kind)[name] is theirs
        side.fetch(ok(side))
        assert probe.spans == []
        instrumentor(side).instrument(tracer_provider=probe.provider, skip_dep_check=True)
        side.fetch(ok(side))
        assert len(probe.spans) == 1
        instrumentor(side).uninstrument()
        assert vars(kind)[name] is theirs
    finally:
        setattr(kind, name, original)


@pytest.mark.parametrize("missing", [["httpx"], ["httpx2"], ["httpx", "httpx2"]])
def test_without_a_library_nothing_happens(missing: list[str]) -> None:
    """
    Where a library is not installed, activation passes it by and the other one is traced.
    """
    code = f"""
import sys
for name in {missing!r}:
    sys.modules[name] = None
from otel_correlation import clients
from otel_correlation.settings import from_environment
clients.activate(lambda: from_environment({{}}))
clients.instrument_everything()
clients.refresh()
for name in {{"httpx", "httpx2"}} - set({missing!r}):
    library = __import__(name)
    assert library.Client._send_single_request.__wrapped__
clients.deactivate()
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
