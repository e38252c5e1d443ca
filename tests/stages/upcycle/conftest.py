"""Calibrations and conversions of tiny parents."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from molcli.config.sections import CalibrateConfig, Recipe, UpcycleConfig
from molcli.families.parent import open_parent
from molcli.stages.calibrate import calibrate
from molcli.stages.upcycle import upcycle


@dataclass(frozen=True)
class Converted:
    """A converted checkpoint, its parent, and the calibration it was fitted to."""

    folder: Path
    parent: Path
    calibration: Path | None

    @property
    def receipt(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "receipt.json").read_text())
        return found

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "model.safetensors")

    @property
    def weights(self) -> bytes:
        return (self.folder / "model.safetensors").read_bytes()

    def model(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.folder).eval()

    def parent_model(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.parent).eval()

    def documents(self, rows: str) -> Iterator[Tensor]:
        """(1, tokens) each, of the rows "fit" or "heldout"."""
        assert self.calibration is not None
        tokens = load_file(self.calibration / "tokens.safetensors")
        for ids, document in zip(
            tokens[f"{rows}.input_ids"], tokens[f"{rows}.document_ids"], strict=True
        ):
            for number in document.unique():
                yield ids[document == number][None].long()


@dataclass
class Workshop:
    """Calibrates once per parent, and converts into new folders."""

    folder: Path
    calibrations: dict[tuple[Path, int], Path] = field(default_factory=dict)
    conversions: int = 0

    def calibration(self, parent: Path, tokens: int = 1024) -> Path:
        """Random tokens to fit on and 256 held out, in rows of 32 with one to three documents."""
        if (parent, tokens) not in self.calibrations:
            data = self.folder / "text.jsonl"
            out = self.folder / f"{parent.name}-calibration-{tokens}"
            generator = torch.Generator().manual_seed(0)
            lines = [
                json.dumps({"input_ids": torch.randint(3, 120, (n,), generator=generator).tolist()})
                for n in [40, 9, 25, 70] * 25
            ]
            data.write_text("\n".join(lines) + "\n")
            config = CalibrateConfig(
                str(data), tokens=tokens, heldout_tokens=256, context_length=32
            )
            calibrate(open_parent(parent), config, out)
            self.calibrations[parent, tokens] = out
        return self.calibrations[parent, tokens]

    def convert(self, parent: Path, tokens: int = 1024, **options: Any) -> Converted:
        """Fits blocks of `upcycle` options, which default to 1+2of5 at half the width.

        tokens: more of them where a test is about the fit's quality on other text.
        """
        out = self.folder / f"converted-{self.conversions}"
        self.conversions += 1
        settings = {"num_blocks": 5, "top_k": 2, "d_thin": 32} | options
        calibration = self.calibration(parent, tokens)
        recipe = Recipe(upcycle=UpcycleConfig(**settings))
        upcycle(open_parent(parent), calibration, recipe, out)
        return Converted(out, parent, calibration)


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


@pytest.fixture
def convert(workshop: Workshop) -> Callable[..., Converted]:
    return workshop.convert
