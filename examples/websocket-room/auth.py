"""
Who is there? A token is a name, a time of expiry and a signature. ``python auth.py ada`` prints one.
"""

from __future__ import annotations

import hmac
import os
import sys
import time

SECRET = os.environ.get("ROOM_SECRET", "only-for-trying-it-out").encode()


class Refused(Exception):  # noqa: N818 - reads well where it is raised
    """
    The client has to leave; the code is the WebSocket's close code.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def token_for(name: str, seconds: float = 3600) -> str:
    signed = f"{name}.{int(time.time() + seconds)}"
    return f"{signed}.{_signature(signed)}"


def who(token: str) -> str:
    """
    Return the name in a token. Nothing of a token that is refused is in the error.
    """
    signed, _, signature = token.rpartition(".")
    if not hmac.compare_digest(_signature(signed).encode(), signature.encode(errors="replace")):
        raise Refused(1008, "the token is wrong")
    name, _, expiry = signed.rpartition(".")
    if int(expiry) < time.time():
        raise Refused(4002, "the token has expired")
    return name


def _signature(signed: str) -> str:
    return hmac.new(SECRET, signed.encode(errors="replace"), "sha256").hexdigest()


if __name__ == "__main__":
    print(token_for(sys.argv[1]))
