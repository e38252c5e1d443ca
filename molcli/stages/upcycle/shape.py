"""What a conversion's shape means for its blocks."""

from molcli.config.sections import UpcycleConfig
from molcli.io.parent import Parent
from molcli.maths.architecture import routed_shape, shared_shape
from molcli.maths.partition import Part, partition
from molcli.model.configuration_mol import MoLConfig
from molcli.model.conversion import converted_config


def mol_config(parent: Parent, config: UpcycleConfig) -> MoLConfig:
    """`converted_config` of a parent. Raises MolError where the recipe does not fit it."""
    return converted_config(parent.mol_config_kwargs(), config)


def parts(config: MoLConfig) -> list[Part]:
    """The shares of a dense layer: one per shared block, then one per routed family."""
    shapes = [shared_shape(config)] * config.num_shared_blocks
    shapes += [routed_shape(config)] * config.num_blocks_per_tok
    return partition(
        [(shape.num_heads, shape.d_ff) for shape in shapes],
        parent_heads=config.num_attention_heads,
        parent_kv_heads=config.num_key_value_heads,
        parent_d_ff=config.intermediate_size,
    )


def is_whole(config: MoLConfig) -> bool:
    """Whether the one block is the parent's layer: full width, all heads and neurons."""
    thin, dense = config.shared_spec(), config.dense_spec()
    return config.num_blocks == 1 and thin == dense


def is_copy(config: MoLConfig, options: UpcycleConfig) -> bool:
    """Whether the conversion copies the parent's layers as they are, and needs no text."""
    return is_whole(config) and options.method == "fitted"


def needs_text(config: MoLConfig, options: UpcycleConfig) -> bool:
    """Whether the conversion looks at text: to fit blocks, or to choose layers."""
    if all(kind == "dense" for kind in config.layer_kinds) or is_copy(config, options):
        return False
    choice = options.gated_deltanet == "auto" and config.num_routed_blocks > 0
    return choice or options.method in ("fitted", "pca")
