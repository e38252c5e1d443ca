import pytest
import torch

from molcli.kernels import backend


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
    return request.param
