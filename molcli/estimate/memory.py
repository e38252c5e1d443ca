"""Peak memory of a training step and of a conversion, from a configuration."""

import copy
from dataclasses import dataclass, fields

from molcli.estimate.parameters import count_parameters
from molcli.fitting.chunks import CHUNK_BYTES, MAX_KEPT_HEADS, bytes_per_token
from molcli.maths.losses import LOGITS_PER_CHUNK
from molcli.model.configuration_mol import BlockSpec, MoLConfig
from molcli.model.mixers import MIXERS
from molcli.model.shapes import BlockShape, routed_shape, shared_shape

_FP32, _FP64, _INT64 = 4, 8, 8  # bytes of a number
_MOMENTS = 2  # numbers that AdamW keeps for each parameter
# The loss computes logits in chunks, in float32: floats per logit of a chunk at the peak.
_WITHOUT_PARENT, _WITH_PARENT = 3.0, 4.5
# The loss on held-out tokens after a conversion: floats per logit of a chunk. Logits of two models,
# their logarithms, the terms of the sums, and the chunk before.
_HELDOUT_LOGITS = 7


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a training step, by kind."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    parent: int
    logits: int

    @property
    def total(self) -> int:
        """Sum of all kinds."""
        return sum(getattr(self, field.name) for field in fields(self))


def training_memory(
    config: MoLConfig,
    *,
    trainable: int,
    tokens: int,
    product_bytes: int,
    parent: MoLConfig | None,
    logits_per_chunk: int,
    layerwise: bool = False,
    recompute: bool = False,
    compiled: bool = False,
    ranks: int = 1,
    whole: bool = False,
) -> Memory:
    """Estimate the memory of a training step with float32 weights and AdamW.

    Args:
        config: the model that is trained.
        trainable: number of parameters that get a gradient.
        tokens: tokens of a micro-batch.
        product_bytes: bytes of a number in matrix products, 2 for bf16.
        parent: configuration of the parent in memory, if there is one.
        logits_per_chunk: tokens times vocabulary in one chunk of the loss.
        layerwise: layers are trained one by one (stage `align`): one layer's activations, no
            logits.
        recompute: gradient checkpointing: the layers' inputs and one layer's activations.
        compiled: layers are compiled, on a GPU.
        ranks: number of processes among which weights, gradients and moments are sharded. Beside
            its shard, each holds the layer that runs, the layer that is gathered next, and the
            parameters outside the layers.
        whole: each process holds all layers unsharded during a step.
    """
    count = count_parameters(config)
    biases = len(config.converted_layers) * config.num_routed_blocks
    of_layer = _compiled_layer_bytes if compiled else _layer_bytes
    a_token = [of_layer(config, i, product_bytes) for i in range(config.num_hidden_layers)]
    residual = _FP32 * config.hidden_size
    if layerwise:
        # Two residuals of the parent and one of the student.
        activations = 3 * residual + max(a_token)
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
        else _head_bytes(config, tokens, product_bytes, parent is not None, logits_per_chunk),
    )


