"""
What the shipped router and samplers keep, what a kept trace stands for, and where it lands when samplers come and go.

A store stands behind each sampler, so that it is seen which one sent what. Ids come from seeded generators and
randomness from the package's own code, so what is kept is known beforehand, trace by trace.
"""

from __future__ import annotations

import random
import re
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from otel_correlation import semconv
from otel_correlation.request_id import to_trace_id
from otel_correlation.sampling import RatioSampler, randomness, threshold, without_threshold
from tests.stack.conftest import MACHINE
from tests.stack.door import listen
from tests.stack.engines import Tier
from tests.stack.harness import Machine, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import grpc  # type: ignore[import-untyped]

pytestmark = pytest.mark.needs("collector")

RATIO: Final = 0.1
SERVICE_RATIO: Final = 0.5
SLOW_MS: Final = 1000
PER_KIND: Final = 1500
BITS: Final = 1 << 56
OF_OT: Final = re.compile(r"(?:^|,)ot=([^,]*)")


def part(tracestate: str, key: str) -> int | None:
    """
    Return ``th`` or ``rv`` as a number of 56 bits, or None.
    """
    member = OF_OT.search(tracestate)
    found = dict(item.split(":", 1) for item in member[1].split(";")) if member else {}
    return int(found[key].ljust(14, "0"), 16) if key in found else None


@dataclass(slots=True)
class Store:
    """
    What one sampler sends: OTLP over gRPC, every span kept for the test.
    """

    endpoint: str
    spans: list[tuple[str, Span]] = field(default_factory=list)  # Each with its service's name.
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _server: Any = None

    def __enter__(self) -> Self:
        """
        Listen.
        """
        self._server = listen(self.endpoint, self._export, threads=4)
        return self

    def __exit__(self, *_: object) -> None:
        """
        Stop listening.
        """
        self._server.stop(0).wait()

    def _export(self, request: ExportTraceServiceRequest, context: grpc.ServicerContext) -> ExportTraceServiceResponse:
        del context
        with self._lock:
            for group in request.resource_spans:
                name = next(item.value.string_value for item in group.resource.attributes if item.key == "service.name")
                self.spans += [(name, span) for scope in group.scope_spans for span in scope.spans]
        return ExportTraceServiceResponse()

    def take(self) -> list[tuple[str, Span]]:
        """
        Return what came since the last time.
        """
        with self._lock:
            taken, self.spans = self.spans, []
        return taken


@dataclass(frozen=True, slots=True)
class Trace:
    """
    One request through two services: the first one's spans and, later, the second one's.
    """

    trace_id: int
    states: tuple[str, str]  # Of the first service's spans and of the second one's.
    kind: str
    what: str = ""  # "error", "slow", "forced" or nothing.
    services: tuple[str, str] = ("shop", "stock")

    def request(self, half: int, spans: int = 2, first: int = 1) -> ExportTraceServiceRequest:
        """
        Return one service's spans; the error is in the second one, and the root in the first.
        """
        request = ExportTraceServiceRequest()
        group = request.resource_spans.add()
        group.resource.attributes.add(key="service.name").value.string_value = self.services[half]
        scope = group.scope_spans.add()
        scope.scope.name = "tests"
        now = time.time_ns()
        for number in range(first, first + spans):
            span = scope.spans.add(
                trace_id=self.trace_id.to_bytes(16, "big"),
                span_id=((self.trace_id & 0xFFFF_FFFF_FFFF) << 8 | half << 4 | number).to_bytes(8, "big"),
                name=f"{self.kind} {half} {number}",
                trace_state=self.states[half],
                start_time_unix_nano=now,
                end_time_unix_nano=now + 1_000_000,
            )
            root = (half, number) == (0, 1)
            if not root:
                span.parent_span_id = b"\1" * 8
            if root and self.what == "slow":
                span.end_time_unix_nano = now + (SLOW_MS + 1) * 1_000_000
            if root and self.what == "forced":
                span.attributes.add(key=semconv.FORCED).value.bool_value = True
            if self.what == "error" and half and number == first:
                span.status.code = Status.STATUS_CODE_ERROR
        return request

    @property
    def random(self) -> int:
        """
        Return the randomness of the whole trace: an explicit one, else the low bits of its id.
        """
        explicit = [part(state, "rv") for state in self.states]
        return next((value for value in explicit if value is not None), self.trace_id % BITS)

    @property
    def ratio(self) -> float:
        """
        Return the sampler's ratio for it, if it is not kept anyway.
        """
        return 1.0 if self.what else SERVICE_RATIO if "paying" in self.services else RATIO

    @property
    def kept(self) -> bool:
        """
        Tell whether the policies keep it.
        """
        return self.random >= threshold(self.ratio)

    def stored(self, half: int) -> int | None:
        """
        Return the threshold that its stored spans say.
        """
        head = part(self.states[half], "th")
        return head if head is None else max(head, threshold(self.ratio))


