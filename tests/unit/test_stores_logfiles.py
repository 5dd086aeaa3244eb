"""
Log files where they lie: globs, gzip, stdin, tracebacks of text, and files that are huge, broken or not there.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
from typing import TYPE_CHECKING

import pytest

from otel_correlation.semconv import LOG_PRESETS
from otel_correlation.stores import LogLine, StoreError, Trace, cause, configured, logfiles
from otel_correlation.stores.logfiles import LogFileStore

if TYPE_CHECKING:
    from pathlib import Path

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
REQUEST_ID = "customer-quote/2026#000123"
STACK = """Traceback (most recent call last):
  File "/srv/orders.py", line 7, in order
    check(7)
shop.OddError: seven is odd"""


def entry(message: str, **fields: str) -> str:
    at = fields.pop("timestamp", "2026-11-21T10:00:00.000Z")
    return json.dumps({"timestamp": at, "message": message, "trace_id": TRACE_ID, "request_id": REQUEST_ID, **fields})


def told(trace: Trace) -> list[str]:
    return [line.body for line in trace.logs]


def test_files_of_a_glob_are_one_story(tmp_path: Path) -> None:
    """
    Several services' files, rotated and compressed ones too, give the lines of one trace in order, with the cause.
    """
    (tmp_path / "gateway.json").write_text(f'{{"x": 1}}\n{entry("third", timestamp="2026-11-21T10:00:02Z")}\n')
    with gzip.open(tmp_path / "orders.json.1.gz", "wt") as file:
        file.write(entry("first") + "\n" + entry("second", exception=STACK, timestamp="2026-11-21T10:00:01Z"))
    (tmp_path / "directory.json").mkdir()
    (trace,) = LogFileStore(f"{tmp_path}/*.json*").find(REQUEST_ID)
    assert (trace.trace_id, told(trace)) == (TRACE_ID, ["first", "second", "third"])
    assert trace.services == ("orders", "gateway")
    why = cause(trace)
    assert why is not None
    assert (why.service, why.place, why.type) == ("orders", "/srv/orders.py:7 in order", "shop.OddError")


def test_one_file_is_named_as_it_is(tmp_path: Path) -> None:
    """
    A name with brackets that exists is a file, not a pattern; ``**`` goes through all directories.
    """
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "app[1].log").write_text(entry("x"))
    assert [told(trace) for trace in LogFileStore(str(tmp_path / "a" / "app[1].log")).find(TRACE_ID)] == [["x"]]
    assert [told(trace) for trace in LogFileStore(f"{tmp_path}/**/*.log").find(TRACE_ID)] == [["x"]]


@pytest.mark.parametrize("bar", ["", "  | "])
def test_a_traceback_belongs_to_the_line_before_it(tmp_path: Path, bar: str) -> None:
    """
    As logging prints it, and behind bars as our text lines have it; what comes after it does not.
    """
    stack = "".join(f"{bar}{row}\n" for row in STACK.splitlines())
    first = f"2026-11-21T10:00:00Z ERROR request_id={REQUEST_ID} failed"
    path = tmp_path / "orders.log"
    path.write_text(
        f"{first}\n{stack}10:00:01 INFO something else\n{first} again\n\nbut this is not\r\n{REQUEST_ID}\r\n"
    )
    (trace,) = LogFileStore(str(path)).find(REQUEST_ID)
    assert told(trace) == [first, f"{first} again", REQUEST_ID]
    line, again, last = trace.logs
    assert line.attributes["exception.type"] == "shop.OddError"
    assert line.attributes["exception.message"] == "seven is odd"
    assert "exception.type" not in again.attributes
    # A line without a time was written with the one before it.
    assert last.time_ns == again.time_ns > 0


def test_a_traceback_without_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A file that goes on indented for ever does not fill the memory.
    """
    monkeypatch.setattr(logfiles, "_MAX_FOLLOWING", 3)
    path = tmp_path / "orders.log"
    path.write_text(f"{REQUEST_ID}\n" + "  more\n" * 10)
    (trace,) = LogFileStore(str(path)).find(REQUEST_ID)
    assert trace.logs[0].attributes["exception.stacktrace"] == "  more\n  more\n  more"


