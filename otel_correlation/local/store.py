"""
The bounded SQLite store behind the receiver: one thread owns the one connection.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Final

from otel_correlation.request_id import to_trace_id
from otel_correlation.stores.model import Trace, log_from_json, log_to_json, span_from_json, span_to_json
from otel_correlation.stores.story import entry

if TYPE_CHECKING:
    from concurrent.futures import Future

    from otel_correlation.stores.model import Json, LogLine, Span

_MEMORY: Final = ":memory:"
MAX_ROWS: Final = 200_000
# As held: all pages of the database with its indexes, and the write-ahead log of a file.
MAX_BYTES: Final = 256 * 1024 * 1024
# One span or log line beyond this is not kept.
MAX_ROW_BYTES: Final = 1024 * 1024
# One endless trace must not push out all others, nor make a page that no browser can show.
MAX_TRACE_ROWS: Final = 10_000
MAX_TRACE_BYTES: Final = 16 * 1024 * 1024
# The most traces that one id may bring up, and their bytes from the second on: short ids repeat.
MAX_FOUND: Final = 20
MAX_FOUND_BYTES: Final = 16 * 1024 * 1024
# When it is full, this part of the bound is made free at once: making room has a price each time.
_FREED: Final = 16
# Of the write-ahead log between two batches.
_MAX_LOG_BYTES: Final = 8 * 1024 * 1024
# Of the texts in the list of traces. No valid request id is longer than 200.
_MAX_TEXT: Final = 200
# What the list tells of the request that a trace began with.
_IN_LIST: Final = ("http.request.method", "http.route", "url.path", "url.full", "http.response.status_code")
_ENTRY_CANDIDATES: Final = 50
_SCHEMA_VERSION: Final = 3
_SCHEMA: Final = """
CREATE TABLE traces (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, trace_id TEXT UNIQUE NOT NULL, rows INTEGER NOT NULL, bytes INTEGER NOT NULL
);
CREATE TABLE spans (
    trace_id TEXT NOT NULL, span_id TEXT NOT NULL, start_ns INTEGER NOT NULL, end_ns INTEGER NOT NULL,
    failed INTEGER NOT NULL, service TEXT NOT NULL, request_id TEXT NOT NULL, caller_id TEXT NOT NULL,
    head TEXT NOT NULL, data TEXT NOT NULL, PRIMARY KEY (trace_id, span_id)
);
CREATE TABLE logs (
    trace_id TEXT NOT NULL, digest BLOB NOT NULL, time_ns INTEGER NOT NULL, service TEXT NOT NULL,
    request_id TEXT NOT NULL, data TEXT NOT NULL, PRIMARY KEY (trace_id, digest)
);
CREATE INDEX spans_by_request_id ON spans (request_id) WHERE request_id <> '';
CREATE INDEX spans_by_caller_id ON spans (caller_id) WHERE caller_id <> '';
CREATE INDEX logs_by_request_id ON logs (request_id) WHERE request_id <> '';
"""

_BY_REQUEST_ID: Final = """
SELECT trace_id FROM spans WHERE request_id = :request_id AND request_id <> ''
UNION SELECT trace_id FROM spans WHERE caller_id = :request_id AND caller_id <> ''
UNION SELECT trace_id FROM logs WHERE request_id = :request_id AND request_id <> ''
"""
_RECENT: Final = f"""
SELECT trace_id FROM traces t
WHERE (:trace_id = '' OR trace_id = :trace_id) AND (:request_id = '' OR trace_id IN ({_BY_REQUEST_ID})) AND (
    :service = '' OR EXISTS (SELECT 1 FROM spans s WHERE s.trace_id = t.trace_id AND s.service = :service)
    OR EXISTS (SELECT 1 FROM logs l WHERE l.trace_id = t.trace_id AND l.service = :service)
) ORDER BY seq DESC LIMIT :limit
"""  # noqa: S608 - a constant put together from a constant
_FIND: Final = f"""
SELECT trace_id, bytes FROM traces WHERE trace_id = :trace_id OR trace_id IN ({_BY_REQUEST_ID})
ORDER BY trace_id <> :trace_id, seq DESC LIMIT :limit
"""  # noqa: S608 - as above


class StoreFileError(Exception):
    """
    A database file that cannot be used. Its text is one line for a person.
    """


@dataclass(slots=True)
class Counts:
    """
    What the store holds and what it let go, by reason.

    ``bytes`` are those that are held in memory or on disk, with indexes and the write-ahead log.
    """

    rows: int = 0
    bytes: int = 0
    duplicates: int = 0
    dropped_traces: int = 0
    dropped_rows: int = 0
    over_trace_limit: int = 0
    over_size: int = 0


class LocalStore:
    """
    Keeps spans and log lines by trace id and by request id, within bounds; the oldest trace goes first, as a whole.

    Every method may be called from any thread and answers with a future: the one thread that owns the connection does
    the work. What arrives twice (delivery is at-least-once) is kept once.
    """

    def __init__(
        self,
        path: str = ":memory:",
        *,
        max_rows: int = MAX_ROWS,
        max_bytes: int = MAX_BYTES,
        max_trace_rows: int = MAX_TRACE_ROWS,
    ) -> None:
        """
        Open ``path`` or make it, for its owner alone (mode 0600, the files beside it too).

        Raises:
            StoreFileError: The file is no store of ours, is in use, or cannot be written.
        """
        self.counts = Counts()
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._max_trace_rows = max_trace_rows
        # SQLite's file beside the database; not there for one in memory.
        self._log = Path(path + "-wal")
        self._owner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="otel-correlation-store")
        try:
            self._db = self._owner.submit(self._open, path).result()
        except BaseException:
            self._owner.shutdown()
            raise

    def add(self, spans: tuple[Span, ...], logs: tuple[LogLine, ...]) -> Future[None]:
        """
        Keep ``spans`` and ``logs`` in one transaction; done when they can be found.
        """
        return self._owner.submit(self._add, spans, logs)

    def recent(
        self, *, request_id: str = "", trace_id: str = "", service: str = "", limit: int = 50
    ) -> Future[list[dict[str, Json]]]:
        """
        Return one summary a trace, newest first, of those that meet every condition that is not empty.
        """
        return self._owner.submit(self._recent, request_id, trace_id, service, limit)

    def trace(self, trace_id: str) -> Future[Trace | None]:
        """
        Return the whole trace.
        """
        return self._owner.submit(self._trace, trace_id)

    def find(self, wanted: str) -> Future[list[Trace]]:
        """
        Return the newest traces that ``wanted`` names: by the trace id that it is or leads to, and by request id.
        """
        return self._owner.submit(self._find, wanted)

    def close(self) -> None:
        """
        Finish what was asked for and close the file.
        """
        self._owner.submit(self._db.close).result()
        self._owner.shutdown()

    def _open(self, path: str) -> sqlite3.Connection:
        try:
            if path != _MEMORY:
                # SQLite gives the files beside it the same mode.
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            db = sqlite3.connect(path, isolation_level=None, timeout=1.0)
            try:
                # Exclusive: bounds and counts are kept in memory, so a second process must not write.
                db.execute("PRAGMA locking_mode=EXCLUSIVE")
                version = db.execute("PRAGMA user_version").fetchone()[0]
                new = version == 0 and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
                if not new and version != _SCHEMA_VERSION:
                    raise StoreFileError(
                        f"{path} is a database of something else, or of another version: name another file"
                    )
                # Only now: what is not ours is left as it is.
                if path != _MEMORY:
                    for own in (Path(path), self._log):
                        with contextlib.suppress(FileNotFoundError):
                            own.chmod(0o600)
                # Before the first table, or it has no effect: pages that are free can be given back.
                db.execute("PRAGMA auto_vacuum=INCREMENTAL")
                db.execute("PRAGMA journal_mode=WAL")
                db.execute("PRAGMA synchronous=NORMAL")
                db.execute("BEGIN IMMEDIATE")
                if new:
                    for statement in _SCHEMA.split(";"):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
                self.counts.rows = db.execute("SELECT coalesce(sum(rows), 0) FROM traces").fetchone()[0]
                db.execute("COMMIT")
                self.counts.bytes = self._held(db)
            except BaseException:
                db.close()
                raise
        except (sqlite3.Error, OSError) as error:
            raise StoreFileError(f"{path} cannot be used as the store: {error}") from error
        return db

    def _held(self, db: sqlite3.Connection) -> int:
        """
        Return the bytes of all pages and of the write-ahead log; pages that are in the log alone count twice.
        """
        pages, size = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
        try:
            log = self._log.stat().st_size
        except OSError:
            log = 0
        return int(pages * size) + log

    def _add(self, spans: tuple[Span, ...], logs: tuple[LogLine, ...]) -> None:
        before = Counts(**{name: getattr(self.counts, name) for name in Counts.__slots__})
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for span in spans:
                self._add_span(span)
            for line in logs:
                self._add_log(line)
            self._evict()
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            self.counts = before
            raise
        over = self._page("page_count") - self._max_pages
        if over > 0:
            # Not execute(): it takes one step, which gives back one page.
            self._db.executescript(f"PRAGMA incremental_vacuum({over})")
        self.counts.bytes = self._held(self._db)
        if over > 0 or self.counts.bytes > self._max_bytes:
            # What is in the log goes into the database; both files become as small as they can be.
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            self.counts.bytes = self._held(self._db)

    def _add_span(self, span: Span) -> None:
        data = _dump(span_to_json(span))
        if self._has_room(span.trace_id, size := len(data.encode())):
            values = (
                span.trace_id,
                span.span_id,
                span.start_ns,
                span.end_ns,
                span.failed,
                span.service[:_MAX_TEXT],
                _id(span.request_id),
                _id(span.caller_request_id),
                _dump(_head(span)),
            )
            done = self._db.execute(
                "INSERT OR IGNORE INTO spans VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*values, data)
            )
            self._count(span.trace_id, size, done.rowcount)

    def _add_log(self, line: LogLine) -> None:
        data = _dump(log_to_json(line))
        encoded = data.encode()
        if self._has_room(line.trace_id, len(encoded)):
            digest = blake2b(encoded, digest_size=16).digest()
            values = (line.trace_id, digest, line.time_ns, line.service[:_MAX_TEXT], _id(line.request_id))
            done = self._db.execute("INSERT OR IGNORE INTO logs VALUES (?, ?, ?, ?, ?, ?)", (*values, data))
            self._count(line.trace_id, len(encoded), done.rowcount)

    def _has_room(self, trace_id: str, size: int) -> bool:
        if size > MAX_ROW_BYTES:
            self.counts.over_size += 1
            return False
        self._db.execute("INSERT OR IGNORE INTO traces (trace_id, rows, bytes) VALUES (?, 0, 0)", (trace_id,))
        rows, held = self._db.execute("SELECT rows, bytes FROM traces WHERE trace_id = ?", (trace_id,)).fetchone()
        if rows < self._max_trace_rows and held + size <= MAX_TRACE_BYTES:
            return True
        self.counts.over_trace_limit += 1
        return False

    def _count(self, trace_id: str, size: int, inserted: int) -> None:
        if not inserted:
            self.counts.duplicates += 1
            return
        self._db.execute("UPDATE traces SET rows = rows + 1, bytes = bytes + ? WHERE trace_id = ?", (size, trace_id))
        self.counts.rows += 1

    def _evict(self) -> None:
        bound = self._max_pages
        if self.counts.rows <= self._max_rows and self._page("page_count") <= bound:
            return
        used = bound - bound // _FREED
        while self.counts.rows > self._max_rows or self._page("page_count") - self._page("freelist_count") > used:
            oldest = self._db.execute("SELECT seq, trace_id, rows FROM traces ORDER BY seq LIMIT 1").fetchone()
            if oldest is None:
                break
            seq, trace_id, rows = oldest
            self._db.execute("DELETE FROM spans WHERE trace_id = ?", (trace_id,))
            self._db.execute("DELETE FROM logs WHERE trace_id = ?", (trace_id,))
            self._db.execute("DELETE FROM traces WHERE seq = ?", (seq,))
            self.counts.rows -= rows
            self.counts.dropped_rows += rows
            self.counts.dropped_traces += 1

    def _page(self, name: str) -> int:
        return int(self._db.execute(f"PRAGMA {name}").fetchone()[0])

    @property
    def _max_pages(self) -> int:
        return (self._max_bytes - self._log_bytes) // self._page("page_size")

    @property
    def _log_bytes(self) -> int:
        """
        Return the part of the bound that is left for the write-ahead log.
        """
        return min(_MAX_LOG_BYTES, self._max_bytes // 4)

    def _recent(self, request_id: str, trace_id: str, service: str, limit: int) -> list[dict[str, Json]]:
        rows = self._db.execute(
            _RECENT, {"trace_id": trace_id.lower(), "request_id": request_id, "service": service, "limit": limit}
        )
        return [self._summary(row[0]) for row in rows.fetchall()]

    def _summary(self, trace_id: str) -> dict[str, Json]:
        one = (trace_id,)
        spans, failed, start, end = self._db.execute(
            "SELECT count(*), coalesce(sum(failed), 0), min(start_ns), max(end_ns) FROM spans WHERE trace_id = ?", one
        ).fetchone()
        logs, first_log = self._db.execute("SELECT count(*), min(time_ns) FROM logs WHERE trace_id = ?", one).fetchone()
        early = self._db.execute(
            "SELECT head FROM spans WHERE trace_id = ? ORDER BY start_ns LIMIT ?", (trace_id, _ENTRY_CANDIDATES)
        )
        begin = entry(Trace.of(trace_id, (span_from_json(json.loads(row[0])) for row in early), ()))
        both = (
            "SELECT {0} FROM (SELECT {0}, start_ns AS t FROM spans WHERE trace_id = :trace_id UNION ALL"
            " SELECT {0}, time_ns FROM logs WHERE trace_id = :trace_id)"
            " WHERE {0} <> '' GROUP BY {0} ORDER BY min(t) LIMIT 20"
        )
        return {
            "trace_id": trace_id,
            "entry": None if begin is None else span_to_json(begin),
            "request_ids": [row[0] for row in self._db.execute(both.format("request_id"), {"trace_id": trace_id})],
            "services": [row[0] for row in self._db.execute(both.format("service"), {"trace_id": trace_id})],
            "start_ns": str(first_log if start is None else start),
            "duration_ns": str(end - start if spans else 0),
            "spans": spans,
            "logs": logs,
            "errors": failed,
        }

    def _trace(self, trace_id: str) -> Trace | None:
        one = (trace_id.lower(),)
        spans = self._db.execute("SELECT data FROM spans WHERE trace_id = ?", one).fetchall()
        logs = self._db.execute("SELECT data FROM logs WHERE trace_id = ?", one).fetchall()
        if not spans and not logs:
            return None
        return Trace.of(
            one[0],
            (span_from_json(json.loads(row[0])) for row in spans),
            (log_from_json(json.loads(row[0])) for row in logs),
        )

    def _find(self, wanted: str) -> list[Trace]:
        bits = to_trace_id(wanted)
        trace_id = "" if bits is None else f"{bits:032x}"
        rows = self._db.execute(_FIND, {"trace_id": trace_id, "request_id": wanted, "limit": MAX_FOUND}).fetchall()
        found: list[Trace] = []
        left = MAX_FOUND_BYTES
        for name, size in rows:
            left -= size
            if found and left < 0:
                break
            trace = self._trace(name)
            if trace is not None:
                found.append(trace)
        return found


def _head(span: Span) -> dict[str, Json]:
    """
    Return what the list of traces tells of ``span``: short texts and numbers, whatever was sent.
    """
    told: dict[str, Json] = {}
    for name in _IN_LIST:
        value = span.attributes.get(name)
        if isinstance(value, str):
            told[name] = value[:_MAX_TEXT]
        elif type(value) is int:
            told[name] = value
    cut = replace(span, service=span.service[:_MAX_TEXT], name=span.name[:_MAX_TEXT], status_message="")
    return span_to_json(replace(cut, attributes=told, events=(), links=()))


def _id(request_id: str) -> str:
    """
    Return what a row is found by; a text that is no id is kept in the row, and nothing is found by it.
    """
    return request_id if len(request_id) <= _MAX_TEXT else ""


def _dump(value: dict[str, Json]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
