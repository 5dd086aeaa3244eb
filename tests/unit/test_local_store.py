"""
The embedded store: what is found by which id, what is kept once, and what goes first when it is full.
"""

from __future__ import annotations

import sqlite3
import stat
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otel_correlation.local import store as store_module
from otel_correlation.local.store import LocalStore, StoreFileError
from otel_correlation.request_id import to_trace_id
from otel_correlation.semconv import CALLER_REQUEST_ID
from tests.local_payloads import REQUEST_ID, TRACE_ID, checkout, log, span

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from otel_correlation.stores import Span


@pytest.fixture
def store() -> Iterator[LocalStore]:
    with_bounds = LocalStore(max_rows=20, max_trace_rows=9)
    yield with_bounds
    with_bounds.close()


def keep(store: LocalStore, *spans: Span) -> None:
    store.add(spans, ()).result()


def root(number: int, request_id: str = "", **more: object) -> Span:
    made = span("a", "", "s", "n", "SERVER", (number, number + 1), trace_id=f"{number:032x}")
    return replace(made, **{"attributes": {"request_id": request_id} if request_id else {}, **more})  # type: ignore[arg-type]


def test_a_trace_is_found_by_both_ids(store: LocalStore) -> None:
    """
    The request id, the trace id in any case, and the trace id as a UUID find the same trace, whole and in order.
    """
    trace = checkout()
    store.add(tuple(reversed(trace.spans)), tuple(reversed(trace.logs))).result()
    dashed = f"{TRACE_ID[:8]}-{TRACE_ID[8:12]}-{TRACE_ID[12:16]}-{TRACE_ID[16:20]}-{TRACE_ID[20:]}"
    for wanted in (REQUEST_ID, TRACE_ID, TRACE_ID.upper(), dashed):
        assert store.find(wanted).result() == [trace], wanted
    assert store.trace(TRACE_ID.upper()).result() == trace


def test_an_id_finds_every_trace_that_carries_it(store: LocalStore) -> None:
    """
    A trace that the id leads to by the contract comes first, then those that carry it as an attribute, newest first.
    """
    wanted = "order-7781-customer-quote"
    keep(store, root(1, wanted), root(2, "other-id"), root(3, wanted))
    bits = to_trace_id(wanted)
    assert bits is not None
    keep(store, replace(root(4), trace_id=f"{bits:032x}"), root(5, "other-id"))
    assert [trace.trace_id for trace in store.find(wanted).result()] == [f"{bits:032x}", f"{3:032x}", f"{1:032x}"]


def test_log_lines_alone_are_found(store: LocalStore) -> None:
    """
    A request that was not sampled has log lines and no spans, and is found all the same.
    """
    store.add((), (log(1, "gateway", "hello"),)).result()
    (found,) = store.find(REQUEST_ID).result()
    assert (len(found.spans), [line.body for line in found.logs]) == (0, ["hello"])
    (summary,) = store.recent().result()
    assert (summary["entry"], summary["logs"], summary["services"]) == (None, 1, ["gateway"])


def test_nothing_is_found_by_an_empty_or_unknown_id(store: LocalStore) -> None:
    """
    Spans without a request id do not match the empty one.
    """
    keep(store, root(1))
    assert store.find("").result() == []
    assert store.find("unknown").result() == []
    assert store.trace("f" * 32).result() is None


def test_what_arrives_twice_is_kept_once(store: LocalStore) -> None:
    """
    Delivery is at-least-once: a batch sent again changes nothing but a counter.
    """
    trace = checkout()
    for _ in range(2):
        store.add(trace.spans, trace.logs).result()
    assert store.find(REQUEST_ID).result() == [trace]
    assert (store.counts.rows, store.counts.duplicates) == (8, 8)


def test_the_oldest_trace_goes_first_and_whole(store: LocalStore) -> None:
    """
    Beyond the bound the trace that began to arrive first is dropped with all its parts, and both are counted.
    """
    store.add(checkout().spans, checkout().logs).result()
    keep(store, *(root(number) for number in range(1, 14)))
    assert store.find(REQUEST_ID).result() == []
    assert store.counts.rows == 13
    assert (store.counts.dropped_traces, store.counts.dropped_rows) == (1, 8)


