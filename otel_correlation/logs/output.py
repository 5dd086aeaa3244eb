"""
Lines of ours, only where the application configured no logging itself.

The decision is made late (``settle``) and taken back when the application configures logging after all. Nothing of ours
stands on the root logger, where it would turn ``basicConfig()`` into a no-op; Python's handler of last resort is
replaced instead. Before the decision, logging behaves as if we were not there.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from otel_correlation import guard
from otel_correlation.logs import loops
from otel_correlation.logs.lines import SUMMARY_LOGGER, JsonLines, TextLines, ascii_only
from otel_correlation.logs.record import seams

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from otel_correlation.settings import Settings


_ACCESS: Final = "uvicorn.access"
# Their own handlers, where they are as they come, give way to ours.
_SERVERS: Final = ("uvicorn", "arq", "rq")
# Top-level loggers whose handlers say nothing about the application: servers configure their own, SQLAlchemy adds one
# for ``echo=True``, redis ("push_response") for every pub/sub, and OpenTelemetry's logging instrumentation has one for
# its own troubles.
_NOT_THE_APPLICATION: Final = frozenset(
    {
        *("uvicorn", "gunicorn", "hypercorn", "granian", "_granian", "daphne", "fastapi_cli", "arq", "rq"),
        *("sqlalchemy", "push_response", "opentelemetry"),
    }
)
# Their INFO (and DEBUG) lines hold whole URLs.
_URL_LOGGERS: Final = ("httpx", "httpcore", "httpx2", "httpcore2")
# The formats that a server sets by itself; a handler with another one was configured by the user.
_STOCK_FORMATS: Final = frozenset(
    {
        "%(levelprefix)s %(message)s",
        '%(levelprefix)s %(client_addr)s - "%(request_line)s" %(status_code)s',
        "%(asctime)s [%(process)d] [%(levelname)s] %(message)s",
        "%(asctime)s: %(message)s",
        "%(asctime)s %(message)s",
        "%(message)s",
    }
)
_STOCK_FORMATTERS: Final = frozenset({"uvicorn.logging", "logging"})
_FASTAPI_CLI: Final = "fastapi_cli."

_request_logger: Final = logging.getLogger(SUMMARY_LOGGER)


class _Level(int):
    """
    A level that we set: ``logger.level`` is this very object until the application sets one.
    """


class _Lines(logging.Handler):
    """
    Writes one record as one ``write`` to what ``sys.stdout`` is at that time; a lost line is counted, never raised.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record) + "\n"
            stream = sys.stdout
            if stream is None:
                return
            try:
                stream.write(text)
            except UnicodeEncodeError:  # a stdout that is not UTF-8
                stream.write(ascii_only(text))
            stream.flush()
        except Exception:  # noqa: BLE001 - a closed pipe must not fail a request
            guard.count("log_line_lost")


class _State:
    """
    What was decided in this process.
    """

    def __init__(self) -> None:
        self.settings: Settings | None = None
        self.settled = False
        self.pending: list[str] = []
        self.level = _Level(logging.INFO)
        # Set while our output is active:
        self.handler: _Lines | None = None
        self.replaced: Any = None
        self.silenced: logging.Logger | None = None
        self.summary_from = 0


_state: Final = _State()

# The lock of logging itself: dictConfig() holds it when it calls us, and making a handler takes it, so one of our own
# could be taken in two orders. logging renews it after a fork.
_lock: Final[AbstractContextManager[Any]] = logging._lock  # type: ignore[attr-defined]


def install(settings: Settings) -> None:
    """
    Begin to watch; nothing is written before ``settle``. A second call changes only the settings.
    """
    level = _Level(logging.getLevelNamesMapping()[settings.log_level.upper()])
    with _lock:
        first = _state.settings is None
        _state.settings = settings
        _state.level = level
        if not first:
            return
        for name in _URL_LOGGERS:
            logger = logging.getLogger(name)
            if logger.level == logging.NOTSET:
                logger.setLevel(_Level(logging.WARNING))
        seams.route = _before_settled


