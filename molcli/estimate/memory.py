"""Peak memory of a training step and of a conversion, from the numbers of a configuration."""

import copy
from dataclasses import dataclass, fields

from molcli.estimate.parameters import count_parameters
from molcli.fitting.chunks import CHUNK_BYTES, MOST_HEADS_HELD, bytes_a_token
from molcli.maths.losses import LOGITS_AT_ONCE
from molcli.model.configuration_mol import BlockSpec, MoLConfig
from molcli.model.mixers import MIXERS
from molcli.model.shapes import BlockShape, routed_shape, shared_shape

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
    config: MoLConfig,
    *,
    trainable: int,
    tokens: int,
    product_bytes: int,
    parent: MoLConfig | None,
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
    routers = config.layer_structures.count("mixture")
    biases = routers * (config.num_blocks - config.num_shared_blocks)
    of_layer = _compiled_layer_bytes if compiled else _layer_bytes
    a_token = [of_layer(config, i, product_bytes) for i in range(config.num_hidden_layers)]
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
    config: MoLConfig, tokens: int, product_bytes: int, with_parent: bool, at_once: int
) -> int:
    chunk = min(tokens, max(1, at_once // config.vocab_size)) * config.vocab_size
    floats = _WITH_PARENT if with_parent else _WITHOUT_PARENT
    matrix = config.vocab_size * config.hidden_size
    # The weight's gradient in float32, its cast, and the gradient of all hidden states.
    return int(chunk * _FP32 * floats) + matrix * _FP32 + tokens * config.hidden_size * _FP32


def _layer_bytes(config: MoLConfig, index: int, product_bytes: int) -> int:
    """What layer `index` keeps of one token for its backward pass."""
    d, p, mixer = config.hidden_size, product_bytes, config.layer_mixers[index]
    if config.is_dense(index):
        return _FP32 * d + _block_bytes(config.dense_spec(mixer), config, p, _FP32)
    total = _FP32 * d  # the residual
    spec = config.shared_spec()
    total += spec.num_blocks * (p * (d + spec.width) + _block_bytes(spec, config, p, p))
    spec = config.routed_spec(mixer)
    # The gathered input, thin_out's input, the gated one.
    total += _visited(config) * (p * (d + 2 * spec.width) + _block_bytes(spec, config, p, p))
    return total + 2 * _FP32 * d  # the router's normalised input, its fp32 copy


def _block_bytes(spec: BlockSpec, config: MoLConfig, product: int, residual: int) -> int:
    """One row of one block. residual: bytes of a number in its residual."""
    # Each norm: its input in fp32, the normalised input, and its weight per row; then a cast for
    # every matrix that reads it.
    norm = spec.width * (_FP32 + residual + _FP32)
    gated = config.mlp_gated
    cast = product * spec.width if product < _FP32 else 0
    casts = cast * (3 + (2 if gated else 1)) + (0 if cast else 2 * _FP32 * spec.width)
    mixer = MIXERS[spec.mixer].activation_bytes(spec, product, compiled=False)
    hidden = product * spec.d_ff * (4 if gated else 2)
    return 2 * norm + casts + mixer + hidden


def _compiled_layer_bytes(config: MoLConfig, index: int, product_bytes: int) -> int:
    """As `_layer_bytes`, of compiled layers: inputs of products and of attention, norms' inputs in
    float32. Casts, weights per row, rotations and the router's arithmetic are computed again.
    """
    d, p, mixer = config.hidden_size, product_bytes, config.layer_mixers[index]
    if config.is_dense(index):
        return _FP32 * d + _compiled_block_bytes(config.dense_spec(mixer), config, p)
    shared, routed = config.shared_spec(), config.routed_spec(mixer)
    row = p * (d + routed.width) + _compiled_block_bytes(
        routed, config, p
    )  # read by thin_in and thin_out
    always = shared.num_blocks * _compiled_block_bytes(shared, config, p)
    return _FP32 * d + always + _visited(config) * row


def _compiled_block_bytes(spec: BlockSpec, config: MoLConfig, product: int) -> int:
    """One row of one block."""
    norms = 2 * spec.width * (_FP32 + product)
    mixer = MIXERS[spec.mixer].activation_bytes(spec, product, compiled=True)
    hidden = product * (spec.d_ff * (3 if config.mlp_gated else 2) + 2 * spec.width)
    return norms + mixer + hidden


def _visited(config: MoLConfig) -> int:
    """Routed blocks that run on a token."""
    return config.num_blocks_per_tok if config.restrict_attention else config.num_routed_blocks


_FP32, _FP64, _INT64 = 4, 8, 8
# Numbers for each logit of a chunk: two models', their logarithms, what is summed, and the chunk
# before.
_LOGITS = 7


def conversion_memory(config: MoLConfig, tokens: int, heldout: int, device: str = "cuda") -> int:
    """Bytes of a fitted conversion on so many tokens and further held-out ones.

    The peak is either the fit of a layer, or the loss on held-out tokens at the end.
    """
    d = config.hidden_size
    # The stream's numbers, and those of rows.
    indices = 4 + 5 * (1 + max(1, config.num_shared_blocks))
    a_token = 2 * _FP32 * d + _INT64 * indices
    logits = heldout * config.vocab_size
    at_once = logits / max(1, -(-logits // LOGITS_AT_ONCE[device]))  # in chunks of one size
    end = config.vocab_size * d + 3 * heldout * d + round(_LOGITS * at_once)
    fit = _fit(config, tokens, heldout, device)
    # The text to fit on is gone by the end.
    return heldout * a_token + max(tokens * a_token + fit, _FP32 * end)


def _fit(config: MoLConfig, tokens: int, heldout: int, device: str) -> int:
    """Beside both residuals."""
    routed = config.num_blocks_per_tok if config.restrict_attention else config.num_routed_blocks
    # What is left to learn, and its importance; and rows' numbers.
    held = _FP32 * (config.hidden_size + 1) + 6 * routed * _INT64
    families = []
    if config.num_shared_blocks:
        families.append(_family(config, shared_shape(config), 1, 1, tokens, heldout, device))
    if config.num_routed_blocks:
        clones = -(-config.num_routed_blocks // config.num_blocks_per_tok)
        seen = 1 if config.restrict_attention else clones
        shape = routed_shape(config)
        families.append(_family(config, shape, clones, seen, tokens, heldout, device))
    return tokens * held + max(families) + _FP32 * _layer_weights(config)


def _family(
    config: MoLConfig,
    shape: BlockShape,
    blocks: int,
    seen: int,
    tokens: int,
    heldout: int,
    device: str,
) -> int:
    """Of one family of so many blocks, of which `seen` see a token."""
    d, width, neurons = config.hidden_size, shape.width, shape.d_ff
    inner = shape.num_heads * config.head_dim
    joint = inner + neurons
    sums = blocks * joint * (joint + d)
    # A factor and what it is made from, of one block; of each, the solution, its product with the
    # sums, what is fitted, its eigenvectors, and what is kept of them.
    solving = 2 * joint * joint + blocks * (2 * joint * d + 3 * d * d + width * (joint + d))
    # Of a chunk: what the parent's layer computes, or what a family does; on held-out tokens, all
    # blocks of the student at once.
    parents = 3 * d + 3 * config.intermediate_size
    family = (1 + seen) * d + seen * 2 * (width + joint + neurons)
    most = CHUNK_BYTES[device] // bytes_a_token(config)
    chunk = _FP32 * min(tokens, most) * max(parents, family)
    chunk = max(chunk, min(heldout, most) * bytes_a_token(config))
    heads = seen * inner if inner <= MOST_HEADS_HELD * d else 0
    return (
        tokens * _FP32 * heads
        + _FP64 * (sums + 3 * d * d)  # and the residual's moment with its roots
        + max(chunk, _FP64 * solving)
    )


def _layer_weights(config: MoLConfig) -> int:
    """Of the parent's layer, and of the converted one."""
    sizes = []
    for structure in ("dense", "mixture"):
        one = copy.copy(config)
        one.layer_structures, one.layer_mixers = [structure], ["attention"]
        one.num_hidden_layers = 1
        sizes.append(count_parameters(one).non_embedding)
    return sum(sizes)
