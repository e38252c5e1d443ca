"""Count floating-point operations of a forward pass and of training, from a configuration."""

from dataclasses import dataclass
from typing import Literal

from molcli.model.configuration_mol import BlockSpec, MoLConfig
from molcli.model.mixers import MIXERS


@dataclass(frozen=True)
class Flops:
    """Operations of a forward pass, per token.

    Attributes:
        total: if every block ran on every token.
        active: with the blocks that run on a token.
    """

    total: int
    active: int


@dataclass(frozen=True)
class _Cost:
    """Operations per token: matrix products with weights; and token mixing, without weights."""

    products: float
    mixing: float

    @property
    def all(self) -> float:
        return self.products + self.mixing

    def __add__(self, other: "_Cost") -> "_Cost":
        return _Cost(self.products + other.products, self.mixing + other.mixing)

    def __mul__(self, times: float) -> "_Cost":
        return _Cost(self.products * times, self.mixing * times)


def count_flops(config: MoLConfig, context_length: int) -> Flops:
    """Count the operations of a forward pass: mean over the tokens of one document, even routing.

    A multiply-add counts as two operations. Linear maps, the LM head and convolutions take 2 per
    weight. Softmax attention takes 4 * head_dim per head and key, where a token sees (T + 1) / 2
    keys on average; in a routed block, only the block's own tokens count. Gated DeltaNet takes
    7 * head_dim^2 per head. The embedding is a look-up. Norms, activations, biases, rotary
    positions and softmaxes are left out.

    Args:
        config: the model.
        context_length: tokens of the document, T.
    """
    total = active = float(_head(config))
    for i in range(config.num_hidden_layers):
        every, few = _layer(config, i, context_length)
        total, active = total + every.all, active + few.all
    return Flops(round(total), round(active))


def training_flops(
    config: MoLConfig,
    context_length: int,
    *,
    parent: MoLConfig | None,
    trainable: Literal["all", "mol"] = "all",
    layerwise: bool = False,
    recompute: bool = False,
) -> int:
    """Count the operations of training on one token, with active blocks only.

    A weight takes 2 operations forward and 4 backward, for the gradients of its input and of
    itself. With trainable = "mol", a frozen weight takes 4 above the first Mixture of Layers layer,
    for the gradient of its input only, and 2 below it, where the backward pass has ended.

    Args:
        config: the model that is trained.
        context_length: tokens of a document.
        parent: adds the forward pass of this model.
        trainable: "mol" freezes all but Mixture of Layers layers.
        layerwise: Mixture of Layers layers run one by one on the parent's residuals; neither LM
            heads nor the student's dense layers run.
        recompute: gradient checkpointing: one more forward pass through the layers that the
            backward pass reaches.
    """
    dense = [i not in config.converted_layers for i in range(config.num_hidden_layers)]
    trained = [trainable == "all" or not frozen for frozen in dense]
    flops = 0.0
    for i in range(config.num_hidden_layers):
        cost = _layer(config, i, context_length)[1]
        if layerwise and dense[i]:
            continue
        if trained[i]:
            flops += 3 * cost.all
        elif any(trained[:i]):
            flops += 2 * cost.products + 3 * cost.mixing
        else:
            flops += cost.all
        if recompute and any(trained[: i + 1]):
            flops += cost.all
    if not layerwise:
        flops += (3 if trainable == "all" else 2) * _head(config)
    if parent is not None:
        flops += count_flops(parent, context_length).active - (_head(parent) if layerwise else 0)
    return round(flops)


def _head(config: MoLConfig) -> int:
    return 2 * config.vocab_size * config.hidden_size


def _layer(config: MoLConfig, index: int, context_length: int) -> tuple[_Cost, _Cost]:
    """Cost of a layer if every block ran, and with its active blocks."""
    if config.layer_structures[index] != "mixture":
        spec = config.always_spec(index)
        layer = _Cost(0, 0) if spec is None else _block(spec, config, context_length)
        if not (config.has_slices and config.is_routed(index)):
            return layer, layer
        layer += _Cost(2.0 * config.hidden_size * config.num_routed_blocks, 0)  # the router
        slices = config.slices_spec()
        one = _Cost(2.0 * _neurons(slices, config), 0)
        return layer + one * slices.num_blocks, layer + one * config.num_blocks_per_tok
    routed_blocks, top_k = config.num_routed_blocks, config.num_blocks_per_tok
    always = _Cost(2.0 * config.hidden_size * routed_blocks, 0)  # the router
    if config.num_shared_blocks:
        shared = config.shared_spec()
        always += _thin(shared, config, context_length) * shared.num_blocks
    if not routed_blocks:
        return always, always
    spec = config.routed_spec(config.layer_mixers[index])
    everywhere = always + _thin(spec, config, context_length) * routed_blocks
    if not config.restrict_attention:
        return everywhere, everywhere
    own = max(1.0, context_length * top_k / routed_blocks)
    return everywhere, always + _thin(spec, config, own) * top_k


def _thin(spec: BlockSpec, config: MoLConfig, tokens: float) -> _Cost:
    """Cost of a thin block with thin_in and thin_out, for one of the `tokens` that it sees."""
    return _Cost(4.0 * config.hidden_size * spec.width, 0) + _block(spec, config, tokens)


def _block(spec: BlockSpec, config: MoLConfig, tokens: float) -> _Cost:
    products, mixing = MIXERS[spec.mixer].count_flops(spec, tokens)
    return _Cost(products + 2.0 * _neurons(spec, config), mixing)


def _neurons(spec: BlockSpec, config: MoLConfig) -> int:
    """Weights of a feed-forward network."""
    return (3 if config.mlp_gated else 2) * spec.width * spec.d_ff