@dataclass(slots=True)
class Kind:
    """
    Requests whose ids are made in one way, at one ratio of the services' own; those that it drops are never sent.
    """

    name: str
    ratio: float
    requests: int
    traces: list[Trace]


def uuid7(source: random.Random, number: int) -> str:
    """
    Return a UUIDv7 as a busy server makes them: milliseconds, a counter, few random bits.
    """
    bits = (1_790_000_000_000 + number // 20) << 80 | 7 << 76 | (number % 4096) << 64 | 2 << 62
    return str(uuid.UUID(int=bits | source.getrandbits(24)))


def _what(source: random.Random) -> str:
    draw = source.random()
    return "error" if draw < 0.02 else "slow" if draw < 0.04 else "forced" if draw < 0.06 else ""


def kind(name: str, ratio: float, make: Callable[[random.Random, int], tuple[int, bool]], **options: Any) -> Kind:
    """
    Let the package's sampler decide about ``PER_KIND`` roots; ``make`` gives the ids, and whether they are bridged.
    """
    source, sampler, traces = random.Random(f"{name} {ratio}"), RatioSampler(ratio), list[Trace]()
    for number in range(PER_KIND):
        trace_id, given = make(source, number)
        what = _what(source)
        sampled, state = sampler.decide(None, trace_id, given=given)
        if what == "forced" and not sampled:
            sampled, state = True, without_threshold(state)
        if sampled and state is not None:
            traces.append(Trace(trace_id, (state.to_header(), state.to_header()), name, what, **options))
    return Kind(name, ratio, PER_KIND, traces)


def minted(source: random.Random, number: int) -> tuple[int, bool]:
    """
    Return a random id.
    """
    del number
    return source.getrandbits(128), False


def bridged(make: Callable[[random.Random, int], str]) -> Callable[[random.Random, int], tuple[int, bool]]:
    """
    Return a maker of trace ids from request ids.
    """

    def trace_id(source: random.Random, number: int) -> tuple[int, bool]:
        found = to_trace_id(make(source, number))
        assert found is not None
        return found, True

    return trace_id


def uuid4(source: random.Random, number: int) -> str:
    """
    Return a UUIDv4.
    """
    del number
    return str(uuid.UUID(int=source.getrandbits(128), version=4))


def around(found: Kind, change: Callable[[Trace], tuple[str, str]]) -> Kind:
    """
    Return the same requests with other tracestates.
    """
    changed = [Trace(one.trace_id, change(one), found.name, one.what, one.services) for one in found.traces]
    return Kind(found.name, found.ratio, found.requests, changed)


def edges() -> list[Trace]:
    """
    Return two traces at the thresholds themselves and two just below: the collector rounds as the package does.
    """
    source = random.Random("edges")
    found = []
    for limit, services in ((threshold(RATIO), ("shop", "stock")), (threshold(SERVICE_RATIO), ("shop", "paying"))):
        for value in (limit, limit - 1):
            state = f"ot=th:0;rv:{value:014x}"
            found.append(Trace(source.getrandbits(128), (state, state), "edge", services=services))
        # And by the id itself, whose higher bits say the opposite.
        found.append(Trace(0xFF << 120 | (limit - 1), ("ot=th:0", "ot=th:0"), "edge", services=services))
        found.append(Trace(0x01 << 120 | limit, ("ot=th:0", "ot=th:0"), "edge", services=services))
    return found


def all_kinds() -> list[Kind]:
    """
    Return every way in which a trace gets its id and its tracestate.
    """
    return [
        kind("minted", 1.0, minted),
        kind("UUIDv4", 1.0, bridged(uuid4)),
        kind("UUIDv7", 1.0, bridged(uuid7)),
        kind("minted, half of them", 0.5, minted),
        kind("UUIDv7, a third", 1 / 3, bridged(uuid7)),
        kind("UUIDv4, fewer than the sampler keeps", 0.05, bridged(uuid4)),
        kind("service with a ratio of its own", 1.0, minted, services=("shop", "paying")),
        # The service behind one that forwards nothing but X-Request-ID roots the same trace again, by its id.
        around(
            kind("behind a legacy hop", 1.0, minted),
            lambda one: (one.states[0], f"ot=th:0;rv:{randomness(one.trace_id):014x}"),
        ),
        around(
            kind("among other vendors", 0.5, bridged(uuid4)),
            lambda one: (
                f"robot=rv:ffffffffffffff;th:f,{one.states[0]},x=th:f",
                f"robot=rv:ffffffffffffff;th:f,{one.states[1]}",
            ),
        ),
        # A caller's trace, continued: nobody knows its ratio.
        around(kind("without a tracestate", 1.0, minted), lambda one: ("", "")),
    ]


@dataclass(slots=True)
class Fleet:
    """
    One router, some samplers, and a store behind each.
    """

    machine: Machine
    router: Tier
    samplers: list[Tier]
    stores: list[Store]
    client: httpx.Client

    def route(self, *samplers: int) -> None:
        """
        Start the router over these samplers; one that runs is stopped in order first.
        """
        if self.router.process is not None:
            assert self.router.running().stop() == 0
        self.router.start(ROUTER_SAMPLERS=f"[{', '.join(self.samplers[number].grpc for number in samplers)}]")

    def send(self, requests: list[ExportTraceServiceRequest]) -> None:
        """
        Hand them to the router in one batch.
        """
        batch = ExportTraceServiceRequest()
        for request in requests:
            batch.MergeFrom(request)
        headers = {"content-type": "application/x-protobuf"}
        answer = self.client.post(
            f"http://{self.router.http}/v1/traces", content=batch.SerializeToString(), headers=headers
        )
        answer.raise_for_status()

    def total(self, name: str, **labels: str) -> float:
        """
        Return the sum of a counter of tail sampling over all samplers.
        """
        return sum(
            sampler.metrics().total(f"otelcol_processor_tail_sampling_{name}", **labels) for sampler in self.samplers
        )


@pytest.fixture(scope="module")
def fleets(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Fleet]]:
    """
    A maker of fleets, all gone after the module; a failed test shows the logs.
    """
    stores: list[Store] = []
    with httpx.Client(trust_env=False, timeout=30) as client:
        machine = request.node.stash[MACHINE] = Machine(tmp_path_factory.mktemp("sampling"))

        def make(count: int, **environment: str) -> Fleet:
            own = [Store(f"127.0.0.1:{machine.port()}").__enter__() for _ in range(count)]
            stores.extend(own)
            samplers = [
                Tier(
                    machine,
                    "sampler",
                    environment | {"JAEGER_OTLP_ENDPOINT": store.endpoint},
                    name=f"sampler-{count}-{number}",
                )
                for number, store in enumerate(own)
            ]
            for sampler in samplers:
                sampler.start()
            return Fleet(machine, Tier(machine, "router", name=f"router-{count}"), samplers, own, client)

        yield make
        machine.clean_up()
    for store in stores:
        store.__exit__()