def on_disk(path: Path) -> int:
    """
    Returns the bytes of the database and of every file beside it.
    """
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


@pytest.mark.parametrize("size", [0, 3000, 300_000])
def test_bytes_are_bounded_as_they_lie_on_disk(size: int, tmp_path: Path) -> None:
    """
    Pages, indexes and the write-ahead log count: after each batch the files are within the bound, the newest kept.

    Rows with little text are mostly index; few rows with much in them are dropped as many with little would be.
    """
    path = tmp_path / "spans.db"
    bound = 2_000_000
    store = LocalStore(str(path), max_bytes=bound)
    for batch in range(30):
        spans = [root(batch * 1000 + number + 1, f"request-{batch}-{number}") for number in range(3 if size else 300)]
        keep(store, *(replace(one, attributes={**one.attributes, "text": "x" * size}) for one in spans))
        assert on_disk(path) <= store.counts.bytes <= bound
    assert len(store.find("request-29-0").result()) == 1
    if size != 3000:
        assert store.counts.dropped_traces
        assert store.find("request-0-0").result() == []
    store.close()


def test_a_file_is_its_owners_alone(tmp_path: Path) -> None:
    """
    Telemetry is other people's data: the database and the files beside it have mode 0600, one that was open to all too.
    """
    path = tmp_path / "spans.db"
    for _ in range(2):
        store = LocalStore(str(path))
        keep(store, root(1))
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
        store.close()
        assert modes["spans.db"] == 0o600
        assert set(modes.values()) == {0o600}
        path.chmod(0o644)


