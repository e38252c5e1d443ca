"""The receipt's figures, compared with models that are built and run in another way."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

from molcli.config.sections import CalibrateConfig, Recipe
from molcli.data.packing import TokenRows
from molcli.errors import MolError
from molcli.families.parent import open_parent
from molcli.fitting.calibration import text_hash
from molcli.model.parent import load_dense
from molcli.stages.calibrate import calibrate
from molcli.stages.upcycle import upcycle


@pytest.fixture(autouse=True)
def short_continuations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("molcli.stages.upcycle.comparison.NEW_TOKENS", 6)


@torch.no_grad()
def losses(converted: Any, model: nn.Module) -> dict[str, float]:
    """Losses of the held-out documents, one at a time, computed with transformers."""
    parent, sums, count = converted.parent_model(), torch.zeros(2, dtype=torch.float64), 0
    for ids in converted.documents("heldout"):
        log_q, log_p = (m(ids).logits[0, :-1].double().log_softmax(-1) for m in (model, parent))
        label = ids[0, 1:, None]
        kl = (log_p.exp() * (log_p - log_q)).sum()
        sums += torch.stack([-log_q.gather(1, label).sum(), kl])
        count += label.numel()
    ce, kl_mean = (sums / count).tolist()
    return {"ce": ce, "kl": kl_mean}


@pytest.fixture
def full(tiny_parent: Callable[..., Path], convert: Callable[..., Any]) -> Any:
    """Three of four layers converted, to about half of the parent's active parameters."""
    parent = tiny_parent("llama", num_hidden_layers=4)
    shape = {"layers": [1, 2, 3], "d_thin": 16, "num_blocks": 4, "top_k": 1}
    return convert(parent, receipt="full", **shape)


def test_figures_are_those_of_models_built_by_hand(full: Any) -> None:
    receipt, parent = full.receipt, open_parent(full.parent)
    baselines, rows = receipt["baselines"], receipt["layers"]
    assert list(baselines) == ["skipped", "random", "svd", "pca", "depth_pruned"]
    sizes = {name: (row["params_total"], row["params_active"]) for name, row in baselines.items()}
    whole = receipt["parameters"]["total"], receipt["parameters"]["active"]
    assert sizes["random"] == sizes["svd"] == sizes["pca"] == whole

    skipped = full.parent_model()
    del skipped.model.layers[1:]
    pruned, dropped = full.parent_model(), baselines["depth_pruned"]["layers"]
    for i in reversed(dropped):
        del pruned.model.layers[i]
    for name, model in (("skipped", skipped), ("depth_pruned", pruned)):
        found = {key: baselines[name][key] for key in ("ce", "kl")}
        assert found == pytest.approx(losses(full, model), rel=1e-4)
        assert sizes[name] == (model.num_parameters(), model.num_parameters())
    one_layer = (receipt["parameters"]["parent"] - sizes["skipped"][0]) // 3
    assert 0 <= receipt["parameters"]["active"] - sizes["depth_pruned"][0] < one_layer

    student = full.model()
    assert "sensitivity" not in rows[0]
    for i in (1, 2, 3):
        model = load_dense(parent, torch.float32, torch.device("cpu"))
        model.model.layers[i] = student.model.layers[i]
        assert rows[i]["sensitivity"] == pytest.approx(losses(full, model)["kl"], rel=1e-4)


@torch.no_grad()
def test_pruning_drops_the_layers_that_rotate_the_residual_least(full: Any) -> None:
    states: list[list[torch.Tensor]] = [[] for _ in range(5)]
    parent = full.parent_model()
    parent.model.norm = nn.Identity()  # else the last state is normalised
    for ids in full.documents("fit"):
        for i, state in enumerate(parent(ids, output_hidden_states=True).hidden_states):
            states[i].append(state[0])
    x = [torch.cat(parts) for parts in states]
    rotation = [1 - torch.cosine_similarity(a, b, dim=-1).mean() for a, b in pairwise(x)]
    dropped = full.receipt["baselines"]["depth_pruned"]["layers"]
    assert set(dropped) == set(torch.stack(rotation).argsort()[: len(dropped)].tolist())