@dataclass(slots=True)
class Outcome:
    """
    What was sent, and what each of the two samplers stored of it.
    """

    fleet: Fleet
    sent: dict[int, Trace]
    kinds: list[Kind]
    edges: list[Trace]
    by_store: list[dict[int, list[tuple[str, Span]]]]
    seen: float  # Traces that the samplers count, each its own.

    def spans(self, trace_id: int) -> list[tuple[str, Span]]:
        """
        Return the stored spans of a trace.
        """
        return [found for store in self.by_store for found in store.get(trace_id, [])]


def _by_trace(spans: list[tuple[str, Span]]) -> dict[int, list[tuple[str, Span]]]:
    found: dict[int, list[tuple[str, Span]]] = {}
    for service, span in spans:
        found.setdefault(int.from_bytes(span.trace_id, "big"), []).append((service, span))
    return found


@pytest.fixture(scope="module")
def outcome(fleets: Callable[..., Fleet]) -> Outcome:
    """
    All kinds of traces, mixed, sent in halves through the router to two samplers, when all of it is decided and stored.
    """
    fleet = fleets(
        2,
        SAMPLER_RATIO=str(RATIO),
        SAMPLER_SERVICE="paying|paid",
        SAMPLER_SERVICE_RATIO=str(SERVICE_RATIO),
        SAMPLER_SLOW_MS=str(SLOW_MS),
        SAMPLER_DECISION_WAIT="5s",
    )
    fleet.route(0, 1)
    kinds, limits = all_kinds(), edges()
    traces = [*(one for kind in kinds for one in kind.traces), *limits]
    random.Random("order").shuffle(traces)
    for start in range(0, len(traces), 500):
        for half in (0, 1):
            fleet.send([one.request(half) for one in traces[start : start + 500]])
    eventually("every decision", lambda: fleet.total("global_count_traces_sampled") >= len(traces))
    wanted = 4 * sum(one.kept for one in traces)
    eventually("the kept spans", lambda: sum(len(store.spans) for store in fleet.stores) >= wanted)
    seen = fleet.total("new_trace_id_received")
    sent = {one.trace_id: one for one in traces}
    return Outcome(fleet, sent, kinds, limits, [_by_trace(store.take()) for store in fleet.stores], seen)


