"""
What is stored: plain, blocking sqlite3. Every row says which request wrote it.
"""

from __future__ import annotations

import logging
import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry import trace

from otel_correlation import request_id

if TYPE_CHECKING:
    from collections.abc import Iterator

tracer = trace.get_tracer("layers.repositories")

SCHEMA = """
CREATE TABLE IF NOT EXISTS stock (sku TEXT PRIMARY KEY, on_hand INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS orders (
    number INTEGER PRIMARY KEY, reference TEXT NOT NULL, sku TEXT NOT NULL, price INTEGER NOT NULL, request_id TEXT
);
CREATE TABLE IF NOT EXISTS audit (reference TEXT NOT NULL, what TEXT NOT NULL, request_id TEXT);
INSERT OR IGNORE INTO stock VALUES ('lamp', 1000000), ('desk', 3);
"""


class Repository:
    def __init__(self, path: str) -> None:
        self._path = path
        self.log = logging.getLogger(f"layers.repositories.{type(self).__name__}")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self._path, timeout=60)
        try:
            with connection:
                yield connection
        finally:
            connection.close()

    def create_tables(self) -> None:
        with self.transaction() as connection:
            connection.executescript("PRAGMA journal_mode = WAL;" + SCHEMA)


class StockRepository(Repository):
    def take(self, sku: str, reference: str) -> bool:
        with tracer.start_as_current_span("stock.take", attributes={"reference": reference}):
            with self.transaction() as connection:
                changed = connection.execute(
                    "UPDATE stock SET on_hand = on_hand - 1 WHERE sku = ? AND on_hand > 0", (sku,)
                ).rowcount
            self.log.info("took %d x %s for %s", changed, sku, reference)
            return changed == 1


class OrderRepository(Repository):
    def add(self, reference: str, sku: str, price: int) -> int:
        with tracer.start_as_current_span("orders.add", attributes={"reference": reference}):
            with self.transaction() as connection:
                number = connection.execute(
                    "INSERT INTO orders (reference, sku, price, request_id) VALUES (?, ?, ?, ?)",
                    (reference, sku, price, request_id()),
                ).lastrowid
            self.log.info("stored %s", reference)
            return number or 0

    def find(self, number: int) -> dict[str, object] | None:
        with tracer.start_as_current_span("orders.find"), self.transaction() as connection:
            connection.row_factory = sqlite3.Row
            row = connection.execute("SELECT * FROM orders WHERE number = ?", (number,)).fetchone()
        self.log.info("order %d is %s", number, "there" if row else "not there")
        return dict(row) if row else None


class AuditRepository(Repository):
    def add(self, reference: str, what: str) -> None:
        with tracer.start_as_current_span("audit.add", attributes={"reference": reference}):
            with self.transaction() as connection:
                connection.execute("INSERT INTO audit VALUES (?, ?, ?)", (reference, what, request_id()))
            self.log.info("%s was %s", reference, what)