def conversion_memory(config: MoLConfig, tokens: int, heldout: int, device: str = "cuda") -> int:
    """Estimate the memory of a fitted conversion, in bytes.

    The peak is either the fit of a layer, or the loss on held-out tokens at the end.

    Args:
        config: the converted model.
        tokens: tokens that blocks are fitted to.
        heldout: further tokens that the result is measured on.
        device: "cuda" or "cpu"; sizes of chunks depend on it.
    """
    d = config.hidden_size
    # Indices of the stream, and of rows.
    indices = 4 + 5 * (1 + max(1, config.num_shared_blocks))
    a_token = 2 * _FP32 * d + _INT64 * indices
    logits = heldout * config.vocab_size
    per_chunk = logits / max(1, -(-logits // LOGITS_PER_CHUNK[device]))  # chunks of equal size
    end = config.vocab_size * d + 3 * heldout * d + round(_HELDOUT_LOGITS * per_chunk)
    fit = _fit_bytes(config, tokens, heldout, device)
    # The text that blocks are fitted to is freed before the end.
    return heldout * a_token + max(tokens * a_token + fit, _FP32 * end)


def _head_bytes(
    config: MoLConfig, tokens: int, product_bytes: int, with_parent: bool, per_chunk: int
) -> int:
    chunk = min(tokens, max(1, per_chunk // config.vocab_size)) * config.vocab_size
    floats = _WITH_PARENT if with_parent else _WITHOUT_PARENT
    matrix = config.vocab_size * config.hidden_size
    # The weight's gradient in float32 with its cast, and the gradient of all hidden states.
    return int(chunk * _FP32 * floats) + matrix * _FP32 + tokens * config.hidden_size * _FP32


def _layer_bytes(config: MoLConfig, index: int, product_bytes: int) -> int:
    """What layer `index` keeps of one token for its backward pass."""
    d, p, mixer = config.hidden_size, product_bytes, config.layer_mixers[index]
    if config.layer_structures[index] != "mixture":
        always = config.always_spec(index)
        if always is None:
            return 0
        layer = _FP32 * d + _block_bytes(always, config, p, _FP32)
        return layer + _slice_bytes(config, index, p * (4 if config.mlp_gated else 2))
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
    if config.layer_structures[index] != "mixture":
        full = config.always_spec(index)
        if full is None:
            return 0
        layer = _FP32 * d + _compiled_block_bytes(full, config, p)
        return layer + _slice_bytes(config, index, p * (3 if config.mlp_gated else 2))
    shared, routed = config.shared_spec(), config.routed_spec(mixer)
    # What thin_in and thin_out read, and the block.
    row = p * (d + routed.width) + _compiled_block_bytes(routed, config, p)
    always = shared.num_blocks * _compiled_block_bytes(shared, config, p)
    return _FP32 * d + always + _visited(config) * row


def _compiled_block_bytes(spec: BlockSpec, config: MoLConfig, product: int) -> int:
    """One row of one block."""
    norms = 2 * spec.width * (_FP32 + product)
    mixer = MIXERS[spec.mixer].activation_bytes(spec, product, compiled=True)
    hidden = product * (spec.d_ff * (3 if config.mlp_gated else 2) + 2 * spec.width)
    return norms + mixer + hidden


def _slice_bytes(config: MoLConfig, index: int, of_neuron: int) -> int:
    """What the routed slices of a sliced layer keep of one token: their gathered input and output,
    their neurons, and the router's input in float32. of_neuron: bytes for each neuron."""
    if not (config.has_slices and config.is_routed(index)):
        return 0
    d = config.hidden_size
    row = of_neuron * config.d_ff_thin + 2 * _FP32 * d
    return config.num_blocks_per_tok * row + 2 * _FP32 * d


def _visited(config: MoLConfig) -> int:
    """Routed blocks that run on a token."""
    return config.num_blocks_per_tok if config.restrict_attention else config.num_routed_blocks


def _fit_bytes(config: MoLConfig, tokens: int, heldout: int, device: str) -> int:
    """Bytes of a layer's fit, beside the residuals."""
    if config.has_slices:
        return _sliced_fit_bytes(config, tokens, heldout, device)
    routed = config.num_blocks_per_tok if config.restrict_attention else config.num_routed_blocks
    # The targets that are left to fit with their importance, and indices of rows.
    held = _FP32 * (config.hidden_size + 1) + 6 * routed * _INT64
    families = []
    if config.num_shared_blocks:
        families.append(_family_bytes(config, shared_shape(config), 1, 1, tokens, heldout, device))
    if config.num_routed_blocks:
        clones = -(-config.num_routed_blocks // config.num_blocks_per_tok)
        visited = 1 if config.restrict_attention else clones
        shape = routed_shape(config)
        families.append(_family_bytes(config, shape, clones, visited, tokens, heldout, device))
    return tokens * held + max(families) + _FP32 * _layer_weights(config)


def _sliced_fit_bytes(config: MoLConfig, tokens: int, heldout: int, device: str) -> int:
    """Bytes of a sliced layer's fit: two more residuals, the moments of each slice's neurons with
    the shared ones, and the largest of a solution and a chunk."""
    d, blocks = config.hidden_size, max(1, config.num_routed_blocks)
    spec = config.sliced_spec()
    own = config.d_ff_thin if config.num_routed_blocks else 0
    joint = spec.d_ff + own
    most = CHUNK_BYTES[device] // bytes_per_token(config)
    chunk = _FP32 * min(max(tokens, heldout), most) * (7 * config.intermediate_size // 2 + 4 * d)
    solving = _FP64 * (3 * joint * joint + blocks * own * (spec.d_ff + 2 * d))
    sums = _FP64 * blocks * joint * (joint + d)
    return 2 * _FP32 * tokens * d + sums + max(chunk, solving) + _FP32 * _layer_weights(config)


def _family_bytes(
    config: MoLConfig,
    shape: BlockShape,
    blocks: int,
    visited: int,
    tokens: int,
    heldout: int,
    device: str,
) -> int:
    """Bytes of fitting one family of `blocks` blocks, of which each token visits `visited`."""
    d, width, d_ff = config.hidden_size, shape.width, shape.d_ff
    inner = shape.num_heads * config.head_dim
    joint = inner + d_ff
    sums = blocks * joint * (joint + d)
    # Of one block at a time a matrix and its Cholesky factor; of each block the solution, its
    # product with the sums, the fitted values, their eigenvectors, and the kept ones.
    solving = 2 * joint * joint + blocks * (2 * joint * d + 3 * d * d + width * (joint + d))
    # Of a chunk, what the parent's layer or a family computes; on held-out tokens, what all blocks
    # of the student compute together.
    parents = 3 * d + 3 * config.intermediate_size
    family = (1 + visited) * d + visited * 2 * (width + joint + d_ff)
    most = CHUNK_BYTES[device] // bytes_per_token(config)
    chunk = _FP32 * min(tokens, most) * max(parents, family)
    chunk = max(chunk, min(heldout, most) * bytes_per_token(config))
    heads = visited * inner if inner <= MAX_KEPT_HEADS * d else 0
    return (
        tokens * _FP32 * heads
        + _FP64 * (sums + 3 * d * d)  # and the residual's second moment with its roots
        + max(chunk, _FP64 * solving)
    )


def _layer_weights(config: MoLConfig) -> int:
    """Parameters of the parent's layer and of the converted one together."""
    sizes = []
    for structure in ("dense", "sliced" if config.has_slices else "mixture"):
        one = copy.copy(config)
        one.layer_structures, one.layer_mixers = [structure], ["attention"]
        one.num_hidden_layers = 1
        sizes.append(count_parameters(one).non_embedding)
    return sum(sizes)
