"""Init: write an untrained Mixture of Layers checkpoint from a recipe's section `model`."""

from pathlib import Path

import torch

from molcli.config.recipe import RECIPE_FILE, save_recipe
from molcli.config.sections import ModelConfig, Recipe
from molcli.files.folders import output_folder
from molcli.model.configuration_mol import MoLConfig
from molcli.model.modeling_mol import MoLForCausalLM


def untrained_config(model: ModelConfig) -> MoLConfig:
    """Return the configuration of a recipe's section `model`; all layers are Mixture of Layers."""
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
        MolError: `out` exists, or the disk is too small.
    """
    config = untrained_config(recipe.model)
    torch.manual_seed(recipe.model.seed)
    model = MoLForCausalLM(config)
    with output_folder(out, need_bytes=4 * model.num_parameters()) as staging:
        model.save_pretrained(staging)
        save_recipe(recipe, staging / RECIPE_FILE)
