"""The parent as the one to learn from, or to be compared with."""

import torch

from molcli.errors import MolError
from molcli.io.parent import Parent
from molcli.model.from_parent import load_dense
from molcli.model.modeling_mol import MoLForCausalLM


def open_teacher(parent: Parent, student: MoLForCausalLM, dtype: torch.dtype) -> MoLForCausalLM:
    """The parent on the student's device, without gradients. Raises MolError if the two do not
    share a vocabulary: then their predictions cannot be compared.
    """
    found, wanted = parent.config.vocab_size, student.config.vocab_size
    if found != wanted:
        raise MolError(
            f"the parent {parent.name} has a vocabulary of {found}, the model one of {wanted}",
            allowed="the parent that the model was converted from",
        )
    return load_dense(parent, dtype, student.device)
