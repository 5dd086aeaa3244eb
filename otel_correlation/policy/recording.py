"""
What is left out: paths without a span, header values and query values that must not be recorded.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, unquote_plus

from otel_correlation import guard
from otel_correlation.policy import bounds as limits
from otel_correlation.policy.sensitive import is_secret_in_query

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

REDACTED: Final = "REDACTED"

_SEPARATORS: Final = re.compile("([&;])")
# Of what is no path, a slash in a password is more likely than an @ behind the host.
_WEB: Final = frozenset({"", "http", "https", "ws", "wss"})
# A URL in a query of a URL in a query, and one encoded so many times: what goes deeper is not shown.
_DEPTH: Final = 3
# Of a query's key, and percent-encoded: its end says what it is.
_NAME_CHARACTERS: Final = 64
_KEY_CHARACTERS: Final = 3 * _NAME_CHARACTERS
# Pairs of a query that are looked at, and characters of values that may be a URL: some milliseconds at the worst.
_PAIRS: Final = 128
_URL_CHARACTERS: Final = 2048
# What may become // or ? where it is decoded: %2F, %3F, and % itself.
_ENCODED: Final = re.compile("%(?:2[5Ff]|3[Ff])")


class Patterns:
    """
    A comma list of regular expressions that match a path from one slash to another.

    ``health`` matches ``/health``, ``/api/health`` and ``/health/live``, not ``/healthy`` and never a host. A pattern
    that starts with ``/`` matches from the path's start only, one that starts with ``http`` the whole URL. A
    pattern that does not compile is left out, with one line. Nothing matches a path or a URL of more than 2,048
    characters: patterns are the operator's, what they run on is the caller's, and some take quadratic time.

    Args:
        text: The comma list.
        name: The setting's name, for that line.
    """

    def __init__(self, text: str, name: str = "excluded_urls") -> None:
        paths: list[re.Pattern[str]] = []
        urls: list[re.Pattern[str]] = []
        for entry in (part.strip() for part in text.split(",")):
            if not entry:
                continue
            try:
                if entry.startswith(("http:", "https:", "http?", "https?", "http(", "^http")):
                    urls.append(re.compile(entry))
                else:
                    paths.append(_path_pattern(entry.rstrip("/") or "/"))
            except re.error as error:
                guard.logger.warning("%s: %r is not a regular expression (%s); left out", name, entry, error)
        self._paths = tuple(paths)
        self._urls = tuple(urls)

    def __bool__(self) -> bool:
        """
        Tell whether there is any pattern.
        """
        return bool(self._paths or self._urls)

    def match(self, path: str, url: str = "") -> bool:
        """
        Tell whether a path, or the whole URL, is excluded.
        """
        if len(path) > limits.DEFAULT.path:
            return False
        return any(pattern.search(path) for pattern in self._paths) or (
            0 < len(url) <= limits.DEFAULT.path and any(pattern.match(url) for pattern in self._urls)
        )

    @property
    def wants_url(self) -> bool:
        """
        Tell whether a pattern looks at the whole URL.
        """
        return bool(self._urls)


def _path_pattern(entry: str) -> re.Pattern[str]:
    # What follows ".*" may begin anywhere. With the ".*" it would be looked for from each slash to the end of the path.
    if entry.startswith(".*") and entry[2:3] not in ("", "?", "+", "*", "{") and "|" not in entry:
        return re.compile(rf"(?:{entry[2:]})(?:/|$)")
    return re.compile(rf"(?:^|/)(?:{entry})(?:/|$)")


class HeaderCapture:
    """
    Which headers become span attributes, and which of those lose their value.

    Args:
        names: Header names or regular expressions, matched whole and without case.
        sanitize: Names or regular expressions of headers whose value becomes ``[REDACTED]``.
        prefix: ``http.request.header.`` or ``http.response.header.``.
    """

    def __init__(self, names: Sequence[str], sanitize: Sequence[str], prefix: str) -> None:
        self._wanted = _union(names)
        self._hidden = _union(sanitize)
        self._prefix = prefix

    def __bool__(self) -> bool:
        """
        Tell whether anything is captured.
        """
        return self._wanted is not None

    def attributes(
        self, headers: Iterable[tuple[bytes, bytes]], bounds: limits.Bounds = limits.DEFAULT
    ) -> dict[str, tuple[str, ...]]:
        """
        Return the attributes of the wanted headers; keys are lower case with dashes kept, each with all its values.

        Args:
            headers: Names and values, as received.
            bounds: How long a value may be; what is above ``bounds.HEADER_VALUES`` and ``HEADERS`` is left out.
        """
        found: dict[str, tuple[str, ...]] = {}
        if self._wanted is None:
            return found
        room, left = limits.HEADER_VALUES, max(limits.HEADERS, bounds.header)
        for raw_name, raw_value in headers:
            if len(raw_name) > limits.HEADER_NAME:
                continue
            name = raw_name.decode("latin-1").lower()
            if self._wanted.fullmatch(name):
                hidden = self._hidden is not None and self._hidden.fullmatch(name)
                value = "[REDACTED]" if hidden else bounds.decode(raw_value, bounds.header, "utf-8")
                room, left = room - 1, left - len(value)
                if room < 0 or left < 0:
                    guard.count("captured_headers.over_limit")
                    break
                key = self._prefix + name
                found[key] = (*found.get(key, ()), value)
        return found


def _union(names: Sequence[str]) -> re.Pattern[str] | None:
    good: list[str] = []
    for name in names:
        try:
            re.compile(name)
        except re.error as error:
            guard.logger.warning(
                "OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS: %r is not a regular expression (%s); left out", name, error
            )
            continue
        good.append(f"(?:{name})")
    return re.compile("|".join(good), re.IGNORECASE) if good else None


def _is_secret(key: str) -> bool:
    key = key[-_KEY_CHARACTERS:]
    return is_secret_in_query((unquote_plus(key) if "%" in key or "+" in key else key)[-_NAME_CHARACTERS:])


def redact_query(query: str, mode: str) -> str:
    """
    Replace query values that must not be recorded; the keys and their order stay.

    A URL that is a value loses its own secrets; one that is percent-encoded is replaced whole where it has any. At most
    128 pairs are looked at, what comes behind them is one ``REDACTED``. Values that may be a URL are looked into for
    2,048 characters in all, others are replaced. Of a key, the last 64 characters are read.

    Args:
        query: The query string without ``?``, as received.
        mode: ``all`` keeps every value, ``sensitive`` drops secret and personal ones, ``none`` drops every value.
    """
    return query if mode == "all" or not query else _redacted(query, mode, 0)


def redact_url(url: str, mode: str) -> str:
    """
    Return the URL without credentials, and without the values of its query and fragment that must not be recorded.
    """
    return _url(url, mode, 0)


def _redacted(query: str, mode: str, depth: int) -> str:
    parts = _SEPARATORS.split(query, _PAIRS)
    redacted = False
    left = _URL_CHARACTERS
    # Pieces stand at even places, what separates them at odd ones.
    for index in range(0, len(parts), 2):
        if index == 2 * _PAIRS:
            parts[index] = REDACTED
            break
        key, equals, value = parts[index].partition("=")
        if equals:
            redacted = bool(value) and (mode == "none" or _is_secret(key))
            if redacted:
                parts[index] = f"{key}={REDACTED}"
            elif "//" in value or "?" in value or ("%" in value and _ENCODED.search(value)):
                left -= len(value)
                parts[index] = f"{key}={_value(value, mode, depth) if left >= 0 else REDACTED}"
        elif redacted and key and index and parts[index - 1] == ";":
            # Servers differ on whether ";" separates: it may be the rest of the secret.
            parts[index] = REDACTED
    return "".join(parts)


def _value(value: str, mode: str, depth: int) -> str:
    """
    Return a query's value without the secrets of a URL that it may be.
    """
    plain = value
    for _ in range(_DEPTH):
        if "%" not in plain or (decoded := unquote(plain)) == plain:
            break
        plain = decoded
    if "//" not in plain and "?" not in plain:
        return value
    if depth >= _DEPTH or unquote(plain) != plain:
        return REDACTED
    shown = _url(plain, mode, depth + 1)
    if plain == value:
        return shown
    return value if shown == plain else REDACTED


def _url(url: str, mode: str, depth: int) -> str:
    if "@" in url:
        url = _without_user(url)
    if "=" not in url or mode == "all":
        return url
    url, mark, fragment = url.partition("#")
    if mark:
        fragment = mark + _redacted(fragment, mode, depth)
    url, mark, query = url.partition("?")
    return f"{url}{mark}{_redacted(query, mode, depth)}{fragment}"


def _without_user(url: str) -> str:
    """
    Return the URL with ``REDACTED:REDACTED`` as its user information, also where a password has ``/``, ``?`` or ``#``.
    """
    scheme, mark, rest = ("", "//", url[2:]) if url.startswith("//") else url.partition("://")
    if not mark:
        return url
    end = min((position for position in map(rest.find, "/?#") if position >= 0), default=len(rest))
    user, colon, password = rest[:end].partition(":")
    at = rest.rfind("@", 0, end)
    is_web = scheme.lower() in _WEB
    if colon and not rest.startswith("[") and (not is_web or (at < 0 and not (user and password.isdigit()))):
        # What looks like the host ends in no port, so it is a user with the begin of a password.
        before_query = rest.find("?")
        at = rest.rfind("@", 0, before_query) if before_query >= 0 else -1
        at = at if at >= 0 else rest.rfind("@")
    return f"{scheme}{mark}{REDACTED}:{REDACTED}@{rest[at + 1 :]}" if at >= 0 else url
