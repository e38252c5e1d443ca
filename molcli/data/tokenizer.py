"""Step 2, tokenizing: from documents to one tensor of token ids per document.

Also opens the tokenizer of a model, and identifies it by a fingerprint.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from molcli.errors import Interrupted, MolError
from molcli.files.json_files import shortened
from molcli.files.paths import expanded
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
        rows = _tokenize_batch(batch, tokenizer, add_eos)
        for document, row in zip(batch, rows, strict=True):
            ids = torch.tensor(row if limit is None else row[: limit - count], dtype=torch.int64)
            _check_ids(ids, vocab_size, tokenizer if isinstance(document, str) else None)
            yield ids.int()
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
    folder = expanded(name)
    if folder.is_dir():
        found = open_tokenizer(folder)
        if found is None:
            raise MolError(f"{name} has no tokenizer", allowed="a folder with a tokenizer.json")
        return found
    if folder.is_file():
        raise MolError(
            f"{name} is a file" + (" of weights" if folder.suffix == ".gguf" else ""),
            allowed="a folder with a tokenizer.json, or the Hub id of a model",
            hint="the folder of a model, such as one that molcli upcycle wrote",
        )
    return _load(
        name,
        f"{name} is not a folder, and no tokenizer of this name could be loaded from the Hub",
        allowed="the folder or Hub id of a model",
        hint="check the name and the network; for a gated model: hf auth login",
    )


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Open the tokenizer of a model's folder; None if it has none.

    Raises:
        MolError: If the tokenizer cannot be read.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    return _load(
        folder,
        f"the tokenizer in {folder} cannot be read",
        allowed="a tokenizer that AutoTokenizer reads, or none",
        hint="copy tokenizer.json and tokenizer_config.json from the original model",
    )


def _load(name: str | Path, problem: str, *, allowed: str, hint: str) -> PreTrainedTokenizerBase:
    with refuse_tokenizer_errors(problem, allowed=allowed, hint=hint):
        # Never code that comes with the tokenizer: without this, transformers asks on the terminal.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, trust_remote_code=False
        )
        # Some faults of a file show when text is encoded, not when it is read.
        ids = tokenizer(_PROBE, verbose=False)["input_ids"]
        tokenizer.decode(ids, skip_special_tokens=True)
        return tokenizer


@contextmanager
def refuse_tokenizer_errors(problem: str, *, allowed: str = "", hint: str = "") -> Iterator[None]:
    """Turn what the tokenizers library raises within the block into a MolError.

    Its errors are bare Exceptions; and, for faults that it did not expect, PanicException, which is
    no Exception.

    Args:
        problem: For the message; the error's own text follows it.
        allowed: For the message.
        hint: For the message.

    Raises:
        MolError: For any error but those that end the process.
    """
    try:
        yield
    except (MolError, Interrupted, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = shortened(" ".join(str(error).split()) or type(error).__name__, 300)
        raise MolError(f"{problem} ({reason})", allowed=allowed, hint=hint) from error


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
) -> Iterator[list[int]]:
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
        with refuse_tokenizer_errors("the tokenizer fails on the data"):
            ids = tokenizer(texts, verbose=False)["input_ids"]
        without_eos = (row[:-1] if eos and row[-1:] == eos else row for row in ids)
        encoded = (row + eos for row in without_eos) if add_eos else without_eos
    for document in batch:
        yield next(encoded) if isinstance(document, str) else document


def _check_ids(ids: Tensor, vocab_size: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse ids outside the vocabulary; `tokenizer` made them, or they came as ids."""
    if not len(ids) or 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        return
    wrong = int(ids.min() if ids.min() < 0 else ids.max())
    if tokenizer is None:
        raise MolError(
            f"the data has token id {wrong}, but the model's vocabulary has {vocab_size} entries",
            hint="data tokenised for this model, or plain text",
        )
    name = shortened(repr(tokenizer.convert_ids_to_tokens(wrong)))
    raise MolError(
        f"the tokenizer gives the token {name} the id {wrong}, but the model's vocabulary has "
        f"{vocab_size} entries",
        allowed="a tokenizer whose ids are all below the model's vocab_size",
        hint="use the tokenizer that the model was trained with, without added tokens",
    )
