"""Parameter counts of a Mixture of Layers model, from the numbers of its configuration."""

from dataclasses import dataclass

from molcli.model.shapes import Architecture, BlockShape, routed_shape, shared_shape

CONV_WIDTH = 4  # inputs that Gated DeltaNet's short convolutions see


@dataclass(frozen=True)
class ParameterCount:
    """total: all trainable parameters. active: those that the forward pass of a token uses, with
    the whole embedding. embedding: of both counts, the embedding and an untied LM head.
    """

    total: int
    active: int
    embedding: int

    @property
    def non_embedding(self) -> int:
        """Of `total`."""
        return self.total - self.embedding


def count_parameters(config: Architecture) -> ParameterCount:
    """Counts the model of a configuration. Buffers, such as the router's bias, are left out."""
    embedding = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    total = active = embedding + config.hidden_size  # and the final norm
    for kind in config.layer_kinds:
        if kind.startswith("dense"):
            layer = _dense_layer(config, kind)
            total, active = total + layer, active + layer
            continue
        shared = config.num_shared_blocks * _thin_block(config, shared_shape(config), "softmax")
        routed_blocks = config.num_blocks - config.num_shared_blocks
        router = routed_blocks * config.hidden_size
        routed = _thin_block(config, routed_shape(config), kind)
        run = config.num_blocks_per_tok if config.restrict_attention else routed_blocks
        total += shared + router + routed_blocks * routed
        active += shared + router + run * routed
    return ParameterCount(total, active, embedding)


def _dense_layer(config: Architecture, kind: str) -> int:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if kind == "dense_gated_deltanet":
        mixer = _gated_deltanet(config.hidden_size, heads, config.head_dim)
    else:
        mixer = _softmax_attention(config, config.hidden_size, heads, kv_heads)
    mlp = _mlp_and_norms(config, config.hidden_size, config.intermediate_size)
    return mixer + mlp + config.output_norms * 2 * config.hidden_size


def _thin_block(config: Architecture, shape: BlockShape, mixer: str) -> int:
    width, heads = shape.width, shape.num_heads
    if mixer == "gated_deltanet":
        inner = _gated_deltanet(width, heads, config.head_dim)
    else:
        inner = _softmax_attention(config, width, heads, shape.num_kv_heads)
    projections = 2 * config.hidden_size * width  # thin_in and thin_out
    mlp = _mlp_and_norms(config, width, shape.d_ff)
    return projections + inner + mlp + config.output_norms_thin * 2 * width


def _softmax_attention(config: Architecture, width: int, heads: int, kv_heads: int) -> int:
    q, kv = heads * config.head_dim, kv_heads * config.head_dim
    weights = 2 * q * width + 2 * kv * width  # q and o, k and v
    biases = config.attention_bias * (q + 2 * kv) + config.attention_out_bias * width
    norms = q + kv if config.qk_norm_full_width else 2 * config.head_dim
    return weights + biases + config.qk_norm * norms


def _gated_deltanet(width: int, heads: int, head_dim: int) -> int:
    inner = heads * head_dim
    projections = 5 * inner * width + 2 * heads * width  # q, k, v, g and o; a and b
    return projections + 3 * CONV_WIDTH * inner + 2 * heads + head_dim  # A_log, dt_bias; o_norm


def _mlp_and_norms(config: Architecture, width: int, neurons: int) -> int:
    return (3 if config.mlp_gated else 2) * width * neurons + config.pre_norms * 2 * width
