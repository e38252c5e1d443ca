"""Tiny Mixture of Layers checkpoints and tiny corpora."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from molcli.model import MoLConfig, MoLForCausalLM

VOCAB = 128  # that of the tiny parents


@pytest.fixture
def tiny_mol(tmp_path: Path) -> Callable[..., Path]:
    """Makes a random MoL checkpoint: a dense, a softmax and a Gated DeltaNet layer, 1+2of5."""

    def make(name: str = "mol", dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
        torch.manual_seed(0)
        config = MoLConfig(
            **{
                "vocab_size": VOCAB,
                "hidden_size": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "head_dim": 8,
                "intermediate_size": 48,
                "layer_structures": ["dense", "mixture", "mixture"],
                "layer_mixers": ["attention", "attention", "gated_deltanet"],
                "num_blocks": 5,
                "num_shared_blocks": 1,
                "num_blocks_per_tok": 2,
                "d_thin": 16,
                "d_ff_thin": 24,
                "attention_bias": True,
                "bos_token_id": 1,
                "eos_token_id": 2,
            }
            | settings
        )
        model = MoLForCausalLM(config)
        if dtype != torch.float32:
            model.to(dtype)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[..., str]:
    """Writes documents of counting tokens, which a model learns to continue within a few steps."""

    def write(name: str = "corpus.jsonl", documents: int = 40, size: int = 25) -> str:
        generator = torch.Generator().manual_seed(documents)
        lines = []
        for start in torch.randint(3, 40, (documents,), generator=generator).tolist():
            ids = [1, *((start + i) % 40 + 3 for i in range(size - 1))]
            lines.append(json.dumps({"input_ids": ids}))
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return str(tmp_path / name)

    return write
