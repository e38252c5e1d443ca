"""Which number formats a device is good at."""

import torch


def fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies matrices in it natively, fp32 elsewhere."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32
