"""Recipes: values of wrong types, unknown names, aliases, nesting, tags, and odd text."""

from pathlib import Path
from random import Random

import yaml

from tests.fuzz.mutations.mutation import Effect, Mutation, pick_file, shown

_SCALARS = [
    *("null", "true", "no", "0", "-1", "1.5", "1e400", "-1e-400", ".nan", ".inf", "-.inf", "1_0"),
    *("0x10", "0o17", "1:30", "2020-01-01", "9" * 5000, "9" * 30, "2147483648", "1e9", "30M"),
    *("''", '"\\ud800"', '"\\u001b[2J"', "a" * 70_000, "[]", "{}", "[1, 2]", "[[]]", "{a: 1}"),
    *("[0, 1]", "all", "auto", "every:2", "every:0", "[0-1]", "bf16", "fp16", "cpu", "align"),
    *("!!python/object/apply:os.system [echo]", "!!binary aGk=", "!!set {a}", "!x y", "*x", "&x 1"),
    *(
        "&x [*x]",
        "&x {a: *x}",
        "|\n    a\n    b",
        ">-\n    a",
        "? a\n  : b",
        "<<",
        "@a",
        "`a",
        "%a",
    ),
    *("[" * 3000 + "]" * 3000, "{a: " * 1500 + "1" + "}" * 1500, "[" * 90 + "]" * 90, "- " * 400),
    "[{kind: align, tokens: 64}, {kind: distill, tokens: .inf}]",
    "[{kind: align}]",
    "[{}]",
]
_KEYS = {
    "train": ["tokens", "batch_size", "micro_batch_size", "context_length", "learning_rate",
              "precision", "stages", "data", "betas", "top_k_fraction", "kl_weight", "seed",
              "checkpoint_every", "log_every", "temperature", "balance", "clip_norm"],
    "upcycle": ["layers", "num_blocks", "top_k", "d_thin", "d_ff_thin", "preset", "gated_deltanet",
                "dtype"],
    "calibrate": ["tokens", "heldout_tokens", "context_length", "data", "seed"],
    "sample": ["tokens", "length", "temperature", "batch_size", "top_p"],
    "model": ["vocab_size", "hidden_size", "head_dim", "num_hidden_layers", "num_blocks", "top_k",
              "layer_mixer", "rope_theta", "d_thin"],
    "evaluate": ["tokens", "context_length"],
    "unknown": ["x"],
}  # fmt: skip


def _value(path: Path, draw: Random) -> str:
    file = pick_file(path, draw, "*.yaml")
    lines = file.read_text(encoding="utf-8").splitlines()
    value = draw.choice(_SCALARS)
    at = draw.randrange(len(lines))
    key, _, _ = lines[at].partition(":")
    lines[at] = f"{key}: {value}"
    if not key.startswith(" "):  # a section: what was in it goes
        while at + 1 < len(lines) and lines[at + 1].startswith(" "):
            del lines[at + 1]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{shown(file, path)}: {key.strip()} := {value:.60}"


def _field(path: Path, draw: Random) -> str:
    """A field that the recipe did not have, or that it then has twice."""
    file = pick_file(path, draw, "*.yaml")
    lines = file.read_text(encoding="utf-8").splitlines()
    section = draw.choice(sorted(_KEYS))
    key, value = draw.choice(_KEYS[section]), draw.choice(_SCALARS)
    if f"{section}:" not in lines:
        lines.append(f"{section}:")
    lines.insert(lines.index(f"{section}:") + 1, f"  {key}: {value}")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{shown(file, path)}: {section}.{key}: {value:.60}"


def _text(path: Path, draw: Random) -> str:
    """Something before, behind, or in place of the recipe."""
    file = pick_file(path, draw, "*.yaml")
    text = file.read_text(encoding="utf-8")
    depth = draw.choice([5, 9, 30])
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n"
        for level in range(1, depth + 1)
    )
    merges = "m0: &m0 {a: 1}\n" + "".join(
        f"m{level}: &m{level}\n  <<: [*m{level - 1}, *m{level - 1}]\n" for level in range(1, depth)
    )
    changed = {
        "aliases of aliases": bomb + text,
        "aliases of aliases as a section": bomb + f"train: *a{depth}\n",
        "merges of merges": merges + text,
        "a section that is itself": "train: &t\n  tokens: *t\n",
        "two documents": text + "---\n" + text,
        "a tab": text.replace("  ", "\t", 1),
        "deep blocks": "".join(" " * level + "a:\n" for level in range(2000)),
        "a list": "- a\n- b\n",
        "a scalar": "recipe\n",
        "nothing": "",
        "a comment": "# nothing\n",
        "a NUL": text + "\0",
        "a directive": "%YAML 9.9\n---\n" + text,
        "a huge key": "? " + "[" * 60 + "]" * 60 + "\n: 1\n" + text,
        "numbers for keys": "1: 2\ntrue: 3\nnull: 4\n" + text,
        "UTF-16": None,
        "a million lines": "a:\n" + " - 1\n" * 300_000,
    }
    name = draw.choice(sorted(changed))
    content = changed[name]
    file.write_bytes(text.encode("utf-16") if content is None else content.encode())
    return f"{shown(file, path)}: {name}"


def _format(path: Path, draw: Random) -> str:
    file = pick_file(path, draw, "*.yaml")
    recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    sections = list(recipe.items())
    draw.shuffle(sections)
    flow = draw.choice([None, True, False])
    text = yaml.safe_dump(dict(sections), sort_keys=draw.random() < 0.5, default_flow_style=flow)
    text = draw.choice(["", "---\n", "# a comment\n", "\n\n"]) + text + draw.choice(["", "...\n"])
    file.write_text(text, encoding="utf-8", newline=draw.choice(["\n", "\r\n"]))
    return f"{shown(file, path)}: written in another way"


YAML = [
    Mutation("YAML value", _value),
    Mutation("YAML field", _field),
    Mutation("YAML text", _text),
]
YAML_FORMAT = Mutation("YAML format", _format, Effect.HARMLESS)
