"""
A service that enqueues jobs for RQ, whose identity they carry.
"""

from __future__ import annotations

import os
import time
from typing import Any

import rq
import rq_app
from fastapi import FastAPI
from redis import Redis

from otel_correlation.tasks.rq import Queue

redis = Redis.from_url(os.environ["REDIS_URL"])
carrying, plain = Queue(connection=redis), rq.Queue(connection=redis)
FORGED: dict[str, Any] = {
    "traceparent": {"traceparent": "00-" + "0" * 32 + "-00f067aa0ba902b7-01"},
    "request_id": {"X-Request-ID": "forged\r\nid: 1"},
    "no_mapping": 7,
}
app = FastAPI()


def both(job: Any) -> dict[str, Any]:
    """
    Return the identity here and what became of the job.
    """
    while (status := job.get_status()) not in ("finished", "failed"):
        time.sleep(0.02)
    return {"here": rq_app.ids(), "there": job.return_value() if status == "finished" else str(status.value)}


@app.get("/run/{function}")
def run(function: str, *, without: bool = False, retries: int = 0) -> dict[str, Any]:
    """
    Enqueue a job.
    """
    arguments = ["hunter2-planted"] if function == "fail" else []
    retry = rq.Retry(max=retries) if retries else None
    queue = plain if without else carrying
    return both(queue.enqueue(getattr(rq_app, function), *arguments, retry=retry))


@app.get("/many")
def many() -> Any:
    """
    Enqueue by the other ways there are; the caller's own meta stays as it is.
    """
    meta = {"tenant": "acme"}
    data = [Queue.prepare_data(rq_app.tell, meta=meta) for _ in range(2)]
    jobs = carrying.enqueue_many(data)
    jobs.append(carrying.enqueue(rq_app.tell, depends_on=jobs))
    found = [both(job)["there"] for job in jobs]
    assert meta == {"tenant": "acme"}
    assert jobs[0].get_meta()["tenant"] == "acme"
    return found


@app.get("/forged/{kind}")
def forged(kind: str) -> dict[str, Any]:
    """
    Enqueue a job that somebody else wrote.
    """
    return both(plain.enqueue(rq_app.tell, meta={"otel_correlation": FORGED[kind]}))
