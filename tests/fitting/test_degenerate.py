"""Parents and texts for which a regression or a ratio has no answer of its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import molcli
from tests.conftest import FAMILY_CONFIG

SETTINGS: dict[str, Any] = {
    "upcycle.num_blocks": 3,
    "upcycle.top_k": 1,
    "upcycle.d_thin": 32,
    "calibrate.tokens": 512,
    "calibrate.heldout_tokens": 128,
    "calibrate.context_length": 32,
}
PAD = 2
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def text(tmp_path: Path) -> Callable[[str], Path]:
    def write(kind: str) -> Path:
        generator = torch.Generator().manual_seed(0)
        random = torch.randint(3, 120, (20, 30), generator=generator).tolist()
        rows = {
            "padded": [[*row, PAD, PAD, 5] for row in random],
            "one token, repeated": [[7] * 30] * 20,
            "4 tokens": [[5, 6, 7, 9]],
            "padding alone": [[PAD] * 30] * 20,
        }[kind]
        path = tmp_path / "text.jsonl"
        path.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
        return path

    return write


def edit(folder: Path, change: Callable[[Tensors], None]) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def zero_rows(tensors: Tensors) -> None:
    tensors["model.embed_tokens.weight"][[PAD, 5]] = 0


def zero_layer(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if ".layers.0." in name:
            tensor.zero_()


def zero_matrices(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if ".layers." in name and "norm" not in name:
            tensor.zero_()


def zero_norms(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor.zero_()


def dead_channel(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if "embed_tokens" in name:
            tensor[:, 7] = 0
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[7] = 0


def equal_rows(tensors: Tensors) -> None:
    tensors["model.embed_tokens.weight"][:] = tensors["model.embed_tokens.weight"][3].clone()


def check(out: Path) -> dict[str, Any]:
    """The receipt, whose numbers are finite as are the model's logits."""

    def refuse(constant: str) -> float:
        raise AssertionError(f"the receipt holds {constant}")

    receipt: dict[str, Any] = json.loads((out / "receipt.json").read_text(), parse_constant=refuse)
    logits = molcli.open_model(out)(torch.tensor([[PAD, 1, 5, 9, PAD]])).logits
    assert logits.isfinite().all()
    return receipt


@pytest.mark.parametrize("family", FAMILY_CONFIG)
def test_zero_rows_of_an_embedding(
    family: str, tiny_parent: Callable[..., Path], text: Callable[[str], Path], tmp_path: Path
) -> None:
    """As transformers initialises the row of padding, here also the end of documents."""
    folder, out = edit(tiny_parent(family), zero_rows), tmp_path / "out"
    molcli.upcycle(folder, out, data=text("padded"), settings=SETTINGS, progress=False)
    whole = tmp_path / "whole"
    molcli.upcycle(
        tiny_parent(family), whole, data=text("padded"), settings=SETTINGS, progress=False
    )
    # The fit is about as good as without such rows.
    found, usual = check(out), check(whole)
    assert found["heldout"]["kl"] < 2 * usual["heldout"]["kl"]
    for layer, other in zip(found["layers"], usual["layers"], strict=True):
        assert layer["delta_error"] < 2 * other["delta_error"]


@pytest.mark.parametrize(
    "change",
    [zero_rows, zero_layer, zero_matrices, zero_norms, dead_channel, equal_rows],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"upcycle.method": "svd"},
        {"upcycle.method": "pca"},
        {"upcycle.method": "random"},
        {"upcycle.gated_deltanet": "all"},
        {"upcycle.layers": "auto", "upcycle.gated_deltanet": "auto"},
    ],
    ids=str,
)
def test_degenerate_parents(
    change: Callable[[Tensors], None],
    options: dict[str, Any],
    tiny_parent: Callable[..., Path],
    text: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder, out = edit(tiny_parent("llama"), change), tmp_path / "out"
    data, settings = text("padded"), SETTINGS | options
    molcli.upcycle(folder, out, data=data, settings=settings, progress=False)
    first = check(out)["layers"][0]
    if change is zero_layer and not options:
        assert (first["delta_error"], first["norm_ratio"]) == (0, None)  # nothing, of nothing
        assert first["retained_energy"] == [1.0] * len(first["retained_energy"])


@pytest.mark.parametrize("kind", ["one token, repeated", "4 tokens"])
@pytest.mark.parametrize("mixer", ["none", "all"])
def test_texts_of_fewer_tokens_than_dimensions(
    kind: str,
    mixer: str,
    tiny_parent: Callable[..., Path],
    text: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    settings = SETTINGS | {"upcycle.gated_deltanet": mixer}
    if kind == "4 tokens":
        settings["calibrate.context_length"] = 2
    for number, folder in enumerate([tiny_parent("qwen3"), edit(tiny_parent("llama"), zero_rows)]):
        out = tmp_path / f"out-{number}"
        molcli.upcycle(folder, out, data=text(kind), settings=settings, progress=False)
        check(out)


def test_text_without_any_activation_is_refused(
    tiny_parent: Callable[..., Path], text: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, out = edit(tiny_parent("llama"), zero_rows), tmp_path / "out"
    data = text("padding alone")
    with pytest.raises(molcli.MolError, match="activations at layer 0 are all zero"):
        molcli.upcycle(folder, out, data=data, settings=SETTINGS, progress=False)
    assert not out.exists()


@pytest.mark.parametrize("change", [zero_rows, zero_layer, zero_norms], ids=lambda c: c.__name__)
def test_attention_of_degenerate_models_is_converted(
    change: Callable[[Tensors], None],
    tiny_parent: Callable[..., Path],
    text: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder, out = edit(tiny_parent("llama"), change), tmp_path / "out"
    data, converted = text("padded"), tmp_path / "converted"
    molcli.upcycle(folder, out, data=data, settings=SETTINGS, progress=False)
    molcli.convert(
        out,
        converted,
        gated_deltanet="all",
        data=data,
        settings={"convert.steps": 2},
        progress=False,
    )
    assert "NaN" not in (converted / "convert.json").read_text()
    logits = molcli.open_model(converted)(torch.tensor([[PAD, 1, 5, 9, PAD]])).logits
    assert logits.isfinite().all()
