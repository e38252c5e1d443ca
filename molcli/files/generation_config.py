"""How a model generates, generation_config.json: it travels from the parent to what is made of it.

The file's content is kept as it is. transformers' class for it refuses to write some of what it
reads, such as a temperature without `do_sample`, which parents on the Hub have.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from molcli.errors import MolError

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_generation(folder: Path, config: PreTrainedConfig) -> dict[str, Any]:
    """The values of the folder's generation_config.json, and of `config` the special tokens that it
    does not name: all of them where there is no such file.

    Args:
        folder: A model's.
        config: Of the same model.

    Returns:
        What the file holds but for nulls; `eos_token_id` may be a list.

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
    return {name: value for name, value in values.items() if value is not None}


def write_generation(values: dict[str, Any], folder: Path) -> None:
    """Writes the folder's generation_config.json."""
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (folder / GENERATION_CONFIG_NAME).write_text(text, encoding="utf-8")