def test_every_trace_lands_whole_on_one_sampler(outcome: Outcome) -> None:
    """
    The samplers together count each trace once, both have a share, and what one of them stores of a trace is all of it.
    """
    assert outcome.seen == len(outcome.sent)
    first, second = outcome.by_store
    assert not first.keys() & second.keys()
    assert len(first) > 100 < len(second)
    for trace_id in first | second:
        spans = outcome.spans(trace_id)
        assert len(spans) == len({span.span_id for _, span in spans}) == 4, outcome.sent[trace_id]


def test_failed_slow_and_forced_traces_are_kept_and_of_the_rest_the_ratio(outcome: Outcome) -> None:
    """
    It is what the package's own threshold and randomness say, to the last bit, whatever ids and tracestates arrive.
    """
    stored = {trace_id for store in outcome.by_store for trace_id in store}
    assert stored == {trace_id for trace_id, one in outcome.sent.items() if one.kept}
    assert [one.kept for one in outcome.edges] == [True, False, False, True] * 2
    for found in outcome.kinds:
        rest = [one for one in found.traces if not one.what]
        requests = found.requests * len(rest) / len(found.traces) if found.ratio == 1 else len(rest) / found.ratio
        share = min(found.ratio, rest[0].ratio)  # The stricter of the two ratios decides.
        kept = sum(one.kept for one in rest)
        assert abs(kept - requests * share) <= 4 * (requests * share * (1 - share)) ** 0.5 + 1, found.name


def test_a_stored_threshold_says_what_a_trace_stands_for(outcome: Outcome) -> None:
    """
    It is the stricter of the services' and the sampler's; failed, slow and forced traces keep theirs; all else stays.
    """
    for trace_id in {trace_id for store in outcome.by_store for trace_id in store}:
        one = outcome.sent[trace_id]
        for service, span in outcome.spans(trace_id):
            half = one.services.index(service)
            sent = one.states[half]
            assert part(span.trace_state, "th") == one.stored(half), (one, span.trace_state)
            hidden = re.compile(r"((?:^|,)ot=)th:[0-9a-f]+")
            assert hidden.sub(r"\1", span.trace_state) == hidden.sub(r"\1", sent)


