"""Families of dense parents: tensor names, configuration, and how a checkpoint is read.

`parent.open_parent` opens a parent. A family is one file with a subclass of `base.Family`, and one
line below.
"""

from molcli.families.base import Family
from molcli.families.gemma3 import Gemma3
from molcli.families.llama import Llama
from molcli.families.mistral import Mistral
from molcli.families.olmo2 import Olmo2
from molcli.families.phi3 import Phi3
from molcli.families.qwen2 import Qwen2
from molcli.families.qwen3 import Qwen3

_ALL: tuple[Family, ...] = (
    Llama(),
    Mistral(),
    Qwen2(),
    Qwen3(),
    Phi3(),
    Gemma3(),
    Olmo2(),
)
FAMILIES = {family.model_type: family for family in _ALL}
