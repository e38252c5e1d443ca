"""Floating-point operations of a forward pass and of training, from a configuration's numbers."""

from dataclasses import dataclass

from molcli.maths.parameters import CONV_WIDTH
from molcli.model.configuration_mol import BlockSpec, MoLConfig

# A step of the gated delta rule, per entry of its state: decay 1, read at the key 2, rank-one
# update 2, read at the query 2.
DELTA_RULE = 7


@dataclass(frozen=True)
class Flops:
    """Operations a token. active: of the blocks that run on it. total: if every block did."""

    total: int
    active: int


def count_flops(config: MoLConfig, context_length: int) -> Flops:
    """Means over the tokens of one document of context_length tokens, T, under even routing.

    A multiply-add counts as two. Linear maps, the LM head and convolutions take 2 a weight; softmax
    attention 4 * head_dim a head and key, where a token sees (T + 1) / 2 keys on average, and in a
    routed block only the block's own; Gated DeltaNet 7 * head_dim^2 a head. The embedding is a
    look-up; norms, activations, biases, rotary positions and softmaxes are left out.
    """
    total = active = float(_head(config))
    routed_blocks, top_k = config.num_routed_blocks, config.num_blocks_per_tok
    for i, kind in enumerate(config.layer_kinds):
        if config.is_dense(i):
            layer = _block(config.dense_spec(kind), config, context_length)
            total, active = total + layer, active + layer
            continue
        always = 2.0 * config.hidden_size * routed_blocks  # the router
        if config.num_shared_blocks:
            shared = config.shared_spec()
            always += shared.num_blocks * _thin(shared, config, context_length)
        total, active = total + always, active + always
        if not routed_blocks:
            continue
        spec = config.routed_spec(i)
        everywhere = routed_blocks * _thin(spec, config, context_length)
        total += everywhere
        if config.restrict_attention:
            own = max(1.0, context_length * top_k / routed_blocks)
            active += top_k * _thin(spec, config, own)
        else:
            active += everywhere
    return Flops(round(total), round(active))


def training_flops(
    config: MoLConfig,
    context_length: int,
    *,
    parent: MoLConfig | None,
    head: bool = True,
    recompute: bool = False,
) -> int:
    """Of one training token: forward, twice that backward, and the parent's forward pass.

    head: with the LM heads. recompute: gradient checkpointing, one more pass through the layers.
    """

    def forward(model: MoLConfig, *, head: bool) -> int:
        return count_flops(model, context_length).active - (0 if head else _head(model))

    flops = 3 * forward(config, head=head)
    if recompute:
        flops += forward(config, head=False)
    if parent is not None:
        flops += forward(parent, head=head)
    return flops


def _head(config: MoLConfig) -> int:
    return 2 * config.vocab_size * config.hidden_size


def _thin(spec: BlockSpec, config: MoLConfig, tokens: float) -> float:
    """One thin block with its two projections, on a token of the `tokens` that it sees."""
    return 4.0 * config.hidden_size * spec.width + _block(spec, config, tokens)


def _block(spec: BlockSpec, config: MoLConfig, tokens: float) -> float:
    inner = spec.num_heads * spec.head_dim
    mixing: float
    if spec.mixer == "gated_deltanet":
        weights = 5 * inner * spec.width + 2 * spec.num_heads * spec.width + 3 * CONV_WIDTH * inner
        mixing = DELTA_RULE * inner * spec.head_dim
    else:
        weights = 2 * (inner + spec.num_kv_heads * spec.head_dim) * spec.width
        mixing = 4 * inner * (tokens + 1) / 2
    weights += (3 if config.mlp_gated else 2) * spec.width * spec.d_ff
    return 2.0 * weights + mixing
