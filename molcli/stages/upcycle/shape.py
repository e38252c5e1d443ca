"""What a conversion's shape means for its blocks."""

from molcli.config.sections import UpcycleConfig
from molcli.io.parent import Parent
from molcli.maths.partition import Part, partition
from molcli.model.configuration_mol import MoLConfig
from molcli.model.conversion import converted_config


def mol_config(parent: Parent, config: UpcycleConfig) -> MoLConfig:
    """`converted_config` of a parent. Raises MolError where the recipe does not fit it."""
    return converted_config(parent.mol_config_kwargs(), config)


def parts(config: MoLConfig) -> list[Part]:
    """The shares of a dense layer: one per shared block, then one per routed family."""
    return partition(
        config.num_shared_blocks + config.num_blocks_per_tok,
        heads=config.thin_num_attention_heads,
        d_ff=config.d_ff_thin,
        parent_heads=config.num_attention_heads,
        parent_kv_heads=config.num_key_value_heads,
        parent_d_ff=config.intermediate_size,
    )


def is_whole(config: MoLConfig) -> bool:
    """Whether the one block is the parent's layer: full width, all heads and neurons."""
    thin = config.d_thin, config.d_ff_thin, config.thin_num_attention_heads
    dense = config.hidden_size, config.intermediate_size, config.num_attention_heads
    return config.num_blocks == config.num_shared_blocks == 1 and thin == dense


def is_copy(config: MoLConfig, options: UpcycleConfig) -> bool:
    """Whether the conversion copies the parent's layers as they are, and needs no text."""
    return is_whole(config) and options.method == "fitted"


def needs_text(config: MoLConfig, options: UpcycleConfig) -> bool:
    """Whether the conversion looks at text: to fit blocks, or to choose layers."""
    if all(kind == "dense" for kind in config.layer_kinds) or is_copy(config, options):
        return False
    choice = options.gated_deltanet == "auto" and config.num_routed_blocks > 0
    return choice or options.method in ("fitted", "pca")
