"""
Celery: the official instrumentation makes the spans, and this adds what it leaves out.

- A task continues the producer's identity by the bridge contract, whoever the producer was: one that sent a request id
  only, one that sent a ``traceparent`` only, one that sent nothing. ``OTEL_CORRELATION_MESSAGES=link`` holds here too.
- Without the official instrumentation the ids travel all the same; only the spans are missing.
- A publish that fails ends its PRODUCER span, and is no longer the parent of all that follows.
- A child of the prefork pool ends by ``os._exit``: it is flushed before.
- Where the application configured no logging, a worker's lines are ours: Celery's own format shows no ids. They hide
  what Celery would put beside them for other handlers: arguments, results and the unscrubbed traceback.

Nothing of Celery is imported here before the application imports it; its signals are the seam, and of the
instrumentation three private methods are replaced or called, which its exact pin keeps in place.
"""

from __future__ import annotations

import functools
import logging
import operator
from contextlib import nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from wrapt import register_post_import_hook

from otel_correlation import guard, identity, logs, semconv
from otel_correlation.export import exits
from otel_correlation.outcome import outcome_of
from otel_correlation.policy import scrub
from otel_correlation.propagators import extract_from_headers
from otel_correlation.tasks.carriers import continue_from, inject

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from types import ModuleType

_SCOPE: Final = "_otel_correlation_scope"
# Where Celery says that a task was received, has succeeded, failed, or is tried again.
_LINES: Final = ("celery.worker.strategy", "celery.app.trace")
# An own format, or a receiver for its logger, is how an application configures Celery's logging.
_FORMATS: Final = ("worker_log_format", "worker_task_log_format")

_announce: Callable[[], None] | None = None
_watching = False
# The class of the official instrumentation, where that is imported.
_instrumentor: Any = None


def watch(announce: Callable[[], None]) -> None:
    """
    Wait for the application to import Celery; twice is once.

    Args:
        announce: Says the start-up line, where a worker is about to serve.
    """
    global _announce, _watching  # noqa: PLW0603 - one process, one set-up
    _announce = announce
    if not _watching:
        _watching = True
        register_post_import_hook(_guarded(_on_signals), "celery.signals")
        register_post_import_hook(_guarded(_on_strategy), "celery.worker.strategy")
        register_post_import_hook(_guarded(_on_request), "celery.worker.request")
        register_post_import_hook(_guarded(_on_consumer), "celery.worker.consumer.consumer")
        register_post_import_hook(_guarded(_on_official), "opentelemetry.instrumentation.celery")


