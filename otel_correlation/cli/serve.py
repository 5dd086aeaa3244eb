"""
``otel-correlation serve``: the embedded collector and viewer, until Ctrl-C.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from otel_correlation.cli import FAILED, OK, CommandError
from otel_correlation.cli.launch import find_command
from otel_correlation.local import LocalServer
from otel_correlation.local.store import StoreFileError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable


def open_server(host: str, port: int, db: str = ":memory:", allow_hosts: Iterable[str] = ()) -> LocalServer:
    """
    Return the server, bound and not yet started.

    Raises:
        CommandError: It cannot listen there, or cannot use the file; one line says why and what to do.
    """
    try:
        return LocalServer(host, port, db, allow_hosts=allow_hosts)
    except StoreFileError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(
            f"cannot listen on {host} port {port} ({error.strerror or error}): name another with --port"
        ) from error


def run(arguments: argparse.Namespace) -> int:
    """
    Serve until interrupted; return 0, or 1 if the server ended by itself.
    """
    with (
        contextlib.suppress(KeyboardInterrupt, SystemExit),
        open_server(arguments.host, arguments.port, arguments.db, arguments.allow_host) as server,
    ):
        if not server.loopback:
            print(
                f"warning: {arguments.host} can be reached from other machines, without a password: "
                "everybody there can read and send telemetry",
                file=sys.stderr,
            )
        kept = "in memory" if arguments.db == ":memory:" else f"in {arguments.db}"
        print(
            f"Viewer and OTLP/HTTP receiver: {server.url} (kept {kept}; Ctrl-C ends it)\n"
            f"Send traces and logs:  OTEL_EXPORTER_OTLP_ENDPOINT={server.url} OTEL_LOGS_EXPORTER=otlp "
            "opentelemetry-instrument uvicorn main:app\n"
            f"Find one request:      {find_command(server.url)}",
            flush=True,
        )
        server.wait()
        return FAILED
    return OK
