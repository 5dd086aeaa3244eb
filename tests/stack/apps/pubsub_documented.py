"""
Runs the code of docs/how-to/queues.md, "Redis pub/sub", which comes as JSON on standard input, against a real Redis.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from typing import Any

import redis
import redis.asyncio

from otel_correlation import bootstrap, work

ID = "order-7781-customer-quote"
URL = os.environ["REDIS_URL"]
seen: list[tuple[str, str]] = []
documented: dict[str, Any] = {}


class Seen(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        seen.append((record.getMessage(), record.__dict__["request_id"]))


async def broadcast() -> None:
    client = redis.asyncio.Redis.from_url(URL)
    listening = asyncio.create_task(documented["listen"](client))
    while not await client.pubsub_numpat():  # noqa: ASYNC110 - Redis tells no event
        await asyncio.sleep(0.01)
    with work("sender", request_id=ID):
        assert await documented["announce"](client, "7", "hello") == 1
    while not seen:  # noqa: ASYNC110 - lines tell no event
        await asyncio.sleep(0.01)
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    await client.aclose()


logging.getLogger("room").setLevel(logging.INFO)
logging.getLogger("room").addHandler(Seen())
bootstrap()
for block in json.load(sys.stdin):
    exec(block, documented)

asyncio.run(broadcast())
client = redis.Redis.from_url(URL)
with client.pubsub() as pubsub:
    pubsub.subscribe("room:7")
    documented["poll"](pubsub)  # the confirmation is no message
    with work("sender", request_id=ID):
        documented["publish"](client, "room:7", "hello")
    while len(seen) < 2:
        documented["poll"](pubsub)
with work("sender", request_id=ID):
    documented["enqueue"](client, b"hello")
documented["take"](client)
assert seen == [("5 bytes for room:7", ID), ("5 bytes", ID), ("5 bytes", ID)], seen
