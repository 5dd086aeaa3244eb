"""
Which names have a value that nobody may read: one list for queries, for texts of exceptions and for the collectors.

The rules of names in ``collector/*.yaml`` are made of the same list: ``python -m tests.redaction_rules --write`` puts
them there, and a test fails while a file has others. No expression repeats without a bound, so a name costs no more
than its length.

See: semantic-conventions docs/http/http-spans.md (``url.full``); OWASP Logging Cheat Sheet, "Data to exclude"; what
Sentry, Django and Rails leave out by default.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

# What ends a word, also run together with what stands before it: `mypassword`, `accessToken`, `jsessionid`. A space is
# where one other character may stand or none: `api key` is `api_key`, `apiKey`, `X-API-Key`, `myapikey`. Few, because
# the collectors look for each of them at every character of every value.
ENDS: Final = (
    "pass(?:w(?:or)?ds?|phrase|code)",
    "pwd",
    "secrets?",
    "token",
    "credentials?",
    "(?:api|access|private) keys?",
    "sess(?:ion)? id",
    "authorization",
    "cookie",
)
# What begins where a word begins: `pin` is not in `shipping`.
WORDS: Final = (
    # Credentials.
    "bearer",
    "jwt",
    "(?:db|user|admin|root|smtp|proxy|basic) pass",
    "(?:access|refresh|api|auth|session|bearer) tokens",
    "(?:secret|signing|encryption|auth|master|account|shared|subscription|session|ssh|hmac|shared access) keys?",
    "client assertion",
    "saml (?:response|assertion)",
    "code verifier",
    "(?:cas|service|login|granting|proxy|sso) ticket",
    # Codes that are typed once.
    "otp",
    "totp",
    "pin",
    "(?:oauth|auth(?:orization)?|access|verification|security|login|recovery|backup|device|user) codes?",
    "(?:one time|sms|mfa|2fa) codes?",
    # Cookies of sessions: Django, PHP, Java, ASP, Express, Laravel, Rails and others.
    "csrf",
    "xsrf",
    "aspsessionid[a-z]{8}",
    "connect sid",
    "(?:laravel|ci|rack|user|aiohttp|flask|asp net core) session",
    "remember me",
    # Payment, and who one is.
    "(?:credit |debit )?card (?:number|no|num)",
    "(?:credit|debit) card",
    "account number",
    "cvv",
    "cvc",
    "iban",
    "ssn",
)
# What is secret or personal in a query only; elsewhere the words mean other things (an exit code, a cache key).
QUERY_ENDS: Final = ("email", "signature", "key id")
QUERY_WORDS: Final = ("sig", "sid", "pass", "auth", "mail", "session", "ticket", "assertion")
# The last word.
QUERY_LAST: Final = ("key",)
# The whole name: `country_code` and `status_code` stay readable.
QUERY_EXACT: Final = ("code",)
# The last word of a name that counts, measures or describes a secret and is none: `token_count`, `session_duration`.
MEASURES: Final = (
    "age",
    "algorithm",
    "at",
    "count",
    "days",
    "disabled",
    "duration",
    "enabled",
    "expired",
    "expires",
    "expiry",
    "field",
    "file",
    "in",
    "invalid",
    "length",
    "limit",
    "method",
    "missing",
    "ms",
    "name",
    "policy",
    "rate",
    "remaining",
    "required",
    "seconds",
    "size",
    "status",
    "strength",
    "timeout",
    "total",
    "ttl",
    "type",
    "usage",
    "used",
    "valid",
    "verified",
    "version",
)
# What may follow in a name that stands before its value in a text.
TAIL: Final = "(?:[._-]?(?:[0-9]{1,3}|id|value|hash|confirm(?:ation)?|again|repeat|old|new|number))?"
# After a word: no letter that continues it. `token` ends in `tokenCount` and `token_x`, not in `tokens` or `tokenizer`.
END: Final = "(?:[^A-Za-z]|[A-Z][a-z]|ID|$)"
_NAME_CHARACTERS: Final = 64


def _any(phrases: tuple[str, ...]) -> str:
    return "(?:" + "|".join(phrase.replace(" ", "[^a-z0-9]?") for phrase in phrases) + ")"


# For names in lower case, with a _ in each hump: a word ends where no letter follows.
_SECRET: Final = re.compile(f"{_any(ENDS)}(?![a-z])|(?<![a-z0-9]){_any(WORDS)}(?![a-z])")
_IN_QUERY: Final = re.compile(
    f"{_any(QUERY_ENDS)}(?![a-z])|(?<![a-z]){_any(QUERY_WORDS)}(?![a-z])|(?<![a-z]){_any(QUERY_LAST)}[^a-z]*$"
    f"|^{_any(QUERY_EXACT)}[^a-z]*$"
)
_MEASURE: Final = re.compile(f"[^a-z]{_any(MEASURES)}$")
_IN_TEXT: Final = re.compile(f"(?:{_any(ENDS)}|(?<![a-z0-9]){_any(WORDS)}){TAIL}$")
_HUMP: Final = re.compile("([a-z0-9])([A-Z])")


def _words(name: str) -> str:
    return _HUMP.sub(r"\1_\2", name[-_NAME_CHARACTERS:]).lower()


@lru_cache(maxsize=1024)
def is_secret(name: str) -> bool:
    """
    Tell whether a value of this name must not be shown, wherever it stands; the name's last 64 characters are read.
    """
    name = _words(name)
    return _SECRET.search(name) is not None and _MEASURE.search(name) is None


@lru_cache(maxsize=1024)
def is_secret_in_query(name: str) -> bool:
    """
    Tell whether a value of this name must not be shown where the name is a query's key.
    """
    words = _words(name)
    return is_secret(name) or (_IN_QUERY.search(words) is not None and _MEASURE.search(words) is None)


@lru_cache(maxsize=1024)
def is_secret_in_text(name: str) -> bool:
    """
    Tell whether what follows this name and ``=`` or ``:`` in a text must not be shown.
    """
    return _IN_TEXT.search(_words(name.rstrip("[]"))) is not None
