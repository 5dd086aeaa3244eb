"""
Log files, plain and gzip, read where they lie: block by block, so that size costs time and no memory.
"""

from __future__ import annotations

import glob
import gzip
import os
import re
import sys
import time
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, ClassVar, Final

from otel_correlation.stores.client import StoreError
from otel_correlation.stores.lines import Reader, Wanted, put_exception
from otel_correlation.stores.model import LogLine, Trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

STDIN: Final = "-"
MAX_LINES: Final = 10_000
# A longer line is skipped; no handler writes one, and a file without line feeds must not fill the memory.
MAX_LINE_BYTES: Final = 1024 * 1024
# Of all lines that are told, with what follows them.
MAX_BYTES: Final = 64 * 1024 * 1024
_BLOCK: Final = 1024 * 1024
# Of a traceback that follows a line of text.
_MAX_FOLLOWING: Final = 500
# What our own text lines put in front of it.
_BAR: Final = "  | "
_TRACEBACK: Final = "Traceback (most recent call last):"


class LogFileStore:
    """
    Finds log lines in files, or on stdin; there are no spans in them.

    Args:
        pattern: A file, a glob (``**`` for any depth), or ``-``.
        renames: ``OTEL_CORRELATION_LOG_FIELDS`` of the services that wrote them.
    """

    is_whole: ClassVar[bool] = False

    def __init__(self, pattern: str, renames: Iterable[str] = ()) -> None:
        self._pattern = pattern
        self._reader = Reader(renames)
        self.name = "the log lines on stdin" if pattern == STDIN else f"the log files {pattern}"

    def find(self, wanted: str, /) -> list[Trace]:
        """
        Return the lines that name the id or the trace that it leads to.
        """
        return self._scan(Wanted.by(wanted))

    def complete(self, known: Sequence[Trace], /) -> list[Trace]:
        """
        Return the lines of the traces, and those of their request ids that name no trace.
        """
        # stdin can be read once only.
        return [] if self._pattern == STDIN else self._scan(Wanted.of(known))

    def _scan(self, wanted: Wanted) -> list[Trace]:
        found: dict[str, list[LogLine]] = {}
        troubles: list[str] = []
        left, left_bytes = MAX_LINES, MAX_BYTES
        for path in self._paths():
            try:
                for line, size in self._lines(path, wanted, troubles):
                    left -= 1
                    left_bytes -= size
                    if left < 0 or left_bytes < 0:
                        break
                    found.setdefault(line.trace_id, []).append(line)
            except (OSError, EOFError, zlib.error) as error:
                troubles.append(f"{path} cannot be read{' on' if found else ''} ({_reason(error)})")
            if left < 0:
                troubles.append(f"{self.name} have more than {MAX_LINES} lines of it")
                break
            if left_bytes < 0:
                troubles.append(f"{self.name} have more than {MAX_BYTES} bytes of it")
                break
        traces = [Trace.of(trace_id, (), lines) for trace_id, lines in found.items()]
        if troubles:
            raise StoreError("; ".join(troubles), traces)
        return traces

    def _paths(self) -> list[str]:
        """
        Return the files, the last written first.
        """
        if self._pattern == STDIN:
            return [STDIN]
        # A name that has a bracket is not always a pattern. Path.exists() raises where it may not look.
        if os.path.exists(self._pattern):  # noqa: PTH110
            return [self._pattern]
        # Path.glob() refuses absolute patterns. What is no file may be a pipe that nobody ever writes to.
        found = [path for path in glob.glob(self._pattern, recursive=True) if os.path.isfile(path)]  # noqa: PTH113, PTH207
        if not found:
            raise StoreError(f"{self._pattern}: there is no such log file")
        return sorted(found, key=_written_ns, reverse=True)

    def _lines(self, path: str, wanted: Wanted, troubles: list[str]) -> Iterator[tuple[LogLine, int]]:
        """
        Yield the lines of one file that have one of the ids, with the tracebacks that follow lines of text.

        Beside each stands how many bytes it had in the file.
        """
        has_id = _prefilter(wanted)
        near_ns = time.time_ns() if path == STDIN else _written_ns(path)
        service = "stdin" if path == STDIN else _stem(path)
        last_ns = 0
        following: _Following | None = None
        with _opened(path) as file:
            for block in _blocks(file, path, troubles):
                if following is None and not has_id(block):
                    continue
                for raw in block.split(b"\n"):
                    if following is not None:
                        if following.takes(raw):
                            continue
                        yield following.line(), following.size_bytes
                        following = None
                    if not has_id(raw):
                        continue
                    text = raw.decode("utf-8", "replace").rstrip("\r")
                    line = self._reader.read(text, wanted, service, near_ns)
                    if line is None:
                        continue
                    # One without a time was written with the one before it.
                    last_ns = line.time_ns or last_ns
                    following = _Following(line, last_ns, len(raw))
            if following is not None:
                yield following.line(), following.size_bytes


