"""
What ``opentelemetry-instrument`` loads by entry point: ours, or harmless ones where another package does not fit.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from otel_correlation import upstream

if TYPE_CHECKING:
    from otel_correlation.bootstrap import Configurator, Distro

__all__ = ["Configurator", "Distro", "another_runs"]


def __getattr__(name: str) -> Any:
    if name not in ("Configurator", "Distro"):
        raise AttributeError(name)
    home = upstream.import_ours("otel_correlation.bootstrap")
    return getattr(home, name) if home is not None else _harmless_distro() if name == "Distro" else _Configurator


def _harmless_distro() -> Any:
    from opentelemetry.instrumentation import distro  # noqa: PLC0415 - asked of us by that package

    base: Any = vars(distro)["BaseDistro"]

    class Distro(base):  # type: ignore[misc]
        """
        Loads no instrumentation: what they were made for is not what was found.
        """

        def _configure(self, **_options: Any) -> None:
            _begin()

        def load_instrumentor(self, entry_point: Any, **_options: Any) -> None:
            """
            Leave it out.
            """

    return Distro


class _Configurator:
    """
    Sets nothing of the SDK up.
    """

    def configure(self, **_options: Any) -> None:
        """
        Say why, and go on with request ids.
        """
        _begin()


def _begin() -> None:
    from otel_correlation import harmless  # noqa: PLC0415 - nobody else pays for it

    harmless.begin()


def another_runs() -> None:
    """
    Say that we are off where another distribution came first on the path, with packages that do not fit.

    Called at the end of every automatic instrumentation, whoever's distribution runs.
    """
    chosen = os.environ.get("OTEL_PYTHON_DISTRO", "").strip()
    if "otel_correlation.bootstrap" not in sys.modules and chosen in ("", "otel_correlation") and upstream.trouble():
        _begin()
