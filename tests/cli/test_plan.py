"""`molcli plan`: from a config.json alone, and with a calibration."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from molcli.cli.main import app
from molcli.errors import MolError


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["plan", *arguments])
    if done.exception is not None:
        raise done.exception
    return done.output


def test_a_configuration_is_enough(tiny_parent: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(tiny_parent("qwen3", intermediate_size=1024) / "config.json", folder)
    target = tmp_path / "plan.json"
    arguments = ["--active", "60%", "--tokens", "30M", "--gpu", "A100", "--json", str(target)]
    text = run(str(folder), *arguments)
    found = json.loads(target.read_text())
    assert found["tokens"] == 30_000_000
    assert found["gpu"]["name"] == "A100 80 GB"
    assert all(c["kl"] is None for c in found["candidates"])
    assert f"{found['recommended']}: molcli upcycle {folder} OUT --set upcycle.active=0.6" in text


def test_a_calibration_adds_forecasts(tiny_parent: Callable[..., Path], tmp_path: Path) -> None:
    parent, target = str(tiny_parent("llama", intermediate_size=512)), tmp_path / "plan.json"
    folder = str(tmp_path / "calibration")
    small = ["-s", "calibrate.context_length=32", "-s", "calibrate.tokens=512"]
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"input_ids": [*range(3, 33)]}) for _ in range(40)))
    done = CliRunner().invoke(app, ["calibrate", parent, folder, "-d", str(text), *small])
    assert done.exit_code == 0
    run(parent, "--active", "0.7", "--calibration", folder, "--json", str(target))
    found = json.loads(target.read_text())
    thin = [c["kl"] for c in found["candidates"] if "d_thin" in c["settings"]]
    assert thin and all(kl > 0 for kl in thin)


@pytest.mark.parametrize(
    "arguments, found",
    [
        (["--active", "0"], "--active is 0"),
        (["--active", "50x"], "--active is 50x"),
        (["--active", "120%"], "--active is 120%"),
        (["--tokens", "many"], "--tokens is many"),
        (["--tokens", "infB"], "--tokens is infB"),
        (["--gpu", "abacus"], "--gpu is abacus"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: list[str], found: str) -> None:
    with pytest.raises(MolError) as caught:
        run("PARENT", *arguments)
    assert caught.value.found == found and caught.value.allowed
