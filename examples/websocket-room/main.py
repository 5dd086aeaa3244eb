"""
Chat rooms on several workers: a message goes from one socket over Redis to the sockets of every worker.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from contextlib import asynccontextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from auth import Refused, who
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field, SecretStr, ValidationError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from otel_correlation import bind, request_id, trace_id, work
from otel_correlation.tasks.redis import Message, messages, publish

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

log = logging.getLogger("room")

AUTH_S = float(os.environ.get("ROOM_AUTH_S", "5"))  # to say who you are
SEND_S = float(os.environ.get("ROOM_SEND_S", "10"))  # to take one message
TICK_S = float(os.environ.get("ROOM_TICK_S", "15"))
QUEUED = 32  # messages that wait for one socket; what comes then is dropped and counted


class Hello(BaseModel):
    token: SecretStr


class Say(BaseModel):
    text: str = Field(min_length=1, max_length=16_000)


class Member:
    """
    One socket in a room, and what waits for it.
    """

    def __init__(self, websocket: WebSocket, name: str) -> None:
        self.websocket = websocket
        self.name = name
        self.dropped = 0
        self.waiting: asyncio.Queue[tuple[str, Message | None]] = asyncio.Queue(QUEUED)

    def offer(self, text: str, message: Message | None = None) -> None:
        try:
            self.waiting.put_nowait((text, message))
        except asyncio.QueueFull:
            self.dropped += 1
            room.dropped += 1
            if self.dropped == 1:
                log.warning("%s is too slow, messages are dropped", self.name)

    def tell(self, **values: Any) -> None:
        self.offer(json.dumps(values))

    async def write(self) -> None:
        """
        Send what waits, each message in the identity of whoever sent it.
        """
        while True:
            text, message = await self.waiting.get()
            with message.continued() if message else nullcontext():
                try:
                    async with asyncio.timeout(SEND_S):
                        await self.websocket.send_text(text)
                except WebSocketDisconnect:
                    log.info("%s left before a message", self.name)
                    return
                if message:
                    log.info("delivered to %s", self.name)


class Rooms:
    """
    The sockets of this worker, by room.
    """

    def __init__(self) -> None:
        self.members: dict[str, set[Member]] = {}
        self.dropped = 0
        self.redis: Redis = Redis.from_url(os.environ.get("REDIS_URL", "redis://127.0.0.1:6379"))

    def everybody(self) -> list[Member]:
        return [member for members in self.members.values() for member in members]

    def enter(self, name: str, member: Member) -> None:
        self.members.setdefault(name, set()).add(member)

    def leave(self, name: str, member: Member) -> None:
        self.members[name].discard(member)
        if not self.members[name]:
            del self.members[name]

    async def listen(self) -> None:
        """
        Hand what Redis delivers to the sockets, for as long as this worker runs.
        """
        while True:
            try:
                async with self.redis.pubsub() as pubsub:
                    await pubsub.psubscribe("room:*", "dashboard")
                    log.info("listening to Redis")
                    for member in self.everybody():
                        member.tell(type="status", redis="up")
                    async for message in messages(pubsub):
                        kind, _, name = message.channel.decode(errors="replace").partition(":")
                        text = message.data.decode(errors="replace")
                        for member in self.members.get(name, ()) if kind == "room" else self.everybody():
                            member.offer(text, message)
            except RedisError as error:
                log.warning("Redis is gone (%s), trying again", type(error).__name__)
                for member in self.everybody():
                    member.tell(type="status", redis="down")
                await asyncio.sleep(0.5)

    async def tick(self) -> None:
        """
        Tell every socket of every worker the time: one of the workers does it.
        """
        while True:
            await asyncio.sleep(TICK_S)
            with work("tick"):
                try:
                    if await self.redis.set("ticking", os.getpid(), nx=True, px=int(TICK_S * 900)):
                        now = {"type": "tick", "at": datetime.now(UTC).isoformat(), "request_id": request_id()}
                        await publish(self.redis, "dashboard", json.dumps(now), template="dashboard")
                except RedisError as error:
                    log.warning("no tick (%s)", type(error).__name__)


room = Rooms()


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(room.listen()), asyncio.create_task(room.tick())]
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await room.redis.aclose()


app = FastAPI(title="websocket-room", lifespan=lifespan)


async def authenticated(websocket: WebSocket) -> str:
    """
    Return the name in the token of the first message.
    """
    try:
        async with asyncio.timeout(AUTH_S):
            hello = Hello.model_validate_json(await receive(websocket))
    except (TimeoutError, ValidationError):
        # Not chained and not logged: a validation error quotes what came.
        raise Refused(4001, "say who you are first") from None
    return who(hello.token.get_secret_value())


async def receive(websocket: WebSocket) -> str | bytes:
    message = await websocket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message["code"])
    return message.get("text") or message.get("bytes") or b""


async def talk(name: str, member: Member) -> None:
    """
    Publish what one client says, until it leaves.
    """
    while True:
        try:
            said = Say.model_validate_json(await receive(member.websocket))
        except WebSocketDisconnect:
            return
        except ValidationError:
            member.tell(type="error", request_id=request_id(), detail='a message is {"text": "..."}')
            continue
        message = {"type": "message", "from": member.name, "text": said.text}
        ids = {"request_id": request_id(), "trace_id": trace_id()}
        try:
            workers = await publish(room.redis, f"room:{name}", json.dumps(message | ids), template="room:{room}")
        except RedisError as error:
            log.warning("a message was not delivered (%s)", type(error).__name__)
            member.tell(type="error", detail="not delivered, please try again", **ids)
        else:
            log.info("%s said %d characters to %d workers", member.name, len(said.text), workers)


@app.websocket("/rooms/{name}")
async def join(websocket: WebSocket, name: Annotated[str, PathParameter(pattern=r"^[a-z0-9-]{1,40}$")]) -> None:
    await websocket.accept()
    try:
        member = Member(websocket, await authenticated(websocket))
    except Refused as refused:
        log.info("refused with %d: %s", refused.code, refused.reason)
        await websocket.send_json({"type": "refused", "request_id": request_id(), "detail": refused.reason})
        await websocket.close(refused.code, refused.reason)
        return
    except WebSocketDisconnect:
        return
    bind(member=member.name)
    log.info("%s joined", member.name)
    # The first reply: a browser cannot read the headers of a handshake.
    member.tell(type="welcome", request_id=request_id(), name=member.name, worker=os.getpid())
    room.enter(name, member)
    try:
        async with asyncio.TaskGroup() as group:
            writing = group.create_task(member.write())
            await talk(name, member)
            writing.cancel()
    except* TimeoutError:
        log.warning("%s took nothing for %g s and is cut off", member.name, SEND_S)
    finally:
        room.leave(name, member)
        log.info("%s left, %d messages were dropped", member.name, member.dropped)


@app.get("/state")
async def state() -> dict[str, int]:
    """
    What this worker holds: after everybody has left, what it held before they came.
    """
    return {
        "worker": os.getpid(),
        "sockets": len(room.everybody()),
        "rooms": len(room.members),
        "waiting": sum(member.waiting.qsize() for member in room.everybody()),
        "dropped": room.dropped,
        "tasks": len(asyncio.all_tasks()),
    }


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("page.html"))
