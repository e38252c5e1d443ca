"""The kinds of input: what there is of each, which commands read it, and how it is changed."""

from collections.abc import Sequence
from dataclasses import dataclass

from tests.fuzz.mutations.file_bytes import (
    BYTES,
    BYTES_WITH_SUMS,
    FILE_KINDS,
    FILE_KINDS_WITH_SUMS,
)
from tests.fuzz.mutations.gguf_fields import GGUF
from tests.fuzz.mutations.json_values import JSON_ORDER, JSON_SPACE, JSON_VALUE
from tests.fuzz.mutations.mutation import Mutation
from tests.fuzz.mutations.rows import BLANK_LINES, ENCODING, ROWS
from tests.fuzz.mutations.weights import HEADERS, INDEX_ENTRY, RESHARD, STALE_COPY, TENSORS
from tests.fuzz.mutations.yaml_text import YAML, YAML_FORMAT
from tests.fuzz.world import PARENTS, SMALL

_SHORT_PROMPTS = ["--set", "sample.prompt_length=16"]
_DATA = ["--data", "{world}/corpus.jsonl"]


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        inputs: names in the world.
        commands: words; {world} is the folder of inputs, {input} the changed copy of one, and
            "out", "out.jsonl" and "out.json" are what they write.
        mutations: a choice of changes with their weights.
        ignored: patterns of outputs that are not compared with those of the unchanged input.
        place: the name of the copy, if not "input" with the suffixes of the original.
    """

    inputs: Sequence[str]
    commands: Sequence[list[str]]
    mutations: dict[Mutation, int]
    ignored: Sequence[str] = ()
    place: str | None = None


def words(command: list[str], world: str, name: str) -> list[str]:
    """The words of a command as they are typed."""
    # A recipe has all settings.
    takes_settings = (
        command[:2] != ["data", "tokenize"] and command[0] != "plan" and "-r" not in command
    )
    return [
        *(word.format(world=world, input=name) for word in command),
        *(SMALL if takes_settings else ()),
    ]


_PARENT = ["--parent", "{world}/parent"]
_OF_A_PARENT = [
    ["plan", "{input}", "--active", "90%", "--json", "out.json"],
    ["calibrate", "{input}", "out", *_DATA],
    ["upcycle", "{input}", "out", *_DATA],
    ["eval", "{world}/mol", "--parent", "{input}", *_DATA, "--json", "out.json"],
    ["data", "sample", "{input}", "out.jsonl"],
    ["data", "cache-logits", "{input}", "out", *_DATA, "-k", "5"],
    ["data", "tokenize", "{world}/corpus.txt", "out", "-t", "{input}"],
]
_OF_A_MODEL_FOLDER = {
    JSON_VALUE: 16,
    JSON_ORDER: 1,
    JSON_SPACE: 1,
    RESHARD: 2,
    STALE_COPY: 2,
    INDEX_ENTRY: 3,
    **dict.fromkeys(HEADERS, 2),
    **dict.fromkeys(TENSORS, 2),
    **dict.fromkeys(BYTES, 1),
    **dict.fromkeys(FILE_KINDS, 1),
}
_WITH_SUMS = {
    JSON_VALUE: 6,
    JSON_SPACE: 1,
    **dict.fromkeys(BYTES_WITH_SUMS, 2),
    **dict.fromkeys(FILE_KINDS_WITH_SUMS, 1),
}

KINDS: dict[str, Kind] = {
    "parent": Kind(["parent", *PARENTS], _OF_A_PARENT, _OF_A_MODEL_FOLDER),
    "GGUF": Kind(
        ["parent.gguf"],
        [command for command in _OF_A_PARENT if "tokenize" not in command],
        {**dict.fromkeys(GGUF, 3), **dict.fromkeys(BYTES, 1), **dict.fromkeys(FILE_KINDS, 1)},
    ),
    "checkpoint": Kind(
        ["mol"],
        [
            ["eval", "{input}", *_PARENT, *_DATA, "--json", "out.json"],
            ["inspect", "{input}", *_DATA, "--json", "out.json"],
            ["convert", "{input}", "out", "--gated-deltanet", "all", *_DATA],
            ["train", "{input}", "out", *_PARENT, *_DATA],
            ["train", "{input}", "out", *_PARENT, *_DATA, "--dry-run"],
            ["data", "tokenize", "{world}/corpus.txt", "out", "-t", "{input}"],
        ],
        _OF_A_MODEL_FOLDER,
    ),
    "recipe": Kind(
        ["recipe.yaml"],
        [
            ["upcycle", "{world}/parent", "out", "-r", "{input}", *_DATA],
            ["calibrate", "{world}/parent", "out", "-r", "{input}", *_DATA],
            ["train", "{world}/mol", "out", "-r", "{input}", *_PARENT, *_DATA],
            ["train", "{world}/mol", "out", "-r", "{input}", *_DATA, "--dry-run"],
            ["init", "{input}", "out"],
            ["data", "sample", "{world}/parent", "out.jsonl", "-r", "{input}"],
            ["eval", "{world}/mol", "-r", "{input}", *_DATA, "--json", "out.json"],
            ["plan", "{world}/parent", "-r", "{input}", "--json", "out.json"],
        ],
        {
            **dict.fromkeys(YAML, 4),
            YAML_FORMAT: 2,
            **dict.fromkeys(BYTES, 1),
            **dict.fromkeys(FILE_KINDS, 1),
        },
    ),
    "data": Kind(
        [
            "corpus.jsonl",
            "corpus.txt",
            "text.jsonl",
            "text.json",
            "text.jsonl.gz",
            "text.jsonl.zst",
            "text.parquet",
        ],
        [
            ["data", "tokenize", "{input}", "out", "-t", "{world}/parent"],
            ["calibrate", "{world}/parent", "out", "--data", "{input}"],
            ["eval", "{world}/mol", "--data", "{input}", "--json", "out.json"],
            ["train", "{world}/mol", "out", "--data", "{input}"],
            [
                "data",
                "sample",
                "{world}/parent",
                "out.jsonl",
                "--prompts",
                "{input}",
                *_SHORT_PROMPTS,
            ],
        ],
        {
            **dict.fromkeys(ROWS, 6),
            ENCODING: 2,
            BLANK_LINES: 2,
            **dict.fromkeys(BYTES, 1),
            **dict.fromkeys(FILE_KINDS, 1),
        },
    ),
    "tokens": Kind(
        ["tokens"],
        [
            ["eval", "{world}/mol", "--data", "{input}", "--json", "out.json"],
            ["calibrate", "{world}/parent", "out", "--data", "{input}"],
            ["train", "{world}/mol", "out", "--data", "{input}"],
        ],
        _WITH_SUMS,
    ),
    "logits": Kind(
        ["logits"],
        [
            ["train", "{world}/mol", "out", "--logits", "{input}"],
            ["train", "{world}/mol", "out", "--logits", "{input}", "--dry-run"],
        ],
        _WITH_SUMS | dict.fromkeys(TENSORS, 2) | dict.fromkeys(HEADERS, 2),
    ),
    "calibration": Kind(
        ["calibrated"],
        [
            ["upcycle", "{world}/parent", "out", "--calibration", "{input}"],
            [
                "convert",
                "{world}/mol",
                "out",
                "--gated-deltanet",
                "all",
                *_PARENT,
                "--calibration",
                "{input}",
            ],
            ["plan", "{world}/parent", "--calibration", "{input}", "--json", "out.json"],
        ],
        _WITH_SUMS | dict.fromkeys(TENSORS, 2) | dict.fromkeys(HEADERS, 2),
    ),
    "training": Kind(
        ["stopped"],
        [["train", "{world}/mol", "{input}", *_PARENT, *_DATA, "--resume"]],
        {change: weight for change, weight in _WITH_SUMS.items() if change is not JSON_SPACE},
        # What is not read: an older checkpoint, what is only shown.
        ignored=["out/checkpoints/*", "out/checkpoints/*/*", "out/log.jsonl", "out/train.html"],
        place="out",
    ),
}
