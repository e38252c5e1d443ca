"""Conversions that are refused or fail, and that they leave no files."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from molcli.config.sections import Recipe, UpcycleConfig
from molcli.errors import MolError
from molcli.families.parent import open_parent
from molcli.stages.upcycle import run, upcycle


def refusal(parent: Path, calibration: Path | None, out: Path, **options: Any) -> MolError:
    """The error of a conversion that writes nothing and does not reach the first layer."""
    steps: list[int] = []

    def progress(done: int, total: int | None, note: str = "") -> None:
        steps.append(done)

    settings = {"num_blocks": 5, "top_k": 2, "d_thin": 32} | options
    recipe = Recipe(upcycle=UpcycleConfig(**settings))
    beside = set(out.parent.iterdir())
    with pytest.raises(MolError) as caught:
        upcycle(open_parent(parent), calibration, recipe, out, progress=progress)
    assert not steps
    assert set(out.parent.iterdir()) == beside
    return caught.value


@pytest.mark.parametrize(
    "options, found, hint",
    [
        ({"d_thin": 40}, "`upcycle.d_thin` is 40, but a head is 16 wide", "upcycle.d_thin=32"),
        ({"d_thin": 8}, "`upcycle.d_thin` is 8, but a head is 16 wide", "upcycle.d_thin=16"),
        ({"d_thin": 80}, "`upcycle.d_thin` is 80, but the model's width is 64", "d_thin=16"),
        ({"layers": [0, 2]}, "`upcycle.layers` names layer 2, but the model has 2", ""),
        ({"gated_deltanet": [7]}, "`upcycle.gated_deltanet` names layer 7", ""),
    ],
)
def test_a_recipe_that_does_not_fit_the_parent(
    options: dict[str, Any],
    found: str,
    hint: str,
    tmp_path: Path,
    tiny_parent: Callable[..., Path],
    workshop: Any,
) -> None:
    parent = tiny_parent("llama")
    error = refusal(parent, workshop.calibration(parent), tmp_path / "out", **options)
    assert found in error.found
    assert hint in error.hint
    assert error.allowed


def test_no_calibration(tmp_path: Path, tiny_parent: Callable[..., Path]) -> None:
    parent = tiny_parent("llama")
    error = refusal(parent, None, tmp_path / "out")
    assert "no calibration" in error.found
    assert f"molcli calibrate {parent}" in error.hint


def test_a_calibration_of_another_parent(
    tmp_path: Path, tiny_parent: Callable[..., Path], workshop: Any
) -> None:
    """Even if both parents have the same shape."""
    one, other = tiny_parent("llama", tie_word_embeddings=False), tiny_parent("mistral")
    shutil.copytree(one, tmp_path / "tuned")
    shard = tmp_path / "tuned" / "model.safetensors"
    weights = bytearray(shard.read_bytes())
    weights[-1] ^= 64
    shard.write_bytes(weights)
    calibration = workshop.calibration(one)
    assert "another parent" in refusal(tmp_path / "tuned", calibration, tmp_path / "out").found
    # Llama and Mistral of equal shape compute the same: equal weights are the same parent.
    upcycle(open_parent(other), calibration, Recipe(), tmp_path / "out")


def _no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def _no_moments(folder: Path) -> None:
    (folder / "moments-00001.safetensors").unlink()


def _cut_moments(folder: Path) -> None:
    file = folder / "moments-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def _cut_tokens(folder: Path) -> None:
    file = folder / "tokens.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def _other_tokens(folder: Path) -> None:
    shutil.copy(folder / "moments-00001.safetensors", folder / "tokens.safetensors")


def _other_moments(folder: Path) -> None:
    shutil.copy(folder / "tokens.safetensors", folder / "moments-00001.safetensors")


def _cut_json(folder: Path) -> None:
    file = folder / "calibration.json"
    file.write_text(file.read_text()[:-5])


def _other_json(folder: Path) -> None:
    (folder / "calibration.json").write_text(json.dumps({"tokens": 1}))


def _json_list(folder: Path) -> None:
    (folder / "calibration.json").write_text("[]")


DAMAGES = [
    _no_folder,
    _no_moments,
    _cut_moments,
    _cut_tokens,
    _other_tokens,
    _other_moments,
    _cut_json,
    _other_json,
    _json_list,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_calibration(
    damage: Callable[[Path], None],
    tmp_path: Path,
    tiny_parent: Callable[..., Path],
    workshop: Any,
) -> None:
    parent = tiny_parent("llama")
    calibration = workshop.calibration(parent)
    damage(calibration)
    error = refusal(parent, calibration, tmp_path / "out")
    assert "is not a calibration" in error.found
    assert "molcli calibrate" in error.allowed


def test_an_output_folder_that_is_not_empty(
    tmp_path: Path, tiny_parent: Callable[..., Path], workshop: Any
) -> None:
    parent, out = tiny_parent("llama"), tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("untouched")
    assert "is not empty" in refusal(parent, workshop.calibration(parent), out).found
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_too_little_disk(
    tmp_path: Path,
    tiny_parent: Callable[..., Path],
    workshop: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The parent has 0.3 MB; its conversion is larger than the free space."""
    parent = tiny_parent("llama")
    calibration = workshop.calibration(parent)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, 400_000))
    assert "GB free" in refusal(parent, calibration, tmp_path / "out").found


def test_a_run_that_fails_half_way_leaves_no_files(
    tmp_path: Path,
    tiny_parent: Callable[..., Path],
    workshop: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the next run converts the parent from the start."""
    parent = tiny_parent("llama")
    calibration, real = workshop.calibration(parent), run.fit_sliced_layer

    def failing(config: Any, index: int, *rest: Any) -> Any:
        if index == 1:
            raise RuntimeError("the machine is on fire")
        return real(config, index, *rest)

    monkeypatch.setattr(run, "fit_sliced_layer", failing)
    beside = set(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="on fire"):
        upcycle(open_parent(parent), calibration, Recipe(), tmp_path / "out")
    assert set(tmp_path.iterdir()) == beside
    monkeypatch.setattr(run, "fit_sliced_layer", real)
    upcycle(open_parent(parent), calibration, Recipe(), tmp_path / "out")
    assert (tmp_path / "out" / "receipt.json").is_file()
