"""
structlog's events carry the ids in all three of its set-ups, with nothing to change in the application.
"""

from __future__ import annotations

import asyncio
import json
import logging
import logging.handlers
import queue
import re
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from structlog.stdlib import ProcessorFormatter

from otel_correlation import guard, identity, logs
from otel_correlation.logs import presets
from otel_correlation.logs.structlog import add_ids
from otel_correlation.settings import Settings
from tests.unit.logs_planted import PASSWORD, StatementError, fail
from tests.unit.logs_pristine import IDS, SPAN_TEXT, TRACE_TEXT, Keep, pristine, request

if TYPE_CHECKING:
    import io
    from collections.abc import Iterator

SETTINGS = Settings(service_name="orders")


@pytest.fixture(autouse=True)
def out() -> Iterator[io.StringIO]:
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    with pristine() as stream:
        logs.install(SETTINGS)
        yield stream
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def own_renderer(out: io.StringIO, *processors: Any, **settings: Any) -> None:
    """
    Set structlog up in its first way: it renders and prints by itself.
    """
    structlog.configure(
        processors=[*processors, structlog.processors.JSONRenderer()],
        logger_factory=structlog.PrintLoggerFactory(out),
        **settings,
    )


def read(out: io.StringIO) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    out.seek(0)
    out.truncate()
    return lines


# -- own renderer


def test_an_event_has_the_ids(out: io.StringIO) -> None:
    """
    With structlog's own renderer and logger each line has the five fields, after the event's own.
    """
    own_renderer(out)
    with request():
        structlog.get_logger().info("hello", customer=42)
    (line,) = read(out)
    assert line == {"customer": 42, "event": "hello", **IDS}


def test_outside_of_a_request_only_the_service_is_named(out: io.StringIO) -> None:
    """
    Empty ids are left out of an event, as out of our own lines.
    """
    own_renderer(out)
    structlog.get_logger().info("hello")
    assert read(out) == [{"event": "hello", "service_name": "orders"}]


@pytest.mark.parametrize("how", ["argument", "bind", "contextvars", "processor"])
def test_a_key_that_the_user_set_wins(how: str, out: io.StringIO) -> None:
    """
    Whoever puts ``request_id`` into an event keeps it: an argument, ``bind``, ``contextvars`` or a processor.
    """

    def processor(_: Any, __: str, event_dict: Any) -> Any:
        return {**event_dict, **({"request_id": "mine"} if how == "processor" else {})}

    own_renderer(out, structlog.contextvars.merge_contextvars, processor)
    logger = structlog.get_logger()
    with request():
        if how == "contextvars":
            structlog.contextvars.bind_contextvars(request_id="mine")
        if how == "bind":
            logger = logger.bind(request_id="mine")
        logger.info("hello", **({"request_id": "mine"} if how == "argument" else {}))
        bound = structlog.contextvars.get_contextvars()
    (line,) = read(out)
    assert line == {"event": "hello", **IDS, "request_id": "mine"}
    assert bound == ({"request_id": "mine"} if how == "contextvars" else {}), "contextvars are the user's"


def test_bound_fields_of_the_request_are_there(out: io.StringIO) -> None:
    """
    ``otel_correlation.bind`` reaches structlog's events and replaces nothing in them.
    """
    own_renderer(out)
    with request():
        identity.bind(tenant="acme", event="no", plan="gold")
        structlog.get_logger().info("hello", plan="free")
    (line,) = read(out)
    assert (line["tenant"], line["event"], line["plan"]) == ("acme", "hello", "free")


@pytest.mark.parametrize("cached", [True, False])
def test_loggers_older_than_us_are_covered(cached: bool, out: io.StringIO) -> None:
    """
    A logger that was bound and cached before we came, and one configured afterwards, have the ids.
    """
    logs.uninstall()
    own_renderer(out, cache_logger_on_first_use=cached)
    proxy = structlog.get_logger()
    bound = proxy.bind(a=1)
    bound.info("before")
    logs.install(SETTINGS)
    with request():
        proxy.info("proxy")
        bound.info("bound")
        own_renderer(out, structlog.processors.add_log_level)
        structlog.get_logger().info("after")
    assert [line.get("request_id") for line in read(out)] == [None, "order-7", "order-7", "order-7"]
    logs.uninstall()
    with request():
        bound.info("gone")
    assert read(out) == [{"a": 1, "event": "gone"}]


