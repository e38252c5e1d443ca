"""Whether a run's layers and loss are compiled, and its micro-batches recorded."""

import torch

from molcli.config.sections import TrainConfig
from molcli.model import MoLConfig
from molcli.model.rotary import reads_positions_back

# Tokens that pay for the minute of compiling.
COMPILED_FROM = 5_000_000


def worth_compiling(config: TrainConfig, tokens: int, device: torch.device) -> bool:
    """tokens: of all stages. `train.compile` decides where it is not "auto"."""
    if isinstance(config.compile, bool):
        return config.compile
    # Every other number of blocks would be compiled anew.
    same_top_k = config.start_top_k is None
    return device.type == "cuda" and tokens >= COMPILED_FROM and same_top_k


def worth_recording(
    config: TrainConfig, model: MoLConfig, device: torch.device, ranks: int
) -> bool:
    """Whether compiled micro-batches are repeated from a CUDA graph (`GradientGraph`): not where
    processes wait for one another, where the disk or the largest position has a say, where layers
    run twice, or change, nor with Gated DeltaNet, whose gradients have not been seen in a graph.
    """
    alone = device.type == "cuda" and ranks == 1
    told = config.logits is not None or reads_positions_back(model)
    twice = config.gradient_checkpointing or config.start_top_k is not None
    recurrent = any(kind.endswith("gated_deltanet") for kind in model.layer_kinds)
    return alone and not (told or twice or recurrent)
