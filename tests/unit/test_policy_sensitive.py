"""
One list of names whose values nobody may read: in queries, in texts of exceptions, in the collectors' files.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from otel_correlation.policy import redact_query, redact_url, scrub
from otel_correlation.policy.sensitive import is_secret, is_secret_in_query, is_secret_in_text
from tests.redaction_rules import CONFIGS, rules, written

SECRET = [
    *["password", "passwd", "new_password", "password2", "passwordConfirmation", "mypassword", "user[password]"],
    *["passphrase", "passcode", "pwd", "new_pwd", "userPwd", "db_pass", "password_hash"],
    *["secret", "client_secret", "clientSecret", "app-secret", "SECRET_KEY", "secrets"],
    *["token", "access_token", "accessToken", "id_token", "page_token", "X-Amz-Security-Token", "authenticity_token"],
    *["refresh_tokens", "credential", "X-Amz-Credential", "credentials", "authorization", "Proxy-Authorization"],
    *["api_key", "apiKey", "apikey", "X-API-Key", "AWSAccessKeyId", "private_key", "encryption-key", "AccountKey"],
    *["SharedAccessKey", "Ocp-Apim-Subscription-Key", "jwt", "bearer", "client_assertion", "SAMLResponse"],
    *["code_verifier", "service_ticket", "cas-ticket"],
    *["otp", "totp", "user_otp", "pin", "card_pin", "auth_code", "authorization_code", "verification_code"],
    *["sms_code", "mfa-code", "2fa_code", "security_code", "recovery_codes", "one_time_code", "device_code"],
    *["cookie", "Set-Cookie", "session_id", "sessionid", "sessionId", "JSESSIONID", "PHPSESSID", "connect.sid"],
    *[
        "ASP.NET_SessionId",
        "ASPSESSIONIDABCDEFGH",
        "userOtp",
        "cardPin",
        "laravel_session",
        "rack.session",
        "aiohttp_session",
        "_csrf",
    ],
    *["csrftoken", "csrfmiddlewaretoken", "XSRF-TOKEN", "_xsrf", "remember_me", "remember_token"],
    *["card_number", "cardNumber", "creditcard", "credit_card", "cvv", "cvv2", "cvc", "iban", "ssn", "account_number"],
]
# Which no expression for a key of an attribute may find, nor one for a text.
KEPT = [
    *[
        "page",
        "page_size",
        "author",
        "authority",
        "author_id",
        "authors",
        "oauth_provider",
        "pinned",
        "spin",
        "shipping",
    ],
    *["opinion", "country_code", "status_code", "zipcode", "zip_code", "promo_code", "error_code", "preset_code"],
    *["session_duration", "session.timeout", "session_count", "token_count", "tokenCount", "token_type", "max_tokens"],
    *["gen_ai.usage.input_tokens", "tokenizer", "password_length", "password_required", "cookie_name", "secretary"],
    *[
        "secret_name",
        "pin_count",
        "monkey",
        "keyword",
        "keyboard",
        "compass",
        "bypass",
        "passenger",
        "signal",
        "design",
    ],
    *["ticket_count", "assertions", "isotope", "laptop", "option", "caribbean", "discard", "postcard", "classname"],
    *[
        "card_type",
        "message.id",
        "messaging.kafka.message.offset",
        "http.response.status_code",
        "error.type",
        "classes",
    ],
]
# Secret in a query only.
IN_QUERIES = [
    "code",
    "key",
    "sort_key",
    "auth",
    "pass",
    "sig",
    "sid",
    "mail",
    "email",
    "user[email]",
    "session",
    "ticket",
]
IN_QUERIES += ["signature", "X-Goog-Signature", "assertion", "my_session", "key_id", "hmac_signature"]
COLLECTORS = [path.stem for path in sorted(CONFIGS.glob("*.yaml")) if "blocked_key_patterns" in path.read_text()]
# A short word in camelCase, behind another one.
IN_PACKAGE_ONLY = {"userOtp", "cardPin"}
# In a text the collectors know short words in snake_case and kebab-case only.
NOT_IN_TEXTS = {"userOtp", "cardPin", "user[password]", "passwordConfirmation", "recovery_codes"}


def found(key: str, text: str) -> bool:
    """
    Tell whether one of the collectors' expressions of a kind finds something.
    """
    return any(re.search(pattern, text) for pattern in rules()[key])


@pytest.mark.parametrize("name", SECRET)
def test_the_value_of_a_secret_name_is_shown_nowhere(name: str) -> None:
    """
    In a query, in a text and among a collector's attributes, whatever the way to write the name.
    """
    assert is_secret(name)
    assert "hunter2" not in redact_query(f"a=1&{name}=hunter2&b=2", "sensitive")
    assert "hunter2" not in scrub(f"it failed with {name}=hunter2, b=2")
    assert "hunter2" not in scrub(f"it failed with {{'{name}': 'hunter2', 'b': 2}}")
    key = name.replace("[", ".").replace("]", "")
    assert found("blocked_key_patterns", f"http.request.header.{key}") or name in IN_PACKAGE_ONLY
    assert not found("ignored_key_patterns", key)
    if name not in NOT_IN_TEXTS:
        for text in (
            f"x {name}=hunter2",
            f'{{"{name}": "hunter2"}}',
            f"{name} : hunter2",
            f'\\"{name}\\":\\"hunter2\\"',
        ):
            assert found("blocked_values", text), text


@pytest.mark.parametrize("name", KEPT)
def test_a_name_that_only_looks_secret_keeps_its_value(name: str) -> None:
    """
    A part of another word, and what counts or describes a secret, is no secret.
    """
    assert not is_secret_in_query(name)
    assert redact_query(f"{name}=plain", "sensitive") == f"{name}=plain"
    for text in (f"a {name}=plain, b", f'{{"{name}": "plain"}}', f"{name}: plain"):
        assert scrub(text) == text
        assert not found("blocked_values", text)
    assert not found("blocked_key_patterns", name) or found("ignored_key_patterns", name)


@pytest.mark.parametrize("name", IN_QUERIES)
def test_some_names_are_secret_in_a_query_only(name: str) -> None:
    """
    An exit code, a cache key and a ticket's number in a text stay readable; a query's `code`, `key` and `ticket` do not.
    """
    for query in (f"{name}=hunter2", f"a=1&{name}=hunter2&b=2", f"a=1;{name}=hunter2"):
        assert "hunter2" not in redact_query(query, "sensitive")
        assert found("blocked_values", query)
    assert "hunter2" not in scrub(f"with url: /cb?{name}=hunter2&b=2")
    text = f"the {name}=hunter2, {name}: hunter2"
    assert scrub(text) == text
    assert not is_secret_in_text(name)
    assert not found("blocked_values", text)
    assert not found("blocked_key_patterns", name)


@pytest.mark.parametrize("name", COLLECTORS)
def test_the_collectors_files_say_what_the_list_says(name: str) -> None:
    """
    Each file holds what `python -m tests.redaction_rules --write` writes, in its own place, and the rules are in use.
    """
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert written(text) == text
    content: dict[str, Any] = yaml.safe_load(text)
    for key, patterns in rules().items():
        assert [pattern for pattern in content["processors"]["redaction"][key] if pattern in patterns] == patterns


def test_no_collector_is_left_out() -> None:
    """
    A file with a `redaction` processor is one of those that are compared.
    """
    assert [
        path.stem
        for path in sorted(CONFIGS.glob("*.yaml"))
        if "redaction" in yaml.safe_load(path.read_text()).get("processors", {})
    ] == COLLECTORS
    assert len(COLLECTORS) > 5


URLS = [
    "https://jane:hunter2@shop.example/orders",
    "https://hunter2@shop.example/orders",
    "redis://:hunter2@cache:6379/0",
    "redis://:hunter/2@cache:6379/0",
    "postgresql+asyncpg://app:hunter/2@db/shop?sslmode=require",
    "postgresql://app:12/hunter2@db/shop",
    "amqp://app:hunter#2@broker/%2f",
    "amqp://app:hunter?2@broker/",
    "mongodb+srv://app:p@hunter2@db/?w=majority",
    "https://shop.example/login?next=https://jane:hunter2@other.example/",
    "https://shop.example/login?next=https%3A%2F%2Fjane%3Ahunter2%40other.example%2F",
    "//jane:hunter2@shop.example/",
]
PLAIN = [
    "https://shop.example/orders",
    "https://shop.example:8443/@jane",
    "https://cdn.example/react@17/index.js",
    "https://shop.example/a?at=12:30",
    "http://[::1]:4318/v1/traces",
]


@pytest.mark.parametrize("url", URLS)
def test_user_information_is_shown_nowhere(url: str) -> None:
    """
    Neither in a recorded URL, nor in a text, nor behind a collector: with a slash in the password and without a user, too.
    """
    assert "hunter" not in redact_url(url, "sensitive")
    assert "hunter" not in scrub(f"cannot connect to '{url}': refused")
    # Where digits stand before the slash, only the package knows that the scheme has no such paths.
    assert "hunter" not in masked(url) or ":12/" in url


@pytest.mark.parametrize("url", PLAIN)
def test_a_url_without_user_information_is_the_same_afterwards(url: str) -> None:
    """
    An @ in a path, a port and an address of IPv6 are no password.
    """
    assert redact_url(url, "sensitive") == url
    assert scrub(f"see {url}") == f"see {url}"
    assert masked(url) == url


def masked(text: str) -> str:
    """
    Return what a collector makes of a value.
    """
    content: dict[str, Any] = yaml.safe_load((CONFIGS / "agent.yaml").read_text())
    for pattern in content["processors"]["redaction"]["blocked_values"]:
        text = re.sub(pattern, "****", text)
    return text


@pytest.mark.parametrize(
    "value",
    [
        "https://h/?token=hunter2",
        "https%3A%2F%2Fh%2F%3Fa%3D1%26token%3Dhunter2",
        "https%253A%252F%252Fh%252F%253Ftoken%253Dhunter2",
        "/back?token=hunter2",
        "//?a=" * 6 + "//?token=hunter2",
        "%25252525252Fx%25252525253Ftoken%25252525253Dhunter2%25252525252F?",
    ],
)
def test_a_url_in_a_query_loses_its_secrets(value: str) -> None:
    """
    However deep it is nested and however often it is encoded: what is not looked into is not shown.
    """
    assert "hunter2" not in redact_query(f"next={value}", "sensitive")
    assert redact_query(f"next={value}", "all") == f"next={value}"


def test_what_is_not_looked_at_is_not_shown() -> None:
    """
    A query of many pairs, or of many encoded values, costs no more than the first of them; the rest is not recorded.
    """
    shown = redact_query("&".join(f"a{number}=hunter{number}" for number in range(200)), "sensitive")
    assert shown.startswith("a0=hunter0&a1=hunter1&")
    assert shown.endswith("a127=hunter127&REDACTED")
    shown = redact_query("&".join(f"a{number}=//{'x' * 998}" for number in range(4)), "sensitive")
    assert shown.endswith("x&a2=REDACTED&a3=REDACTED")
    assert redact_query("next=//" + "x" * 2046, "sensitive").endswith("xx")
    assert redact_query("next=//" + "x" * 2047, "sensitive") == "next=REDACTED"
    assert redact_query("q=" + "x" * 3000, "sensitive").endswith("xx")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('{"password": "hun\\"ter2", "page": 1}', '{"password": "REDACTED", "page": 1}'),
        ("[(b'authorization', b'Bearer hunter2'), (b'a', b'b')]", "[(b'authorization', b'REDACTED'), (b'a', b'b')]"),
        ("Cookie: a=hunter2; b=hunter2", "Cookie: REDACTED"),
        ("Authorization: Bearer hunter2, next", "Authorization: REDACTED, next"),
        ("Server=db;Password=hunter2;Database=shop", "Server=db;Password=REDACTED;Database=shop"),
        ("url: /v1/metrics?api_key=hunter2 (Caused by", "url: /v1/metrics?api_key=REDACTED (Caused by"),
        ("'token': ['hunter2'] of", "'token': ['REDACTED'] of"),
        ("token='hunter2", "token='REDACTED"),
        ("token == 3 and token != x", "token == 3 and token != x"),
        ("the password is wrong", "the password is wrong"),
        ("token=", "token="),
        ("password=REDACTED", "password=REDACTED"),
    ],
)
def test_a_pair_in_a_text_loses_its_value(text: str, shown: str) -> None:
    """
    In whatever notation the name stands before its value; scrubbed twice it is the same.
    """
    assert scrub(text) == shown
    assert scrub(shown) == shown


def test_a_tracebacks_source_lines_stay() -> None:
    """
    A line of the program that names a secret has none in it.
    """
    text = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    connect(password=password)\nOSError: password=x'
    assert scrub(text) == text.replace("password=x", "password=REDACTED")