@pytest.mark.parametrize(
    "wrapper",
    [structlog.BoundLogger, structlog.make_filtering_bound_logger(logging.INFO), structlog.stdlib.BoundLogger],
)
def test_every_wrapper_class_is_covered(wrapper: Any, out: io.StringIO) -> None:
    """
    The generic, the filtering and the stdlib wrapper class have the ids; what is filtered stays filtered.
    """
    own_renderer(out, wrapper_class=wrapper)
    with request():
        structlog.get_logger().info("hello")
        if wrapper not in {structlog.BoundLogger, structlog.stdlib.BoundLogger}:
            structlog.get_logger().debug("filtered")
    assert read(out) == [{"event": "hello", **IDS}]


def test_asynchronous_methods_have_the_ids_of_their_caller(out: io.StringIO) -> None:
    """
    ``await log.ainfo(...)`` runs in a thread, with the ids of the request that awaits it.
    """
    own_renderer(out)

    async def one(number: int) -> None:
        with request(f"order-{number}"):
            await asyncio.sleep(0)
            await structlog.get_logger().ainfo("hello", number=number)

    async def main() -> None:
        await asyncio.gather(*(one(number) for number in range(20)))

    asyncio.run(main())
    lines = read(out)
    assert len(lines) == 20
    assert all(line["request_id"] == f"order-{line['number']}" for line in lines)


def test_the_callers_place_in_the_code_stays(out: io.StringIO) -> None:
    """
    ``CallsiteParameterAdder`` names the user's function, not one of ours.
    """
    own_renderer(out, structlog.processors.CallsiteParameterAdder())
    structlog.get_logger().info("hello")
    (line,) = read(out)
    assert (line["func_name"], line["module"]) == (
        "test_the_callers_place_in_the_code_stays",
        "test_logs_structlog",
    )


@pytest.mark.parametrize("renderer", ["console", "logfmt", "key_value", "custom", "text_after"])
def test_every_renderer_shows_the_ids(renderer: str, out: io.StringIO) -> None:
    """
    Other renderers, the user's own, and processors that work on rendered text see what they expect.
    """

    def custom(_: Any, __: str, event_dict: Any) -> str:
        return " ".join(f"{key}={value}" for key, value in event_dict.items())

    def shout(_: Any, __: str, text: str) -> str:
        return text.upper()

    chain: dict[str, list[Any]] = {
        "console": [structlog.dev.ConsoleRenderer(colors=False)],
        "logfmt": [structlog.processors.LogfmtRenderer()],
        "key_value": [structlog.processors.KeyValueRenderer(key_order=["request_id"], repr_native_str=False)],
        "custom": [custom],
        "text_after": [structlog.processors.LogfmtRenderer(), shout],
    }
    structlog.configure(processors=chain[renderer], logger_factory=structlog.PrintLoggerFactory(out))
    with request():
        structlog.get_logger().info("hello")
    text = out.getvalue()
    assert text.count("\n") == 1
    for value in ("order-7", TRACE_TEXT, SPAN_TEXT):
        assert text.lower().count(value) == 1


def test_dropped_events_stay_dropped(out: io.StringIO) -> None:
    """
    ``DropEvent`` from a processor ends an event without a line.
    """

    def drop(_: Any, __: str, event_dict: Any) -> Any:
        raise structlog.DropEvent

    own_renderer(out, drop)
    structlog.get_logger().info("hello")
    assert out.getvalue() == ""


def test_what_tests_capture_is_what_was_logged(out: io.StringIO) -> None:
    """
    ``capture_logs`` in a user's test sees the user's event, so that comparing it with ``==`` goes on to work.
    """
    own_renderer(out)
    with request(), structlog.testing.capture_logs() as captured:
        structlog.get_logger().info("hello", a=1)
    assert captured == [{"a": 1, "event": "hello", "log_level": "info"}]


