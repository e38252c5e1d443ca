"""The conversion benchmarks measure what they claim to, on a tiny parent."""

import json
import lzma
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are scripts
import corpus
import gated_deltanet
import plan
import upcycle
from json_lines import JsonLines
from pruned import influences, kept_layers, write_dense
from tiny import SET, SMALL, recipe

from molcli.errors import Interrupted
from molcli.estimate.parameters import count_parameters
from molcli.fitting.converted_config import mol_config
from molcli.model import MoLConfig


def test_the_matrix_runs_each_row_once(parent, texts, tmp_path, capsys):
    out = tmp_path / "lines.jsonl"
    words = [str(parent), *texts, *SET, "--seeds", "0,1", "--only", "svd,skipped"]
    words += ["--train-tokens", "64", "--learning-rate", "svd=1e-3/2e-3,3e-3", "--out", str(out)]
    upcycle.main(words)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    rates = [(row["case"], row["seed"], row.get("rates")) for row in rows]
    svd, skipped = [None, "0.001/0.002", "0.003/3e-05"], [None, "0.0001/3e-05"]
    wanted = [("svd", seed, r) for seed in (0, 1) for r in svd]
    wanted += [("skipped", seed, r) for seed in (0, 1) for r in skipped]
    assert sorted(rates, key=str) == sorted(wanted, key=str)
    drawn = {row["seed"]: row["calibration_data"] for row in rows if not row["train_tokens"]}
    assert drawn[0] != drawn[1], "the seed draws the documents"
    printed = capsys.readouterr().out
    upcycle.main(words)
    assert len(out.read_text().splitlines()) == len(rows)
    assert capsys.readouterr().out == printed[printed.index("| case") :]


def test_a_baseline_with_all_layers_equals_the_parent(runner):
    write_dense(runner.parent, [0, 1, 2, 3], runner.folder / "whole")
    found = runner.figures(runner.folder / "whole", recipe().evaluate)
    assert found["gap"] == 0 and found["agreement"] == 1
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert runner.size(runner.folder / "whole")["share"] == 1


def test_every_heldout_text_has_figures_and_sources_are_mixed(parent, texts, tmp_path, capsys):
    out, other = tmp_path / "lines.jsonl", tmp_path / "other.jsonl"
    other.write_text(json.dumps({"input_ids": [*range(3, 60)]}) + "\n")
    words = [str(parent), *texts[2:], "--heldout", f"second={other}", *SET]
    words += ["--data", f"{texts[1]}=2", "--data", f"{other}=1", "--only", "skipped"]
    words += ["--train-tokens", "64", "--out", str(out)]
    upcycle.main(words)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        assert list(row["texts"]) == ["heldout", "second"]
        assert row["kl"] == row["texts"]["heldout"]["kl"] != row["texts"]["second"]["kl"]
    assert "recall" not in rows[0] and "recall" in rows[1]
    printed = capsys.readouterr().out
    upcycle.main(["--table", str(out)])
    assert capsys.readouterr().out == printed[printed.index("| case") :]
    assert "KL second" in printed


@pytest.mark.parametrize(("name", "opened"), [("corpus.jsonl", open), ("c.jsonl.xz", lzma.open)])
def test_a_corpus_is_divided_and_the_unseen_source_is_in_no_other_text(tmp_path, name, opened):
    rows = [
        {"source": source, "split": split, "text": f"{source} {split}"}
        for source in ("a:wiki", "b:guide", "c:essays")
        for split in ("train", "heldout")
    ]
    path = tmp_path / name
    with opened(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    corpus.main([str(path), str(tmp_path / "out"), "--unseen", "c:essays"])
    found = {
        file.stem: [json.loads(line)["text"] for line in file.read_text().splitlines()]
        for file in (tmp_path / "out").iterdir()
    }
    assert found == {
        "wiki": ["a:wiki train"],
        "docs": ["b:guide train"],
        "heldout-wiki": ["a:wiki heldout"],
        "heldout-docs": ["b:guide heldout"],
        "unseen": ["c:essays heldout"],
    }


def test_the_least_influential_layers_are_dropped_first(runner):
    shape = mol_config(runner.parent, recipe("upcycle.layers=[0, 3]").upcycle)
    assert kept_layers("skipped", shape, list) == [1, 2]
    kept = kept_layers("depth_pruned", shape, lambda: [0.4, 0.1, 0.3, 0.2])
    assert kept == [0, 2, 3]
    write_dense(runner.parent, kept, runner.folder / "cut")
    most = count_parameters(shape).active
    assert (
        runner.size(runner.folder / "cut")["active"]
        <= most
        < count_parameters(MoLConfig(**runner.parent.mol_config_kwargs())).active
    )


def test_a_full_receipt_drops_the_same_layers(runner):
    settings = recipe("upcycle.layers=[0, 3]", "upcycle.receipt=full")
    calibration, _ = runner.calibration(settings)
    checkpoint, _ = runner.convert(settings)
    baselines = json.loads((checkpoint / "receipt.json").read_text())["baselines"]
    shape, teacher = MoLConfig.from_pretrained(checkpoint), runner.teacher(torch.float32)
    kept = kept_layers("depth_pruned", shape, lambda: influences(teacher, calibration.fit))
    assert {*kept, *baselines["depth_pruned"]["layers"]} == {0, 1, 2, 3}
    assert len(baselines["depth_pruned"]["layers"]) == 4 - len(kept) == 1


def test_random_gates_change_the_gates_alone(runner):
    folder = runner.folder / "made"
    folder.mkdir()
    made = gated_deltanet.Checkpoints(runner, recipe("upcycle.layers=[1]"), folder)
    ours, drawn = (made.get(name)[0] / "model.safetensors" for name in ("all", "all-random"))
    before, after = load_file(ours), load_file(drawn)
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {"model.layers.1.routed.block.mixer.g_proj"}
    about = gated_deltanet.figures(made, "all-random")
    assert (about["gated_deltanet_layers"], about["converted_layers"]) == (1, 1)


def test_forecasts_beside_conversions(parent, texts, tmp_path):
    out = tmp_path / "lines.jsonl"
    words = [str(parent), *texts, "--tokens", "256", "--only", "base,thin,5-blocks"]
    words += [word for setting in SMALL[3:] for word in ("--set", setting)]
    plan.main([*words, "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row.get("case") for row in rows] == ["base", "thin", "5-blocks", None]
    assert set(rows[-1]["rank_correlation"]) == {"in_code", "fitted", "left_out"}


def test_an_unknown_case_is_refused():
    with pytest.raises(SystemExit, match="no case c; there are a, b"):
        upcycle.chosen(["a", "b"], "b,c")


def test_errors_stay_with_their_row_and_signals_end_all(capsys):
    lines = JsonLines(None)
    lines.row({"case": "a"}, lambda: {}["missing"])
    assert json.loads(capsys.readouterr().out)["error"] == "KeyError: 'missing'"
    assert lines.rows == []

    def stopped():
        raise Interrupted(15, "")

    with pytest.raises(Interrupted):
        lines.row({"case": "b"}, stopped)
