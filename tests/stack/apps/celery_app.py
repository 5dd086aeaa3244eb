"""
A Celery application; its worker and its callers know nothing of tracing.
"""

from __future__ import annotations

import os
import time
from typing import Any

import httpx
from celery import Celery, chain
from celery.utils.log import get_task_logger

from otel_correlation import bind, request_id, trace_id

if set_up := os.environ.get("IN_CODE"):
    from otel_correlation import bootstrap

    if set_up != "late":
        bootstrap()
    if set_up in ("official", "late"):
        from opentelemetry.instrumentation.celery import CeleryInstrumentor

        CeleryInstrumentor().instrument()
    if set_up == "late":
        bootstrap()

app = Celery("celery_app", broker=os.environ["REDIS_URL"], backend=os.environ["REDIS_URL"])
app.conf.broker_connection_retry_on_startup = True
app.conf.task_publish_retry = False
log = get_task_logger(__name__)


def ids() -> dict[str, Any]:
    """
    Return what the code that runs sees of its identity.
    """
    return {"trace_id": trace_id(), "request_id": request_id()}


@app.task
def tell(user: str = "ada") -> dict[str, Any]:
    """
    Return the identity of the task.
    """
    bind(user=user)
    log.warning("telling")
    return ids()


@app.task
def call() -> Any:
    """
    Ask another service.
    """
    return httpx.get(os.environ["PEER_URL"] + "/echo", timeout=30).json()


@app.task(bind=True, max_retries=1)
def retried(self: Any) -> dict[str, Any]:
    """
    Fail once, then return the identity.
    """
    log.warning("trying")
    if not self.request.retries:
        raise self.retry(countdown=0)
    return ids()


@app.task
def follow(before: dict[str, Any]) -> list[dict[str, Any]]:
    """
    Return the identity of the task before and of this one.
    """
    log.warning("following")
    return [before, ids()]


@app.task
def start_chain() -> str:
    """
    Start two tasks from a task.
    """
    return str(chain(tell.s(), follow.s()).apply_async().id)


@app.task
def fail(password: str) -> None:
    """
    Fail with what looks like a database's error.
    """
    message = f"duplicate key\nDETAIL:  Key (password)=({password}) already exists."
    raise ValueError(message)


@app.task
def hang() -> None:
    """
    Take longer than a task may.
    """
    time.sleep(60)
