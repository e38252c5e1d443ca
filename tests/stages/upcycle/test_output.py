"""What a conversion writes beside and around the weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from molcli import __version__
from molcli.estimate.parameters import count_parameters
from molcli.families.parent import open_parent
from molcli.stages.upcycle import run


def test_the_receipt_is_complete(
    tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    converted = convert(tiny_parent("llama"))
    receipt, config = converted.receipt, converted.model().config
    parent = open_parent(converted.parent)
    assert receipt["parent"] == {"name": str(converted.parent), "fingerprint": parent.fingerprint()}
    assert receipt["calibration"]["tokens"] == 1024
    count = count_parameters(config)
    dense = sum(p.numel() for p in converted.parent_model().parameters())
    assert receipt["parameters"] == {
        "total": count.total,
        "active": count.active,
        "parent": dense,
    }
    assert receipt["versions"]["molcli"] == __version__
    assert receipt["seconds"] >= 0
    for index, layer in enumerate(receipt["layers"]):
        assert (layer["layer"], layer["kind"]) == (index, "mixture, attention")
        assert len(layer["retained_energy"]) == 3  # the shared block and two families
        assert all(0 < share <= 1 for share in layer["retained_energy"])
        assert layer["residual_error"] > 0 and layer["residual_error_fit"] > 0


def test_the_same_command_gives_the_same_bytes(
    tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    parent = tiny_parent("llama")
    one, again, other = (
        convert(parent, gated_deltanet=[1], **options).weights for options in ({}, {}, {"ridge": 1})
    )
    assert one == again
    assert one != other


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_parents_dtype_is_kept_but_where_it_is_too_coarse(
    dtype: torch.dtype, tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    converted = convert(tiny_parent("llama", dtype=dtype), gated_deltanet=[1])
    kept = {name for name, x in converted.tensors.items() if x.dtype != dtype}
    fine = ("router.weight", "router.correction_bias", "A_log", "dt_bias")
    assert kept == {name for name in converted.tensors if name.endswith(fine)}
    assert {converted.tensors[name].dtype for name in kept} == {torch.float32}
    model = converted.model()
    assert model.dtype == dtype
    assert all(model.state_dict()[name].dtype == torch.float32 for name in kept)
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, min_new_tokens=3).shape[1] == 5


def test_shards_hold_what_one_file_would(
    tiny_parent: Callable[..., Path],
    convert: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parent = tiny_parent("llama")
    whole = convert(parent)
    monkeypatch.setattr(run, "SHARD_BYTES", 100_000)
    sharded = convert(parent)
    shards = sorted(sharded.folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert (sharded.folder / "model.safetensors.index.json").is_file()
    found = {name: x for shard in shards for name, x in load_file(shard).items()}
    assert found.keys() == whole.tensors.keys()
    assert all(torch.equal(found[name], x) for name, x in whole.tensors.items())
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(sharded.model()(ids).logits, whole.model()(ids).logits)
