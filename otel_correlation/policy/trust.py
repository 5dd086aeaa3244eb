"""
Whose ids are continued: callers in declared networks, found behind declared proxies and nowhere else.

Every doubt restarts: an address that cannot be read, a forwarding header that two readers could read differently.
"""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Address = IPv4Address | IPv6Address
    Network = IPv4Network | IPv6Network
    # None: whoever it is, it cannot be told.
    Peer = Address | str | None

# The peer of a Unix socket, which has no address: whoever may write to the socket's file.
UNIX: Final = "unix"
# Declares a list that holds nobody.
NONE: Final = "none"

MAX_HOPS: Final = 32
_MAX_FORWARDED: Final = 8_192
# Twice what 32 hops with all four parameters have; 8,192 separators cost five milliseconds.
_MAX_PARAMETERS: Final = 256
_MAX_ADDRESS: Final = 64

_NETWORK: Final = re.compile(r"[0-9A-Fa-f:.]{2,45}(?:/[0-9]{1,3})?")
_MAPPED: Final = IPv6Network("::ffff:0:0/96")
# An address, with a port or without; IPv6 with a port only in brackets (RFC 7239, section 6).
_NODE: Final = re.compile(
    r"\[([0-9A-Fa-f:.]+)\](?::[\w.-]{1,32})?|([0-9]+(?:\.[0-9]+){3})(?::[\w.-]{1,32})?|([0-9A-Fa-f:.]+)", re.ASCII
)
_TOKEN: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - RFC 9110
_QUOTED: Final = r'"(?:[\t !#-\[\]-~]|\\[\t -~])*"'
_PAIR: Final = re.compile(rf"({_TOKEN})=({_TOKEN}|{_QUOTED})")
_SPACE: Final = re.compile(r"[ \t]*")
# The headers by which proxies say who called them.
FORWARDING: Final = frozenset({b"x-forwarded-for", b"forwarded"})
# What a force header says.
_YES: Final = frozenset({b"1", b"true"})


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Address | None:
    try:
        found = ip_address(text)
    except ValueError:
        return None
    # A server that listens on both families shows IPv4 callers like this.
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return found if mapped is None else mapped


def address(text: object) -> Address | None:
    """
    Return the address that ``text`` is, or None; of an IPv4 address mapped to IPv6 the IPv4 one.
    """
    return _parsed(text) if isinstance(text, str) and len(text) <= _MAX_ADDRESS else None


def network(text: str) -> Network:
    """
    Return the network, or the single address, that ``text`` names.

    Raises:
        ValueError: It names none; bits behind the prefix count as a mistake (``10.0.0.1/8``).
    """
    if not _NETWORK.fullmatch(text):
        message = "not an address and not a network such as 10.0.0.0/8"
        raise ValueError(message)
    found = ip_network(text)
    if isinstance(found, IPv6Network) and found.subnet_of(_MAPPED):
        bits = int(found.network_address) & 0xFFFFFFFF
        return IPv4Network((bits, found.prefixlen - 96))
    return found


def peers(text: str) -> str:
    """
    Return ``text`` as ``Networks`` takes it: a network, an address, ``unix`` or ``none``.

    Raises:
        ValueError: It is none of these; the message says why.
    """
    word = text.lower()
    return word if word in (UNIX, NONE) else str(network(text))


