"""
Exceptions that quote a planted password, as pydantic and SQLAlchemy do.
"""

from __future__ import annotations

from pydantic import BaseModel

PASSWORD = "hunter2-in-the-clear"


class User(BaseModel):
    """
    Has a pin that is no number.
    """

    pin: int


class StatementError(Exception):
    """
    Prints as SQLAlchemy's errors do.
    """

    def __str__(self) -> str:
        return f"(sqlite3.IntegrityError) UNIQUE\n[SQL: INSERT ...]\n[parameters: ('{PASSWORD}',)]"


def fail(kind: str) -> None:
    """
    Raise an exception whose text, or that of one behind it, quotes the password: pydantic, sqlalchemy, cause or group.
    """
    secret = {"pin": PASSWORD}
    if kind == "pydantic":
        User.model_validate(secret)
    elif kind == "sqlalchemy":
        raise StatementError
    elif kind == "cause":
        try:
            User.model_validate(secret)
        except ValueError as error:
            raise RuntimeError("outer") from error
    else:
        try:
            User.model_validate(secret)
        except ValueError as error:
            raise ExceptionGroup("several", [error, StatementError()]) from None
