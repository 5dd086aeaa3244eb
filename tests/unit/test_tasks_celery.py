"""
What is done at Celery's signals, with signals that nobody else has; tests/stack runs the real ones.
"""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from otel_correlation import logs, request_id, trace_id, work
from otel_correlation.export import exits
from otel_correlation.settings import Settings
from otel_correlation.tasks import carriers, celery
from tests.contract.wire import wired
from tests.unit.logs_pristine import pristine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.contract.wire import Wire

SIGNALS = (
    *("before_task_publish", "task_prerun", "task_failure", "task_postrun", "celeryd_init", "celeryd_after_setup"),
    *("worker_process_shutdown", "setup_logging", "after_setup_logger", "after_setup_task_logger"),
)
LINES = ("celery.worker.strategy", "celery.app.trace")


class Signal:
    """
    Celery's, as far as it matters.
    """

    def __init__(self) -> None:
        self.receivers: list[Callable[..., Any]] = []

    def connect(self, receiver: Callable[..., Any], *, weak: bool) -> None:
        assert not weak
        if receiver not in self.receivers:
            self.receivers.append(receiver)

    def send(self, **named: Any) -> None:
        for receiver in self.receivers:
            receiver(signal=self, **named)


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """
    An application that has imported Celery.
    """
    module: Any = ModuleType("celery.signals")
    vars(module).update({name: Signal() for name in SIGNALS})
    defaults = ModuleType("celery.app.defaults")
    vars(defaults)["DEFAULTS"] = {"worker_log_format": "stock", "worker_task_log_format": "stock, too"}
    for name, found in (("celery.signals", module), ("celery.app.defaults", defaults)):
        monkeypatch.setitem(sys.modules, name, found)
    for name in ("celery", "celery.app"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    celery._on_signals(module)
    yield module
    for name in LINES:
        logging.getLogger(name).removeFilter(celery._brief)


@pytest.fixture
def wire() -> Iterator[Wire]:
    """
    A process that is set up.
    """
    with wired("light", instrument=False) as found:
        carriers.switch(lambda: found.settings)
        yield found
        carriers.switch(None)


def run(signals: Any, headers: dict[str, Any] | None, *, eager: bool = False) -> tuple[str | None, str | None]:
    """
    Run a task as Celery's tracer does; return the ids that it sees.
    """
    task = SimpleNamespace(request=SimpleNamespace(headers=headers, is_eager=eager), name="tell", throws=())
    signals.task_prerun.send(sender=task, task=task, task_id="7")
    seen = request_id(), trace_id()
    signals.task_postrun.send(sender=task, task=task, task_id="7")
    return seen


def test_the_ids_travel_in_the_messages_headers(signals: Any, wire: Wire) -> None:
    """
    A published task takes the caller's identity along, and is inside of it while it runs, and only then.
    """
    headers: dict[str, Any] = {"id": "7", "task": "tell", "X-Request-ID": "of-an-earlier-try"}
    with work("a request", request_id="order-7781-customer-quote"):
        caller = request_id(), trace_id()
        signals.before_task_publish.send(headers=headers)
        assert run(signals, None, eager=True) == caller
    assert run(signals, headers) == caller == ("order-7781-customer-quote", caller[1])
    assert (request_id(), trace_id()) == (None, None)
    assert headers["id"] == "7"


@pytest.mark.parametrize("headers", [None, {}, {"traceparent": "00-zz"}, {"traceparent": 7}])
def test_a_task_without_usable_headers_has_ids_of_its_own(signals: Any, wire: Wire, headers: Any) -> None:
    """
    Nothing that a message lacks or claims keeps a task from having a request id.
    """
    assert run(signals, headers)[0]
    assert request_id() is None


def test_an_empty_message_of_the_old_protocol_is_left_alone(signals: Any, wire: Wire) -> None:
    """
    Celery 3's messages have no headers, and get none.
    """
    headers: dict[str, Any] = {}
    with work("a request"):
        signals.before_task_publish.send(headers=headers)
        signals.before_task_publish.send(headers=None)
    assert headers == {}


def test_a_received_line_has_the_ids_of_the_message(signals: Any, wire: Wire) -> None:
    """
    The main process of a worker handles a message inside of the identity that it carries, if it carries a trace.
    """
    strategy = ModuleType("celery.worker.strategy")

    def default(task: str, *, info: str) -> Callable[..., Any]:
        def handle(message: Any, body: bytes) -> Any:
            return task, info, body, request_id()

        return handle

    vars(strategy)["default"] = default
    celery._on_strategy(strategy)
    handle = strategy.__dict__["default"]("tell", info="info")
    carrying = {"traceparent": f"00-{1:032x}-{1:016x}-01", "X-Request-ID": "order-7781-customer-quote"}
    assert handle(SimpleNamespace(headers=carrying), b"{}") == ("tell", "info", b"{}", "order-7781-customer-quote")
    for headers in (
        None,
        {},
        {"X-Request-ID": "order-7781-customer-quote"},
        {"traceparent": "00-zz"},
        {"traceparent": 7},
    ):
        assert handle(SimpleNamespace(headers=headers), b"{}")[-1] is None


def test_what_is_said_of_a_task_that_nobody_runs_has_its_ids(signals: Any, wire: Wire) -> None:
    """
    Lines about a discarded, killed or unknown task are inside of the identity that its message carries, and return as ever.
    """

    class Request:
        def __init__(self, headers: dict[str, Any]) -> None:
            self.request_dict = headers

        def revoked(self) -> Any:
            return request_id()

        def on_timeout(self, soft: bool, timeout: int) -> Any:
            return soft, timeout, request_id()

        def on_failure(self, info: str, *, return_ok: bool = False) -> Any:
            return info, return_ok, request_id()

    class Consumer:
        def on_unknown_task(self, body: object, message: Any, error: Exception) -> Any:
            return body, type(message), type(error), request_id()

        on_invalid_task = on_unknown_task

    request, consumer = ModuleType("celery.worker.request"), ModuleType("celery.worker.consumer.consumer")
    vars(request)["Request"], vars(consumer)["Consumer"] = Request, Consumer
    celery._on_request(request)
    celery._on_consumer(consumer)
    carrying = {"traceparent": f"00-{1:032x}-{1:016x}-01", "X-Request-ID": "order-7781-customer-quote"}
    for headers, known in ((carrying, "order-7781-customer-quote"), ({}, None)):
        told, message = Request(headers), SimpleNamespace(headers=headers)
        assert told.revoked() == known
        assert told.on_timeout(True, 2) == (True, 2, known)
        assert told.on_failure("lost", return_ok=True) == ("lost", True, known)
        for tell in (Consumer().on_unknown_task, Consumer().on_invalid_task):
            assert tell(None, message, KeyError("tell")) == (None, SimpleNamespace, KeyError, known)
    with work("a task in this very thread"):
        assert Request(carrying).revoked() == request_id()


def worker_starts(signals: Any, options: dict[str, Any], **conf: str) -> bool:
    """
    Start a worker; tell whether Celery would leave logging alone.
    """
    stock = sys.modules["celery.app.defaults"].__dict__["DEFAULTS"]
    signals.celeryd_init.send(conf={**stock, **conf}, options=options)
    return bool(signals.setup_logging.receivers)


def test_a_workers_lines_are_ours_where_nobody_configured_them(signals: Any) -> None:
    """
    Celery configures nothing then, the level of ``-l`` holds, and its lines keep what their text says, scrubbed.
    """
    with pristine() as out:
        logs.install(Settings())
        assert worker_starts(signals, {})
        signals.setup_logging.send(loglevel=logging.WARNING)
        logger = logging.getLogger("celery.app.trace")
        about = {
            "name": "tell",
            "id": "7",
            "exc": "ValueError('x\\nDETAIL:  Key (a)=(hunter2) exists')",
            "args": "('hunter2',)",
        }
        logger.info("%(name)s", about)
        logger.error("%(name)s[%(id)s] raised unexpected: %(exc)s", about, extra={"data": about})
        (line,) = out.getvalue().splitlines()
    assert "hunter2" not in line
    assert "tell[7] raised unexpected: ValueError('x" in line
    assert '"task_id": "7"' in line


@pytest.mark.parametrize(
    ("options", "conf"),
    [({"logfile": "worker.log"}, {}), ({}, {"worker_log_format": "mine"}), ({}, {"worker_task_log_format": "mine"})],
)
def test_a_worker_whose_logging_somebody_configured_is_left_alone(
    signals: Any, options: dict[str, Any], conf: dict[str, str]
) -> None:
    """
    A file, a format or a receiver of one's own: Celery does what it always did.
    """
    with pristine():
        logs.install(Settings())
        assert not worker_starts(signals, options, **conf)
        signals.after_setup_logger.connect(print, weak=False)
        assert not worker_starts(signals, {})


def test_a_worker_says_that_it_serves_and_flushes_its_children(signals: Any) -> None:
    """
    The start-up line comes once logging is set up; a child of the pool exports what it has before it ends.
    """
    said: list[str] = []
    celery.watch(lambda: said.append("serving"))
    exits.install(lambda _timeout_s: said.append("flushed"))
    try:
        signals.celeryd_after_setup.send()
        signals.worker_process_shutdown.send(pid=7)
    finally:
        exits.uninstall()
        celery.watch(lambda: None)
    assert said == ["serving", "flushed"]