def test_lines_across_blocks_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Wherever a block ends, every line is found once, a traceback over the seam included.
    """
    rows = [f"{number} {entry(f'line {number}')}" for number in range(5)]
    text = "\n".join([*rows, f"ERROR {REQUEST_ID}", *STACK.splitlines(), "x" * 50, entry("last")])
    path = tmp_path / "orders.log"
    path.write_text(text)
    for size in (1, 7, 64, 300, 10_000):
        monkeypatch.setattr(logfiles, "_BLOCK", size)
        (trace,) = LogFileStore(str(path)).find(TRACE_ID)
        assert told(trace) == [*(f"line {number}" for number in range(5)), "last"]
        (loose,) = (one for one in LogFileStore(str(path)).find(REQUEST_ID) if not one.trace_id)
        assert loose.logs[0].attributes["exception.type"] == "shop.OddError"


def test_a_line_of_megabytes_is_skipped_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A file without line feeds does not fill the memory; the lines around such a one are found.
    """
    monkeypatch.setattr(logfiles, "_BLOCK", 256)
    monkeypatch.setattr(logfiles, "MAX_LINE_BYTES", 1024)
    path = tmp_path / "orders.log"
    path.write_text(f"{entry('before')}\n{REQUEST_ID * 200}\n{entry('after')}\n{REQUEST_ID * 200}")
    with pytest.raises(StoreError, match="a line of more than 1024 bytes, which was skipped") as caught:
        LogFileStore(str(path)).find(REQUEST_ID)
    assert [told(trace) for trace in caught.value.traces] == [["before", "after"]]


def test_lines_without_end_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    What one id may bring up is bounded, and that there is more is said.
    """
    monkeypatch.setattr(logfiles, "MAX_LINES", 3)
    (tmp_path / "a.log").write_text(f"{entry('x')}\n" * 5)
    (tmp_path / "b.log").write_text(f"{entry('x')}\n" * 5)
    with pytest.raises(StoreError, match="more than 3 lines of it") as caught:
        LogFileStore(f"{tmp_path}/*.log").find(REQUEST_ID)
    assert [len(trace.logs) for trace in caught.value.traces] == [3]


def test_lines_of_megabytes_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Ten thousand lines may be of a megabyte each: their bytes have a bound of their own, with what follows each line.
    """
    monkeypatch.setattr(logfiles, "MAX_BYTES", 5000)
    monkeypatch.setattr(logfiles, "MAX_LINE_BYTES", 2000)
    path = tmp_path / "orders.log"
    path.write_text("".join(f"{REQUEST_ID} {number}\n" + f"  {'x' * 500}\n" * 10 for number in range(9)))
    with pytest.raises(StoreError, match="more than 5000 bytes of it") as caught:
        LogFileStore(str(path)).find(REQUEST_ID)
    (trace,) = caught.value.traces
    assert 0 < len(trace.logs) < 9
    assert all(len(str(line.attributes["exception.stacktrace"])) < 2000 for line in trace.logs)


def test_a_file_that_cannot_be_read_leaves_the_others(tmp_path: Path) -> None:
    """
    Compressed files that are none, or are cut off, are each named with the reason; the other lines are there.
    """
    (tmp_path / "a.json").write_text(entry("x"))
    (tmp_path / "b.gz").write_text("no gzip")
    (tmp_path / "c.gz").write_bytes(gzip.compress(os.urandom(100_000) + entry("y").encode())[:-2000])
    (tmp_path / "d.gz").write_bytes(gzip.compress(os.urandom(100))[:20] + b"\xff" * 50)
    with pytest.raises(StoreError) as caught:
        LogFileStore(f"{tmp_path}/*").find(TRACE_ID)
    assert [told(trace) for trace in caught.value.traces] == [["x"]]
    for name in ("b.gz", "c.gz", "d.gz"):
        assert f"{tmp_path}/{name} cannot be read" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["nothing.log", "*.log"])
def test_no_file_is_an_error(tmp_path: Path, pattern: str) -> None:
    """
    A pattern without files is more likely a mistake than an answer.
    """
    with pytest.raises(StoreError, match="there is no such log file"):
        LogFileStore(f"{tmp_path}/{pattern}").find(TRACE_ID)


def test_a_directory_is_one_clear_line(tmp_path: Path) -> None:
    """
    The operating system's own words are enough.
    """
    with pytest.raises(StoreError, match=r"cannot be read \(Is a directory\)$"):
        LogFileStore(str(tmp_path)).find(TRACE_ID)


