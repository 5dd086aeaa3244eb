"""
What the worst request heads cost: 64 kB of each kind, through our edge and without it, in one process.

    python benchmarks/header_sets.py [--budget-us 1000] [--only NAME]

The application answers at once and reads nothing, so what is above the bare figure is all our work on a request's
head: ids, propagation, trust, attributes, redaction, the summary line. No server is in it, and no export. CPU time, the
best of several rounds. The exit status is 1 where a set costs more than ``--budget-us``.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor

import otel_correlation

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 65_536
ROUNDS = 7
MIN_S = 0.02  # Of one round of one set.

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"

POLICIES: dict[str, dict[str, Any]] = {
    "open": {},
    "open, headers captured": {"capture_server_request": [".*"]},
    "public, a stranger": {"edge": "public", "trusted_networks": ["192.168.0.0/16"], "trusted_proxies": ["10.0.0.0/8"]},
    "public, a trusted caller": {"edge": "public", "trusted_networks": ["10.0.0.0/8"]},
    "public, behind a proxy": {
        "edge": "public",
        "trusted_networks": ["127.0.0.0/8"],
        "trusted_proxies": ["10.0.0.0/8"],
    },
}


class Discard(SpanProcessor):
    """
    Takes every span and keeps none, so that spans record.
    """

    accepts_light_spans = True


async def app(_scope: Any, _receive: Any, send: Any) -> None:
    """
    Answer at once.
    """
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def nothing(*_: Any) -> Any:
    """
    Stand for the server, in both directions.
    """
    return {"type": "http.disconnect"}


def full(unit: str, join: str = "") -> str:
    """
    Return the unit, numbered where it says ``#``, as often as the size allows.
    """
    parts: list[str] = []
    size = 0
    for number in itertools.count():
        part = unit.replace("#", f"{number:x}")
        size += len(part) + len(join)
        if size > SIZE:
            return join.join(parts)
        parts.append(part)
    raise AssertionError


def many(name: str, value: str) -> list[tuple[str, str]]:
    """
    Return a header as often as the size allows; ``#`` in its name or value is its number.

    On the wire each has at least a colon and a line's end besides.
    """
    found: list[tuple[str, str]] = []
    size = 0
    for number in itertools.count():
        pair = name.replace("#", f"{number:x}"), value.replace("#", f"{number:x}")
        size += len(pair[0]) + len(pair[1]) + len(":\r\n")
        if size > SIZE:
            return found
        found.append(pair)
    raise AssertionError


def sets() -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Yield each request head: its name, and what of the scope it sets.
    """

    def headers(*pairs: tuple[str, str]) -> dict[str, Any]:
        return {"headers": [(name.encode(), value.encode("latin-1")) for name, value in pairs]}

    parent = ("traceparent", PARENT)
    yield "nothing", headers()
    yield "usual", headers(("host", "shop.example"), ("user-agent", "curl/8"), parent, ("baggage", "tenant=a"))
    yield "baggage: 4,096 members", headers(parent, ("baggage", ",".join(f"k{number}=value" for number in range(4096))))
    yield "baggage: members of 3 characters", headers(parent, ("baggage", full("a=b", ",")))
    yield "baggage: members of %41 escapes", headers(parent, ("baggage", full("a#=%41%41%41%41", ",")))
    yield "baggage: one member of properties", headers(parent, ("baggage", "a=b;" + full("p#=v", ";")))
    yield "baggage: one value", headers(parent, ("baggage", "a=" + full("b")))
    yield "baggage: one value of escapes", headers(parent, ("baggage", "a=" + full("%e2")))
    yield "baggage: commas", headers(parent, ("baggage", full(",")))
    yield "baggage: white space", headers(parent, ("baggage", "a=" + full(" ")[:16_000] + '"'))
    yield "baggage: properties and white space", headers(parent, ("baggage", ("a=b" + full(";p= "))[:16_000] + '"'))
    yield "baggage: header by header", headers(parent, *many("baggage", "a#=b"))
    yield "tracestate: members of 3 characters", headers(parent, ("tracestate", full("a#=b", ",")))
    yield (
        "tracestate: 31 longest members",
        headers(parent, ("tracestate", ",".join(f"{number:02}{'k' * 254}={'v' * 256}" for number in range(31)))),
    )
    yield "tracestate: commas and white space", headers(parent, ("tracestate", full(", \t")))
    yield "tracestate: one value", headers(parent, ("tracestate", "a=" + full("b")))
    yield "tracestate: header by header", headers(parent, *many("tracestate", "a#=b"))
    yield "traceparent: 64 kB of a later version", headers(("traceparent", "01" + PARENT[2:] + "-" + full("x")))
    yield "traceparent: white space", headers(("traceparent", full(" ") + PARENT))
    yield "traceparent: header by header", headers(*many("traceparent", PARENT))
    yield "x-request-id: 64 kB", headers(("x-request-id", full("a")))
    yield "x-request-id: header by header", headers(*many("x-request-id", "a#"))
    yield "small headers, each its own name", headers(*many("x-#", "1"))
    yield "small headers, one name", headers(*many("x-a", "1"))
    yield "small headers without a value", headers(*many("a", ""))
    yield "X-Forwarded-For: hops", headers(("x-forwarded-for", full("10.0.0.1", ", ")))
    yield "X-Forwarded-For: addresses that differ", headers(("x-forwarded-for", full("::#", ",")))
    yield "X-Forwarded-For: commas", headers(("x-forwarded-for", full(",")))
    yield "X-Forwarded-For: header by header", headers(*many("x-forwarded-for", "10.0.0.1"))
    yield "Forwarded: hops in 8,192 bytes", headers(("forwarded", full("for=10.0.0.1", ",")[:8190]))
    yield "Forwarded: pairs in 8,192 bytes", headers(("forwarded", full("a#=b", ";")[:8190].rpartition(";")[0]))
    yield "Forwarded: commas in 8,192 bytes", headers(("forwarded", "," * 8192))
    yield "Forwarded: 64 kB", headers(("forwarded", full("for=10.0.0.1", ",")))
    yield "Forwarded: header by header", headers(*many("forwarded", "for=10.0.0.1"))
    yield (
        "both forwarding headers",
        headers(("forwarded", "," * 8192), ("x-forwarded-for", full("::#", ",")), ("traceparent", PARENT)),
    )
    yield "Cookie", headers(("cookie", full("c#=v", "; ")))
    yield "User-Agent", headers(("user-agent", full("é")))
    yield "Host", headers(("host", full("a.")))
    yield "Host: digits for a port", headers(("host", "a:" + full("1")))
    yield "Accept", headers(("accept", full("text/html;q=0.#", ",")))
    yield "path", {"path": "/" + full("a/")}
    yield "path: slashes", {"path": full("/")}
    yield "query: one secret", {"query_string": b"token=" + full("a").encode()}
    yield "query: 10,000 secret keys", {"query_string": "&".join(f"k{number}=v" for number in range(10_000)).encode()}
    yield "query: keys of tokens", {"query_string": full("token#=v", "&").encode()}
    yield "query: keys of 200 characters", {"query_string": full("#" + "x" * 200 + "=v", "&").encode()}
    yield "query: escaped keys", {"query_string": full("%74%6f%6b%65%6e#=v", "&").encode()}
    yield "query: separators", {"query_string": full("&").encode()}
    yield "query: empty pairs", {"query_string": full("=&").encode()}
    yield "query: semicolons behind a secret", {"query_string": b"token=a" + full(";b").encode()}
    yield "method", {"method": full("M")}


