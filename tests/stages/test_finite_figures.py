"""Models whose weights are finite and whose activations are not: no figure is reported."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import molcli
from tests.conftest import tiny_tokenizer

EVALUATE = {
    "evaluate.tokens": 200,
    "evaluate.context_length": 32,
    "evaluate.recall_pairs": 1,
    "evaluate.recall_distances": [0],
}


def overflow(folder: Path, name: str) -> Path:
    """Make a matrix so large that its products are infinite."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name][:] = 3e38
    tensors[name.replace("down", "up")][:] = 1e30
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.fixture
def broken(tiny_mol: Callable[..., Path]) -> Path:
    folder = overflow(tiny_mol(), "model.layers.0.block.mlp.down_proj")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_eval_names_the_loss(broken: Path, corpus: Callable[..., str]) -> None:
    with pytest.raises(molcli.MolError, match="the model's cross-entropy is nan"):
        molcli.evaluate(broken, data=corpus(), settings=EVALUATE, progress=False)


def test_eval_names_the_parents_loss(
    tiny_mol: Callable[..., Path], tiny_parent: Callable[..., Path], corpus: Callable[..., str]
) -> None:
    parent = overflow(tiny_parent("llama"), "model.layers.0.mlp.down_proj.weight")
    with pytest.raises(molcli.MolError, match="the parent's cross-entropy is nan"):
        molcli.evaluate(tiny_mol(), data=corpus(), parent=parent, settings=EVALUATE, progress=False)


def test_recall_is_not_counted(broken: Path) -> None:
    with pytest.raises(molcli.MolError, match="the model's logits are not finite"):
        molcli.evaluate(broken, settings=EVALUATE, progress=False)


def test_inspect_counts_no_routing(broken: Path, corpus: Callable[..., str]) -> None:
    settings = {"inspect.context_length": 32}
    with pytest.raises(molcli.MolError, match="the model's activations are not finite"):
        molcli.inspect(broken, corpus(), settings=settings, progress=False)
