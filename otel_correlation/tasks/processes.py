"""
Calls that another process makes for a request.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

from opentelemetry import context as otel_context
from opentelemetry.context import Context
from wrapt import register_post_import_hook

from otel_correlation import guard, identity, logs, propagators
from otel_correlation.settings import Settings
from otel_correlation.tasks.threads import serves_all

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Between processes of one service everything goes along, whatever OTEL_PROPAGATORS says of the wire.
_textmap: Final = propagators.build(Settings())
_PLAIN: Final = (str, bool, int, float)

# Sets a process up as this one was; a function that pickle finds by its name.
_start: Callable[[Settings], None] | None = None
_settings: Callable[[], Settings] | None = None
_hooked = False


def switch(settings: Callable[[], Settings] | None, start: Callable[[Settings], None] | None = None) -> None:
    """
    Say how a process is set up that was started without ``opentelemetry-instrument``; with None nothing is carried.
    """
    global _hooked, _settings, _start  # noqa: PLW0603 - one process, one set-up
    _settings, _start = settings, start
    if settings is not None and not _hooked:
        _hooked = True
        register_post_import_hook(_on_multiprocessing, "multiprocessing.util")


def _on_multiprocessing(module: ModuleType) -> None:
    module.register_after_fork(_forget, _forget)


def _forget(_key: object) -> None:
    """
    Leave the request behind in which a pool forked this worker: it works for all of them.
    """
    with guard.never_raise("tasks.fork"):
        process: Any = sys.modules["multiprocessing.process"].current_process()
        if _settings is not None and serves_all(process):
            otel_context.attach(Context())


class _Call:
    """
    A call with the identity of the request that asked for it, in whatever process.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        start: Callable[[Settings], None] | None,
        settings: Settings,
        carrier: dict[str, str],
        fields: dict[str, Any],
    ) -> None:
        # In this order pickle restores them: a module of the application's may call bootstrap() itself.
        self._function = function
        self._start = start
        self._settings = settings
        self._carrier = carrier
        self._fields = fields
        functools.update_wrapper(self, function, updated=())

    def __getstate__(self) -> dict[str, Any]:
        # Not what update_wrapper copied: it is the function's own, and only for those who look at this object.
        return {name: value for name, value in vars(self).items() if name.startswith("_") and name[1] != "_"}

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        token = None
        try:
            if self._start is not None:
                self._start(self._settings)
            logs.settle()
            if self._carrier:
                context = _textmap.extract(self._carrier, Context())
                if self._fields and (found := identity.get_from(context)) is not None:
                    found.fields = dict(self._fields)
                token = otel_context.attach(context)
        except Exception:  # noqa: BLE001 - our failure is not the application's
            guard.report("tasks.process")
        try:
            return self._function(*args, **kwargs)
        except BaseException as error:
            if token is not None:
                identity.stash(error)
            raise
        finally:
            if token is not None:
                if (who := identity.current()) is not None:
                    who.ended = True
                identity.detach(token)


def carried(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """
    Return a function that runs with the current identity in whatever process it is called.

    For ``ProcessPoolExecutor``, ``multiprocessing.Process`` and ``Pool``, with ``fork``, ``forkserver`` and ``spawn``.
    A process that knows nothing of this package is set up as this one, and sends its spans before it ends.

    Args:
        function: What to call; pickle must be able to find it, as without this.
    """
    if _settings is None:
        return function
    try:
        carrier: dict[str, str] = {}
        textmap: Any = _textmap
        textmap.inject(carrier)
        found = identity.current()
        fields = {} if found is None else {key: value for key, value in found.fields.items() if type(value) in _PLAIN}
        return _Call(function, _start, _settings(), carrier, fields)
    except Exception:  # noqa: BLE001 - our failure is not the application's
        guard.report("tasks.carried")
        return function


__all__ = ["carried", "switch"]
