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

# What these show is the same on every Python: pages and examples, the command line, other versions of packages, how the
# time of a parser grows, long runs. They take half of the suite's time, so the other Pythons leave them to the first.
ONE_PYTHON = frozenset(
    {
        *("test_background_work_page.py", "test_docs.py", "test_docs_websockets.py", "test_migration_pages.py"),
        *("test_example_middleware_toggles.py", "test_example_request_id_chain.py", "test_example_service_layer.py"),
        *("test_cli_doctor.py", "test_cli_find.py", "test_cli_serve.py", "test_demo.py"),
        *("test_config_file.py", "test_credentials.py", "test_late_settings.py", "test_version_skew.py"),
        *("test_clients_caches.py", "test_logs_own_formats.py", "test_public_edge.py", "test_pull_metrics.py"),
        *("test_bytes.py", "test_hostile_servers.py", "test_parsers.py", "test_secret_lines.py", "test_soak.py"),
        *("test_frozen_clocks.py", "test_metrics.py", "test_test_clients.py", "test_left_streams.py"),
        *("test_capacity.py", "test_start_up.py", "test_stores_growth.py", "test_supply_chain.py"),
    }
)

# A slow example is not a wrong one: machines that run tests are shared.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")

# A shell that starts the tests in the background ignores SIGINT for them, and programs that they start would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # Before -m chooses.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """
    Mark what runs on one Python only.
    """
    for item in items:
        if item.path.name in ONE_PYTHON:
            item.add_marker(pytest.mark.one_python)


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
