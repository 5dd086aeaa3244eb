"""
One end of a Redis channel: publishes what its standard input says, or tells on standard output what it received.

    python pubsub_peer.py publish sync|asyncio   a JSON line per message: channel, data (base64), id; answers each
    python pubsub_peer.py receive sync|asyncio   a JSON line per message, until "stop" was received
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import sys
from typing import Any

import redis
import redis.asyncio

from otel_correlation import bootstrap, request_id, trace_id, work
from otel_correlation.tasks.redis import Message, messages, publish

bootstrap()
log = logging.getLogger("peer")
URL = os.environ["REDIS_URL"]
DECODE = bool(os.environ.get("PEER_DECODES"))


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def lines() -> Any:
    return map(json.loads, sys.stdin)


def told(message: Message) -> bool:
    data = message.data.encode() if isinstance(message.data, str) else message.data
    with message.continued():
        log.warning("received")
        text = message.channel if isinstance(message.channel, str) else message.channel.decode()
        say(data=base64.b64encode(data).decode(), channel=text, request_id=request_id(), trace_id=trace_id())
    assert request_id() is None
    return data != b"stop"


def publish_sync() -> None:
    client = redis.Redis.from_url(URL)
    pipeline = client.pipeline()
    for line in lines():
        data = base64.b64decode(line["data"])
        try:
            with work("sender", request_id=line.get("id")):
                if line.get("pipeline"):
                    publish(pipeline, line["channel"], data, template="room:{room}")
                    (reached,) = pipeline.execute()
                else:
                    reached = publish(client, line["channel"], data, template="room:{room}")
                say(reached=reached, trace_id=trace_id())
        except redis.RedisError as error:
            say(error=type(error).__name__)


async def publish_asyncio() -> None:
    client = redis.asyncio.Redis.from_url(URL)
    for line in lines():
        data = base64.b64decode(line["data"])
        try:
            with work("sender", request_id=line.get("id")):
                if line.get("pipeline"):
                    pipeline = client.pipeline()
                    publish(pipeline, line["channel"], data, template="room:{room}")
                    (reached,) = await pipeline.execute()
                else:
                    reached = await publish(client, line["channel"], data, template="room:{room}")
                say(reached=reached, trace_id=trace_id())
        except redis.RedisError as error:
            say(error=type(error).__name__)


def receive_sync() -> None:
    with redis.Redis.from_url(URL, decode_responses=DECODE).pubsub() as pubsub:
        pubsub.psubscribe("room:*")
        pubsub.get_message(timeout=10)
        say(ready=redis.__version__)
        for message in messages(pubsub):
            if not told(message):
                return


async def receive_asyncio() -> None:
    async with redis.asyncio.Redis.from_url(URL, decode_responses=DECODE).pubsub() as pubsub:
        await pubsub.psubscribe("room:*")
        await pubsub.get_message(timeout=10)
        say(ready=redis.__version__)
        async for message in messages(pubsub):
            if not told(message):
                return


if sys.argv[1:] == ["publish", "sync"]:
    publish_sync()
elif sys.argv[1:] == ["publish", "asyncio"]:
    asyncio.run(publish_asyncio())
elif sys.argv[1:] == ["receive", "sync"]:
    receive_sync()
else:
    asyncio.run(receive_asyncio())
