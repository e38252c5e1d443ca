"""Types of the values in the config.json of a Mixture of Layers model, checked when it is read."""

import math
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from molcli.errors import MolError
from molcli.families.config_numbers import WHOLE, check_numbers
from molcli.files.json_files import shortened
from molcli.model.configuration_mol import RENAMED, MoLConfig


def check_values(content: Mapping[str, Any], source: Path) -> None:
    """Check the values of a configuration before a `MoLConfig` is made from it.

    Args:
        content: of config.json.
        source: the file, for messages.

    Raises:
        MolError: for a value of another type than the argument of `MoLConfig`, or a number that no
            model has.
    """
    content = {RENAMED.get(key, key): value for key, value in content.items()}
    # A baseline without any layer, embedding and head alone, is a model too.
    check_numbers(content, source, fewest_layers=0)
    hints = get_type_hints(MoLConfig.__init__) | {"layer_kinds": list[str]}
    if content.get("qk_norm_full_width") is True and content.get("qk_norm") is not True:
        raise MolError(
            f"{source} has qk_norm_full_width: True without qk_norm: True",
            allowed="both, or qk_norm alone",
            hint="use the config.json that was written with the weights",
        )
    for key, value in content.items():
        hint = hints.get(key)
        if hint is None or key == "return" or _fits(value, hint):
            continue
        raise MolError(
            f"{source} has {key}: {shortened(value)}",
            allowed=str(hint).removeprefix("<class '").removesuffix("'>").replace("None", "null"),
            hint="use the config.json that was written with the weights",
        )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON has a type; whole numbers in lists are counts."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits_entry(x, get_args(hint)[0]) for x in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict)
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) < 1e300 and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _fits_entry(value: Any, hint: Any) -> bool:
    in_range = not isinstance(value, int) or 0 <= value <= WHOLE["max_position_embeddings"][1]
    return in_range and _fits(value, hint)
