"""
RQ: a job carries its identity in its ``meta``, and a worker continues it and loses nothing of it.

Two seams, both public methods of classes that RQ lets a user choose. ``Queue.create_job`` makes every job, however it
is enqueued. ``Worker.perform_job`` is all that a work horse does: a process that RQ ends by ``os._exit``, so what it
has to send is sent before: spans, and RQ's own last lines.

This module is for who has RQ: it imports it.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final

from rq import Queue as _Queue  # type: ignore[import-not-found]
from rq import SimpleWorker as _SimpleWorker
from rq import Worker as _Worker

from otel_correlation import guard, identity, logs, semconv
from otel_correlation.export import exits
from otel_correlation.policy import scrub
from otel_correlation.tasks import carriers
from otel_correlation.tasks.carriers import continue_from

if TYPE_CHECKING:
    from opentelemetry.trace import Span

SYSTEM: Final = "rq"
_KEY: Final = "otel_correlation"
# Where a worker says what became of a job.
_LOGGERS: Final = ("rq.worker", "rq.job")


class Queue(_Queue):  # type: ignore[misc]
    """
    RQ's queue, whose jobs carry the identity of whoever enqueues them, in ``job.meta["otel_correlation"]``.
    """

    def create_job(self, *args: Any, **kwargs: Any) -> Any:
        """
        Make a job, as every ``enqueue`` does.
        """
        job = super().create_job(*args, **kwargs)
        with guard.never_raise("rq.enqueue"):
            if carrier := _sent(job, str(self.name)):
                # Not in the caller's own dict, which may be for several jobs.
                job.meta = {**job.meta, _KEY: carrier}
        return job


def _sent(job: Any, queue: str) -> dict[str, str]:
    settings = carriers._settings
    if settings is None:
        return {}
    return carriers.sent(f"enqueue {_function(job)}", _attributes(job, queue, "enqueue", "send"), settings())


def _attributes(job: Any, queue: str, operation: str, kind: str) -> dict[str, Any]:
    return {
        semconv.MESSAGING_SYSTEM: SYSTEM,
        semconv.MESSAGING_OPERATION_NAME: operation,
        semconv.MESSAGING_OPERATION_TYPE: kind,
        semconv.MESSAGING_DESTINATION_NAME: queue,
        semconv.MESSAGING_MESSAGE_ID: str(job.id),
    }


def _function(job: Any) -> str:
    try:
        return str(job.func_name)
    except Exception:  # noqa: BLE001 - bytes that the application's serializer cannot read; RQ says so itself
        return "unknown"


def _carrier(job: Any) -> Any:
    meta = job.meta
    return meta.get(_KEY) if isinstance(meta, dict) else None


class Correlated:
    """
    What a worker needs, to be put before any class of RQ's: ``class Mine(Correlated, SpawnWorker): ...``.
    """

    _failure: BaseException | None = None

    def bootstrap(self, *args: Any, **kwargs: Any) -> None:
        """
        Begin to serve.
        """
        with guard.never_raise("rq.bootstrap"):
            logs.settle()
            carriers.announce()
            for name in _LOGGERS:
                logging.getLogger(name).addFilter(_brief)
        super().bootstrap(*args, **kwargs)  # type: ignore[misc]

    def execute_job(self, job: Any, queue: Any) -> None:
        """
        Have a job run: lines about a work horse that was killed, or took too long, have the job's ids.
        """
        with _inside(job):
            super().execute_job(job, queue)  # type: ignore[misc]

    def perform_job(self, job: Any, queue: Any, *rest: Any) -> Any:
        """
        Run a job, in the work horse if there is one, which sends what it has before it ends.
        """
        scope = continue_from(
            _carrier(job),  # None where nobody of ours enqueued it: each work horse would warn once more
            f"run {_function(job)}",
            attributes=_attributes(job, str(queue.name), "run", "process"),
        )
        self._failure = None
        scope.__enter__()
        try:
            return super().perform_job(job, queue, *rest)  # type: ignore[misc]
        finally:
            failure, self._failure = self._failure, None
            scope.__exit__(None if failure is None else type(failure), failure, None)
            if getattr(self, "is_horse", False):
                exits.flush_now()

    def handle_exception(self, job: Any, *exc_info: Any) -> None:
        """
        Remember why a job failed, for its span.
        """
        if len(exc_info) > 1 and isinstance(exc_info[1], BaseException):
            self._failure = exc_info[1]
        super().handle_exception(job, *exc_info)  # type: ignore[misc]


class Worker(Correlated, _Worker):  # type: ignore[misc]
    """
    RQ's worker, for ``rq worker --worker-class otel_correlation.tasks.rq.Worker``: continues its jobs' identities.
    """


class SimpleWorker(Correlated, _SimpleWorker):  # type: ignore[misc]
    """
    RQ's worker that runs jobs in its own process, with the same.
    """


def _inside(job: Any) -> AbstractContextManager[Span | None]:
    carrier = _carrier(job)
    known = isinstance(carrier, dict) and isinstance(carrier.get(semconv.TRACEPARENT), str)
    return continue_from(carrier) if known and identity.current() is None else nullcontext()


def _brief(record: logging.LogRecord) -> bool:
    """
    Keep of a line about a failed job what its text says, scrubbed; its arguments are nobody's business.
    """
    if logs.active():
        for name in ("arguments", "kwargs"):
            vars(record).pop(name, None)
        if record.levelno >= logging.ERROR and isinstance(record.args, tuple):
            record.args = tuple(scrub(value) if isinstance(value, str) else value for value in record.args)
    return True


__all__ = ["Correlated", "Queue", "SimpleWorker", "Worker"]
