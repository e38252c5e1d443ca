"""Recipes that are large, deep, or full of aliases; and numbers that no run could use."""

import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from molcli.config.recipe import load_recipe
from molcli.config.sections import Recipe
from molcli.config.typed import describe
from molcli.errors import MolError

LAUGHS = "a: &a [lol, lol]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
LONG = "x" * 100_000


def refusal(source: Path | None, *overrides: Any) -> MolError:
    with pytest.raises(MolError) as caught:
        load_recipe(source, overrides)
    assert len(str(caught.value)) < 1000
    return caught.value


@pytest.mark.parametrize(
    "text, found",
    [
        (LAUGHS, "too many values"),
        ("upcycle:\n  layers: &a [*a]", "contains itself"),
        ("upcycle: &a\n  layers: {x: *a}", "contains itself"),
        ("upcycle: {layers: " + "[" * 5000 + "]" * 5000 + "}", "nested too deeply"),
        ("upcycle:\n" + "".join(" " * i + "a:\n" for i in range(1, 300)), "nested too deeply"),
        ("upcycle: {layers: [" + "0, " * 20_000 + "]}", "too many values"),
        ("train: {data: " + 3 * LONG + "}", "characters"),
        ("train: {data: [" + LONG + "]}", "`train.data` is ['xxx"),
        ("upcycle: {preset: " + LONG + "}", "`upcycle.preset` is 'xxx"),
        (f"? {LONG}\n: {{a: 1}}", "no section `xxx"),
        ("train: {? " + LONG + " : 1}", "no key `xxx"),
        ("train: {a: *" + LONG + "}", "is not YAML"),
        ("upcycle: {layers: !!set {a: null}}", "tag !!set"),
        ("train: {tokens: !!int ''}", "tag !!int"),
        ("train: {tokens: !!timestamp x}", "tag !!timestamp"),
        ("train: {tokens: !!binary x}", "tag !!binary"),
        ("upcycle: !!python/object/apply:os.system ['false']", "tag"),
        ("train: {tokens: 0x" + "f" * 20_000 + "}", "`train.tokens` is '0xfff"),
        ("train: {tokens: 0x_}", "is not YAML"),
        ("upcycle: {}\n\0", "is not YAML"),
        ("upcycle: {}\n---\ntrain: {}", "is not YAML"),
    ],
    ids=lambda text: text[:24].encode("unicode_escape").decode(),
)
def test_a_recipe_beyond_bounds_is_refused_in_few_words(
    tmp_path: Path, text: str, found: str
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    assert found in refusal(path).found


def test_few_aliases_and_merged_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "train:\n  data: &both {a.txt: 1, b.txt: 3}\n  stages:\n"
        "    - &first {kind: align, data: *both}\n    - {<<: *first, kind: distill}\n"
    )
    stages = load_recipe(path).train.stages
    assert isinstance(stages, list)
    assert [stage.kind for stage in stages] == ["align", "distill"]
    assert stages[0].data == stages[1].data == {"a.txt": 1.0, "b.txt": 3.0}


def test_a_byte_order_mark_is_no_part_of_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfupcycle: {d_thin: 64}\n")
    assert load_recipe(path).upcycle.d_thin == 64


def numbers() -> Iterator[str]:
    """Keys whose type is a number, or allows one."""
    for section, kind in get_type_hints(Recipe).items():
        for field in fields(kind):
            allowed = describe(get_type_hints(kind)[field.name])
            if "integer" in allowed or "finite number" in allowed:
                yield f"{section}.{field.name}"


@pytest.mark.parametrize("key", list(numbers()))
@pytest.mark.parametrize(
    "value",
    [-1, -1e300, 1e300, 10**31, 10**5000, float("nan"), float("inf"), [-1], [10**31], [True]],
    ids=lambda value: f"{value.bit_length()} bits" if isinstance(value, int) else str(value)[:6],
)
def test_a_number_that_is_negative_huge_or_none_is_refused_in_every_key(
    key: str, value: Any
) -> None:
    error = refusal(None, (key, value))
    assert key in error.found
    assert error.allowed


@pytest.mark.parametrize("key", ["train.learning_rate", "train.temperature", "upcycle.ridge"])
def test_a_positive_number_has_a_finite_inverse(key: str) -> None:
    assert refusal(None, f"{key}=1e-320").allowed == "1e-30 or more"


def test_a_large_seed_and_many_tokens_are_read() -> None:
    recipe = load_recipe(None, [f"train.seed={2**63 - 1}", f"train.tokens={10**15}"])
    assert (recipe.train.seed, recipe.train.tokens) == (2**63 - 1, 10**15)


def test_a_recipe_may_mix_thousands_of_sources(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    sources = ", ".join(f"folder/file-{i:05}.jsonl: 1" for i in range(4500))
    path.write_text(f"train: {{data: {{{sources}}}}}")
    data = load_recipe(path).train.data
    assert isinstance(data, dict) and len(data) == 4500


@pytest.mark.parametrize(
    "name, found",
    [
        ("/dev/zero", "is a device or a pipe"),
        ("pipe", "is a device or a pipe"),
        ("folder", "is a folder"),
        ("loop", "there is no recipe"),
        ("x" * 5000, "there is no recipe"),
        ("demo\0", "there is no recipe"),
        ("recipes/../demo", "there is no recipe"),
    ],
    ids=lambda text: text[:12].encode("unicode_escape").decode(),
)
def test_only_a_regular_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, found: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")  # to open it would wait for ever
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    assert found in refusal(Path(name)).found


def test_a_file_of_terabytes_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    with path.open("wb") as file:
        file.truncate(2**40)
    assert "characters" in refusal(path).found


def test_a_repeated_key_is_named_with_its_file_or_option(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("train:\n  tokens: 5\n  tokens: 6\n")
    assert f"{path}, line 3" in refusal(path).found
    assert "--set train.data" in refusal(None, "train.data={a.txt: 1, a.txt: 2}").found
