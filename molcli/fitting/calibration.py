"""Provide the text to fit on and the text held out, and the parent's second moments on the former.

Inputs: a source of text, or the folder that `molcli calibrate` wrote. Outputs: packed rows of both
texts; by layer, second moments (d_model, d_model) float64.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molcli.config.sections import CalibrateConfig
from molcli.data.mixture import load_rows
from molcli.data.packing import TokenRows
from molcli.errors import MolError
from molcli.families.parent import Parent


@dataclass(frozen=True)
class Calibration:
    """A folder that `molcli calibrate` wrote.

    fit, heldout: packed rows. about: the contents of calibration.json.
    """

    folder: Path
    fit: TokenRows
    heldout: TokenRows
    about: dict[str, Any]

    def moment(self, layer: int) -> Tensor:
        """Return the second moment of the unit-rms residual in a layer, (d_model, d_model) float64.

        The mean of those before attention and before the FFN.
        """
        with _readable(self.folder):
            both = load_file(moments_file(self.folder, layer))
            return (both["attention"] + both["mlp"]) / 2


def moments_file(folder: Path, layer: int) -> Path:
    """Return the file of a layer's second moments: `attention` and `mlp`, (d_model, d_model)
    float64 each."""
    return folder / f"moments-{layer:05d}.safetensors"


def open_calibration(folder: Path, parent: Parent | None) -> Calibration:
    """Open a calibration, and check that it is complete.

    parent: whose calibration it must be; None allows any.

    Raises:
        MolError: if the folder is not a complete calibration of this parent, or if its held-out
        rows have no token to predict.
    """
    with _readable(folder):
        about = json.loads((folder / "calibration.json").read_text())
        tensors = load_file(folder / "tokens.safetensors")
        fit, heldout = (
            TokenRows(*(tensors[f"{n}.{f}"] for f in ("input_ids", "document_ids", "lengths")))
            for n in ("fit", "heldout")
        )
        of_parent = about["parent"]
    if parent is not None and of_parent != parent.fingerprint():
        raise MolError(
            f"the calibration {folder} belongs to another parent than {parent.name}",
            allowed="a calibration of the same weights",
            hint=f"molcli calibrate {parent.name} NEW_FOLDER",
        )
    if parent is not None:
        for rows in (fit, heldout):
            length = rows.input_ids.shape[1]
            parent.check_context(
                length,
                "calibrate.context_length",
                found=f"the calibration {folder} has rows of {length} tokens",
            )
    # Check the headers of all layers first: else a late layer's would fail after hours of work.
    with _readable(folder):
        for layer in range(0 if parent is None else parent.config.num_hidden_layers):
            with safe_open(moments_file(folder, layer), "pt") as file:
                for name in ("attention", "mlp"):
                    file.get_slice(name)
    if not heldout.num_targets:
        raise MolError(
            f"in the held-out text of the calibration {folder}, no token follows another one",
            allowed="a calibration on documents of 2 tokens or more",
            hint="molcli calibrate PARENT NEW_FOLDER --data OTHER.txt",
        )
    return Calibration(folder, fit, heldout, about)


def split_text(
    config: CalibrateConfig, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> tuple[TokenRows, TokenRows]:
    """Read config.data once and split it into rows to fit on and rows held out.

    The held-out rows come last.

    Raises:
        MolError: if there is no text, too little for one row of each, or if the held-out rows
        have no token to predict.
    """
    if config.data is None:
        raise MolError(
            "there is no text to calibrate on", allowed="calibrate.data: a source of text"
        )
    rows = load_rows(
        config.data,
        tokenizer,
        vocab_size=vocab_size,
        length=config.context_length,
        limit=config.tokens + config.heldout_tokens,
        seed=config.seed,
    ).without_repeats()
    wanted = max(1, config.heldout_tokens // config.context_length)
    # Of a short text, at most half is held out.
    heldout = min(wanted, max(1, len(rows) // 2))
    if len(rows) < 2:
        raise MolError(
            f"calibrate.data fills {len(rows)} row of {config.context_length} tokens",
            allowed="at least 2 rows: one to fit on, one held out",
            hint="give more text, or a shorter calibrate.context_length",
        )
    first = len(rows) - heldout
    kept = rows.select(slice(first, None))
    if not kept.num_targets:
        raise MolError(
            "in the text held out of calibrate.data, no token follows another one",
            allowed="documents of 2 tokens or more",
            hint="give longer documents, or more calibrate.heldout_tokens",
        )
    return rows.select(slice(0, first)), kept


def text_hash(fit: TokenRows, heldout: TokenRows) -> str:
    """Return the sha256 of the tokens of both and of their document boundaries."""
    return hashlib.sha256((fit.fingerprint() + heldout.fingerprint()).encode()).hexdigest()


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Raise MolError for whatever goes wrong when a damaged calibration is read."""
    try:
        yield
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise MolError(
            f"{folder} is not a calibration: {error}",
            allowed="a folder that `molcli calibrate` wrote",
            hint="leave --calibration out, and upcycle calibrates by itself",
        ) from error
