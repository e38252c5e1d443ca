"""Exact parts match real tensors; activations are near those that autograd saves."""

from typing import Any

import pytest
import torch

from molcli.estimate.memory import training_memory
from molcli.estimate.parameters import count_parameters
from molcli.model import MoLConfig, MoLForCausalLM


def config(kind: str, **settings: Any) -> MoLConfig:
    """Three layers of a kind, 1+2of9, a third of the width each."""
    shape: dict[str, Any] = dict(
        vocab_size=256,
        hidden_size=192,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=512,
        layer_structures=["dense" if kind == "dense" else "mixture"] * 3,
        layer_mixers=["gated_deltanet" if kind == "gated_deltanet" else "attention"] * 3,
        num_blocks=9,
        num_shared_blocks=1,
        num_blocks_per_tok=2,
        d_thin=64,
        d_ff_thin=170,
    )
    return MoLConfig(**(shape | settings))


def memory(c: MoLConfig, **settings: Any) -> Any:
    usual: dict[str, Any] = dict(
        trainable=0, tokens=256, product_bytes=4, parent=None, logits_per_chunk=2**20
    )
    return training_memory(c, **(usual | settings))


@pytest.mark.parametrize("kind", ["dense", "softmax", "gated_deltanet"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_gradients_and_moments_match_torch(kind: str, tied: bool) -> None:
    c = config(kind, tie_word_embeddings=tied, num_hidden_layers=2, layer_kinds=["dense", kind])
    model = MoLForCausalLM(c)
    for parameter in model.model.embed_tokens.parameters():
        parameter.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    estimate = memory(c, trainable=sum(p.numel() for p in trained))

    rotary = model.model.rotary_emb
    buffers = [b for b in model.buffers() if all(b is not own for own in rotary.buffers())]
    assert estimate.weights == sum(t.nbytes for t in [*model.parameters(), *buffers])
    assert estimate.gradients == sum(p.grad.nbytes for p in trained if p.grad is not None)
    moments = [state[name] for state in optimizer.state.values() for name in state]
    assert estimate.optimizer == sum(t.nbytes for t in moments if t.ndim)


def test_the_parent_has_the_dtype_of_products() -> None:
    dense = config("dense")
    assert memory(config("softmax")).parent == 0
    held = memory(config("softmax"), parent=dense, product_bytes=2).parent
    assert held == 2 * count_parameters(dense).total


def kept(c: MoLConfig, *, bf16: bool, recompute: bool = False) -> int:
    """Bytes of all that the forward pass of 256 tokens leaves for the backward pass."""
    torch.manual_seed(0)
    model = MoLForCausalLM(c).train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        out = model.model(input_ids=torch.randint(256, (2, 128)), use_cache=False)
    assert out.last_hidden_state is not None
    return sum(found.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "kind, shared, tolerance",
    [
        ("dense", {}, 0.15),
        ("softmax", {}, 0.15),
        ("softmax", {"d_thin_shared": 128, "d_ff_thin_shared": 340}, 0.15),
        # Its reference on a CPU keeps matrices of a chunk that the kernels on a GPU do not.
        ("gated_deltanet", {}, 0.35),
    ],
)
def test_activations_are_near_those_that_autograd_saves(
    kind: str, shared: dict[str, int], tolerance: float, bf16: bool
) -> None:
    c = config(kind, **shared)
    estimate = memory(c, product_bytes=2 if bf16 else 4).activations
    assert estimate == pytest.approx(kept(c, bf16=bf16), rel=tolerance)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "gated_deltanet"])
def test_activations_grow_with_the_shared_block_alone(kind: str, compiled: bool) -> None:
    """Activations grow linearly with the shared block's width. A shared block whose shape is given
    explicitly, and is that of the routed blocks, changes nothing."""
    c = config(kind)
    usual = memory(c, compiled=compiled)
    own = dict(d_thin_shared=64, d_ff_thin_shared=170, num_heads_shared=2)
    assert memory(config(kind, **own), compiled=compiled) == usual
    wide = memory(config(kind, d_thin_shared=128), compiled=compiled).activations
    wider = memory(config(kind, d_thin_shared=192), compiled=compiled).activations
    assert wider - wide == wide - usual.activations > 0


