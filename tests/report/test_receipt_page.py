"""The receipt as a page."""

import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import pytest

from molcli.report.receipt_page import NAMES, receipt_page


@pytest.fixture(autouse=True)
def short_continuations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("molcli.stages.upcycle.comparison.NEW_TOKENS", 6)


@pytest.fixture
def full(tiny_parent: Callable[..., Path], convert: Callable[..., Any]) -> Any:
    return convert(tiny_parent("llama"), receipt="full", layers=[1], d_thin=16)


def test_the_page_shows_what_the_receipt_says(full: Any) -> None:
    receipt, page = full.receipt, (full.folder / "receipt.html").read_text(encoding="utf-8")
    assert page == receipt_page(receipt)
    for name, row in receipt["baselines"].items():
        assert f"<tr><td>{NAMES[name]}</td><td>{row['ce']:.3f}</td>" in page
    assert f"<tr><td>this model</td><td>{receipt['heldout']['ce']:.3f}</td>" in page
    for row in receipt["layers"]:
        assert f"<td>{row['residual_error']:.3f}</td>" in page
    for sample in receipt["continuations"]:
        assert all(escape(text) in page for text in sample.values())
    for word in (receipt["parent"]["fingerprint"], receipt["calibration"]["data"]):
        assert word in page
    assert page.count("<svg") == 5  # baselines, errors, sensitivity, load, errors by block


def test_a_large_model_makes_a_page_that_still_opens_at_once(full: Any) -> None:
    receipt = full.receipt
    row = receipt["layers"][1]
    row["routing"] |= {
        "load_share": [i / 2016 for i in range(64)],
        "delta_error": [None if i % 9 == 0 else i / 64 for i in range(64)],
    }
    receipt["layers"] = [row | {"layer": i} for i in range(80)]
    receipt["continuations"] = [dict.fromkeys(("prompt", "parent", "model"), "é" * 200)] * 3
    assert len(receipt_page(receipt).encode()) < 200_000


def test_whatever_was_not_measured_is_left_out(
    tiny_parent: Callable[..., Path], convert: Callable[..., Any]
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
