"""
``otel-correlation find`` as the on-call engineer reads it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from otel_correlation.cli import main
from otel_correlation.cli.find import tell
from otel_correlation.cli.terminal import Screen
from otel_correlation.local import LocalServer
from otel_correlation.semconv import CALLER_REQUEST_ID
from otel_correlation.stores import Store, Trace
from otel_correlation.stores.jaeger import JaegerStore
from otel_correlation.stores.tempo import TempoStore
from tests.http_answers import http_server
from tests.local_payloads import REQUEST_ID, TRACE_ID, checkout, exception, log, span

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FOUND, NOT_FOUND, FAILED = 0, 1, 2
CONTROL = re.compile(r"[^\n\x20-\x7e\u00a0-\u200a\u2010-\u2027\u202f-\u2064\u2070-\ufefe]")


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServer]:
    with LocalServer(port=0) as running:
        monkeypatch.setenv("OTEL_CORRELATION_STORES", running.url)
        yield running


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["find", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_story_is_told_in_order(local: LocalServer, capsys: pytest.CaptureFixture[str]) -> None:
    """
    First the request and its ids, then the cause, the waterfall, the log lines by time, and where it looked.
    """
    local.store.add(checkout().spans, checkout().logs).result()
    status, out, err = told(capsys, REQUEST_ID)
    assert (status, err) == (FOUND, "")
    expected = [
        "POST /checkout 502  100.0 ms",
        f"request id  {REQUEST_ID}",
        f"trace id    {TRACE_ID}",
        "Cause",
        "inventory  /srv/inventory.py:24 in days_left",
        "ZeroDivisionError: integer division or modulo by zero",
        "Waterfall",
        "gateway  POST /checkout",
        "orders  POST /orders",
        "inventory  POST /reservations",
        "Log lines (3)",
        "checkout of 1 x chair",
        "reserving 1 of 25 x chair",
        "no order was made",
        f"Looked in the embedded store at {local.url}: 1 trace, 5 spans, 3 log lines",
        "Next: ",
    ]
    places = [out.find(text) for text in expected]
    assert -1 not in places, expected[places.index(-1)]
    assert places == sorted(places)


def test_what_a_stranger_sent_is_told(local: LocalServer, capsys: pytest.CaptureFixture[str]) -> None:
    """
    The request id that a restarted caller sent finds its request, and is told apart from the one it got.
    """
    spans = checkout().spans
    stranger = {**spans[0].attributes, CALLER_REQUEST_ID: "quoted-in-a-ticket"}
    local.store.add((replace(spans[0], attributes=stranger), *spans[1:]), ()).result()
    status, out, _ = told(capsys, "quoted-in-a-ticket")
    assert status == FOUND
    assert f"request id  {REQUEST_ID}\ncaller sent quoted-in-a-ticket (not trusted)\n" in out


def test_the_trace_id_and_pasted_blanks_do_as_well(local: LocalServer, capsys: pytest.CaptureFixture[str]) -> None:
    """
    Either id leads to the same story, however it was pasted.
    """
    local.store.add(checkout().spans, ()).result()
    assert told(capsys, f" {TRACE_ID.upper()}\n")[0] == FOUND


def test_nothing_of_the_telemetry_acts_on_the_terminal(local: LocalServer, capsys: pytest.CaptureFixture[str]) -> None:
    """
    Escape sequences, carriage returns, line separators, direction marks and rich's markup are shown, never obeyed.
    """
    evil = "\x1b]0;owned\x07\x1b[2J\r\x9b31m[red]x[/red]\u202ekcab\u2028\u200b:smile:\ud800".encode(
        "utf-8", "replace"
    ).decode()
    local.store.add(
        (
            replace(
                span(
                    "a", "", f"s{evil}", f"name{evil}", "SERVER", (0, 1), failed=True, attributes={"http.route": evil}
                ),
                events=(exception(1, evil, f"first\n{evil}", f'  File "{evil}", line 1, in f'),),
                status_message=evil,
            ),
        ),
        (log(0, f"l{evil}", f"one{evil}\ntwo{evil}", severity=evil, attributes={"exception.type": evil}),),
    ).result()
    status, out, _ = told(capsys, REQUEST_ID)
    assert status == FOUND
    assert CONTROL.findall(out) == []
    assert r"\x1b]0;owned\x07" in out
    assert "[red]x[/red]" in out
    assert ":smile:" in out
    assert CONTROL.findall(told(capsys, REQUEST_ID, "--json")[1]) == []


def test_a_long_line_is_not_wrapped_or_cut(local: LocalServer, capsys: pytest.CaptureFixture[str]) -> None:
    """
    Output that goes into a ticket or through grep keeps a log line on one line.
    """
    body = "word " * 100 + "end"
    local.store.add((), (log(1, "s", body),)).result()
    assert body in told(capsys, REQUEST_ID)[1]


def test_json_is_for_machines(local: LocalServer, capsys: pytest.CaptureFixture[str]) -> None:
    """
    ``--json`` prints one document with everything and nothing else.
    """
    local.store.add(checkout().spans, checkout().logs).result()
    status, out, _ = told(capsys, REQUEST_ID, "--json")
    answer = json.loads(out)
    assert status == FOUND
    assert (answer["id"], len(answer["traces"]), answer["errors"]) == (REQUEST_ID, 1, [])
    (trace,) = answer["traces"]
    assert (len(trace["spans"]), len(trace["logs"]), trace["cause"]["service"]) == (5, 3, "inventory")
    assert told(capsys, "unknown-unknown-unknown", "--json")[0] == NOT_FOUND


def test_several_traces_of_one_id(local: LocalServer, capsys: pytest.CaptureFixture[str]) -> None:
    """
    Short ids repeat: the newest three are told in full, the rest as one line each.
    """
    for number in range(1, 6):
        made = span("a", "", "s", f"call {number}", "SERVER", (number, number + 1), trace_id=f"{number:032x}")
        local.store.add((replace(made, attributes={"request_id": "42"}),), ()).result()
    status, out, _ = told(capsys, "42")
    assert status == FOUND
    assert out.count("Waterfall") == 3
    assert out.index("call 5") < out.index("call 4") < out.index("call 3") < out.index("Also for 42")
    assert f"{1:032x}  call 1" in out


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("42", "fewer than 16 characters"),
        ("order-7781-customer-quote", "2c067d76d971e5850bb82d8a96aa53dc"),
        ("me@example.com", "no valid request id"),
        ("ü", "no valid request id"),
    ],
)
def test_what_is_not_found_says_why(
    local: LocalServer, capsys: pytest.CaptureFixture[str], wanted: str, reason: str
) -> None:
    """
    Status 1, where it looked, and the likely reasons for this very id.
    """
    status, out, err = told(capsys, wanted)
    assert (status, err) == (NOT_FOUND, "")
    assert reason in out
    assert local.url in out
    assert "sampled" in out


def test_a_chain_of_thousands_of_spans_stays_on_the_screen(
    local: LocalServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    Each span is a line of about the screen's width, however deep it lies, and attributes that are no words are left out.
    """
    spans = tuple(
        replace(
            span("a", "", "s", "GET", "CLIENT", (n, 3000)),
            span_id=f"{n:016x}",
            parent_id=f"{n - 1:016x}" if n > 1 else "",
            attributes={"request_id": REQUEST_ID, "http.request.method": "GET", "http.route": {"a": ["b"]}},
        )
        for n in range(1, 2001)
    )
    line = log(0, "s", "x", attributes={"exception.type": {"a": 1}, "exception.message": ["b"]})
    local.store.add(spans, (line,)).result()
    status, out, _ = told(capsys, REQUEST_ID)
    assert status == FOUND
    assert out.count("━") >= 2000
    assert max(map(len, out.splitlines())) < 200
    assert "{" not in out


