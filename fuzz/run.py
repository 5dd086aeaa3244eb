"""
Fuzz every parser of foreign text, some seconds each, and say how to run again what failed.

    python fuzz/run.py [--seconds 20] [NAME ...]

An input fails where the parser raises, breaks a promise of its entry's ``check`` (what is read back was written so,
a secret is not shown, each line is one JSON object), takes longer than ``TIMEOUT_S`` or more memory than ``MEMORY_MB``.
Seeds are the entry's examples and what ``fuzz/corpus/`` holds: what failed once stays there. Finds go to ``out/fuzz``.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.parsers.table import TABLE, Parser  # noqa: E402 - the path comes first

TIMEOUT_S = 5
MEMORY_MB = 1024
MAX_LENGTH = 8192


def folder_of(name: str) -> str:
    """
    Return an entry's name as a directory.
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def fuzz(parser: Parser, seconds: int) -> list[str]:
    """
    Fuzz one entry; return a line for each input that failed, with the command that runs it again.
    """
    found = ROOT / "out" / "fuzz" / folder_of(parser.name)
    grown, seeds = found / "corpus", found / "seeds"
    for directory in (grown, seeds):
        directory.mkdir(parents=True, exist_ok=True)
    for number, example in enumerate(parser.examples):
        coding, errors = ("utf-8", "surrogatepass") if parser.wide else ("latin-1", "replace")
        (seeds / str(number)).write_bytes(example.encode(coding, errors))
    kept = ROOT / "fuzz" / "corpus" / folder_of(parser.name)
    corpora = [str(path) for path in (grown, kept, seeds) if path.is_dir()]
    dictionary = found / "tokens.dict"
    dictionary.write_text("".join(f'"{_escaped(token)}"\n' for token in parser.tokens if token))
    command = [sys.executable, str(ROOT / "fuzz" / "target.py"), parser.name]
    limits = [f"-timeout={TIMEOUT_S}", f"-rss_limit_mb={MEMORY_MB}"]
    before = set(found.glob("*-*"))
    log = found / "log"
    with log.open("wb") as out:
        done = subprocess.run(
            [
                *command,
                *corpora,
                *limits,
                f"-max_total_time={seconds}",
                f"-max_len={MAX_LENGTH}",
                f"-artifact_prefix={found}/",
                f"-dict={dictionary}",
            ],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            check=False,
        )
    text = log.read_text(errors="replace")
    runs = re.findall(r"^#(\d+)", text, re.MULTILINE)
    print(f"{parser.name}: {runs[-1] if runs else 0} inputs", flush=True)
    failed = sorted(set(found.glob("*-*")) - before)
    if done.returncode and not failed:
        return [f"{parser.name} ended with {done.returncode}; see {log.relative_to(ROOT)}"]
    why = re.findall(r"^(?:\S*(?:Error|Exception)\b.*|ERROR: libFuzzer: .*|SUMMARY: .*)$", text, re.MULTILINE)
    again = [["python", "fuzz/target.py", parser.name, str(path.relative_to(ROOT)), *limits] for path in failed]
    return [f"{parser.name}: {why[0] if why else 'failed'}\n    {shlex.join(line)}" for line in again]


def _escaped(token: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in token.encode("utf-8", "replace"))


def main() -> int:
    """
    Fuzz what is named, or everything; 1 if anything failed.
    """
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seconds", type=int, default=20, help="for each entry")
    arguments.add_argument("names", nargs="*", help="entries of the table; all if none is named")
    options = arguments.parse_args()
    wanted = [parser for parser in TABLE if not options.names or parser.name in options.names]
    if not wanted:
        print("no entry has such a name; they are: " + ", ".join(parser.name for parser in TABLE))
        return 2
    failed = [line for parser in wanted for line in fuzz(parser, options.seconds)]
    print(*failed, f"{len(failed)} inputs failed", sep="\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
