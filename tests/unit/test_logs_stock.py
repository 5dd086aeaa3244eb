"""
What OpenTelemetry's own log handler sends, we send: bodies, severities and as many attributes as the limits allow.
"""

from __future__ import annotations

import collections
import datetime as dt
import decimal
import enum
import logging
import math
import types
import uuid
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs as stock_encoding
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.sdk._logs import LoggerProvider, LoggingHandler
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor

from otel_correlation import guard, logs
from otel_correlation.export.encoding import encode_logs
from otel_correlation.export.sizes import record_bytes
from otel_correlation.policy import DEFAULT
from otel_correlation.settings import Settings
from tests.unit.logs_pristine import pristine

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
    from opentelemetry.sdk._logs import ReadableLogRecord

SETTINGS = Settings(service_name="orders", logs_exporters=("otlp",))
QUOTING = "bad input_value='ada@example.com', input_type=str]"


class Colour(enum.IntEnum):
    """
    An enumeration of numbers.
    """

    RED = 1


class Size(enum.StrEnum):
    """
    An enumeration of texts.
    """

    SMALL = "small"


class Mixed(str, enum.Enum):  # noqa: UP042 - what older code has; its str() is not its value
    """
    An enumeration of texts in the old way.
    """

    ONE = "one"


class Plain(enum.Enum):
    """
    An enumeration of anything.
    """

    ONE = object


class Texted:
    """
    Has a text.
    """

    def __str__(self) -> str:
        return "my text"


class Silent:
    """
    Has none.
    """

    def __str__(self) -> str:
        raise ValueError("no text")


class Point(NamedTuple):
    """
    A tuple with names.
    """

    x: int
    y: int


# What stock can send, as a body and as an attribute.
VALUES: dict[str, Any] = {
    "text": "hello",
    "an empty text": "",
    "a text with a percent sign": "100 %",
    "not ASCII": "é\U0001f600",
    "dict": {"a": 1, "b": "two", "c": None, "d": True, "e": 1.5},
    "nested dict": {"order": {"id": 7, "rows": [{"sku": "x", "n": 2}, {"sku": "y", "n": 3}]}, "ok": True},
    "an empty dict": {},
    "keys that are no texts": {1: "one", 2.5: "two"},
    "list": [1, "two", 3.0, None, True, [4, [5]]],
    "an empty list": [],
    "tuple": (1, "two"),
    "named tuple": Point(1, 2),
    "range": range(5),
    "deque": collections.deque([1, 2]),
    "an ordered dict": collections.OrderedDict(a=1),
    "a mapping that is no dict": types.MappingProxyType({"a": {"b": 1}}),
    "int": 42,
    "a negative int": -1,
    "the largest int": 2**63 - 1,
    "float": 0.25,
    "infinity": math.inf,
    "bool": True,
    "false": False,
    "None": None,
    "bytes": b"\x00\xffraw",
    "bytes in a list": [b"\xff"],
    "an enumeration of numbers": Colour.RED,
    "an old enumeration of texts": Mixed.ONE,
    "an enumeration of texts": Size.SMALL,
    "an enumeration": Plain.ONE,
    "datetime": dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC),
    "decimal": decimal.Decimal("1.10"),
    "uuid": uuid.UUID(int=1),
    "set": {1},
    "an object with a text": Texted(),
    "300 numbers": list(range(300)),
    "300 keys": {f"k{number}": number for number in range(300)},
    "a deep list": [[[[[[[[[[[["deep"]]]]]]]]]]]],
}


def one(request: ExportLogsServiceRequest) -> LogRecord:
    """
    Return the only record of a request.
    """
    record: LogRecord
    (record,) = request.resource_logs[0].scope_logs[0].log_records
    return record


