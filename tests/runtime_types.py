"""How the tests check the library's annotations while it runs."""

from typing import Self

from beartype import BeartypeConf, beartype

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a fine float


def check(function):
    "Beartype, but for `Self`, whose class does not exist yet when a method is decorated."
    if hasattr(function, "__annotations__"):
        function.__annotations__ = {
            name: hint
            for name, hint in function.__annotations__.items()
            if hint not in (Self, "Self")
        }
    return _beartype(function)
