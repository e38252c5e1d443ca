"""The receipt of a conversion as an HTML page."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch

from molcli.config.sections import CalibrateConfig, Recipe, UpcycleConfig
from molcli.families.parent import open_parent
from molcli.report.receipt import BASELINE_NAMES, receipt_page
from molcli.stages.calibrate import calibrate
from molcli.stages.upcycle import upcycle


@dataclass(frozen=True)
class Converted:
    """A converted checkpoint."""

    folder: Path

    @property
    def receipt(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "receipt.json").read_text())
        return found


@pytest.fixture(autouse=True)
def short_continuations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("molcli.stages.upcycle.comparison.NEW_TOKENS", 6)


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., Converted]:
    """Calibrate on random tokens and upcycle; `upcycle` options default to 1+2of5, width 32."""
    numbers = itertools.count()

    def convert(parent: Path, **options: Any) -> Converted:
        number = next(numbers)
        data = tmp_path / "text.jsonl"
        calibration, out = tmp_path / f"calibration-{number}", tmp_path / f"converted-{number}"
        generator = torch.Generator().manual_seed(0)
        lines = [
            json.dumps({"input_ids": torch.randint(3, 120, (n,), generator=generator).tolist()})
            for n in [40, 9, 25, 70] * 25
        ]
        data.write_text("\n".join(lines) + "\n")
        config = CalibrateConfig(str(data), tokens=1024, heldout_tokens=256, context_length=32)
        calibrate(open_parent(parent), config, calibration)
        settings = {"num_blocks": 5, "top_k": 2, "d_thin": 32} | options
        upcycle(open_parent(parent), calibration, Recipe(upcycle=UpcycleConfig(**settings)), out)
        return Converted(out)

    return convert


@pytest.fixture
def full(tiny_parent: Callable[..., Path], convert: Callable[..., Converted]) -> Converted:
    return convert(tiny_parent("llama"), receipt="full", layers=[1], d_thin=16)


def test_the_page_shows_the_content_of_the_receipt(full: Converted) -> None:
    receipt, page = full.receipt, (full.folder / "receipt.html").read_text(encoding="utf-8")
    assert page == receipt_page(receipt)
    for name, row in receipt["baselines"].items():
        assert f"<tr><td>{BASELINE_NAMES[name]}</td><td>{row['ce']:.3f}</td>" in page
    assert f"<tr><td>this model</td><td>{receipt['heldout']['ce']:.3f}</td>" in page
    for row in receipt["layers"]:
        assert f"<td>{row['residual_error']:.3f}</td>" in page
    for sample in receipt["continuations"]:
        assert all(escape(text) in page for text in sample.values())
    for word in (receipt["parent"]["fingerprint"], receipt["calibration"]["data"]):
        assert word in page
    assert page.count("<svg") == 5  # baselines, errors, sensitivity, load, errors by block


def test_the_page_of_a_large_model_stays_small(full: Converted) -> None:
    receipt = full.receipt
    row = receipt["layers"][1]
    row["routing"] |= {
        "load_share": [i / 2016 for i in range(64)],
        "delta_error": [None if i % 9 == 0 else i / 64 for i in range(64)],
    }
    receipt["layers"] = [row | {"layer": i} for i in range(80)]
    receipt["continuations"] = [dict.fromkeys(("prompt", "parent", "model"), "é" * 200)] * 3
    assert len(receipt_page(receipt).encode()) < 200_000


def test_missing_measurements_are_omitted(
    tiny_parent: Callable[..., Path], convert: Callable[..., Converted]
) -> None:
    parent = tiny_parent("llama", num_hidden_layers=1)
    short = convert(parent).receipt
    assert receipt_page(short).count("<svg") == 3  # errors, load, errors by block
    whole = convert(parent, num_blocks=1, top_k=0, d_thin=64).receipt
    assert "Routing" not in receipt_page(whole)
    without_text = json.loads(json.dumps(whole)) | {"heldout": None, "calibration": None}
    for gone in ("delta_error", "norm_ratio", "residual_error", "residual_error_fit", "routing"):
        del without_text["layers"][0][gone]
    assert receipt_page(without_text).count("<svg") == 0
