"""Choose the dtype of matrix products for a device."""

import torch

from molcli.config.sections import TrainConfig


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the device multiplies matrices in it natively, else float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def matmul_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products of student and parent.

    The student's weights are float32 in any case.
    """
    if config.precision == "auto":
        return fast_dtype(device)
    return torch.bfloat16 if config.precision == "bf16" else torch.float32
