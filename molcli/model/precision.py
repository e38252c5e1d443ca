"""Which number formats a device is good at."""

import torch

from molcli.config.sections import TrainConfig


def fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies matrices in it natively, fp32 elsewhere."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def matmul_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """What student and parent multiply in; the student's weights are fp32 in any case."""
    if config.precision == "auto":
        return fast_dtype(device)
    return torch.bfloat16 if config.precision == "bf16" else torch.float32
