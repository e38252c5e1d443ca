"""Before a run: choose the stages of a recipe that names none, and estimate what stages take."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from molcli.config.sections import StageConfig, TrainConfig
from molcli.config.stages import Stage, resolve
from molcli.errors import MolError
from molcli.estimate.flops import training_flops
from molcli.estimate.memory import Memory, training_memory
from molcli.estimate.parameters import count_parameters
from molcli.families.parent import Parent
from molcli.maths.losses import LOGITS_PER_CHUNK
from molcli.model import MoLForCausalLM
from molcli.model.checkpoint import default_device, open_config
from molcli.model.configuration_mol import MoLConfig
from molcli.model.precision import matmul_dtype
from molcli.stages.train.balance import trains_routers
from molcli.stages.train.batches import (
    check_contexts,
    check_stages,
    micro_batch_rows,
    num_steps,
    tokens_per_step,
)
from molcli.stages.train.distributed import uses_optimizer_sharding
from molcli.stages.train.gradient_graph import should_capture, should_compile
from molcli.stages.train.optimizer import set_trainable
from molcli.stages.train.preflight import check_files

# Learning rates below are for a model of this many parameters.
_REFERENCE_PARAMETERS = 135e6
# Of inherited and of new weights. In 0.5M tokens SmolLM2-135M learns most at the first pair, in 6M
# and more at the second. Larger models need smaller rates: in long runs in proportion to 1 / size,
# else to 1 / sqrt(size). Both lead to what distillations of 7B models use (arXiv 2505.03005).
_SHORT_RUN_RATES, _LONG_RUN_RATES = (1e-4, 3e-5), (6e-4, 1e-4)
_LONG_RUN = 3_000_000  # tokens
_FROM_SCRATCH_RATE = 3e-4
_ALIGN_TOKENS = 20_000_000  # at most
_LONG_CONTEXT_RUN = 500_000_000  # tokens: a final stage with a long context is affordable
_LONG_CONTEXT = 4096
_MIN_STEPS = 200
# Tokens of a micro-batch, for models below _SMALL_MODEL parameters and for others. With the first,
# a converted SmolLM2-135M (0.2B) and its parent take 17 GB.
_SMALL_MODEL = 500e6
_MICRO_BATCH_SMALL, _MICRO_BATCH_LARGE = 2**14, 2**13

# Fraction of a large matrix product's speed that a step of many small ones reaches: SmolLM2-135M on
# an H100, and its last layers, the others frozen, on two CPU cores.
_UTILISATION = {"cuda": 0.2, "cpu": 0.19}
# Seconds for the forward and backward pass of a layer, and of its parent's, with however few rows,
# where no CUDA graph replays them: SmolLM2-135M compiled on an H100.
_LAUNCH_SECONDS = 0.008
_TIMED_SIZE = {"cuda": 8192, "cpu": 1024}  # rows and columns of the matrix product that is timed


@dataclass(frozen=True)
class Situation:
    """What a plan depends on, beside recipe and model.

    Attributes:
        has_parent: there is a parent to learn from.
        converted: the model comes from a dense one; its weights are not random.
        ranks: processes that share a batch; changes only micro-batches.
    """

    has_parent: bool
    converted: bool
    ranks: int = 1


def plan(config: TrainConfig, model: MoLConfig, situation: Situation) -> TrainConfig:
    """Choose stages whose tokens sum to config.tokens, with their learning rates and batches.

    A pure function: a resumed run plans the same again.

    Args:
        config: the train section, with stages "auto".
        model: that is trained.
        situation: see there.

    Returns:
        The section with a list of stages.

    Raises:
        MolError: for cached logits, whose context length is fixed.
    """
    if config.logits is not None:
        raise MolError(
            "`train.stages` is auto and would choose the context length, which `train.logits` "
            "already fixes",
            allowed="a list of stages, or null for one",
            hint="--set train.stages=null",
        )
    total = count_parameters(model).total
    ratio = min(1.0, _REFERENCE_PARAMETERS / total)
    short = [rate * ratio**0.5 for rate in _SHORT_RUN_RATES]
    if situation.converted or situation.has_parent:
        is_short = config.tokens < _LONG_RUN
        rate, new = short if is_short else [rate * ratio for rate in _LONG_RUN_RATES]
    else:
        rate = new = _FROM_SCRATCH_RATE * ratio**0.5
    context, rows = _batch_shape(config.tokens, total, model.max_position_embeddings)
    micro_batch_tokens = _MICRO_BATCH_SMALL if total < _SMALL_MODEL else _MICRO_BATCH_LARGE
    config = replace(
        config,
        context_length=context,
        batch_size=rows,
        micro_batch_size=_divisor(rows // situation.ranks, micro_batch_tokens // context),
        learning_rate=_round(rate),
        new_learning_rate=_round(new),
    )
    if not situation.has_parent:
        return replace(config, stages=[StageConfig("pretrain", tokens=config.tokens)])
    stages, left = [], config.tokens
    if model.is_recurrent:
        # Its gates, convolutions and decay start from an initialisation, not from the parent.
        # Blocks in which all parts are fitted gained nothing from alignment.
        tokens = min(config.tokens // 10, _ALIGN_TOKENS)
        if tokens:
            stages.append(
                StageConfig(
                    "align",
                    tokens=tokens,
                    learning_rate=_round(5 * short[0]),
                    new_learning_rate=_round(5 * short[1]),
                )
            )
            left -= tokens
    longest = min(_LONG_CONTEXT, model.max_position_embeddings)
    affordable = config.tokens >= _LONG_CONTEXT_RUN and longest > context
    long_tokens = left // 20 if affordable else 0
    stages.append(StageConfig("distill", tokens=left - long_tokens))
    if long_tokens:
        rows = max(1, rows * context // longest)
        stages.append(
            StageConfig(
                "distill",
                tokens=long_tokens,
                context_length=longest,
                batch_size=rows,
                micro_batch_size=_divisor(rows // situation.ranks, micro_batch_tokens // longest),
                learning_rate=_round(config.learning_rate / 10),
                new_learning_rate=_round(config.new_learning_rate / 10),
            )
        )
    return replace(config, stages=stages)


@dataclass(frozen=True)
class StageEstimate:
    """What one stage takes.

    Attributes:
        stage: kind and settings.
        steps: of the optimiser.
        trainable: parameters.
        memory: on one GPU.
        flops: for each token.
        seconds: of the stage; an estimate.
    """

    stage: Stage
    steps: int
    trainable: int
    memory: Memory
    flops: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """An estimate."""
        return self.steps * tokens_per_step(self.stage.settings) / self.seconds


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Attributes:
        total: parameters of the model.
        active: parameters that a token uses.
        stages: one estimate for each.
        device: its name.
        device_memory: bytes, None on a CPU.
    """

    total: int
    active: int
    stages: list[StageEstimate]
    device: str
    device_memory: int | None