def test_the_configuration_is_not_touched(out: io.StringIO) -> None:
    """
    ``get_config`` and a bound logger show the user's processors and nothing of ours.
    """
    own_renderer(out)
    before = structlog.get_config()["processors"]
    logger = structlog.get_logger().bind(a=1)
    with request():
        logger.info("hello")
    assert structlog.get_config()["processors"] is before
    assert len(before) == 1
    assert logger._processors is before


def test_the_processor_for_loggers_out_of_reach(out: io.StringIO) -> None:
    """
    Where a wrapper class runs the processors itself, ``add_ids`` does what we do elsewhere; together there is no double.
    """

    class Own(structlog.BoundLoggerBase):
        def info(self, event: str, **fields: Any) -> Any:
            event_dict: Any = {**self._context, **fields, "event": event}
            for processor in self._processors:
                event_dict = processor(self._logger, "info", event_dict)
            return self._logger.info(event_dict)

    with request():
        own_renderer(out, add_ids, wrapper_class=Own)
        structlog.get_logger().info("own")
        own_renderer(out, add_ids, wrapper_class=structlog.BoundLogger)
        structlog.get_logger().info("ours")
    assert read(out) == [{"event": name, **IDS} for name in ("own", "ours")]


# -- stdlib


def stdlib_renderer(processor: Any) -> None:
    structlog.configure(
        processors=[processor],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


@pytest.mark.parametrize("name", ["render_to_log_kwargs", "render_to_log_args_and_kwargs"])
def test_events_that_become_records_have_the_records_fields(name: str) -> None:
    """
    An event passed to logging as a record has the ids once, from the record, beside its own keys.
    """
    processor = getattr(structlog.stdlib, name, None)
    if processor is None:
        pytest.skip("this structlog has no such processor")
    stdlib_renderer(processor)
    kept = Keep(logs.JsonLines())
    logging.getLogger("app").addHandler(kept)
    with request():
        identity.bind(tenant="acme")
        structlog.get_logger("app").warning("hello", customer=42)
        structlog.get_logger("app").warning("mine", request_id="mine")
    first, second = (json.loads(line) for line in kept.lines)
    assert {name: first[name] for name in IDS} == IDS
    assert (first["message"], first["customer"], first["tenant"]) == ("hello", 42, "acme")
    assert not [name for name in first if name.startswith("extra.")]
    assert second["request_id"] == "mine"


def test_text_rendered_for_logging_has_the_ids_once() -> None:
    """
    With structlog's JSON as the message of a record, the JSON has the ids.
    """
    stdlib_renderer(structlog.processors.JSONRenderer())
    kept = Keep(logging.Formatter("%(message)s"))
    logging.getLogger("app").addHandler(kept)
    with request():
        structlog.get_logger("app").warning("hello")
    assert json.loads(kept.lines[0]) == {"event": "hello", **IDS}


# -- ProcessorFormatter


def processor_formatter(*before: Any, renderer: Any = None, foreign: Any = ()) -> Keep:
    stdlib_renderer(ProcessorFormatter.wrap_for_formatter)
    formatter = ProcessorFormatter(
        processors=[
            ProcessorFormatter.remove_processors_meta,
            *before,
            renderer or structlog.processors.JSONRenderer(),
        ],
        foreign_pre_chain=list(foreign),
    )
    kept = Keep(formatter)
    logging.getLogger("app").addHandler(kept)
    return kept


def test_the_formatter_shows_the_ids_of_both_kinds_of_lines() -> None:
    """
    ``ProcessorFormatter`` renders structlog's events and logging's records, each with the ids and bound fields, once.
    """
    kept = processor_formatter()
    with request():
        identity.bind(tenant="acme")
        structlog.get_logger("app").warning("hello", a=1)
        logging.getLogger("app").warning("plain %s", 1)
    expected = {**IDS, "tenant": "acme"}
    assert [json.loads(line) for line in kept.lines] == [
        {"a": 1, "event": "hello", **expected},
        {"event": "plain 1", **expected},
    ]


def test_a_formatter_with_one_processor_is_covered() -> None:
    """
    ``ProcessorFormatter(processor=...)``, the older form, shows the ids.
    """
    stdlib_renderer(ProcessorFormatter.wrap_for_formatter)
    kept = Keep(ProcessorFormatter(processor=structlog.dev.ConsoleRenderer(colors=False)))
    logging.getLogger("app").addHandler(kept)
    with request():
        structlog.get_logger("app").warning("hello")
        logging.getLogger("app").warning("plain")
    assert [line.count("order-7") for line in kept.lines] == [1, 1]


def test_the_users_keys_win_in_foreign_records() -> None:
    """
    What ``extra`` or a processor of the pre-chain says about a foreign record stays, and nothing is there twice.
    """
    kept = processor_formatter(foreign=[structlog.stdlib.ExtraAdder()])
    with request():
        logging.getLogger("app").warning("plain", extra={"request_id": "mine"})
    line = json.loads(kept.lines[0])
    line.pop("correlation_id", None)  # where asgi-correlation-id is installed
    assert line == {"event": "plain", **IDS, "request_id": "mine"}


@pytest.mark.parametrize("preset", ["otel", "ecs", "gcp", "datadog"])
def test_extra_adder_makes_no_doubles(preset: Any) -> None:
    """
    With ``ExtraAdder`` a foreign record shows each id once, under the preset's name, and no empty one.
    """
    logs.install(Settings(service_name="orders", log_preset=preset))
    kept = processor_formatter(foreign=[structlog.stdlib.ExtraAdder()])
    with request():
        logging.getLogger("app").warning("plain", extra={"z": 1})
    logging.getLogger("app").warning("outside")
    inside, outside = (json.loads(line) for line in kept.lines)
    for line in (inside, outside):
        line.pop("correlation_id", None)
    names = presets.build(Settings(log_preset=preset), {})
    assert set(inside) == {"event", "z", *names.id_keys}
    assert set(outside) == {"event", names.keys["service_name"]}


def test_behind_a_queue_lines_keep_their_ids() -> None:
    """
    A formatter in a ``QueueListener`` shows the ids of where the line was written, for both kinds of lines.
    """
    kept = processor_formatter()
    logger = logging.getLogger("app")
    logger.removeHandler(kept)
    records: queue.Queue[logging.LogRecord] = queue.Queue()
    handler = logging.handlers.QueueHandler(records)
    handler.prepare = lambda record: record  # type: ignore[method-assign] # as structlog's documentation has it
    logger.addHandler(handler)
    with request():
        structlog.get_logger("app").warning("hello")
        logger.warning("plain")
    listener = logging.handlers.QueueListener(records, kept)
    with request("another", trace_id=5):
        listener.start()
        listener.stop()
    assert [json.loads(line) for line in kept.lines] == [{"event": text, **IDS} for text in ("hello", "plain")]


def test_the_line_of_an_escaped_exception_has_its_requests_ids() -> None:
    """
    What the server logs after the request's context is gone has its ids in structlog's rendering, too.
    """
    kept = processor_formatter(structlog.processors.format_exc_info)
    try:
        with request():
            try:
                raise ValueError("boom")
            except ValueError as error:
                identity.stash(error)
                raise
    except ValueError as error:
        logging.getLogger("app").exception("Exception in ASGI application")
        structlog.get_logger("app").error("seen", exc_info=error)
    assert [json.loads(line)["request_id"] for line in kept.lines] == ["order-7", "order-7"]


# -- exceptions


KINDS = ["pydantic", "sqlalchemy", "cause", "group"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["format_exc_info", "dict_tracebacks", "console", "unrendered", "argument"])
def test_exceptions_lose_what_a_user_sent(way: str, kind: str, out: io.StringIO) -> None:
    """
    A planted password is in no line: tracebacks as text, as structure, by the console renderer, by a custom one.
    """

    def custom(_: Any, __: str, event_dict: Any) -> str:
        return repr(event_dict["exc_info"][1]) + str(event_dict["exc_info"][1])

    plain = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    tracebacks = structlog.processors.ExceptionRenderer(
        structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    )
    chain: dict[str, list[Any]] = {
        "format_exc_info": [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()],
        "dict_tracebacks": [tracebacks, structlog.processors.JSONRenderer()],
        "console": [plain],
        "unrendered": [lambda _, __, found: {**found, "exc_info": sys.exc_info()}, custom],
        "argument": [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()],
    }
    structlog.configure(processors=chain[way], logger_factory=structlog.PrintLoggerFactory(out))
    raised: BaseException | None = None
    try:
        fail(kind)
    except Exception as error:
        raised = error
        if way == "argument":
            structlog.get_logger().error("failed", exc_info=error)
        else:
            structlog.get_logger().exception("failed")
    text = out.getvalue()
    assert PASSWORD not in text
    assert "REDACTED" in text or (way, kind) == ("unrendered", "cause")  # which does not print the cause
    if kind == "pydantic":
        assert PASSWORD in str(raised), "the exception itself is untouched"
    if kind == "pydantic" and way != "unrendered":
        assert "ValidationError" in text


def test_a_secret_deep_in_a_chain_is_not_shown(out: io.StringIO) -> None:
    """
    However long a chain is and however many exceptions a group has, no password behind them is shown, nor a cycle endless.
    """
    own_renderer(out, structlog.processors.format_exc_info)
    chain: BaseException = StatementError()
    for number in range(100):
        outer = RuntimeError(f"link {number}")
        outer.__cause__ = chain
        chain = outer
    cycle = ValueError("a")
    cycle.__context__ = KeyError("b")
    cycle.__context__.__context__ = cycle
    wide = ExceptionGroup("wide", [ExceptionGroup("inner", [StatementError() for _ in range(30)]) for _ in range(30)])
    wide.add_note(str(StatementError()))
    for error in (chain, cycle, wide):
        structlog.get_logger().error("failed", exc_info=error)
    text = out.getvalue()
    assert PASSWORD not in text
    assert [line["exception"].splitlines()[-1] for line in read(out)][:2] == ["RuntimeError: link 99", "ValueError: a"]


@pytest.mark.parametrize("kind", KINDS)
def test_exceptions_in_the_formatter_lose_what_a_user_sent(kind: str) -> None:
    """
    ``ProcessorFormatter`` shows no planted password, whoever wrote the line.
    """
    kept = processor_formatter(structlog.processors.format_exc_info)
    try:
        fail(kind)
    except Exception:
        structlog.get_logger("app").exception("failed")
        logging.getLogger("app").exception("failed")
    assert len(kept.lines) == 2
    for line in kept.lines:
        assert PASSWORD not in line
        assert "REDACTED" in line


@pytest.mark.parametrize("way", ["printed", "record", "foreign"])
def test_texts_of_exceptions_in_warnings_lose_what_a_user_sent(way: str, out: io.StringIO) -> None:
    """
    ``log.error("failed", error=str(e))``, the exception itself as a field and its text as the event show no password.
    """
    kept = processor_formatter()
    if way == "printed":
        own_renderer(out, wrapper_class=structlog.BoundLogger)
    logger = structlog.get_logger("app")
    try:
        fail("pydantic")
    except ValueError as error:
        if way == "foreign":
            logging.getLogger("app").error("failed: %s", error)
        else:
            logger.error(f"failed: {error}", error=error, text=str(error), customer="c-42")  # noqa: G004 - what users write
    text = out.getvalue() + "".join(kept.lines)
    assert PASSWORD not in text
    assert text.count("input_value=REDACTED") == (1 if way == "foreign" else 3)
    assert ("c-42" in text) is (way != "foreign")


def test_exceptions_without_secrets_are_shown_as_they_are(out: io.StringIO) -> None:
    """
    A traceback that quotes nothing is the very text that structlog makes without us.
    """
    own_renderer(out, structlog.processors.format_exc_info)

    def shown() -> str:
        try:
            raise KeyError("a")
        except KeyError:
            structlog.get_logger().exception("failed")
        return str(read(out)[0]["exception"])

    ours = shown()
    logs.uninstall()
    theirs = shown()
    assert re.sub(r"line \d+", "", ours) == re.sub(r"line \d+", "", theirs)


# -- presets, bad luck, start


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("ecs", {"trace.id": TRACE_TEXT, "span.id": SPAN_TEXT, "http.request.id": "order-7", "service.name": "orders"}),
        ("gcp", {"logging.googleapis.com/trace": TRACE_TEXT, "logging.googleapis.com/trace_sampled": True}),
        ("datadog", {"dd.trace_id": str(int(TRACE_TEXT[16:], 16)), "dd.span_id": str(int(SPAN_TEXT, 16))}),
    ],
)
def test_presets_name_the_ids(preset: Any, expected: dict[str, Any], out: io.StringIO) -> None:
    """
    A preset's names are used for what we add, in all three set-ups, and the plain names are not there beside them.
    """
    logs.install(Settings(service_name="orders", log_preset=preset))
    own_renderer(out)
    kept = processor_formatter()
    formatted = structlog.get_logger("app")
    with request():
        formatted.warning("hello")
        logging.getLogger("app").warning("plain")
        own_renderer(out, wrapper_class=structlog.BoundLogger)
        structlog.get_logger().info("printed")
    for line in [*(json.loads(line) for line in kept.lines), *read(out)]:
        assert line.items() >= expected.items()
        assert "trace_id" not in line
        assert "span_id" not in line


