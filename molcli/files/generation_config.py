"""generation_config.json: copy how a parent generates to the models that are made of it.

Values are copied as they are: transformers' class for the file refuses to write some of what it
reads, such as a temperature without `do_sample`, which parents on the Hub have. Left out are ways
to decode, and caches, that a Mixture of Layers model does not support.
"""

import json
import logging
import math
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from molcli.errors import MolError
from molcli.files.json_files import read_object, shortened

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Ways to decode that take tokens back from the cache, which a recurrent state cannot.
TAKES_TOKENS_BACK = (
    *("prompt_lookup_num_tokens", "assistant_early_exit"),
    *("penalty_alpha", "dola_layers"),
)
_LOGGER = logging.getLogger(GenerationConfig.__module__)
_ALLOWED = "a JSON object as save_pretrained writes it, or no such file"
_HINT = "use the generation_config.json that was published with the weights"
CACHES = (None, "dynamic", "static")  # values of cache_implementation that blocks have states for


def read_generation(folder: Path, config: PreTrainedConfig) -> dict[str, Any]:
    """Read generation_config.json, and take special tokens that it does not name from `config`.

    Args:
        folder: of a model; without the file, all special tokens come from `config`.
        config: of the same model.

    Returns:
        The values that are not null and that a converted model supports; `eos_token_id` may be a
        list.

    Raises:
        MolError: if the file is not a JSON object, or has values that transformers refuses, or
            special tokens that the model does not have.
    """
    path, content = folder / GENERATION_CONFIG_NAME, dict[str, Any]()
    if path.is_file():
        content = read_object(path, allowed=_ALLOWED, hint=_HINT)
        _check(content, path, getattr(config, "vocab_size", math.inf))
    tokens = {name: getattr(config, name) for name in TOKENS}
    values = tokens | {name: value for name, value in content.items() if value is not None}
    if values.get("cache_implementation") not in CACHES:
        del values["cache_implementation"]
    return {
        name: value
        for name, value in values.items()
        if value is not None and name not in TAKES_TOKENS_BACK
    }


def generation_config(values: dict[str, Any]) -> GenerationConfig:
    """Return transformers' object of values that `read_generation` returned."""
    # It warns of values that it will not use, which parents on the Hub have.
    warned = _LOGGER.disabled
    _LOGGER.disabled = True
    try:
        return GenerationConfig.from_dict(values)
    finally:
        _LOGGER.disabled = warned


def _check(content: dict[str, Any], path: Path, vocab_size: float) -> None:
    for name in TOKENS:
        value = content.get(name)
        # Some files have -1 for none.
        for token in value if isinstance(value, list) and name == "eos_token_id" else [value]:
            whole = isinstance(token, int) and not isinstance(token, bool)
            if token is not None and not (whole and -1 <= token < vocab_size):
                raise MolError(
                    f"{path} has {name}: {shortened(value)}",
                    allowed="tokens of the vocabulary, or null",
                    hint=_HINT,
                )
    # A cache of another kind is left out of what is copied.
    plain = {name: x for name, x in content.items() if name != "cache_implementation"}
    try:
        generation_config(plain)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = shortened(" ".join(str(error).split()), 200)
        raise MolError(
            f"{path} is not a valid generation config ({reason})", allowed=_ALLOWED, hint=_HINT
        ) from error


def write_generation(values: dict[str, Any], folder: Path) -> None:
    """Write the folder's generation_config.json."""
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (folder / GENERATION_CONFIG_NAME).write_text(text, encoding="utf-8")
