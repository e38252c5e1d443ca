"""Folders of tokens."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from molcli.data.token_folder import write_token_folder


@pytest.fixture(scope="session")
def folder_of(tiny_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> Callable[..., Path]:
    """Write documents as a folder of shards."""

    def write(documents: list[torch.Tensor], out: Path, shard_tokens: int = 9) -> Path:
        write_token_folder(documents, out, tiny_tokenizer(), source="x", shard_tokens=shard_tokens)
        return out

    return write
