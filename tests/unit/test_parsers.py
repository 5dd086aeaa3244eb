"""
Every parser of foreign text takes time in proportion to its input, and none is missing in the list.

The list is ``tests/parsers/table.py``. ``python -m tests.parsers.growth --all`` takes more and larger inputs than this suite.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.parsers import growth, inventory
from tests.parsers.reads import NOT_FOREIGN, READS
from tests.parsers.table import TABLE, Parser

ROOT = Path(__file__).parent.parent.parent
HANG_S = 900


@cache
def _told(*arguments: str) -> dict[str, dict[str, Any]]:
    """
    Return what the growth of every entry is, or what it reaches, measured once in a process of its own.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.parsers.growth", *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "COV_", "COVERAGE"))},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=True,
    )
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", [parser.name for parser in TABLE])
def test_time_grows_no_faster_than_the_input(name: str) -> None:
    """
    Eight times as much of the worst input takes at most twenty times as long, whatever the input is made of.
    """
    found = _told()[name]
    assert "error" not in found, found["error"]
    assert found["slow"] == []
    assert found["cases"] > 1


def test_every_parser_is_in_the_list() -> None:
    """
    A regular expression, a parsing function or a loop over foreign data that is new gets an entry, or a reason.
    """
    found = inventory.readers()
    listed = {reader for readers in READS.values() for reader in readers}
    unknown = sorted(reader for reader in found - listed if not _reason(reader))
    assert unknown == [], "add each to an entry in tests/parsers/table.py and reads.py, or to NOT_FOREIGN with a reason"
    assert sorted(listed - found) == [], "these are gone from the package: take them out of tests/parsers/reads.py"
    stale = [
        name for name in NOT_FOREIGN if not any(reader == name or reader.startswith(f"{name}.") for reader in found)
    ]
    assert stale == [], "these are gone from the package: take them out of NOT_FOREIGN"
    assert sorted(READS) == sorted(parser.name for parser in TABLE)


def _reason(reader: str) -> str | None:
    return next((why for name, why in NOT_FOREIGN.items() if reader == name or reader.startswith(f"{name}.")), None)


@pytest.mark.parametrize("name", [parser.name for parser in TABLE])
def test_an_entry_reaches_what_it_stands_for(name: str) -> None:
    """
    What an entry says that it reads does run when it is driven: nothing is listed that no input gets to.
    """
    found = _told("--reached")[name]
    assert "error" not in found, found["error"]
    assert sorted(set(READS[name]) - set(found["reached"])) == []


NEW_PARSER = """
import re
_NEW: Final = re.compile("(a|a)*b")

def harmless(text: str) -> int:
    return len(text)

class Reader:
    def fields(self, text: str) -> list[str]:
        return text.split(",")

def outer(text: str) -> None:
    def inner() -> object:
        return json.loads(text)
    inner()
"""


def test_a_new_parser_is_seen() -> None:
    """
    The inventory sees a compiled pattern, a method that splits, and a parser within a function; loops where data is foreign.
    """
    assert inventory.readers_in(NEW_PARSER, "new") == {"new._NEW", "new.Reader.fields", "new.outer.inner"}
    loop = "def each(items):\n    for item in items:\n        print(item)\n"
    assert inventory.readers_in(loop, "settings") == set()
    assert inventory.readers_in(loop, "stores.new") == {"stores.new.each"}


def _quadratic(text: str) -> None:
    for end in range(0, len(text), 8):
        text[:end].count("ab")


def _endless(text: str) -> None:
    re.fullmatch("(?:a|a)*b", text)


@pytest.mark.parametrize(("call", "said"), [(_quadratic, "characters"), (_endless, "did not end"), (len, "")])
def test_a_parser_that_is_too_slow_is_told(call: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A quadratic one is told with its times, one that never ends with its input, a linear one not at all.
    """
    monkeypatch.setattr(growth, "GUARD_S", 1.0)
    monkeypatch.setitem(READS, "fake", ())
    parser = Parser(name="fake", call=call, tokens=("a", "b"), size=2048)
    found = growth.in_child(parser, growth._run, everything=False)
    assert "error" not in found
    assert bool(found["slow"]) is bool(said)
    assert all(said in line for line in found["slow"])


def test_the_tokens_of_a_pattern_are_its_own_characters() -> None:
    """
    Literal texts as they stand, the ends of ranges, what a class leaves out: enough to attack a pattern that nobody described.
    """
    found = inventory.tokens_of(re.compile(r'Root=([a-f]+)\s*(?:;[^"]*)?'))
    assert {"Root=", "a", "f", " ", ";", '"'} <= set(found)
