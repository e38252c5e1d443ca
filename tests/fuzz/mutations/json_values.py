"""Values in JSON files: of a wrong type, huge, missing, twice, nested a hundred thousand times."""

import json
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.mutations.mutation import Effect, Mutation, NotApplicable, pick_file, shown

# Replaced in the text of the file by what no Python value is written as.
_RAW = {
    "@deep list@": "[" * 100_000 + "]" * 100_000,
    "@nested list@": "[" * 500 + "]" * 500,
    "@deep object@": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "@long number@": "9" * 5_000,
    "@huge float@": "1e999",
    "@half pair@": '"\\ud800"',
    "@nan@": "NaN",
    "@minus infinity@": "-Infinity",
    "@raw control@": '"\x00\x1b[2J"',
    "@cut@": '"',
}
_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 0.5, -0.5, 1e-320, 1e308, 1e30, "", "a", " ", "0", "true"),
    *(2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**30, -(2**31), -(2**63)),
    *(
        [],
        {},
        [None],
        [[]],
        {"": {}},
        [1, 2],
        ["a"],
        "../x",
        "/etc/passwd",
        "\x1b[31mred",
        "[b]x[/b]",
    ),
    *("a" * 100_000, "é" * 300, "\u202e", "\0", "llama", "default", "cuda", "auto", "float16"),
    *_RAW,
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """All (container, key or index) in a value, outermost first."""
    found: list[tuple[Any, Any]] = []
    level = [value]
    while level:
        below = []
        for item in level:
            if isinstance(item, dict | list):
                keys = list(item) if isinstance(item, dict) else list(range(len(item)))[:20]
                found += [(item, key) for key in keys]
                below += [item[key] for key in keys]
        level = below
    return found


def change_json(value: Any, draw: Random) -> tuple[str, str]:
    """Change a value. Returns its new text, and what was done."""
    found = places(value)
    if not found:
        raise NotApplicable
    # Half of the time a field near the top: most fields lie in long lists below.
    container, key = draw.choice(found[:40] if draw.random() < 0.5 else found)
    ways = ["replace"] * 6 + ["nudge"] * 2 + ["remove", "wrap", "copy", "twice", "rename", "add"]
    way = draw.choice(ways)
    old, name = container[key], f"{key!r:.40}"
    text = None
    if way == "nudge" and (isinstance(old, bool) or not isinstance(old, int | float)):
        way = "replace"
    if isinstance(container, list) and way in ("twice", "rename", "add"):
        way = "remove"
    if way == "replace":
        container[key] = draw.choice(_VALUES)
        done = f"{name} := {container[key]!r:.60}"
    elif way == "nudge":
        container[key] = draw.choice([old + 1, old - 1, old * 2, -old, old / 2, old * 1000])
        done = f"{name} := {container[key]!r:.60}"
    elif way == "remove":
        del container[key]
        done = f"{name} removed"
    elif way == "wrap":
        container[key] = [old]
        done = f"{name} in a list"
    elif way == "copy":
        other, at = draw.choice(found)
        container[key] = json.loads(json.dumps(other[at] if _has(other, at) else None))
        done = f"{name} := that of {at!r:.40}"
    elif way == "twice":
        container["@twice@" + str(key)] = draw.choice(_VALUES)
        text = json.dumps(value).replace("@twice@", "")
        done = f"{name} twice"
    elif way == "rename":
        container[f"{key}_"] = container.pop(key)
        done = f"{name} renamed"
    else:
        container["unknown\x1b[2J"] = draw.choice(_VALUES)
        done = "an unknown field"
    text = text or json.dumps(value)
    for mark, raw in _RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return text, done


def _has(container: Any, key: Any) -> bool:
    return key in container if isinstance(container, dict) else key < len(container)


def change_json_file(path: Path, draw: Random, *patterns: str) -> str:
    """Change a value of a JSON file, or of a line of a .jsonl file."""
    file = pick_file(path, draw, *(patterns or ("*.json", "*.jsonl")))
    lines = [file.read_text(encoding="utf-8")]
    if file.suffix == ".jsonl":
        lines = lines[0].splitlines()
    at = draw.randrange(len(lines)) if lines else 0
    try:
        lines[at], done = change_json(json.loads(lines[at]), draw)
    except (ValueError, IndexError) as error:
        raise NotApplicable from error
    file.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    return f"{shown(file, path)}: {done}"


def _reorder(path: Path, draw: Random) -> str:
    file = pick_file(path, draw, "*.json")
    value = json.loads(file.read_text(encoding="utf-8"))
    _shuffle(value, draw)
    file.write_text(json.dumps(value), encoding="utf-8")
    return f"{shown(file, path)}: other order of the fields"


def _shuffle(value: Any, draw: Random) -> None:
    for container, key in places(value):
        item = container[key]
        # The order of tokens' names in a vocabulary has no meaning either.
        if isinstance(item, dict):
            container[key] = _shuffled(item, draw)
    if isinstance(value, dict):
        items = _shuffled(value, draw)
        value.clear()
        value.update(items)


def _shuffled(items: dict[str, Any], draw: Random) -> dict[str, Any]:
    order = list(items)
    draw.shuffle(order)
    return {key: items[key] for key in order}


def _space(path: Path, draw: Random) -> str:
    file = pick_file(path, draw, "*.json")
    value = json.loads(file.read_text(encoding="utf-8"))
    text = json.dumps(value, indent=draw.choice([None, 0, 1, 8]), ensure_ascii=draw.random() < 0.5)
    file.write_text(draw.choice(["", "\n \t"]) + text + draw.choice(["", "\n\n\n", " "]), "utf-8")
    return f"{shown(file, path)}: other white space"


JSON_VALUE = Mutation("JSON value", change_json_file)
JSON_ORDER = Mutation("JSON order", _reorder, Effect.HARMLESS)
JSON_SPACE = Mutation("JSON space", _space, Effect.HARMLESS)