def test_a_student_as_large_as_its_parent_is_not_compared_with_a_pruned_one(
    tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    found = convert(tiny_parent("llama", num_hidden_layers=1), receipt="full").receipt
    assert found["parameters"]["active"] > found["parameters"]["parent"]
    assert "depth_pruned" not in found["baselines"]


def test_routing_figures_agree_with_each_other(full: Any) -> None:
    """Each visit counts once in its block's error: their load-weighted mean is the layer's."""
    for row in full.receipt["layers"][1:]:
        routing = row["routing"]
        assert sum(routing["load_share"]) == pytest.approx(1)
        assert routing["margin"] > 0
        errors = [0.0 if error is None else error for error in routing["delta_error"]]
        mean = sum(a * b for a, b in zip(errors, routing["load_share"], strict=True))
        assert mean == pytest.approx(row["delta_error"], rel=1e-5)
        assert row["norm_ratio"] > 0
    assert "routing" not in full.receipt["layers"][0]
    assert full.receipt["layers"][0]["norm_ratio"] == 1


@torch.no_grad()
def test_continuations_are_the_models_own(full: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(full.parent)
    documents = [ids for ids in full.documents("heldout") if ids.shape[1] >= 16]
    samples = full.receipt["continuations"]
    assert len(samples) == 3
    for ids, sample in zip(documents, samples, strict=False):
        prompt = ids[:, :16]
        for name, model in (("parent", full.parent_model()), ("model", full.model())):
            out = model.generate(prompt, max_new_tokens=6, do_sample=False)[0]
            whole = tokenizer.decode(out, skip_special_tokens=True)
            assert sample["prompt"] + sample[name] == whole


def test_without_a_tokenizer_there_are_no_continuations(
    tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    parent = tiny_parent("llama", num_hidden_layers=1, tokenizer=False)
    assert convert(parent, receipt="full").receipt["continuations"] is None


def test_a_short_receipt_has_no_comparison(
    tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    found = convert(tiny_parent("llama", num_hidden_layers=1)).receipt
    assert found["baselines"] is found["continuations"] is None
    assert "sensitivity" not in found["layers"][0]


def test_text_without_a_predicted_token_is_refused(
    tmp_path: Path, tiny_parent: Callable[..., Path], workshop: Any
) -> None:
    """By calibration, and by a conversion with an older calibration."""
    folder = tiny_parent("llama")
    parent, data = open_parent(folder), tmp_path / "single.jsonl"
    data.write_text("".join(json.dumps({"input_ids": [3 + i % 90]}) + "\n" for i in range(128)))
    config = CalibrateConfig(str(data), tokens=64, heldout_tokens=64, context_length=32)
    with pytest.raises(MolError, match="no token follows another one"):
        calibrate(parent, config, tmp_path / "calibration")
    assert not (tmp_path / "calibration").exists()

    tokens = workshop.calibration(folder) / "tokens.safetensors"
    rows = load_file(tokens)
    rows["heldout.document_ids"] = torch.arange(32, dtype=torch.int32).repeat(8, 1)
    save_file(rows, tokens)
    index = tokens.with_name("calibration.json")
    about = json.loads(index.read_text())
    del about["files"], about["sha256"]  # as of an earlier version, which wrote no sums
    fields = ("input_ids", "document_ids", "lengths")
    about["data"] = text_hash(
        *(TokenRows(*(rows[f"{part}.{field}"] for field in fields)) for part in ("fit", "heldout"))
    )
    index.write_text(json.dumps(about))
    with pytest.raises(MolError, match="no token follows another one"):
        upcycle(parent, tokens.parent, Recipe(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
