"""
Which hosts get our traceparent, baggage and request id. Names and addresses only: nothing is looked up.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from otel_correlation.policy.trust import NONE, address, network

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ALL: Final = "*"
_MAX_NAME: Final = 253  # RFC 1035, without the final dot

_LABEL: Final = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME: Final = re.compile(rf"(?:{_LABEL}\.)*{_LABEL}")
# The C library reads "2130706433", "0x7f.1" and "127.1" as addresses: the last label of a name is no number.
_NUMBER: Final = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")

# RFC 1918, loopback, link-local, IPv6 unique local.
_INTERNAL: Final = (
    "localhost",
    *("*.localhost", "*.local", "*.internal", "*.svc", "*.cluster.local"),
    *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "169.254.0.0/16"),
    *("::1", "fc00::/7", "fe80::/10"),
)


def host_pattern(text: str) -> str:
    """
    Return ``text`` as ``Hosts`` takes it: ``*``, ``none``, a name, ``*.`` and a name, an address or a network.

    Raises:
        ValueError: It is none of these; the message says why.
    """
    word = text.lower()
    if word in (ALL, NONE):
        return word
    word = word.removesuffix(".")
    if _is_name(word.removeprefix("*.")):
        return word
    try:
        return str(network(text))
    except ValueError as error:
        if address(text.partition("/")[0]) is not None:
            raise
        message = "not a host such as api.example.com, *.internal or 10.0.0.0/8; no scheme, no port"
        raise ValueError(message) from error


class Hosts:
    """
    A set of hosts.

    Args:
        patterns: What ``host_pattern`` returned.
        internal: Whether internal hosts belong to it: private, loopback and link-local addresses, names of one label,
            and names below ``localhost``, ``local``, ``internal``, ``svc`` and ``cluster.local``.
    """

    def __init__(self, patterns: Iterable[str], *, internal: bool = False) -> None:
        words = {*patterns, *(_INTERNAL if internal else ())} - {NONE}
        self._single_labels = internal
        self._all = ALL in words
        self._suffixes = tuple(word[1:] for word in words if word.startswith("*."))
        rest = [word for word in words if not word.startswith(ALL)]
        self._names = frozenset(word for word in rest if _is_name(word))
        self._networks = tuple(network(word) for word in rest if word not in self._names)

    def __contains__(self, host: str) -> bool:
        """
        Tell whether a URL's host is one of them.

        Args:
            host: As httpx has it: ASCII, IPv6 without brackets.
        """
        if self._all:
            return True
        found = address(host.partition("%")[0])
        if found is not None:
            return any(found in entry for entry in self._networks)
        name = host.lower().removesuffix(".")
        if not _is_name(name):
            return False
        return name in self._names or name.endswith(self._suffixes) or (self._single_labels and "." not in name)


def _is_name(text: str) -> bool:
    return len(text) <= _MAX_NAME and _NAME.fullmatch(text) is not None and _NUMBER.fullmatch(text) is None


class Outbound:
    """
    Tells for a URL whether traceparent, baggage and request id may leave for its host.

    Args:
        hosts: The hosts that get each of the three.
    """

    def __init__(self, *hosts: Hosts) -> None:
        self._hosts = hosts
        self._remembered = lru_cache(maxsize=1024)(self._decide)

    def __call__(self, url: Any) -> tuple[bool, bool, bool]:
        """
        Decide for a URL of httpx's or httpx2's.
        """
        host: bytes = url.raw_host
        # A longer one is no name, and not worth remembering.
        return self._remembered(host) if len(host) <= _MAX_NAME + 1 else self._decide(host)

    def _decide(self, host: bytes) -> tuple[bool, bool, bool]:
        text = host.decode("latin-1")
        traceparent, baggage, request_id = (text in allowed for allowed in self._hosts)
        return traceparent, baggage, request_id


def outbound_for(
    edge: str, traceparent: Sequence[str], baggage: Sequence[str], request_id: Sequence[str]
) -> Outbound | None:
    """
    Return the outbound policy, or None where everything leaves for every host.

    Args:
        edge: ``open``: what is not declared leaves for every host. ``public``: for internal hosts and those declared.
        traceparent: Patterns of hosts that get it.
        baggage: The same.
        request_id: The same.
    """
    declared = (traceparent, baggage, request_id)
    if edge == "open":
        if all(not patterns or ALL in patterns for patterns in declared):
            return None
        return Outbound(*(Hosts(patterns or (ALL,)) for patterns in declared))
    # "none" is said against the preset: internal hosts get nothing either.
    return Outbound(*(Hosts(patterns, internal=NONE not in patterns) for patterns in declared))
