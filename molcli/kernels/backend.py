"""Whether Triton's kernels can serve a tensor."""

import importlib.util

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int64)
# Looked up here: a look-up inside a compiled layer would cut its graph in two.
_INSTALLED = importlib.util.find_spec("triton") is not None


def on_triton(x: Tensor) -> bool:
    """On a CUDA device, in a dtype that the kernels know, with Triton installed."""
    return _INSTALLED and x.dtype in DTYPES and x.is_cuda