def test_recomputation_and_layerwise_training_need_less_memory() -> None:
    c = config(
        "softmax",
        num_hidden_layers=12,
        layer_structures=["mixture"] * 12,
        layer_mixers=["attention"] * 12,
    )
    whole, again, alone = (
        memory(c, tokens=4096, **setting)
        for setting in ({}, {"recompute": True}, {"layerwise": True})
    )
    assert again.activations < whole.activations / 3
    assert alone.activations < whole.activations / 3
    assert alone.logits == 0 < whole.logits
    assert whole.total == sum(
        (
            whole.weights,
            whole.gradients,
            whole.optimizer,
            whole.activations,
            whole.parent,
            whole.logits,
        )
    )


def test_ranks_shard_all_but_gathered_layers() -> None:
    """In addition to its shard, each of four ranks holds two layers of 24 and the embedding."""
    c = config(
        "softmax",
        num_hidden_layers=24,
        layer_structures=["mixture"] * 24,
        layer_mixers=["attention"] * 24,
    )
    total = count_parameters(c).total
    alone, shared = (memory(c, trainable=total, ranks=ranks) for ranks in (1, 4))
    assert shared.optimizer == pytest.approx(alone.optimizer / 4)
    embedding = c.vocab_size * c.hidden_size
    running = 4 * (embedding + 2 * (total - embedding) / 24)
    for kind in ("weights", "gradients"):
        assert getattr(shared, kind) == pytest.approx(4 * total / 4 + running, rel=0.01), kind
    assert shared.activations == alone.activations
    whole = memory(c, trainable=total, ranks=4, whole=True)
    for kind in ("weights", "gradients"):
        assert getattr(whole, kind) == pytest.approx(4 * (total / 4 + total), rel=0.01), kind
    assert whole.optimizer == shared.optimizer


SMOLLM2 = dict(
    vocab_size=49_152,
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    intermediate_size=1536,
)
OF_8 = dict(
    num_blocks=9,
    num_blocks_per_tok=2,
    d_thin=192,
    d_ff_thin=512,
    num_heads_thin=3,
    num_kv_heads_thin=1,
)
OF_15 = dict(
    vocab_size=50_257,
    hidden_size=2048,
    num_hidden_layers=24,
    num_attention_heads=32,
    head_dim=64,
    mlp_gated=False,
    num_blocks=15,
    num_blocks_per_tok=3,
    d_thin=512,
    d_ff_thin=2048,
    num_heads_thin=8,
    num_kv_heads_thin=8,
)


@pytest.mark.parametrize(
    "shape, kind, distilled, tokens, peak",
    [
        (SMOLLM2 | OF_8, "softmax", True, 32 * 512, 19.9e9),
        (SMOLLM2 | OF_8, "softmax", True, 64 * 512, 34.1e9),
        (OF_15, "gated_deltanet", False, 2 * 4096, 53.5 * 2**30),
        (OF_15, "gated_deltanet", False, 3 * 4096, 66.7 * 2**30),
    ],
)
def test_compiled_steps_are_near_measured_peaks_on_an_h100(
    shape: dict[str, Any], kind: str, distilled: bool, tokens: int, peak: float
) -> None:
    """Peaks: tests/bench/results, torch 2.11; those of OF_15 computed all logits together."""
    layers = shape["num_hidden_layers"]
    c = MoLConfig(
        **shape, num_shared_blocks=1, layer_kinds=[kind] * layers, tie_word_embeddings=True
    )
    parent = MoLConfig(
        **SMOLLM2,
        layer_structures=["dense"] * 30,
        layer_mixers=["attention"] * 30,
        tie_word_embeddings=True,
    )
    estimate = memory(
        c,
        trainable=count_parameters(c).total,
        tokens=tokens,
        product_bytes=2,
        parent=parent if distilled else None,
        logits_per_chunk=2**26 if distilled else tokens * c.vocab_size,
        compiled=True,
    )
    assert estimate.total == pytest.approx(peak, rel=0.15)
