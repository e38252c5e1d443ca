"""What a conversion and a training run ask of a GPU: time and memory, estimated.

Time is work over the rate at which the hardware does that kind of work here: an estimate, meant to
be right within a factor of two, that says whether a run takes minutes or days. Memory counts the
tensors that are there at once (`conversion_memory`, `training_memory`).
"""

import copy
from dataclasses import dataclass

from molcli.config.sections import TrainConfig
from molcli.estimate.flops import count_flops
from molcli.estimate.memory import conversion_memory, training_memory
from molcli.estimate.parameters import count_parameters
from molcli.maths.losses import LOGITS_AT_ONCE
from molcli.model.configuration_mol import MoLConfig
from molcli.model.shapes import BlockShape, routed_shape, shared_shape

# Of a GPU's bf16 peak, as log.jsonl has it, on an H100: 0.17 to 0.20 in distilling SmolLM2-135M,
# 0.16 in training at the 1.3B scale. Thin blocks are bound by launches and memory, not arithmetic.
TRAINING_MFU = 0.17
# The rates of conversion are assumed: tests/bench/plan.py prints its seconds beside those expected
# here.
# Of a GPU's fp32 peak, in the conversion's products of fp32 matrices.
FP32_EFFICIENCY = 0.5
# A symmetric eigenproblem or Cholesky factor in fp64: operations a second, and seconds for each of
# its columns, which come one after the other.
DECOMPOSITION_RATE, COLUMN_SECONDS = 5e11, 35e-6
EIGENPROBLEM = 9  # * n^3 operations


@dataclass(frozen=True)
class Gpu:
    """bf16, fp32: dense peak of matrix products, operations a second. memory: bytes."""

    name: str
    bf16: float
    fp32: float
    memory: float


GPUS = {
    "rtx4090": Gpu("RTX 4090", 165e12, 83e12, 24e9),
    "l40s": Gpu("L40S", 362e12, 92e12, 48e9),
    "a100": Gpu("A100 80 GB", 312e12, 19.5e12, 80e9),
    "h100": Gpu("H100 SXM", 989e12, 67e12, 80e9),
    "h200": Gpu("H200", 989e12, 67e12, 141e9),
    "b200": Gpu("B200", 2250e12, 75e12, 180e9),
}


def parent_of(config: MoLConfig) -> MoLConfig:
    """The configuration of the dense model that it was converted from."""
    dense = copy.copy(config)
    dense.layer_structures = ["dense"] * config.num_hidden_layers
    dense.layer_mixers = ["attention"] * config.num_hidden_layers
    return dense


@dataclass(frozen=True)
class Cost:
    """seconds on one GPU, and bytes of its memory at the peak."""

    seconds: float
    memory: float


def conversion_cost(config: MoLConfig, tokens: int, heldout: int, gpu: Gpu) -> Cost:
    """Of calibration and fit, on `tokens` and `heldout` further ones.

    Parent and student run in fp32. Every matrix of a block is regressed on second moments, summed
    over its tokens. Each block's rank, each family's basis and each layer's moment is an
    eigenproblem of the model's width.
    """
    converted = config.layer_structures.count("mixture")
    # A family's shape, how many families have it, and how many blocks.
    kinds = (
        (shared_shape(config), config.num_shared_blocks, config.num_shared_blocks),
        (routed_shape(config), config.num_blocks_per_tok, config.num_routed_blocks),
    )
    families = config.num_shared_blocks + config.num_blocks_per_tok
    d, head_dim = config.hidden_size, config.head_dim
    dense = parent_of(config)
    forward = count_flops(dense, 1).active - 2.0 * config.vocab_size * d
    # The parent in calibration and in the fit, the student on held-out tokens, and logits.
    products = 2.0 * (tokens + heldout) * forward + 4.0 * heldout * config.vocab_size * d
    products += tokens * config.num_hidden_layers * 4.0 * d**2  # calibration's second moments
    for shape, count, _ in kinds:
        products += tokens * converted * count * _regressions(shape, head_dim, d)
    ranks, bases = config.num_blocks, families + 1
    operations = float((ranks + bases) * EIGENPROBLEM * d**3)
    for shape, _, blocks in kinds:
        operations += blocks * _factors(shape, head_dim, d)
    columns = (ranks + bases) * d
    seconds = products / (FP32_EFFICIENCY * gpu.fp32)
    seconds += converted * (operations / DECOMPOSITION_RATE + columns * COLUMN_SECONDS)
    return Cost(seconds, conversion_memory(config, tokens, heldout))


def training_cost(config: MoLConfig, train: TrainConfig, tokens: int, gpu: Gpu) -> Cost:
    """Of `tokens` of distillation from the parent, with the rows and micro-batches of `train`.

    A backward pass costs two forward passes; the parent runs forward only.
    """
    dense = parent_of(config)
    length = train.context_length
    work = 3.0 * count_flops(config, length).active + count_flops(dense, length).active
    if train.gradient_checkpointing:
        work += count_flops(config, length).active
    seconds = tokens * work / (TRAINING_MFU * gpu.bf16)

    memory = training_memory(
        config,
        trainable=count_parameters(config).total,
        tokens=train.micro_batch_size * length,
        product_bytes=2,
        parent=dense,
        logits_at_once=LOGITS_AT_ONCE["cuda"],
        recompute=train.gradient_checkpointing,
        compiled=train.compile is not False,
    )
    return Cost(seconds, memory.total)


def _regressions(shape: BlockShape, head_dim: int, d: int) -> float:
    """fp32 operations for each token of a block: second moments, and what is computed anew."""
    w, f = shape.width, shape.d_ff
    inner, kv = shape.num_heads * head_dim, shape.num_kv_heads * head_dim
    # q, k, v and gate, up twice; the first output projection; heads with neurons; neurons.
    moments = 3 * w * (w + d) + inner * (inner + w) + (inner + f) * (inner + f + d) + f * (f + d)
    forward = 4 * d * w + w * (7 * inner + 2 * kv) + 7 * w * f
    return 2.0 * (moments + forward)


def _factors(shape: BlockShape, head_dim: int, d: int) -> float:
    """fp64 operations of a block's regressions, but for eigenproblems of the model's width."""
    p = shape.num_heads * head_dim + shape.d_ff
    return p**3 / 3 + 4.0 * d * p**2 + 2.0 * p * d**2 + 20.0 * shape.width**3