class _Following:
    """
    A line, and what follows it in text: a traceback, as logging prints it or behind bars as our text lines have it.
    """

    def __init__(self, line: LogLine, time_ns: int, size_bytes: int) -> None:
        self._line = line
        # In the file, with what follows.
        self.size_bytes = size_bytes
        self._time_ns = time_ns
        self._more: list[str] = []
        self._is_barred = self._is_raised = False

    def takes(self, raw: bytes) -> bool:
        """
        Return whether ``raw`` belongs to this line.
        """
        if self._is_raised or len(self._more) >= _MAX_FOLLOWING or raw[:1] == b"{":
            return False
        if self.size_bytes + len(raw) > MAX_LINE_BYTES:
            return False
        text = raw.decode("utf-8", "replace").rstrip("\r")
        if not text:
            return False
        is_inner = text[0] in " \t" or text.startswith(_TRACEBACK)
        # The one line of a traceback that is not indented ends it: what was raised.
        self._is_raised = not is_inner and bool(self._more) and not self._is_barred
        if is_inner or self._is_raised:
            self._is_barred = text.startswith(_BAR)
            self._more.append(text.removeprefix(_BAR))
            self.size_bytes += len(raw)
        return is_inner or self._is_raised

    def line(self) -> LogLine:
        """
        Return the whole.
        """
        attributes = dict(self._line.attributes)
        if self._more:
            put_exception(attributes, "\n".join(self._more))
        line = self._line
        return LogLine(
            line.trace_id, line.span_id, self._time_ns, line.severity, line.service, line.logger, line.body, attributes
        )


def _prefilter(wanted: Wanted) -> Callable[[bytes], bool]:
    """
    Return what tells cheaply that bytes cannot have one of the ids: most of them are never looked at again.
    """
    spellings = [text.encode() for text in wanted.spellings]
    if not wanted.short_ids:
        return lambda data: any(spelling in data for spelling in spellings)
    short = b"|".join(re.escape(text.encode()) for text in sorted(wanted.short_ids))
    word = re.compile(b"(?<![A-Za-z0-9])(?:" + short + b")(?![A-Za-z0-9])")
    return lambda data: word.search(data) is not None or any(spelling in data for spelling in spellings)


def _blocks(file: IO[bytes], path: str, troubles: list[str]) -> Iterator[bytes]:
    """
    Yield the file in blocks of whole lines.
    """
    rest = b""
    is_skipping = is_told = False
    while block := file.read(_BLOCK):
        end = block.rfind(b"\n")
        if end < 0:
            rest += block
            if len(rest) > MAX_LINE_BYTES:
                rest = b""
                if not is_told:
                    troubles.append(f"{path} has a line of more than {MAX_LINE_BYTES} bytes, which was skipped")
                is_skipping = is_told = True
            continue
        begin = block.find(b"\n") + 1 if is_skipping else 0
        is_skipping = False
        yield rest + block[begin:end]
        rest = block[end + 1 :]
    if rest and not is_skipping:
        yield rest


def _opened(path: str) -> IO[bytes]:
    if path == STDIN:
        if sys.stdin is None:
            raise OSError("it is closed")
        return open(sys.stdin.fileno(), "rb", closefd=False)
    return gzip.open(path) if path.endswith(".gz") else Path(path).open("rb")  # type: ignore[return-value]


def _written_ns(path: str) -> int:
    try:
        return Path(path).stat().st_mtime_ns
    except OSError:
        return 0


def _stem(path: str) -> str:
    """
    Return what a file's name says of its service: ``orders`` of ``/var/log/orders.log.1.gz``.
    """
    return Path(path).name.partition(".")[0] or "unknown_service"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
