"""
What in the package reads text or bytes from outside: found in the source, so that a new parser cannot be forgotten.

A *reader* is a regular expression that a module compiles, a function that calls something that parses, or, in the modules
that work on foreign data, a function with a loop. ``tests/parsers/table.py`` names a driver for each, or why it needs none.
"""

from __future__ import annotations

import ast
import re
import re._constants as sre  # type: ignore[import-not-found]  # typeshed leaves the private modules out
import re._parser as sre_parser  # type: ignore[import-not-found]  # the same
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent.parent / "otel_correlation"

# What parses, by the name of the function or method that is called.
_PARSES = frozenset(
    {
        *("loads", "load", "decompress", "decompressobj", "literal_eval"),
        *("ParseFromString", "FromString", "MergeFromString", "ParseDict", "Parse"),
        *("unquote", "unquote_plus", "parse_qs", "parse_qsl", "urlsplit", "urlparse"),
        *("b64decode", "fromhex", "fromisoformat", "strptime", "ip_address", "ip_network"),
        *("partition", "rpartition", "split", "rsplit", "splitlines", "find", "rfind", "decode"),
        *("compile", "fullmatch", "match", "search", "finditer", "findall", "sub", "subn"),
    }
)
# Where a loop runs over what somebody else sent, whether it parses or not.
_LOOPS_IN = (
    *("stores.", "local.", "policy.", "propagators", "request_id", "sampling", "tasks.redis", "tasks.carriers"),
    *("edge._entry", "edge._record", "edge._response", "edge._validation"),
    *("export.encoding", "logs.lines", "logs.otlp", "cli.find", "cli.terminal"),
)
_LOOPS = (ast.For, ast.AsyncFor, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class _Visitor(ast.NodeVisitor):
    def __init__(self, module: str) -> None:
        self.found: set[str] = set()
        self._module = module
        self._inside: list[str] = []
        self._loops = module.startswith(_LOOPS_IN)

    def visit(self, node: ast.AST) -> None:
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if named:
            self._inside.append(node.name)  # type: ignore[attr-defined]
        elif not self._inside and isinstance(node, ast.AnnAssign | ast.Assign) and _is_compiled(node.value):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            self.found.add(f"{self._module}.{ast.unparse(target)}")
            return
        elif self._inside and (_parses(node) or (self._loops and isinstance(node, _LOOPS))):
            self.found.add(".".join([self._module, *self._inside]))
        self.generic_visit(node)
        if named:
            self._inside.pop()


def _is_compiled(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "re.compile"


def _parses(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in _PARSES


def readers_in(source: str, module: str) -> set[str]:
    """
    Return the readers of one module's source, as ``module.qualified.name``.
    """
    visitor = _Visitor(module)
    visitor.visit(ast.parse(source))
    return visitor.found


def readers() -> set[str]:
    """
    Return the readers of the whole package, without its name.
    """
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found |= readers_in(path.read_text(), module.removesuffix(".__init__"))
    return found


_OF_CATEGORY = {
    sre.CATEGORY_DIGIT: "0",
    sre.CATEGORY_SPACE: " ",
    sre.CATEGORY_WORD: "a",
    sre.CATEGORY_NOT_DIGIT: "a",
    sre.CATEGORY_NOT_SPACE: "a",
    sre.CATEGORY_NOT_WORD: "-",
}


def tokens_of(pattern: re.Pattern[Any]) -> tuple[str, ...]:
    """
    Return what a regular expression is made of: each literal text in it, and of each class of characters some members.
    """
    text = pattern.pattern if isinstance(pattern.pattern, str) else pattern.pattern.decode("latin-1")
    found: dict[str, None] = {}
    _collect(sre_parser.parse(text, pattern.flags & ~re.UNICODE & ~re.DEBUG), found)
    return tuple(found)


def _collect(nodes: Any, found: dict[str, None]) -> None:
    literal = ""
    for kind, value in nodes:
        if kind is sre.LITERAL:
            literal += chr(value)
            continue
        if literal:
            found[literal], literal = None, ""
        if kind is sre.IN:
            found.update(dict.fromkeys(_members(value)))
        elif kind is sre.NOT_LITERAL:
            found |= dict.fromkeys((chr(value), "a" if value != ord("a") else "b"))
        elif kind is sre.ANY:
            found["a"] = None
        else:
            for part in value if isinstance(value, tuple | list) else (value,):
                for inner in part if isinstance(part, list) else (part,):
                    if isinstance(inner, sre_parser.SubPattern):
                        _collect(inner, found)
    if literal:
        found[literal] = None


def _members(items: list[tuple[Any, Any]]) -> list[str]:
    negated = items[0][0] is sre.NEGATE
    taken: set[str] = set()
    chosen: list[str] = []
    for kind, value in items[negated:]:
        if kind is sre.LITERAL:
            chosen.append(chr(value))
        elif kind is sre.RANGE:
            # The ends of a range are where two classes of one pattern usually overlap.
            chosen += [chr(value[0]), chr(value[1])]
        elif kind is sre.CATEGORY:
            chosen.append(_OF_CATEGORY[value])
    taken.update(chosen)
    if not negated:
        return chosen[:8]
    # What the class leaves out ends its run; what it takes is anything else.
    return [*chosen[:4], next(character for character in "a ;\x00" if character not in taken)]
