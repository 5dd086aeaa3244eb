"""
OTLP over HTTP: one batch is delivered, refused by the collector, or kept and tried again while the collector is away.

Nothing is sent twice unless the protocol says so or an acknowledgement was cut off; then the batch is counted as a
possible duplicate. Counters (``guard.count``), where *kind* is ``spans`` or ``logs``: ``kind.exported``,
``kind.retried``, ``kind.possible_duplicates``, ``kind.dropped.<reason>``.

See: opentelemetry-proto docs/specification.md, "OTLP/HTTP Response" and "OTLP/HTTP Throttling".
"""

from __future__ import annotations

import contextlib
import gzip
import random
import threading
import zlib
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, Literal, TypeVar

from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from otel_correlation import guard
from otel_correlation.clocks import monotonic
from otel_correlation.export.encoding import encode_logs, encode_spans
from otel_correlation.export.transport import NoAnswerError
from otel_correlation.policy import reason_of, shown_text, shown_url
from otel_correlation.upstream.exporter import extract_retry_after
from otel_correlation.upstream.sdk_logs import LogRecordExporter, LogRecordExportResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from opentelemetry.sdk._logs import ReadableLogRecord
    from opentelemetry.sdk.trace import ReadableSpan

    from otel_correlation.export.transport import Answer, Transport

_T = TypeVar("_T")
Kind = Literal["spans", "logs"]
Compression = Literal["none", "gzip", "deflate"]

