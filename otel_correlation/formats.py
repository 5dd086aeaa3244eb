"""
Formats that name the fields of a request, in any process: the service, its tests, its migrations, its scripts.

Only ``logging`` is imported here. Nothing has to be set up: a record that nobody has put the fields on shows empty
ones, where a plain ``logging.Formatter`` fails with ``KeyError: 'request_id'`` and the line is lost.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, Literal

from otel_correlation import semconv, upstream
from otel_correlation.guard import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

FIELDS: Final = (semconv.TRACE_ID, semconv.SPAN_ID, semconv.TRACE_FLAGS, semconv.REQUEST_ID, semconv.SERVICE_NAME)

# What to do where a server's lines go out without ids; the second for servers that take a --log-config in JSON.
HOW: Final = f"set {semconv.OTEL_CORRELATION_LOG_FORMAT}=json"
HOW_SERVER: Final = "start it with --log-config and the file that `otel-correlation log-config json` prints"

_LINES: Final = {"json": "otel_correlation.formats.json_lines", "text": "otel_correlation.formats.text_lines"}
# Where another package does not fit, so that none of our own lines can be made.
_PLAIN: Final = "%(asctime)s %(levelname)s %(name)s %(message)s request_id=%(request_id)s"
# They have handlers of their own, or do not propagate, as their servers come.
_SERVER_LOGGERS: Final = ("uvicorn", "uvicorn.error", "uvicorn.access", "_granian", "granian.access")


class IdsFormatter(logging.Formatter):
    """
    A ``logging.Formatter`` whose format may name the five fields in every process; where there is none, it is empty.

    Args:
        fmt: The format, as for ``logging.Formatter``.
        datefmt: The format of ``asctime``.
        style: ``%``, ``{`` or ``$``.
        validate: Whether a format that does not fit its style raises ValueError.
        defaults: What other names show on records that do not have them.
    """

    def __init__(
        self,
        fmt: str | None = None,
        datefmt: str | None = None,
        style: Literal["%", "{", "$"] = "%",
        validate: bool = True,  # noqa: FBT001, FBT002 - the arguments of logging.Formatter
        *,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(fmt, datefmt, style, validate, defaults={**dict.fromkeys(FIELDS, ""), **(defaults or {})})


class IdsFilter(logging.Filter):
    """
    Puts empty fields on a record that has none, for a formatter of another package; lets every record through.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """
        Complete ``record``; a field that is there stays.
        """
        for name in FIELDS:
            record.__dict__.setdefault(name, "")
        return True


def json_lines() -> logging.Formatter:
    """
    Return what writes our JSON lines; plain ones where another package does not fit, so that the service still serves.
    """
    return _lines("JsonLines")


def text_lines() -> logging.Formatter:
    """
    Return what writes our readable lines; plain ones where another package does not fit.
    """
    return _lines("TextLines")


def _lines(name: str) -> logging.Formatter:
    home = upstream.import_ours("otel_correlation.logs")
    return IdsFormatter(_PLAIN) if home is None else getattr(home, name)()


def log_config(lines: str = "json", level: str = "INFO") -> dict[str, Any]:
    """
    Return a configuration for ``dictConfig``, or a server's ``log_config``, by which each line shows its ids.

    The server's lines and the application's go to stdout, in one format. ``otel-correlation log-config`` prints the
    same as a file for ``--log-config``.

    Args:
        lines: ``json``, ``text``, or a format of your own in the ``%`` style.
        level: The level of the root logger and of the server's.

    Raises:
        ConfigError: ``lines`` is neither a known name nor a format, or ``level`` is no level.
    """
    if lines not in _LINES and "%(" not in lines:
        raise ConfigError(f"log_config: {lines!r} is not usable; use 'json', 'text' or a format such as '%(message)s'")
    if level not in logging.getLevelNamesMapping():
        raise ConfigError(f"log_config: level {level!r} is not usable; use one such as 'INFO'")
    own = {"()": "otel_correlation.IdsFormatter", "fmt": lines}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": _LINES[lines]} if lines in _LINES else own},
        "handlers": {"stdout": {"class": "logging.StreamHandler", "formatter": "lines", "stream": "ext://sys.stdout"}},
        "root": {"handlers": ["stdout"], "level": level},
        "loggers": {name: {"handlers": [], "level": level, "propagate": True} for name in _SERVER_LOGGERS},
    }