def cost_us(application: Any, scope: dict[str, Any], loop: asyncio.AbstractEventLoop) -> float:
    """
    Return the CPU microseconds of one request.
    """

    async def requests(count: int) -> None:
        for _ in range(count):
            await application({**scope, "headers": list(scope["headers"]), "state": {}}, nothing, nothing)

    count, took = 1, 0.0
    while True:
        began = time.process_time()
        loop.run_until_complete(requests(count))
        took = time.process_time() - began
        if took >= MIN_S:
            return took / count * 1e6
        count *= 4


def main() -> int:
    """
    Print a line for each set, and those over the budget, the most expensive last.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-us", type=float, default=1000.0, help="what our part of a request may cost")
    parser.add_argument("--only", default="", help="only sets whose name has this in it")
    parser.add_argument("--without", default="", help="no set whose name has this in it")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    loop = asyncio.new_event_loop()
    # What the SDK says of a span with too many attributes is not printed.
    logging.getLogger("opentelemetry").addHandler(logging.NullHandler())
    logging.getLogger("opentelemetry").propagate = False
    otel_correlation.bootstrap(traces_exporters=[], log_format="none")
    provider: Any = trace.get_tracer_provider()
    provider.add_span_processor(Discard())
    edged = otel_correlation.edge(app)
    gc.disable()
    rows: list[tuple[float, str, str]] = []
    print("CPU us of one request: of a bare application, and what we add to it")
    print(f"{'request head':<44}{'bare':>9}" + "".join(f"{policy:>13.12}" for policy in _SHORT))
    for name, changed in sets():
        if options.only not in name or (options.without and options.without in name):
            continue
        scope = {**_SCOPE, **changed}
        bare = float("inf")
        ours = dict.fromkeys(POLICIES, float("inf"))
        for policy, settings in POLICIES.items():
            otel_correlation.bootstrap(traces_exporters=[], log_format="none", **{**_PLAIN, **settings})
            for _ in range(options.rounds):  # In turns, so that a busy machine disturbs both alike.
                bare = min(bare, cost_us(app, scope, loop))
                ours[policy] = min(ours[policy], cost_us(edged, scope, loop))
        rows += [(ours[policy] - bare, name, policy) for policy in POLICIES]
        print(f"{name:<44}{bare:>9.1f}" + "".join(f"{ours[policy] - bare:>13.0f}" for policy in POLICIES), flush=True)
    over = sorted((extra, name, policy) for extra, name, policy in rows if extra > options.budget_us)
    print(f"\n{len(over)} of {len(rows)} cost more than {options.budget_us:.0f} us:")
    for extra, name, policy in over:
        print(f"{extra:>14.0f} us  {name} ({policy})")
    return 1 if over else 0


_SCOPE: dict[str, Any] = {
    "type": "http",
    "asgi": {"version": "3.0"},
    "http_version": "1.1",
    "scheme": "http",
    "method": "GET",
    "path": "/x",
    "root_path": "",
    "query_string": b"",
    "headers": [],
    "server": ("127.0.0.1", 8000),
    "client": ("10.0.0.1", 50000),
}
# As columns.
_SHORT = ("open", "captured", "stranger", "trusted", "behind proxy")
_PLAIN: dict[str, Any] = {"edge": "open", "trusted_networks": [], "trusted_proxies": [], "capture_server_request": []}

if __name__ == "__main__":
    sys.exit(main())
