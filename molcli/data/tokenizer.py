"""Open the tokenizer that lies in a model's folder, and tell tokenizers apart."""

import hashlib
import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from molcli.errors import MolError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
# Letters with and without case, marks, digits, blanks, code and other scripts: two tokenizers that
# share a vocabulary but not their merges or normalisation cut some of it differently.
_PROBE = (
    "The quick brown fox jumps over 13 lazy dogs, doesn't it? NAÏVE naïve Straße ﬁne ½ 2026-01-31\n"
    "\n\tdef f(x_1, *args):\n        return {'a': x_1 ** 2, \"b\": [0.5, 1e-3]}  # TODO\r\n"
    "https://example.org/?q=mixture%20of%20layers&n=1000000   Здравствуй, мир! 你好，世界。 "
    "こんにちは مرحبا नमस्ते 🙂👩‍🔬 antidisestablishmentarianism internationalisation"
)


def find_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder or Hub id. Raises MolError if there is none."""
    folder = Path(spec).expanduser()
    if folder.is_dir():
        found = open_tokenizer(folder)
        if found is None:
            raise MolError(f"{spec} has no tokenizer", allowed="a folder with a tokenizer.json")
        return found
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(spec)
    except Exception as error:  # of the Hub, the network or the tokenizers library
        raise MolError(
            f"{spec} is no folder, and the Hub gave no tokenizer of that name",
            allowed="the folder or Hub id of a model",
            hint="check the name and the network; for a gated model: hf auth login",
        ) from error
    return tokenizer


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer, None if it has none. Raises MolError if it cannot be read."""
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
    """sha256 over what decides the tokens of a document: vocabulary, EOS, and a probe's tokens.

    Not over the files: saving a tokenizer again may write the same one differently.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    probe = tokenizer(_PROBE, verbose=False)["input_ids"]
    content = json.dumps([vocabulary, tokenizer.eos_token_id, probe])
    return hashlib.sha256(content.encode()).hexdigest()
