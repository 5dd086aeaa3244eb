"""
The code of docs/how-to/background-work.md runs, and does what the page says.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.integration.services import DEADLINE_S, clean_environment

pytestmark = pytest.mark.slow

PAGE: Final = Path(__file__).parents[2] / "docs/how-to/background-work.md"
BLOCKS: Final = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
CHECKS: Final = {
    "detached": """
from starlette.testclient import TestClient
with TestClient(app) as client:
    for _ in range(2):
        assert client.get("/prices").json() == {"refreshed by": None}
""",
    "own work": """
import asyncio
first, second = asyncio.run(tick()), asyncio.run(tick())
assert first and second and first != second and request_id() is None
""",
    "messages": """
publish("nothing")
body, rid = consume()
assert body == "nothing" and rid and rid != "order-4711-customer-quote"
""",
    "processes": """
if __name__ == "__main__":
    from starlette.testclient import TestClient
    client = TestClient(app)
    for rid in ("order-4711-customer-quote", "order-4712-customer-quote"):
        answer = client.get("/pages/7", headers={"x-request-id": rid})
        assert answer.json() == f"page 7 for {rid}", answer.text
""",
}


def test_every_block_has_a_check() -> None:
    """
    No block of the page is left out.
    """
    assert len(BLOCKS) == len(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_block_runs(name: str, tmp_path: Path) -> None:
    """
    A block runs as it stands in a clean process.
    """
    block = BLOCKS[list(CHECKS).index(name)]
    (tmp_path / "page.py").write_text(block + CHECKS[name])
    ended = subprocess.run(
        [sys.executable, "page.py"],
        cwd=tmp_path,
        env=clean_environment(OTEL_TRACES_EXPORTER="none"),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    if name == "messages":
        assert "('one teapot', 'order-4711-customer-quote')" in ended.stdout
