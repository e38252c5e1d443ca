"""The quality of fitted blocks, and the receipt's figures of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from molcli.config.sections import CalibrateConfig, EvaluateConfig, Recipe, UpcycleConfig
from molcli.families.parent import open_parent
from molcli.stages.calibrate import calibrate
from molcli.stages.evaluate import evaluate
from molcli.stages.upcycle import upcycle


@torch.no_grad()
def heldout_losses(converted: Any, model: nn.Module) -> dict[str, float]:
    """Computed directly, one document of the held-out rows at a time."""
    parent, sums, count = converted.parent_model(), torch.zeros(3, dtype=torch.float64), 0
    for ids in converted.documents("heldout"):
        log_q, log_p = (m(ids).logits[0, :-1].double().log_softmax(-1) for m in (model, parent))
        label = ids[0, 1:, None]
        kl = (log_p.exp() * (log_p - log_q)).sum()
        sums += torch.stack([-log_p.gather(1, label).sum(), -log_q.gather(1, label).sum(), kl])
        count += label.numel()
    parent_ce, ce, kl_mean = (sums / count).tolist()
    return {"tokens": count, "parent_ce": parent_ce, "ce": ce, "kl": kl_mean}


@pytest.mark.parametrize(
    "family, config",
    [
        ("llama", {"attention_bias": True}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma3_text", {}),  # windows of 16 tokens in rows of 32
        ("olmo2", {}),
    ],
)
@pytest.mark.parametrize("mixer", ["none", "all"])
def test_the_checkpoint_has_the_losses_of_the_receipt(
    family: str,
    config: dict[str, Any],
    mixer: str,
    tiny_parent: Callable[..., Path],
    convert: Callable[..., Any],
) -> None:
    """Through AutoModelForCausalLM and the parent's own implementation."""
    converted = convert(tiny_parent(family, **config), gated_deltanet=mixer)
    model = converted.model()
    assert heldout_losses(converted, model) == pytest.approx(converted.receipt["heldout"], rel=1e-3)
    prompt = torch.tensor([[5, 6, 7, 8]])
    assert model.generate(prompt, max_new_tokens=5, min_new_tokens=5).shape == (1, 9)


def test_the_receipt_agrees_with_molcli_eval(
    tmp_path: Path, tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    converted = convert(tiny_parent("llama"))
    lines = [json.dumps({"input_ids": ids[0].tolist()}) for ids in converted.documents("heldout")]
    data = tmp_path / "heldout.jsonl"
    data.write_text("\n".join(lines) + "\n")
    config = EvaluateConfig(context_length=32)
    found = evaluate(converted.folder, open_parent(converted.parent), str(data), config)
    receipt = converted.receipt
    expected = receipt["heldout"] | {
        "params_total": receipt["parameters"]["total"],
        "params_active": receipt["parameters"]["active"],
    }
    assert {name: found.to_json()[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_fitted_blocks_are_better_than_none_and_than_shuffled_ones(
    tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    """On held-out text, compared with skipped layers and with shuffled weights."""
    converted = convert(tiny_parent("llama"), tokens=3072)
    skipped, shuffled = converted.model(), converted.model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in skipped.named_parameters():
            if name.endswith("thin_out"):
                parameter.zero_()
        for name, parameter in shuffled.named_parameters():
            if ".block." in name or ".thin_" in name:
                order = torch.randperm(parameter.numel(), generator=generator)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
    fitted = converted.receipt["heldout"]["kl"]
    assert fitted < 0.6 * heldout_losses(converted, skipped)["kl"]
    assert fitted < 0.6 * heldout_losses(converted, shuffled)["kl"]


def test_blocks_that_saw_no_token_are_finite(
    tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    """More clones than the text has distinct tokens, each fitted on its own tokens alone."""
    options = {"num_blocks": 161, "top_k": 1, "d_thin": 16, "shrinkage": 0.0}
    converted = convert(tiny_parent("llama", num_hidden_layers=1), **options)
    assert all(tensor.isfinite().all() for tensor in converted.tensors.values())
    assert converted.receipt["layers"][0]["residual_error"] < 1


def test_wider_blocks_leave_less_error(
    tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    parent = tiny_parent("llama")
    errors = [
        [layer["residual_error_fit"] for layer in convert(parent, d_thin=d).receipt["layers"]]
        for d in (16, 32, 48, 64)
    ]
    for wider, narrower in zip(errors[1:], errors[:-1], strict=True):
        assert all(a < b for a, b in zip(wider, narrower, strict=True))
    assert max(errors[-1]) < 0.02  # all heads and neurons, three times over


@pytest.mark.parametrize(
    "family, blocks",
    [
        ("llama", (1, 1, 0)),
        ("qwen2", (1, 1, 0)),  # biases of q, k and v
        ("qwen3", (1, 1, 0)),  # norms of q and k, as the parent has them
        ("llama", (2, 0, 2)),  # two groups with weight 1/4 each; the second has no error left
    ],
)
def test_a_layer_that_one_thin_block_can_express_is_fitted_exactly(
    family: str,
    blocks: tuple[int, int, int],
    tmp_path: Path,
    tiny_parent: Callable[..., Path],
) -> None:
    """All steps from moments to refits, on a parent for which an exact solution exists.

    Its residual lives in 32 of 64 dimensions: embeddings lie in a subspace which everything reads
    and writes, so that the thin stream is a rotation of the residual and has its norm. The second
    half of the heads and of the neurons writes nothing.
    """
    width, thin = 64, 32
    config = {"vocab_size": width, "num_hidden_layers": 1, "tie_word_embeddings": False}
    folder = tiny_parent(family, tokenizer=False, **config)
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, thin, generator=generator)).Q
    subspace = basis @ basis.T
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.randn(width, width, generator=generator) @ subspace
    for name, weight in tensors.items():
        if name.endswith("layernorm.weight"):
            weight.fill_(1.0)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = subspace @ weight
            tensors[name][:, weight.shape[1] // 2 :] = 0
        elif name.endswith("_proj.weight"):
            tensors[name] = weight @ subspace
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    rows: list[Tensor] = [torch.randperm(width, generator=generator) for _ in range(40)]
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in rows))
    settings = CalibrateConfig(str(data), tokens=36 * 64, heldout_tokens=4 * 64, context_length=64)
    parent = open_parent(folder)
    calibrate(parent, settings, tmp_path / "calibration")
    names = ("num_blocks", "num_shared_blocks", "top_k")[: len(blocks)]
    options = UpcycleConfig(
        **dict(zip(names, blocks, strict=True)),
        d_thin=thin,
        ridge=1e-9,
    )
    upcycle(parent, tmp_path / "calibration", Recipe(upcycle=options), tmp_path / "out")

    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert receipt["layers"][0]["delta_error"] < 1e-6
    assert receipt["heldout"]["kl"] < 1e-6
