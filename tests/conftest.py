"""
What every test gets: strict guards, and globals as they were.
"""

from __future__ import annotations

import pytest

from otel_correlation import guard


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
