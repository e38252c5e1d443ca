"""Step 2, tokenizing: from documents to one tensor of token ids per document.

Also opens the tokenizer of a model, and identifies it by a fingerprint.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from molcli.errors import MolError
from molcli.progress import Progress, silent

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
BATCH_DOCUMENTS = 256  # enough to keep the tokenizer's threads busy
# Upper and lower case, marks, digits, whitespace, code and other scripts: two tokenizers with the
# same vocabulary but other merges or another normalisation split some of it differently.
_PROBE = (
    "The quick brown fox jumps over 13 lazy dogs, doesn't it? NAÏVE naïve Straße ﬁne ½ 2026-01-31\n"
    "\n\tdef f(x_1, *args):\n        return {'a': x_1 ** 2, \"b\": [0.5, 1e-3]}  # TODO\r\n"
    "https://example.org/?q=mixture%20of%20layers&n=1000000   Здравствуй, мир! 你好，世界。 "
    "こんにちは مرحبا नमस्ते 🙂👩‍🔬 antidisestablishmentarianism internationalisation"
)


def tokenize(
    documents: Iterable[str | list[int]],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int,
    limit: int | None = None,
    add_eos: bool = True,
    progress: Progress = silent,
) -> Iterator[Tensor]:
    """Turn documents into token ids, lazily.

    Strings get the tokenizer's special tokens at the start. Lists of ids pass through unchanged.

    Args:
        documents: As `read_documents` yields them.
        tokenizer: May be None if all documents are lists of ids.
        vocab_size: Ids must be below it.
        limit: Stop after this many tokens; the last document is cut.
        add_eos: End each string with exactly one EOS; if False, with none, as prompts need.
        progress: Counts tokens; the total is `limit` until the end shows that there are fewer.

    Yields:
        (tokens,) int32 for each document.

    Raises:
        MolError: For a string without a tokenizer, or an id outside the vocabulary.
    """
    count = 0
    documents = iter(documents)
    while batch := list(islice(documents, BATCH_DOCUMENTS)):
        for ids in _tokenize_batch(batch, tokenizer, add_eos):
            if limit is not None:
                ids = ids[: limit - count]
            _check_ids(ids, vocab_size)
            yield ids
            count += len(ids)
            if count == limit:
                progress(count, limit)
                return
        progress(count, limit)
    progress(count, count)


def find_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Open the tokenizer of a model's folder or Hub id.

    Raises:
        MolError: If there is none, or it cannot be read.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        found = open_tokenizer(folder)
        if found is None:
            raise MolError(f"{name} has no tokenizer", allowed="a folder with a tokenizer.json")
        return found
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # from the Hub, the network or the tokenizers library
        raise MolError(
            f"{name} is not a folder, and no tokenizer of this name could be loaded from the Hub",
            allowed="the folder or Hub id of a model",
            hint="check the name and the network; for a gated model: hf auth login",
        ) from error
    return tokenizer


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Open the tokenizer of a model's folder; None if it has none.

    Raises:
        MolError: If the tokenizer cannot be read.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare Exception on bad files
        raise MolError(
            f"the tokenizer in {folder} cannot be read ({error})",
            allowed="a tokenizer that AutoTokenizer reads, or none",
            hint="copy tokenizer.json and tokenizer_config.json from the original model",
        ) from error
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash (sha256) what decides a document's tokens: vocabulary, EOS, and tokens of a test text.

    Not the files: saving a tokenizer again may write the same tokenizer differently.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    probe = tokenizer(_PROBE, verbose=False)["input_ids"]
    content = json.dumps([vocabulary, tokenizer.eos_token_id, probe])
    return hashlib.sha256(content.encode()).hexdigest()


def _tokenize_batch(
    batch: list[str | list[int]], tokenizer: PreTrainedTokenizerBase | None, add_eos: bool
) -> Iterator[Tensor]:
    """Token ids of a batch in its order; all strings in one call of the tokenizer."""
    texts = [document for document in batch if isinstance(document, str)]
    encoded: Iterator[list[int]] = iter(())
    if texts:
        if tokenizer is None:
            raise MolError(
                "the data is text, but this model has no tokenizer",
                allowed="rows with a field `input_ids`, or a model folder with a tokenizer",
            )
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = tokenizer(texts, verbose=False)["input_ids"]
        without_eos = (row[:-1] if eos and row[-1:] == eos else row for row in ids)
        encoded = (row + eos for row in without_eos) if add_eos else without_eos
    for document in batch:
        row = next(encoded) if isinstance(document, str) else document
        yield torch.tensor(row, dtype=torch.int32)


def _check_ids(ids: Tensor, vocab_size: int) -> None:
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise MolError(
            f"the data has token id {int(ids.max() if ids.min() >= 0 else ids.min())}, "
            f"but the model's vocabulary has {vocab_size} entries",
            hint="data tokenised for this model, or plain text",
        )
