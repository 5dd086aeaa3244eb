"""
A fork waits until no thread that exports is at a point that a child could not leave.

A child has one thread. What another thread was in the middle of stays half done there for ever: a module that it
imports can then never be imported, and a call into gRPC's core ends the child by SIGSEGV. Our own threads import
nothing (``transport.py``); an exporter of somebody else may.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Final

from otel_correlation import guard
from otel_correlation.clocks import monotonic

if TYPE_CHECKING:
    from types import FrameType

# Longer than any import, and than an answer of a collector that works. Then the process forks, as it would without us.
_LONGEST_IMPORT_S: Final = 10.0
_LONGEST_CALL_S: Final = 2.0
# How the threads of this package and of the SDK are called.
_OURS: Final = ("otel-correlation-", "Otel")
_IMPORTING: Final = "<frozen importlib._bootstrap>"


class Crossing:
    """
    Many threads may be inside at once, but none while the process forks.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._is_forking = False

    def __enter__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_forking)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def close(self, timeout_s: float) -> None:
        """
        Let nobody in, and wait until nobody is inside, but no longer than so many seconds.
        """
        with self._changed:
            self._is_forking = True
            self._changed.wait_for(lambda: not self._inside, timeout_s)

    def open(self) -> None:
        """
        Let everybody in, in the process that forked.
        """
        with self._changed:
            self._is_forking = False
            self._changed.notify_all()

    def forget(self) -> None:
        """
        Let everybody in, in the child: whoever was inside is not there.
        """
        self._reset()


# Calls into gRPC's core. It has handlers of its own for a fork, and skips them while a thread is in a call.
in_grpc: Final = Crossing()


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            return True
        frame = frame.f_back
    return False


def _wait_for_imports() -> None:
    """
    Wait until no other thread that exports is in an import.
    """
    deadline = monotonic() + _LONGEST_IMPORT_S
    here = threading.get_ident()
    pause = threading.Event()  # Waits on a lock, which no test of the application holds.
    while monotonic() < deadline:
        ours = [thread.ident for thread in threading.enumerate() if thread.name.startswith(_OURS)]
        if not any(ident != here for ident in ours):
            return
        frames = sys._current_frames()
        if not any(_is_importing(frames.get(ident or 0)) for ident in ours if ident != here):
            return
        pause.wait(0.001)


def _before() -> None:
    with guard.never_raise("export.fork"):
        in_grpc.close(_LONGEST_CALL_S)
        _wait_for_imports()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=in_grpc.open, after_in_child=in_grpc.forget)