_RETRYABLE: Final = frozenset(
    {
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)
_FIRST_BACKOFF_S: Final = 0.25
_LAST_BACKOFF_S: Final = 5.0
_LEAVING_BACKOFF_S: Final = 0.2
# A collector that nobody can connect to for so long at exit will not be there in time.
_UNREACHABLE_AT_EXIT_S: Final = 2.0
# Collectors refuse larger requests; measured before compression (opentelemetry-proto: 64 MiB).
_MAX_REQUEST_BYTES: Final = 64 * 1024 * 1024

# Wire types of protobuf, and the length of those whose length is fixed.
_VARINT: Final = 0
_LENGTH: Final = 2
_FIXED: Final = {1: 8, 5: 4}

_LOCAL_HINT: Final = (
    "Nobody listens on %s, so traces go nowhere for now. See them on this machine: run `otel-correlation serve`. Send "
    "them to a collector: set OTEL_EXPORTER_OTLP_ENDPOINT. Stop trying: OTEL_TRACES_EXPORTER=none. (Said once.)"
)
_hinted = False


def _hint(endpoint: str) -> None:
    global _hinted  # noqa: PLW0603 - once in a process, for spans and logs together
    if not _hinted:
        _hinted = True
        guard.logger.warning(_LOCAL_HINT, endpoint)


def partial_success(body: bytes) -> tuple[int, str]:
    """
    Return how many items a collector rejected, and why, of a serialized ``Export...ServiceResponse``.

    Zero and empty where the body is none: the status said that the batch was taken. Read by hand, so that no process
    loads the generated messages for three fields.

    See: opentelemetry-proto, ``ExportTracePartialSuccess``: 1 is the number, 2 the message; that of logs is the same.
    """
    rejected, message = 0, b""
    try:
        for number, partial in _fields(body):
            if number == 1 and isinstance(partial, bytes):
                for inner, value in _fields(partial):
                    if inner == 1 and isinstance(value, int):
                        rejected = value
                    elif inner == 2 and isinstance(value, bytes):
                        message = value
        text = message.decode()
    except (IndexError, ValueError):  # UnicodeDecodeError is a ValueError
        return 0, ""
    # A negative number would be 2**63 and more here.
    return (rejected if rejected < 2**63 else 0), text


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    position, end = 0, len(message)
    while position < end:
        key, position = _varint(message, position)
        kind = key & 7
        value: int | bytes = b""
        if kind == _VARINT:
            value, position = _varint(message, position)
        elif kind == _LENGTH:
            size, position = _varint(message, position)
            value = message[position : position + size]
            position += size
        elif kind in _FIXED:
            position += _FIXED[kind]
        else:
            raise ValueError("a wire type that OTLP does not use")
        if position > end:
            raise ValueError("a field is cut off")
        yield key >> 3, value


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = 0
    for number in range(10):
        byte = message[position + number]
        value |= (byte & 0x7F) << (7 * number)
        if byte < 0x80:
            return value, position + number + 1
    raise ValueError("a number of more than 64 bits")


class Wake:
    """
    Wakes one thread that waits; being woken uses the call up.

    Not ``threading.Event``, which holds a lock while it is set: a signal handler or a finalizer that logs at that
    moment would wait for its own thread. Here each call is one step.
    """

    def __init__(self) -> None:
        self._asleep = threading.Lock()
        self._asleep.acquire()

    def set(self) -> None:
        """
        Wake the thread, or keep it from falling asleep the next time; any thread may call it, any number of times.
        """
        with contextlib.suppress(RuntimeError):  # called before, and nobody has woken since
            self._asleep.release()

    def wait(self, timeout_s: float) -> bool:
        """
        Wait until ``set`` was called, or for so many seconds; return whether it was.
        """
        return self._asleep.acquire(timeout=min(max(timeout_s, 0.0), threading.TIMEOUT_MAX))


class Sender:
    """
    Delivers serialized batches to one endpoint, one at a time, for as long as it takes.

    Args:
        kind: What is sent, for counters and lines.
        endpoint: The full URL.
        headers: Request headers.
        timeout_s: Longest time for one attempt.
        compression: How bodies are compressed.
        transport: Makes a transport; called here, so that whatever it imports is imported by the thread that sets us
            up, and again in a forked child, which must not use its parent's connections.
        is_default: Nobody named the endpoint: say once what to do, then be quiet until somebody listens.
    """

    def __init__(
        self,
        kind: Kind,
        endpoint: str,
        *,
        headers: dict[str, str],
        transport: Callable[[], Transport],
        timeout_s: float = 10.0,
        compression: Compression = "none",
        is_default: bool = False,
    ) -> None:
        self.kind: Kind = kind
        self.endpoint = endpoint
        self._shown = shown_url(endpoint)
        self.abandoned = 0
        self.trouble = ""
        self.quiet = is_default
        self.attempts = 0
        self._headers = headers if compression == "none" else {**headers, "content-encoding": compression}
        self._timeout_s = timeout_s
        self._compression = compression
        self._build = transport
        self._transport: Transport | None = transport()
        self._unreachable_since: float | None = None
        self._deadline: float | None = None
        self._attempts_before_stop = 0
        self._hurry = Wake()
        self._stop = Wake()

    def send(self, payload: bytes, count: int) -> bool:
        """
        Deliver one batch; returns when it is delivered, refused for good, or given up by ``stop``.

        Args:
            payload: The serialized request.
            count: How many spans or records it holds.

        Returns:
            Whether the collector took it.
        """
        if self._transport is None:
            self._transport = self._build()
        data = self._compress(payload)
        attempt = 0
        while not self._gives_up():
            delay: float | None = None
            again_now = False
            try:
                answer = self._transport.post(data, self._headers, self._attempt_s())
            except NoAnswerError as error:
                self.attempts += 1
                self.trouble = reason_of(error.cause)
                if not error.is_temporary:
                    self._refused("not_sendable", count)
                    return False
                warned = "cannot be reached for"
                if error.maybe_delivered:
                    guard.count(f"{self.kind}.possible_duplicates", count)
                    # Most often an idle connection that the collector has closed: the next attempt opens a new one.
                    again_now = attempt == 0
                elif self._unreachable_since is None:
                    self._unreachable_since = monotonic()
            else:
                self.attempts += 1
                self._unreachable_since = None
                self.quiet = False
                if 200 <= answer.status < 300:
                    self._delivered(answer, count)
                    return True
                self.trouble = f"HTTP status {answer.status}"
                if answer.status not in _RETRYABLE:
                    self._refused(f"http_{answer.status}", count)
                    return False
                delay = extract_retry_after(answer)
                warned = "is not taking"
            if not again_now:
                self._warn(warned)
                if delay:
                    self._obey(delay)
                else:
                    self._back_off(attempt)
            attempt += 1
            guard.count(f"{self.kind}.retried", count)
        self.abandoned += count
        guard.count(f"{self.kind}.dropped.shutdown", count)
        return False

    def unreachable_s(self) -> float:
        """
        Return for how long nobody could connect to the collector; 0 if the last attempt got an answer.
        """
        since = self._unreachable_since
        return 0.0 if since is None else monotonic() - since

    def hurry(self) -> None:
        """
        End the pause before the next attempt; a pause that the collector asked for goes on.
        """
        self._hurry.set()

    def stop(self, deadline: float) -> None:
        """
        Give up at ``deadline`` (monotonic), or after one more attempt if nobody could connect for two seconds by then.
        """
        self._attempts_before_stop = self.attempts
        self._deadline = deadline
        self._stop.set()
        self._hurry.set()

    def resume(self) -> None:
        """
        Undo ``stop``.
        """
        self._deadline = None
        self._stop.wait(0.0)

    def is_hopeless(self, attempts_before: int) -> bool:
        """
        Tell whether an attempt after the first ``attempts_before`` failed, and nobody could connect for two seconds.

        A default endpoint on which nobody ever listened is given up at once: most likely there is no collector.
        """
        if self.attempts <= attempts_before or self._unreachable_since is None:
            return False
        return self.quiet or self.unreachable_s() >= _UNREACHABLE_AT_EXIT_S

    def close(self) -> None:
        """
        Close the connections.
        """
        if self._transport is not None:
            self._transport.close()

    def after_fork(self) -> None:
        """
        Forget the parent's connections, locks and troubles.
        """
        # Not closed: a lock of the connection pool may have been held at the fork.
        self._transport = None
        self._unreachable_since = None
        self.make_locks()

    def make_locks(self) -> None:
        """
        Wait by what ``threading`` offers now from here on; nobody may be sending.
        """
        self._hurry = Wake()
        self._stop = Wake()

    def _compress(self, payload: bytes) -> bytes:
        if self._compression == "gzip":
            return gzip.compress(payload, 6)
        return zlib.compress(payload) if self._compression == "deflate" else payload

    def _attempt_s(self) -> float:
        if self._deadline is None:
            return self._timeout_s
        return min(self._timeout_s, max(self._deadline - monotonic(), 0.1))

    def _gives_up(self) -> bool:
        if self._deadline is None:
            return False
        return monotonic() >= self._deadline or self.is_hopeless(self._attempts_before_stop)

    def _obey(self, delay_s: float) -> None:
        """
        Pause as long as the collector asked; at exit, give up if that is longer than there is time.
        """
        end = monotonic() + min(delay_s, 3600.0)
        if self._deadline is None:
            self._stop.wait(end - monotonic())
        if self._deadline is None:
            return
        if end >= self._deadline:
            self._deadline = monotonic()
        else:
            Wake().wait(end - monotonic())

    def _back_off(self, attempt: int) -> None:
        if self._deadline is not None:
            Wake().wait(_LEAVING_BACKOFF_S)
            return
        backoff = min(_FIRST_BACKOFF_S * 2 ** min(attempt, 10), _LAST_BACKOFF_S)
        self._hurry.wait(backoff * random.uniform(0.5, 1.0))  # noqa: S311 - jitter

    def _delivered(self, answer: Answer, count: int) -> None:
        rejected, message = 0, ""
        # A full success has an empty body.
        if answer.body and "json" not in answer.fields.get("content-type", ""):
            rejected, message = partial_success(answer.body)
        if rejected:
            rejected = min(rejected, count)
            guard.count(f"{self.kind}.dropped.rejected_by_collector", rejected)
        if rejected or message:
            guard.warn_seldom(
                f"export.partial.{self.kind}",
                "The collector at %s took a batch but rejected %d of %d %s: %a",
                self._shown,
                rejected,
                count,
                self.kind,
                shown_text(message[:1000])[:200],
            )
        guard.count(f"{self.kind}.exported", count - rejected)

    def _refused(self, reason: str, count: int) -> None:
        guard.count(f"{self.kind}.dropped.{reason}", count)
        guard.warn_seldom(
            f"export.refused.{self.kind}",
            "%s refused %d %s for good (%s); they are dropped. Reported at most once a minute.",
            self._shown,
            count,
            self.kind,
            self.trouble,
        )

    def _warn(self, what: str) -> None:
        if self.quiet:
            _hint(self._shown)
            return
        guard.warn_seldom(
            f"export.retry.{self.kind}",
            "%s %s %s (%s); they are kept and tried again until the queue is full.",
            self._shown,
            what,
            self.kind,
            self.trouble,
        )


class HttpSpanExporter(SpanExporter):
    """
    Exports spans through a sender; returns only when the batch has met its fate.
    """

    def __init__(self, sender: Sender) -> None:
        self.sender = sender

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """
        Deliver one batch.
        """
        delivered = _deliver(self.sender, spans, encode_spans)
        return SpanExportResult.SUCCESS if delivered else SpanExportResult.FAILURE

    def shutdown(self) -> None:
        """
        Close the connections.
        """
        self.sender.close()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:  # noqa: ARG002 - the interface
        """
        Nothing is buffered here.
        """
        return True


class HttpLogExporter(LogRecordExporter):
    """
    Exports log records through a sender; returns only when the batch has met its fate.
    """

    def __init__(self, sender: Sender) -> None:
        self.sender = sender

    def export(self, batch: Sequence[ReadableLogRecord]) -> LogRecordExportResult:
        """
        Deliver one batch.
        """
        delivered = _deliver(self.sender, batch, encode_logs)
        return LogRecordExportResult.SUCCESS if delivered else LogRecordExportResult.FAILURE

    def shutdown(self) -> None:
        """
        Close the connections.
        """
        self.sender.close()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:  # noqa: ARG002 - the interface
        """
        Nothing is buffered here.
        """
        return True


def _deliver(sender: Sender, items: Sequence[_T], encode: Callable[[Sequence[_T]], tuple[bytes, int]]) -> bool:
    payload, count = encode(items)
    if not count:
        return not items
    if len(payload) <= _MAX_REQUEST_BYTES:
        return sender.send(payload, count)
    if len(items) == 1:
        guard.count(f"{sender.kind}.dropped.too_large")
        return False
    half = len(items) // 2
    first = _deliver(sender, items[:half], encode)
    return _deliver(sender, items[half:], encode) and first