def test_a_row_or_a_trace_of_megabytes_is_counted_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    One span cannot fill the store, nor can one trace make an answer that nobody can read; an id has its newest traces.
    """
    store = LocalStore()
    keep(store, root(1, attributes={"text": "x" * store_module.MAX_ROW_BYTES}))
    assert (store.counts.rows, store.counts.over_size) == (0, 1)
    monkeypatch.setattr(store_module, "MAX_TRACE_BYTES", 3000)
    keep(store, *(replace(root(2), span_id=f"{number:016x}", name="x" * 700) for number in range(1, 6)))
    assert (store.counts.rows, store.counts.over_trace_limit) == (3, 2)
    monkeypatch.setattr(store_module, "MAX_FOUND_BYTES", 3000)
    keep(store, *(root(number, "one-id", name="x" * 800) for number in range(3, 9)))
    assert [trace.trace_id[-1] for trace in store.find("one-id").result()] == ["8", "7"]
    store.close()


@pytest.mark.parametrize("name", ["http.request.method", "http.route", "url.path", "http.response.status_code"])
def test_the_list_tells_plain_values_only(store: LocalStore, name: str) -> None:
    """
    A map, a list or a text of megabytes where the page looks for a word does not make it into the list.
    """
    for number, value in enumerate(({"toString": 1}, ["GET"], None, True, "x" * 500_000), start=1):
        keep(store, root(number, attributes={name: value}))
    for summary in store.recent().result():
        entry = summary["entry"]
        assert isinstance(entry, dict)
        assert entry["attributes"] in ({}, {name: "x" * 200})


def test_one_endless_trace_does_not_push_out_the_others(store: LocalStore) -> None:
    """
    Beyond a bound of its own, a trace's further parts are counted and not kept.
    """
    keep(store, root(1, "kept-id"))
    endless = [span(f"{number:x}", "", "s", "n", "SERVER", (0, 1)) for number in range(1, 16)]
    keep(store, *endless)
    assert store.counts.over_trace_limit == 6
    assert len(store.find("kept-id").result()) == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 15), st.integers(0, 400)), max_size=60))
def test_counts_agree_with_the_tables_whatever_arrives(parts: list[tuple[int, int, int]]) -> None:
    """
    Rows as counted are what the tables hold, within the bounds, for any order of arrival.
    """
    store = LocalStore(max_rows=10, max_trace_rows=6)
    try:
        for trace_number, span_number, size in parts:
            keep(store, replace(root(trace_number), span_id=f"{span_number:016x}", name="x" * size))
        traces = [store.trace(str(summary["trace_id"])).result() for summary in store.recent(limit=200).result()]
        assert sum(len(trace.spans) for trace in traces if trace) == store.counts.rows <= 10
    finally:
        store.close()


def test_what_a_stranger_sent_finds_its_trace(store: LocalStore) -> None:
    """
    The request id of a caller that was not trusted finds the trace that was made instead, beside the one it names.
    """
    wanted = "order-7781-customer-quote"
    keep(store, root(1, wanted), root(2, attributes={CALLER_REQUEST_ID: wanted, "request_id": "made-instead"}), root(3))
    found = store.find(wanted).result()
    assert [(trace.trace_id[-1], trace.request_ids, trace.caller_request_ids) for trace in found] == [
        ("2", ("made-instead",), (wanted,)),
        ("1", (wanted,), ()),
    ]


def test_recent_traces_can_be_narrowed(store: LocalStore) -> None:
    """
    The newest come first; request id, trace id and service narrow them, together if several are given.
    """
    keep(store, root(1, "one"), root(2, "two", service="other"), root(3, "two"))

    def listed(**conditions: str) -> list[str]:
        return [str(summary["trace_id"])[-1] for summary in store.recent(**conditions).result()]  # type: ignore[arg-type]

    assert listed() == ["3", "2", "1"]
    assert listed(request_id="two") == ["3", "2"]
    assert listed(request_id="two", service="other") == ["2"]
    assert listed(trace_id=f"{1:032X}") == ["1"]
    assert listed(service="nobody") == []
    assert len(store.recent(limit=2).result()) == 2


def test_a_summary_tells_the_request(store: LocalStore) -> None:
    """
    The list shows what began the trace, who took part and what failed, without the whole trace.
    """
    store.add(checkout().spans, checkout().logs).result()
    (summary,) = store.recent().result()
    entry = summary.pop("entry")
    assert isinstance(entry, dict)
    assert entry["name"] == "POST /checkout"
    assert summary == {
        "trace_id": TRACE_ID,
        "request_ids": [REQUEST_ID],
        "services": ["gateway", "orders", "inventory"],
        "start_ns": str(checkout().spans[0].start_ns),
        "duration_ns": "100000000",
        "spans": 5,
        "logs": 3,
        "errors": 5,
    }


def test_a_file_keeps_what_was_received(tmp_path: Path) -> None:
    """
    A store that is opened again answers as before, and goes on counting from there.
    """
    path = str(tmp_path / "spans.db")
    first = LocalStore(path)
    first.add(checkout().spans, checkout().logs).result()
    first.close()
    second = LocalStore(path)
    assert second.find(REQUEST_ID).result() == [checkout()]
    assert second.counts.rows == 8
    assert second.counts.bytes >= on_disk(tmp_path / "spans.db")
    second.close()


def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    """
    Somebody else's database, a file of text, a folder and a file in use each give one clear line.
    """
    foreign = tmp_path / "foreign.db"
    connection = sqlite3.connect(foreign)
    connection.execute("CREATE TABLE theirs (x)")
    connection.commit()
    connection.close()
    text = tmp_path / "text.db"
    text.write_text("no database, " * 1000)
    used = LocalStore(str(tmp_path / "used.db"))
    for path in (foreign, text, tmp_path, tmp_path / "used.db"):
        before = path.read_bytes() if path.is_file() else b""
        with pytest.raises(StoreFileError, match=str(path)):
            LocalStore(str(path))
        assert not path.is_file() or path.read_bytes() == before
    used.close()


def test_threads_share_one_store() -> None:
    """
    Batches from many threads at once are all kept, none twice.
    """
    store = LocalStore()

    def send(sender: int) -> None:
        for number in range(20):
            keep(store, root(sender * 100 + number + 1))

    threads = [threading.Thread(target=send, args=(sender,)) for sender in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.counts.rows == 160
    store.close()


def test_a_batch_that_cannot_be_written_leaves_nothing(store: LocalStore) -> None:
    """
    A failure in the middle of a batch undoes the batch, its counts too, and the next one is taken.
    """
    keep(store, root(1))
    with pytest.raises(UnicodeEncodeError):
        keep(store, root(2), root(3, name="\ud800"))
    assert store.counts.rows == 1
    keep(store, root(4))
    assert [str(summary["trace_id"])[-1] for summary in store.recent().result()] == ["4", "1"]
