"""What recipe.yaml, calibration.json and receipts say of a conversion is what was in force."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import molcli
from molcli.cli import main as command
from molcli.config.recipe import load_recipe
from molcli.files.tensors import TensorReader

SETTINGS: dict[str, Any] = {
    "upcycle.num_blocks": 3,
    "upcycle.top_k": 1,
    "upcycle.d_thin": 32,
    "calibrate.tokens": 256,
    "calibrate.heldout_tokens": 64,
    "calibrate.context_length": 32,
    "sample.length": 24,
    "sample.tokens": 99,
    "calibrate.seed": 5,
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    rows = torch.randint(3, 120, (40, 30), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    return path


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_sampled_text_is_recorded_as_such(tiny_parent: Callable[..., Path], tmp_path: Path) -> None:
    """By how it was sampled, not as the temporary file; two runs give equal bytes."""
    parent = tiny_parent("llama")
    for name in ("one", "two"):
        molcli.calibrate(parent, tmp_path / name, settings=SETTINGS, progress=False)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    about = read(tmp_path / "one" / "calibration.json")
    assert about["config"]["data"] is None
    sampled = about["sampled"]
    assert (sampled["tokens"], sampled["seed"], sampled["length"]) == (320, 5, 24)


def test_a_conversion_records_how_its_text_was_sampled(
    tiny_parent: Callable[..., Path], tmp_path: Path
) -> None:
    parent, out, converted = tiny_parent("llama"), tmp_path / "out", tmp_path / "converted"
    molcli.upcycle(parent, out, settings=SETTINGS, progress=False)
    calibration = read(out / "receipt.json")["calibration"]
    assert calibration["config"]["data"] is None
    assert calibration["sampled"]["tokens"] == 320
    molcli.convert(
        out,
        converted,
        gated_deltanet=[1],
        parent=parent,
        settings={"convert.steps": 0},
        progress=False,
    )
    for folder in (out, converted):
        recipe = load_recipe(folder / "recipe.yaml")
        assert recipe.calibrate.data is None
        assert (recipe.sample.tokens, recipe.sample.seed, recipe.sample.length) == (320, 5, 24)


def test_the_recipe_has_the_values_of_the_calibration(
    tiny_parent: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """Not those of a recipe that --calibration overrides."""
    parent, calibration = tiny_parent("llama"), tmp_path / "calibration"
    molcli.calibrate(parent, calibration, data=text, settings=SETTINGS, progress=False)
    others = SETTINGS | {
        "calibrate.tokens": 999,
        "calibrate.heldout_tokens": 777,
        "calibrate.context_length": 16,
        "calibrate.seed": 1,
    }
    out, converted = tmp_path / "out", tmp_path / "converted"
    molcli.upcycle(parent, out, calibration=calibration, settings=others, progress=False)
    molcli.convert(
        out,
        converted,
        gated_deltanet=[1],
        calibration=calibration,
        settings={"convert.steps": 0, "calibrate.tokens": 555, "calibrate.data": "other.txt"},
        progress=False,
    )
    for folder in (out, converted):
        found = load_recipe(folder / "recipe.yaml").calibrate
        assert (found.tokens, found.heldout_tokens, found.context_length) == (256, 64, 32)
        assert found.data == str(text)
        assert found.seed == 1  # of the clustering


def test_a_saved_recipe_repeats_its_conversion(
    tiny_parent: Callable[..., Path], tmp_path: Path
) -> None:
    parent = tiny_parent("llama")
    calibration = tmp_path / "calibration"
    molcli.calibrate(parent, calibration, settings=SETTINGS, progress=False)
    one, two = tmp_path / "one", tmp_path / "two"
    settings = {k: v for k, v in SETTINGS.items() if k.startswith("upcycle")}
    settings["calibrate.seed"] = 5
    molcli.upcycle(parent, one, calibration=calibration, settings=settings, progress=False)
    molcli.upcycle(parent, two, recipe=one / "recipe.yaml", progress=False)
    readers = [TensorReader(folder) for folder in (one, two)]
    for name in readers[0].tensors:
        assert torch.equal(*(reader.read(name) for reader in readers)), name


def test_a_conversion_is_fitted_to_the_text_that_the_recipe_trains_on(
    tiny_parent: Callable[..., Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where there is no other text; a mixture, too."""
    parent, other = tiny_parent("llama"), tmp_path / "other.jsonl"
    other.write_text(text.read_text())
    mixture = {str(text): 3.0, str(other): 1.0}
    settings = SETTINGS | {"train.data": mixture}

    def calibration(name: str, **arguments: Any) -> dict[str, Any]:
        out = tmp_path / name
        molcli.upcycle(parent, out, **({"settings": settings, "progress": False} | arguments))
        found: dict[str, Any] = read(out / "receipt.json")["calibration"]
        saved = load_recipe(out / "recipe.yaml")
        assert saved.calibrate.data == found["config"]["data"]
        return found

    trained_on = calibration("trained_on")
    assert trained_on["config"]["data"] == mixture and trained_on["sampled"] is None
    given = calibration("given", data=mixture, settings=SETTINGS)
    assert given["data"] == trained_on["data"]  # the hash of the same rows
    words = ["upcycle", parent, tmp_path / "command"]
    words += [word for source, w in mixture.items() for word in ("--data", f"{source}={w}")]
    words += [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    monkeypatch.setattr(sys, "argv", ["molcli", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 0
    by_command = read(tmp_path / "command" / "receipt.json")["calibration"]
    assert (by_command["data"], by_command["config"]["data"]) == (trained_on["data"], mixture)
    assert calibration("data", data=other)["config"]["data"] == str(other)
    own = settings | {"calibrate.data": str(text)}
    assert calibration("own", settings=own)["config"]["data"] == str(text)
    alone = tmp_path / "calibration"
    molcli.calibrate(parent, alone, settings=settings, progress=False)
    assert read(alone / "calibration.json")["data"] == trained_on["data"]
    sampled = calibration("sampled", settings=settings | {"train.data": None})
    assert sampled["config"]["data"] is None and sampled["sampled"]


def test_text_to_train_on_is_not_read_where_nothing_is_fitted(
    tiny_parent: Callable[..., Path], tmp_path: Path
) -> None:
    settings = SETTINGS | {"train.data": "gone.jsonl", "upcycle.method": "random"}
    molcli.upcycle(tiny_parent("llama"), tmp_path / "out", settings=settings, progress=False)
    assert read(tmp_path / "out" / "receipt.json")["calibration"] is None
    assert load_recipe(tmp_path / "out" / "recipe.yaml").calibrate.data is None
