"""
The command ``otel-correlation``: demo, run, serve, find, log-config, doctor.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import os
import signal
import sys
from typing import TYPE_CHECKING, Final, NoReturn

from otel_correlation._version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence
    from types import FrameType
    from typing import TypeAlias

    _Handler: TypeAlias = Callable[[int, FrameType | None], object] | signal.Handlers

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
LOCAL_MODULES: Final = ("uvicorn", "rich", "httpx")


class CommandError(Exception):
    """
    A failure that one line explains; ``status`` is the exit status.
    """

    def __init__(self, message: str, status: int = USAGE) -> None:
        super().__init__(message)
        self.status = status


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one subcommand and return its exit status: 0 done, 1 done with a bad result, 2 could not be done.
    """
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows its escape; output never fails for it.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Cleaning up is done by ``finally`` and ``with``: an ending by signal has to pass through them.
    with on_signals((signal.SIGTERM, signal.SIGHUP), _terminated):
        try:
            _need_extra(arguments.command)
            # Imported when asked for: doctor must work where the extra is missing.
            command = importlib.import_module(f"otel_correlation.cli.{arguments.command.replace('-', '_')}")
            status: int = command.run(arguments)
        except CommandError as error:
            print(f"otel-correlation: {error}", file=sys.stderr)
            return error.status
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except BrokenPipeError:
            # The reader (head, less) has seen enough; nothing more may be written, not even at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return OK
        return status


@contextlib.contextmanager
def on_signals(numbers: Iterable[signal.Signals], handler: _Handler) -> Generator[None]:
    """
    Let ``handler`` take the signals meanwhile. One that was ignored from the start stays so: that is how nohup works.
    """
    before = {
        number: signal.signal(number, handler) for number in numbers if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def _terminated(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _need_extra(command: str) -> None:
    if command in ("doctor", "log-config"):
        return
    missing = [name for name in LOCAL_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(
            f"{command} needs {' and '.join(missing)}: python -m pip install 'otel-correlation[local]'",
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="otel-correlation",
        description="One identity per request, from the id that a customer quotes to the line that failed.",
    )
    parser.add_argument("--version", action="version", version=f"otel-correlation {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="three services, real requests, and the one that fails as `find` shows it")
    demo.add_argument(
        "--port",
        type=_port,
        default=0,
        help="port of the viewer; the services take the next three (default: free ones)",
    )
    demo.add_argument("--keep", action="store_true", help="stay up until Ctrl-C, to look at the page")

    run = commands.add_parser("run", help="start a service with its traces and logs sent to the local viewer")
    _add_server_arguments(run)
    run.add_argument(
        "argv", nargs=argparse.REMAINDER, metavar="-- CMD ...", help="the command, as `-- uvicorn main:app`"
    )

    serve = commands.add_parser("serve", help="the local collector and viewer")
    _add_server_arguments(serve)

    find = commands.add_parser("find", help="the whole story of a request id or trace id")
    find.add_argument("id", metavar="ID", help="X-Request-ID or trace id")
    find.add_argument("--json", action="store_true", help="print JSON for machines")

    log_config = commands.add_parser("log-config", help="a file for your server's --log-config: lines with ids")
    log_config.add_argument(
        "lines",
        nargs="?",
        default="json",
        help="json (default), text, or a format such as '%%(request_id)s %%(message)s'",
    )
    log_config.add_argument("--level", default="INFO", help="the least level that is shown (default: %(default)s)")

    commands.add_parser("doctor", help="what is installed, configured and reachable")
    return parser


def _add_server_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=4318, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a host name under which it answers, beside localhost, the name in --host and every address; repeatable",
    )
    parser.add_argument(
        "--db",
        default=":memory:",
        metavar="FILE",
        help="SQLite file (mode 0600) that keeps what was received (default: memory)",
    )


def _port(text: str) -> int:
    if text.isdecimal() and int(text) < 2**16:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a port (0 to 65535)")
