"""Refuse weights that are NaN or infinite, by the tensor's name."""

from typing import TYPE_CHECKING

from torch import Tensor, aminmax, bfloat16, dtype, finfo, float16, float32, float64

from molcli.errors import MolError

if TYPE_CHECKING:  # it imports this module
    from molcli.files.tensors import TensorReader

FLOATS = {"F64": float64, "F32": float32, "F16": float16, "BF16": bfloat16}
_CHUNK_BYTES = 64 * 2**20  # of a large tensor, in memory at a time


def is_finite(tensor: Tensor) -> bool:
    """Return whether no entry is NaN or infinite; 20 times as fast as torch.isfinite on a CPU."""
    if not tensor.numel():
        return True
    low, high = aminmax(tensor)
    return bool(low.isfinite() & high.isfinite())


def check_finite(name: str, tensor: Tensor, source: object) -> None:
    """Refuse a tensor that is not finite.

    Args:
        name: of the tensor.
        tensor: floating point.
        source: the folder that it was read from, for the message.

    Raises:
        MolError: if an entry is NaN or infinite, or if the entries are whole numbers.
    """
    if not tensor.is_floating_point():
        raise MolError(
            f"{name} in {source} is stored as {tensor.dtype}",
            allowed="weights stored as bfloat16, float16 or float32",
        )
    if not is_finite(tensor):
        raise MolError(
            f"{name} in {source} has entries that are NaN or infinite",
            allowed="finite weights",
            hint="download the weights again, or use an earlier checkpoint",
        )


def check_all_finite(reader: "TensorReader") -> None:
    """Read all tensors of a folder once, a part at a time.

    Raises:
        MolError: if an entry of one is NaN or infinite.
    """
    for name, info in reader.tensors.items():
        if info.dtype not in FLOATS:
            continue
        rows = info.shape[0] if info.shape else 1
        if info.num_bytes <= _CHUNK_BYTES or rows == 1:
            check_finite(name, reader.read(name), reader.folder)
            continue
        step = max(1, rows * _CHUNK_BYTES // info.num_bytes)
        for first in range(0, rows, step):
            part = reader.read(name, slice(first, first + step))
            check_finite(name, part, reader.folder)


def cast(name: str, tensor: Tensor, to: dtype) -> Tensor:
    """Return the tensor in another dtype.

    Raises:
        MolError: if a finite entry is too large for it.
    """
    result = tensor.to(to)
    narrower = finfo(to).max < finfo(tensor.dtype).max
    if narrower and not is_finite(result) and is_finite(tensor):
        raise MolError(
            f"{name} has entries up to {tensor.abs().max().item():.3g}, too large for {to}",
            allowed=f"entries of at most {finfo(to).max:.3g}",
            hint="store the weights as float32",
        )
    return result