def test_a_store_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    Status 2 and one line that names the address and what to do.
    """
    with LocalServer(port=0) as gone:
        monkeypatch.setenv("OTEL_CORRELATION_STORES", gone.url)
    status, out, err = told(capsys, REQUEST_ID)
    assert (status, out, err.count("\n")) == (FAILED, "", 1)
    assert gone.url in err
    assert "otel-correlation serve" in err


def test_one_store_of_two_is_enough(
    local: LocalServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    What is found is told although another store is down, and that is said.
    """
    monkeypatch.setenv("OTEL_CORRELATION_STORES", f"jaeger=http://127.0.0.1:1, {local.url}")
    local.store.add(checkout().spans, ()).result()
    status, out, _ = told(capsys, REQUEST_ID)
    assert status == FOUND
    assert "Not complete: http://127.0.0.1:1 is not reachable" in out
    assert told(capsys, "unknown-unknown-unknown")[0] == FAILED


def test_wrong_usage_is_status_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """
    A wrong store, an empty id and a missing argument each give one line and status 2.
    """
    monkeypatch.setenv("OTEL_CORRELATION_STORES", "zipkin=http://127.0.0.1:1")
    for arguments in ((REQUEST_ID,), (" ",)):
        status, out, err = told(capsys, *arguments)
        assert (status, out, err.count("\n")) == (FAILED, "", 1)
    with pytest.raises(SystemExit) as stopped:
        main(["find"])
    assert stopped.value.code == FAILED


