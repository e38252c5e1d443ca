"""What can be refused before any work."""

from molcli.config.sections import TrainConfig
from molcli.config.stages import Stage, section
from molcli.errors import MolError
from molcli.io.data import check_data
from molcli.model import MoLForCausalLM
from molcli.stages.train.balance import routers
from molcli.stages.train.steps import rows_at_once


def check_stages(config: TrainConfig, stages: list[Stage], ranks: int, *, has_parent: bool) -> None:
    """Raises MolError for a stage without its parent or data, that cached logits cannot teach, or
    whose batch cannot be shared.

    stages: of `config`. ranks: processes that share a batch.
    """
    for number, stage in enumerate(stages):
        settings, name = stage.settings, section(config, number)
        if settings.logits is not None:
            _check_cached(name, stage)
        elif stage.kind != "pretrain" and not has_parent:
            raise MolError(
                f"a stage of kind {stage.kind} learns from the parent, and there is none",
                allowed="--parent PARENT, or stages of kind pretrain",
            )
        elif settings.data is None:
            raise MolError(
                f"`{name}.data` is null: a stage of kind {stage.kind} has no data",
                allowed="--data SOURCE, train.data, or data in every stage",
            )
        else:
            check_data(settings.data)
    check_batches(config, stages, ranks)


def check_batches(config: TrainConfig, stages: list[Stage], ranks: int) -> None:
    """Raises MolError for a stage of `config` whose batch `ranks` processes cannot share."""
    for number, stage in enumerate(stages):
        settings, name = stage.settings, section(config, number)
        rows, at_once = settings.batch_size, rows_at_once(settings, ranks)
        if rows % ranks or rows // ranks % at_once:
            step = settings.micro_batch_size * ranks
            raise MolError(
                f"`{name}.batch_size` is {rows}, for {ranks} processes with a "
                f"`{name}.micro_batch_size` of {settings.micro_batch_size}",
                allowed="the same number of rows for each, in micro-batches of one size",
                hint=f"--set {name}.batch_size={-(-rows // step) * step}",
            )


def _check_cached(name: str, stage: Stage) -> None:
    if stage.kind == "align":
        raise MolError(
            "a stage of kind align learns from the parent's layers, and `train.logits` has its "
            "predictions alone",
            allowed="stages of kind distill and pretrain, or --data and --parent",
        )
    if stage.kind == "distill" and stage.settings.temperature != 1:
        raise MolError(
            f"`{name}.temperature` is {stage.settings.temperature}, and `train.logits` holds the "
            "largest probabilities at 1",
            allowed="1 with cached logits, or --data and --parent",
            hint=f"--set {name}.temperature=1",
        )


def check_top_k(config: TrainConfig, model: MoLForCausalLM) -> None:
    """Raises MolError if the model cannot start with so many blocks."""
    start, routed = config.start_top_k, model.config.num_routed_blocks
    if start is None:
        return
    if not routers(model) or not model.config.num_blocks_per_tok <= start <= routed:
        raise MolError(
            f"`train.start_top_k` is {start}; the model routes a token to "
            f"{model.config.num_blocks_per_tok} of {routed} blocks",
            allowed=f"{model.config.num_blocks_per_tok} to {routed}, on a model with a router",
            hint="--set train.start_top_k=null",
        )
