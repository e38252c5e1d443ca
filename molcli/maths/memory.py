"""Memory of a training step, from the numbers of a configuration.

Weights, gradients, the optimiser's moments and the parent are exact. Activations and logits follow
what the model keeps for its backward pass, tensor by tensor; what a library's kernel keeps beside
its inputs and outputs is not counted. Compiled layers keep less: what is cheap to compute again is.
"""

from dataclasses import dataclass, fields

from molcli.maths.architecture import Architecture, routed_shape, shared_shape
from molcli.maths.parameters import count_parameters

_FP32 = 4
_MOMENTS = 2  # AdamW's
# Logits are float32, in chunks; at their peak so many floats for each logit of a chunk.
_WITHOUT_PARENT, _WITH_PARENT = 3.0, 4.5


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step, by kind."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    parent: int
    logits: int

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(getattr(self, field.name) for field in fields(self))


def training_memory(
    config: Architecture,
    *,
    trainable: int,
    tokens: int,
    product_bytes: int,
    parent: Architecture | None,
    logits_at_once: int,
    layerwise: bool = False,
    recompute: bool = False,
    compiled: bool = False,
    ranks: int = 1,
    whole: bool = False,
) -> Memory:
    """Of a step with float32 weights and AdamW.

    trainable: parameters that take a gradient. tokens: of a micro-batch. product_bytes: of a number
    in matrix products, 2 for bf16. logits_at_once: tokens x vocabulary of a chunk of the loss.
    layerwise: alignment, which holds one layer's activations and no logits. recompute: gradient
    checkpointing, which holds the layers' inputs and one layer's activations. compiled: on a GPU.
    ranks: that share weights, gradients and moments; beside its share, each has a layer that runs,
    the one that is fetched for it, and what is outside the layers. whole: each has all layers then.
    """
    count = count_parameters(config)
    routers = sum(not kind.startswith("dense") for kind in config.layer_kinds)
    biases = routers * (config.num_blocks - config.num_shared_blocks)
    of_layer = _compiled_layer_bytes if compiled else _layer_bytes
    a_token = [of_layer(config, kind, product_bytes) for kind in config.layer_kinds]
    residual = _FP32 * config.hidden_size
    if layerwise:
        activations = 3 * residual + max(a_token)  # the parent's two residuals and the student's
    elif recompute:
        activations = len(a_token) * residual + max(a_token)
    else:
        activations = sum(a_token)
    casts = count.total * product_bytes if product_bytes < _FP32 and not compiled else 0
    if layerwise or recompute:
        casts //= len(a_token)
    gathered = 0
    if ranks > 1:
        outside = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
        of_layers = count.total - outside
        gathered = outside + (of_layers if whole else 2 * of_layers // len(a_token))
    return Memory(
        weights=_FP32 * (count.total // ranks + biases + gathered),
        gradients=_FP32 * (trainable // ranks + min(gathered, trainable)),
        optimizer=_FP32 * _MOMENTS * (trainable // ranks),
        activations=tokens * (activations + 2 * residual) + casts,
        parent=0 if parent is None else product_bytes * count_parameters(parent).total,
        logits=0
        if layerwise
        else _head_bytes(config, tokens, product_bytes, parent is not None, logits_at_once),
    )


def _head_bytes(
    config: Architecture, tokens: int, product_bytes: int, with_parent: bool, at_once: int
) -> int:
    chunk = min(tokens, max(1, at_once // config.vocab_size)) * config.vocab_size
    floats = _WITH_PARENT if with_parent else _WITHOUT_PARENT
    matrix = config.vocab_size * config.hidden_size
    # The weight's gradient in float32, its cast, and the gradient of all hidden states.
    return int(chunk * _FP32 * floats) + matrix * _FP32 + tokens * config.hidden_size * _FP32


def _layer_bytes(config: Architecture, kind: str, product_bytes: int) -> int:
    """What a layer keeps of one token for its backward pass."""
    d = config.hidden_size
    if kind.startswith("dense"):
        q = config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        inner = _block_bytes(config, d, q, kv, config.intermediate_size, product_bytes, _FP32)
        return inner + _FP32 * d
    p, routed = product_bytes, config.num_blocks - config.num_shared_blocks
    run = config.num_blocks_per_tok if config.restrict_attention else routed
    total = _FP32 * d  # the residual
    shape = shared_shape(config)
    inner, kv = shape.num_heads * config.head_dim, shape.num_kv_heads * config.head_dim
    shared = _block_bytes(config, shape.width, inner, kv, shape.d_ff, p, p)
    total += config.num_shared_blocks * (p * (d + shape.width) + shared)
    shape = routed_shape(config)
    inner, kv = shape.num_heads * config.head_dim, shape.num_kv_heads * config.head_dim
    t, ff = shape.width, shape.d_ff
    if kind == "gated_deltanet":
        mixer = _block_bytes(config, t, inner, inner, ff, p, p) + _deltanet_extra(inner, t, p)
    else:
        mixer = _block_bytes(config, t, inner, kv, ff, p, p)
    total += run * (p * (d + 2 * t) + mixer)  # the gathered input, thin_out's input, the gated one
    return total + 2 * _FP32 * d  # the router's normalised input, its fp32 copy


def _block_bytes(
    config: Architecture, width: int, q: int, kv: int, ff: int, product: int, stream: int
) -> int:
    """One row of one block. stream: bytes of a number in its residual."""
    # Each norm: its input in fp32, the normalised input, and its weight per row; then a cast for
    # every matrix that reads it.
    norm = width * (_FP32 + stream + _FP32)
    gated = config.mlp_gated
    cast = product * width if product < _FP32 else 0
    casts = cast * (3 + (2 if gated else 1)) + (0 if cast else 2 * _FP32 * width)
    # Attention keeps rotated q and k, v, and what it returns.
    attention = product * (2 * q + 2 * kv)
    neurons = product * ff * (4 if gated else 2)
    return 2 * norm + casts + attention + neurons


def _deltanet_extra(inner: int, width: int, product: int) -> int:
    """Beyond softmax attention: convolutions, unit lengths, decay, gate and its norm."""
    conv = 3 * inner * (5 * _FP32 + 4 * product)
    return conv + inner * (4 * _FP32 + 3 * product) + product * width


def _compiled_layer_bytes(config: Architecture, kind: str, product_bytes: int) -> int:
    """As `_layer_bytes`, of compiled layers: inputs of products and of attention, norms' inputs in
    float32. Casts, weights per row, rotations and the router's arithmetic are done again.
    """
    d, p = config.hidden_size, product_bytes
    heads = config.num_attention_heads * config.head_dim
    if kind.startswith("dense"):
        return _FP32 * d + _compiled_block_bytes(config, d, heads, config.intermediate_size, p)
    routed = config.num_blocks - config.num_shared_blocks
    run = config.num_blocks_per_tok if config.restrict_attention else routed
    shape = shared_shape(config)
    inner = shape.num_heads * config.head_dim
    shared = _compiled_block_bytes(config, shape.width, inner, shape.d_ff, p)
    shape = routed_shape(config)
    inner = shape.num_heads * config.head_dim
    block = _compiled_block_bytes(config, shape.width, inner, shape.d_ff, p)
    extra = 0
    if kind == "gated_deltanet":  # before the convolution, the gate, and the chunks' systems
        extra = p * (4 * inner + 64 * shape.num_heads)
    row = p * (d + shape.width) + block + extra  # what thin_in and thin_out read
    return _FP32 * d + config.num_shared_blocks * shared + run * row


def _compiled_block_bytes(
    config: Architecture, width: int, inner: int, ff: int, product: int
) -> int:
    """One row of one block. Keys and values are kept for every head."""
    norms = 2 * width * (_FP32 + product)
    return norms + product * (4 * inner + ff * (3 if config.mlp_gated else 2) + 2 * width)
