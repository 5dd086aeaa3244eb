"""
Start the distribution in every Python process of a container that the OpenTelemetry Operator has changed.

In the image this stands in the place of ``opentelemetry/instrumentation/auto_instrumentation/sitecustomize.py``, which the
operator's PYTHONPATH names first. Any Python reads it, so it is written for old ones, too.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

if sys.version_info >= (3, 11):
    import site

    # requests, protobuf and the like: last, so that an application that has them keeps its own.
    sys.path.append(os.path.join(ROOT, "fallback"))
    # Directories of PYTHONPATH have their .pth files ignored, and ours takes out values that stop the start (ADR 006).
    site.addsitedir(ROOT)

    from opentelemetry.instrumentation.auto_instrumentation import initialize

    initialize()
else:
    # As if PYTHONPATH were not set: an older Python must not import a syntax that it does not know.
    sys.path[:] = [path for path in sys.path if not (path + os.sep).startswith(ROOT + os.sep)]
    sys.stderr.write("otel-correlation needs Python 3.11 or newer; this is %s, which runs untraced\n" % sys.version.split()[0])
