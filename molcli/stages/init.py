"""Init: write an untrained Mixture of Layers checkpoint from a recipe's section `model`."""

import os
from pathlib import Path

import torch
from transformers.activations import ACT2FN

from molcli.config.recipe import RECIPE_FILE, save_recipe
from molcli.config.sections import ModelConfig, Recipe
from molcli.errors import MolError
from molcli.estimate.parameters import count_parameters
from molcli.files.folders import output_folder
from molcli.files.json_files import shortened
from molcli.model.checkpoint import save_checkpoint
from molcli.model.configuration_mol import MoLConfig
from molcli.model.modeling_mol import MoLForCausalLM


def untrained_config(model: ModelConfig) -> MoLConfig:
    """Return the configuration of a recipe's section `model`; all layers are Mixture of Layers."""
    if model.hidden_act not in ACT2FN:
        raise MolError(
            f"`model.hidden_act` is {shortened(repr(model.hidden_act))}",
            allowed="an activation of transformers, such as gelu, silu or relu",
            hint="model.hidden_act=gelu",
        )
    return MoLConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.hidden_size // model.head_dim,
        head_dim=model.head_dim,
        intermediate_size=4 * model.hidden_size,
        hidden_act=model.hidden_act,
        mlp_gated=model.mlp_gated,
        attention_bias=model.attention_bias,
        attention_out_bias=model.attention_bias,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        max_position_embeddings=model.max_position_embeddings,
        layer_mixers=[model.layer_mixer] * model.num_hidden_layers,
        num_blocks=model.num_blocks,
        num_shared_blocks=model.num_shared_blocks,
        num_blocks_per_tok=model.top_k,
        d_thin=model.d_thin,
        d_ff_thin=model.d_ff_thin,
        restrict_attention=model.restrict_attention,
        tie_word_embeddings=model.tie_word_embeddings,
    )


def init(recipe: Recipe, out: Path) -> None:
    """Write the configuration, float32 weights drawn with model.seed, and the recipe.

    Raises:
        MolError: `out` exists, the disk or the memory is too small, or the activation is unknown.
    """
    config = untrained_config(recipe.model)
    size = _weight_bytes(config)
    check_memory(config)
    torch.manual_seed(recipe.model.seed)
    with output_folder(out, need_bytes=size) as staging:
        save_checkpoint(MoLForCausalLM(config), staging)
        save_recipe(recipe, staging / RECIPE_FILE)


def check_memory(config: MoLConfig) -> None:
    """Raise MolError if the machine has less memory than the weights need in float32."""
    size = _weight_bytes(config)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise MolError(
            f"the model needs {size / 1e9:,.1f} GB of memory, this machine has {memory / 1e9:,.1f}",
            allowed="a model that fits into memory",
            hint="smaller numbers in the section `model`, such as model.num_hidden_layers=4",
        )


def _weight_bytes(config: MoLConfig) -> int:
    return 4 * count_parameters(config).total