def test_a_failure_of_ours_costs_the_fields_only(out: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Whatever goes wrong in our step, the event is logged.
    """
    monkeypatch.delenv("OTEL_CORRELATION_STRICT", raising=False)

    class Odd(dict[str, Any]):
        def __contains__(self, key: object) -> bool:
            raise RuntimeError("odd")

    own_renderer(out, lambda _, __, event_dict: Odd(event_dict))
    before = guard.counters().get("internal_error.logs.structlog", 0)
    with request():
        structlog.get_logger().info("hello")
    assert read(out) == [{"event": "hello"}]
    assert guard.counters()["internal_error.logs.structlog"] == before + 1


@pytest.mark.parametrize("where", ["formatter", "processor"])
def test_other_failures_of_ours_cost_the_fields_only(
    where: str, out: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The same holds in ``ProcessorFormatter`` and for ``add_ids``; in our own tests a failure is an error.
    """

    class Odd(dict[str, Any]):
        def __contains__(self, key: object) -> bool:
            raise RuntimeError("odd")

    def log() -> str:
        with request():
            if where == "formatter":
                kept = processor_formatter(lambda _, __, event_dict: Odd(event_dict))
                logging.getLogger("app").warning("hello")
                return kept.lines[0]
            return json.dumps(add_ids(None, "info", Odd(event="hello")))

    monkeypatch.delenv("OTEL_CORRELATION_STRICT", raising=False)
    assert json.loads(log()) == {"event": "hello"}
    monkeypatch.setenv("OTEL_CORRELATION_STRICT", "1")
    with pytest.raises(RuntimeError, match="odd"):
        log()


@pytest.mark.parametrize("first", ["structlog", "ours"])
def test_the_order_of_imports_does_not_matter(first: str) -> None:
    """
    Imported before or after we are installed, structlog is covered, and costs nothing where it is not imported.
    """
    script = f"""
        import sys
        from otel_correlation import logs
        from otel_correlation.settings import Settings
        if {first == "structlog"!r}:
            import structlog
        logs.install(Settings(service_name="orders"))
        assert ("otel_correlation.logs.structlog" in sys.modules) is {first == "structlog"!r}
        assert "loguru" not in sys.modules
        import structlog
        structlog.configure(processors=[structlog.processors.JSONRenderer()])
        structlog.get_logger().info("hello")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, check=True)
    assert json.loads(done.stdout) == {"event": "hello", "service_name": "orders"}
