"""
The edge on light spans and on the SDK's own: a contract test sees no difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.contract.wire import wired

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.contract.wire import Wire


@pytest.fixture(params=["light", "plain"])
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    """
    A wired process.
    """
    with wired(request.param) as found:
        yield found
