"""Plan the stages of a run that names none, and refuse what cannot work."""

from dataclasses import dataclass, replace

from molcli.config.sections import StageConfig, TrainConfig
from molcli.config.stages import Stage, section
from molcli.data.mixture import check_data
from molcli.errors import MolError
from molcli.estimate.parameters import count_parameters
from molcli.model import MoLForCausalLM
from molcli.model.configuration_mol import MoLConfig
from molcli.stages.train.balance import routers
from molcli.stages.train.batches import rows_at_once


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


# A model of this many parameters takes the learning rates as they are.
_REFERENCE = 135e6
# Of inherited and of new weights. In 0.5M tokens SmolLM2-135M learns most at the first pair, in 6M
# and more at the second. Larger models take less: in long runs in proportion to their size, else to
# its square root. Both lead to what distillations of 7B models use (arXiv 2505.03005).
_SHORT, _LONG = (1e-4, 3e-5), (6e-4, 1e-4)
_LONG_FROM = 3_000_000  # tokens
_FROM_SCRATCH = 3e-4
_ENDING_FROM = 500_000_000  # tokens: a last stretch at a long context is affordable
_MIN_STEPS = 200
# Of a micro-batch, of models with less than _SMALL parameters and of others. With the first, a
# converted SmolLM2-135M (0.2B) and its parent take 17 GB.
_SMALL = 500e6
_OF_SMALL, _OF_OTHERS = 2**14, 2**13  # tokens


@dataclass(frozen=True)
class Situation:
    """has_parent: to learn from. converted: from a dense model, not drawn at random. ranks: that
    share a batch, which decides about micro-batches alone."""

    has_parent: bool
    converted: bool
    ranks: int = 1


def plan(config: TrainConfig, model: MoLConfig, situation: Situation) -> TrainConfig:
    """The train section with a list of stages whose tokens sum to config.tokens.

    A pure function: a resumed run plans what it planned at first. Raises MolError for cached
    logits, whose context length is given.
    """
    if config.logits is not None:
        raise MolError(
            "`train.stages` is auto and would choose the context length, which `train.logits` has "
            "already",
            allowed="a list of stages, or null for one",
            hint="--set train.stages=null",
        )
    total = count_parameters(model).total
    ratio = min(1.0, _REFERENCE / total)
    short = [rate * ratio**0.5 for rate in _SHORT]
    if situation.converted or situation.has_parent:
        rate, new = short if config.tokens < _LONG_FROM else [rate * ratio for rate in _LONG]
    else:
        rate = new = _FROM_SCRATCH * ratio**0.5
    context, rows = _shape(config.tokens, total, model.max_position_embeddings)
    at_once = _OF_SMALL if total < _SMALL else _OF_OTHERS
    config = replace(
        config,
        context_length=context,
        batch_size=rows,
        micro_batch_size=_divisor(rows // situation.ranks, at_once // context),
        learning_rate=_round(rate),
        new_learning_rate=_round(new),
    )
    if not situation.has_parent:
        return replace(config, stages=[StageConfig("pretrain", tokens=config.tokens)])
    stages, left = [], config.tokens
    if model.is_recurrent:
        # Its gates, convolutions and decay start from an initialisation, not from the parent;
        # blocks that are fitted through and through gained nothing from alignment.
        tokens = min(config.tokens // 10, 20_000_000)
        if tokens:
            stages.append(
                StageConfig(
                    "align",
                    tokens=tokens,
                    learning_rate=_round(5 * short[0]),
                    new_learning_rate=_round(5 * short[1]),
                )
            )
            left -= tokens
    longest = min(4096, model.max_position_embeddings)
    ending = left // 20 if config.tokens >= _ENDING_FROM and longest > context else 0
    stages.append(StageConfig("distill", tokens=left - ending))
    if ending:
        rows = max(1, rows * context // longest)
        stages.append(
            StageConfig(
                "distill",
                tokens=ending,
                context_length=longest,
                batch_size=rows,
                micro_batch_size=_divisor(rows // situation.ranks, at_once // longest),
                learning_rate=_round(config.learning_rate / 10),
                new_learning_rate=_round(config.new_learning_rate / 10),
            )
        )
    return replace(config, stages=stages)


def _shape(tokens: int, parameters: int, longest: int) -> tuple[int, int]:
    """Context length and rows of a step: longer and more for more tokens, more for larger models;
    rows are a power of 2."""
    context = 512 if tokens < 20_000_000 else 1024 if tokens < 200_000_000 else 2048
    context = max(2, min(context, longest, tokens))
    wanted = 2**15 if parameters < 500e6 else 2**17 if parameters < 3e9 else 2**19
    rows = max(1, min(wanted, tokens // _MIN_STEPS) // context)
    return context, 2 ** (rows.bit_length() - 1)


def _divisor(rows: int, most: int) -> int:
    """The largest divisor of `rows` that is at most `most`; 1 for no rows."""
    return next(size for size in range(max(1, most), 0, -1) if max(1, rows) % size == 0)


def _round(rate: float) -> float:
    """Two significant digits."""
    return float(f"{rate:.1e}")
