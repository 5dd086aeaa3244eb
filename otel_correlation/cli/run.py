"""
``otel-correlation run -- CMD ...``: a service with its traces and logs sent to the local viewer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Final

from otel_correlation.cli import USAGE, CommandError, on_signals
from otel_correlation.cli.launch import environment, find_command, instrumented
from otel_correlation.local import LocalServer
from otel_correlation.local.store import StoreFileError
from otel_correlation.semconv import DISTRO_NAME
from otel_correlation.stores.client import Http, StoreError

if TYPE_CHECKING:
    import argparse
    from types import FrameType

_PROBE_S: Final = 2.0
_FORWARDED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_NOT_FOUND: Final = 127


def run(arguments: argparse.Namespace) -> int:
    """
    Run the command to its end and return its exit status (128 + n if signal n ended it).
    """
    command: list[str] = arguments.argv[1:] if arguments.argv[:1] == ["--"] else arguments.argv
    if not command:
        raise CommandError("no command: otel-correlation run -- uvicorn main:app", USAGE)
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(
                LocalServer(arguments.host, arguments.port, arguments.db, allow_hosts=arguments.allow_host)
            )
            url = server.url
            where = "the viewer, in memory until this ends" if arguments.db == ":memory:" else "the viewer"
        except StoreFileError as error:
            raise CommandError(str(error)) from error
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise CommandError(
                    f"cannot listen on {arguments.host} port {arguments.port}: {error.strerror or error}"
                ) from error
            host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
            url = f"http://{host}:{arguments.port}"
            where = (
                "a viewer that already runs" if _is_viewer(url) else "something else that listens there; a collector?"
            )
        env = environment(os.environ, url)
        if shutil.which(command[0], path=env["PATH"]) is None:
            raise CommandError(f"{command[0]}: command not found", _NOT_FOUND)
        print(f"otel-correlation: traces and logs go to {url} ({where})", file=sys.stderr)
        print(f"otel-correlation: find a request: {find_command(url)}", file=sys.stderr, flush=True)
        return _run(instrumented(command), env)


def _is_viewer(url: str) -> bool:
    try:
        _, answer = Http(url, _PROBE_S).get("/healthz")
    except StoreError:
        return False
    return isinstance(answer, dict) and answer.get("service") == DISTRO_NAME


def _run(argv: list[str], env: dict[str, str]) -> int:
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        if process is None:
            early.append(number)
        elif number != signal.SIGINT or not _terminal_tells_all():
            process.send_signal(number)

    with on_signals(_FORWARDED, forward):
        process = subprocess.Popen(argv, env=env)  # noqa: S603 - the command is the user's own
        for number in early:
            process.send_signal(number)
        status = process.wait()
    return status if status >= 0 else 128 - status


def _terminal_tells_all() -> bool:
    """
    Return whether Ctrl-C reaches the command by itself: sent twice, it would end uvicorn without its graceful stop.
    """
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False
