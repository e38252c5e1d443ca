"""Whether a run's layers and loss are compiled."""

import torch

from molcli.config.sections import TrainConfig

# Tokens that pay for the minute of compiling.
COMPILED_FROM = 5_000_000


def worth_compiling(config: TrainConfig, tokens: int, device: torch.device) -> bool:
    """tokens: of all stages. `train.compile` decides where it is not "auto"."""
    if isinstance(config.compile, bool):
        return config.compile
    # Every other number of blocks would be compiled anew.
    same_top_k = config.start_top_k is None
    return device.type == "cuda" and tokens >= COMPILED_FROM and same_top_k
