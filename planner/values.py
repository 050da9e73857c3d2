"""Which numbers and texts a document may hold.

A number must be finite and not negative unless its class says otherwise: `RULES` of a document's class names the fields with a narrower or
a wider range, so that a field that nobody thought of is checked all the same. A list or a table holds its field's kind of number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from planner.errors import InputError

LEAST, MOST = 1e-30, 1e30
"""Nothing that is counted or measured here is smaller or larger; products and quotients of such numbers stay finite."""


class Rule(NamedTuple):
    """The range of a field, both ends included, and how it is said."""

    low: float
    high: float
    allowed: str


NOT_NEGATIVE = Rule(0, MOST, f"a number from 0 to {MOST:g} is expected")
POSITIVE = Rule(LEAST, MOST, f"a number above 0 is expected ({LEAST:g} to {MOST:g})")
SIGNED = Rule(-MOST, MOST, f"a number from {-MOST:g} to {MOST:g} is expected")
FRACTION = Rule(LEAST, 1, "a fraction above 0 and at most 1 is expected")
AT_LEAST_ONE = Rule(1, MOST, f"a number from 1 to {MOST:g} is expected")


def count_up_to(most: int) -> Rule:
    """The rule of a number of things of which there is at least one."""
    return Rule(1, most, f"a positive integer is expected, at most {most}")


COUNT = count_up_to(10**12)


def check_values(document: Any, where: str, path: str = "") -> None:
    """Raises InputError naming the first field of `document`, which lies at `path` of `where`, whose value it can't have."""
    for at, value, rule in _leaves(document, path, NOT_NEGATIVE):
        if not isinstance(value, str) and not rule.low <= value <= rule.high:
            raise InputError(f"{where}: {at}", value, rule.allowed)


def check_texts(value: Any, where: str) -> None:
    """Raises InputError for the first text in a JSON value that can't be written: half of a surrogate pair is no character."""
    for at, text, _ in _leaves(value, "", SIGNED):
        if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(f"{where}: {at}", text, "whole characters are expected, not half of a surrogate pair")


def whole_number(text: str) -> int | None:
    """The number that decimal digits say; None for any other text, and for more digits than any number here has."""
    return int(text) if text.isdecimal() and len(text) <= 30 else None


def _leaves(value: Any, path: str, rule: Rule) -> Iterator[tuple[str, str | int | float, Rule]]:
    """Every number and text in `value` with its path and its rule."""
    if isinstance(value, str | int | float):
        if not isinstance(value, bool):
            yield path, value, rule
    elif isinstance(value, msgspec.Struct):
        rules: Mapping[str, Rule] = getattr(type(value), "RULES", {})
        for name in value.__struct_fields__:
            yield from _leaves(getattr(value, name), f"{path}.{name}" if path else name, rules.get(name, NOT_NEGATIVE))
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]", rule)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(key, f"{path}: a key", rule)
            yield from _leaves(item, f"{path}.{key}", rule)
