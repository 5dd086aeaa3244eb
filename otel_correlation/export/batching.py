"""
Bounded batches on a background thread: the application never waits for a collector.

One ``Batcher`` has one queue, one thread and one exporter, so a slow exporter does not hold up another one. The two
pipelines below are what the SDK's providers see.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from opentelemetry.context import attach, detach, set_value
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.semconv.attributes import exception_attributes
from opentelemetry.trace import Status

from otel_correlation import guard, identity
from otel_correlation.clocks import monotonic
from otel_correlation.export.sending import HttpLogExporter, HttpSpanExporter, Wake
from otel_correlation.export.sizes import record_bytes, span_bytes
from otel_correlation.policy import BATCH_BYTES, QUEUE_BYTES, bounds_for, scrubbed, scrubbed_stack
from otel_correlation.semconv import REQUEST_ID
from otel_correlation.upstream.api import SPAN_KEY as _SPAN_KEY
from otel_correlation.upstream.api import SUPPRESS_INSTRUMENTATION as _SUPPRESS_INSTRUMENTATION_KEY
from otel_correlation.upstream.sdk import BoundedAttributes
from otel_correlation.upstream.sdk_logs import LogRecordProcessor, ReadableLogRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opentelemetry.context import Context
    from opentelemetry.sdk._logs import ReadWriteLogRecord
    from opentelemetry.sdk._logs.export import LogRecordExporter
    from opentelemetry.sdk.trace import ReadableSpan, Span
    from opentelemetry.sdk.trace.export import SpanExporter

    from otel_correlation.export.sending import Kind, Sender
    from otel_correlation.policy import Bounds

T = TypeVar("T")

# Longest time that an exit waits for the collector: below the 10 s after which `docker stop` kills.
EXIT_BUDGET_S: Final = 5.0

_FULL: Final = "The queue of %d %s is full; the newest are dropped until it drains. Reported at most once a minute."
_FULL_OF_BYTES: Final = (
    "The queue of %d bytes of %s is full; the newest are dropped until it drains. OTEL_CORRELATION_QUEUE_BYTES bounds "
    "it. Reported at most once a minute."
)

# Not threading.local: greenlets of one thread would share it, and each has a context of its own.
_exporting: Final[ContextVar[bool]] = ContextVar("otel_correlation_exporting", default=False)


def in_export() -> bool:
    """
    Tell whether this thread is exporting now, so that what it logs is not exported in turn.
    """
    return _exporting.get()


class Batcher(Generic[T]):
    """
    Takes items from any thread without blocking, and exports them in batches, never two at once.

    Args:
        kind: ``spans`` or ``logs``, for counters and lines.
        export: Exports one batch; returns when its fate is decided.
        delay_ms: Longest time that an item waits for its batch.
        max_queue_size: Items held at most, besides the batch that is being exported; the newest are dropped.
        max_batch_size: Items exported at once.
        sender: The part of the exporter that can be told to hurry and to stop, if it has one.
        queue_bytes: Bytes held at most, with the batch that is being exported; the newest are dropped.
        size_of: Estimates the bytes of an item; called once for each. Without it, items count as empty.
    """

    def __init__(
        self,
        kind: Kind,
        export: Callable[[list[T]], object],
        *,
        delay_ms: int,
        max_queue_size: int,
        max_batch_size: int,
        sender: Sender | None = None,
        queue_bytes: int = QUEUE_BYTES,
        size_of: Callable[[T], int] = lambda _item: 0,
    ) -> None:
        self.kind: Kind = kind
        self._export = export
        self._sender = sender
        # A delay of 0 exports at once: then every item wakes the thread.
        self._delay_s = delay_ms / 1000 or 60.0
        self._max_batch = max_batch_size
        self._wake_at = max_batch_size if delay_ms else 1
        self._room = max_queue_size
        self.room: Final = max_queue_size
        self._room_bytes = queue_bytes
        # A queue that is smaller than two batches is emptied before it is full, too.
        self._batch_bytes = min(BATCH_BYTES, max(queue_bytes // 2, 1))
        self._size_of = size_of
        self._closing = False
        self._clear()
        _batchers.add(self)

    def _clear(self) -> None:
        # Each with its size, so that what is taken off the account is what was put on it.
        self._queue: deque[tuple[T, int]] = deque()
        # Only ever changed by one "+=" or "-=" of a number that was ready before: CPython switches threads, and calls a
        # signal's handler, between no two instructions of that. So it is exact without a lock, which a handler that
        # logs would meet again.
        self._held = 0
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._awake = False
        self._in_flight = 0
        self.handed_over = 0
        self._wanted = 0
        self._done = 0
        self._make_locks()

    def _make_locks(self) -> None:
        self._locks_of: Any = threading.Lock
        self._wake = Wake()
        self._flushed = threading.Condition()

    def put(self, item: T) -> None:
        """
        Queue one item; drops and counts it if the queue is full. Never blocks, never raises.
        """
        queue = self._queue
        length = len(queue)
        if length >= self._room:
            self._drop()
            return
        size = self._size_of(item)
        held = self._held + size
        if held > self._room_bytes:
            self._drop(of_bytes=True)
            return
        self._held += size
        queue.append((item, size))
        if (length + 1 >= self._wake_at or held >= self._batch_bytes) and not self._awake:
            self._awake = True
            self._wake.set()
        if self._thread is None:
            self._start()

    def flush(self, timeout_s: float, *, leaving: bool = False) -> bool:
        """
        Export what is queued now.

        Args:
            timeout_s: Return after this time at the latest.
            leaving: The process is about to end: do not wait for a collector that nobody could reach for two seconds.

        Returns:
            Whether everything was exported, or dropped and counted, in time.
        """
        if in_export():
            return False
        if not self._queue and not self._in_flight:
            return True
        deadline = monotonic() + timeout_s
        if not self._start():
            return self._flush_here(deadline)
        sender = self._sender
        # One attempt may be under way already, and end without knowing that the collector is back.
        attempts = sender.attempts + 1 if sender is not None else 0
        with self._flushed:
            self._wanted += 1
            ticket = self._wanted
            self._awake = True
            self._wake.set()
            if sender is not None:
                sender.hurry()
            while self._done < ticket:
                if self._thread is None:
                    if not self.pending():
                        return True  # it ended in between, with everything done
                    self._start()
                left = deadline - monotonic()
                if left <= 0 or (leaving and sender is not None and sender.is_hopeless(attempts)):
                    return False
                self._flushed.wait(min(left, 0.1) if leaving else left)
                if leaving and sender is not None:
                    sender.hurry()
        return True

    def waiting(self) -> int:
        """
        Return how many items are queued and not being exported yet.
        """
        return len(self._queue)

    def held_bytes(self) -> int:
        """
        Return the estimated bytes of what is queued or being exported.
        """
        return self._held

    def pending(self) -> int:
        """
        Return how many items are queued or being exported.
        """
        return len(self._queue) + self._in_flight

    def trouble(self) -> str:
        """
        Return what went wrong last, for a line; empty if nothing did or nobody knows.
        """
        return self._sender.trouble if self._sender is not None else ""

    def is_quiet(self) -> bool:
        """
        Tell whether losses go without saying: nobody named an endpoint and nobody listens on the default one.
        """
        return self._sender is not None and self._sender.quiet

    def shutdown(self, timeout_s: float = EXIT_BUDGET_S) -> None:
        """
        Export what is queued, then refuse items; what cannot be exported in time is counted and told in one line.
        """
        if self._closing:
            return
        self._room = 0
        self._closing = True
        deadline = monotonic() + timeout_s
        if self._sender is not None:
            self._sender.stop(deadline)
        # A little longer than the sender: its last attempt ends at the deadline.
        self.flush(timeout_s + 0.25)
        self._awake = True
        self._wake.set()
        left = self.pending()
        self._queue.clear()
        self._held = 0
        if left:
            guard.count(f"{self.kind}.dropped.shutdown", left)
        if self._sender is not None:
            left += self._sender.abandoned
        if left and not self.is_quiet():
            guard.logger.warning("%d %s were lost at exit: %s", left, self.kind, self.trouble() or "no time left")

    def after_fork(self) -> None:
        """
        Start anew in a child: the parent exports what it had queued, on its own connection.
        """
        self._clear()
        if self._sender is not None:
            self._sender.after_fork()

    def _drop(self, *, of_bytes: bool = False) -> None:
        if self._closing:
            guard.count(f"{self.kind}.dropped.after_shutdown")
            return
        if of_bytes:
            guard.count(f"{self.kind}.dropped.queue_bytes")
        else:
            guard.count(f"{self.kind}.dropped.queue_full")
        if self.is_quiet():
            return
        if of_bytes:
            guard.warn_seldom(f"export.queue_bytes.{self.kind}", _FULL_OF_BYTES, self._room_bytes, self.kind)
        else:
            guard.warn_seldom(f"export.queue_full.{self.kind}", _FULL, self._room, self.kind)

    def _start(self) -> bool:
        # Not waited for: another thread is starting it, or this one was interrupted in here by a signal handler.
        if not self._starting.acquire(blocking=False):
            return True
        try:
            if self._thread is None:
                if threading.Lock is not self._locks_of:
                    # gevent has replaced it since: what is called a thread is a greenlet now, and one that waited for
                    # a lock of before would stop all the others.
                    self._make_locks()
                    if self._sender is not None:
                        self._sender.make_locks()
                thread = threading.Thread(target=self._run, name=f"otel-correlation-{self.kind}", daemon=True)
                self._thread = thread  # before it runs: it takes itself out when it ends
                thread.start()
        except RuntimeError:  # the interpreter is shutting down, or there are too many threads
            self._thread = None
            return False
        finally:
            self._starting.release()
        return True

    def _run(self) -> None:
        try:
            self._work()
        finally:
            with self._flushed:
                self._thread = None  # the next item starts another one
                self._flushed.notify_all()

    def _work(self) -> None:
        due = monotonic() + self._delay_s
        while not (self._closing and not self._queue):
            self._wake.wait(due - monotonic())
            self._awake = False
            wanted = self._wanted
            everything = (
                wanted != self._done
                or self._closing
                or self._wake_at == 1
                or self._held >= self._batch_bytes
                or monotonic() >= due
            )
            if everything:
                due = monotonic() + self._delay_s
            self._drain(everything=everything)
            if wanted != self._done:
                with self._flushed:
                    self._done = wanted
                    self._flushed.notify_all()

    def _flush_here(self, deadline: float) -> bool:
        """
        Export on the calling thread: no other one can be started, as when the interpreter shuts down.
        """
        if self._sender is not None:
            self._sender.stop(deadline)
        self._drain(everything=True)
        if self._sender is not None and not self._closing:
            self._sender.resume()
        return not self._queue

    def _drain(self, *, everything: bool) -> None:
        queue = self._queue
        size = self._max_batch
        left = len(queue) if everything else len(queue) // size * size
        if not left:
            return
        token = attach(set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))
        exporting = _exporting.set(True)
        try:
            while left > 0 and queue:
                # Said before anything is taken, so that a flush never sees an empty queue and nothing in flight.
                self._in_flight = min(size, left, len(queue))
                batch, held = self._take(self._in_flight)
                self._in_flight = len(batch)
                left -= len(batch)
                self.handed_over += len(batch)
                try:
                    self._export(batch)
                except BaseException as error:  # somebody's exporter, which may even call sys.exit()
                    guard.count(f"{self.kind}.dropped.exporter_raised", len(batch))
                    if not isinstance(error, Exception):
                        raise
                    guard.report(f"export.{self.kind}")
                finally:
                    self._in_flight = 0
                    self._held -= held
        finally:
            _exporting.reset(exporting)
            detach(token)

    def _take(self, count: int) -> tuple[list[T], int]:
        """
        Return the oldest items, as many as one request may hold but at least one, and their bytes.
        """
        queue = self._queue
        batch: list[T] = []
        held = 0
        try:
            while len(batch) < count:
                size = queue[0][1]
                if batch and held + size > self._batch_bytes:
                    break
                batch.append(queue.popleft()[0])
                held += size
        except IndexError:  # a shutdown that ran out of time has emptied the queue
            return batch, held
        return batch, held


_batchers: Final[weakref.WeakSet[Batcher[Any]]] = weakref.WeakSet()


def _after_fork() -> None:
    _exporting.set(False)
    for batcher in _batchers:
        batcher.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def leave(batchers: Sequence[Batcher[Any]], timeout_s: float = EXIT_BUDGET_S) -> bool:
    """
    Flush before the process may end at any moment; says in one line what is left then.

    Args:
        batchers: All of them, as the pipelines' ``batchers`` say.
        timeout_s: For all of them together.

    Returns:
        Whether nothing is left.
    """
    deadline = monotonic() + timeout_s
    late = [
        batcher
        for batcher in batchers
        if not batcher.flush(max(deadline - monotonic(), 0.05), leaving=True) and batcher.pending()
    ]
    said = [
        f"{batcher.pending()} {batcher.kind} ({batcher.trouble() or 'no time left'})"
        for batcher in late
        if not batcher.is_quiet()
    ]
    if said:
        # Seldom: a server's end and the process's end may both say it.
        guard.warn_seldom("export.leave", "Not delivered, and lost if the process ends now: %s", ", ".join(said))
    return not late


def _foreign_export(kind: Kind, exporter: Any) -> Callable[[list[Any]], None]:
    """
    Return an export function for an exporter that does not count by itself.
    """

    def export(batch: list[Any]) -> None:
        result = exporter.export(batch)
        failed = getattr(result, "name", "SUCCESS") != "SUCCESS"
        guard.count(f"{kind}.dropped.exporter_failed" if failed else f"{kind}.exported", len(batch))

    return export


def _put_to(batchers: Sequence[Batcher[T]]) -> Callable[[T], None]:
    if len(batchers) == 1:
        return batchers[0].put

    def put(item: T) -> None:
        for batcher in batchers:
            batcher.put(item)

    return put


class SpanPipeline(SpanProcessor):
    """
    Puts the request id on every span as it starts, and exports sampled spans in batches as they end.

    Args:
        exporters: Each gets every span, in batches of its own.
        schedule_delay_ms: Longest time that a span waits for its batch.
        max_queue_size: Spans held at most for each exporter.
        max_batch_size: Spans exported at once.
        queue_bytes: Estimated bytes of spans held at most for each exporter.
        attribute_length: The SDK's limit of an attribute's length, where one is set: exception texts keep to it.
        translate: Applied to each span on the exporting thread, for example ``old_names.with_old_names``.
    """

    # Light spans need no copy at their end; the tracer asks.
    accepts_light_spans = True

    def __init__(
        self,
        exporters: Sequence[SpanExporter],
        *,
        schedule_delay_ms: int = 500,
        max_queue_size: int = 2048,
        max_batch_size: int = 512,
        queue_bytes: int = QUEUE_BYTES,
        attribute_length: int | None = None,
        translate: Callable[[ReadableSpan], ReadableSpan] | None = None,
    ) -> None:
        self._exporters = tuple(exporters)
        self.batchers: tuple[Batcher[ReadableSpan], ...] = tuple(
            Batcher(
                "spans",
                self._exporting(exporter, translate),
                delay_ms=schedule_delay_ms,
                max_queue_size=max_queue_size,
                max_batch_size=min(max_batch_size, max_queue_size),
                sender=exporter.sender if isinstance(exporter, HttpSpanExporter) else None,
                queue_bytes=queue_bytes,
                size_of=span_bytes,
            )
            for exporter in self._exporters
        )
        self._put = _put_to(self.batchers)
        self._bounds = bounds_for(attribute_length)

    @staticmethod
    def _exporting(
        exporter: SpanExporter, translate: Callable[[ReadableSpan], ReadableSpan] | None
    ) -> Callable[[list[ReadableSpan]], object]:
        export: Callable[[list[ReadableSpan]], object] = (
            exporter.export if isinstance(exporter, HttpSpanExporter) else _foreign_export("spans", exporter)
        )
        if translate is None:
            return export
        return lambda spans: export([translate(span) for span in spans])

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """
        Put ``request_id`` on the span unless it is there: that of its context, or of the request that runs.

        A carrier that was read gives a context with a span and no request id. One without a span was emptied on
        purpose, and stays outside of the request.
        """
        found = None if parent_context is None else identity.get_from(parent_context)
        if found is None and (parent_context is None or _SPAN_KEY in parent_context):
            found = identity.current()
        if found is not None:
            attributes = span.attributes
            if attributes is None or REQUEST_ID not in attributes:
                span.set_attribute(REQUEST_ID, found.request_id)

    def on_end(self, span: ReadableSpan) -> None:
        """
        Queue the span if it is sampled, without what a user sent in its exception texts; never blocks.
        """
        context = span.get_span_context()
        if context is not None and context.trace_flags & 1:
            if span._events or span._status.description:
                with guard.never_raise("export.scrub"):
                    _scrub(span, self._bounds)
            self._put(span)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """
        Export what is queued now; returns False if that took longer than the timeout.
        """
        return _force_flush(self.batchers, timeout_millis / 1000)

    def shutdown(self) -> None:
        """
        Export what is queued within the exit budget, then drop (and count) what comes.
        """
        _shutdown(self.batchers, self._exporters)


def _scrub(span: ReadableSpan, bounds: Bounds) -> None:
    """
    Cut the exception texts of a span that another instrumentation made, and take what a user sent out of them.
    """
    status = span._status
    if status.description and (text := scrubbed(status.description, bounds.message, bounds)) != status.description:
        span._status = Status(status.status_code, text)
    for event in span._events:
        held = event.attributes
        if event.name != "exception" or not held:
            continue
        texts: dict[str, str] = {}
        if isinstance(message := held.get(exception_attributes.EXCEPTION_MESSAGE), str):
            texts[exception_attributes.EXCEPTION_MESSAGE] = scrubbed(message, bounds.message, bounds)
        if isinstance(stack := held.get(exception_attributes.EXCEPTION_STACKTRACE), str):
            texts[exception_attributes.EXCEPTION_STACKTRACE] = scrubbed_stack(stack, bounds)
        if any(text != held[key] for key, text in texts.items()):
            cleaned = BoundedAttributes(attributes={**held, **texts})
            cleaned.dropped = event.dropped_attributes
            event._attributes = cleaned


class LogPipeline(LogRecordProcessor):
    """
    Exports log records in batches.

    Args:
        exporters: Each gets every record, in batches of its own.
        schedule_delay_ms: Longest time that a record waits for its batch.
        max_queue_size: Records held at most for each exporter.
        max_batch_size: Records exported at once.
        queue_bytes: Estimated bytes of records held at most for each exporter.
    """

    def __init__(
        self,
        exporters: Sequence[LogRecordExporter],
        *,
        schedule_delay_ms: int = 500,
        max_queue_size: int = 2048,
        max_batch_size: int = 512,
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        self._exporters = tuple(exporters)
        self.batchers: tuple[Batcher[Any], ...] = tuple(
            Batcher(
                "logs",
                self._exporting(exporter),
                delay_ms=schedule_delay_ms,
                max_queue_size=max_queue_size,
                max_batch_size=min(max_batch_size, max_queue_size),
                sender=exporter.sender if isinstance(exporter, HttpLogExporter) else None,
                queue_bytes=queue_bytes,
                size_of=record_bytes,
            )
            for exporter in self._exporters
        )
        self._put = _put_to(self.batchers)

    @staticmethod
    def _exporting(exporter: LogRecordExporter) -> Callable[[list[Any]], object]:
        if isinstance(exporter, HttpLogExporter):
            return exporter.export
        export = _foreign_export("logs", exporter)
        return lambda records: export([_readable(record) for record in records])

    def emit(self, record: ReadableLogRecord | ReadWriteLogRecord) -> None:
        """
        Queue one record; never blocks. Records made while exporting are ignored.

        Args:
            record: Or anything with the attributes of a ``ReadableLogRecord``.
        """
        if not in_export():
            self._put(record)

    def on_emit(self, log_record: ReadWriteLogRecord) -> None:
        """
        Queue one record from the SDK.
        """
        self.emit(log_record)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """
        Export what is queued now; returns False if that took longer than the timeout.
        """
        return _force_flush(self.batchers, timeout_millis / 1000)

    def shutdown(self) -> None:
        """
        Export what is queued within the exit budget, then drop (and count) what comes.
        """
        _shutdown(self.batchers, self._exporters)


def _readable(record: Any) -> ReadableLogRecord:
    if isinstance(record, ReadableLogRecord):
        return record
    return ReadableLogRecord(
        log_record=record.log_record,
        resource=record.resource or Resource.get_empty(),
        instrumentation_scope=record.instrumentation_scope,
        limits=record.limits,
    )


def _force_flush(batchers: Sequence[Batcher[Any]], timeout_s: float) -> bool:
    deadline = monotonic() + timeout_s
    late = [batcher for batcher in batchers if not batcher.flush(max(deadline - monotonic(), 0.0))]
    return not late


def _shutdown(batchers: Sequence[Batcher[Any]], exporters: Sequence[SpanExporter | LogRecordExporter]) -> None:
    deadline = monotonic() + EXIT_BUDGET_S
    for batcher in batchers:
        batcher.shutdown(max(deadline - monotonic(), 0.1))
    for exporter in exporters:
        with guard.never_raise("export.shutdown"):
            exporter.shutdown()
