"""
A service that gives work to the Celery application.
"""

from __future__ import annotations

import gc
from typing import Any

from celery.result import AsyncResult
from celery_app import app as celery
from celery_app import call, fail, hang, ids, retried, start_chain, tell
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from otel_correlation import request_id

app = FastAPI()
# Celery 5.6 unsubscribes from a result when it is destroyed. Where the collector of garbage does that in the middle of another
# result's unsubscribing, the thread waits for a lock that it holds itself (one request in some thousands, without us as well).
gc.disable()


@app.exception_handler(Exception)
async def failed(_request: Request, error: Exception) -> JSONResponse:
    """
    Answer as this application answers every failure.
    """
    return JSONResponse({"error": type(error).__name__, "request_id": request_id()}, 500)


@app.get("/echo")
async def echo(request: Request) -> dict[str, str]:
    """
    Return the headers that came.
    """
    return dict(request.headers)


def both(result: AsyncResult[Any]) -> dict[str, Any]:
    """
    Return the identity here and the task's result.
    """
    return {"here": ids(), "there": result.get(timeout=60)}


@app.get("/tell")
def by_function() -> dict[str, Any]:
    """
    Call a task that this process knows.
    """
    return both(tell.delay())


@app.get("/named")
def by_name() -> dict[str, Any]:
    """
    Call a task by its name only.
    """
    return both(celery.send_task("celery_app.tell"))


@app.get("/call")
def outbound() -> dict[str, Any]:
    """
    Call a task that calls a service.
    """
    return both(call.delay())


@app.get("/retried")
def retrying() -> dict[str, Any]:
    """
    Call a task that fails once.
    """
    return both(retried.delay())


@app.get("/chain")
def chained() -> dict[str, Any]:
    """
    Call a task that starts two more.
    """
    started = both(start_chain.delay())
    return both(AsyncResult(started["there"], app=celery))


@app.get("/eager")
def eager() -> dict[str, Any]:
    """
    Run a task here.
    """
    return both(tell.apply())


@app.get("/fail")
def failing(password: str) -> dict[str, Any]:
    """
    Call a task that fails.
    """
    return {"here": ids(), "there": repr(fail.delay(password).get(propagate=False, timeout=60))[:9]}


@app.get("/killed")
def killed() -> dict[str, Any]:
    """
    Call tasks that no worker brings to an end: too slow, too late, and unknown there.
    """
    hang.apply_async(time_limit=1)
    tell.apply_async(expires=-1)
    celery.send_task("celery_app.unknown")
    return {"here": ids()}


@app.get("/lost")
def lost() -> dict[str, Any]:
    """
    Call a task where nobody takes it, and ask for the identity afterwards.
    """
    try:
        tell.apply_async(ignore_result=True)
    except Exception as error:
        return {"here": ids(), "error": type(error).__name__}
    return {}


@app.get("/lost/unhandled")
def lost_unhandled() -> None:
    """
    Call a task where nobody takes it.
    """
    tell.apply_async(ignore_result=True)