def uninstall() -> None:
    """
    Take everything back.
    """
    with _lock:
        _deactivate()
        _restore_level(logging.getLogger(), logging.WARNING)
        for name in _URL_LOGGERS:
            _restore_level(logging.getLogger(name), logging.NOTSET)
        seams.route = seams.reconsider = None
        _state.settings = None
        _state.settled = False
        _state.pending.clear()


def settle() -> None:
    """
    Decide whether the application configured logging; call it at lifespan start-up and with every request.

    Free once decided. The application's configuration wins later, too.
    """
    if _state.settled:
        return
    with _lock:
        settings = _state.settings
        if _state.settled or settings is None:
            return
        _state.settled = True
        seams.route = None
        loops.watch()  # a server has imported uvloop by now, if it uses it
        # dictConfig() and fileConfig() disable every logger that exists; problems must be visible all the same.
        guard.logger.disabled = _request_logger.disabled = False
        if not _configured():
            if settings.log_format != "none":
                _activate(settings)
            if settings.log_format != "none" or seams.export is not None:
                _raise_level()
            seams.route = _route
            seams.reconsider = _reconsider
        pending, _state.pending = _state.pending, []
    for text in pending:
        guard.logger.info("%s", text)


def startup_line(text: str) -> None:
    """
    Say ``text`` once, at INFO, as soon as it is decided where lines go.
    """
    with _lock:
        if not _state.settled:
            _state.pending.append(text)
            return
    guard.logger.info("%s", text)


