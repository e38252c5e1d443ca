"""`molcli data`: its subcommands, end to end on tiny models."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from molcli.cli.main import app
from molcli.errors import MolError

Make = Callable[..., Path]
TEXT = "the quick brown fox jumps over the lazy dog while the slow brown bear sleeps"


def molcli(*arguments: object) -> str:
    """Stdout of a command that succeeds; raises what it raises."""
    done = CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def parent(tiny_parent: Make) -> Path:
    return tiny_parent("llama", num_hidden_layers=1, hidden_size=32, intermediate_size=32)


def test_the_group_names_its_commands() -> None:
    text = molcli("data", "--help")
    assert all(name in text for name in ("sample", "tokenize", "cache-logits"))


def test_sampled_text_is_tokenised_and_calibrates(parent: Path, tmp_path: Path) -> None:
    text, tokens = tmp_path / "text.jsonl", tmp_path / "tokens"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the quick\n\na lazy\n")
    few = ["--set", "sample.tokens=300", "--set", "sample.length=40"]
    molcli("data", "sample", parent, text, "--prompts", prompts, *few)
    rows = [json.loads(line) for line in text.read_text().splitlines()]
    assert all(row["text"].startswith(("the quick", "a lazy")) for row in rows)
    total = sum(len(row["input_ids"]) for row in rows)
    said = molcli("data", "tokenize", text, tokens, "--tokenizer", parent)
    assert said.startswith(f"{total:,} tokens in ")
    cut = molcli("data", "tokenize", text, tmp_path / "cut", "-t", parent, "--tokens", 64)
    assert cut.startswith("64 tokens in ")
    small = ["--set", "calibrate.context_length=16", "--set", "calibrate.heldout_tokens=32"]
    for data, out in ((text, "a"), (tokens, "b")):
        molcli("calibrate", parent, tmp_path / out, "--data", data, *small)
    kept = [json.loads((tmp_path / out / "calibration.json").read_text()) for out in "ab"]
    assert kept[0]["data"] == kept[1]["data"]


def test_cached_predictions_train_without_data_and_parent(parent: Path, tmp_path: Path) -> None:
    words = TEXT.split()
    for name in "ab":
        lines = "\n\n".join(" ".join(words[i:] + words[:i]) for i in range(len(words)))
        (tmp_path / f"{name}.txt").write_text(lines)
    shape = ["num_blocks=3", "top_k=1", "d_thin=16"]
    fit = ["tokens=128", "heldout_tokens=32", "context_length=16"]
    run = ["tokens=256", "context_length=16", "batch_size=4", "log_every=1"]
    sections = {"upcycle": shape, "calibrate": fit, "train": run}
    small = [word for s, v in sections.items() for x in v for word in ("--set", f"{s}.{x}")]
    data = [word for name in "ab" for word in ("--data", f"{tmp_path / name}.txt=0.5")]
    checkpoint, cache = tmp_path / "mol", tmp_path / "cache"
    molcli("upcycle", parent, checkpoint, *data, *small)
    said = molcli("data", "cache-logits", parent, cache, *data, "--top-k", 8, *small)
    assert said.startswith("Predictions for 256 tokens in ")
    # The recipe that the checkpoint carries is in force.
    molcli("train", checkpoint, tmp_path / "out", "--logits", cache)
    last = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1])
    assert last["kl"] > 0 and list(last["passes"].values()) == [1.0, 1.0]
    given = ["train", checkpoint, tmp_path / "b"]
    for wrong in (data, ["--parent", parent]):
        with pytest.raises(MolError, match="its own text"):
            molcli(*given, "--logits", cache, *wrong)
    with pytest.raises(MolError, match="there is a --parent"):
        molcli(*given, "--parent", parent, "--set", f"train.logits={cache}")
    with pytest.raises(MolError, match="both set"):
        molcli(*given, "--set", "train.data=a.txt", "--set", f"train.logits={cache}")
    assert not (tmp_path / "b").exists()


def test_a_tokenizer_that_is_not_there_is_refused(tiny_parent: Make, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the quick brown fox")
    bare = tiny_parent("llama", tokenizer=False)
    with pytest.raises(MolError, match="has no tokenizer"):
        molcli("data", "tokenize", tmp_path / "a.txt", tmp_path / "out", "-t", bare)
    assert not (tmp_path / "out").exists()
