"""What the commands of the campaign read: tiny parents, a few texts, and what was made of them."""

import json
from pathlib import Path
from typing import Any

# One line of --set for each; every command takes the whole list.
SETTINGS = {
    "upcycle.num_blocks": 3,
    "upcycle.top_k": 1,
    "upcycle.d_thin": 32,
    "upcycle.d_ff_thin": 48,
    "calibrate.tokens": 512,
    "calibrate.heldout_tokens": 64,
    "calibrate.context_length": 32,
    "sample.tokens": 600,
    "sample.length": 32,
    "train.tokens": 8 * 4 * 32,
    "train.context_length": 32,
    "train.batch_size": 4,
    "train.micro_batch_size": 4,
    "train.checkpoint_every": 2,
    "train.log_every": 1,
    "train.precision": "fp32",
    "evaluate.tokens": 256,
    "evaluate.context_length": 64,
    "inspect.tokens": 256,
    "inspect.context_length": 64,
    "model.vocab_size": 128,
    "model.hidden_size": 64,
    "model.head_dim": 16,
    "model.num_hidden_layers": 2,
    "model.num_blocks": 3,
    "model.top_k": 1,
    "model.d_thin": 32,
    "model.d_ff_thin": 48,
}


def build(folder: str) -> None:
    """Write the parent, its GGUF file and texts. Called in a fork, which it ends."""
    import torch

    from tests.conftest import FAMILY_CONFIG, TINY_CONFIG, randomize, tiny_tokenizer
    from tests.families.test_gguf import write_gguf

    torch.manual_seed(0)
    from transformers import AutoConfig, AutoModelForCausalLM

    world = Path(folder)
    settings: dict[str, Any] = TINY_CONFIG | FAMILY_CONFIG["llama"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings))
    randomize(model)
    model.save_pretrained(world / "parent")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(world / "parent")
    write_gguf(world / "parent.gguf", world / "parent")
    generator = torch.Generator().manual_seed(1)
    rows = []
    for start in torch.randint(3, 40, (60,), generator=generator).tolist():
        rows.append([1, *((start + i) % 40 + 3 for i in range(24))])
    lines = [json.dumps({"input_ids": row}) for row in rows]
    (world / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    text = "\n".join(tokenizer.decode(row, skip_special_tokens=True) for row in rows)
    (world / "corpus.txt").write_text(text + "\n")
    (world / "parent" / "notes.txt").write_text("the user's own\n")
    raise SystemExit(0)
