"""
What is left out of telemetry: paths, header values, query values.
"""

from __future__ import annotations

import re
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_correlation.policy import HeaderCapture, Patterns, redact_query


@pytest.mark.parametrize(
    ("patterns", "path", "excluded"),
    [
        ("health", "/health", True),
        ("health", "/health/live", True),
        ("health", "/api/health", True),
        ("health", "/healthy", False),
        ("health", "/unhealth", False),
        ("health", "/", False),
        ("/health", "/health", True),
        ("/health", "/api/health", False),
        ("^/health$", "/health", True),
        ("^/health$", "/health/live", False),
        ("static/", "/static/a.css", True),
        ("/", "/", True),
        ("/", "/x", False),
        ("client/.*/info,healthcheck", "/client/123/info", True),
        ("client/.*/info,healthcheck", "/xyz/healthcheck", True),
        ("client/.*/info,healthcheck", "/client/123/infos", False),
        ("a|b", "/b", True),
        ("a|b", "/ab", False),
        (" , ,live", "/live", True),
        ("v[0-9]+/ping", "/v12/ping", True),
        ("http", "/http", True),
        ("httpbin", "/httpbin/x", True),
        ("", "/x", False),
        (".*foo", "/a/foo", True),
        (".*foo", "/afoo/b", True),
        (".*foo", "/foot", False),
        (".*/health", "/health", True),
        (".*?foo", "/afoo", True),
        (".*foo|bar", "/xbar", False),
        (".*foo|bar", "/x/bar", True),
        ("health", "/health/" + "a" * 2_040, True),
        ("health", "/health/" + "a" * 2_041, False),
    ],
)
def test_path_patterns(patterns: str, path: str, excluded: bool) -> None:
    """
    A pattern matches whole segments of the path; one that begins with a slash, from the path's start.
    """
    assert Patterns(patterns).match(path, f"http://health.example.com{path}") is excluded


@pytest.mark.parametrize(
    ("pattern", "url", "excluded"),
    [
        ("http://shop.example/a", "http://shop.example/a/b", True),
        ("https?://shop.example", "https://shop.example/a", True),
        ("http://shop.example", "http://other.example/?u=http://shop.example", False),
        ("https://shop.example", "", False),
    ],
)
def test_url_patterns(pattern: str, url: str, excluded: bool) -> None:
    """
    A pattern that begins with http looks at the whole URL, from its start.
    """
    found = Patterns(pattern)
    assert found.wants_url
    assert found.match("/a", url) is excluded


@pytest.mark.parametrize("pattern", ["(", "[", "(?i)x", "*"])
def test_wrong_pattern_is_left_out(pattern: str, caplog: pytest.LogCaptureFixture) -> None:
    """
    A pattern that does not compile costs one line, and the others hold.
    """
    found = Patterns(f"{pattern},health", "THE_SETTING")
    assert "THE_SETTING" in caplog.text
    assert found.match("/health")


def test_no_patterns() -> None:
    """
    Nothing excluded is false, so that a request pays nothing for it.
    """
    assert not Patterns("")
    assert Patterns("x")
    assert not Patterns("x").wants_url


def test_capture() -> None:
    """
    Names match whole and without case; keys keep dashes; every field of a name is there; sanitised ones lose the value.
    """
    capture = HeaderCapture(["X-Shop-.*", "Cookie"], ["cookie", ".*secret"], "http.request.header.")
    headers = [
        (b"x-shop-a", b"1"),
        (b"X-Shop-A", b"2"),
        (b"x-shop-secret", b"s"),
        (b"cookie", b"c"),
        (b"my-x-shop-a", b"no"),
        (b"x-shop-b", b"\xff"),
    ]
    assert capture.attributes(headers) == {
        "http.request.header.x-shop-a": ("1", "2"),
        "http.request.header.x-shop-secret": ("[REDACTED]",),
        "http.request.header.cookie": ("[REDACTED]",),
        "http.request.header.x-shop-b": ("\ufffd",),
    }


def test_capture_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """
    Without a usable name nothing is captured, and a wrong expression is said.
    """
    assert not HeaderCapture([], [], "")
    assert HeaderCapture([], [], "").attributes([(b"a", b"b")]) == {}
    assert not HeaderCapture(["("], [], "")
    assert "'('" in caplog.text


@pytest.mark.parametrize(
    ("query", "redacted"),
    [
        ("a=1", "a=1"),
        ("token=x&a=1", "token=REDACTED&a=1"),
        ("X-Amz-Signature=x&X-Goog-Signature=y&sig=z&AWSAccessKeyId=k", "X-Amz-Signature=REDACTED&X-Goog-Signature=REDACTED&sig=REDACTED&AWSAccessKeyId=REDACTED"),
        ("X-Amz-Credential=x&X-Amz-Security-Token=y", "X-Amz-Credential=REDACTED&X-Amz-Security-Token=REDACTED"),
        ("access_token=x&api-key=y&apiKey=z", "access_token=REDACTED&api-key=REDACTED&apiKey=REDACTED"),
        ("user%5Bemail%5D=x", "user%5Bemail%5D=REDACTED"),
        ("t%6Fken=x", "t%6Fken=REDACTED"),
        ("code=1&zipcode=2", "code=REDACTED&zipcode=2"),
        ("token=&token", "token=&token"),
        ("a=1;b=2&&=&", "a=1;b=2&&=&"),
        ("token=a=b", "token=REDACTED"),
        ("", ""),
    ],
)  # fmt: skip
def test_redaction(query: str, redacted: str) -> None:
    """
    Values of secret and personal keys are replaced, keys and order stay; everything or nothing on request.
    """
    assert redact_query(query, "sensitive") == redacted
    assert redact_query(query, "all") == query
    none = redact_query(query, "none")
    assert [part.partition("=")[0] for part in none.split("&")] == [part.partition("=")[0] for part in query.split("&")]
    assert all(part.partition("=")[2] in ("", "REDACTED") for part in re.split("[&;]", none))


@given(
    st.text(max_size=50),
    st.sampled_from(["password", "TOKEN", "my_secret", "sessionId"]),
    st.text(min_size=1, max_size=20),
)
def test_secret_never_survives(before: str, key: str, secret: str) -> None:
    """
    Whatever stands around it, the value of a secret key is gone.
    """
    value = "S3CRET" + quote(secret, safe="")
    assert "S3CRET" not in redact_query(f"{quote(before, safe='&=')}&{key}={value}&x=1", "sensitive")
