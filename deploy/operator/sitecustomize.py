"""
Start the distribution in every Python process of a container that the OpenTelemetry Operator has changed.

In the image this stands in the place of ``opentelemetry/instrumentation/auto_instrumentation/sitecustomize.py``, which
the operator's PYTHONPATH names first. Any Python 3 reads it, so it is written for old ones, too.
"""
# ruff: noqa: INP001, UP036

import site
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

if sys.version_info < (3, 11):
    missing = "Python 3.11"
elif find_spec("fastapi") is None:
    missing = "FastAPI"
else:
    missing = ""

if missing:
    # As if PYTHONPATH were not set: an old Python must not meet a syntax that it does not know.
    sys.path[:] = [path for path in sys.path if ROOT not in (Path(path).resolve(), *Path(path).resolve().parents)]
    sys.stderr.write(f"otel-correlation: {sys.executable} runs untraced, for want of {missing}\n")
else:
    # requests, protobuf and the like: last, so that an application that has them keeps its own.
    sys.path.append(str(ROOT / "fallback"))
    # Directories of PYTHONPATH have their .pth files ignored, and ours takes out values that stop the start (ADR 006).
    site.addsitedir(str(ROOT))

    from opentelemetry.instrumentation.auto_instrumentation import initialize

    initialize()
