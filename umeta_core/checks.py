"""Checks of options and of numbers of steps."""

from __future__ import annotations


def one_of(what: str, value: object, known: tuple) -> None:
    """ValueError: the `value` of the option `what` is none of `known`, two or more, which the message lists."""
    if value not in known:
        *others, last = map(str, known)
        raise ValueError(f"{what}={value!r} is not known; use {', '.join(others)} or {last}")


def ascending(at) -> None:
    """ValueError: the numbers of steps `at` are none, negative, or not in ascending order."""
    if not at or at[0] < 0 or any(a >= b for a, b in zip(at, at[1:])):
        raise ValueError(f"steps {at} are not ascending; name each once, in order")
