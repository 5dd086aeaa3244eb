"""
What a stack test can need: ``pytestmark = pytest.mark.needs("kafka", "loki")``; ``STACK_SKIP=kafka,loki`` leaves such tests out.

Only the parts that the selected tests need are built, before the first of them, and a part that cannot be had stops the run
there, with one line.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.stack import build, kafka, servers

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

SKIP = "STACK_SKIP"
NO_TEMPO = "TEMPO_BIN names no Tempo; with one, of version 3: TEMPO_BIN=/path/to/tempo make stack"


@dataclass(frozen=True, slots=True)
class Part:
    """
    One word for ``needs`` and ``STACK_SKIP``; ``check`` raises StackError at once where ``provide`` could not succeed.
    """

    check: Callable[[], object]
    provide: Callable[[], object]


def _tools(*tools: build.Tool) -> Part:
    return Part(*(functools.partial(_each, step, tools) for step in (build.check, build.ensure)))


def _each(step: Callable[[build.Tool], object], tools: Iterable[build.Tool]) -> None:
    for tool in tools:
        step(tool)


def _check_kafka() -> None:
    kafka.check()
    build.check(build.KAFKA_COLLECTOR)


def _provide_kafka() -> None:
    kafka.ensure()
    build.ensure(build.KAFKA_COLLECTOR)


def _nothing() -> None:
    pass


PARTS = {
    "collector": _tools(build.COLLECTOR),
    "jaeger": _tools(build.JAEGER),
    "loki": _tools(build.LOKI),
    "kafka": Part(_check_kafka, _provide_kafka),
    "tempo": Part(_nothing, _nothing),
    "compose": _tools(build.COMPOSE),
    "kubernetes": _tools(build.KUSTOMIZE, build.KUBECTL_VALIDATE),
    "servers": Part(_nothing, servers.install),
    "browser": Part(_nothing, _nothing),
}


def skipped() -> frozenset[str]:
    """
    Return the words of ``STACK_SKIP``.

    Raises:
        StackError: One of them is none of ours.
    """
    words = frozenset(word.strip() for word in os.environ.get(SKIP, "").split(",")) - {""}
    if unknown := sorted(words - PARTS.keys()):
        raise build.StackError(f"{SKIP} has no {', '.join(map(repr, unknown))}; it takes {', '.join(PARTS)}")
    return words


def reason(needs: Collection[str], left_out: Collection[str]) -> str | None:
    """
    Return why a test that needs these parts is not run, or None.
    """
    if found := [part for part in PARTS if part in needs and part in left_out]:
        return f"{SKIP} leaves out {', '.join(found)}"
    if "tempo" in needs and not os.environ.get("TEMPO_BIN"):
        return NO_TEMPO
    return None


def provide(needs: Collection[str]) -> None:
    """
    Build, fetch or install the parts; where one is impossible, nothing is begun.

    Raises:
        StackError: What is missing, how to get it, and what leaves the tests out that need it; a line for each thing.
    """
    wanted = [part for part in PARTS if part in needs]
    missing: dict[str, list[str]] = {}
    for part in wanted:
        try:
            PARTS[part].check()
        except build.StackError as error:
            missing.setdefault(str(error), []).append(part)
    if missing:
        raise build.StackError("\n".join(_advised(what, parts) for what, parts in missing.items()))
    for part in wanted:
        try:
            PARTS[part].provide()
        except build.StackError as error:
            raise build.StackError(_advised(str(error), [part])) from None


def _advised(what: str, parts: Iterable[str]) -> str:
    return f"{what}; or leave out what needs it: {SKIP}={','.join(parts)}"
