"""
Trace and span ids: a private generator, the one-shot slot for a given trace id, and what roots a trace.
"""

from __future__ import annotations

import os
import random
import threading
from collections import OrderedDict
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

from opentelemetry.sdk.trace.id_generator import IdGenerator

from otel_correlation import guard
from otel_correlation.clocks import monotonic
from otel_correlation.request_id import to_trace_id, to_uuid

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_TRACES_PER_ID: Final = 100
FORGET_AFTER_S: Final = 600.0
MAX_REMEMBERED: Final = 65_536

# A private source: a user's ``random.seed(42)`` must not make every worker repeat the same trace ids.
_random = random.Random(os.urandom(32))  # noqa: S311 - trace ids are identifiers, not secrets


def _reseed() -> None:
    _random.seed(os.urandom(32))


if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has none
    os.register_at_fork(after_in_child=_reseed)


def random_trace_id() -> int:
    """
    Return 128 random bits, never zero.
    """
    while True:
        if value := _random.getrandbits(128):
            return value


def random_span_id() -> int:
    """
    Return 64 random bits, never zero.
    """
    while True:
        if value := _random.getrandbits(64):
            return value


class _Slot:
    """
    A given trace id that exactly one root span may take.
    """

    __slots__ = ("forced", "random", "taken", "trace_id")

    def __init__(self, trace_id: int | None, *, random: bool, forced: bool) -> None:
        self.trace_id = trace_id or 0
        self.forced = forced
        self.random = random
        self.taken = trace_id is None


_slot: ContextVar[_Slot | None] = ContextVar("otel_correlation_given_trace_id", default=None)


class CorrelationIdGenerator(IdGenerator):
    """
    Random ids, except for the one root span that was given its trace id.

    The SDK asks ``generate_trace_id()`` without arguments and ``is_trace_id_random()`` afterwards in the same call, so
    the answer to the second belongs to the first.

    Args:
        inner: Where all other ids come from; the private random source if None.
    """

    def __init__(self, inner: IdGenerator | None = None) -> None:
        self._inner = inner

    def generate_span_id(self) -> int:
        """
        Return 64 random bits, never zero.
        """
        return random_span_id() if self._inner is None else self._inner.generate_span_id()

    def generate_trace_id(self) -> int:
        """
        Return the given trace id once, else a new one.
        """
        slot = _slot.get()
        if slot is not None and not slot.taken:
            slot.taken = True
            return slot.trace_id
        return random_trace_id() if self._inner is None else self._inner.generate_trace_id()

    def is_trace_id_random(self) -> bool:
        """
        Tell whether the id made last in this call is random (W3C Trace Context Level 2, random flag).
        """
        slot = _slot.get()
        if slot is not None and slot.taken:
            return slot.random
        return True if self._inner is None else self._inner.is_trace_id_random()


def take_given() -> tuple[int, bool] | None:
    """
    Return the given trace id and whether it is random, once; None if there is none.
    """
    slot = _slot.get()
    if slot is None or slot.taken:
        return None
    slot.taken = True
    return slot.trace_id, slot.random


def was_given() -> bool:
    """
    Tell whether the root span that starts now took a trace id that came from a request id.
    """
    slot = _slot.get()
    return slot is not None and slot.taken and not slot.random


def was_forced() -> bool:
    """
    Tell whether the span that starts now is to be sampled whatever the ratio.
    """
    slot = _slot.get()
    return slot is not None and slot.forced


class given_trace_id:  # noqa: N801 - a context manager that reads like a phrase
    """
    Give the next root span that starts inside the block this trace id; the user's own new roots never see it.

    Args:
        trace_id: The trace id; None for a span with a parent.
        random: Whether it was minted, not taken from a request id.
        forced: Whether our sampler samples the span whatever the ratio.
    """

    __slots__ = ("_forced", "_random", "_token", "_trace_id")

    def __init__(self, trace_id: int | None, *, random: bool = False, forced: bool = False) -> None:
        self._trace_id = trace_id
        self._forced = forced
        self._random = random

    def __enter__(self) -> None:
        """
        Fill the slot.
        """
        self._token = _slot.set(_Slot(self._trace_id, random=self._random, forced=self._forced))

    def __exit__(self, *exc_info: object) -> None:
        """
        Empty the slot, used or not.
        """
        _slot.reset(self._token)


class ReuseGuard:
    """
    Count how often an id roots a trace, so that a caller with one constant id never builds an endless trace.

    An id roots at most ``limit`` requests; after that it is refused until it has been silent for ``forget_after_s``
    seconds.
    The table holds ``capacity`` ids, the least recently used one is forgotten first. Per process, thread-safe.
    """

    def __init__(
        self,
        *,
        limit: int = MAX_TRACES_PER_ID,
        forget_after_s: float = FORGET_AFTER_S,
        capacity: int = MAX_REMEMBERED,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._limit = limit
        self._forget_after_s = forget_after_s
        self._capacity = capacity
        self._clock = clock
        self._seen: OrderedDict[int, tuple[int, float]] = OrderedDict()
        # Reentrant: a signal handler or a finalizer may ask while its own thread is being answered.
        self._lock = threading.RLock()
        if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has none
            os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        self._lock = threading.RLock()
        self._seen.clear()

    def __len__(self) -> int:
        """
        Return how many ids are remembered.
        """
        return len(self._seen)

    def allows(self, trace_id: int) -> bool:
        """
        Tell whether ``trace_id`` may root one more request, and remember that it was asked for.
        """
        now = self._clock()
        with self._lock:
            used, last = self._seen.pop(trace_id, (0, now))
            if now - last >= self._forget_after_s:
                used = 0
            self._seen[trace_id] = (min(used + 1, self._limit + 1), now)
            if len(self._seen) > self._capacity:
                self._seen.popitem(last=False)
            return used < self._limit


reuse_guard = ReuseGuard()


def root(received: str | None, mint: str, new_trace_id: Callable[[], int]) -> tuple[str, int, bool, bool]:
    """
    Apply the mapping table of the bridge contract where the caller sent no trace.

    Args:
        received: The caller's valid request id, or None.
        mint: How a new request id looks (``Settings.mint``).
        new_trace_id: Makes a random trace id.

    Returns:
        The request id, the trace id, whether that is random, and whether the reuse guard refused the request id.
    """
    if received is None:
        trace_id = new_trace_id()
        if mint == "uuid":
            minted = to_uuid(trace_id)
            return minted, to_trace_id(minted) or trace_id, False, False
        return f"{trace_id:032x}", trace_id, True, False
    mapped = to_trace_id(received)
    if mapped is None:
        return received, new_trace_id(), True, False
    if reuse_guard.allows(mapped):
        return received, mapped, False, False
    guard.count("request_id.reused")
    guard.warn_seldom(
        "reuse", "A caller sends one request id again and again; its requests get traces of their own now"
    )
    return received, new_trace_id(), True, True
