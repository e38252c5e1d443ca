"""Before a run, or in place of one: open all files that it would read, as far as their headers."""

from pathlib import Path

import torch

from molcli.config.sections import TrainConfig
from molcli.config.stages import Stage
from molcli.data.mixture import load_rows
from molcli.data.tokenizer import open_tokenizer
from molcli.errors import MolError
from molcli.families.parent import Parent
from molcli.files.tensors import TensorReader
from molcli.model import MoLForCausalLM
from molcli.model.checkpoint import assemble, open_config
from molcli.model.configuration_mol import MoLConfig
from molcli.model.parent import check_vocabulary
from molcli.stages.train.balance import check_top_k
from molcli.stages.train.batches import open_logit_cache
from molcli.stages.train.objective import check_alignable
from molcli.stages.train.trackers import check_trackers

_META = torch.device("meta")


def check_files(
    checkpoint: Path, config: TrainConfig, stages: list[Stage], parent: Parent | None
) -> None:
    """Check that a run finds what it would read. Reads no weights and no text.

    Args:
        checkpoint: folder of the model.
        config: the train section.
        stages: of `config`.
        parent: opened; its own tensors have been checked then.

    Raises:
        MolError: for files that are missing, truncated, or do not fit each other.
    """
    check_trackers(config)
    model = _outline(checkpoint)
    check_top_k(config, model)
    if parent is not None:
        check_vocabulary(parent, model)
        if any(stage.kind == "align" for stage in stages):
            with _META:
                check_alignable(model, MoLForCausalLM(MoLConfig(**parent.mol_config_kwargs())))
    vocab_size = model.config.vocab_size
    open_logit_cache(stages, checkpoint, vocab_size)
    tokenizer = open_tokenizer(checkpoint)
    for stage in stages:
        data = stage.settings.data
        for source in [data] if isinstance(data, str) else data or {}:
            if Path(source).is_dir():  # tokens, which stay on disk
                length = stage.settings.context_length
                load_rows(source, tokenizer, vocab_size=vocab_size, length=length)


def _outline(checkpoint: Path) -> MoLForCausalLM:
    """The model without its numbers. Raises MolError if tensors are missing or ill-shaped."""
    config, reader = open_config(checkpoint), TensorReader(checkpoint)
    tensors = {n: torch.empty(info.shape, device=_META) for n, info in reader.tensors.items()}
    try:
        model, wrong = assemble(config, tensors, _META)
    except (RuntimeError, ValueError) as error:
        wrong = [" ".join(str(error).split())]
    if wrong:
        raise MolError(
            f"the checkpoint {checkpoint} has missing, unknown or ill-shaped tensors: "
            f"{', '.join(wrong[:3])}",
            allowed="a complete folder that molcli wrote",
        )
    return model
