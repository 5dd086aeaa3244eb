"""
Readers of metrics are made by the process that has metrics of its own, not by the parent that only starts workers.

A pull exporter takes a port when it is made. Made while a process is set up, the parent of ``uvicorn --workers`` or
``--reload`` and gunicorn's master would have it, and their workers would not.
"""

from __future__ import annotations

import functools
import os
import threading
from typing import TYPE_CHECKING, Any, Final

from wrapt import register_post_import_hook

from otel_correlation import guard

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

# Whoever has neither begun to serve nor to supervise by then is a script or a worker of a queue.
_PATIENCE_S: Final = 5.0
# Classes whose objects start workers and serve nothing themselves, by module.
_SUPERVISORS: Final = (
    ("uvicorn.supervisors.basereload", "BaseReload"),
    ("uvicorn.supervisors.multiprocess", "Multiprocess"),
    ("gunicorn.arbiter", "Arbiter"),
)

_supervising = False
_hooked = False


def _watch_supervisors() -> None:
    global _hooked  # noqa: PLW0603 - the hooks stay for the life of the process
    if _hooked:
        return
    _hooked = True
    for module, name in _SUPERVISORS:
        register_post_import_hook(functools.partial(_on_supervisor, name), module)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork)


def _on_supervisor(name: str, module: ModuleType) -> None:
    kind = getattr(module, name, None)
    if kind is None:
        return
    original = kind.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807 - it stands in its place
        global _supervising  # noqa: PLW0603 - of the process
        _supervising = True
        return original(self, *args, **kwargs)

    kind.__init__ = __init__


def _after_fork() -> None:
    global _supervising  # noqa: PLW0603 - a forked worker starts no workers
    _supervising = False


class Readers:
    """
    Makes the readers of a provider once: when the process serves, measures or flushes, or is five seconds old.

    In a process that supervises workers only serving counts.

    Args:
        provider: A provider of the SDK without readers.
        make: Makes them; may raise what their constructors raise.
        failed: Gets what was raised, once.
    """

    def __init__(self, provider: Any, make: Callable[[], list[Any]], failed: Callable[[Exception], None]) -> None:
        self._provider = provider
        self._make = make
        self._failed = failed
        self._starting = threading.Lock()
        self._is_started = False
        _watch_supervisors()
        self._consumer: Any = getattr(provider, "_measurement_consumer", None)
        if not hasattr(provider, "add_metric_reader") or not hasattr(self._consumer, "consume_measurement"):
            self.start()  # another SDK than we know
            return
        # In the way of measurements until the first that counts; then the class's own is found again.
        vars(self._consumer)["consume_measurement"] = self._measured
        waiting = threading.Thread(target=self._wait, name="otel-correlation-readers", daemon=True)
        waiting.start()

    def start(self) -> None:
        """
        Make the readers, unless that was done or is under way.
        """
        if self._is_started or not self._starting.acquire(blocking=False):
            return
        try:
            self._is_started = True
            for reader in self._make():
                self._provider.add_metric_reader(reader)
                # What flushes and forks asks here, and adding alone does not put it there.
                self._provider._metric_readers = (*self._provider._metric_readers, reader)
        except Exception as error:  # noqa: BLE001 - a third party's constructor
            self._failed(error)
        finally:
            getattr(self._consumer, "__dict__", {}).pop("consume_measurement", None)
            self._starting.release()

    def start_unless_supervising(self) -> None:
        """
        Make the readers in a process that starts no workers.
        """
        if not _supervising:
            self.start()

    def _measured(self, measurement: Any) -> None:
        with guard.never_raise("metrics"):
            self.start_unless_supervising()
        type(self._consumer).consume_measurement(self._consumer, measurement)

    def _wait(self) -> None:
        # Nobody else can begin to wait for it.
        threading.Event().wait(_PATIENCE_S)
        with guard.never_raise("metrics"):
            self.start_unless_supervising()
