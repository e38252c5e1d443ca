"""Fixtures that several areas share: tiny random parents with a tiny tokenizer."""

import itertools
import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.forked import Forked

if not torch.cuda.is_available():  # before anything imports Triton: its kernels run interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # tiny models gain nothing from more, and xdist's workers share the cores

# A busy machine makes no test wrong.
hypothesis.settings.register_profile("molcli", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("molcli")

TINY_CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
# What makes each family take the path that its tests are about.
FAMILY_CONFIG: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},  # wider heads than hidden_size / num_attention_heads
    "phi3": {},
    # Layer 0 is local, with its own rotary base; the attention scale is not the head's.
    "gemma3_text": {
        "tie_word_embeddings": True,
        "head_dim": 32,
        "query_pre_attn_scalar": 20,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    },
    "olmo2": {},
}
IMPLIED_HEAD_DIM = {"qwen2", "phi3", "olmo2"}  # whose configs have no such field
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0],
        "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
    },
}
HALF_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
# One of each kind of parent that MoL reproduces exactly.
PARENT_CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "tie_word_embeddings": False}),
    ("llama", {"rope_parameters": LLAMA3_ROPE}),
    ("llama", {"sharded": True}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen2", {"sharded": True}),
    ("qwen3", {}),  # heads of 32, 4 of them at width 64
    ("qwen3", {"head_dim": 8, "attention_bias": True}),  # heads narrower than the width
    ("phi3", {}),
    ("phi3", {"sharded": True}),
    ("phi3", LONGROPE),
    ("phi3", {"rope_parameters": HALF_ROPE}),
    ("gemma3_text", {}),
    ("gemma3_text", {"attention_bias": True, "tie_word_embeddings": False}),
    ("olmo2", {}),
    ("olmo2", {"attention_bias": True, "sharded": True}),
]
TOKENIZER_TEXT = (
    "the quick brown fox jumps over the lazy dog while the slow brown bear sleeps",
    "a layer of thin blocks sees what the router sends, and nothing else 0123456789.",
)


class MakeParent(Protocol):
    def __call__(
        self,
        family: str,
        *,
        sharded: bool = False,
        tokenizer: bool = True,
        dtype: torch.dtype = torch.float32,
        **config: Any,
    ) -> Path: ...


def tiny_tokenizer(vocab_size: int = 120) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of at most `vocab_size` tokens; ids 0 to 2 are <unk>, <s>, </s>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(TOKENIZER_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", name="tiny_tokenizer")
def tiny_tokenizer_fixture() -> Callable[..., PreTrainedTokenizerFast]:
    """`tiny_tokenizer`, for test modules: they cannot import one another."""
    return tiny_tokenizer


@pytest.fixture(scope="session")
def forked() -> Iterator[Forked]:
    """A process that runs `molcli` commands in its forks."""
    with Forked() as process:
        yield process


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Gives every parameter, norms and biases too, values that a mix-up would show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            base = 1.0 if "norm" in name else 0.0
            parameter.copy_(base + noise * (0.2 if parameter.ndim == 1 else 0.08))


@pytest.fixture
def tiny_parent(tmp_path: Path) -> MakeParent:
    """Makes a random parent of a family in a fresh folder, as save_pretrained writes it.

    Hidden width 64, 2 layers, 4 query heads on 2 KV heads, vocabulary 128. Keywords other than
    the named ones override its config.
    """
    numbers = itertools.count()

    def make(
        family: str,
        *,
        sharded: bool = False,
        tokenizer: bool = True,
        dtype: torch.dtype = torch.float32,
        **config: Any,
    ) -> Path:
        folder = tmp_path / f"{family}-{next(numbers)}"
        # A copy: Phi-3's config writes into the rope_parameters that it is given.
        settings = deepcopy(TINY_CONFIG | FAMILY_CONFIG[family] | config)
        if family in IMPLIED_HEAD_DIM:
            del settings["head_dim"]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
        randomize(model)
        model.to(dtype).save_pretrained(folder, max_shard_size="60KB" if sharded else "1GB")
        if tokenizer:
            tiny_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture(params=PARENT_CASES, ids=lambda case: "-".join([case[0], *case[1]]))
def any_parent(request: pytest.FixtureRequest, tiny_parent: MakeParent) -> Path:
    """A tiny parent of every kind that can be converted, one test each."""
    family, config = request.param
    return tiny_parent(family, **config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
