"""
One POST to a collector, by what the configuration needs: the standard library for plain ``http``, else ``requests``.

Everything that a request needs is imported when a transport is made, never when it sends: it sends on a thread, and a
process that forks while a thread imports leaves its child a module that nobody ever completes. See ADR 013.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from base64 import b64encode
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Protocol, cast
from urllib.parse import quote, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

    import requests

# An answer's text is read up to here, as a full success is empty; what is longer costs the connection.
_MAX_ANSWER_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """
    What a collector answered.

    Attributes:
        status: The HTTP status.
        fields: The headers; names are found in any case.
        body: At most so many bytes as are worth reading.
    """

    status: int
    fields: Mapping[str, str]
    body: bytes

    def headers(self) -> Mapping[str, str]:
        """
        Return the headers, where the SDK's reader of ``Retry-After`` looks for them.
        """
        return self.fields


class NoAnswerError(Exception):
    """
    No whole answer came.

    Attributes:
        cause: What happened.
        is_temporary: Another attempt may succeed.
        maybe_delivered: The collector may have taken the batch.
    """

    def __init__(self, cause: Exception, *, is_temporary: bool, maybe_delivered: bool) -> None:
        super().__init__(type(cause).__name__)
        self.cause = cause
        self.is_temporary = is_temporary
        self.maybe_delivered = maybe_delivered


class Transport(Protocol):
    """
    Sends to one endpoint, from one thread at a time.
    """

    def post(self, data: bytes, headers: Mapping[str, str], timeout_s: float) -> Answer:
        """
        Send one request; redirects are not followed.

        Raises:
            NoAnswerError: No whole answer came.
        """
        raise NotImplementedError

    def close(self) -> None:
        """
        Close the connections.
        """


def needs_requests(endpoint: str, headers: Mapping[str, str]) -> bool:
    """
    Tell whether ``requests`` has to send: TLS, a proxy, or credentials that it finds in a netrc file.

    Args:
        endpoint: The full URL.
        headers: As configured; ``Authorization`` among them is used whatever a netrc file says.
    """
    parts = urlsplit(endpoint)
    if parts.scheme != "http":
        return True
    if sys.platform in ("win32", "darwin"):
        from urllib.request import getproxies  # noqa: PLC0415 - these two keep proxies outside the environment

        if getproxies():
            return True
    # Names in lower case, as in requests: HTTP_PROXY is HTTP_PROXY, http_proxy, and the default of all_proxy.
    if any(value and name.lower() in ("http_proxy", "all_proxy") for name, value in os.environ.items()):
        return True
    if parts.username is not None or _has_authorization(headers):
        return False
    home = os.environ.get("NETRC")
    files = (home,) if home else ("~/.netrc", "~/_netrc")
    return any(os.path.exists(os.path.expanduser(file)) for file in files)  # noqa: PTH110, PTH111 - once, cheaply


def _has_authorization(headers: Mapping[str, str]) -> bool:
    return any(name.lower() == "authorization" for name in headers)


def _load_codec(host: str) -> None:
    """
    Import what every look-up of a host's name goes through; the codec is a module, too.
    """
    with contextlib.suppress(UnicodeError):  # a name that cannot be: said when it is used
        host.encode("idna")


class Direct:
    """
    Plain ``http`` to the collector itself, over one connection that is kept.

    Args:
        endpoint: The full URL. Its user and password are sent where no ``Authorization`` is configured.
    """

    def __init__(self, endpoint: str) -> None:
        self._connection: HTTPConnection | None = None
        parts = urlsplit(endpoint)
        self._host = parts.hostname or ""
        self._port = parts.port or 80
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        # What is quoted already stays.
        self._target = quote(target, safe="!#$%&'()*+,/:;=?@[]~")
        self._credentials = ""
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._credentials = "Basic " + b64encode(pair.encode()).decode()
        _load_codec(self._host)

    def post(self, data: bytes, headers: Mapping[str, str], timeout_s: float) -> Answer:
        """
        Send one request; see ``Transport``.
        """
        if self._credentials and not _has_authorization(headers):
            headers = {**headers, "authorization": self._credentials}
        connection = self._connected(timeout_s)
        try:
            # A collector that refuses before it has read everything may have answered when it closed.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request("POST", self._target, data, dict(headers))
            response = connection.getresponse()
            body = response.read(_MAX_ANSWER_BYTES)
        except (OSError, HTTPException) as error:
            self.close()
            raise NoAnswerError(error, is_temporary=True, maybe_delivered=True) from error
        except ValueError as error:  # a header or a path that HTTP cannot carry; nothing was sent
            self.close()
            raise NoAnswerError(error, is_temporary=False, maybe_delivered=False) from error
        if not response.isclosed():
            self.close()
        return Answer(response.status, cast("Mapping[str, str]", response.headers), body)

    def close(self) -> None:
        """
        Close the connection; the next request opens another.
        """
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __del__(self) -> None:
        # Quietly, as pools of connections do: who never shuts down, and a child that drops its parent's connection.
        self.close()

    def _connected(self, timeout_s: float) -> HTTPConnection:
        connection = self._connection
        if connection is not None and _is_alive(connection.sock):
            connection.sock.settimeout(timeout_s)
            return connection
        self.close()
        connection = HTTPConnection(self._host, self._port, timeout=timeout_s)
        try:
            connection.connect()
        except OSError as error:
            raise NoAnswerError(error, is_temporary=True, maybe_delivered=False) from error
        except ValueError as error:  # no name of a host
            raise NoAnswerError(error, is_temporary=False, maybe_delivered=False) from error
        self._connection = connection
        return connection


def _is_alive(connection: socket.socket | None) -> bool:
    """
    Tell whether the collector has not closed an idle connection; what it would say unasked ends it, too.
    """
    if connection is None:
        return False
    try:
        connection.settimeout(0.0)
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


class ByRequests:
    """
    Whatever ``requests`` can: TLS, proxies, sessions of a credential provider.

    Args:
        endpoint: The full URL.
        headers: As configured. ``Authorization`` among them wins over the URL's user, and that over a netrc file.
        verify: What to verify the collector with.
        certificate: How to identify ourselves.
        session: Of a credential provider.
    """

    def __init__(
        self,
        endpoint: str,
        headers: Mapping[str, str],
        *,
        verify: bool | str = True,
        certificate: str | tuple[str, str] | None = None,
        session: requests.Session | None = None,
    ) -> None:
        library = _load_requests(endpoint)
        import urllib3.exceptions  # noqa: PLC0415 - requests has imported it

        self._errors: Any = library.exceptions
        self._refused: Any = urllib3.exceptions.NewConnectionError
        self._endpoint = endpoint
        self.session = session or (_certified(library, verify) if isinstance(verify, str) else library.Session())
        self.session.verify = verify
        if certificate is not None:
            self.session.cert = certificate
        _authorize(self.session, endpoint, headers)

    def post(self, data: bytes, headers: Mapping[str, str], timeout_s: float) -> Answer:
        """
        Send one request; see ``Transport``.
        """
        try:
            response = self.session.post(
                self._endpoint,
                data=data,
                headers=dict(headers),
                timeout=timeout_s,
                allow_redirects=False,
            )
        except Exception as error:  # a session of somebody's provider may raise anything
            errors = self._errors
            # The answer had begun.
            cut_off = isinstance(error, errors.ChunkedEncodingError | errors.ContentDecodingError)
            is_temporary = cut_off or isinstance(error, errors.ConnectionError | errors.Timeout)
            raise NoAnswerError(
                error, is_temporary=is_temporary, maybe_delivered=is_temporary and self._maybe_delivered(error)
            ) from error
        return Answer(response.status_code, response.headers, response.content or b"")

    def close(self) -> None:
        """
        Close the connections.
        """
        self.session.close()

    def _maybe_delivered(self, error: Exception) -> bool:
        errors = self._errors
        if isinstance(error, errors.ConnectTimeout | errors.SSLError | errors.ProxyError):
            return False
        cause = error.args[0] if error.args else None
        return not isinstance(getattr(cause, "reason", None), self._refused)


def _load_requests(endpoint: str) -> Any:
    """
    Import ``requests`` and what it imports itself only when it sends.
    """
    import requests  # noqa: PLC0415 - here and not where it sends, see above

    import_module("netrc")

    _load_codec(urlsplit(endpoint).hostname or "")
    return requests


def session_for_stock(endpoint: str, headers: Mapping[str, str]) -> requests.Session | None:
    """
    Import what a stock exporter over HTTP needs, and return the session that it should have, or None for its own.

    Args:
        endpoint: Where it sends.
        headers: As configured. ``Authorization`` among them wins over the URL's user, and that over a netrc file.
    """
    session: requests.Session = _load_requests(endpoint).Session()
    _authorize(session, endpoint, headers)
    return session if session.auth is not None else None


def _authorize(session: requests.Session, endpoint: str, headers: Mapping[str, str]) -> None:
    """
    Keep a netrc file from replacing what is configured: requests reads it where a session has no credentials.
    """
    if session.auth is not None:
        return
    parts = urlsplit(endpoint)
    if _has_authorization(headers):
        session.auth = _as_it_is
    elif parts.username is not None:
        session.auth = (unquote(parts.username), unquote(parts.password or ""))


def _as_it_is(request: Any) -> Any:
    return request


def _certified(library: Any, certificate: str) -> requests.Session:
    """
    Return a session whose certificate wins over ``REQUESTS_CA_BUNDLE``, which requests would prefer.
    """
    base: Any = library.Session

    class Certified(base):  # type: ignore[misc]
        def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
            del verify
            return super().merge_environment_settings(url, proxies, stream, certificate, cert)

    found: requests.Session = Certified()
    return found
