"""The two models of a comparison: opened, or made with random weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedConfig

from molcli.model import MoLConfig, MoLForCausalLM
from molcli.model.checkpoint import open_checkpoint, open_config, stored_dtype
from molcli.model.precision import fast_dtype


@dataclass(frozen=True)
class BenchmarkPair:
    """A Mixture of Layers model and its dense peer.

    Attributes:
        config: configuration of the Mixture of Layers model.
        dense: configuration of the peer. Its weights are random, which takes the same time.
        checkpoint: folder of the model's weights; None for random weights.
        device: where both models run.
        dtype: precision of prefill and decoding.
    """

    config: MoLConfig
    dense: PreTrainedConfig
    checkpoint: Path | None
    device: torch.device
    dtype: torch.dtype

    @property
    def routings(self) -> tuple[str, ...]:
        """Kinds of routing to time, see `forced_routing`."""
        return ("even", "skewed") if self.checkpoint is None else ("as trained",)

    def mol(self, dtype: torch.dtype) -> MoLForCausalLM:
        """Make the Mixture of Layers model in `dtype`, except tensors that are stored in fp32."""
        if self.checkpoint is None:
            model = _random_model(lambda: MoLForCausalLM(self.config), self.device, dtype)
        else:
            model = open_checkpoint(self.checkpoint, self.device)
            model.generation_config = GenerationConfig()  # no end, no sampling, no penalties
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and "rotary" not in name:
                tensor.data = tensor.data.to(stored_dtype(name, dtype))
        return model

    def peer(self, dtype: torch.dtype) -> Any:
        """Make the dense model in `dtype`, with random weights."""
        return _random_model(
            lambda: AutoModelForCausalLM.from_config(
                self.dense, attn_implementation="sdpa", trust_remote_code=False
            ),
            self.device,
            dtype,
        )

    def random_tokens(self, batch: int, length: int) -> Tensor:
        """Draw (batch, length) int64 token ids that are in both vocabularies."""
        vocabulary = min(self.config.vocab_size, self.dense.vocab_size)
        return torch.randint(vocabulary, (batch, length), device=self.device)


def open_benchmark_pair(
    config: MoLConfig | None,
    checkpoint: Path | None,
    dense: PreTrainedConfig | None,
    device: torch.device,
) -> BenchmarkPair:
    """Choose the two models of a comparison.

    Args:
        config: of an untrained model, where there is no checkpoint.
        checkpoint: folder of a Mixture of Layers model.
        dense: configuration of the parent; None for a Llama of the model's width and depth.
        device: where both models run.

    Raises:
        MolError: the checkpoint is no Mixture of Layers model.
    """
    if config is None:
        assert checkpoint is not None
        config = open_config(checkpoint)
    peer = dense or equivalent_llama(config)
    return BenchmarkPair(config, peer, checkpoint, device, fast_dtype(device))


def equivalent_llama(config: MoLConfig) -> LlamaConfig:
    """Return a dense Llama of the model's width and depth.

    Llama's FFN is gated, with three matrices. Where the model's FFN has two, the Llama's d_ff gives
    as many weights, rounded up to a multiple of 128.
    """
    d_ff = config.intermediate_size
    if not config.mlp_gated:
        d_ff = -(-2 * d_ff // (3 * 128)) * 128
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=d_ff,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def _random_model(make: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Any:
    """Make a model whose weights are drawn on `device` in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = make()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    return model.eval()
