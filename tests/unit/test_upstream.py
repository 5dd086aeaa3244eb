"""
Names of other packages: read in one place, each with what stands in for it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import logging
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import baggage, trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider

import otel_correlation
from otel_correlation import harmless, upstream

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "otel_correlation"


def test_the_versions_that_are_wanted_are_those_that_pip_is_told() -> None:
    """
    One range for pip and for the look at what was found.
    """
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for package, _, wanted in upstream.NEEDED:
        name = package if package != "opentelemetry-instrumentation" else f"{package}-fastapi"
        assert f"{name}{wanted}" in told


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("1.45.0", False),
        ("1.45.1", True),
        ("1.45.10", True),
        ("1.46.0", False),
        ("1.46.0.dev0", False),
        ("2.0.0", False),
        ("1.9.0", False),
        ("", False),
        ("unknown", False),
    ],
)
def test_versions_are_compared_as_numbers(version: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A release is in the range or not, as pip would say; one that does not say its version is not.
    """
    module = ModuleType("somebody.version")
    module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebody.version", module)
    assert (upstream._wrong_version("somebody", "somebody.version", ">=1.45.1,<1.46") is None) is fits


def private_names() -> Iterator[str]:
    """
    Every import of a private name or module of OpenTelemetry's outside of ``upstream``.
    """
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name == "upstream":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("opentelemetry."):
                for name in node.names:
                    path = f"{node.module}.{name.name}"
                    if any(part.startswith("_") for part in path.split(".")):
                        yield f"{file.relative_to(PACKAGE)}: {path}"


# Each is guarded where it stands, or nothing works without it and one line says so.
GUARDED = {
    "bootstrap.py: opentelemetry._logs.get_logger_provider",
    "bootstrap.py: opentelemetry._logs.set_logger_provider",
    "bootstrap.py: opentelemetry.sdk._configuration",
    "bootstrap.py: opentelemetry.sdk._configuration._BaseConfigurator",
    "bootstrap.py: opentelemetry.sdk._logs.LoggerProvider",
    "edge/_fastapi.py: opentelemetry.instrumentation.fastapi._InstrumentedFastAPI",
}
# Loaded only if they are wanted.
LAZY = ("export/", "logs/", "clients/", "local/")


def test_private_names_are_read_in_one_place() -> None:
    """
    Whoever wants one more private name of OpenTelemetry's finds the place where its stand-in belongs.
    """
    found = set(private_names())
    assert {name for name in found if not name.startswith(LAZY)} <= GUARDED


def fresh(name: str) -> Any:
    """
    Load a module of ``upstream`` once more, beside the one that is used.
    """
    spec = importlib.util.find_spec(f"otel_correlation.upstream.{name}")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_keys_are_found_without_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The current span and the baggage are found in a context whatever their keys are called.
    """
    monkeypatch.delattr("opentelemetry.trace.propagation._SPAN_KEY")
    monkeypatch.delattr("opentelemetry.baggage._BAGGAGE_KEY")
    # The public functions of the same modules read them, too: a release that renamed them has other ones.
    for module, public, key in (
        ("opentelemetry.trace.propagation", "set_span_in_context", "span-under-another-name"),
        ("opentelemetry.baggage", "set_baggage", "baggage-under-another-name"),
    ):
        monkeypatch.setattr(f"{module}.{public}", lambda *values, key=key: Context({**values[-1], key: values[0]}))
    names = fresh("api")
    assert names.SPAN_KEY == "span-under-another-name"
    assert names.BAGGAGE_KEY == "baggage-under-another-name"
    span = trace.INVALID_SPAN
    assert trace.propagation.set_span_in_context(span, Context())[names.SPAN_KEY] is span
    assert baggage.set_baggage("entries", Context())[names.BAGGAGE_KEY] == "entries"


def test_a_tracer_that_hides_its_insides_makes_plain_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A release whose tracer looks different costs speed: its own spans are made, with our ids on them.
    """
    from opentelemetry.trace import SpanKind

    from otel_correlation.tracer import LightSpan, Tracer

    provider = TracerProvider(shutdown_on_exit=False)
    inside: Any = provider.get_tracer("x")
    assert upstream_sdk().is_open(inside)
    del inside.span_processor
    assert not upstream_sdk().is_open(inside)
    monkeypatch.setattr(upstream_sdk(), "is_open", lambda _tracer: False)
    span = Tracer("x", provider).start("name", SpanKind.INTERNAL, Context(), {})
    assert not isinstance(span, LightSpan)
    assert span.is_recording()


def upstream_sdk() -> Any:
    """
    The module of the SDK's names.
    """
    return importlib.import_module("otel_correlation.upstream.sdk")


def test_severities_are_those_of_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Without the SDK's function a level has the severity that it has with it.
    """
    from opentelemetry.sdk._logs._internal import std_to_otel

    monkeypatch.delattr("opentelemetry.sdk._logs._internal.std_to_otel")
    ours = fresh("sdk_logs").std_to_otel
    assert [ours(level) for level in range(70)] == [std_to_otel(level) for level in range(70)]


def test_every_public_name_has_a_harmless_one() -> None:
    """
    What does nothing takes what the real function takes, and gives what user code can go on with.
    """
    for name in otel_correlation.__all__:
        if name not in ("ConfigError", "__version__"):
            assert callable(getattr(harmless, name))
    with harmless.work("tick", attributes={"a": 1}) as span:
        span.set_attribute("a", 1)
    assert harmless.continue_from({}, "name", link=True)(len) is len
    assert harmless.carried(len) is len
    assert harmless.inject() == {}
    carrier = {"a": "b"}
    assert harmless.inject(carrier) is carrier == {"a": "b"}
    assert harmless.request_id() is None
    harmless.bind(tenant="acme")
    assert harmless.a_name_of_a_later_release(1, two=2) is None


def test_the_one_line_names_what_was_found(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """
    It is written once, whoever asks, and not at all where we are switched off.
    """
    monkeypatch.setattr(upstream._State, "checked", True)
    monkeypatch.setattr(upstream._State, "trouble", "opentelemetry-sdk >=1 is needed, and 0.9 comes first, in /srv")
    monkeypatch.setattr(harmless._State, "said", False)
    found: Any = otel_correlation
    with caplog.at_level(logging.WARNING):
        assert found.bind is harmless.bind
        assert found.work is harmless.work
    (record,) = caplog.records
    assert "opentelemetry-sdk >=1 is needed, and 0.9 comes first, in /srv" in record.getMessage()


def test_an_import_that_fails_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The package of the name that is missing, its version and its place stand in the line.
    """
    error = ImportError("cannot import name 'x' from 'opentelemetry.sdk.trace'", name="opentelemetry.sdk.trace")
    said = upstream.explain(error)
    assert said.startswith("opentelemetry.sdk 1.")
    assert "cannot import name 'x'" in said
    assert upstream.explain(KeyError("start")).endswith("(KeyError: 'start')")