def test_stdin_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    ``kubectl logs ... | otel-correlation find ID`` needs no file; what another store knows cannot be looked up there.
    """
    reading, writing = os.pipe()
    os.write(writing, f"{entry('x')}\n".encode())
    os.close(writing)
    with os.fdopen(reading) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        (store,) = configured(("logs=-",))
        (trace,) = store.find(REQUEST_ID)
        assert store.complete([Trace(TRACE_ID)]) == []
    assert (store.name, told(trace)) == ("the log lines on stdin", ["x"])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(StoreError, match="- cannot be read"):
        store.find(REQUEST_ID)


def test_known_traces_are_found_under_all_their_names(tmp_path: Path) -> None:
    """
    Lines of a trace that another store knows: by trace id under any preset, and a proxy's by the request id.
    """
    decimal = str(int(TRACE_ID[16:], 16))
    lines = [
        json.dumps({names.get("trace_id", "trace_id"): TRACE_ID, "message": preset})
        for preset, names in LOG_PRESETS.items()
    ]
    lines[-1] = json.dumps({"dd.trace_id": decimal, "message": "datadog"})
    (tmp_path / "a.log").write_text(
        "\n".join([*lines, f'{{"request_id": "{REQUEST_ID}", "message": "proxy"}}', decimal])
    )
    (known,) = LogFileStore(str(tmp_path / "a.log")).complete([Trace(TRACE_ID)])
    assert (known.trace_id, told(known)) == (TRACE_ID, ["otel", "ecs", "gcp", "datadog"])


def test_the_names_of_renamed_fields_are_known(tmp_path: Path) -> None:
    """
    ``OTEL_CORRELATION_LOG_FIELDS`` of the services tells what they call the ids.
    """
    (tmp_path / "a.log").write_text(json.dumps({"kennung": "42", "text": "x"}))
    item = f"logs={tmp_path}/a.log"
    assert configured((item,))[0].find("42") == []
    (trace,) = configured((item,), ("request_id=kennung", "message=text"))[0].find("42")
    assert told(trace) == ["x"]


def test_a_blank_line_with_a_carriage_return_ends_a_line(tmp_path: Path) -> None:
    """
    Logs of Windows have one behind every line, and one alone where a line is empty.
    """
    text = f"12:00:00 INFO trace_id={TRACE_ID} x\r\n\r\n  not of it\r\n"
    (tmp_path / "a.log").write_bytes(text.encode())
    (trace,) = LogFileStore(str(tmp_path / "a.log")).find(TRACE_ID)
    assert told(trace) == [text.partition("\r")[0]]
    assert "exception.stacktrace" not in trace.logs[0].attributes


def test_what_cannot_be_looked_at_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A name that the file system refuses (too long, or in a directory that is closed to us), and a stdin that is closed.
    """
    with pytest.raises(StoreError, match=r"no such log file$"):
        LogFileStore(f"/{'x' * 400}*.log").find(TRACE_ID)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(StoreError, match=r"- cannot be read \(it is closed\)$"):
        LogFileStore("-").find(TRACE_ID)


def test_a_pipe_among_log_files_is_not_waited_for(tmp_path: Path) -> None:
    """
    Reading one that nobody writes to would never end; a pattern takes what is a file.
    """
    os.mkfifo(tmp_path / "b.log")
    with pytest.raises(StoreError, match=r"no such log file$"):
        LogFileStore(f"{tmp_path}/*.log").find(TRACE_ID)
    (tmp_path / "a.log").write_text(entry("x"))
    (trace,) = LogFileStore(f"{tmp_path}/*.log").find(TRACE_ID)
    assert told(trace) == ["x"]


def test_an_id_that_is_no_text_is_not_looked_for(tmp_path: Path) -> None:
    """
    JSON of another store may hold half a character, which no file and no URL can.
    """
    (tmp_path / "a.log").write_text(entry("x"))
    line = LogLine(TRACE_ID, "", 1, "", "s", "", "", {"request_id": "\ud800" + "a" * 40})
    (trace,) = LogFileStore(str(tmp_path / "a.log")).complete([Trace(TRACE_ID, (), (line,))])
    assert told(trace) == ["x"]
