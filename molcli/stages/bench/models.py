"""The two models of a comparison: made with random weights, or opened."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedConfig

from molcli.model import MoLConfig, MoLForCausalLM
from molcli.model.checkpoint import open_checkpoint, open_config, stored_dtype
from molcli.model.precision import fast_dtype
from molcli.model.routing.balance import bias_step, block_counts
from molcli.model.routing.router import Router

# Logits of an untrained router are normal with a spread of 0.02 sqrt(d_model), about 1; biases from
# -SKEW to SKEW make the first block the busiest and the last one the least busy.
SKEW = 0.5


@dataclass(frozen=True)
class BenchmarkPair:
    """checkpoint: None for random weights. dense: the peer's configuration; its weights are random,
    which costs the same. routings: the kinds of routing to time, see `routed`.
    """

    config: MoLConfig
    dense: PreTrainedConfig
    checkpoint: Path | None
    device: torch.device
    dtype: torch.dtype

    @property
    def routings(self) -> tuple[str, ...]:
        return ("even", "skewed") if self.checkpoint is None else ("as trained",)

    def mol(self, dtype: torch.dtype) -> MoLForCausalLM:
        """In `dtype`, but for what is stored in fp32."""
        if self.checkpoint is None:
            model = _random(lambda: MoLForCausalLM(self.config), self.device, dtype)
        else:
            model = open_checkpoint(self.checkpoint, self.device)
            model.generation_config = GenerationConfig()  # no end, no sampling, no penalties
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and "rotary" not in name:
                tensor.data = tensor.data.to(stored_dtype(name, dtype))
        return model

    def peer(self, dtype: torch.dtype) -> Any:
        return _random(
            lambda: AutoModelForCausalLM.from_config(self.dense, attn_implementation="sdpa"),
            self.device,
            dtype,
        )


def open_benchmark_pair(
    config: MoLConfig | None,
    checkpoint: Path | None,
    dense: PreTrainedConfig | None,
    device: torch.device,
) -> BenchmarkPair:
    """config: of an untrained model, where there is no checkpoint. dense: of the parent, or None
    for the Llama whose layers are as wide as the model's.

    Raises MolError if the checkpoint is no Mixture of Layers model.
    """
    if config is None:
        assert checkpoint is not None
        config = open_config(checkpoint)
    return BenchmarkPair(config, dense or like(config), checkpoint, device, fast_dtype(device))


def like(config: MoLConfig) -> LlamaConfig:
    """A dense Llama of the model's width and depth; where the model's FFN has two matrices and not
    three, the gated FFN with as many weights, in multiples of 128."""
    hidden = config.intermediate_size
    if not config.mlp_gated:
        hidden = -(-2 * hidden // (3 * 128)) * 128
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=hidden,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def _random(make: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A model whose weights are drawn where they stay."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = make()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    return model.eval()


@contextmanager
def routed(model: Any, kind: str, ids: Tensor) -> Iterator[None]:
    """kind: "even" sets the routers' correction biases so that blocks see about as many of these
    tokens each, "skewed" adds a ramp to that; others leave them alone, as does a dense model.

    Untrained residuals of a sequence all point much the same way, so that untrained routers leave
    blocks empty, in every sequence others: biases for one do not even out the next.
    """
    routers = [m for m in model.modules() if isinstance(m, Router)]
    saved = [router.correction_bias.clone() for router in routers]
    if routers and kind in ("even", "skewed"):
        _even_out(model, routers, ids)
    if kind == "skewed":
        for router in routers:
            ramp = torch.linspace(SKEW, -SKEW, len(router.correction_bias))
            router.correction_bias += ramp.to(router.correction_bias)
    try:
        yield
    finally:
        for router, bias in zip(routers, saved, strict=True):
            router.correction_bias.copy_(bias)


@torch.no_grad()
def _even_out(model: MoLForCausalLM, routers: list[Router], ids: Tensor) -> None:
    """In one pass: each router reads what the layers before it make of their new biases."""

    def even(router: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(router, Router)
        logits = router.forward(*args).logits
        router.correction_bias.copy_(evening_bias(logits, router.top_k))

    hooks = [router.register_forward_pre_hook(even) for router in routers]
    with torch.compiler.set_stance("force_eager"):  # compiled layers do not look for hooks
        model.model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()


def evening_bias(logits: Tensor, top_k: int) -> Tensor:
    """What makes every block one of the top_k of about as many tokens: (R,), like the logits
    (n, R), by loss-free balancing with a rate that falls."""
    bias, count = torch.zeros_like(logits[0]), logits.shape[1]
    for rate in torch.logspace(0, -3, 150).tolist():
        blocks = (logits + bias).topk(top_k).indices
        bias += bias_step(block_counts(blocks, count), rate * logits.std().item())
    return bias


@torch.no_grad()
def load(model: MoLForCausalLM, ids: Tensor) -> tuple[float, float]:
    """The busiest and the least busy block's tokens as a share of an even share, over layers."""
    routing = model.model(ids, use_cache=False).routing
    if not routing:
        return 1.0, 1.0
    counts = torch.stack(
        [r.blocks.flatten().bincount(minlength=r.logits.shape[1]) for r in routing]
    )
    even = counts.float() / counts.float().mean(1, keepdim=True)
    return even.max().item(), even.min().item()
