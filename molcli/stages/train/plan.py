"""Stages for those who name none: from the model's size and the tokens there are to spend."""

from dataclasses import dataclass, replace

from molcli.config.sections import StageConfig, TrainConfig
from molcli.errors import MolError
from molcli.maths.parameters import count_parameters
from molcli.model.configuration_mol import MoLConfig

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
    if "gated_deltanet" in model.layer_kinds:
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
