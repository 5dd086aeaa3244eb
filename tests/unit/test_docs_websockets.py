"""
The how-to for WebSockets shows the example's code, and the example is run by tests/stack.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/how-to/websockets.md").read_text()
SOURCES = {
    "python": (ROOT / "examples/websocket-room/main.py").read_text(),
    "js": (ROOT / "examples/websocket-room/page.html").read_text(),
}


@pytest.mark.parametrize(("language", "block"), re.findall(r"```(python|js)\n(.*?)```", PAGE, re.DOTALL))
def test_code_is_the_examples(language: str, block: str) -> None:
    """
    Every block stands in the example as it is shown.
    """
    assert block in SOURCES[language]


def test_contents() -> None:
    """
    The list at the top names every section, in order.
    """
    sections = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    assert re.findall(r"^- \[(.+)\]\(#", PAGE, re.MULTILINE) == sections
