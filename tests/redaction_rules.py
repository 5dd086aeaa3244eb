"""
What the collectors' `redaction` must say about names, made from the list that the package itself uses.

``python -m tests.redaction_rules`` prints it; with ``--write`` the files in ``collector/`` get it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from otel_correlation.policy import sensitive

CONFIGS = Path(__file__).parents[1] / "collector"
MARK = "      # Written by `python -m tests.redaction_rules --write`, from otel_correlation/policy/sensitive.py:\n"
_VALUE = r"""\[?(?:\\?"[^"]*"|'[^']*'|[^\s&"',;}]+)"""


def rules() -> dict[str, list[str]]:
    """
    Return the expressions of names under the processor's own keys.
    """
    ends, words = sensitive.alternatives(sensitive.ENDS), sensitive.alternatives(sensitive.WORDS)
    pair = rf"""{sensitive.TAIL}\\?["']?\s*[:=]\s*{_VALUE}"""
    any_of = sensitive.alternatives
    query = "|".join(
        (
            any_of(sensitive.QUERY_EXACT),
            rf"(?:[a-z0-9_.%\[\]-]*[0-9_.%\[\]-])?(?:{any_of(sensitive.QUERY_LAST + sensitive.QUERY_WORDS)})",
            rf"[a-z0-9_.%\[\]-]*(?:{any_of(sensitive.QUERY_ENDS)})",
        )
    )
    return {
        "ignored_key_patterns": [
            f"(?i:{ends}).*{sensitive.MEASURED}",
            f"(?:^|[^A-Za-z0-9])(?i:{words}).*{sensitive.MEASURED}",
        ],
        "blocked_key_patterns": sensitive.key_patterns(),
        "blocked_values": [
            rf"(?i)\b[a-z0-9_.-]*(?:{ends}){pair}",
            # A character before the name is taken along: looking for a place without one costs Go twice as much.
            rf"(?i)(?:^|[^a-z0-9])(?:{words}){pair}",
            rf"""(?i)(?:^|[?&;])(?:{query})\]?(?:\[\w*\])?=[^\s&;"'<>]+""",
        ],
    }


def written(text: str) -> str:
    """
    Return a collector file's text with the rules of names as they must be.
    """
    for key, patterns in rules().items():
        block = re.compile(rf"(^    {key}:\n(?:      .*\n)*?{re.escape(MARK)})(?:      - .*\n)*", re.MULTILINE)
        lines = "".join(f"      - {pattern}\n" for pattern in patterns)
        text = block.sub(lambda found, lines=lines: found[1] + lines, text)  # type: ignore[misc]  # no type of a default
    return text


if __name__ == "__main__":
    for path in sorted(CONFIGS.glob("*.yaml")):
        before = path.read_text()
        if MARK in before and "--write" in sys.argv:
            path.write_text(written(before))
    for key, patterns in rules().items():
        print(f"    {key}:", *(f"      - {pattern}" for pattern in patterns), sep="\n")
