"""
Lines of ours, where the application configured no logging itself or asked for them by name.

The decision is made late (``settle``) and taken back when the application configures logging after all. Only a handler
on the root logger is such a configuration: it is the one that every line reaches (ADR 015). Nothing of ours stands
there, where it would turn ``basicConfig()`` into a no-op; Python's handler of last resort is replaced instead. Before
the decision, logging behaves as if we were not there.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary, WeakSet

from otel_correlation import guard
from otel_correlation.logs import advice, loops
from otel_correlation.logs.lines import SUMMARY_LOGGER, JsonLines, TextLines, ascii_only
from otel_correlation.logs.record import Patch, seams

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from otel_correlation.settings import Settings


_ACCESS: Final = "uvicorn.access"
# Their own handlers, where they are as they come, give way to ours.
_SERVERS: Final = frozenset({"uvicorn", "granian", "_granian", "arq", "rq"})
# Their INFO (and DEBUG) lines hold whole URLs.
_URL_LOGGERS: Final = ("httpx", "httpcore", "httpx2", "httpcore2")
# The formats that a server sets by itself; a handler with another one was configured by the user.
_STOCK_FORMATS: Final = frozenset(
    {
        "%(levelprefix)s %(message)s",
        '%(levelprefix)s %(client_addr)s - "%(request_line)s" %(status_code)s',
        "%(asctime)s [%(process)d] [%(levelname)s] %(message)s",
        "%(asctime)s: %(message)s",
        "[%(levelname)s] %(message)s",
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


class _Written(int):
    """
    A record's process id that says: this record has its line, in this process. Copies of the record keep it.
    """

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        # Another process gets a number: it has written nothing, and may not have this package.
        return int, (int(self),)


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
        # Whether it was asked for a format by name: its lines are then written whatever other handlers there are.
        self.everything = False
        # Set when the application took over after the decision: what that means is said at the next occasion.
        self.taken_over = False
        # Handlers that Python put on the root logger because somebody called ``logging.warning()``.
        self.unasked: WeakSet[logging.Handler] = WeakSet()
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
        seams.added = _handler_added


def uninstall() -> None:
    """
    Take everything back.
    """
    with _lock:
        _deactivate()
        _restore_level(logging.getLogger(), logging.WARNING)
        for name in (*_URL_LOGGERS, guard.logger.name):
            _restore_level(logging.getLogger(name), logging.NOTSET)
        seams.route = seams.added = None
        _state.settings = None
        _state.settled = _state.taken_over = False
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
        configured = _state.taken_over or _configured()
        asked = settings.log_format in ("json", "text")
        if asked or not configured:
            if settings.log_format != "none":
                _activate(settings, everything=asked)
            if configured:
                _raise_level(guard.logger, logging.NOTSET)
            elif settings.log_format != "none" or seams.export is not None:
                _raise_level(logging.getLogger(), logging.WARNING)
            seams.route = _route
        pending, _state.pending = _state.pending, []
    if configured and settings.log_format == "auto":
        with guard.never_raise("logs.advice"):
            pending += advice.lines()
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
    # Without a line of last resort: how an application says that it wants none.
    return logging.lastResort is None or any(_configures(handler) for handler in logging.root.handlers)


def _configures(handler: logging.Handler) -> bool:
    """
    Return whether a handler on the root logger says that the application configured logging.
    """
    return _shows(handler) and handler not in _state.unasked


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


def _activate(settings: Settings, *, everything: bool) -> None:
    as_text = settings.log_format == "text" or (settings.log_format == "auto" and _is_terminal())
    handler = _Lines()
    handler.setFormatter(
        TextLines(settings.query_values, colours=_wants_colours()) if as_text else JsonLines(settings.query_values)
    )
    _state.handler = handler
    _state.replaced = logging.lastResort
    logging.lastResort = handler
    _state.everything = everything
    if everything:
        _watch_listeners()
    _take_access_over()


def _deactivate() -> None:
    seams.route = None
    handler = _state.handler
    if handler is None:
        return
    _state.handler = None
    _state.everything = False
    if logging.lastResort is handler:
        logging.lastResort = _state.replaced
    handler.close()
    _give_access_back()
    if _listener is not None:
        _listener.remove()


def _raise_level(logger: logging.Logger, unset: int) -> None:
    # ``unset`` is what Python sets; anything else was chosen.
    if type(logger.level) is int and logger.level == unset:
        logger.setLevel(_state.level)


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


def _take_access_over() -> None:
    """
    Put the summary in the place of the server's access line, from the level on that the user wants such lines at.
    """
    access = logging.getLogger(_ACCESS)
    _give_access_back()
    _state.summary_from = access.level
    shown = [handler for handler in _handlers_of(access) if _shows(handler)]
    others = [handler for handler in shown if not _gives_way(access, handler)]
    if not shown:
        gunicorns = logging.getLogger("gunicorn.access").handlers
        if not access.handlers and not access.propagate and access.handlers is not gunicorns:
            _state.summary_from = sys.maxsize  # uvicorn --no-access-log
            return
    elif not _state.everything and (len(others) == len(shown) or any(map(_is_console, others))):
        _state.summary_from = sys.maxsize  # the user's own access log stays
        return
    if not others:
        # Its records are not even made.
        access.disabled = True
        _state.silenced = access


def _give_access_back() -> None:
    if _state.silenced is not None:
        _state.silenced.disabled = False
        _state.silenced = None


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


def _is_console(handler: logging.Handler) -> bool:
    """
    Return whether ``handler`` writes to stdout or stderr, which end in the same log of a container.
    """
    stream: Any = getattr(handler, "stream", None)
    if stream is None:
        stream = getattr(getattr(handler, "console", None), "file", None)  # rich's
    if stream is not None and stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        return True
    if not isinstance(handler, logging.FileHandler):
        return False
    found = _consoles.get(handler)
    if found is None:
        found = _consoles[handler] = _is_standard(handler.baseFilename)
    return found


_consoles: Final[WeakKeyDictionary[logging.Handler, bool]] = WeakKeyDictionary()


def _is_standard(path: str) -> bool:
    """
    Return whether ``path`` is what this process has as stdout or stderr: ``/dev/stdout``, or the file it was sent to.
    """
    for descriptor in (1, 2):
        try:
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):  # noqa: PTH116 - pathlib is imported by nobody else here
                return True
        except OSError:
            continue
    return False


def _gives_way(logger: logging.Logger, handler: logging.Handler) -> bool:
    """
    Return whether ours takes the place of ``handler`` for the records of ``logger``.
    """
    if _state.everything:
        return _is_console(handler)
    return handler in _state.unasked or (logger.name.partition(".")[0] in _SERVERS and _is_stock(handler))


def _before_settled(logger: logging.Logger, record: logging.LogRecord) -> bool:
    # uvicorn says this in the process that serves, once the application is imported; lifespan start-up comes after it.
    if logger.name == "uvicorn.error" and str(record.msg).startswith("Started server process"):
        settle()
        return seams.route is not None and seams.route(logger, record)
    return False


def _route(logger: logging.Logger, record: logging.LogRecord) -> bool:
    root = logging.root
    if root.handlers and not _state.everything and any(map(_configures, root.handlers)):
        _stand_down()
        # It may be here because of our level, not the application's.
        return not logger.isEnabledFor(record.levelno)
    handlers = _handlers_of(logger)
    if not handlers:
        return False  # Logger.callHandlers gives it to the handler of last resort: ours
    ours = _state.handler
    given_way = [] if ours is None else [handler for handler in handlers if _gives_way(logger, handler)]
    if ours is not None and _is_ours(logger, handlers, given_way):
        ours.handle(record)
        if _state.everything and record.process is not None and len(given_way) < len(handlers):
            record.process = _Written(record.process)
    # It would not exist without us, and whoever has a handler of its own did not ask for it.
    unasked = record.levelno < logging.WARNING and type(logger.getEffectiveLevel()) is _Level
    if not given_way and not unasked:
        return False
    for handler in handlers:
        if handler in given_way or record.levelno < handler.level or (unasked and _shows(handler)):
            continue
        handler.handle(record)
    return True


def _is_ours(logger: logging.Logger, handlers: list[logging.Handler], given_way: list[logging.Handler]) -> bool:
    """
    Return whether a record of ``logger``, which has ``handlers``, is a line of ours.
    """
    if logger.name == _ACCESS and _state.summary_from != sys.maxsize:
        return False  # the summary is
    if given_way:
        return True
    if not _state.everything:
        return not any(map(_shows, handlers))  # as a handler on the root logger would show it
    at: logging.Logger | None = logger
    while at is not None and at.propagate:
        at = at.parent
    return at is None or at is logging.root


def _handler_added(logger: logging.Logger, handler: logging.Handler) -> None:
    if logger is not logging.root:
        if _state.handler is not None and logger.name.partition(".")[0] == "uvicorn":
            with _lock:
                _take_access_over()
        return
    if not _shows(handler):
        return
    # This function, the wrapper of addHandler(), basicConfig(), and who called that.
    frame = sys._getframe(2)
    caller = frame.f_back
    if (
        frame.f_code is logging.basicConfig.__code__
        and caller is not None
        and caller.f_globals.get("__name__") == "logging"
    ):
        _state.unasked.add(handler)
    elif _state.everything:
        # The application has a level now, its own or Python's; the summary and our start-up line are seen all the same.
        _restore_level(logging.getLogger(), logging.WARNING)
        _raise_level(guard.logger, logging.NOTSET)
    elif _state.settled:
        _stand_down()


_listener: Patch | None = None


def _watch_listeners() -> None:
    """
    Keep the listener of a ``QueueHandler`` from printing on the console what has its line already.
    """
    global _listener  # noqa: PLW0603 - made where somebody asked for a format by name
    from logging.handlers import QueueListener  # noqa: PLC0415 - see above

    if _listener is None:
        _listener = Patch(QueueListener, "handle")
        _listener.ours = _our_listener_handle
    _listener.place()


def _our_listener_handle(self: Any, record: logging.LogRecord) -> None:
    if type(record.process) is not _Written or not _state.everything:
        if _listener is not None:
            _listener.original(self, record)
        return
    record = self.prepare(record)
    for handler in self.handlers:
        if not _is_console(handler) and (not self.respect_handler_level or record.levelno >= handler.level):
            handler.handle(record)


def _stand_down() -> None:
    """
    The application configured logging after all: leave everything to it.
    """
    with _lock:
        if seams.route is None:
            return
        _deactivate()
        _restore_level(logging.getLogger(), logging.WARNING)
        guard.logger.disabled = False
        # The next request says what that means; here, the application is in the middle of it.
        _state.taken_over, _state.settled = True, False
