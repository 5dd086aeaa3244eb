"""
Which hosts get what: by name and address as they stand in the URL, and nothing is looked up.
"""

from __future__ import annotations

from typing import Any

import httpx
import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_correlation.policy.outbound import Hosts, host_pattern, outbound_for

ALL, NOTHING = (True, True, True), (False, False, False)


@pytest.mark.parametrize("patterns", [(), ("*",), ("orders", "*")])
def test_the_default_is_no_policy(patterns: tuple[str, ...]) -> None:
    """
    Where everything leaves for every host, no request pays for the question.
    """
    assert outbound_for("open", patterns, patterns, patterns) is None


INTERNAL = [
    "localhost",
    "LOCALHOST",
    "localhost.",
    "a.localhost",
    "orders",
    "my_service-2",
    "orders.default.svc",
    "orders.default.svc.cluster.local",
    "printer.local",
    "db.internal",
    "a.b.internal",
    "10.1.2.3",
    "172.31.255.255",
    "192.168.0.1",
    "127.0.0.2",
    "169.254.169.254",
    "::1",
    "fd12::1",
    "fe80::1%25eth0",
    "::ffff:10.0.0.1",
]
EXTERNAL = [
    "example.com",
    "internal.example.com",
    "xinternal.com",
    "svc.example",
    "xn--bcher-kva.de",
    "8.8.8.8",
    "172.32.0.1",
    "100.64.0.1",
    "0.0.0.0",
    "2001:db8::1",
    "::ffff:8.8.8.8",
    # What the C library reads as an address is no name.
    "134744072",
    "0x8080808",
    "8.8.2056",
    "010.8.8.8",
    "0x8.0x8",
    "",
    "a..internal",
    "-a",
    "a b",
    "x" * 300 + ".internal",
]


@pytest.mark.parametrize(
    ("host", "inside"), [*((host, True) for host in INTERNAL), *((host, False) for host in EXTERNAL)]
)
def test_internal_hosts(host: str, inside: bool) -> None:
    """
    The preset's internal hosts are private addresses and names that no public zone has; everything else is outside.
    """
    assert (host in Hosts([], internal=True)) is inside


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("*", ["a", "8.8.8.8", "", "::1"], []),
        ("none", [], ["none", "a", "127.0.0.1"]),
        (
            "api.example.com",
            ["api.example.com", "API.EXAMPLE.COM", "api.example.com."],
            ["example.com", "xapi.example.com"],
        ),
        (
            "*.Example.com",
            ["a.example.com", "a.b.example.com"],
            ["example.com", "aexample.com", "a.example.com.evil.io"],
        ),
        ("10.0.0.0/8", ["10.1.2.3", "::ffff:10.1.2.3"], ["11.0.0.0", "10.example.com", "10"]),
        ("192.0.2.7", ["192.0.2.7"], ["192.0.2.8", "192.0.2.7.example.com"]),
        ("fd00::/8", ["fd00::1"], ["::1", "10.0.0.1"]),
        ("localhost", ["localhost"], ["127.0.0.1", "a.localhost"]),
        ("xn--bcher-kva.de", ["xn--bcher-kva.de"], ["bucher.de"]),
    ],
)
def test_patterns(pattern: str, inside: list[str], outside: list[str]) -> None:
    """
    A name is itself, ``*.`` everything below one, a network the addresses in it; names are never looked up.
    """
    hosts = Hosts([host_pattern(pattern)])
    assert [host for host in inside + outside if host in hosts] == inside


def test_each_of_the_three_has_hosts_of_its_own() -> None:
    """
    traceparent, baggage and request id are decided one by one; what is not declared leaves for every host.
    """
    policy = outbound_for("open", ("orders",), ("none",), ())
    assert policy is not None
    for library in (httpx, httpx2):
        assert policy(library.URL("http://orders:8000/x")) == (True, False, True)
        assert policy(library.URL("http://example.com/")) == (False, False, True)


def test_the_preset() -> None:
    """
    ``public`` means internal hosts and those declared; ``none`` is said against it.
    """
    policy = outbound_for("public", ("api.example.com",), ("none",), ("none", "api.example.com"))
    assert policy is not None
    assert policy(httpx.URL("http://orders/")) == (True, False, False)
    assert policy(httpx.URL("https://api.example.com/")) == (True, False, True)
    assert policy(httpx.URL("https://example.com/")) == NOTHING
    assert policy(httpx.URL("http://[fe80::1%25eth0]/")) == (True, False, False)
    plain = outbound_for("public", (), (), ())
    assert plain is not None
    assert (plain(httpx.URL("http://[::1]:80/")), plain(httpx.URL("http://bücher.de/"))) == (ALL, NOTHING)
    assert plain(httpx.URL("http:///nowhere")) == NOTHING
    assert plain(httpx.URL(f"http://{'a' * 60}.{'b.' * 150}internal/")) == NOTHING


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a:80",
        "http://a",
        "*.",
        "**",
        "*a",
        "a.*",
        "10.*",
        "10.0.0.1/8",
        "a/8",
        "2130706433",
        "0x7f",
        "a..b",
        "bücher.de",
    ],
)
def test_wrong_patterns(text: str) -> None:
    """
    What could be read in two ways is no pattern.
    """
    with pytest.raises(ValueError, match=r"\w"):
        host_pattern(text)


@given(st.text(max_size=60) | st.text("abc019.*-_/:x", max_size=30))
def test_any_text_is_a_pattern_or_a_clear_no(text: str) -> None:
    """
    A pattern reads as itself again, or is a ValueError.
    """
    try:
        canonical = host_pattern(text)
    except ValueError:
        return
    assert host_pattern(canonical) == canonical
    Hosts([canonical])


@given(st.text(max_size=300) | st.text("abc019.-_%:x", max_size=40))
def test_any_host_gets_an_answer(host: str) -> None:
    """
    No host raises, and none is inside without being a name or an address.
    """
    hosts: Any = Hosts(["*.internal", "10.0.0.0/8"], internal=True)
    if host in hosts:
        assert host.partition("%")[0].isascii()
        assert " " not in host.partition("%")[0]


@given(st.ip_addresses(v=4))
def test_numbers_are_no_names(found: Any) -> None:
    """
    However the C library lets an address be written, a public one is never taken for an internal name.
    """
    number = int(found)
    spellings = [
        str(number),
        hex(number),
        f"{number >> 24}.{number & 0xFFFFFF}",
        f"0x{number >> 24:x}.{number & 0xFFFFFF}",
    ]
    hosts = Hosts([], internal=True)
    assert not any(spelling in hosts for spelling in spellings)
