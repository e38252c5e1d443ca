"""generation_config.json: copy how a parent generates to the models that are made of it.

Values are copied as they are: transformers' class for the file refuses to write some of what it
reads, such as a temperature without `do_sample`, which parents on the Hub have. Left out are ways
to decode, and caches, that a Mixture of Layers model does not support.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from molcli.errors import MolError

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Ways to decode that take tokens back from the cache, which a recurrent state cannot.
TAKES_TOKENS_BACK = (
    *("prompt_lookup_num_tokens", "assistant_early_exit"),
    *("penalty_alpha", "dola_layers"),
)
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
        MolError: if the file is not a JSON object.
    """
    path, content = folder / GENERATION_CONFIG_NAME, {}
    if path.is_file():
        try:
            content = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise MolError(
                f"{path} is not a JSON object ({error})",
                allowed="the file as save_pretrained writes it, or none",
            ) from error
    tokens = {name: getattr(config, name) for name in TOKENS}
    values = tokens | {name: value for name, value in content.items() if value is not None}
    if values.get("cache_implementation") not in CACHES:
        del values["cache_implementation"]
    return {
        name: value
        for name, value in values.items()
        if value is not None and name not in TAKES_TOKENS_BACK
    }


def write_generation(values: dict[str, Any], folder: Path) -> None:
    """Write the folder's generation_config.json."""
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (folder / GENERATION_CONFIG_NAME).write_text(text, encoding="utf-8")
