"""
Stack traces as text of others: the one definition of a frame, read in time that grows with the text and no faster.
"""

from __future__ import annotations

import re
from typing import Final

# A frame of a traceback as CPython prints it; an exception group puts "| " in front. What stands in front never leaves
# its line and is never given back, so a text of line feeds or of spaces is looked at once.
_FRAME: Final = re.compile(
    r'^(?:[^\S\n]|[|+])*+File "(?P<file>[^"\n]++)", line (?P<line>\d++)(?:, in (?P<function>.++))?$', re.MULTILINE
)
# Frames of installed packages, of ours, of the standard library, and of generated or compiled code are not the
# application's.
_FOREIGN: Final = re.compile(r"[/\\](?:site-packages|dist-packages|otel_correlation|python\d\.\d+t?)[/\\]|^<|\.pyx$")


def frames(stack: str) -> list[re.Match[str]]:
    """
    Return the frames in ``stack``, the outermost first, with the groups ``file``, ``line`` and ``function``.
    """
    return list(_FRAME.finditer(stack))


def own_frames(stack: str) -> list[re.Match[str]]:
    """
    Return the frames of the application itself.
    """
    return [frame for frame in frames(stack) if not _FOREIGN.search(frame["file"])]


def shown(frame: re.Match[str]) -> str:
    """
    Return ``FILE:LINE in FUNCTION``.
    """
    function = f" in {frame['function']}" if frame["function"] else ""
    return f"{frame['file']}:{frame['line']}{function}"


def is_cut(stack: str) -> bool:
    """
    Return whether a store kept the beginning alone (Tempo: 2 KiB by default), without the frames that matter.
    """
    # Behind the last frame stands what was raised, the one thing in a traceback that is not indented.
    rest = stack.rpartition('\n  File "')[2].splitlines()[1:]
    return stack.startswith("Traceback ") and all(row[:1] in ("", " ") for row in rest)
