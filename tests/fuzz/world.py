"""What the cases start from: valid inputs of every kind, tiny, and made once."""

import gzip
import json
import shutil
import signal
from pathlib import Path
from typing import Any

from tests.forked import Forked
from tests.kills.commands import SETS
from tests.kills.world import build as build_kills_world

PARENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-sharded": ("llama", {"sharded": True}),
    "mistral": ("mistral", {}),
    "qwen2-sharded": ("qwen2", {"sharded": True}),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {}),
    "gemma3": ("gemma3_text", {}),
    "olmo2-sharded": ("olmo2", {"attention_bias": True, "sharded": True}),
}
# Name of the output -> words of the command that makes it.
PREPARED: dict[str, list[str]] = {
    "calibrated": ["calibrate", "parent", "calibrated", "--data", "corpus.jsonl"],
    "mol": ["upcycle", "parent", "mol", "--calibration", "calibrated"],
    "logits": ["data", "cache-logits", "parent", "logits", "--data", "corpus.jsonl", "-k", "5"],
    "tokens": ["data", "tokenize", "corpus.txt", "tokens", "-t", "parent"],
    "stopped": ["train", "mol", "stopped", "--parent", "parent", "--data", "corpus.jsonl"],
}
SMALL = [*SETS, "--set", "train.tokens=640"]


def make_world(folder: Path, forked: Forked) -> Path:
    """Write all inputs into the folder, which is empty. Returns the folder."""
    home = folder.parent / "home"
    home.mkdir()
    env = {name: str(home) for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR")}
    for function in ("build_base", "build_rest"):
        made = forked.run([], folder, setup=f"tests.fuzz.world:{function}", payload=str(folder))
        if made.code:
            raise RuntimeError(made.stderr)
    note = folder.parent / "note"
    note.mkdir()
    for name, words in PREPARED.items():
        words = [*words, *([] if "tokenize" in words else SMALL)]
        runs: list[dict[str, Any]] = [{"at": None}]
        if name == "stopped":  # by SIGTERM, half-way
            runs.append({"at": 0})
        for how in runs:
            if how["at"] is not None:
                shutil.rmtree(folder / name)
                how = {"at": int((note / "count").read_text()) // 2}
            payload = {"root": str(folder), "number": signal.SIGTERM, "then": None, **how}
            done = forked.run(
                words,
                folder,
                env=env,
                setup="tests.kills.moments:arm",
                payload={**payload, "note": str(note)},
            )
            if done.code != (0 if how["at"] is None else 128 + signal.SIGTERM):
                raise RuntimeError(f"{words} ended with {done.code}\n{done.stderr}")
    return folder


def build_base(folder: str) -> None:
    """The world of the kill campaign: a parent, its GGUF file and texts. Called in a fork."""
    build_kills_world(folder)


def build_rest(folder: str) -> None:
    """Other parents, and all types of data files. Called in a fork, which it ends."""
    import torch
    import zstandard
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.conftest import (
        FAMILY_CONFIG,
        IMPLIED_HEAD_DIM,
        TINY_CONFIG,
        randomize,
        tiny_tokenizer,
    )

    world = Path(folder)
    for name, (family, config) in PARENTS.items():
        torch.manual_seed(0)
        settings: dict[str, Any] = TINY_CONFIG | FAMILY_CONFIG[family] | config
        size = "60KB" if settings.pop("sharded", False) else "1GB"
        if family in IMPLIED_HEAD_DIM:
            del settings["head_dim"]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
        randomize(model)
        model.save_pretrained(world / name, max_shard_size=size)
        tiny_tokenizer().save_pretrained(world / name)
    lines = (world / "corpus.txt").read_text(encoding="utf-8").split("\n")
    rows = [{"text": line} for line in lines if line]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (world / "text.jsonl").write_text(text, encoding="utf-8")
    (world / "text.json").write_text(json.dumps(rows), encoding="utf-8")
    (world / "text.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    (world / "text.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
    Dataset.from_list(rows).to_parquet(world / "text.parquet")
    recipe = "\n".join(_recipe()) + "\n"
    (world / "recipe.yaml").write_text(recipe, encoding="utf-8")
    raise SystemExit(0)


def _recipe() -> list[str]:
    """The settings of every command as YAML: a recipe that can stand for all --set."""
    sections: dict[str, list[str]] = {}
    for word in SMALL[1::2]:
        name, _, value = word.partition("=")
        section, _, key = name.partition(".")
        lines = sections.setdefault(section, [])
        lines[:] = [line for line in lines if not line.startswith(f"  {key}:")]
        lines.append(f"  {key}: {value}")
    return [line for section, lines in sections.items() for line in (f"{section}:", *lines)]
