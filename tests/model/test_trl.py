"""trl's SFTTrainer as a user starts it."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer


@pytest.fixture
def text() -> Dataset:
    words = ("a bc", "the cat sat on the mat", "one two", "a longer line of words than these")
    return Dataset.from_dict({"text": list(words) * 4})


@pytest.mark.parametrize(
    "settings", [{}, {"packing": True, "max_length": 32}], ids=["defaults", "packing"]
)
def test_sft_takes_steps(make_model, tiny_tokenizer, text, tmp_path, settings) -> None:
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    model = make_model(vocab_size=128, output_router_logits=True)
    before = {name: x.clone() for name, x in model.named_parameters()}
    arguments: dict[str, Any] = dict(max_steps=2, logging_steps=1, report_to=[], use_cpu=True)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(str(tmp_path), bf16=False, disable_tqdm=True, **arguments, **settings),
        train_dataset=text,
        processing_class=tokenizer,
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 2 and all(entry["aux_loss"] > 0 for entry in steps)
    moved = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    assert any(name.endswith("router.weight") for name in moved)
    assert any(name.endswith("routed.thin_in") for name in moved)
