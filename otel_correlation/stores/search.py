"""
The search over every store that is configured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from otel_correlation.semconv import OTEL_CORRELATION_STORES
from otel_correlation.stores.client import Store, StoreError
from otel_correlation.stores.embedded import EmbeddedStore
from otel_correlation.stores.jaeger import JaegerStore
from otel_correlation.stores.model import Trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

DEFAULT_STORE: Final = "http://127.0.0.1:4318"
_KINDS: Final[dict[str, Callable[[str], Store]]] = {"embedded": EmbeddedStore, "jaeger": JaegerStore}


def configured(items: Sequence[str]) -> list[Store]:
    """
    Return the stores that the items of ``OTEL_CORRELATION_STORES`` name: ``URL`` (embedded) or ``KIND=URL``.

    Raises:
        StoreError: An item is not of this form.
    """
    stores: list[Store] = []
    for text in items or (DEFAULT_STORE,):
        kind, _, url = text.partition("=") if "=" in text.partition("://")[0] else ("embedded", "", text)
        try:
            valid = urlsplit(url).scheme in ("http", "https") and bool(urlsplit(url).hostname)
        except ValueError:
            valid = False
        if kind not in _KINDS or not valid:
            raise StoreError(
                f"{OTEL_CORRELATION_STORES}: {text!r} is no store; write http://HOST:PORT for the embedded one "
                "or jaeger=http://HOST:PORT"
            )
        stores.append(_KINDS[kind](url))
    return stores


def find(stores: Iterable[Store], wanted: str) -> tuple[list[Trace], list[StoreError]]:
    """
    Ask every store and put together what belongs to one trace id, newest trace first.

    Returns:
        The traces, and why a store could not answer.
    """
    parts: dict[str, list[Trace]] = {}
    errors: list[StoreError] = []
    for store in stores:
        try:
            for trace in store.find(wanted):
                parts.setdefault(trace.trace_id, []).append(trace)
        except StoreError as error:
            errors.append(error)
    found = [_merged(trace_id, same) for trace_id, same in parts.items()]
    return sorted(found, key=_began, reverse=True), errors


def _merged(trace_id: str, parts: Sequence[Trace]) -> Trace:
    lines = {
        (line.time_ns, line.span_id, line.service, line.body): line for part in reversed(parts) for line in part.logs
    }
    return Trace.of(trace_id, (span for part in reversed(parts) for span in part.spans), lines.values())


def _began(trace: Trace) -> int:
    return min([*(span.start_ns for span in trace.spans), *(line.time_ns for line in trace.logs)], default=0)