class Networks:
    """
    A set of peers.

    Args:
        entries: What ``peers`` returned; anything else holds nobody.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        words = set(entries)
        self._unix = UNIX in words
        self._networks = tuple(network(entry) for entry in sorted(words - {UNIX, NONE}))

    def __contains__(self, peer: Peer) -> bool:
        """
        Tell whether this peer is one of them.
        """
        if peer is None or isinstance(peer, str):
            return peer == UNIX and self._unix
        return any(peer in entry for entry in self._networks)


class Trust:
    """
    Tells whose ids are continued, and who may have a trace sampled by a header.

    Args:
        networks: The callers that are trusted.
        proxies: The proxies whose forwarding headers are believed.
        force_header: The header by which a trusted caller gets its trace sampled; empty for none.
    """

    def __init__(self, networks: Sequence[str], proxies: Sequence[str] = (), force_header: str = "") -> None:
        self._networks = Networks(networks)
        self._proxies = Networks(proxies)
        self._force_header = force_header.lower().encode("latin-1", "replace")

    def continues(
        self,
        scope: Mapping[str, Any],
        socket_peer_key: str,
        headers: Iterable[tuple[bytes, bytes]] | None = None,
    ) -> bool:
        """
        Tell whether the caller of an ASGI scope is trusted.

        Args:
            scope: The scope.
            socket_peer_key: Where the scope holds the socket's peer, if the server replaced ``client``.
            headers: Those of its headers that are named in ``FORWARDING``, and any others; all of them if None.
        """
        replaced = socket_peer_key in scope
        shown = scope.get("client")
        peer = _socket_peer(scope, scope[socket_peer_key] if replaced else shown)
        if peer not in self._proxies:
            # The server took another address from a header of this peer: then both must be trusted.
            return peer in self._networks and (not replaced or _socket_peer(scope, shown) in self._networks)
        chains = _chains(scope["headers"] if headers is None else headers)
        if not chains:
            return peer in self._networks
        # A proxy maintains one of the two headers and lets the other through as the caller wrote it: both must agree.
        return all(self._first_stranger(chain) in self._networks for chain in chains)

    def _first_stranger(self, chain: list[Address | None]) -> Address | None:
        """
        Return the first hop, seen from here, that is no declared proxy; the last one if all are.
        """
        return next((hop for hop in chain if hop not in self._proxies), chain[-1])

    def forces(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """
        Tell whether these headers of a trusted caller ask for its trace: one field, ``1`` or ``true``.
        """
        wanted = self._force_header
        if not wanted:
            return False
        values = [value for name, value in headers if name.lower() == wanted]
        return len(values) == 1 and values[0].strip().lower() in _YES


def trust_for(edge: str, networks: Sequence[str], proxies: Sequence[str], force_header: str) -> Trust | None:
    """
    Return the inbound policy, or None where every caller is continued.

    Args:
        edge: ``open`` or ``public``.
        networks: The declared networks.
        proxies: The declared proxies.
        force_header: The header by which a trusted caller gets its trace sampled.
    """
    return Trust(networks, proxies, force_header) if networks or edge != "open" else None


def end_of(pair: object) -> tuple[str, int]:
    """
    Return the address and the port of a scope's ``client`` or ``server``: empty and 0 where there is none.

    ASGI has a text and a number, or None; Granian has the port as text, Daphne a list, and a Unix socket has neither.
    """
    if type(pair) is tuple and len(pair) == 2:  # nearly every request
        host, port = pair
        if type(host) is str and type(port) is int and 0 < port < 65_536:
            return host, port
    if not isinstance(pair, tuple | list) or not pair:
        return "", 0
    host = pair[0]
    port = pair[1] if len(pair) > 1 else 0
    if type(port) is str:
        port = int(port) if len(port) <= 5 and port.isascii() and port.isdecimal() else 0
    # By the type: True is an int, too.
    return host if isinstance(host, str) else "", port if type(port) is int and 0 < port < 65_536 else 0


def _socket_peer(scope: Mapping[str, Any], client: Any) -> Peer:
    server = scope.get("server")
    if client is None:
        # A TCP peer that is gone before it was asked for has no address, too; the port tells them apart.
        has_no_port = isinstance(server, tuple | list) and len(server) > 1 and server[1] is None
        return UNIX if server is None or has_no_port else None
    if not isinstance(client, tuple | list) or not client:
        return None
    if client[0] != "":
        return address(client[0])
    # Granian's peer of a Unix socket: an empty name, and a server that is a path without a port.
    path, port = end_of(server)
    return UNIX if "/" in path and not port else None


def _chains(headers: Iterable[tuple[bytes, bytes]]) -> list[list[Address | None]]:
    """
    Return the hops of each forwarding header that is present, the nearest first.
    """
    listed: list[bytes] = []
    standard: list[bytes] = []
    for name, value in headers:
        lower = name.lower()
        if lower == b"x-forwarded-for":
            listed.append(value)
        elif lower == b"forwarded":
            standard.append(value)
    chains: list[list[Address | None]] = []
    if listed:
        chains.append(x_forwarded_for(b",".join(listed).decode("latin-1")))
    if standard:
        chains.append(forwarded(b",".join(standard).decode("latin-1")))
    return chains


def _node(text: str) -> Address | None:
    match = _NODE.fullmatch(text)
    return None if match is None else address(match[1] or match[2] or match[3])


def x_forwarded_for(text: str) -> list[Address | None]:
    """
    Return the hops of ``X-Forwarded-For``, the nearest first; None is one that cannot be read.

    Args:
        text: All fields, joined by commas. Beyond ``MAX_HOPS`` one unreadable hop stands for the rest.
    """
    parts = text.rsplit(",", MAX_HOPS)
    hops: list[Address | None] = [_node(part.strip(" \t")) for part in reversed(parts[-MAX_HOPS:])]
    if len(parts) > MAX_HOPS:
        hops.append(None)
    return hops


def forwarded(text: str) -> list[Address | None]:
    """
    Return the hops of ``Forwarded`` (RFC 7239), the nearest first; None is one that cannot be read.

    Args:
        text: All fields, joined by commas. As a whole it must follow the grammar: a quote that a caller left open would
            swallow what the proxies behind it wrote.
    """
    if len(text) > _MAX_FORWARDED or text.count(",") + text.count(";") > _MAX_PARAMETERS:
        return [None]
    hops: list[Address | None] = []
    names: dict[str, str] = {}
    position, end = 0, len(text)
    while True:
        position = _skip(text, position)
        if match := _PAIR.match(text, position):
            name = match[1].lower()
            if name in names:
                return [None]
            names[name] = match[2]
            position = _skip(text, match.end())
        if position < end and text[position] not in ",;":
            return [None]
        if position == end or text[position] == ",":
            node = names.get("for", "")
            hops.append(_node(node[1:-1] if node.startswith('"') else node))
            names = {}
        if position == end:
            break
        position += 1
    hops.reverse()
    return hops if len(hops) <= MAX_HOPS else [*hops[:MAX_HOPS], None]


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return position if match is None else match.end()
