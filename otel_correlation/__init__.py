"""
One identity per request: an OpenTelemetry tracing distribution for FastAPI and httpx.

A service started by ``opentelemetry-instrument`` needs nothing from here; one that starts in code calls
``bootstrap()``.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from otel_correlation import _early, upstream

if TYPE_CHECKING:
    # What type checkers see; at run time the names are looked up when they are used, see below.
    from otel_correlation._version import __version__  # noqa: TC004
    from otel_correlation.bootstrap import bootstrap, flush, stats  # noqa: TC004
    from otel_correlation.edge import edge  # noqa: TC004
    from otel_correlation.formats import IdsFilter, IdsFormatter, log_config  # noqa: TC004
    from otel_correlation.guard import ConfigError  # noqa: TC004
    from otel_correlation.identity import bind, detached, request_id, trace_id  # noqa: TC004
    from otel_correlation.tasks import carried, continue_from, inject, work  # noqa: TC004

# Before any module of ours imports one that raises on what the environment says.
_early.load_readers()

__all__ = [
    "ConfigError",
    "IdsFilter",
    "IdsFormatter",
    "__version__",
    "bind",
    "bootstrap",
    "carried",
    "continue_from",
    "detached",
    "edge",
    "flush",
    "inject",
    "log_config",
    "request_id",
    "stats",
    "trace_id",
    "work",
]

_HOMES: Final = {
    "ConfigError": "guard",
    "IdsFilter": "formats",
    "IdsFormatter": "formats",
    "__version__": "_version",
    "bind": "identity",
    "bootstrap": "bootstrap",
    "carried": "tasks",
    "continue_from": "tasks",
    "detached": "identity",
    "edge": "edge",
    "flush": "bootstrap",
    "inject": "tasks",
    "log_config": "formats",
    "request_id": "identity",
    "stats": "bootstrap",
    "trace_id": "identity",
    "work": "tasks",
}


class _Package(ModuleType):
    """
    A package whose public names are looked up when they are used, and win over submodules of the same name.

    Importing the submodule ``otel_correlation.edge`` sets an attribute ``edge`` on the package; without this class,
    ``otel_correlation.edge(app)`` would then call a module.
    """

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


# These need nothing of other packages, or what every release has.
_ANYWHERE: Final = frozenset({"_version", "formats", "guard"})


def _public(name: str) -> property:
    def get(_package: ModuleType) -> Any:
        home = upstream.import_ours(f"{__name__}.{_HOMES[name]}", anywhere=_HOMES[name] in _ANYWHERE)
        if home is None:
            home = importlib.import_module(f"{__name__}.harmless")
            home.say()
        return getattr(home, name)

    def ignore(_package: ModuleType, _value: object) -> None:
        """
        The import system sets the submodule here; the public name stays.
        """

    return property(get, ignore)


for _name in _HOMES:
    setattr(_Package, _name, _public(_name))
sys.modules[__name__].__class__ = _Package
