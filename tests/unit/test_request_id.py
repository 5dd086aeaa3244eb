"""
The value type at the heart of the bridge: what is valid, where it is read from, and which trace it roots.
"""

from __future__ import annotations

import string
import uuid
from hashlib import blake2b

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from otel_correlation.request_id import from_headers, parse, to_trace_id, to_uuid

ALPHABET = frozenset((string.ascii_letters + string.digits + "._~:/+=#-").encode())
VALID = st.text(st.sampled_from(bytes(sorted(ALPHABET)).decode()), min_size=1, max_size=200)
NAMES = (b"x-request-id", b"x-kong-request-id", b"x-amzn-trace-id")


@given(st.binary(max_size=210))
@example(b"")
@example(b"a" * 200)
@example(b"a" * 201)
@example(b"a\n")
@example(b"\na")
@example(b"a\r\nb")
@example(b"user@example.com")
@example("é".encode())
def test_parse_takes_exactly_the_alphabet(value: bytes) -> None:
    """
    An id is 1 to 200 bytes of the alphabet, returned unchanged; everything else is refused, never repaired.
    """
    good = 1 <= len(value) <= 200 and ALPHABET.issuperset(value)
    assert parse(value) == (value.decode("ascii") if good else None)


@given(VALID)
def test_parse_returns_what_came(value: str) -> None:
    """
    A valid id is the very text that came.
    """
    assert parse(value.encode()) == value


def test_each_byte() -> None:
    """
    Byte by byte, the alphabet is the documented one.
    """
    assert {code for code in range(256) if parse(bytes([code])) is not None} == ALPHABET


def test_ids_of_the_field() -> None:
    """
    What nginx, Kong, Heroku and UUID libraries send is valid.
    """
    for value in ("a" * 32, "f058ebd6-02f7-4d3f-942e-904344e8cde5#17", "abc+/=", "~._:", str(uuid.uuid1())):
        assert parse(value.encode()) == value


class TestFromHeaders:
    @pytest.mark.parametrize(
        ("headers", "result"),
        [
            ([], (None, False)),
            ([(b"x-request-id", b"a")], ("a", False)),
            ([(b"X-Request-ID", b"a")], ("a", False)),
            ([(b"x-request-id", b"a"), (b"x-request-id", b"b")], (None, True)),
            ([(b"x-request-id", b"a"), (b"x-request-id", b"a")], (None, True)),
            ([(b"x-request-id", b"a"), (b"X-REQUEST-ID", b"b")], (None, True)),
            ([(b"x-request-id", b"")], (None, True)),
            ([(b"x-request-id", b"a, b")], (None, True)),
            ([(b"x-request-id", b"a\n")], (None, True)),
            ([(b"x-request-id-2", b"a"), (b"request-id", b"b")], (None, False)),
            ([(b"x-kong-request-id", b"k"), (b"x-request-id", b"a")], ("a", False)),
            ([(b"x-kong-request-id", b"k")], ("k", False)),
            ([(b"x-kong-request-id", b"k"), (b"x-kong-request-id", b"l"), (b"x-request-id", b"a")], ("a", False)),
        ],
    )
    def test_first_present(self, headers: list[tuple[bytes, bytes]], result: tuple[str | None, bool]) -> None:
        """
        One field of the most wanted header that is present is read; two fields are refused.
        """
        assert from_headers(headers, NAMES) == result

    @pytest.mark.parametrize("value", [b"", b"a b", b"a" * 201, b"\xff"])
    def test_no_second_header_after_a_refusal(self, value: bytes) -> None:
        """
        A refused header is replaced; the next one of the list is not consulted.
        """
        assert from_headers([(b"x-kong-request-id", b"k"), (b"x-request-id", value)], NAMES) == (None, True)
        twice = [(b"x-request-id", b"a"), (b"x-kong-request-id", b"k"), (b"x-request-id", b"a")]
        assert from_headers(twice, NAMES) == (None, True)

    @pytest.mark.parametrize(
        "value",
        [
            b"Root=1-67891233-abcdef012345678912345678",
            b"Self=1-67891234-12456789abcdef012345678;Root=1-67891233-abcdef012345678912345678",
            b"Self=1;Root=1-67891233-abcdef012345678912345678;CalledFrom=app;More=1",
            b" Self=1; Root=1-67891233-abcdef012345678912345678 ; Other=\xff",
        ],
    )
    def test_load_balancer(self, value: bytes) -> None:
        """
        Of X-Amzn-Trace-Id the root is the id, wherever it stands in the list.
        """
        assert from_headers([(b"x-amzn-trace-id", value)], NAMES) == ("1-67891233-abcdef012345678912345678", False)

    @pytest.mark.parametrize(
        "value",
        [
            b"",
            b"plain-id",
            b"Self=1-67891233-abcdef012345678912345678",
            b"Root=1-67891233-abcdef01234567891234567",
            b"Root=1-67891233-abcdef0123456789123456789",
            b"Root=2-67891233-abcdef012345678912345678",
            b"Root=1-67891233-abcdef012345678912345678\n",
            b"Root=1-67891233-abcdef012345678912345678,Root=1-67891233-abcdef012345678912345678",
            b"NotRoot=1-67891233-abcdef012345678912345678",
            b";" * 100_000,
            b";" + b" " * 100_000,
        ],
    )
    def test_load_balancer_refused(self, value: bytes) -> None:
        """
        X-Amzn-Trace-Id without one well-formed root is refused.
        """
        assert from_headers([(b"x-amzn-trace-id", value)], NAMES) == (None, True)

    @given(
        st.lists(
            st.tuples(st.sampled_from(NAMES) | st.binary(max_size=20), VALID.map(str.encode) | st.binary(max_size=210)),
            max_size=6,
        )
    )
    def test_any_headers(self, headers: list[tuple[bytes, bytes]]) -> None:
        """
        No list of headers makes it raise; an id that it returns is valid and was sent.
        """
        found, refused = from_headers(headers, NAMES)
        present = any(name.lower() in NAMES for name, _ in headers)
        if found is None:
            assert refused == present
        else:
            assert parse(found.encode()) == found
            assert any(found.encode() in value for _, value in headers)
            assert not refused