def estimate(
    checkpoint: Path, config: TrainConfig, parent: Parent | None, *, ranks: int = 1
) -> Estimate:
    """Estimate what `train` takes with the same arguments. Writes and trains nothing.

    Opens all that `train` would read, but reads no weights and no text.

    Args:
        checkpoint: folder of the model.
        config: the train section.
        parent: to learn from.
        ranks: processes, each with a device such as this one.

    Raises:
        MolError: as `train` would before its first step, as far as file headers show the reason.
            Stages without data are accepted.
    """
    model = open_config(checkpoint)
    dense = None if parent is None else MoLConfig(**parent.mol_config_kwargs())
    count, device = count_parameters(model), default_device()
    speed = _flops_per_second(device, matmul_dtype(config, device)) * _UTILISATION[device.type]
    resolved = resolve(config, has_parent=parent is not None)
    has_parent = parent is not None
    check_stages(config, resolved, ranks, has_parent=has_parent, needs_data=False)
    check_contexts(config, resolved, model, parent)
    check_files(checkpoint, config, resolved, parent)
    tokens = sum(num_steps(s.settings) * tokens_per_step(s.settings) for s in resolved)
    # Compiled layers on a CPU need the memory of eager ones, as far as is known.
    compiled = device.type == "cuda" and should_compile(config, tokens, device)
    stages = [
        _estimate_stage(stage, model, dense, speed * ranks, device, ranks, compiled=compiled)
        for stage in resolved
    ]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Estimate(count.total, count.active, stages, properties.name, properties.total_memory)
    return Estimate(count.total, count.active, stages, "CPU", None)


