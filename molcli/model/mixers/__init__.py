"""Sequence mixers: one file each, and the table of their names.

To add one, write a subclass of `Mixer` in a file of its own and list it here.
"""

from molcli.model.mixers.attention import Attention
from molcli.model.mixers.base import BlockContext, CacheLength, Mixer, State, StepContext
from molcli.model.mixers.gated_deltanet import GatedDeltaNet

__all__ = [
    "MIXERS",
    "Attention",
    "BlockContext",
    "CacheLength",
    "GatedDeltaNet",
    "Mixer",
    "State",
    "StepContext",
    "parameter_names",
]

MIXERS: dict[str, type[Mixer]] = {mixer.name: mixer for mixer in (Attention, GatedDeltaNet)}


def parameter_names(rule: str) -> tuple[str, ...]:
    """Collect the parameter names of all mixers that a rule is about.

    Args:
        rule: `float32_parameters`, `no_decay_parameters` or `new_parameters` of `Mixer`.
    """
    return tuple(name for mixer in MIXERS.values() for name in getattr(mixer, rule))
