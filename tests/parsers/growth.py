"""
How the time of each parser in the table grows with the size of its input.

    python -m tests.parsers.growth [--all] [NAME ...]     one JSON line for each entry

Each entry runs in a process of its own, forked from this one: a regular expression holds the interpreter's lock, so nothing
inside of the process could stop it. The kernel ends a case that needs more than ``GUARD_S`` seconds of CPU time.

What is compared is CPU time of the same process at two sizes, the best of several runs, so neither a busy nor a slow machine
changes the result. A case is too slow if eight times the input takes more than twenty times as long: linear is 8, sorting is
under 11, quadratic is 64.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import select
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.parsers import inventory
from tests.parsers.table import TABLE, Parser

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Iterator

GROWTH = 8
LIMIT = 20.0
# A time below this, at the larger size, is noise; whatever is worse than linear is far above it.
FLOOR_NS = 400_000
# Of CPU time, for one run of one case. The slowest linear one needs a tenth of a second.
GUARD_S = 6.0
REPEATS = 5
# Of one entry: more of them say the same again, and each takes long.
MAX_TOLD = 3
_SPACES = (" ", "\t", "\n")


@dataclass(frozen=True, slots=True)
class Case:
    """
    One family of inputs: ``before``, then ``unit`` as often as the size asks for (and ``then`` as often), then ``after``.
    """

    before: str
    unit: str
    then: str
    after: str

    def text(self, size: int) -> str:
        """
        Return the input of about ``size`` characters.
        """
        count = max(size // (len(self.unit) + len(self.then)), 1)
        return self.before + self.unit * count + self.then * count + self.after

    def __str__(self) -> str:
        """
        Return it as Python writes it.
        """
        then = f" + {self.then!r} * n" if self.then else ""
        return f"{self.before!r} + {self.unit!r} * n{then} + {self.after!r}"


def cases(parser: Parser, tokens: tuple[str, ...], *, everything: bool) -> Iterator[Case]:
    """
    Generate the worst cases of a grammar from its tokens.

    Each token alone, each pair in turns, each pair as two runs (nested and unclosed forms), and white space before and after
    each token; in each of the entry's frames, whole and with an end that fails.
    """
    pairs = [f"{first}{second}" for first, second in itertools.permutations(tokens, 2)]
    spaced = [f"{token}{space}" for token in tokens for space in _SPACES]
    units: dict[tuple[str, str], None] = dict.fromkeys((unit, "") for unit in (*tokens, *pairs, *spaced))
    units |= dict.fromkeys(itertools.permutations(tokens, 2))
    units |= dict.fromkeys((token, space) for token in tokens for space in _SPACES)
    units |= dict.fromkeys((space, token) for token in tokens for space in _SPACES)
    listed = list(units)
    if not everything and len(listed) > parser.cases:
        # Evenly from all of it, the single tokens always: each run of the suite drives the same ones.
        head = listed[: len(tokens)]
        rest = listed[len(tokens) :]
        listed = head + rest[:: len(rest) // max(parser.cases - len(head), 1) + 1]
    for before, after in parser.frames:
        for unit, then in listed:
            for end in ("", *parser.ends):
                yield Case(before, unit, then, after + end)


def tokens_of(parser: Parser) -> tuple[str, ...]:
    """
    Return the entry's own tokens, and those of the regular expressions that it drives.
    """
    found = dict.fromkeys(parser.tokens)
    if parser.of_patterns:
        for name in parser.reads:
            pattern = named_patterns().get(name)
            if pattern is not None:
                found |= dict.fromkeys(token for token in inventory.tokens_of(pattern) if token.isascii())
    return tuple(found)


def named_patterns() -> dict[str, re.Pattern[Any]]:
    """
    Return every regular expression that a loaded module of the package holds, by its name.
    """
    import re

    found: dict[str, re.Pattern[Any]] = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("otel_correlation."):
            short = name.partition(".")[2]
            found |= {f"{short}.{key}": value for key, value in vars(module).items() if isinstance(value, re.Pattern)}
    return found


def _time_ns(call: Callable[[str], object], text: str) -> int:
    # No timer of the kernel's runs beside it: where one does, this clock moves in steps of a tick.
    began = time.process_time_ns()
    call(text)
    return time.process_time_ns() - began


def slow(parser: Parser, case: Case, size: int) -> str | None:
    """
    Return the times of a case that grows faster than its input, or None.
    """
    small, large = case.text(size), case.text(size * GROWTH)
    first, last = _time_ns(parser.call, small), _time_ns(parser.call, large)
    for _ in range(REPEATS):
        if last < FLOOR_NS or last <= LIMIT * first:
            return None
        # A suspicion is measured again, and the best time of each size is what counts.
        first = min(first, max(_time_ns(parser.call, small), 1))
        last = min(last, _time_ns(parser.call, large))
    return f"{len(small)} characters {first / 1e6:.3f} ms, {len(large)} characters {last / 1e6:.3f} ms"


def _run(parser: Parser, *, everything: bool, report: Callable[[dict[str, Any]], None]) -> None:
    size = parser.size * (4 if everything else 1)
    tokens = tokens_of(parser)
    for example in parser.examples:
        parser.call(example)
    gc.collect()
    gc.disable()
    count = found = 0
    for case in cases(parser, tokens, everything=everything):
        report({"at": str(case)})
        if parser.prepare is not None:
            parser.prepare()
        if count % 50 == 49:
            gc.collect()
        count += 1
        if (times := slow(parser, case, size)) is not None:
            report({"slow": f"{case}: {times}"})
            found += 1
            if found == MAX_TOLD:
                break
    report({"cases": count, "cpu_s": round(time.process_time(), 2)})


def _reach(parser: Parser, *, report: Callable[[dict[str, Any]], None]) -> None:
    """
    Report what of the package runs for the entry: functions by name, and regular expressions by name.
    """
    prefix = str(inventory.PACKAGE)
    codes: set[Any] = set()
    patterns: set[int] = set()

    def seen(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            codes.add(frame.f_code)
        elif event == "c_call":
            patterns.add(id(getattr(argument, "__self__", None)))

    # What ran once may be remembered; an entry must reach its readers by itself.
    import threading

    threading.setprofile(seen)
    sys.setprofile(seen)
    try:
        for example in parser.examples:
            parser.call(example)
        # A slow case is found elsewhere; here each only has to run.
        for case in itertools.islice(cases(parser, parser.tokens, everything=False), 120):
            parser.call(case.text(12))
    finally:
        sys.setprofile(None)
    found = {name for name, pattern in named_patterns().items() if id(pattern) in patterns}
    for code in codes:
        if code.co_filename.startswith(prefix):
            module = code.co_filename[len(prefix) + 1 : -3].replace("/", ".").removesuffix(".__init__")
            found.add(f"{module}.{code.co_qualname.replace('.<locals>', '')}")
    report({"reached": sorted(found)})


def in_child(parser: Parser, what: Callable[..., None], **options: Any) -> dict[str, Any]:
    """
    Run an entry in a process of its own and return what it reported.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "w", buffering=1) as pipe:
            # What an entry prints is no report.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            try:
                what(parser, report=lambda line: print(json.dumps(line), file=pipe), **options)
            except BaseException:
                print(json.dumps({"error": traceback.format_exc()}), file=pipe)
        os._exit(0)
    os.close(writing)
    result: dict[str, Any] = {"name": parser.name, "slow": [], "cases": 0}
    last, since = "", 0.0
    rest = b""
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while True:
            if not select.select([pipe], [], [], 1.0)[0]:
                if _cpu_s(child) - since > GUARD_S:
                    os.kill(child, signal.SIGKILL)
                    result["slow"].append(f"{last}: did not end within {GUARD_S:g} s of CPU time")
                continue
            data = pipe.read(1 << 16)
            if not data:
                break
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                told = json.loads(line)
                if "at" in told:
                    last = told.pop("at")
                if "slow" in told:
                    result["slow"].append(told.pop("slow"))
                result |= told
            since = _cpu_s(child)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and not result["slow"]:
        result["error"] = f"{last}: ended by signal {os.WTERMSIG(status)}"
    elif "error" in result:
        result["error"] = f"{last}: {result['error']}"
    return result


def _cpu_s(child: int) -> float:
    """
    Return the CPU time of a process so far; where there is no /proc, the time on the wall.
    """
    try:
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.monotonic()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    """
    Print one JSON line for each entry, or with ``--check`` what is too slow.
    """
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--all", action="store_true", help="every case, at four times the size")
    arguments.add_argument("--reached", action="store_true", help="which readers each entry reaches, in place of times")
    arguments.add_argument("--check", action="store_true", help="print what is too slow only; 1 if anything is")
    arguments.add_argument("names", nargs="*", help="entries; all if none is named")
    options = arguments.parse_args()
    os.environ["OTEL_CORRELATION_STRICT"] = "1"
    failed = False
    for parser in TABLE:
        if not options.names or parser.name in options.names:
            result = in_child(parser, _reach) if options.reached else in_child(parser, _run, everything=options.all)
            wrong = [*result["slow"], *([result["error"]] if "error" in result else [])]
            failed = failed or bool(wrong)
            if options.check:
                print(f"{parser.name}: {result['cases']} families of inputs", *wrong, sep="\n  ", flush=True)
            else:
                print(json.dumps(result), flush=True)
    return int(failed and options.check)


if __name__ == "__main__":
    sys.exit(main())
