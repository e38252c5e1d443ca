"""What a run would take, before it takes it."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from molcli.config.sections import TrainConfig
from molcli.config.stages import Stage, resolve
from molcli.estimate.flops import training_flops
from molcli.estimate.memory import Memory, training_memory
from molcli.estimate.parameters import count_parameters
from molcli.families.parent import Parent
from molcli.maths.losses import LOGITS_PER_CHUNK
from molcli.model import MoLForCausalLM
from molcli.model.checkpoint import default_device, open_config
from molcli.model.configuration_mol import MoLConfig
from molcli.model.precision import matmul_dtype
from molcli.stages.train.batches import rows_at_once, step_tokens, steps_of
from molcli.stages.train.gradient_graph import worth_compiling, worth_recording
from molcli.stages.train.optimizer import set_trainable
from molcli.stages.train.plan import check_batches
from molcli.stages.train.sharding import keeps_whole

# Of a large matrix product's speed, what a step of many small ones gets: SmolLM2-135M on an
# H100, and its last layers, the others frozen, on two CPU cores.
_UTILISATION = {"cuda": 0.2, "cpu": 0.19}
# Seconds that a layer's forward and backward pass take, its parent's with them, however few rows
# they have, where no CUDA graph repeats them: SmolLM2-135M compiled on an H100.
_LAUNCHES = 0.008
_GEMM = {"cuda": 8192, "cpu": 1024}  # rows and columns of the product that is timed


@dataclass(frozen=True)
class StageEstimate:
    """One stage. trainable: parameters. memory: on one GPU. flops: a token. seconds: of training,
    a guess."""

    stage: Stage
    steps: int
    trainable: int
    memory: Memory
    flops: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """A guess."""
        return self.steps * step_tokens(self.stage.settings) / self.seconds


@dataclass(frozen=True)
class Estimate:
    """total, active: parameters. device: its name; device_memory: bytes, None on a CPU."""

    total: int
    active: int
    stages: list[StageEstimate]
    device: str
    device_memory: int | None


def estimate(
    checkpoint: Path, config: TrainConfig, parent: Parent | None, *, ranks: int = 1
) -> Estimate:
    """Of `train` with the same arguments on `ranks` such devices. Writes and trains nothing.

    Raises MolError for a folder that is no checkpoint, and a batch that they cannot share.
    """
    model = open_config(checkpoint)
    dense = None if parent is None else MoLConfig(**parent.mol_config_kwargs())
    count, device = count_parameters(model), default_device()
    speed = _products_per_second(device, matmul_dtype(config, device)) * _UTILISATION[device.type]
    resolved = resolve(config, has_parent=parent is not None)
    check_batches(config, resolved, ranks)
    tokens = sum(steps_of(s.settings) * step_tokens(s.settings) for s in resolved)
    # On a CPU they keep what eager ones do, as far as is known.
    compiled = device.type == "cuda" and worth_compiling(config, tokens, device)
    stages = [
        _stage(stage, model, dense, speed * ranks, device, ranks, compiled=compiled)
        for stage in resolved
    ]
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        return Estimate(count.total, count.active, stages, about.name, about.total_memory)
    return Estimate(count.total, count.active, stages, "CPU", None)


def _stage(
    stage: Stage,
    model: MoLConfig,
    dense: MoLConfig | None,
    speed: float,
    device: torch.device,
    ranks: int,
    *,
    compiled: bool,
) -> StageEstimate:
    settings, align = stage.settings, stage.kind == "align"
    at_once = rows_at_once(settings, ranks)
    parent = None if stage.kind == "pretrain" else dense
    trainable = _trainable(model, "mol" if align else settings.trainable)
    flops = training_flops(
        model,
        settings.context_length,
        parent=parent,
        trainable=settings.trainable,
        layerwise=align,
        recompute=settings.gradient_checkpointing,
    )
    memory = training_memory(
        model,
        trainable=trainable,
        tokens=at_once * settings.context_length,
        product_bytes=matmul_dtype(settings, device).itemsize,
        parent=dense,  # in memory in every stage
        logits_per_chunk=LOGITS_PER_CHUNK[device.type],
        layerwise=align,
        recompute=settings.gradient_checkpointing,
        compiled=compiled,
        ranks=ranks,
        whole=keeps_whole(settings, model, device, ranks),
    )
    steps = steps_of(settings)
    seconds = step_tokens(settings) * flops / speed
    recorded = compiled and not align and worth_recording(settings, model, device, ranks)
    if device.type == "cuda" and not recorded:
        seconds = max(seconds, launch_seconds(settings, model.num_hidden_layers, ranks))
    return StageEstimate(stage, steps, trainable, memory, flops, steps * seconds)


def launch_seconds(settings: TrainConfig, layers: int, ranks: int) -> float:
    """What a step takes to launch on a GPU where no CUDA graph repeats it: the least it takes."""
    micro_batches = settings.batch_size // (ranks * rows_at_once(settings, ranks))
    return micro_batches * layers * _LAUNCHES


def _trainable(config: MoLConfig, part: str) -> int:
    with torch.device("meta"):
        model = MoLForCausalLM(config)
    set_trainable(model, part)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _products_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product, timed here."""
    size = _GEMM[device.type]
    a = torch.ones(size, size, device=device, dtype=dtype)
    a @ a  # the first one also loads the library
    times = []
    for _ in range(3):
        _wait(device)
        start = time.perf_counter()
        a @ a
        _wait(device)
        times.append(time.perf_counter() - start)
    return float(2 * size**3 / min(times))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
