"""Calibration against the parent's own hidden states, as transformers computes them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from molcli.config.sections import CalibrateConfig, Recipe
from molcli.errors import MolError
from molcli.families.parent import open_parent
from molcli.files import resumable
from molcli.fitting.calibration import moments_file, open_calibration
from molcli.stages.calibrate import calibrate

CONFIG = CalibrateConfig(tokens=96, heldout_tokens=32, context_length=16)


@pytest.fixture
def text(tmp_path: Path) -> Callable[..., str]:
    """Writes documents of random tokens."""

    def write(*sizes: int) -> str:
        generator = torch.Generator().manual_seed(0)
        path = tmp_path / "text.jsonl"
        documents = [torch.randint(3, 120, (size,), generator=generator) for size in sizes]
        lines = [json.dumps({"input_ids": ids.tolist()}) for ids in documents]
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write


def normed(x: Tensor) -> Tensor:
    return x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()


@torch.no_grad()
def direct_moments(folder: Path, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
    """From what the norms of the parent read, one document at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    moments: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = normed(inputs[0][0])
            moments[name] = moments.get(name, torch.zeros(())) + x.T @ x

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_pre_hook(keep(f"layers.{i}.attention"))
        layer.post_attention_layernorm.register_forward_pre_hook(keep(f"layers.{i}.mlp"))
    rows, documents = tokens["fit.input_ids"], tokens["fit.document_ids"]
    for ids, document in zip(rows, documents, strict=True):
        for number in document.unique():
            model(ids[document == number][None].long())
    return {name: total / rows.numel() for name, total in moments.items()}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_moments_are_those_of_the_parents_hidden_states(
    family: str, tmp_path: Path, tiny_parent: Callable[..., Path], text: Callable[..., str]
) -> None:
    """Documents of a row do not see each other; the text has more rows than a chunk."""
    folder, out = tiny_parent(family), tmp_path / "calibration"
    data = text(40, *[5] * 20, 300, 9, 150)
    calibrate(open_parent(folder), replace(CONFIG, data=data, tokens=560), out)
    tokens = load_file(out / "tokens.safetensors")
    assert len(tokens["fit.input_ids"]) > 32
    assert tokens["fit.document_ids"].max() >= 2
    expected = direct_moments(folder, tokens)
    found = {
        f"layers.{i}.{name}": moment
        for i in range(2)
        for name, moment in load_file(moments_file(out, i)).items()
    }
    assert found.keys() == expected.keys()
    for name, moment in found.items():
        assert moment.dtype == torch.float64
        torch.testing.assert_close(moment, expected[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moment, moment.T, rtol=0, atol=1e-6)
        assert torch.linalg.eigvalsh(moment).min() > -1e-6
        assert moment.trace().item() == pytest.approx(64, rel=1e-3)  # unit mean square


def test_each_row_is_used_once(
    tmp_path: Path, tiny_parent: Callable[..., Path], text: Callable[..., str]
) -> None:
    """One document shows the order: rows to fit on, then rows held out, then unused ones."""
    data, out = text(200), tmp_path / "calibration"
    calibrate(open_parent(tiny_parent("llama")), replace(CONFIG, data=data), out)
    tokens = load_file(out / "tokens.safetensors")
    fit, heldout = tokens["fit.input_ids"], tokens["heldout.input_ids"]
    assert (fit.shape, heldout.shape) == ((6, 16), (2, 16))
    document = json.loads(Path(data).read_text())["input_ids"]
    assert torch.cat([fit, heldout]).flatten().tolist() == document[:128]
    about = json.loads((out / "calibration.json").read_text())
    assert (about["tokens"], about["heldout_tokens"]) == (96, 32)
    assert about["config"]["context_length"] == 16


def test_a_part_of_the_text_to_fit_on_repeats_itself(
    tmp_path: Path, tiny_parent: Callable[..., Path], text: Callable[..., str]
) -> None:
    """It is made of that text alone, and the text held out is as it was read."""
    parent = open_parent(tiny_parent("llama"))
    config = replace(CONFIG, data=text(*[40] * 60), context_length=64, tokens=1280)
    config = replace(config, heldout_tokens=320)
    tokens = {}
    for name, share in {"null": None, "quarter": 0.25, "half": 0.5, "none": 0.0}.items():
        calibrate(parent, replace(config, repeats=share), tmp_path / name)
        tokens[name] = load_file(tmp_path / name / "tokens.safetensors")
        found = open_calibration(tmp_path / name, parent)  # moments and sums fit
        assert (len(found.fit), len(found.heldout)) == (20, 5)
        repeats = ~found.fit.document_ids.any(dim=1)
        assert int(repeats.sum()) == {"half": 10, "none": 0}.get(name, 5)
        assert torch.equal(found.heldout.input_ids, tokens["null"]["heldout.input_ids"])
        assert found.heldout.document_ids.any(dim=1).all()
        for row, is_repeat in zip(found.fit.input_ids, repeats, strict=True):
            windows = row.unfold(0, 3, 1).tolist()
            assert (len({*map(tuple, windows)}) < len(windows)) == bool(is_repeat)
    assert torch.equal(tokens["null"]["fit.input_ids"], tokens["quarter"]["fit.input_ids"])
    same = (tokens["null"]["fit.input_ids"] == tokens["none"]["fit.input_ids"]).all(dim=1)
    assert int(same.sum()) == 15


def test_half_of_a_short_text_is_held_out(
    tmp_path: Path, tiny_parent: Callable[..., Path], text: Callable[..., str]
) -> None:
    out = tmp_path / "calibration"
    config = replace(CONFIG, data=text(70), heldout_tokens=4096)
    calibrate(open_parent(tiny_parent("llama")), config, out)
    tokens = load_file(out / "tokens.safetensors")
    assert len(tokens["fit.input_ids"]) == len(tokens["heldout.input_ids"]) == 2


@pytest.mark.parametrize(
    "sizes, found",
    [((15,), "less than one row of 16"), ((20,), "fills 1 row of 16 tokens")],
)
def test_too_little_text_is_refused(
    sizes: tuple[int, ...],
    found: str,
    tmp_path: Path,
    tiny_parent: Callable[..., Path],
    text: Callable[..., str],
) -> None:
    out = tmp_path / "calibration"
    with pytest.raises(MolError, match=found) as refusal:
        calibrate(open_parent(tiny_parent("llama")), replace(CONFIG, data=text(*sizes)), out)
    assert "context_length" in refusal.value.hint
    assert not out.exists()


def test_no_text_is_refused(tmp_path: Path, tiny_parent: Callable[..., Path]) -> None:
    with pytest.raises(MolError, match="no text to calibrate on"):
        calibrate(open_parent(tiny_parent("llama")), CONFIG, tmp_path / "calibration")


def test_a_parent_without_tokenizer_takes_tokens_and_refuses_text(
    tmp_path: Path, tiny_parent: Callable[..., Path], text: Callable[..., str]
) -> None:
    parent = open_parent(tiny_parent("llama", tokenizer=False))
    calibrate(parent, replace(CONFIG, data=text(100, 100)), tmp_path / "calibration")
    assert moments_file(tmp_path / "calibration", 1).is_file()
    words = tmp_path / "words.txt"
    words.write_text("the quick brown fox " * 50)
    with pytest.raises(MolError, match="no tokenizer"):
        calibrate(parent, replace(CONFIG, data=str(words)), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_parent_whose_activations_overflow_is_refused(
    tmp_path: Path, tiny_parent: Callable[..., Path], text: Callable[..., str]
) -> None:
    folder = tiny_parent("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][3] = 3e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MolError, match=r"layer 1 .* not finite"):
        calibrate(open_parent(folder), replace(CONFIG, data=text(200)), tmp_path / "calibration")
    assert not [path for path in tmp_path.iterdir() if "calibration" in path.name]


def written(folder: Path) -> list[bytes]:
    """The tokens, and every layer's moments."""
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name[:6] for file in files[-1:]] == ["tokens"] and len(files) > 2
    return [file.read_bytes() for file in files]


def test_the_seed_draws_the_documents(
    tmp_path: Path, tiny_parent: Callable[..., Path], text: Callable[..., str]
) -> None:
    parent, data = open_parent(tiny_parent("llama")), text(*[20] * 10)

    def run(name: str, **changes: Any) -> list[bytes]:
        calibrate(parent, replace(CONFIG, data=data, **changes), tmp_path / name)
        return written(tmp_path / name)

    one, again, other = run("one"), run("again"), run("other", seed=1)
    assert one == again
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_an_output_folder_that_is_not_empty_is_unchanged(
    tmp_path: Path, tiny_parent: Callable[..., Path], text: Callable[..., str]
) -> None:
    out = tmp_path / "calibration"
    out.mkdir()
    (out / "mine").write_text("untouched")
    with pytest.raises(MolError, match="is not empty"):
        calibrate(open_parent(tiny_parent("llama")), replace(CONFIG, data=text(200)), out)
    assert [path.name for path in out.iterdir()] == ["mine"]


class Killed(BaseException):
    pass


@pytest.fixture
def saves_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable, "MIN_SAVE_INTERVAL", 0.0)
    monkeypatch.setattr(resumable, "MIN_WORK_PER_SAVE", 0)


@pytest.mark.usefixtures("saves_every_layer")
def test_a_killed_run_is_resumed(
    tmp_path: Path, tiny_parent: Callable[..., Path], text: Callable[..., str]
) -> None:
    parent, config = open_parent(tiny_parent("llama")), replace(CONFIG, data=text(200))
    layers: list[int] = []

    def stop_at(last: int) -> Callable[..., None]:
        def progress(done: int, *_: Any) -> None:
            layers.append(done)
            if done == last:
                raise Killed

        return progress

    calibrate(parent, config, tmp_path / "whole")
    with pytest.raises(Killed):
        calibrate(parent, config, tmp_path / "out", stop_at(1))
    assert not (tmp_path / "out").exists()
    calibrate(parent, config, tmp_path / "out", stop_at(-1))
    assert layers == list(range(1, parent.config.num_hidden_layers + 1))
    assert written(tmp_path / "whole") == written(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


@pytest.mark.usefixtures("saves_every_layer")
@pytest.mark.parametrize("damage", ["other text", "cut off"])
def test_unfinished_work_that_does_not_fit_is_discarded(
    damage: str, tmp_path: Path, tiny_parent: Callable[..., Path], text: Callable[..., str]
) -> None:
    parent, config = open_parent(tiny_parent("llama")), replace(CONFIG, data=text(200))
    out, left = tmp_path / "out", tmp_path / ".out.unfinished"

    def kill(*_: Any) -> None:
        raise Killed

    with pytest.raises(Killed):
        calibrate(parent, config, out, kill)
    if damage == "cut off":
        state = left / "state.safetensors"
        state.write_bytes(state.read_bytes()[:100])
    else:
        config = replace(config, tokens=80)
    layers: list[int] = []
    calibrate(parent, config, out, lambda done, *_: layers.append(done))
    assert layers[0] == 1
    assert not left.exists()


@pytest.mark.usefixtures("saves_every_layer")
@pytest.mark.parametrize("file", ["state.safetensors", "moments-00000.safetensors"])
def test_a_bit_that_flips_in_unfinished_work_is_found(
    file: str, tmp_path: Path, tiny_parent: Callable[..., Path], text: Callable[..., str]
) -> None:
    parent, config = open_parent(tiny_parent("llama")), replace(CONFIG, data=text(200))
    out, left = tmp_path / "out", tmp_path / ".out.unfinished"

    def kill(*_: Any) -> None:
        raise Killed

    with pytest.raises(Killed):
        calibrate(parent, config, out, kill)
    flip_last_bit(left / file)
    with pytest.raises(MolError, match=f"{file}.* does not have its sha256") as refusal:
        calibrate(parent, config, out)
    assert "the same command again" in refusal.value.hint
    assert not out.exists()
    calibrate(parent, config, out)
    calibrate(parent, config, tmp_path / "whole")
    assert written(out) == written(tmp_path / "whole")


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "file", ["tokens.safetensors", "moments-00001.safetensors", "calibration.json"]
)
def test_a_bit_that_flips_in_a_calibration_is_found(
    file: str, tmp_path: Path, tiny_parent: Callable[..., Path], text: Callable[..., str]
) -> None:
    parent, out = open_parent(tiny_parent("llama")), tmp_path / "out"
    calibrate(parent, replace(CONFIG, data=text(200)), out)
    open_calibration(out, parent)
    flip_last_bit(out / file)
    with pytest.raises(MolError, match=f"damaged: .*{file}.*sha256") as refusal:
        open_calibration(out, parent)
    assert refusal.value.hint


def test_a_calibration_of_an_earlier_version_is_read(
    tmp_path: Path, tiny_parent: Callable[..., Path], text: Callable[..., str]
) -> None:
    parent, out = open_parent(tiny_parent("llama")), tmp_path / "out"
    calibrate(parent, replace(CONFIG, data=text(200)), out)
    without_sums(out)
    about = json.loads((out / "calibration.json").read_text())
    del about["config"]["repeats"]
    (out / "calibration.json").write_text(json.dumps(about))
    found = open_calibration(out, parent)
    assert found.fit.tokens == 96
    assert found.in_force(Recipe()).calibrate.repeats == 0  # what it has, not the default


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_moments_that_say_nothing_are_refused(
    value: float, tmp_path: Path, tiny_parent: Callable[..., Path], text: Callable[..., str]
) -> None:
    """Also in a calibration without sums."""
    parent, out = open_parent(tiny_parent("llama")), tmp_path / "out"
    calibrate(parent, replace(CONFIG, data=text(200)), out)
    without_sums(out)
    moments = load_file(moments_file(out, 1))
    save_file(
        {name: torch.full_like(x, value) for name, x in moments.items()}, moments_file(out, 1)
    )
    with pytest.raises(MolError, match=r"moments-00001.* is zero or not finite"):
        open_calibration(out, parent)


def without_sums(folder: Path) -> None:
    path = folder / "calibration.json"
    about = json.loads(path.read_text())
    del about["files"], about["sha256"], about["sampled"]
    path.write_text(json.dumps(about))
