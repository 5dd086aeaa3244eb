"""
How all three services are served.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, ClassVar

from uvicorn_worker import UvicornWorker

if TYPE_CHECKING:
    from types import FrameType


class Worker(UvicornWorker):
    # Beyond this many connections uvicorn itself answers 503, before any line of the application runs.
    CONFIG_KWARGS: ClassVar = {**UvicornWorker.CONFIG_KWARGS, "limit_concurrency": 50}


class WorkerTimeout(SystemExit):
    """
    The worker's event loop stood still for longer than ``--timeout``.
    """


def post_worker_init(_worker: object) -> None:
    """
    Let a worker that is killed by ``--timeout`` say which request blocked it, and where.

    gunicorn sends SIGABRT, and a second later SIGKILL to those that stay. Under uvicorn's worker the first kills as
    well, without a word. Raised where the loop is blocked, the exception is this request's: a 500, a span and a line
    with the place. The worker then ends as on any SIGTERM: it finishes its other requests and sends its telemetry.
    """

    def abort(_number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGTERM)
        place = frame and f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        raise WorkerTimeout(f"{place} blocked the event loop for longer than gunicorn's --timeout")

    signal.signal(signal.SIGABRT, abort)


bind = f"127.0.0.1:{os.environ['PORT']}"
worker_class = Worker
workers = int(os.environ.get("WORKERS", "2"))
timeout = 8
control_socket_disable = True
