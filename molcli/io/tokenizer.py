"""Open the tokenizer that lies in a model's folder."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from molcli.errors import MolError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


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
