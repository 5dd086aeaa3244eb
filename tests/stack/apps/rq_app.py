"""
Jobs for RQ.
"""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

from redis import Redis

from otel_correlation import bind, request_id, trace_id
from otel_correlation.tasks.rq import Queue

log = logging.getLogger("rq_app")


def ids() -> dict[str, Any]:
    """
    Return what the code that runs sees of its identity.
    """
    return {"trace_id": trace_id(), "request_id": request_id()}


def tell(user: str = "ada") -> dict[str, Any]:
    """
    Return the identity of the job.
    """
    bind(user=user)
    log.info("telling")
    return ids()


async def awaited() -> dict[str, Any]:
    """
    Return the identity of a job that is a coroutine.
    """
    return ids()


def passed_on() -> str:
    """
    Enqueue a job from a job.
    """
    return str(Queue(connection=Redis.from_url(os.environ["REDIS_URL"])).enqueue(tell).id)


def fail(password: str) -> None:
    """
    Fail with what looks like a database's error.
    """
    message = f"duplicate key\nDETAIL:  Key (password)=({password}) already exists."
    raise ValueError(message)


def killed() -> None:
    """
    Lose the process.
    """
    os.kill(os.getpid(), signal.SIGKILL)
