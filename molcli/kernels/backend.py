"""Which backend runs a kernel: Triton, or the eager reference."""

import importlib.util

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int64)
HALF_DTYPES = (torch.bfloat16, torch.float16)
# Found once, at import: a search inside a compiled layer would break its graph.
_INSTALLED = importlib.util.find_spec("triton") is not None


def use_triton(x: Tensor) -> bool:
    """Return whether the Triton kernels can run on `x`.

    Callers write `backend.use_triton(x)`, so that tests can replace it and run the kernels in
    Triton's interpreter on a CPU.

    Args:
        x: the operation's main input.

    Returns:
        True if Triton is installed, `x` is on a CUDA device, and its dtype is one of `DTYPES`.
    """
    return _INSTALLED and x.dtype in DTYPES and x.is_cuda
