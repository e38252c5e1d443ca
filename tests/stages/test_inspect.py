"""The routing report of a tiny model matches the routing of each document alone."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from molcli.cli import main as command
from molcli.config.sections import InspectConfig
from molcli.errors import MolError
from molcli.model import MoLConfig, MoLForCausalLM
from molcli.stages.inspect import inspect_routing

DOCUMENTS = [[5, 9, 9, 2, 30], [7] * 11, [1, 2, 3], [4, 8, 15, 16, 23, 42, 8, 4]]
CONFIG = InspectConfig(tokens=1000, context_length=32, batch_size=2)


def checkpoint(folder: Path, **changes: object) -> Path:
    torch.manual_seed(0)
    settings = dict(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        head_dim=16,
        intermediate_size=32,
        layer_structures=["mixture", "dense", "mixture"],
        layer_mixers=["attention", "attention", "gated_deltanet"],
        num_blocks=5,
        num_shared_blocks=1,
        num_blocks_per_tok=2,
        d_thin=16,
        d_ff_thin=16,
    )
    MoLForCausalLM(MoLConfig(**(settings | changes))).save_pretrained(folder)
    return folder


def corpus(folder: Path) -> str:
    path = folder / "tokens.jsonl"
    path.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in DOCUMENTS))
    return str(path)


def test_the_report_agrees_with_routing_each_document_alone(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    report = inspect_routing(folder, corpus(tmp_path), CONFIG)
    assert [(layer.layer, layer.mixer) for layer in report.layers] == [
        (0, "mixture, attention"),
        (2, "mixture, gated_deltanet"),
    ]
    assert report.tokens == sum(map(len, DOCUMENTS))
    assert (report.num_shared_blocks, report.num_routed_blocks, report.top_k) == (1, 4, 2)
    model = MoLForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        alone = [model.model(torch.tensor([ids])).routing for ids in DOCUMENTS]
    for index, layer in enumerate(report.layers):
        loads, gaps = [0] * 4, []
        for routings in alone:
            blocks = routings[index].blocks.tolist()
            for block in range(4):
                seen = [i for i, chosen in enumerate(blocks) if block in chosen]
                loads[block] += len(seen)
                gaps += [b - a for a, b in pairwise(seen)]
        assert layer.summary.coverage == pytest.approx([load / report.tokens for load in loads])
        assert layer.summary.layer_mean_gap == pytest.approx(sum(gaps) / len(gaps))


def test_the_batch_size_changes_nothing(tmp_path: Path) -> None:
    folder, data = checkpoint(tmp_path / "model"), corpus(tmp_path)
    # Rows of 8 tokens: documents are cut at their ends, in one batch or in four.
    small = inspect_routing(folder, data, InspectConfig(1000, 8, 1)).to_json()
    large = inspect_routing(folder, data, InspectConfig(1000, 8, 4)).to_json()
    # Products of another shape round in another way: weights, in the last digits.
    for a, b in zip(small["layers"], large["layers"], strict=True):
        assert a.pop("mean_weight") == pytest.approx(b.pop("mean_weight"), rel=1e-6)
    assert small == large


def test_the_command_prints_a_table_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, report = checkpoint(tmp_path / "model"), tmp_path / "routing.json"
    arguments = ["inspect", str(folder), "--data", corpus(tmp_path), "--json", str(report)]
    monkeypatch.setattr(sys, "argv", ["molcli", *arguments, "--set", "inspect.context_length=32"])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 0
    assert "deltanet" in capsys.readouterr().out
    assert json.loads(report.read_text()) == inspect_routing(
        folder, corpus(tmp_path), CONFIG
    ).to_json() | {"checkpoint": str(folder)}


def test_a_model_that_routes_nothing_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", num_blocks=1, num_blocks_per_tok=0)
    with pytest.raises(MolError, match="routes nothing"):
        inspect_routing(folder, corpus(tmp_path), CONFIG)


@pytest.mark.parametrize(
    "config, found",
    [
        (None, "holds no checkpoint"),
        ("{", r"config\.json cannot be read"),
        ("[]", "is not a JSON object"),
        ('{"model_type": "llama"}', "a model of type llama"),
        ('{"model_type": "mol"}', "holds no weights"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(
    tmp_path: Path, config: str | None, found: str
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(MolError, match=found):
        inspect_routing(tmp_path, corpus(tmp_path), CONFIG)


def test_a_checkpoint_with_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = checkpoint(tmp_path / "model")
    shard = folder / "model.safetensors"
    tensors = load_file(shard)
    del tensors["model.layers.0.router.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(MolError, match=r"model\.layers\.0\.router\.weight"):
        inspect_routing(folder, corpus(tmp_path), CONFIG)
    shard.write_bytes(shard.read_bytes()[:-64])
    with pytest.raises(MolError, match="bytes, but its header describes"):
        inspect_routing(folder, corpus(tmp_path), CONFIG)