def summary(
    method: str,
    route: str | None,
    path: str,
    status: int,
    duration_ms: float,
    *,
    level: int | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """
    Write the one line of a request, in place of the server's access line, while our output is active; else nothing.

    Args:
        method: The request's method.
        route: The route's template, or None where no route was found.
        path: The path without its query, shown where there is no route.
        status: The response's status.
        duration_ms: Milliseconds from the request's start to the last byte of the response.
        level: ERROR for a 5xx status and INFO for all others, unless given.
        extra: More fields of the line.
    """
    if _state.handler is None:
        return
    if level is None:
        level = logging.ERROR if status >= 500 else logging.INFO
    if level < _state.summary_from or not _request_logger.isEnabledFor(level):
        return
    fields: dict[str, Any] = {"method": method}
    if route is not None:
        fields["route"] = route
    fields["status"] = status
    fields["duration_ms"] = round(duration_ms, 3)
    if extra:
        fields.update(extra)
    args = (method, path if route is None else route, status, duration_ms)
    # Not through Logger.info: the place in the code would be ours and says nothing.
    record = logging.LogRecord(_request_logger.name, level, "", 0, "%s %s %d %.1f ms", args, None)
    record.__dict__.update(fields)
    _request_logger.handle(record)


def active() -> bool:
    """
    Return whether lines of ours are written.
    """
    return _state.handler is not None


def _configured() -> bool:
    """
    Return whether the application configured logging itself.
    """
    if logging.lastResort is None:  # how an application says that it wants no line of last resort
        return True
    loggers = [logging.root, *logging.Logger.manager.loggerDict.values()]
    return any(
        isinstance(logger, logging.Logger) and any(_counts(logger, handler) for handler in logger.handlers)
        for logger in loggers
    )


def _counts(logger: logging.Logger, handler: logging.Handler) -> bool:
    return _shows(handler) and logger.name.partition(".")[0] not in _NOT_THE_APPLICATION


def _shows(handler: logging.Handler) -> bool:
    """
    Return whether ``handler`` makes lines; a library's ``NullHandler`` and OpenTelemetry's own handler do not.
    """
    return not isinstance(handler, logging.NullHandler) and not type(handler).__module__.startswith("opentelemetry.")


def _handlers_of(logger: logging.Logger) -> list[logging.Handler]:
    """
    Return every handler that a record of ``logger`` is given to.
    """
    found: list[logging.Handler] = []
    at: logging.Logger | None = logger
    while at is not None:
        found += at.handlers
        at = at.parent if at.propagate else None
    return found


def _activate(settings: Settings) -> None:
    as_text = settings.log_format == "text" or (settings.log_format == "auto" and _is_terminal())
    handler = _Lines()
    handler.setFormatter(
        TextLines(settings.query_values, colours=_wants_colours()) if as_text else JsonLines(settings.query_values)
    )
    _state.handler = handler
    _state.replaced = logging.lastResort
    logging.lastResort = handler
    access = logging.getLogger(_ACCESS)
    _state.summary_from = _summary_from(access)
    if _is_taken_over(access):
        # Its records are not even made: the summary line replaces them.
        access.disabled = True
        _state.silenced = access


def _deactivate() -> None:
    seams.route = seams.reconsider = None
    handler = _state.handler
    if handler is None:
        return
    _state.handler = None
    if logging.lastResort is handler:
        logging.lastResort = _state.replaced
    handler.close()
    if _state.silenced is not None:
        _state.silenced.disabled = False
        _state.silenced = None


def _raise_level() -> None:
    root = logging.getLogger()
    # WARNING is what Python sets; anything else was chosen.
    if type(root.level) is int and root.level == logging.WARNING:
        root.setLevel(_state.level)


def _restore_level(logger: logging.Logger, level: int) -> None:
    if isinstance(logger.level, _Level):
        logger.setLevel(level)


def _is_terminal() -> bool:
    try:
        return sys.stdout is not None and sys.stdout.isatty()
    except ValueError:  # closed
        return False


def _wants_colours() -> bool:
    # https://no-color.org
    return _is_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _summary_from(access: logging.Logger) -> int:
    """
    Return the level from which the summary line is wanted: what the user told the server about its access lines.
    """
    gunicorns = logging.getLogger("gunicorn.access").handlers
    if not access.handlers and not access.propagate and access.handlers is not gunicorns:
        return sys.maxsize  # uvicorn --no-access-log
    if access.handlers and not _is_taken_over(access):
        return sys.maxsize  # the user's own access log stays
    return access.level


def _is_stock(handler: logging.Handler) -> bool:
    if type(handler) is not logging.StreamHandler and type(handler).__module__ != "rq.logutils":
        return False
    stream: Any = getattr(handler, "stream", None)
    if stream not in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        return False
    formatter = handler.formatter
    if formatter is None:
        return True
    module = type(formatter).__module__
    return (module in _STOCK_FORMATTERS and formatter._fmt in _STOCK_FORMATS) or module.startswith(_FASTAPI_CLI)


def _is_taken_over(logger: logging.Logger) -> bool:
    """
    Return whether every handler that shows lines of ``logger`` is one that the server set by itself, on the console.
    """
    shown = [handler for handler in _handlers_of(logger) if _shows(handler)]
    return bool(shown) and all(_is_stock(handler) for handler in shown)


def _before_settled(logger: logging.Logger, record: logging.LogRecord) -> bool:
    # uvicorn says this in the process that serves, once the application is imported; lifespan start-up comes after it.
    if logger.name == "uvicorn.error" and str(record.msg).startswith("Started server process"):
        settle()
        return seams.route is not None and seams.route(logger, record)
    return False


def _route(logger: logging.Logger, record: logging.LogRecord) -> bool:
    root = logging.root
    if root.handlers and any(_shows(handler) for handler in root.handlers):
        _stand_down()
        # It may be here because of our level, not the application's.
        return not logger.isEnabledFor(record.levelno)
    ours = _state.handler
    if ours is None:
        return False
    handlers = _handlers_of(logger)
    if not handlers:
        return False  # Logger.callHandlers gives it to the handler of last resort: ours
    shown = [handler for handler in handlers if _shows(handler)]
    if not shown:
        ours.handle(record)  # as a handler on the root logger would
        return False
    if not logger.name.startswith(_SERVERS) or not all(_is_stock(handler) for handler in shown):
        return False
    ours.handle(record)
    for handler in handlers:
        if handler not in shown and record.levelno >= handler.level:
            handler.handle(record)
    return True


def _reconsider(logger: logging.Logger, handler: logging.Handler) -> None:
    if _counts(logger, handler):
        _stand_down()


def _stand_down() -> None:
    """
    The application configured logging after all: leave everything to it.
    """
    with _lock:
        _deactivate()
        _restore_level(logging.getLogger(), logging.WARNING)
        guard.logger.disabled = False