def test_request_counts_follow_from_the_stored_thresholds(outcome: Outcome) -> None:
    """
    Each stored root stands for 2^56 / (2^56 - th) requests: of each kind the sum is the true number within 4 sigma.
    """
    roots: dict[str, list[int]] = {}
    for trace_id in {trace_id for store in outcome.by_store for trace_id in store}:
        for _, span in outcome.spans(trace_id):
            th = part(span.trace_state, "th")
            if not span.parent_span_id and th is not None:
                roots.setdefault(outcome.sent[trace_id].kind, []).append(th)
    checked = 0
    for found in outcome.kinds:
        if found.name == "without a tracestate":
            assert found.name not in roots  # Whose ratio is not known stands for nobody.
            continue
        counts = [BITS / (BITS - th) for th in roots[found.name]]
        # A request that is kept with probability p counts as 1/p or as nothing, with variance (1 - p) / p, and each
        # kept one stands for 1/p such requests.
        sigma = sum(count * (count - 1) for count in counts) ** 0.5
        assert abs(sum(counts) - found.requests) <= 4 * sigma, (found.name, sum(counts), sigma)
        checked += 1
    assert checked == len(outcome.kinds) - 1


def test_a_late_span_follows_the_decision(outcome: Outcome) -> None:
    """
    After the decision a span of a kept trace is stored, with the same threshold, and one of another trace is not.
    """
    fleet = outcome.fleet
    traces = [one for one in outcome.kinds[0].traces if not one.what]
    kept, dropped = next(one for one in traces if one.kept), [one for one in traces if not one.kept][:5]
    before = fleet.total("early_releases_from_cache_decision", sampled="false")
    fleet.send([one.request(1, spans=1, first=7) for one in [kept, *dropped]])
    decided = before + len(dropped)
    eventually("five refusals", lambda: fleet.total("early_releases_from_cache_decision", sampled="false") == decided)
    eventually("the late span", lambda: any(store.spans for store in fleet.stores))
    ((_, span),) = [found for store in fleet.stores for found in store.take()]
    assert int.from_bytes(span.trace_id, "big") == kept.trace_id
    assert part(span.trace_state, "th") == threshold(RATIO)


def test_samplers_come_and_go(fleets: Callable[..., Fleet]) -> None:
    """
    A third sampler takes about a third of the traces, and taking one away moves what it had; all others stay.

    So split are traces that move while they are open, and no other.
    """
    fleet = fleets(3, SAMPLER_RATIO="1.0", SAMPLER_DECISION_WAIT="1s")
    source = random.Random("moving")
    traces = [Trace(source.getrandbits(128), ("ot=th:0", "ot=th:0"), "moving") for _ in range(1500)]
    number = 0

    def owners(half: int) -> dict[int, set[int]]:
        nonlocal number
        number += 1
        for start in range(0, len(traces), 500):
            fleet.send([one.request(half, spans=1, first=number) for one in traces[start : start + 500]])
        wanted = {one.trace_id for one in traces}
        found: dict[int, set[int]] = {}

        def stored() -> bool:
            for place, store in enumerate(fleet.stores):
                for trace_id in _by_trace(store.take()):
                    found.setdefault(trace_id, set()).add(place)
            return found.keys() == wanted

        eventually("all traces", stored)
        return found

    fleet.route(0, 1)
    opened = owners(0)  # Half of each trace before the change, half after it.
    fleet.route(0, 1, 2)
    added = owners(1)
    assert all(len(places) == 1 for places in (*opened.values(), *added.values()))
    moved = {trace_id for trace_id in opened if opened[trace_id] != added[trace_id]}
    assert all(added[trace_id] == {2} for trace_id in moved)
    # A third. Where the points lie on the ring follows from the ports: over these the share's standard deviation is 0.038.
    assert 0.1 < len(moved) / len(traces) < 0.57
    assert len(moved) == sum(places == {2} for places in added.values())
    # Begun after the change, no trace is split, and each is where the ring now says.
    assert owners(0) == added == owners(1)

    fleet.route(0, 2)
    left = owners(0)
    gone = {trace_id for trace_id in added if added[trace_id] == {1}}
    assert gone == {trace_id for trace_id in added if added[trace_id] != left[trace_id]}
    assert 0.1 < len(gone) / len(traces) < 0.57
