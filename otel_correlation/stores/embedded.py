"""
The embedded store of ``otel-correlation serve``, asked over HTTP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar
from urllib.parse import quote

from otel_correlation.stores.client import Http, StoreError
from otel_correlation.stores.model import Trace, as_list, as_object, trace_from_json

if TYPE_CHECKING:
    from collections.abc import Sequence


class EmbeddedStore:
    """
    Finds traces and their log lines in a running ``otel-correlation serve``.
    """

    is_whole: ClassVar[bool] = True

    def __init__(self, url: str) -> None:
        self._http = Http(url)
        self.name = f"the embedded store at {self._http.shown}"

    def find(self, wanted: str, /) -> list[Trace]:
        """
        Return what the server's own search finds.
        """
        # "." and ".." would be taken for a step in the path.
        status, answer = self._http.get("/api/find/" + quote(wanted, safe="").replace(".", "%2E"))
        try:
            if status != 404:
                return [trace_from_json(trace) for trace in as_list(as_object(answer).get("traces"))]
        except ValueError as error:
            raise StoreError(f"{self._http.shown} did not answer as an embedded store does ({error})") from error
        raise StoreError(f"{self._http.shown} is something else than an embedded store (no /api/find there)")

    def complete(self, known: Sequence[Trace], /) -> list[Trace]:
        """
        Return the traces that another store knew.
        """
        found: list[Trace] = []
        try:
            for one in known:
                found += self.find(one.trace_id)
        except StoreError as error:
            raise StoreError(str(error), found) from error
        return found
