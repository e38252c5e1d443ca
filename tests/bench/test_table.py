"""Rows of tests/bench/upcycle.py: resumed, timed, and as a table."""

import json

import pytest
import upcycle
from table import table
from tiny import SET


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def row(case, seed, kl, **figures):
    texts = {"wiki": {"kl": kl, "parent_ce": 2.5}, "docs": {"kl": 2 * kl, "parent_ce": 3.25}}
    key = {"parent": "p", "case": case, "settings": ["a=1"], "train_tokens": 1000, "seed": seed}
    about = {"total": 2e6, "share": 0.5, "gap": kl, "agreement": 0.75, "seconds": 10.0}
    about |= {"recall": {"0": [0.5, 0.9], "32": [0.25, 0.8]}, "greedy": 3.0, "peak_gb": None}
    return key | about | {"texts": texts} | figures


def test_a_table_of_files_has_means_over_seeds(tmp_path, capsys):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    speed = {"prefill": 4000, "decode_1": 100, "decode_32": 900}
    parent = {"parent": "p", "case": "parent", "train_tokens": 0, "total": 3e6, "share": 1.0}
    parent["speed"] = speed | {"transformers": {"prefill": 3000, "decode_1": 50, "decode_32": None}}
    found = [parent, row("fitted", 0, 0.9), row("fitted", 0, 0.1, speed=speed)]
    found.append(row("fitted", 1, 0.0) | {"error": "RuntimeError"})
    files[0].write_text("".join(json.dumps(one) + "\n" for one in found))
    files[1].write_text(json.dumps(row("fitted", 1, 0.3)) + "\n" + '{"case": "fit')
    upcycle.main(["--table", *map(str, files)])
    lines = capsys.readouterr().out.splitlines()
    heads, _, *cells, empty, caption = ([cell.strip() for cell in x.split("|")] for x in lines)
    ours, transformers, fitted = (dict(zip(heads, line, strict=True)) for line in cells)
    assert ours["prefill/s"] == "4,000" and ours["KL wiki"] == "–"
    assert transformers["case"] == "parent, transformers"
    assert (transformers["prefill/s"], transformers["decode of 32/s"]) == ("3,000", "–")
    assert (fitted["KL wiki"], fitted["KL docs"]) == ("0.200 ± 0.100", "0.400 ± 0.200")
    assert (fitted["seeds"], fitted["recall"], fitted["decode/s"]) == ("2", "50 / 25", "100")
    assert empty == [""]
    said = "The parent: cross-entropy wiki 2.500, cross-entropy docs 3.250, recall 90 / 80"
    assert caption == [said]


def test_rows_with_other_settings_have_lines_of_their_own():
    lines = table([row("a", 0, 0.1), row("a", 0, 0.2, settings=["b=2"])]).splitlines()
    assert "settings" in lines[0] and "parent" not in lines[0]
    assert "| a=1 |" in lines[2] and "| b=2 |" in lines[3]
    lines = table([row("a", 0, 0.1), row("a", 1, 0.2, train_data={"wiki": 1.0})]).splitlines()
    assert "text" in lines[0] and "| wiki=1 |" in lines[3] and "settings" not in lines[0]


def test_two_texts_of_one_name_are_refused():
    with pytest.raises(SystemExit, match="2 texts have the names heldout"):
        upcycle.parse_heldout(["a/heldout.jsonl", "b/heldout.jsonl"])


@pytest.fixture
def words(parent, texts, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"input_ids": [*range(3, 60)]}) + "\n")
    out = tmp_path / "lines.jsonl"
    words = [str(parent), *texts, *SET, "--only", "width_pruned", "--train-tokens", "64"]
    return [
        *words,
        "--train-data",
        f"{other}=1",
        "--train-data",
        f"{texts[1]}=2",
        "--out",
        str(out),
    ]


def test_rows_with_two_texts_resume(words, texts, tmp_path, capsys):
    out, both = tmp_path / "lines.jsonl", [*words, "--heldout", f"second={tmp_path}/other.jsonl"]
    upcycle.main(words)
    assert [list(one["texts"]) for one in rows_of(out)] == [["heldout"]] * 2
    upcycle.main(both)
    rows = rows_of(out)
    assert [list(one["texts"]) for one in rows[2:]] == [["heldout", "second"]] * 2
    for one in rows[2:]:
        assert {"parent_ce", "gap", "kl", "agreement"} <= one["texts"]["second"].keys()
    wanted = {"seconds", "tokens_per_second", "share", "device", "torch", "seed", "commit"}
    assert wanted <= rows[3].keys()
    capsys.readouterr()
    upcycle.main(both)
    assert len(rows_of(out)) == 4
    assert capsys.readouterr().out == table(rows) + "\n"
    upcycle.main([*both, "--train-data", f"{texts[1]}=1"])
    assert len(rows_of(out)) == 5, "other text is trained on again"


def test_speeds_are_of_trained_models_and_once_of_the_parent(words, tmp_path):
    out = tmp_path / "lines.jsonl"
    for _ in range(2):
        upcycle.main([*words, "--speed"])
    parent, converted, trained = rows_of(out)
    assert parent["case"] == "parent" and parent["share"] == 1
    assert "speed" not in converted
    for found in (parent["speed"], trained["speed"], parent["speed"]["transformers"]):
        assert all(found[name] > 0 for name in ("prefill", "decode_1", "decode_32"))
    assert (trained["speed"]["prefill_tokens"], trained["speed"]["context"]) == (256, 128)
