"""
What every test gets: strict guards, and globals as they were.
"""

from __future__ import annotations

import logging
import signal
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from otel_correlation import guard

if TYPE_CHECKING:
    from collections.abc import Iterator

# A slow example is not a wrong one: machines that run tests are shared.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")

# A shell that starts the tests in the background ignores SIGINT for them, and programs that they start would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def anyio_backend() -> str:
    """
    Async tests run on asyncio.
    """
    return "asyncio"


@pytest.fixture(autouse=True)
def strict_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A failure that the never-raise boundary would hide fails the test.
    """
    monkeypatch.setenv(guard.STRICT_ENV, "1")
    guard.reset()


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """
    Levels and handlers that a test, or a server in it, gave to the loggers of servers and to the root are taken back.
    """
    names = ("", "uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi", "otel_correlation")
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger.level, logger.disabled, logger.propagate, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, disabled, propagate, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.disabled, logger.propagate = disabled, propagate
        # In place: pytest holds its own handlers of the root logger.
        logger.handlers[:] = handlers
