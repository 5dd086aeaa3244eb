"""
What reaches the terminal: text of others made harmless, and rich's console.
"""

from __future__ import annotations

import sys
import unicodedata
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from rich.style import StyleType


def safe(text: object) -> str:
    r"""
    Return one line without anything that a terminal acts on.

    Control characters (escape sequences, line feeds), format characters (right-to-left overrides), lone surrogates and
    line separators become visible escapes such as ``\x1b``.
    """
    return "".join(
        character if character.isprintable() or unicodedata.category(character) == "Zs" else _escape(character)
        for character in str(text)
    )


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # Rich would exit with status 1; ``main`` knows that a reader who has seen enough is no failure.
        raise  # noqa: PLE0704 - called while BrokenPipeError is handled


class Screen:
    """
    Lines on stdout: styled on a terminal, plain elsewhere, never wrapped or cut, never interpreted as markup.
    """

    def __init__(self) -> None:
        self._console = _Console(file=sys.stdout, highlight=False, markup=False, emoji=False)

    @property
    def width(self) -> int:
        """
        Return the columns that a line may take.
        """
        return self._console.width if self._console.is_terminal else 120

    def line(self, *parts: str | tuple[str, StyleType]) -> None:
        """
        Print one line of parts, each a text or a text with its style.
        """
        line = Text()
        for part in parts:
            text, style = (part, "") if isinstance(part, str) else part
            line.append(safe(text), style)
        self._console.print(line, soft_wrap=True)
