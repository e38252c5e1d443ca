"""Provide the text to fit on and the text held out, and the parent's second moments on the former.

Inputs: a source of text, or the folder that `molcli calibrate` wrote. Outputs: packed rows of both
texts; by layer, second moments (d_model, d_model) float64.
"""

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, float64
from transformers import PreTrainedTokenizerBase

from molcli.config.bounds import check_fields
from molcli.config.sections import CalibrateConfig, Recipe, SampleConfig
from molcli.config.stages import repeats_in_force
from molcli.data.checked import SUM, sum_of
from molcli.data.mixture import load_rows
from molcli.data.packing import TokenRows
from molcli.data.repeats import list_tokens, with_repeats
from molcli.errors import MolError
from molcli.families.parent import Parent
from molcli.files.checksums import file_sha256
from molcli.files.finite import is_finite
from molcli.files.json_files import read_object, shortened
from molcli.files.regular import check_regular

T = TypeVar("T")
INDEX, TOKENS = "calibration.json", "tokens.safetensors"
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "parent": str,
    "data": str,
    "tokens": int,
    "heldout_tokens": int,
    "config": dict,
}


@dataclass(frozen=True)
class Calibration:
    """A folder that `molcli calibrate` wrote.

    fit, heldout: packed rows. about: the contents of calibration.json but for its sums.
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
            both = _read_moments(self.folder, layer)
            return (both["attention"] + both["mlp"]) / 2

    def in_force(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the values that this calibration's text was made with.

        calibrate.seed stays: what uses a calibration draws from its own seed.
        """
        # Calibrations of earlier versions do not know of repeats, and have none.
        calibrate = {"repeats": 0.0, **self.about["config"], "seed": recipe.calibrate.seed}
        sampled = self.about.get("sampled")
        return replace(
            recipe,
            calibrate=_section(CalibrateConfig, calibrate),
            sample=recipe.sample if sampled is None else _section(SampleConfig, sampled),
        )


def moments_file(folder: Path, layer: int) -> Path:
    """Return the file of a layer's second moments: `attention` and `mlp`, (d_model, d_model)
    float64 each."""
    return folder / f"moments-{layer:05d}.safetensors"


def open_calibration(folder: Path, parent: Parent | None) -> Calibration:
    """Open a calibration, and check that it is complete and as it was written.

    Calibrations of earlier versions have no sums, and are checked for all else.

    parent: whose calibration it must be; None allows any.

    Raises:
        MolError: if the folder is not a complete calibration of this parent, or if its held-out
        rows have no token to predict.
    """
    with _readable(folder):
        about = _read_index(folder)
        _check_sum(folder, TOKENS, about)
        check_regular(folder / TOKENS)
        tensors = load_file(folder / TOKENS)
        fit, heldout = (
            TokenRows(*(tensors[f"{n}.{f}"] for f in ("input_ids", "document_ids", "lengths")))
            for n in ("fit", "heldout")
        )
        if text_hash(fit, heldout) != about["data"]:
            raise ValueError(f"{TOKENS} holds other tokens than {INDEX} says")
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
    # Check the files of all layers first: else a late layer's would fail after hours of work.
    with _readable(folder):
        for layer in range(0 if parent is None else parent.config.num_hidden_layers):
            assert parent is not None
            path = moments_file(folder, layer)
            _check_sum(folder, path.name, about)
            moments, width = _read_moments(folder, layer), parent.config.hidden_size
            for name, moment in moments.items():
                if (moment.dtype, moment.shape) != (float64, (width, width)):
                    raise ValueError(f"{name} in {path.name} is not {width} x {width} float64")
    if not heldout.num_targets:
        raise MolError(
            f"in the held-out text of the calibration {folder}, no token follows another one",
            allowed="a calibration on documents of 2 tokens or more",
            hint="molcli calibrate PARENT NEW_FOLDER --data OTHER.txt",
        )
    about.pop("files", None)  # checked; of no use to a receipt
    return Calibration(folder, fit, heldout, about)


def split_text(
    config: CalibrateConfig, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> tuple[TokenRows, TokenRows]:
    """Read config.data once and split it into rows to fit on and rows held out.

    The held-out rows come last, and are as they were read. Of the rows to fit on, a part
    (`config.repeats`) repeats itself, made from these rows alone.

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
    share = repeats_in_force(config.repeats, config.context_length)
    tokens = list_tokens(tokenizer, vocab_size)
    fit = with_repeats(rows.select(slice(0, first)), share, config.seed, tokens)
    return fit, kept


def text_hash(fit: TokenRows, heldout: TokenRows) -> str:
    """Return the sha256 of the tokens of both and of their document boundaries."""
    return hashlib.sha256((fit.fingerprint() + heldout.fingerprint()).encode()).hexdigest()


def _read_index(folder: Path) -> dict[str, Any]:
    about = read_object(folder / INDEX, _FIELDS, allowed="", hint="")
    own = about.pop(SUM, None)
    if own is not None and own != sum_of(about):
        raise ValueError(f"the content of {INDEX} does not have its sha256: it was changed")
    check_fields("calibrate", _section(CalibrateConfig, about["config"]), CalibrateConfig)
    if about.get("sampled") is not None:
        check_fields("sample", _section(SampleConfig, about["sampled"]), SampleConfig)
    return about


def _section(kind: type[T], values: dict[str, Any]) -> T:
    """Return a section of a recipe; keys of other versions are left out."""
    known = inspect.signature(kind).parameters
    return kind(**{name: value for name, value in values.items() if name in known})


def _read_moments(folder: Path, layer: int) -> dict[str, Tensor]:
    """Read the moments of a layer, and refuse those that no text gives.

    A channel may be empty, but not all: at unit rms, the trace is the width.
    """
    path = moments_file(folder, layer)
    check_regular(path)
    tensors = load_file(path)
    moments = {name: tensors[name] for name in ("attention", "mlp")}
    for name, moment in moments.items():
        if moment.ndim != 2 or not is_finite(moment) or moment.trace() <= 0:
            raise ValueError(f"{name} in {path.name} is zero or not finite")
    return moments


def _check_sum(folder: Path, name: str, about: dict[str, Any]) -> None:
    """Compare a file with its sum in the index, if that has sums."""
    if "files" in about and file_sha256(folder / name) != about["files"][name]:
        raise ValueError(f"{name} does not have the sha256 that {INDEX} gives: it was changed")


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Raise MolError for whatever goes wrong when a damaged calibration is read."""
    try:
        yield
    except (
        OSError,
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        SafetensorError,
        MolError,
    ) as error:
        problem = error.found if isinstance(error, MolError) else shortened(error, 300)
        raise MolError(
            f"{folder} is not a calibration, or damaged: {problem}",
            allowed="a folder that `molcli calibrate` wrote",
            hint="leave --calibration out, and upcycle calibrates by itself",
        ) from error
