"""What the value of a named field may be: kinds, and the check of a table of field -> kind before values are used."""

import sys
from collections.abc import Mapping
from typing import Any

from jaxkv.checkpoints.errors import CheckpointError


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _number(value: Any, above: float | None = None) -> bool:
    """A number that float() takes; NaN fails the comparison."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return real and (above is None or value > above)


def _all(value: Any, test: Any) -> bool:
    return isinstance(value, list) and all(map(test, value))


_KINDS = {  # kind -> (what the message says, test)
    "flag": ("true or false", lambda value: isinstance(value, bool)),
    "size": ("a whole number from 1 up", lambda value: _whole(value, 1)),
    "count": ("a whole number from 0 up", lambda value: _whole(value, 0)),
    "number": ("a finite number", _number),
    "positive": ("a finite number above 0", lambda value: _number(value, 0)),
    "base": ("a finite number above 1", lambda value: _number(value, 1)),
    "share": ("a number above 0 and at most 1", lambda value: _number(value, 0) and value <= 1),
    "name": ("a string", lambda value: isinstance(value, str)),
    "object": ("an object {...}", lambda value: isinstance(value, dict)),
    "names": ("a list of strings", lambda value: _all(value, lambda one: isinstance(one, str))),
    "numbers": ("a list of finite numbers", lambda value: _all(value, _number)),
    "positives": ("a list of finite numbers above 0", lambda value: _all(value, lambda one: _number(one, 0))),
    "counts": ("a list of whole numbers from 0 up", lambda value: _all(value, lambda one: _whole(one, 0))),
    "period or flags": (
        "a whole number from 1 up, or true or false for every layer",
        lambda value: _whole(value, 1) or _all(value, lambda one: isinstance(one, bool)),
    ),
}


def check_fields(given: Mapping[str, Any], kinds: Mapping[str, str], where: str) -> None:
    """Refuses a value of another kind than its field accepts; absent fields and null pass.

    Args:
      given: field -> value. kinds: field -> kind.
      where: before the field's name in a message, such as "config.json field".
    """
    for key, kind in kinds.items():
        accepted, test = _KINDS[kind]
        if given.get(key) is not None and not test(given[key]):
            raise CheckpointError(f"{where} {key!r} must be {accepted}, got {given[key]!r:.80}")
