"""The model to measure, and the parent beside it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from molcli.io.parent import Parent
from molcli.io.tokenizer import open_tokenizer
from molcli.model import MoLForCausalLM
from molcli.model.checkpoint import default_device, open_checkpoint
from molcli.model.teacher import open_teacher


@dataclass(frozen=True)
class Models:
    """Both in the same precision and on the same device. tokenizer: None if there is none."""

    model: MoLForCausalLM
    parent: MoLForCausalLM | None
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def device(self) -> torch.device:
        return self.model.device

    def named(self) -> dict[str, MoLForCausalLM]:
        """Those that there are, as "model" and "parent"."""
        return {"model": self.model} | ({} if self.parent is None else {"parent": self.parent})


def open_models(checkpoint: Path, parent: Parent | None) -> Models:
    """In the checkpoint's precision on a GPU, in fp32 on a CPU.

    Raises MolError for a checkpoint that cannot be read, or a parent with another vocabulary.
    """
    model = open_checkpoint(checkpoint, default_device())
    dense = None if parent is None else open_teacher(parent, model, model.dtype)
    return Models(model, dense, open_tokenizer(checkpoint))