def test_a_reader_that_has_seen_enough_is_no_error(local: LocalServer) -> None:
    """
    ``find ... | head -1`` ends quietly.
    """
    local.store.add((), tuple(log(number, "s", "x" * 1000) for number in range(2000))).result()
    command = [
        sys.executable,
        "-c",
        "from otel_correlation.cli import main; raise SystemExit(main())",
        "find",
        REQUEST_ID,
    ]
    with subprocess.Popen(
        command, env={**os.environ}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


@pytest.mark.parametrize("missing", ["rich", "uvicorn", "httpx"])
@pytest.mark.parametrize("command", ["find x", "serve", "demo", "run -- true"])
def test_a_missing_extra_is_one_line(
    command: str, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    Without the extra [local] the command says what to install, with status 2; nothing is imported before that.
    """
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(command.split()) == FAILED
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"needs {missing}: python -m pip install 'otel-correlation[local]'" in err


def test_who_asks_stores_of_spans_alone_is_sent_elsewhere_for_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """
    Jaeger and Tempo hold no log lines, so services are not asked to send them there.
    """
    stores: list[Store] = [JaegerStore("http://127.0.0.1:1"), TempoStore("http://127.0.0.1:1")]
    tell(Screen(), REQUEST_ID, [Trace(TRACE_ID)], stores, [])
    out = capsys.readouterr().out
    assert f"Next: search for {REQUEST_ID} where your services' log lines go" in out
    assert "loki=URL or logs=FILES" in out


def test_log_files_alone_tell_the_story(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """
    Without any server: the lines of all services in order, the cause, and no advice about a viewer that is not there.
    """
    for service, text in (("gateway", "second"), ("orders", "first")):
        line = {"timestamp": f"2026-11-21T10:00:0{len(service)}Z", "message": text, "service_name": service}
        stack = {
            "exception": 'Traceback (most recent call last):\n  File "/srv/a.py", line 3, in f\n    x\nKeyError: 7'
        }
        ids = {"trace_id": TRACE_ID, "request_id": REQUEST_ID}
        (tmp_path / f"{service}.json").write_text(json.dumps({**line, **ids, **stack}) + f"\nwho has {REQUEST_ID}?")
    monkeypatch.setenv("OTEL_CORRELATION_STORES", f"logs={tmp_path}/*.json")
    status, out, err = told(capsys, TRACE_ID)
    assert (status, err) == (FOUND, "")
    expected = [
        "Log lines only: no store of spans was asked",
        f"request id  {REQUEST_ID}",
        "orders  /srv/a.py:3 in f",
        "KeyError: 7",
        "Log lines (4)",
        "first",
        "second",
        f"Looked in the log files {tmp_path}/*.json: 1 trace, 0 spans, 4 log lines",
        "--json`\n",
    ]
    places = [out.find(text) for text in expected]
    assert -1 not in places, expected[places.index(-1)]
    assert places == sorted(places)
    assert "viewer" not in out


def test_lines_that_name_no_trace_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """
    A short request id may be all that a service wrote, without a time: nothing is invented for what is missing.
    """
    (tmp_path / "legacy.log").write_text("request_id=42 gave up\n")
    monkeypatch.setenv("OTEL_CORRELATION_STORES", f"logs={tmp_path}/legacy.log")
    status, out, _ = told(capsys, "42")
    assert status == FOUND
    assert "trace id    none: no line names one" in out
    assert "\n                       legacy request_id=42 gave up\n" in out
    status, out, err = told(capsys, "nobody-has-seen-this")
    assert (status, err) == (NOT_FOUND, "")


def test_another_program_at_jaegers_address_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    What has no `/api/services` is no Jaeger, and its 404 does not mean that a request was not traced.
    """
    with http_server(lambda _path: (404, b"404 page not found")) as (url, _):
        monkeypatch.setenv("OTEL_CORRELATION_STORES", f"jaeger={url}")
        status, _, err = told(capsys, REQUEST_ID)
    assert status == FAILED
    assert f"{url} is something else than Jaeger (no /api/services there)" in err


def test_a_store_with_tenants_says_how_one_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    Loki and Tempo answer "no org id", which is the name of nothing that anybody sets here.
    """
    with http_server(lambda _path: (401, b"no org id\n")) as (url, _):
        monkeypatch.setenv("OTEL_CORRELATION_STORES", f"loki={url}")
        status, _, err = told(capsys, REQUEST_ID)
    assert status == FAILED
    assert "answered with status 401 (no org id: name the tenant, URL#TENANT)" in err


def test_a_file_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    No server is offered to somebody who named files, and an id that is no text is no traceback.
    """
    monkeypatch.setenv("OTEL_CORRELATION_STORES", "logs=/nowhere/*.json,tempo=http://:s3cret@127.0.0.1:1")
    status, out, err = told(capsys, "\udcff-what-a-terminal-made-of-it")
    assert (status, out, err.count("\n")) == (FAILED, "", 1)
    assert "/nowhere/*.json: there is no such log file; http://127.0.0.1:1 is not reachable" in err
    assert err.endswith("(set OTEL_CORRELATION_STORES)\n")
