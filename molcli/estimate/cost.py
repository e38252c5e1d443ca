"""Time and memory of a conversion and of a training run on one GPU.

Time is the number of operations over the rate at which molcli reaches them. It is meant to be
right within a factor of two: whether a run takes minutes or days. Memory is the sum of the tensors
that exist at the peak (`conversion_memory`, `training_memory`).
"""

import copy
from dataclasses import dataclass

from molcli.config.sections import TrainConfig
from molcli.estimate.flops import count_flops
from molcli.estimate.gpus import Gpu
from molcli.estimate.memory import conversion_memory, training_memory
from molcli.estimate.parameters import count_parameters
from molcli.maths.losses import LOGITS_PER_CHUNK
from molcli.model.configuration_mol import MoLConfig
from molcli.model.shapes import BlockShape, routed_shape, shared_shape

# Share of a GPU's bf16 peak (MFU) that training reaches, from log.jsonl of runs on an H100: 0.17
# to 0.20 in distilling SmolLM2-135M, 0.16 in training at the 1.3B scale. Kernel launches and
# memory bandwidth limit thin blocks, not arithmetic.
TRAINING_MFU = 0.17
# The rates of a conversion are assumed, not measured; tests/bench/plan.py prints measured seconds
# beside those that are expected here.
# Share of a GPU's fp32 peak that the conversion's fp32 matrix products reach.
FP32_EFFICIENCY = 0.5
# Symmetric eigenproblems and Cholesky factors in fp64: FLOP/s, and seconds for each column, since
# columns are processed one after another.
DECOMPOSITION_RATE, COLUMN_SECONDS = 5e11, 35e-6
EIGENPROBLEM = 9  # FLOPs of an (n, n) eigenproblem over n^3


@dataclass(frozen=True)
class Cost:
    """Cost of a run on one GPU.

    Attributes:
        seconds: wall time.
        memory: bytes of GPU memory at the peak.
    """

    seconds: float
    memory: float


def parent_config(config: MoLConfig) -> MoLConfig:
    """Return the configuration of the dense model that `config` was converted from."""
    dense = copy.copy(config)
    dense.layer_structures = ["dense"] * config.num_hidden_layers
    dense.layer_mixers = ["attention"] * config.num_hidden_layers
    return dense


def conversion_cost(config: MoLConfig, tokens: int, heldout: int, gpu: Gpu) -> Cost:
    """Estimate the cost of calibration and fit.

    Parent and student run in fp32. Every matrix of a block is regressed on second moments, which
    are summed over the block's tokens. Each block's rank, each family's basis and each layer's
    second moment takes one eigenproblem of the model's width.

    Args:
        config: the converted model.
        tokens: tokens that blocks are fitted to.
        heldout: further tokens that the result is measured on.
        gpu: the GPU that it runs on.
    """
    if config.has_slices:
        return _slices_cost(config, tokens, heldout, gpu)
    converted = len(config.converted_layers)
    # Of shared and of routed blocks: the shape, the number of families and the number of blocks.
    kinds = (
        (shared_shape(config), config.num_shared_blocks, config.num_shared_blocks),
        (routed_shape(config), config.num_blocks_per_tok, config.num_routed_blocks),
    )
    families = config.num_shared_blocks + config.num_blocks_per_tok
    d, head_dim = config.hidden_size, config.head_dim
    dense = parent_config(config)
    forward = count_flops(dense, 1).active - 2.0 * config.vocab_size * d
    # The parent in calibration and in the fit, the student on held-out tokens, and the logits.
    products = 2.0 * (tokens + heldout) * forward + 4.0 * heldout * config.vocab_size * d
    products += tokens * config.num_hidden_layers * 4.0 * d**2  # calibration's second moments
    for shape, count, _ in kinds:
        products += tokens * converted * count * _regression_flops(shape, head_dim, d)
    ranks, bases = config.num_blocks, families + 1
    operations = float((ranks + bases) * EIGENPROBLEM * d**3)
    for shape, _, blocks in kinds:
        operations += blocks * _factor_flops(shape, head_dim, d)
    columns = (ranks + bases) * d
    seconds = products / (FP32_EFFICIENCY * gpu.fp32)
    seconds += converted * (operations / DECOMPOSITION_RATE + columns * COLUMN_SECONDS)
    return Cost(seconds, conversion_memory(config, tokens, heldout))


def _slices_cost(config: MoLConfig, tokens: int, heldout: int, gpu: Gpu) -> Cost:
    """As `conversion_cost`: of a layer, the neurons of a token's slices are regressed together."""
    d, dense = config.hidden_size, parent_config(config)
    forward = count_flops(dense, 1).active - 2.0 * config.vocab_size * d
    # The parent in calibration; in the fit the parent, its neurons, and those of slices twice.
    products = 5.0 * (tokens + heldout) * forward + 4.0 * heldout * config.vocab_size * d
    products += tokens * config.num_hidden_layers * 4.0 * d**2  # calibration's second moments
    joint = config.sliced_spec().d_ff + (config.d_ff_thin if config.num_routed_blocks else 0)
    layers = len(config.converted_layers)
    products += 2.0 * tokens * layers * joint * (joint + d)
    factors = layers * config.num_blocks * (joint**3 / 3 + 4.0 * d * joint**2)
    seconds = products / (FP32_EFFICIENCY * gpu.fp32) + factors / DECOMPOSITION_RATE
    return Cost(seconds, conversion_memory(config, tokens, heldout))


def training_cost(config: MoLConfig, train: TrainConfig, tokens: int, gpu: Gpu) -> Cost:
    """Estimate the cost of distillation from the parent.

    A backward pass costs two forward passes; the parent runs forward only.

    Args:
        config: the student.
        train: context length, micro-batch size, gradient checkpointing and compilation.
        tokens: training tokens.
        gpu: the GPU that it runs on.
    """
    dense = parent_config(config)
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
        logits_per_chunk=LOGITS_PER_CHUNK["cuda"],
        recompute=train.gradient_checkpointing,
        compiled=train.compile is not False,
    )
    return Cost(seconds, memory.total)


def _regression_flops(shape: BlockShape, head_dim: int, d: int) -> float:
    """fp32 FLOPs for each token of a block: second moments, and activations of the fit."""
    w, f = shape.width, shape.d_ff
    inner, kv = shape.num_heads * head_dim, shape.num_kv_heads * head_dim
    # q, k, v and gate, up twice; the first output projection; heads with neurons; neurons.
    moments = 3 * w * (w + d) + inner * (inner + w) + (inner + f) * (inner + f + d) + f * (f + d)
    forward = 4 * d * w + w * (7 * inner + 2 * kv) + 7 * w * f
    return 2.0 * (moments + forward)


def _factor_flops(shape: BlockShape, head_dim: int, d: int) -> float:
    """fp64 FLOPs of a block's regressions, without eigenproblems of the model's width."""
    p = shape.num_heads * head_dim + shape.d_ff
    return p**3 / 3 + 4.0 * d * p**2 + 2.0 * p * d**2 + 20.0 * shape.width**3
