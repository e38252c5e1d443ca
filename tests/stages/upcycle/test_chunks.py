"""A text in many chunks gives the same conversion as in one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from molcli.fitting import chunks


def in_chunks(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    """Split every text of 1024 tokens into `count` chunks. Returns the count of each text."""
    seen: list[int] = []
    real = chunks.chunk_text

    def counting(config: Any, rows: Any, device: torch.device) -> Any:
        chunk_bytes = 1024 // count * chunks.bytes_per_token(config)
        monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", chunk_bytes)
        found = real(config, rows, device)
        seen.append(len(list(found)))
        return found

    for place in ("molcli.stages.calibrate", "molcli.fitting.residuals"):
        monkeypatch.setattr(f"{place}.chunk_text", counting)
    return seen


def moments_of(calibration: Path) -> list[dict[str, Tensor]]:
    return [load_file(file) for file in sorted(calibration.glob("moments-*"))]


@pytest.mark.parametrize(
    "family, options",
    [
        ("qwen2", {"gated_deltanet": [1]}),  # biases; a mixer with searches and gates
        ("qwen3", {"shrinkage": 0.0, "num_blocks": 4, "num_shared_blocks": 2, "top_k": 1}),
        ("llama", {"method": "svd"}),
    ],
)
def test_chunks_change_only_the_last_digits(
    family: str,
    options: dict[str, Any],
    tiny_parent: Callable[..., Path],
    workshop: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the weights, of every layer's error, and of the model's losses."""
    parent = tiny_parent(family)
    one = in_chunks(monkeypatch, 1)
    whole = workshop.convert(parent, **options)
    assert set(one) == {1}
    before = moments_of(workshop.calibration(parent))
    workshop.calibrations.clear()
    workshop.folder = workshop.folder / "again"
    workshop.folder.mkdir()
    many = in_chunks(monkeypatch, 8)
    in_many = workshop.convert(parent, **options)
    assert set(many) == {8, 2}  # the text to fit on, and the 256 tokens held out
    torch.testing.assert_close(moments_of(in_many.calibration), before, rtol=1e-5, atol=1e-5)
    for name, tensor in in_many.tensors.items():
        expected = whole.tensors[name]
        assert (tensor - expected).norm() <= 1e-3 * expected.norm(), name
    assert in_many.receipt["heldout"] == pytest.approx(whole.receipt["heldout"], rel=1e-5)
    for row, wanted in zip(in_many.receipt["layers"], whole.receipt["layers"], strict=True):
        assert row["residual_error_fit"] == pytest.approx(wanted["residual_error_fit"], rel=1e-4)
        assert row["routing"]["load_share"] == pytest.approx(wanted["routing"]["load_share"])


@pytest.mark.parametrize("mixer", ["none", "all"])
def test_heads_that_are_kept_are_those_that_are_recomputed(
    mixer: str,
    tiny_parent: Callable[..., Path],
    workshop: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parent = tiny_parent("qwen3")
    in_chunks(monkeypatch, 4)
    found = []
    for most in (0.0, 1e9):
        monkeypatch.setattr("molcli.fitting.thin_blocks.MAX_KEPT_HEADS", most)
        found.append(workshop.convert(parent, gated_deltanet=mixer).tensors)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