def by_stock(log: Callable[[logging.Logger], None]) -> LogRecord:
    """
    Return the one record that stock's handler and stock's encoding make of what ``log`` logs.
    """
    exporter = InMemoryLogRecordExporter()  # type: ignore[no-untyped-call]
    provider = LoggerProvider(shutdown_on_exit=False)
    provider.add_log_record_processor(SimpleLogRecordProcessor(exporter))
    with pristine(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.root.setLevel(logging.DEBUG)
        handler = LoggingHandler(logger_provider=provider)
        handler.addFilter(lambda record: record.name == "app")  # what it says itself, it would send without end
        logging.root.addHandler(handler)
        log(logging.getLogger("app"))
    return one(stock_encoding(exporter.get_finished_logs()))


def made_by_us(log: Callable[[logging.Logger], None], settings: Settings = SETTINGS) -> ReadableLogRecord:
    """
    Return the one record that we make of what ``log`` logs.
    """
    exporter = InMemoryLogRecordExporter()  # type: ignore[no-untyped-call]
    provider = LoggerProvider(shutdown_on_exit=False)
    provider.add_log_record_processor(SimpleLogRecordProcessor(exporter))
    with pristine():
        logs.install(settings)
        logs.otlp_handler(provider, settings)
        logging.root.setLevel(logging.DEBUG)
        logging.root.addHandler(logging.NullHandler())
        log(logging.getLogger("app"))
    (found,) = exporter.get_finished_logs()
    return found


def by_us(log: Callable[[logging.Logger], None]) -> LogRecord:
    """
    As ``by_stock``, with our export and our encoding; stock's encoding, which gRPC uses, says the same.
    """
    found = made_by_us(log)
    record, other = one(ExportLogsServiceRequest.FromString(encode_logs([found])[0])), one(stock_encoding([found]))
    assert (record.body, list(record.attributes)) == (other.body, list(other.attributes))
    return record


def attribute(record: LogRecord, name: str) -> Any:
    return next(found for found in record.attributes if found.key == name).value


@pytest.mark.parametrize("name", VALUES)
def test_a_body_goes_out_as_stock_sends_it(name: str) -> None:
    """
    What is logged in place of a text is a map, an array, a number, a truth or bytes in OTLP, the same as stock's.
    """

    def log(logger: logging.Logger) -> None:
        logger.info(VALUES[name])

    assert by_us(log).body == by_stock(log).body


@pytest.mark.parametrize("name", VALUES)
def test_an_extra_goes_out_as_stock_sends_it(name: str) -> None:
    """
    What stands in ``extra`` has the type in OTLP that stock gives it.
    """

    def log(logger: logging.Logger) -> None:
        logger.info("hello", extra={"thing": VALUES[name]})

    assert attribute(by_us(log), "thing") == attribute(by_stock(log), "thing")


@pytest.mark.parametrize(
    "value", [{"when": dt.datetime(2026, 1, 2, tzinfo=dt.UTC), "n": 2**80}, [Silent(), 1], 2**80, Silent()]
)
def test_a_body_that_stock_cannot_send_arrives_as_far_as_it_can(value: Any) -> None:
    """
    Where stock loses the whole batch, what OTLP cannot carry becomes a text, and the rest keeps its type.
    """
    body = by_us(lambda logger: logger.info(value)).body
    if isinstance(value, dict):
        texts = {found.key: found.value.string_value for found in body.kvlist_value.values}
        assert texts == {"when": "2026-01-02 00:00:00+00:00", "n": str(2**80)}
    elif isinstance(value, list):
        assert "Silent" in body.array_value.values[0].string_value
        assert body.array_value.values[1].int_value == 1
    else:
        assert str(2**80) in body.string_value or "Silent" in body.string_value


def test_a_template_with_arguments_stays_a_text() -> None:
    """
    A dict that is the template of arguments, and a dict of arguments, make a text as ever.
    """
    for arguments in (({"a": 1}, 2), ("%(a)s", {"a": 1})):

        def log(logger: logging.Logger, given: Any = arguments) -> None:
            logger.info(*given)

        if arguments[0] != {"a": 1}:
            assert by_us(log).body == by_stock(log).body
        assert by_us(log).body.string_value


@pytest.mark.parametrize(
    ("level", "text"),
    [(10, "DEBUG"), (20, "INFO"), (30, "WARN"), (40, "ERROR"), (50, "FATAL"), (25, "Level 25"), (35, "NOTICE")],
)
def test_the_severity_is_the_specifications(level: int, text: str) -> None:
    """
    ``severity_text`` is WARN and FATAL where Python says WARNING and CRITICAL; a name of the application's own stays.
    """
    if text == "NOTICE":
        logging.addLevelName(35, "NOTICE")

    def log(logger: logging.Logger) -> None:
        logger.log(level, "hello")

    try:
        ours, stock = by_us(log), by_stock(log)
    finally:
        logging._levelToName.pop(35, None)
        logging._nameToLevel.pop("NOTICE", None)
    assert ours.severity_text == stock.severity_text == text
    assert ours.severity_number == stock.severity_number


@pytest.mark.parametrize(
    ("variable", "value", "kept"),
    [
        ("", "", 128),
        ("OTEL_ATTRIBUTE_COUNT_LIMIT", "500", 403),
        ("OTEL_LOGRECORD_ATTRIBUTE_COUNT_LIMIT", "300", 300),
        ("OTEL_LOGRECORD_ATTRIBUTE_COUNT_LIMIT", "2", 2),
        ("OTEL_LOGRECORD_ATTRIBUTE_COUNT_LIMIT", "0", 0),
    ],
)
def test_the_standard_limits_alone_bound_the_number_of_attributes(
    variable: str, value: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    400 extras and the place in the code: as many go out as the standard limit says, the rest is counted in OTLP and here.
    """
    if variable:
        monkeypatch.setenv(variable, value)
    record = by_us(lambda logger: logger.info("hello", extra={f"f{number}": number for number in range(400)}))
    assert len(record.attributes) == kept
    assert record.dropped_attributes_count == 403 - kept
    assert guard.counters().get("log_attributes_dropped", 0) == 403 - kept
    if kept > 10:
        names = {found.key for found in record.attributes}
        assert names > {"code.file.path", "code.line.number", "code.function.name", "f0"}


def test_the_limit_of_a_length_is_for_each_text_of_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    ``OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT`` cuts each text of a list or a dict, as in stock, and the place in the code, too.
    """
    monkeypatch.setenv("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "5")

    def log(logger: logging.Logger) -> None:
        logger.info("hello again", extra={"thing": {"a": ["123456789"] * 4, "b": "123456789"}})

    ours, stock = by_us(log), by_stock(log)
    assert ours.body == stock.body
    assert attribute(ours, "thing") == attribute(stock, "thing")
    assert attribute(ours, "code.file.path") == attribute(stock, "code.file.path")


def test_what_an_error_quotes_is_hidden_in_nested_values() -> None:
    """
    Bodies and extras of warnings lose what they quote of a user at any depth; of INFO records, exceptions do.
    """
    nested = {"rows": [{"error": QUOTING, "raw": QUOTING.encode()}], "exception": ValueError(QUOTING), QUOTING: 1}
    warned = by_us(lambda logger: logger.warning(nested, extra={"thing": nested}))
    told = by_us(lambda logger: logger.info({"errors": [ValueError(QUOTING)]}))
    for record in (warned, told):
        assert b"ada@example.com" not in record.SerializeToString()
        assert b"input_value=REDACTED" in record.SerializeToString()


@pytest.mark.parametrize(
    "kind",
    ["a long text", "many texts", "long keys", "many numbers", "many keys", "deep", "a cycle", "bytes", "endless"],
)
def test_a_hostile_body_is_bounded(kind: str) -> None:
    """
    However large, deep or endless a value is, what is queued of it is bounded, its estimate is honest, and it says so.
    """
    cycle: list[Any] = [1]
    cycle.append(cycle)
    deep: Any = 1
    for _ in range(5_000):
        deep = [deep]

    class Endless(collections.UserList[int]):
        def __iter__(self) -> Any:
            return iter(int, 1)

    values: dict[str, Any] = {
        "a long text": ["x" * 1_000_000],
        "many texts": ["x" * 1_000] * 5_000,
        "long keys": {str(number) * 1000: "" for number in range(2_000)},
        "many numbers": list(range(200_000)),
        "many keys": {str(number): number for number in range(200_000)},
        "deep": deep,
        "a cycle": cycle,
        "bytes": [b"x" * 1_000_000],
        "endless": Endless(),
    }
    found = made_by_us(lambda logger: logger.info(values[kind], extra={"thing": values[kind]}))
    encoded = encode_logs([found])[0]
    assert len(encoded) < 4 * 1024 * 1024
    assert len(encoded) <= record_bytes(found)
    if kind not in ("deep", "a cycle", "bytes"):
        assert encoded.count(b"[cut from ") == 2 or kind in ("many texts", "long keys")
    if kind not in ("many texts", "long keys"):
        request = ExportLogsServiceRequest.FromString(encoded)
        assert request.resource_logs[0].scope_logs[0].log_records[0].body.WhichOneof("value")
    assert DEFAULT.body == 65_536


def test_an_object_that_lies_about_its_class_is_a_text() -> None:
    """
    A value whose ``__class__`` raises, or names another one, is its text: nothing of it is called but ``str``.
    """

    class Liar:
        @property
        def __class__(self) -> Any:
            raise RuntimeError("no class")

        @__class__.setter
        def __class__(self, value: Any) -> None: ...

        def __str__(self) -> str:
            return "a liar"

    assert by_us(lambda logger: logger.info(Liar())).body.string_value == "a liar"
    assert attribute(by_us(lambda logger: logger.info("x", extra={"thing": Liar()})), "thing").string_value == "a liar"
