"""Parameter counts of a Mixture of Layers model, from the numbers of its configuration."""

from dataclasses import dataclass

from molcli.model.configuration_mol import BlockSpec, MoLConfig
from molcli.model.mixers import MIXERS


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters.

    Attributes:
        total: all trainable parameters.
        active: parameters that the forward pass of a token uses, with the whole embedding.
        embedding: the embedding and an untied LM head; part of both counts.
    """

    total: int
    active: int
    embedding: int

    @property
    def non_embedding(self) -> int:
        """Part of `total` outside the embedding and LM head."""
        return self.total - self.embedding


def count_parameters(config: MoLConfig) -> ParameterCount:
    """Count a model's parameters. Buffers, such as the router's correction bias, are left out."""
    embedding = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    total = active = embedding + config.hidden_size  # and the final norm
    for i, mixer in enumerate(config.layer_mixers):
        if config.layer_structures[i] != "mixture":
            spec = config.always_spec(i)
            layer = 0 if spec is None else _block(spec, config)
            total, active = total + layer, active + layer
            if config.has_slices and config.is_routed(i):
                router = config.num_routed_blocks * config.hidden_size
                one = _neurons(config.slices_spec(), config)
                total += router + config.num_routed_blocks * one
                active += router + config.num_blocks_per_tok * one
            continue
        shared = config.num_shared_blocks * _thin_block(config.shared_spec(), config)
        router = config.num_routed_blocks * config.hidden_size
        routed = _thin_block(config.routed_spec(mixer), config)
        run = config.num_blocks_per_tok if config.restrict_attention else config.num_routed_blocks
        total += shared + router + config.num_routed_blocks * routed
        active += shared + router + run * routed
    return ParameterCount(total, active, embedding)


def _thin_block(spec: BlockSpec, config: MoLConfig) -> int:
    return 2 * config.hidden_size * spec.width + _block(spec, config)  # thin_in and thin_out


def _block(spec: BlockSpec, config: MoLConfig) -> int:
    norms = 2 * spec.width * (config.pre_norms + spec.output_norms)
    mixer = MIXERS[spec.mixer].count_parameters(spec, config)
    return mixer + _neurons(spec, config) + norms


def _neurons(spec: BlockSpec, config: MoLConfig) -> int:
    return (3 if config.mlp_gated else 2) * spec.width * spec.d_ff
