"""What a conversion holds at its peak, from the numbers of a configuration."""

import copy

from molcli.maths.architecture import BlockShape, routed_shape, shared_shape
from molcli.maths.losses import LOGITS_AT_ONCE
from molcli.maths.parameters import count_parameters
from molcli.model.chunks import CHUNK_BYTES, MOST_HEADS_HELD, bytes_a_token
from molcli.model.configuration_mol import MoLConfig

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
    for kind in ("dense", "softmax"):
        one = copy.copy(config)
        one.layer_kinds, one.num_hidden_layers = [kind], 1
        sizes.append(count_parameters(one).non_embedding)
    return sum(sizes)