def launch_seconds(settings: TrainConfig, layers: int, ranks: int) -> float:
    """Return the seconds to launch a step on a GPU without a CUDA graph: its lower bound."""
    micro_batches = settings.batch_size // (ranks * micro_batch_rows(settings, ranks))
    return micro_batches * layers * _LAUNCH_SECONDS


def _batch_shape(tokens: int, parameters: int, longest: int) -> tuple[int, int]:
    """Context length and rows of a step, a power of 2.

    Longer and more for more tokens, more for larger models.
    """
    context = 512 if tokens < 20_000_000 else 1024 if tokens < 200_000_000 else 2048
    context = max(2, min(context, longest, tokens))
    wanted = 2**15 if parameters < 500e6 else 2**17 if parameters < 3e9 else 2**19
    rows = max(1, min(wanted, tokens // _MIN_STEPS) // context)
    return context, 2 ** (rows.bit_length() - 1)


def _divisor(rows: int, at_most: int) -> int:
    """The largest divisor of `rows` that is no larger than `at_most`; 1 for no rows."""
    return next(size for size in range(max(1, at_most), 0, -1) if max(1, rows) % size == 0)


def _round(rate: float) -> float:
    """Two significant digits."""
    return float(f"{rate:.1e}")


def _estimate_stage(
    stage: Stage,
    model: MoLConfig,
    dense: MoLConfig | None,
    speed: float,
    device: torch.device,
    ranks: int,
    *,
    compiled: bool,
) -> StageEstimate:
    """speed: FLOP/s of all ranks together."""
    settings, align = stage.settings, stage.kind == "align"
    part = "mol" if align else settings.trainable
    trainable = _count_trainable(model, part, routers=trains_routers(settings, model))
    flops = training_flops(
        model,
        settings.context_length,
        parent=None if stage.kind == "pretrain" else dense,
        trainable=settings.trainable,
        layerwise=align,
        recompute=settings.gradient_checkpointing,
    )
    memory = training_memory(
        model,
        trainable=trainable,
        tokens=micro_batch_rows(settings, ranks) * settings.context_length,
        product_bytes=matmul_dtype(settings, device).itemsize,
        parent=dense,  # in memory in every stage
        logits_per_chunk=LOGITS_PER_CHUNK[device.type],
        layerwise=align,
        recompute=settings.gradient_checkpointing,
        compiled=compiled,
        ranks=ranks,
        whole=uses_optimizer_sharding(settings, model, device, ranks),
    )
    steps = num_steps(settings)
    seconds = tokens_per_step(settings) * flops / speed
    captured = compiled and not align and should_capture(settings, model, device, ranks)
    if device.type == "cuda" and not captured:
        seconds = max(seconds, launch_seconds(settings, model.num_hidden_layers, ranks))
    return StageEstimate(stage, steps, trainable, memory, flops, steps * seconds)


def _count_trainable(config: MoLConfig, part: str, *, routers: bool) -> int:
    with torch.device("meta"):
        model = MoLForCausalLM(config)
    set_trainable(model, part, routers=routers)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Time one large matrix product."""
    size = _TIMED_SIZE[device.type]
    a = torch.ones(size, size, device=device, dtype=dtype)
    a @ a  # the first one also loads the library
    times = []
    for _ in range(3):
        _synchronise(device)
        start = time.perf_counter()
        a @ a
        _synchronise(device)
        times.append(time.perf_counter() - start)
    return float(2 * size**3 / min(times))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
