import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from molcli.kernels import backend

# Kernels with loops whose bounds are computed.
LOOPS = [
    "molcli.kernels.segment_attention.triton_kernels",
    "molcli.kernels.step_attention.triton_kernels",
]


@pytest.fixture(
    params=[pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", id="interpreted")]
)
def triton_device(request, monkeypatch) -> str:
    """The device Triton kernels run on: compiled on a GPU, or interpreted on a CPU."""
    pytest.importorskip("triton")
    if request.param == "cpu":
        if torch.cuda.is_available():
            pytest.skip("Triton compiles for the GPU here")
        monkeypatch.setattr(backend, "use_triton", lambda x: x.dtype in backend.DTYPES)
        for name in LOOPS:
            monkeypatch.setattr(importlib.import_module(name), "range", _range, raising=False)
    return request.param


def _range(*bounds: Any) -> range:
    """`range` for interpreted scalars. They are arrays of one element, which Triton before 3.7
    passes to int(), and NumPy 2.4 refuses."""
    return range(*(x.handle.data.item() if hasattr(x, "handle") else x for x in bounds))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill new tensors with NaN, so that outputs a kernel leaves unwritten are found."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def check() -> Callable[[str, Iterable[Tensor], Iterable[Tensor], Iterable[Tensor]], None]:
    """check(names, found, eager, truth): allow twice the error of eager operations in that dtype.

    The last two bits of float32 are always allowed: their error depends on the order of sums.
    """

    def compare(
        names: str, found: Iterable[Tensor], eager: Iterable[Tensor], truth: Iterable[Tensor]
    ) -> None:
        for name, a, e, b in zip(names.split(), found, eager, truth, strict=True):
            error, allowed = (((x.double() - b).norm() / b.norm()).item() for x in (a, e))
            print(f"{name}: {error:.2e} (eager {allowed:.2e})")
            assert a.shape == b.shape and a.dtype == e.dtype
            assert error <= 2 * allowed + 2.5e-7

    return compare
