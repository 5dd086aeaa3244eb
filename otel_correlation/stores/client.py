"""
What a store is, and the HTTP side that all of them share.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final, Protocol
from urllib.parse import urlsplit

import httpx

from otel_correlation.request_id import to_trace_id

if TYPE_CHECKING:
    from collections.abc import Mapping

    from otel_correlation.stores.model import Json, Trace

TIMEOUT_S: Final = 10.0
# An answer beyond this is refused rather than held in memory.
MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


class StoreError(Exception):
    """
    A store that is named wrongly, not reachable, or does not answer as it should; one line for a person.
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

        What a caller that is not trusted sent as its request id (``semconv.CALLER_REQUEST_ID``) counts, too.

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
        if response.status_code == 404:
            return response.status_code, None
        if response.status_code != 200:
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
