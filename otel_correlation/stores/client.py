"""
What a store is, and the HTTP side that those behind a URL share.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import re
from typing import TYPE_CHECKING, ClassVar, Final, Protocol
from urllib.parse import unquote, urlsplit, urlunsplit

import httpx

from otel_correlation.policy import reason_of, shown_url
from otel_correlation.request_id import to_trace_id
from otel_correlation.stores.bounded import Gunzip, MalformedError, TooBigError, read_json

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable, Mapping, Sequence

    from otel_correlation.stores.model import Json, Trace

TIMEOUT_S: Final = 10.0
_CONNECT_S: Final = 3.0
# An answer beyond this, inflated, is refused rather than held in memory.
MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024
# Of the JSON in it: an attribute of Jaeger has four, in some fifty bytes.
MAX_VALUES: Final = 4_000_000
_MAX_REASON: Final = 200
_MAX_ERROR_BYTES: Final = 16 * 1024
_THIS_MACHINE: Final = frozenset({"localhost", "127.0.0.1", "::1", "0.0.0.0", "::"})
_HEADER: Final = re.compile(r"[!-~](?:[ -~]*[!-~])?")
# How a tenant is named to Loki, Tempo, Mimir and gateways in front of them.
_TENANT: Final = "X-Scope-OrgID"


class StoreError(Exception):
    """
    A store that is named wrongly, not reachable, or does not answer as it should; one line for a person.

    Attributes:
        traces: What was found nonetheless.
    """

    def __init__(self, message: str, traces: Iterable[Trace] = ()) -> None:
        super().__init__(message)
        self.traces = tuple(traces)


class Store(Protocol):
    """
    Something that finds traces by an id.

    Attributes:
        is_whole: Whether a trace that ``find`` returns is all that the store has of it.
    """

    is_whole: ClassVar[bool]

    @property
    def name(self) -> str:
        """
        Return what the store is and where, for a person.
        """
        ...

    def find(self, wanted: str, /) -> list[Trace]:
        """
        Return the traces that ``wanted`` names: by its trace id (``trace_ids``) and by the attribute ``request_id``.

        What a caller that is not trusted sent as its request id (``semconv.CALLER_REQUEST_ID``) counts, too. Log lines
        that name a request and no trace stand in a trace whose id is empty.

        Raises:
            StoreError: The store did not answer, or not with everything.
        """
        ...

    def complete(self, known: Sequence[Trace], /) -> list[Trace]:
        """
        Return what the store has of traces that are known by now, by their trace ids and request ids.

        Raises:
            StoreError: The store did not answer, or not with everything.
        """
        ...


class Http:
    """
    A store's HTTP side: GET, JSON, a bound on time and size, and every failure as a StoreError.

    Args:
        url: ``http[s]://[USER:PASSWORD@]HOST[:PORT][/PATH][#TENANT]``. A password without a user is a bearer token, the
            fragment is sent as ``X-Scope-OrgID``. None of them is ever part of a message.
        timeout_s: The longest that one whole answer may take, from the name's look-up to the last byte.
    """

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S) -> None:
        parts = urlsplit(url)
        self.url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="", query="")).rstrip("/")
        self.shown = shown_url(self.url)
        self._headers = _headers(self.shown, parts.username, parts.password, parts.fragment)
        sent = [text for value in self._headers.values() for text in (value, value.rpartition(" ")[2])]
        self._secrets = [*filter(None, (unquote(parts.username or ""), unquote(parts.password or ""), *sent))]
        self._timeout_s = timeout_s
        # A proxy that the environment names is not meant for this machine itself.
        self._trust_env = parts.hostname not in _THIS_MACHINE

    def get(
        self,
        path: str,
        params: Mapping[str, str | int] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Json]:
        """
        Return the status and the decoded body; None is the body of a 404.

        Blocks, and runs an event loop of its own meanwhile: call it from a thread that has none.
        """
        sent = {**(headers or {}), **self._headers, "Accept-Encoding": "gzip"}
        try:
            status, body = asyncio.run(self._answer(self.url + path, params, sent))
        except (httpx.TimeoutException, TimeoutError) as error:
            raise StoreError(f"{self.shown} does not answer in time") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise StoreError(f"{self.shown} is not reachable ({reason_of(error)})") from error
        except TooBigError as error:
            raise StoreError(f"{self.shown} answered with more than {MAX_ANSWER_BYTES} bytes") from error
        except MalformedError as error:
            raise StoreError(f"{self.shown} did not answer with what it says it does ({error})") from error
        except (OSError, ValueError, ImportError) as error:
            # Of what the environment names: its certificates are not there, its proxy is of a kind that nobody knows.
            why = f"{reason_of(error)}; see SSL_CERT_FILE and the proxy variables"
            raise StoreError(f"{self.shown} cannot be asked ({why})") from error
        if status == 404:
            return status, None
        if status != 200:
            raise StoreError(f"{self.shown}{path} answered with status {status}{self._reason(body)}")
        try:
            return status, read_json(body, max_values=MAX_VALUES)
        except TooBigError as error:
            raise StoreError(f"{self.shown} answered with more than can be read ({error})") from None
        except MalformedError:
            raise StoreError(f"{self.shown}{path} did not answer with JSON: is it a store of this kind?") from None

    async def _answer(
        self, url: str, params: Mapping[str, str | int] | None, headers: Mapping[str, str]
    ) -> tuple[int, bytes]:
        """
        Return the status and the body, inflated by us: httpx would inflate any coding, and any number of them, whole.
        """
        # One deadline for everything. A time-out of a single read never comes where a byte drips now and then.
        async with (
            asyncio.timeout(self._timeout_s),
            httpx.AsyncClient(
                timeout=httpx.Timeout(self._timeout_s, connect=min(_CONNECT_S, self._timeout_s)),
                trust_env=self._trust_env,
                verify=_certificates(),
            ) as client,
            client.stream("GET", url, params=params, headers=headers) as response,
        ):
            coding = response.headers.get("content-encoding", "").strip().lower()
            if coding not in ("", "identity", "gzip"):
                raise MalformedError("it is neither plain nor gzip")
            if coding == "gzip":
                inflate = Gunzip(MAX_ANSWER_BYTES)
                async for chunk in response.aiter_raw():
                    inflate.feed(chunk)
                return response.status_code, inflate.finish()
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MAX_ANSWER_BYTES:
                    raise TooBigError
            return response.status_code, bytes(body)

    def _reason(self, body: bytes) -> str:
        """
        Return what an error says about itself if that is a line of text: a store's reason, and no page of a proxy.
        """
        text = body[:_MAX_ERROR_BYTES].decode("utf-8", "replace").strip().partition("\n")[0]
        told = "".join(character if character.isprintable() else " " for character in text)[:_MAX_REASON].strip()
        # Its own words may quote what it was sent, also where they are cut.
        is_safe = told and not told.startswith("<") and not any(secret in text for secret in self._secrets)
        # What Loki and Tempo say where they have tenants and none was named.
        hint = ": name the tenant, URL#TENANT" if told == "no org id" else ""
        return f" ({told}{hint})" if is_safe else ""


@functools.cache
def _certificates() -> ssl.SSLContext:
    """
    Return what servers are verified against: reading it takes longer than most answers.
    """
    return httpx.create_ssl_context()


def _headers(url: str, user: str | None, password: str | None, tenant: str) -> dict[str, str]:
    headers: dict[str, str] = {}
    user, password, tenant = unquote(user or ""), unquote(password or ""), unquote(tenant)
    if user:
        headers["Authorization"] = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    elif password:
        headers["Authorization"] = "Bearer " + password
    if tenant:
        headers[_TENANT] = tenant
    for name, value in headers.items():
        if not _HEADER.fullmatch(value):
            raise StoreError(f"{url}: what its entry says for the header {name} cannot be sent in one")
    return headers


def trace_id_of(wanted: str) -> str | None:
    """
    Return the trace id (32 hex digits) that ``wanted`` is or leads to by the bridge contract, or None.
    """
    bits = to_trace_id(wanted)
    return None if bits is None else f"{bits:032x}"


def quoted(text: str) -> str:
    """
    Return ``text`` as a string of TraceQL and LogQL, whose escapes are Go's.
    """
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\x7f")
