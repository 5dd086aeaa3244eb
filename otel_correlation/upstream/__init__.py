"""
Other packages: whether those that were found are ones we can work with, and every private name that we read of them.

Which versions belong together is what pip sees to; a folder ahead on ``PYTHONPATH`` (an operator, a base image) comes
past it. See ADR 014. Each module beside this one has the names of one package, with what stands in where one is gone.
"""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import ModuleType

# Distribution, the module that says its version, and the versions that are ours: those of pyproject.toml.
NEEDED: Final = (
    ("opentelemetry-api", "opentelemetry.version", ">=1.45.1,<1.46"),
    ("opentelemetry-sdk", "opentelemetry.sdk.version", ">=1.45.1,<1.46"),
    ("opentelemetry-instrumentation", "opentelemetry.instrumentation.version", ">=0.66b1,<0.67"),
)


class Unknown:
    """
    Stands in for a class that is gone: nobody's object is one of it.
    """


class _State:
    checked = False
    trouble: str | None = None


def trouble() -> str | None:
    """
    Return why we cannot work with the packages that were found, in one line, or None; looks once.

    Three small modules are imported, and no list of installed packages is read.
    """
    if not _State.checked:
        _State.checked = True
        _State.trouble = next(filter(None, (_wrong_version(*needed) for needed in NEEDED)), None)
    return _State.trouble


def import_ours(module: str, *, anywhere: bool = False) -> ModuleType | None:
    """
    Import a module of ours; None where it cannot work with the packages that were found, as ``trouble()`` tells.

    Args:
        module: Its name.
        anywhere: Whether it needs nothing of other packages, so that no version is looked at.
    """
    if not anywhere and trouble() is not None:
        return None
    try:
        return import_module(module)
    except Exception as error:  # noqa: BLE001 - whatever another package raises in the application's own import
        _State.checked, _State.trouble = True, _State.trouble or explain(error)
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"[0-9]{1,9}", version)[:3])


def _wrong_version(package: str, module_name: str, wanted: str) -> str | None:
    try:
        module = import_module(module_name)
        found = str(module.__version__)
    except Exception as error:  # noqa: BLE001 - missing, or somebody's own package of that name
        return f"{package} {wanted} is needed and cannot be imported ({_shown(error)})"
    least, below = wanted.split(",")
    if _numbers(least) <= _numbers(found) < _numbers(below):
        return None
    where = _root(getattr(module, "__file__", None))
    return f"{package} {wanted} is needed, and {found[:40]} comes first, in {where}: take it off PYTHONPATH"


def _root(path: str | None) -> str:
    """
    Return the entry of ``sys.path`` that a module of OpenTelemetry's was found in.
    """
    found = path or "an unknown place"
    return found.rpartition(f"{os.sep}opentelemetry{os.sep}")[0] or found


def _shown(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]


def explain(error: BaseException) -> str:
    """
    Say in one line which package an import of ours failed with, and its version and place as far as they are known.
    """
    name = getattr(error, "name", None) or ""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        package = ".".join(parts[:length])
        if package.startswith("otel_correlation"):
            break
        module = sys.modules.get(package)
        if module is None:
            continue
        found = _version_of(module, package)
        if found:
            where = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
            return f"{package} {found}, in {_root(where)}, is not a version that fits ({_shown(error)})"
    return f"a package that was found is not one that fits ({_shown(error)})"


def _version_of(module: ModuleType, package: str) -> str | None:
    found = getattr(module, "__version__", None)
    if not isinstance(found, str):
        try:
            found = import_module(f"{package}.version").__version__
        except Exception:  # noqa: BLE001 - it does not say
            return None
    return str(found)[:40]
