"""The check that constructors make of an option."""

from __future__ import annotations


def one_of(what: str, value: object, known: tuple) -> None:
    """ValueError: the `value` of the option `what` is none of `known`, two or more, which the message lists."""
    if value not in known:
        *others, last = map(str, known)
        raise ValueError(f"{what}={value!r} is not known; use {', '.join(others)} or {last}")
