import importlib
from typing import Any

import pytest
import torch

from molcli.kernels import backend

# Kernels with loops whose bounds they compute.
LOOPS = ["molcli.kernels.segment_attention.triton_kernels"]


@pytest.fixture(
    params=[pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", id="interpreted")]
)
def triton_device(request, monkeypatch) -> str:
    """Where Triton's kernels run: compiled on a GPU, or interpreted on a CPU."""
    pytest.importorskip("triton")
    if request.param == "cpu":
        if torch.cuda.is_available():
            pytest.skip("Triton compiles for the GPU here")
        monkeypatch.setattr(backend, "on_triton", lambda x: x.dtype in backend.DTYPES)
        for name in LOOPS:
            monkeypatch.setattr(importlib.import_module(name), "range", _range, raising=False)
    return request.param


def _range(*bounds: Any) -> range:
    """Interpreted scalars are arrays of one element: NumPy 2.4 makes no int of them, as Triton
    before 3.7 would have it."""
    return range(*(x.handle.data.item() if hasattr(x, "handle") else x for x in bounds))
