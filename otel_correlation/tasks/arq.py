"""
arq: a job carries its identity beside its function and arguments, and a worker continues it.

Two seams, both public, and opted into. The pair of serializers sees a whole job on its way to Redis, so a header fits
in beside the arguments; a worker without it reads such a job as before (arq takes the five keys it knows), and a worker
with it reads jobs that have no header. The settings of the worker: its hooks ``on_job_start`` and ``on_job_end`` run in
the job's own task, around arq's own lines, and each function is wrapped, because no hook is told how a job ended.
``Worker.run_job`` would be one seam in place of these, and private.

A job is not tampered with where nobody said so, and arq is not imported before the worker's settings are.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
from contextvars import ContextVar
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from otel_correlation import guard, identity, logs, semconv
from otel_correlation.tasks import carriers
from otel_correlation.tasks.carriers import Scope, continue_from, work

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Serializer = Callable[[dict[str, Any]], bytes]
    Deserializer = Callable[[bytes], dict[str, Any]]
    Hook = Callable[[dict[Any, Any]], Awaitable[None]]

SYSTEM: Final = "arq"
_KEY: Final = "otel_correlation"
_DEFAULT_QUEUE: Final = "arq:queue"
# In arq's dicts: the function's name is in jobs and in results, whether it went well only in results.
_FUNCTION: Final = "f"
_SUCCESS: Final = "s"

_Settings = TypeVar("_Settings", bound="type[Any] | dict[str, Any]")


class _Arrived:
    """
    What the deserializer saw of the job that this task is about to run.
    """

    __slots__ = ("carrier", "function")

    def __init__(self, function: str, carrier: Any) -> None:
        self.function = function
        self.carrier = carrier


# Set by whoever reads a job, also for a look at the queue; only a worker's hook takes it.
_arrived: ContextVar[_Arrived | None] = ContextVar("otel_correlation_arq", default=None)


class _Run:
    """
    One try of a job, in its ``ctx``.
    """

    __slots__ = ("error", "scope", "span")

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.span = scope.__enter__()
        self.error: BaseException | None = None

    def end(self, error: BaseException | None) -> None:
        self.scope.__exit__(None if error is None else type(error), error, None)


def serializers(
    serialize: Serializer = pickle.dumps, deserialize: Deserializer = pickle.loads
) -> dict[str, Callable[[Any], Any]]:
    """
    Return the keyword arguments by which jobs carry the identity of whoever enqueues them.

        pool = await create_pool(RedisSettings(), **serializers())

    Args:
        serialize: The application's own serializer, if it has one.
        deserialize: Its counterpart.
    """
    return _serializers(serialize, deserialize, frozenset())


def _serializers(
    serialize: Serializer, deserialize: Deserializer, crons: frozenset[str]
) -> dict[str, Callable[[Any], Any]]:
    def job_serializer(data: dict[str, Any]) -> bytes:
        carrier: dict[str, str] = {}
        if _SUCCESS not in data:
            with guard.never_raise("arq.serialize"):
                carrier = _sent(str(data.get(_FUNCTION)), crons)
        return serialize({**data, _KEY: carrier} if carrier else data)

    def job_deserializer(raw: bytes) -> dict[str, Any]:
        data = deserialize(raw)
        if isinstance(cast("object", data), dict) and _SUCCESS not in data:
            carrier = data.pop(_KEY, None)
            _arrived.set(_Arrived(str(data.get(_FUNCTION)), carrier))
        return data

    return {"job_serializer": job_serializer, "job_deserializer": job_deserializer}


def _sent(function: str, crons: frozenset[str]) -> dict[str, str]:
    settings = carriers._settings
    if settings is None or (function in crons and identity.current() is None):
        return {}
    attributes = {
        semconv.MESSAGING_SYSTEM: SYSTEM,
        semconv.MESSAGING_OPERATION_NAME: "enqueue",
        semconv.MESSAGING_OPERATION_TYPE: "send",
    }
    return carriers.sent(f"enqueue {function}", attributes, settings())


def correlated(settings: _Settings) -> _Settings:
    """
    Make a worker continue the identities of its jobs: spans, log lines, and what the jobs enqueue in turn.

    Args:
        settings: The class (this is a decorator) or the dict that arq reads; it is changed and returned.
    """
    values = settings if isinstance(settings, dict) else _Attributes(settings)
    func = _worker().func
    cron_jobs = [_wrapped(job) for job in values.get("cron_jobs") or ()]
    if cron_jobs:
        values["cron_jobs"] = cron_jobs
    if functions := values.get("functions"):
        values["functions"] = [_wrapped(func(function)) for function in functions]
    crons = frozenset(str(job.name) for job in cron_jobs)
    values.update(
        _serializers(
            values.get("job_serializer") or pickle.dumps, values.get("job_deserializer") or pickle.loads, crons
        )
    )
    queue = str(values.get("queue_name") or _DEFAULT_QUEUE)
    values["on_startup"] = _starting(values.get("on_startup"))
    values["on_job_start"] = _beginning(values.get("on_job_start"), queue, crons)
    values["on_job_end"] = _ending(values.get("on_job_end"))
    return settings


class _Attributes:
    """
    The attributes of a class, by the methods of a dict.
    """

    def __init__(self, owner: type[Any]) -> None:
        self._owner = owner

    def get(self, name: str) -> Any:
        found = vars(self._owner).get(name)
        return found.__func__ if isinstance(found, staticmethod) else found

    def __setitem__(self, name: str, value: Any) -> None:
        # arq reads the class's own dict, where a function is what it was.
        setattr(self._owner, name, value)

    def update(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self[name] = value


def _wrapped(job: Any) -> Any:
    coroutine = job.coroutine

    @functools.wraps(coroutine)
    async def run(ctx: dict[Any, Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return await coroutine(ctx, *args, **kwargs)
        except BaseException as error:
            if isinstance(held := ctx.get(_KEY), _Run):
                held.error = error
            raise

    return dataclasses.replace(job, coroutine=run)


def _starting(hook: Hook | None) -> Hook:
    async def on_startup(ctx: dict[Any, Any]) -> None:
        with guard.never_raise("arq.startup"):
            logs.settle()
            carriers.announce()
        if hook is not None:
            await hook(ctx)

    return on_startup


def _beginning(hook: Hook | None, queue: str, crons: frozenset[str]) -> Hook:
    async def on_job_start(ctx: dict[Any, Any]) -> None:
        # In the task of this one try: what is made current here ends with it at the latest.
        with guard.never_raise("arq.begin"):
            ctx[_KEY] = _Run(_scope(ctx, queue, crons))
        if hook is None:
            return
        try:
            await hook(ctx)
        except BaseException as error:
            _over(ctx, error)
            raise

    return on_job_start


def _scope(ctx: dict[Any, Any], queue: str, crons: frozenset[str]) -> Scope:
    arrived = _arrived.get()
    _arrived.set(None)
    function, carrier = ("unknown", None) if arrived is None else (arrived.function, arrived.carrier)
    attributes = {
        semconv.MESSAGING_SYSTEM: SYSTEM,
        semconv.MESSAGING_OPERATION_NAME: "run",
        semconv.MESSAGING_OPERATION_TYPE: "process",
        semconv.MESSAGING_DESTINATION_NAME: queue,
        semconv.MESSAGING_MESSAGE_ID: str(ctx.get("job_id")),
        semconv.ARQ_TRY: ctx.get("job_try", 1),
    }
    name = f"run {function}"
    if carrier is None and function in crons:
        return work(name, attributes=attributes)
    return continue_from({} if carrier is None else carrier, name, attributes=attributes)


def _ending(hook: Hook | None) -> Hook:
    async def on_job_end(ctx: dict[Any, Any]) -> None:
        try:
            if hook is not None:
                await hook(ctx)
        finally:
            _over(ctx, None)

    return on_job_end


def _over(ctx: dict[Any, Any], error: BaseException | None) -> None:
    with guard.never_raise("arq.end"):
        run = ctx.pop(_KEY, None)
        if isinstance(run, _Run):
            error = error or run.error
            if error is not None and _is_retry(error):
                run.span.set_attribute(semconv.ARQ_RETRY, value=True)
                error = None
            run.end(error)


def _is_retry(error: BaseException) -> bool:
    worker = _worker()
    return isinstance(error, worker.Retry | worker.RetryJob)


def _worker() -> Any:
    # Not at the top: whoever only enqueues has no need of it.
    return import_module("arq.worker")


__all__ = ["correlated", "serializers"]