def _guarded(hook: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def run(module: ModuleType) -> None:
        with guard.never_raise("tasks.celery"):
            hook(module)

    return run


def _on_signals(signals: ModuleType) -> None:
    # Before the instrumentation's receivers, which import this module first: what these inject, its own replaces.
    signals.before_task_publish.connect(_publishing, weak=False)
    signals.task_prerun.connect(_begin, weak=False)
    signals.task_failure.connect(_failed, weak=False)
    signals.task_postrun.connect(_end, weak=False)
    signals.celeryd_init.connect(_worker, weak=False)
    signals.celeryd_after_setup.connect(_serving, weak=False)
    signals.worker_process_shutdown.connect(_leaving, weak=False)
    for name in _LINES:
        logging.getLogger(name).addFilter(_brief)


def _publishing(headers: dict[str, Any] | None = None, **_: Any) -> None:
    # None or empty is the message protocol of Celery 3.
    if headers:
        inject(headers)


def _begin(task: Any = None, **_: Any) -> None:
    if task is not None and not _is_official() and not _is_inside(task.request):
        scope = continue_from(task.request.headers or {})
        scope.__enter__()
        setattr(task.request, _SCOPE, scope)


def _end(task: Any = None, **_: Any) -> None:
    if task is not None and not _is_official() and (scope := vars(task.request).pop(_SCOPE, None)) is not None:
        scope.__exit__(None, None, None)


def _is_official() -> bool:
    """
    Tell whether the official instrumentation runs: then it begins and ends each task.
    """
    running = None if _instrumentor is None else _instrumentor._instance
    return running is not None and running.is_instrumented_by_opentelemetry


def _is_inside(request: Any) -> bool:
    """
    Tell whether a task runs where it was called (``apply``, ``task_always_eager``), in the caller's own identity.
    """
    return bool(request.is_eager) and identity.current() is not None


def _failed(sender: Any = None, exception: BaseException | None = None, **_: Any) -> None:
    found = identity.current()
    span = None if found is None else found.span
    expected = getattr(sender, "throws", ())
    if exception is None or span is None or not span.is_recording() or isinstance(exception, expected):
        return
    span.set_attribute(ERROR_TYPE, outcome_of(exception).error_type or "")


def _serving(**_: Any) -> None:
    if _announce is not None:
        _announce()


def _leaving(**_: Any) -> None:
    exits.flush_now()


def _worker(conf: Any = None, options: dict[str, Any] | None = None, **_: Any) -> None:
    """
    Decide about a worker's lines, before Celery takes every handler off the root logger and adds its own.
    """
    logs.settle()
    if not logs.active() or (options or {}).get("logfile"):
        return
    signals, stock = import_module("celery.signals"), import_module("celery.app.defaults").DEFAULTS
    theirs = (signals.setup_logging, signals.after_setup_logger, signals.after_setup_task_logger)
    if all(conf[name] == stock[name] for name in _FORMATS) and not any(signal.receivers for signal in theirs):
        # With a receiver for this signal Celery configures nothing.
        signals.setup_logging.connect(_set_level, weak=False)


def _set_level(loglevel: int | None = None, **_: Any) -> None:
    if loglevel:
        logging.getLogger().setLevel(loglevel)


def _brief(record: logging.LogRecord) -> bool:
    """
    Keep of a line about a task what its text says; what it says of an exception is scrubbed.
    """
    if logs.active():
        vars(record).pop("data", None)
        if isinstance(record.args, dict):
            about = record.args
            vars(record).update(task_name=about.get("name"), task_id=about.get("id"))
            if isinstance(error := about.get("exc"), str):
                record.args = {**about, "exc": scrub(error)}
    return True


def _on_strategy(module: ModuleType) -> None:
    """
    Put the ids on the line that says that a task was received; the worker's main process writes it.
    """
    default = module.__dict__["default"]

    @functools.wraps(default)
    def _default(*args: Any, **kwargs: Any) -> Any:
        handle = default(*args, **kwargs)

        @functools.wraps(handle)
        def _handle(message: Any, *args: Any, **kwargs: Any) -> Any:
            with _inside(message.headers):
                return handle(message, *args, **kwargs)

        return _handle

    module.__dict__["default"] = _default


def _on_request(module: ModuleType) -> None:
    """
    Put the ids on what the worker's main process says of a task that no child brings to an end.

    It was expired or revoked, took too long, or lost its process: this line is all there is of it.
    """
    for name in ("revoked", "on_timeout", "on_failure"):
        _wrap(module.__dict__["Request"], name, operator.attrgetter("request_dict"), 0)


def _on_consumer(module: ModuleType) -> None:
    """
    Put the ids on what it says of a message that it cannot take.
    """
    for name in ("on_unknown_task", "on_invalid_task"):
        _wrap(module.__dict__["Consumer"], name, operator.attrgetter("headers"), 2)


def _wrap(owner: Any, name: str, headers: Callable[[Any], Any], at: int) -> None:
    """
    Run a method inside of the identity of the message that is its argument at this place.
    """
    method = getattr(owner, name)

    @functools.wraps(method)
    def _method(*args: Any, **kwargs: Any) -> Any:
        with _inside(headers(args[at])):
            return method(*args, **kwargs)

    setattr(owner, name, _method)


def _inside(headers: dict[str, Any] | None) -> AbstractContextManager[Any]:
    """
    Continue a message's identity for the lines about it; without a trace the task begins one, which they cannot know.
    """
    found = headers.get(semconv.TRACEPARENT) if headers and identity.current() is None else None
    text = found.encode("latin-1", "replace") if isinstance(found, str) else found
    known = isinstance(text, bytes) and extract_from_headers([text], []) is not None
    return continue_from(headers) if known else nullcontext()


def _on_official(module: ModuleType) -> None:
    """
    Begin each task by our rules in the official instrumentation, and end what a failed publish leaves.
    """
    global _instrumentor  # noqa: PLW0603 - one process, one instrumentation
    _instrumentor = instrumentor = module.CeleryInstrumentor
    utils = module.utils
    before = instrumentor._trace_prerun

    def _trace_prerun(self: Any, *args: Any, **kwargs: Any) -> None:
        task, task_id = utils.retrieve_task(kwargs), utils.retrieve_task_id(kwargs)
        if task is None or task_id is None:
            return
        if _is_inside(task.request):
            before(self, *args, **kwargs)
            return
        self.update_task_duration_time(task_id)
        scope = continue_from(task.request.headers or {}, f"run/{task.name}", link=self._use_span_links or None)
        setattr(task.request, _SCOPE, (scope.__enter__(), scope, None))

    def _retrieve_context(task: Any, task_id: str, is_publish: bool = False) -> Any:  # noqa: FBT001, FBT002 - theirs
        # Of this very run: a retry has the same task id, and may begin in another thread before this one has ended.
        found = None if task is None or is_publish else vars(task.request).get(_SCOPE)
        return found or retrieve_context(task, task_id, is_publish)

    retrieve_context = utils.retrieve_context
    utils.retrieve_context = _retrieve_context
    functools.update_wrapper(_trace_prerun, before)
    prerun = import_module("celery.signals").task_prerun
    if _is_official():
        prerun.disconnect(instrumentor._instance._trace_prerun)
    instrumentor._trace_prerun = _trace_prerun
    if _is_official():
        prerun.connect(instrumentor._instance._trace_prerun, weak=False)

    application: Any = import_module("celery").Celery
    send_task = application.send_task

    @functools.wraps(send_task)
    def _send_task(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        outer = trace.get_current_span()
        inside = identity.current() is not None or outer.get_span_context().is_valid
        # Outside of any request (beat, a script) the call begins an identity, so that its span has it, too.
        with nullcontext() if inside else continue_from(None):
            token = otel_context.attach(otel_context.get_current())
            try:
                return send_task(self, name, *args, **kwargs)
            except BaseException as error:
                with guard.never_raise("tasks.celery.publish"):
                    _end_publish(utils, name, outer, error)
                raise
            finally:
                identity.detach(token)

    application.send_task = _send_task


def _end_publish(utils: Any, name: str, outer: trace.Span, error: BaseException) -> None:
    """
    End the span of a publish that raised; the instrumentation does it in a signal that is not sent then.
    """
    left = trace.get_current_span()
    # Not the task of the application that publishes: a thread that did not make that finds a copy.
    task = utils.retrieve_task_from_sender({"sender": name})
    open_spans = getattr(task, utils.CTX_KEY, None)
    if left is outer or not open_spans:
        return
    for key, (span, activation, _) in list(open_spans.items()):
        if span is left:
            del open_spans[key]
            span.set_attribute(ERROR_TYPE, outcome_of(error).error_type or "")
            activation.__exit__(type(error), error, error.__traceback__)


__all__ = ["watch"]
