"""Floating-point operations of a Mixture of Layers model, from the numbers of its configuration."""

from molcli.maths.parameters import Architecture, count_parameters


def forward_flops(config: Architecture, context_length: int, *, head: bool = True) -> int:
    """Of one token's forward pass, a multiply-add counted as two, on rows of `context_length`.

    Matrices: 2 for each parameter that the token uses, the embedding's look-up left out. Softmax
    attention: 4 for each query coordinate and key seen, half the row on average; routed blocks see
    their share of the tokens. Gated DeltaNet's recurrence counts by its state: 8 a number of it.
    head: with the LM head.
    """
    count = count_parameters(config)
    matrices = count.active - count.embedding
    if head:
        matrices += config.vocab_size * config.hidden_size
    keys, attention = context_length / 2, 0.0
    thin = config.thin_num_attention_heads * config.head_dim
    routed = config.num_blocks - config.num_shared_blocks
    run = config.num_blocks_per_tok if config.restrict_attention else routed
    for kind in config.layer_kinds:
        if kind == "dense":
            attention += 4 * config.num_attention_heads * config.head_dim * keys
            continue
        attention += 4 * config.num_shared_blocks * thin * keys
        if kind == "gated_deltanet":
            attention += 8 * run * thin * config.head_dim
        elif routed:
            attention += 4 * run * thin * keys * run / routed
    return int(2 * matrices + attention)


def training_flops(
    config: Architecture,
    context_length: int,
    *,
    parent: Architecture | None,
    head: bool = True,
    recompute: bool = False,
) -> int:
    """Of one training token: forward, twice that backward, and the parent's forward pass.

    recompute: gradient checkpointing, one more forward pass through the layers.
    """
    flops = 3 * forward_flops(config, context_length, head=head)
    if recompute:
        flops += forward_flops(config, context_length, head=False)
    if parent is not None:
        flops += forward_flops(parent, context_length, head=head)
    return flops
