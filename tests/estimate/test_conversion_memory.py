"""The estimate is near what a conversion allocates, counted by storage."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from molcli.config.sections import CalibrateConfig, Recipe, UpcycleConfig
from molcli.estimate.memory import conversion_memory
from molcli.families.parent import open_parent
from molcli.fitting import chunks
from molcli.fitting.converted_config import mol_config
from molcli.maths import losses
from molcli.stages.calibrate import calibrate
from molcli.stages.upcycle import upcycle


class LiveBytes(TorchDispatchMode):
    """Count the bytes of storages that operations created and that still exist, and the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def test_storages_count_once_until_they_are_freed() -> None:
    with LiveBytes() as live:
        x = torch.zeros(1000)
        y = x.view(10, 100) + 1
        assert live.now == 8000
        del x
        assert live.now == 4000
        y.add_(1)
        del y
    assert (live.now, live.peak) == (0, 8000)


SLICES = {"d_thin": None, "top_k": None, "blocks": "slices"}


@pytest.mark.parametrize(
    "options, tokens, chunk_bytes, parent",
    [
        # Residuals of many tokens; the sums of many neurons; the vocabulary, at the end; a chunk.
        ({}, 6144, 2**23, {}),
        ({"d_ff_thin": 384, "num_blocks": 7}, 1024, 2**23, {"intermediate_size": 384}),
        ({}, 512, 2**23, {"vocab_size": 6000}),
        ({}, 6144, 2**30, {}),
        # A shared block's heads, as wide as the residual, which are not held.
        (
            {"d_thin": None, "blocks": "thin"},
            6144,
            2**23,
            {"num_attention_heads": 8, "num_key_value_heads": 2},
        ),
        # Slices: residuals of many tokens; the sums of many neurons; a chunk.
        (SLICES, 6144, 2**23, {"intermediate_size": 384}),
        (SLICES | {"preset": "quality"}, 1024, 2**23, {"intermediate_size": 512}),
        (SLICES, 6144, 2**30, {"intermediate_size": 384}),
        # The sums of a shared block's neurons, more than the clones'.
        (
            {"d_thin": 32, "d_ff_thin": 16, "d_thin_shared": 96, "d_ff_thin_shared": 384},
            1024,
            2**23,
            {"intermediate_size": 384},
        ),
    ],
)
def test_peak_of_a_conversion_is_near_the_estimate(
    options: dict[str, Any],
    tokens: int,
    chunk_bytes: int,
    parent: dict[str, Any],
    tmp_path: Path,
    tiny_parent: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", chunk_bytes)
    monkeypatch.setitem(losses.LOGITS_PER_CHUNK, "cpu", 2**20)
    dense = open_parent(tiny_parent("llama", tokenizer=False, hidden_size=128, **parent))
    data, heldout = tmp_path / "text.jsonl", 512
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 200, ((tokens + heldout) // 80,), generator=generator)
    with data.open("w") as file:
        for n in lengths.tolist():
            ids = torch.randint(3, 120, (n,), generator=generator)
            file.write(json.dumps({"input_ids": ids.tolist()}) + "\n")
    settings = CalibrateConfig(str(data), tokens=tokens, heldout_tokens=heldout, context_length=128)
    calibrate(dense, settings, tmp_path / "calibration")
    recipe = Recipe(upcycle=UpcycleConfig(**{"num_blocks": 9, "d_thin": 64} | options))
    with LiveBytes() as live:
        upcycle(dense, tmp_path / "calibration", recipe, tmp_path / "out")
    config = mol_config(dense, recipe.upcycle)
    found = conversion_memory(config, tokens, heldout, "cpu")
    assert found == pytest.approx(live.peak, rel=0.2)
