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
Trie = dict[str, "Trie"]


def spelt_out(phrase: str) -> list[str]:
    """
    Return every text that a phrase of the list stands for: without its groups, alternatives and question marks.
    """
    if found := re.search(r"\(\?:([^()]*)\)(\?)?|([a-z])\?", phrase):
        choices = (found[1].split("|") if found[1] is not None else [found[3]]) + ([""] if found[2] or found[3] else [])
        return [
            text for choice in choices for text in spelt_out(phrase[: found.start()] + choice + phrase[found.end() :])
        ]
    return [phrase]


def any_of(*lists: tuple[str, ...]) -> str:
    """
    Return one expression for phrases, in which what begins alike is tried once: Go's takes a third of the time.
    """
    root: Trie = {}
    for phrase in (text for phrases in lists for one in phrases for text in spelt_out(one)):
        node = root
        for part in re.findall(r"\[[^]]*\](?:\{\d+\})?|.", phrase):
            node = node.setdefault("[^a-z0-9]?" if part == " " else part, {})
        node[""] = {}
    return _expression(root)


def _expression(node: Trie) -> str:
    parts = [part + _expression(node[part]) for part in sorted(node) if part]
    if len(parts) < 2 and "" not in node:
        return "".join(parts)
    return f"(?:{'|'.join(parts)}){'?' if '' in node else ''}" if parts else ""


def rules() -> dict[str, list[str]]:
    """
    Return the expressions of names under the processor's own keys.
    """
    ends, words = any_of(sensitive.ENDS), any_of(sensitive.WORDS)
    pair = rf"""{sensitive.TAIL}\\?["']?\s*[:=]\s*{_VALUE}"""
    query = "|".join(
        (
            any_of(sensitive.QUERY_EXACT),
            rf"(?:[a-z0-9_.%\[\]-]*[0-9_.%\[\]-])?{any_of(sensitive.QUERY_LAST, sensitive.QUERY_WORDS)}",
            rf"[a-z0-9_.%\[\]-]*{any_of(sensitive.QUERY_ENDS)}",
        )
    )
    return {
        # Only right behind the secret's name: a key that is ignored has a value that nothing looks into.
        "ignored_key_patterns": [
            rf"(?i){any_of(sensitive.ENDS, ('otp', 'pin'))}[._-]?{any_of(sensitive.MEASURES)}$",
        ],
        "blocked_key_patterns": [
            f"(?i:{ends}){sensitive.END}",
            f"(?i:^|[^a-z0-9])(?i:{words}){sensitive.END}",
        ],
        # What stands before the name in the same word stays.
        "blocked_values": [
            rf"(?i){ends}{pair}",
            # The character before the name is taken along: to look for a place without one costs Go twice as much.
            rf"(?i)(?:^|[^a-z0-9]){words}{pair}",
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
