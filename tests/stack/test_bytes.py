"""
The whole attack: 600 requests with 2 MB of User-Agent each, against every state of the collector.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.integration.test_bytes import MOST_MIB, growth_mib

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("state", ["present", "absent", "slow"])
@pytest.mark.parametrize("path", ["/quiet", "/logs", "/fails"])
def test_600_requests_of_2_mb_do_not_fill_a_process(tmp_path: Path, path: str, state: str) -> None:
    """
    Whether the header is only recorded, logged over OTLP or raised, memory stays within 80 MiB of where it was.
    """
    assert growth_mib(tmp_path, path, state, 600) < MOST_MIB
