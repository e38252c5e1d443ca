"""Which number formats a device is good at."""

from typing import Literal

import torch


def fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies matrices in it natively, fp32 elsewhere."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def matmul_dtype(precision: Literal["auto", "bf16", "fp32"], device: torch.device) -> torch.dtype:
    """What `train.precision` makes student and parent multiply in."""
    if precision == "auto":
        return fast_dtype(device)
    return torch.bfloat16 if precision == "bf16" else torch.float32
