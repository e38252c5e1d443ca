"""Whether Triton's kernels can serve a tensor."""

import functools
import importlib.util

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int64)


def on_triton(x: Tensor) -> bool:
    """On a CUDA device, in a dtype that the kernels know, with Triton installed."""
    return x.is_cuda and x.dtype in DTYPES and _installed()


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
