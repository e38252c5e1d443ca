"""Read the folder that calibration wrote."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from molcli.errors import MolError
from molcli.io.packing import TokenRows
from molcli.io.parent import Parent


@dataclass(frozen=True)
class Calibration:
    """fit, heldout: packed rows. about: what calibration wrote about itself."""

    folder: Path
    fit: TokenRows
    heldout: TokenRows
    about: dict[str, Any]

    def moment(self, layer: int) -> Tensor:
        """(d_model, d_model) float64, of the unit-rms residual that attention and FFN read,
        averaged over the two."""
        with _readable(self.folder), safe_open(self.folder / "moments.safetensors", "pt") as file:
            both = [file.get_tensor(f"layers.{layer}.{name}") for name in ("attention", "mlp")]
        return (both[0] + both[1]) / 2


def open_calibration(folder: Path, parent: Parent) -> Calibration:
    """Raises MolError if the folder is not a whole calibration of this parent, or if there is
    nothing to measure on its held-out rows."""
    with _readable(folder):
        about = json.loads((folder / "calibration.json").read_text())
        tensors = load_file(folder / "tokens.safetensors")
        fit, heldout = (
            TokenRows(*(tensors[f"{n}.{f}"] for f in ("input_ids", "document_ids", "lengths")))
            for n in ("fit", "heldout")
        )
        of_parent = about["parent"]
    if of_parent != parent.fingerprint():
        raise MolError(
            f"the calibration {folder} belongs to another parent than {parent.name}",
            allowed="a calibration of the same weights",
            hint=f"molcli calibrate {parent.name} NEW_FOLDER",
        )
    if not heldout.predicted:
        raise MolError(
            f"in the held-out text of the calibration {folder}, no token follows another one",
            allowed="a calibration on documents of 2 tokens or more",
            hint=f"molcli calibrate {parent.name} NEW_FOLDER --data OTHER.txt",
        )
    return Calibration(folder, fit, heldout, about)


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise MolError(
            f"{folder} is not a calibration: {error}",
            allowed="a folder that `molcli calibrate` wrote",
            hint="leave --calibration out, and upcycle calibrates by itself",
        ) from error