class TestToTraceId:
    @pytest.mark.parametrize(
        ("value", "trace_id"),
        [
            ("f4a2b3c1-dead-beef-0000-aabbccddeeff", "f4a2b3c1deadbeef0000aabbccddeeff"),
            ("F4A2B3C1-DEAD-BEEF-0000-AABBCCDDEEFF", "f4a2b3c1deadbeef0000aabbccddeeff"),
            ("0190163d-8694-739b-aea5-966c26f8ad91", "0190163d8694739baea5966c26f8ad91"),
            ("00000000-0000-0000-0000-000000000001", "00000000000000000000000000000001"),
            ("f4a2b3c1deadbeef0000aabbccddeeff", "f4a2b3c1deadbeef0000aabbccddeeff"),
            ("F4A2B3C1DEADBEEF0000AABBCCDDEEFF", "f4a2b3c1deadbeef0000aabbccddeeff"),
            ("1-67891233-abcdef012345678912345678", "67891233abcdef012345678912345678"),
            ("Root=1-67891233-abcdef012345678912345678", "67891233abcdef012345678912345678"),
        ],
    )
    def test_128_bits(self, value: str, trace_id: str) -> None:
        """
        A UUID of any version, 32 hex digits and an ALB root are their 128 bits.
        """
        assert to_trace_id(value) == int(trace_id, 16)

    # Each literal is what `printf %s VALUE | b2sum -l 128` prints.
    @pytest.mark.parametrize(
        ("value", "trace_id"),
        [
            ("gateway-eu1-000000123", "7368379282f7495c1e37f8ffd4cc98b0"),
            ("abcdefghijklmnop", "47e8b00fc82f18447dea7646491bdeea"),
            ("urn:uuid:f4a2b3c1-dead-beef-0000-aabbccddeeff", "ae7c66f205af5af0b7ad7333be869f70"),
            ("f4a2b3c1-deadb-eef-0000-aabbccddeeff", "6741a26b1b97e4dfc8891b30c8fcc59a"),
            ("0000000000000000", "39aa728adaabb815be7be87cb51b1621"),
        ],
    )
    def test_the_hash_of_anything_longer(self, value: str, trace_id: str) -> None:
        """
        Any other id of 16 characters or more names the trace that b2sum prints, urn:uuid and odd dashes too.
        """
        assert to_trace_id(value) == int(trace_id, 16)

    @pytest.mark.parametrize(
        "value",
        [
            "42",
            "test",
            "a" * 15,
            "0" * 15,
            "0" * 32,
            "00000000-0000-0000-0000-000000000000",
            "1-00000000-000000000000000000000000",
        ],
    )
    def test_never_names_a_trace(self, value: str) -> None:
        """
        Short ids repeat and all-zero ones are invalid: neither names a trace.
        """
        assert to_trace_id(value) is None

    @given(VALID)
    def test_total(self, value: str) -> None:
        """
        Every valid id maps to None or to 128 bits that are not zero, the same ones every time.
        """
        found = to_trace_id(value)
        assert found == to_trace_id(value)
        assert found is None or 0 < found < 2**128
        if len(value) >= 16 and set(value) & set("ghijklmnopqrstuvwxyz_~:/+#"):
            assert found == int.from_bytes(blake2b(value.encode(), digest_size=16).digest(), "big")

    @given(st.text(max_size=300))
    def test_total_beyond_its_input(self, value: str) -> None:
        """
        Even what is no valid id does not make it raise.
        """
        to_trace_id(value)

    @given(st.uuids())
    def test_every_uuid(self, value: uuid.UUID) -> None:
        """
        Dashes and case do not matter: the bits of a UUID are its trace id.
        """
        for spelled in (str(value), value.hex, str(value).upper()):
            assert to_trace_id(spelled) == (value.int or None)


@given(st.integers(0, 2**128 - 1))
def test_minted_uuids_are_bridged(bits: int) -> None:
    """
    A minted UUID is version 4, valid, and roots the trace of its own bits.
    """
    minted = to_uuid(bits)
    parsed = uuid.UUID(minted)
    assert (parsed.version, parsed.variant, str(parsed)) == (4, uuid.RFC_4122, minted)
    assert parse(minted.encode()) == minted
    assert to_trace_id(minted) == parsed.int
    # Only the six bits of version and variant are not the given ones.
    assert (parsed.int ^ bits) & ~(0xF << 76 | 0x3 << 62) == 0
