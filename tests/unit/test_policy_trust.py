"""
Who a caller is, and whether it is trusted: nothing that a caller writes can make it somebody else.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_correlation.policy.trust import (
    MAX_HOPS,
    Networks,
    Trust,
    address,
    forwarded,
    network,
    peers,
    trust_for,
    x_forwarded_for,
)
from otel_correlation.settings import Settings, from_environment

HOW_TO = (Path(__file__).parents[2] / "docs/how-to/public-edge.md").read_text()
PEER = "peer"
INSIDE = "10.1.2.3"
OUTSIDE = "203.0.113.9"
PROXY = "192.0.2.80"


def scope(client: Any = (OUTSIDE, 50000), *headers: tuple[bytes, bytes], **more: Any) -> dict[str, Any]:
    """
    The parts of an ASGI scope that tell who calls.
    """
    return {"client": client, "server": ("192.0.2.1", 8000), "headers": list(headers), **more}


def behind(*headers: tuple[bytes, bytes], proxies: tuple[str, ...] = (PROXY,), client: Any = (PROXY, 1)) -> bool:
    """
    Tell whether a caller behind a declared proxy is trusted.
    """
    return Trust(["10.0.0.0/8"], [peers(entry) for entry in proxies]).continues(scope(client, *headers), PEER)


def xff(value: str) -> tuple[bytes, bytes]:
    """
    One field.
    """
    return b"x-forwarded-for", value.encode("latin-1")


def test_the_default_is_no_policy() -> None:
    """
    Where nothing is declared every caller is continued, and no request pays for the question.
    """
    assert trust_for("open", (), ("10.0.0.0/8",), "x-force") is None
    assert trust_for("open", ("none",), (), "") is not None
    assert trust_for("public", (), (), "") is not None


@pytest.mark.parametrize(
    ("client", "trusted"),
    [
        ((INSIDE, 1), True),
        (["10.255.255.255", 1], True),
        (("::ffff:10.1.2.3", 1), True),
        (("fd00::1", 1), True),
        (("fe80::1%eth0", 1), False),
        ((OUTSIDE, 1), False),
        (("11.0.0.0", 1), False),
        (("testclient", 1), False),
        (("", 1), False),
        (("010.1.2.3", 1), False),
        ((None, 1), False),
        (("1" * 1000, 1), False),
        ("10.1.2.3", False),
        (None, False),
        ((), False),
        ([], False),
        ("", False),
        ({"host": INSIDE}, False),
        ((INSIDE.encode(), 1), False),
        ((INSIDE,), True),
        ([INSIDE, "40000"], True),
        (("", "0"), False),
        (0, False),
        (object(), False),
    ],
)
def test_the_sockets_peer(client: Any, trusted: bool) -> None:
    """
    Without declared proxies the socket's peer counts; what is no address is nobody.
    """
    trust = Trust(["10.0.0.0/8", "fd00::/8"])
    assert trust.continues(scope(client, xff(INSIDE), (b"forwarded", b"for=10.1.2.3")), PEER) is trusted


def test_nobody_is_trusted_where_nobody_is_declared() -> None:
    """
    ``public`` alone, and a list without a usable entry, continue nobody.
    """
    for trust in (trust_for("public", (), (), ""), trust_for("open", ("none",), (), "")):
        assert trust is not None
        assert not any(trust.continues(scope(client), PEER) for client in ((INSIDE, 1), ("127.0.0.1", 1), None))


def test_unix_sockets() -> None:
    """
    A Unix socket's peer is trusted, or a proxy, where ``unix`` is declared; a TCP peer without an address is not it.
    """
    assert Trust(["unix"]).continues(scope(None, server=("/run/app.sock", None)), PEER)
    assert Trust(["unix"]).continues(scope(None, server=None), PEER)
    assert not Trust(["unix"]).continues(scope(None), PEER)
    assert not Trust(["unix"]).continues(scope(("unix", 1)), PEER)
    assert not Trust(["10.0.0.0/8"]).continues(scope(None, server=("/run/app.sock", None)), PEER)
    # As Granian shows a Unix socket, and a TCP peer that it has no address of.
    assert Trust(["unix"]).continues(scope(("", "0"), server=("/run/app.sock", "0")), PEER)
    assert not Trust(["unix"]).continues(scope(("", "0"), server=("192.0.2.1", "8000")), PEER)
    assert not Trust(["unix"]).continues(scope(("", "0"), server=None), PEER)
    assert not Trust(["10.0.0.0/8"]).continues(scope(("", "0"), server=("/run/app.sock", "0")), PEER)
    client: Any
    for client in ("", (), [], 0):
        assert not Trust(["unix"]).continues(scope(client, server=("/run/app.sock", None)), PEER)
    server: Any
    for server in ("", (), [], ("/run/app.sock",), "/run/app.sock", 0):
        assert not Trust(["unix"]).continues(scope(None, server=server), PEER)
    trust = Trust(["10.0.0.0/8"], ["unix"])
    socket: dict[str, Any] = {"server": ("/run/app.sock", None)}
    assert trust.continues(scope(None, xff(INSIDE), **socket), PEER)
    assert not trust.continues(scope(None, xff(OUTSIDE), **socket), PEER)
    assert not trust.continues(scope(None, **socket), PEER)


@pytest.mark.parametrize(
    ("value", "trusted"),
    [
        (INSIDE, True),
        (OUTSIDE, False),
        (f"{INSIDE}, {OUTSIDE}", False),
        (f"{OUTSIDE}, {INSIDE}", True),
        (f"{OUTSIDE},{INSIDE} , {PROXY}", True),
        (f"{INSIDE}, {OUTSIDE}, {PROXY}, {PROXY}", False),
        (f"{INSIDE}:5000", True),
        ("::ffff:10.1.2.3", True),
        ("[::ffff:10.1.2.3]:5000", True),
        ("10.1.2.3:port", True),
        ("", False),
        (f"{INSIDE},", False),
        ("unknown", False),
        (f"{INSIDE}, unknown, {PROXY}", False),
        ("10.1.2.3 10.1.2.3", False),
        ("10.1.2.3:1:2", False),
        ("[10.1.2.3", False),
        ("10.1.2", False),
        ('"10.1.2.3"', False),
        (",".join([INSIDE, *[PROXY] * (MAX_HOPS - 1)]), True),
        (",".join([INSIDE, *[PROXY] * MAX_HOPS]), False),
    ],
)
def test_x_forwarded_for(value: str, trusted: bool) -> None:
    """
    Behind a declared proxy the caller is the first hop from the right that is none; an unreadable hop is nobody.
    """
    assert behind(xff(value)) is trusted


@pytest.mark.parametrize(
    ("value", "trusted"),
    [
        (f"for={INSIDE}", True),
        (f'For="{INSIDE}:5000";proto=https;by=_gw', True),
        (f"proto=https; for={INSIDE} ;host=a", True),
        ('for="[::ffff:10.1.2.3]:80"', True),
        (f"for={OUTSIDE}, for={INSIDE}, for={PROXY}", True),
        (f"for={INSIDE}, for={OUTSIDE}", False),
        (f"for={INSIDE}, proto=https", False),
        (f"for={INSIDE},", False),
        (f"for={INSIDE};for={INSIDE}", False),
        (f'for="x, for={INSIDE}', False),
        (f'for="\\", for={INSIDE}', False),
        (f"for = {INSIDE}", False),
        ("for=unknown", False),
        ("for=_hidden", False),
        ('for=""', False),
        ("", False),
        (INSIDE, False),
        (f"for={INSIDE};" + "a=b;" * 4000, False),
        (f"for={INSIDE};proto=https;by=_a;host=h" + ";" * 253, True),
        (f"for={INSIDE};proto=https;by=_a;host=h" + ";" * 254, False),
        (", ".join([f"for={INSIDE}", *[f"for={PROXY}"] * MAX_HOPS]), False),
    ],
)
def test_forwarded(value: str, trusted: bool) -> None:
    """
    ``Forwarded`` counts as a whole: one that does not follow its grammar names nobody.
    """
    assert behind((b"forwarded", value.encode())) is trusted


def test_several_fields_are_one_list() -> None:
    """
    Fields are joined in order, whatever the case of their name.
    """
    assert behind(xff(OUTSIDE), (b"X-Forwarded-For", INSIDE.encode()))
    assert not behind(xff(INSIDE), (b"X-Forwarded-For", OUTSIDE.encode()))
    assert not behind((b"forwarded", b'for="'), (b"Forwarded", f"for={INSIDE}".encode()))


def test_both_headers_must_agree() -> None:
    """
    A proxy maintains one of the two and lets the other through as the caller wrote it: one bad one is enough.
    """
    outside, inside = (b"forwarded", f"for={OUTSIDE}".encode()), (b"forwarded", f"for={INSIDE}".encode())
    assert behind(xff(INSIDE), inside)
    assert not behind(xff(OUTSIDE), inside)
    assert not behind(xff(INSIDE), outside)


def test_a_proxy_that_names_nobody() -> None:
    """
    Without a forwarding header the proxy itself is the caller; where all hops are proxies, the farthest is.
    """
    assert not behind()
    assert behind(proxies=("10.0.0.0/8",), client=(INSIDE, 1))
    assert behind(xff("10.9.9.9"), proxies=("10.0.0.0/8",), client=(INSIDE, 1))
    assert not behind(xff(PROXY))


def test_an_address_that_the_server_took_from_a_header() -> None:
    """
    What uvicorn makes of the caller adds no trust: the socket's peer counts, and both must be trusted without a proxy.
    """
    trust = Trust(["10.0.0.0/8"], [PROXY + "/32"])
    assert not trust.continues(scope((INSIDE, 0), peer=(OUTSIDE, 1)), PEER)
    assert not trust.continues(scope((OUTSIDE, 0), peer=(INSIDE, 1)), PEER)
    assert trust.continues(scope((INSIDE, 1), peer=(INSIDE, 1)), PEER)
    # A declared proxy's header is read from the right, not as uvicorn with --forwarded-allow-ips='*' reads it.
    assert not trust.continues(scope((INSIDE, 0), xff(f"{INSIDE}, {OUTSIDE}"), peer=(PROXY, 1)), PEER)
    assert trust.continues(scope((OUTSIDE, 0), xff(f"{OUTSIDE}, {INSIDE}"), peer=(PROXY, 1)), PEER)


@pytest.mark.parametrize(
    ("headers", "forced"),
    [
        ([(b"x-force", b"1")], True),
        ([(b"X-Force", b" True ")], True),
        ([(b"x-force", b"0")], False),
        ([(b"x-force", b"")], False),
        ([(b"x-force", b"yes")], False),
        ([(b"x-force", b"1"), (b"x-force", b"1")], False),
        ([(b"x-forced", b"1")], False),
        ([], False),
    ],
)
def test_force_header(headers: list[tuple[bytes, bytes]], forced: bool) -> None:
    """
    The header forces where it is one field that says ``1`` or ``true``; without a name nothing does.
    """
    assert Trust([], [], "X-Force").forces(headers) is forced
    assert not Trust([]).forces([*headers, (b"", b"1")])


@pytest.mark.parametrize("block", re.findall(r"```sh\n(.*?)```", HOW_TO, re.DOTALL))
def test_the_how_tos_variables(block: str) -> None:
    """
    Every set of variables in the how-to is taken as it stands.
    """
    environ = dict(line.split("=", 1) for line in block.splitlines())
    assert environ
    settings = from_environment(environ)
    assert settings.problems == ()
    assert settings != Settings()


HEADERS = st.lists(
    st.tuples(
        st.sampled_from([b"x-forwarded-for", b"forwarded", b"X-Real-IP", b"x-forwarded-host"]),
        st.binary(max_size=60)
        | st.text("0123456789abcdef.:,;= \"\\[]for'", max_size=60).map(str.encode)
        | st.lists(st.sampled_from([INSIDE, PROXY, f"for={INSIDE}", 'for="', "unknown", "10.1.2.3:1"]), max_size=6)
        .map(", ".join)
        .map(str.encode),
    ),
    max_size=4,
)


@given(HEADERS)
def test_no_header_makes_a_stranger_trusted(headers: list[tuple[bytes, bytes]]) -> None:
    """
    Whatever a caller outside the networks writes, directly or through a proxy that adds its address, it is outside.
    """
    trust = Trust(["10.0.0.0/8"], [PROXY + "/32"])
    assert not trust.continues(scope((OUTSIDE, 1), *headers), PEER)
    assert not trust.continues(scope((PROXY, 1), *headers, xff(OUTSIDE)), PEER)
    for standard in (f"for={OUTSIDE}", f'for="{OUTSIDE}:80";proto="https"', 'for="[2001:db8::9]";by=_a', 'by="";for=x'):
        assert not trust.continues(scope((PROXY, 1), *headers, (b"forwarded", standard.encode())), PEER)


@given(st.text(max_size=400))
def test_the_nearest_hop_is_what_the_proxy_wrote(text: str) -> None:
    """
    No text before it changes how the last hop reads; ``Forwarded`` may become unreadable as a whole, never another.
    """
    near = ip_address(OUTSIDE)
    hops = x_forwarded_for(f"{text}, {OUTSIDE}")
    assert hops[0] == near
    assert len(hops) <= MAX_HOPS + 1
    standard = forwarded(f"{text}, for={OUTSIDE}")
    assert standard[0] in (near, None)
    assert len(standard) <= MAX_HOPS + 1
    assert len(x_forwarded_for(text)) >= 1
    assert len(forwarded(text)) >= 1


@given(st.lists(st.ip_addresses(), min_size=1, max_size=MAX_HOPS))
def test_hops_round_trip(hops: list[Any]) -> None:
    """
    Every address comes back as it was, nearest first, from both headers.
    """
    near_first = [address(str(hop)) for hop in reversed(hops)]
    assert x_forwarded_for(", ".join(map(str, hops))) == near_first
    quoted = [f'"[{hop}]:80"' if hop.version == 6 else f'"{hop}:80"' for hop in hops]
    assert forwarded(", ".join(f"for={hop};proto=http" for hop in quoted)) == near_first


@given(st.text(max_size=60) | st.text("0123456789abcdef.:/", max_size=40))
def test_any_text_is_a_network_or_a_clear_no(text: str) -> None:
    """
    A declared entry parses to itself again, or is a ValueError.
    """
    try:
        canonical = peers(text)
    except ValueError:
        return
    assert peers(canonical) == canonical
    Networks([canonical])


@given(st.ip_addresses(v=4), st.integers(0, 32))
def test_mapped_networks_are_ipv4_networks(start: Any, bits: int) -> None:
    """
    A network of mapped addresses holds the IPv4 callers that it means.
    """
    plain = network(f"{start}/32").supernet(new_prefix=bits)
    mapped = Networks([peers(f"::ffff:{plain.network_address}/{96 + bits}")])
    assert address(str(start)) in mapped
    assert address(f"::ffff:{start}") in mapped
