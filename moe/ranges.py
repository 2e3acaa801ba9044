"""Reads what a setting may be from the text beside its default, and checks values against it.

    "[0, 1)"             a number from 0 on and below 1: a square bracket includes its end
    "-1 or [1, 1e6]"     a number in any of the parts
    ("cls", "mean")      one of these names

A setting without a range of its own may be any number that float32 holds. Infinity, NaN and numbers
too large to mean something are outside every range.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from moe.errors import UsageError

ANY = "[-1e38, 1e38]"
COUNT = "[1, 2e9]"  # steps are counted in int32
RATE = "[0, 1)"
SIZE = "0 or [1, 1e6]"
_INTERVAL = re.compile(r"([\[(])(\S+), (\S+)([\])])")


class Key(NamedTuple):
    """Holds a setting's default, whose type is the setting's, and what values it may have."""

    default: Any
    within: str | Sequence[str] = ANY

    @property
    def expected(self) -> str:
        """Says in words what the setting may be."""
        if isinstance(self.default, bool):
            return "True or False"
        if isinstance(self.default, str):
            return "text" if isinstance(self.within, str) else ", ".join(self.within)
        kind = {int: "a whole number", float: "a number", tuple: "numbers"}[type(self.default)]
        return f"{kind} in {self.within}" if self.within[0] in "[(" else f"{kind}, {self.within}"


def keyword_settings(function: Callable) -> dict[str, Key]:
    """Returns the settings of a function: its keyword arguments but `rngs`.

    A range is the text in an argument's annotation: `p: Annotated[float, "(1, 100]"] = 2.0`.
    """
    arguments = inspect.signature(function, eval_str=True).parameters.values()
    return {
        argument.name: annotated(argument.default, argument.annotation)
        for argument in arguments
        if argument.kind is argument.KEYWORD_ONLY and argument.name != "rngs"
    }


def annotated(default: Any, annotation: Any) -> Key:
    """Returns the setting of this default whose range is the text in an `Annotated` type."""
    texts = [m for m in getattr(annotation, "__metadata__", ()) if isinstance(m, str)]
    return Key(default, *texts[:1])


def contains(within: str, number: float) -> bool:
    """Tells whether a number is in a range; NaN is in none."""
    return any(_in_part(part, number) for part in within.split(" or "))


def fit(name: str, value: Any, key: Key) -> Any:
    """Returns the value as the type of its setting: 1 is the number 1.0, a list is a tuple.

    Raises:
      UsageError: it has another type, or is outside its range.
    """
    kind = type(key.default)
    if isinstance(value, list) and kind is tuple:
        value = tuple(value)
    numbers = value if kind is tuple and isinstance(value, tuple) else (value,)
    if kind in (int, float, tuple):
        types = (int,) if kind is int else (int, float)
        good = all(_is_number(n, types) and contains(key.within, n) for n in numbers)
    else:
        good = isinstance(value, kind) and (isinstance(key.within, str) or value in key.within)
    if not good:
        raise UsageError(_refusal(name, value, key))
    return value if kind is tuple else kind(value)


def _is_number(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _in_part(part: str, number: float) -> bool:
    interval = _INTERVAL.fullmatch(part)
    if not interval:
        return number == _number(part)
    left, low, high, right = interval.groups()
    low, high = _number(low), _number(high)
    return low < number < high or number in [low] * (left == "[") + [high] * (right == "]")


def _number(text: str) -> float:
    base, power, exponent = text.partition("^")
    if power:
        return int(base) ** int(exponent)
    return float(text) if re.search(r"[.e]", text) else int(text)


def _refusal(name: str, value: Any, key: Key) -> str:
    said = f"config.{name}={format(repr(value), '.60')}"
    if isinstance(key.default, str) and isinstance(value, str):
        close = difflib.get_close_matches(value, key.within, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{said} is unknown; expected {key.expected}{hint}"
    example = key.default if key.default != "" else "TEXT"
    return f"{said}: expected {key.expected}, such as --config.{name}={example}"
