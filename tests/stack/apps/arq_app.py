"""
Jobs for arq, and the settings of a worker that continues their identities.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from arq import Retry, cron
from arq.connections import RedisSettings

from otel_correlation import bind, request_id, trace_id
from otel_correlation.tasks.arq import correlated

log = logging.getLogger("arq_app")


def ids() -> dict[str, Any]:
    """
    Return what the code that runs sees of its identity.
    """
    return {"trace_id": trace_id(), "request_id": request_id()}


async def tell(_ctx: dict[str, Any], user: str = "ada") -> dict[str, Any]:
    """
    Return the identity of the job.
    """
    bind(user=user)
    log.info("telling")
    return ids()


async def retried(ctx: dict[str, Any]) -> dict[str, Any]:
    """
    Fail once, then return the identity.
    """
    log.info("trying")
    if ctx["job_try"] == 1:
        raise Retry(defer=0)
    return ids()


async def passed_on(ctx: dict[str, Any]) -> Any:
    """
    Enqueue a job from a job.
    """
    return (await ctx["redis"].enqueue_job("tell")).job_id


async def fail(_ctx: dict[str, Any], password: str) -> None:
    """
    Fail with what looks like a database's error.
    """
    message = f"duplicate key\nDETAIL:  Key (password)=({password}) already exists."
    raise ValueError(message)


async def slow(_ctx: dict[str, Any]) -> None:
    """
    Take longer than a job may.
    """
    await asyncio.Event().wait()


async def tick(_ctx: dict[str, Any]) -> None:
    """
    Do what no request asked for.
    """
    log.info("ticking")


@correlated
class WorkerSettings:
    """
    What ``arq arq_app.WorkerSettings`` reads.
    """

    functions = (tell, retried, passed_on, fail, slow)
    cron_jobs = (cron(tick, run_at_startup=True),) if os.environ.get("CRON") else ()
    redis_settings = RedisSettings.from_dsn(os.environ["REDIS_URL"])
    job_timeout = 1
    poll_delay = 0.05


class PlainSettings:
    """
    A worker that knows nothing of identities.
    """

    functions = (tell,)
    redis_settings = RedisSettings.from_dsn(os.environ["REDIS_URL"])
    poll_delay = 0.05
