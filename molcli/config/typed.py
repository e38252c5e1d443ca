"""Check a value read from YAML against a field's type. Only int is converted, to float."""

import math
import sys
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from molcli.config.layer_choice import Every, is_every
from molcli.config.shown import cut, shown
from molcli.errors import MolError

_LONGEST_WORD = 100  # that is compared with names; comparing takes time


def checked(name: str, value: object, hint: Any) -> Any:
    """Return the value as an instance of the type `hint`.

    Args:
        name: Dotted, as the user writes it ("upcycle.d_thin").
        value: What YAML holds.
        hint: int, float, str, bool, None, a Literal of strings, a list of such a Literal, Every,
            list[int], tuple[float, float], dict[str, float], a list of a dataclass, or a union.

    Raises:
        MolError: The value has another type. The message states the allowed values, and the nearest
            one for a mistyped word.
    """
    for alternative in _alternatives(hint):
        if isinstance(value, list) and _is_table(alternative):
            (kind,) = get_args(alternative)
            return [build(f"{name}.{i}", entry, kind) for i, entry in enumerate(value)]
    for alternative in _alternatives(hint):
        accepted, result = _match(value, alternative)
        if accepted:
            return result
    words = [word for alternative in _alternatives(hint) for word in _words(alternative)]
    raise MolError(
        f"`{name}` is {shown(value)}",
        allowed=describe(hint),
        hint=_suggestion(name, value, hint, words),
    )


def build(name: str, values: object, kind: Any) -> Any:
    """Build the dataclass `kind` from a mapping of its fields, and check each value.

    Raises:
        MolError: `values` is no mapping, has an unknown key (the message names the nearest), or
            lacks a key that has no default.
    """
    if not isinstance(values, dict):
        raise MolError(f"`{name}` is {shown(values)}", allowed="`key: value` lines")
    hints = get_type_hints(kind)
    for key in values:
        if key not in hints:
            guess = nearest(str(key), list(hints))
            raise MolError(
                f"`{name}` has no key `{cut(str(key))}`",
                allowed=", ".join(hints),
                hint=f"{name}.{guess}" if guess else "",
            )
    for field in fields(kind):
        missing = field.default is MISSING and field.default_factory is MISSING
        if missing and field.name not in values:
            raise MolError(f"`{name}` has no `{field.name}`", allowed=describe(hints[field.name]))
    return kind(**{k: checked(f"{name}.{k}", value, hints[k]) for k, value in values.items()})


def nearest(word: str, candidates: list[str]) -> str:
    """Return the candidate closest to the word, or "" if none is close."""
    matches = get_close_matches(word[:_LONGEST_WORD], candidates, n=1, cutoff=0.5)
    return matches[0] if matches else ""


def describe(hint: Any) -> str:
    """Return the type in words: "an integer or null"."""
    return " or ".join(_describe_one(alternative) for alternative in _alternatives(hint))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is_table(hint: Any) -> bool:
    """Whether it is a list of a dataclass."""
    return get_origin(hint) is list and is_dataclass(get_args(hint)[0])


def _words(hint: Any) -> tuple[str, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


def _choices(hint: Any) -> tuple[str, ...]:
    """The words that a list may hold, if it is one of words."""
    return _words(get_args(hint)[0]) if get_origin(hint) is list else ()


def _match(value: Any, hint: Any) -> tuple[bool, Any]:
    """(accepted, value as the type holds it)."""
    if hint is NoneType:
        return value is None, value
    if hint is Every:
        return isinstance(value, str) and is_every(value), value
    if hint is float:
        fits = _is_finite(value)
        return fits, float(value) if fits else value
    if hint is int:
        return _is_int(value), value
    if hint in (str, bool):
        return isinstance(value, hint), value
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint), value
    if words := _choices(hint):
        fits = isinstance(value, list) and all(isinstance(v, str) and v in words for v in value)
        return fits, value
    if hint == list[int]:
        return isinstance(value, list) and all(map(_is_int, value)), value
    if hint == tuple[float, float]:
        fits = isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_finite, value))
        return fits, tuple(map(float, value)) if fits else value
    if hint == dict[str, float]:
        fits = isinstance(value, dict) and all(
            isinstance(key, str) and _is_finite(number) for key, number in value.items()
        )
        return fits, {key: float(number) for key, number in value.items()} if fits else value
    if _is_table(hint):
        return False, value  # `checked` reads lists of it
    raise TypeError(f"no check for fields of type {hint}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max


def _describe_one(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(get_args(hint))
    if _is_table(hint):
        return "a list with a mapping in each entry"
    if words := _choices(hint):
        return f"a list of {', '.join(words)}"
    names: dict[Any, str] = {
        NoneType: "null",
        Every: "every:N",
        int: "an integer",
        float: "a finite number",
        str: "text",
        bool: "true or false",
        list[int]: "a list of integers such as [0, 2]",
        tuple[float, float]: "two numbers such as [0.9, 0.95]",
        dict[str, float]: "a mapping to numbers such as {a.jsonl: 0.7, b.txt: 0.3}",
    }
    return names[hint]


def _suggestion(name: str, value: Any, hint: Any, words: list[str]) -> str:
    if isinstance(value, str) and (word := nearest(value, words)):
        return f"{name}={word}"
    whole = isinstance(value, float) and math.isfinite(value) and value.is_integer()
    if whole and int in _alternatives(hint):
        return f"{name}={int(value)}"
    # YAML 1.1 reads a bare `no` or `off` as false.
    if value is False and "none" in words:
        return f"{name}=none"
    return ""
