"""
The protocol that a store implements, and the search over all that are configured.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final, Protocol
from urllib.parse import urlsplit

import httpx

from otel_correlation.request_id import to_trace_id
from otel_correlation.semconv import OTEL_CORRELATION_STORES
from otel_correlation.stores.model import Trace

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from otel_correlation.stores.model import Json

DEFAULT_STORES: Final = "http://127.0.0.1:4318"
TIMEOUT_S: Final = 10.0
# An answer beyond this is refused rather than held in memory.
MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


class StoreError(Exception):
    """
    A store that is configured wrongly, not reachable, or does not answer as it should. Its text is one line for a person.
    """


class Store(Protocol):
    """
    Something that finds traces by an id.
    """

    @property
    def name(self) -> str:
        """
        Return what the store is and where, for a person.
        """
        ...

    def find(self, wanted: str, /) -> list[Trace]:
        """
        Return the traces that ``wanted`` names: by its trace id (``trace_ids``) and by the attribute ``request_id``.

        Raises:
            StoreError: The store did not answer.
        """
        ...


class Http:
    """
    A store's HTTP side: GET, JSON, a bound on time and size, and every failure as a StoreError.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        host = urlsplit(url).hostname or ""
        # A proxy that the environment names is not meant for this machine itself.
        self._trust_env = host not in _LOOPBACK

    def get(self, path: str, params: Mapping[str, str | int] | None = None) -> tuple[int, Json]:
        """
        Return the status and the decoded body; None is the body of a 404.
        """
        body = bytearray()
        try:
            with (
                httpx.Client(timeout=TIMEOUT_S, trust_env=self._trust_env) as client,
                client.stream("GET", self.url + path, params=params) as response,
            ):
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > MAX_ANSWER_BYTES:
                        raise StoreError(f"{self.url} answered with more than {MAX_ANSWER_BYTES} bytes")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise StoreError(f"{self.url} is not reachable ({error or type(error).__name__})") from error
        if response.status_code == httpx.codes.NOT_FOUND:
            return response.status_code, None
        if response.status_code != httpx.codes.OK:
            raise StoreError(f"{self.url}{path} answered with status {response.status_code}")
        try:
            answer: Json = json.loads(body)
        except (ValueError, RecursionError):
            raise StoreError(f"{self.url}{path} did not answer with JSON: is it a store of this kind?") from None
        return response.status_code, answer


def trace_id_of(wanted: str) -> str | None:
    """
    Return the trace id (32 hex digits) that ``wanted`` is or leads to by the bridge contract, or None.
    """
    bits = to_trace_id(wanted)
    return None if bits is None else f"{bits:032x}"


def configured(environ: Mapping[str, str]) -> list[Store]:
    """
    Return the stores that ``OTEL_CORRELATION_STORES`` names: a comma list of ``URL`` (embedded) and ``KIND=URL``.

    Raises:
        StoreError: An item is not of this form.
    """
    from otel_correlation.stores.embedded import EmbeddedStore
    from otel_correlation.stores.jaeger import JaegerStore

    kinds: dict[str, type[EmbeddedStore | JaegerStore]] = {"embedded": EmbeddedStore, "jaeger": JaegerStore}
    stores: list[Store] = []
    for item in (environ.get(OTEL_CORRELATION_STORES, "").strip() or DEFAULT_STORES).split(","):
        text = item.strip()
        kind, _, url = text.partition("=") if "=" in text.partition("://")[0] else ("embedded", "", text)
        try:
            valid = urlsplit(url).scheme in ("http", "https") and bool(urlsplit(url).hostname)
        except ValueError:
            valid = False
        if kind not in kinds or not valid:
            raise StoreError(
                f"{OTEL_CORRELATION_STORES}: {text!r} is no store; write http://HOST:PORT for the embedded one "
                "or jaeger=http://HOST:PORT"
            )
        stores.append(kinds[kind](url))
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
