"""
Whose lines go out without ids, and what to do about it.

A record has its ids whatever logging set-up there is; a line shows them where its format names them. A server's own
format does not, and where the application configured logging, the server's own handlers stay.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Any, Final

from otel_correlation.formats import FIELDS, HOW, HOW_SERVER
from otel_correlation.logs.record import CONTRIB_FIELDS, CORRELATION_ID

# The loggers of each server that write about requests, and whether it takes our ``--log-config``.
_SERVERS: Final = {
    "uvicorn": (("uvicorn.error", "uvicorn.access"), True),
    "granian": (("_granian", "granian.access"), True),
    "hypercorn": (("hypercorn.error", "hypercorn.access"), False),
}
_UVICORN_ACCESS: Final = "uvicorn.access"
# No format has it by itself.
_PROBE: Final = "0ddba11c0ffee0ddba11c0ffee0ddba1"


def lines() -> list[str]:
    """
    Return one line for each server whose lines have no ids.
    """
    found = []
    for server, (names, has_log_config) in _SERVERS.items():
        if any(map(_is_without_ids, names)):
            # Its worker gives uvicorn's loggers gunicorn's handlers, whatever a file says of them.
            how = f"{HOW}, or {HOW_SERVER}" if has_log_config and "gunicorn" not in sys.modules else HOW
            found.append(f"{server}'s lines go out without ids, because their format names none: {how}")
    return found


def _is_without_ids(name: str) -> bool:
    """
    Return whether a stream or a file gets lines of this logger, and they show no id.
    """
    logger = logging.Logger.manager.loggerDict.get(name)
    at: logging.Logger | None = None
    # Without a level and a handler of its own its server does not run, or was told to leave logging alone.
    if isinstance(logger, logging.Logger) and not logger.disabled and (logger.level or logger.handlers):
        at = logger
    while at is not None:
        # What another kind of handler writes is not known from its format.
        if any(isinstance(handler, logging.StreamHandler) and not _names_ids(handler, name) for handler in at.handlers):
            return True
        at = at.parent if at.propagate else None
    return False


def _names_ids(handler: logging.Handler, name: str) -> bool:
    """
    Return whether ``handler`` shows an id of a record, or whether that cannot be told.
    """
    arguments = ("127.0.0.1:1", "GET", "/", "1.1", 200) if name == _UVICORN_ACCESS else ()
    message = '%s - "%s %s HTTP/%s" %d' if arguments else ""
    record = logging.LogRecord(name, logging.INFO, "", 0, message, arguments, None)
    record.__dict__.update(dict.fromkeys((*FIELDS, *CONTRIB_FIELDS, CORRELATION_ID), _PROBE))
    with contextlib.suppress(Exception):  # a filter or formatter of the application's
        kept: Any = handler.filter(record)
        return not kept or _PROBE in str(handler.format(kept if isinstance(kept, logging.LogRecord) else record))
    return True
