"""
What every test gets: strict guards, and globals as they were.
"""

from __future__ import annotations

import pytest
from hypothesis import settings

from otel_correlation import guard

# A slow example is not a wrong one: machines that run tests are shared.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")


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
