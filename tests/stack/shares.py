"""
How the shipped router shares traces among samplers: ``python -m tests.stack.shares`` prints the table of docs/explanation/scale-out.md.

The ring follows from the samplers' addresses alone and the trace ids are seeded, so each run prints the same.
"""

from __future__ import annotations

import random
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import httpx
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.stack.engines import Tier
from tests.stack.harness import Machine, eventually
from tests.stack.test_sampling import Store, Trace

ADDRESSES: Final = [f"127.0.0.1:{port}" for port in range(14337, 14387, 10)]
RINGS: Final = [(0, 1), (0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3, 4), (0, 1, 3, 4)]
TRACES: Final = 5000


def owners(router: Tier, stores: list[Store], ring: tuple[int, ...]) -> dict[bytes, int]:
    """
    Return where each trace goes while these samplers are in the router's list.
    """
    source, found = random.Random("shares"), dict[bytes, int]()
    process = router.start(ROUTER_SAMPLERS=f"[{', '.join(ADDRESSES[number] for number in ring)}]")
    batch = ExportTraceServiceRequest()
    for _ in range(TRACES):
        batch.MergeFrom(Trace(source.getrandbits(128), ("", ""), "shares").request(0, spans=1))
    headers = {"content-type": "application/x-protobuf"}
    with httpx.Client(trust_env=False, timeout=30) as client:
        url = f"http://{router.http}/v1/traces"
        client.post(url, content=batch.SerializeToString(), headers=headers).raise_for_status()

    def all_there() -> bool:
        found.update({span.trace_id: number for number, store in enumerate(stores) for _, span in store.take()})
        return len(found) == TRACES

    eventually("all traces", all_there)
    process.stop()
    return found


def main() -> None:
    """
    Print the table.
    """
    before: dict[bytes, int] = {}
    with tempfile.TemporaryDirectory() as directory, ExitStack() as opened:
        stores = [opened.enter_context(Store(address)) for address in ADDRESSES]
        machine = Machine(Path(directory))
        opened.callback(machine.clean_up)
        router = Tier(machine, "router")
        print("| samplers | shares, % | moved by the change |\n|---|---|--:|")
        for ring in RINGS:
            now = owners(router, stores, ring)
            shares = ", ".join(
                f"{100 * sum(place == number for place in now.values()) / TRACES:.1f}" for number in ring
            )
            moved = [trace_id for trace_id, place in before.items() if now[trace_id] != place]
            what = f"{len(ring)}, the third of them removed" if len(ring) < len({*before.values()}) else f"{len(ring)}"
            print(f"| {what} | {shares} | {f'{100 * len(moved) / TRACES:.1f} %' if before else ''} |")
            before = now


if __name__ == "__main__":
    main()
