"""The ranges of a recipe's values, and the rules between them."""

from molcli.config.sections import (
    CalibrateConfig,
    ConvertConfig,
    Data,
    EvaluateConfig,
    InspectConfig,
    ModelConfig,
    Recipe,
    SampleConfig,
    TrainConfig,
    UpcycleConfig,
)
from molcli.config.stages import merged
from molcli.errors import MolError


def validate(recipe: Recipe) -> None:
    """Raises MolError for the first value that no parent and no text could make sense of."""
    _upcycle(recipe.upcycle)
    _convert(recipe.convert)
    _calibrate(recipe.calibrate)
    _sample(recipe.sample)
    _train(recipe.train)
    _evaluate(recipe.evaluate)
    _heldout("inspect", recipe.inspect)
    _between("inspect.dead_share", recipe.inspect.dead_share, 0, 1)
    _model(recipe.model)


def _upcycle(c: UpcycleConfig) -> None:
    _blocks("upcycle", c.num_blocks, c.num_shared_blocks, c.chosen_top_k)
    for key in ("d_thin", "d_ff_thin", "num_heads_thin"):
        if (value := getattr(c, key)) is not None:
            _at_least(f"upcycle.{key}", value, 1)
    for key in ("d_thin_shared", "d_ff_thin_shared", "num_heads_shared"):
        if (value := getattr(c, key)) is None:
            continue
        _at_least(f"upcycle.{key}", value, 1)
        if not c.num_shared_blocks:
            raise MolError(
                f"`upcycle.{key}` is {value}, but no block is shared",
                allowed="null where upcycle.num_shared_blocks is 0",
                hint=f"upcycle.{key}=null",
            )
    if not isinstance(c.layers, str):
        _indices("upcycle.layers", c.layers)
    _between("upcycle.layers_budget", c.layers_budget, 0, 1)
    if c.layers == "auto" and c.method != "fitted":
        raise MolError(
            f"`upcycle.layers` is auto, `upcycle.method` {c.method}: auto compares fits",
            allowed="all, middle or a list of layers, where nothing is fitted",
            hint="upcycle.layers=middle",
        )
    if not isinstance(c.gated_deltanet, str):
        _indices("upcycle.gated_deltanet", c.gated_deltanet)
        if c.layers in ("middle", "auto"):
            raise MolError(
                f"`upcycle.gated_deltanet` is {c.gated_deltanet}, `upcycle.layers` {c.layers}, "
                "which may keep these dense",
                allowed="all, none, every:N or auto, among the layers that upcycle.layers takes",
                hint="upcycle.gated_deltanet=auto",
            )
        if not isinstance(c.layers, str) and (
            dense := sorted(set(c.gated_deltanet) - set(c.layers))
        ):
            raise MolError(
                f"`upcycle.gated_deltanet` names {dense}, which `upcycle.layers` keeps dense",
                allowed=f"layers of {c.layers}",
            )
    _between("upcycle.gated_deltanet_budget", c.gated_deltanet_budget, 0, 1)
    if c.gated_deltanet == "auto" and c.method != "fitted":
        raise MolError(
            f"`upcycle.gated_deltanet` is auto, `upcycle.method` {c.method}: auto compares fits",
            allowed="all, none, every:N or a list of layers, where nothing is fitted",
            hint="upcycle.gated_deltanet=none",
        )
    _positive("upcycle.ridge", c.ridge)
    _between("upcycle.shrinkage", c.shrinkage, 0, 1)


def _convert(c: ConvertConfig) -> None:
    if not isinstance(c.gated_deltanet, str):
        _indices("convert.gated_deltanet", c.gated_deltanet)
    _between("convert.gated_deltanet_budget", c.gated_deltanet_budget, 0, 1)
    _positive("convert.ridge", c.ridge)
    _at_least("convert.steps", c.steps, 0)
    _positive("convert.learning_rate", c.learning_rate)


def _calibrate(c: CalibrateConfig) -> None:
    _weights("calibrate.data", c.data)
    _at_least("calibrate.tokens", c.tokens, 1)
    _at_least("calibrate.heldout_tokens", c.heldout_tokens, 1)
    _at_least("calibrate.context_length", c.context_length, 2)
    _at_least("calibrate.seed", c.seed, 0)


def _sample(c: SampleConfig) -> None:
    _at_least("sample.tokens", c.tokens, 1)
    _at_least("sample.length", c.length, 2)
    if c.batch_size != "auto":
        _at_least("sample.batch_size", c.batch_size, 1)
    _positive("sample.temperature", c.temperature)
    if c.prompt_length is not None:
        _at_least("sample.prompt_length", c.prompt_length, 1)
        if c.prompt_length >= c.length:
            raise MolError(
                f"`sample.prompt_length` is {c.prompt_length}, `sample.length` {c.length}",
                allowed=f"prompts shorter than documents, 1 to {c.length - 1} tokens",
                hint=f"sample.length={2 * c.prompt_length}",
            )
    _at_least("sample.seed", c.seed, 0)


def _train(c: TrainConfig) -> None:
    _stage("train", c)
    if c.data is not None and c.logits is not None:
        raise MolError(
            "`train.data` and `train.logits` are both set",
            allowed="one of them: cached logits come with their own text",
            hint="train.data=null",
        )
    for beta in c.betas:
        _between("train.betas", beta, 0, 0.999_999)
    _at_least("train.weight_decay", c.weight_decay, 0)
    _positive("train.clip_norm", c.clip_norm)
    if c.start_top_k is not None:
        _at_least("train.start_top_k", c.start_top_k, 1)
    _between("train.top_k_fraction", c.top_k_fraction, 0, 1)
    _at_least("train.checkpoint_every", c.checkpoint_every, 0)
    _at_least("train.log_every", c.log_every, 1)
    _at_least("train.max_skipped", c.max_skipped, 1)
    if len(set(c.trackers)) < len(c.trackers):
        raise MolError(f"`train.trackers` is {c.trackers}", allowed="each tracker once")
    _at_least("train.seed", c.seed, 0)
    if isinstance(c.stages, list):
        if not c.stages:
            raise MolError(
                "`train.stages` is empty", allowed="at least one stage, auto, or null for one"
            )
        for number, stage in enumerate(c.stages):
            _stage(f"train.stages.{number}", merged(c, stage))


def _stage(name: str, c: TrainConfig) -> None:
    """The values that a stage may have of its own."""
    _weights(f"{name}.data", c.data)
    _at_least(f"{name}.tokens", c.tokens, 1)
    _at_least(f"{name}.context_length", c.context_length, 2)
    _at_least(f"{name}.batch_size", c.batch_size, 1)
    _at_least(f"{name}.micro_batch_size", c.micro_batch_size, 1)
    if c.batch_size % c.micro_batch_size:
        size = c.micro_batch_size
        raise MolError(
            f"`{name}.batch_size` is {c.batch_size}, `{name}.micro_batch_size` {size}",
            allowed="a batch_size that is a multiple of micro_batch_size",
            hint=f"{name}.batch_size={-(-c.batch_size // size) * size}",
        )
    _positive(f"{name}.learning_rate", c.learning_rate)
    _positive(f"{name}.new_learning_rate", c.new_learning_rate)
    _between(f"{name}.min_learning_rate_ratio", c.min_learning_rate_ratio, 0, 1)
    _between(f"{name}.warmup_fraction", c.warmup_fraction, 0, 1)
    _at_least(f"{name}.kl_weight", c.kl_weight, 0)
    _at_least(f"{name}.ce_weight", c.ce_weight, 0)
    _positive(f"{name}.temperature", c.temperature)
    _at_least(f"{name}.balance_weight", c.balance_weight, 0)
    _at_least(f"{name}.bias_update_rate", c.bias_update_rate, 0)
    if c.kl_weight == 0 and c.ce_weight == 0:
        raise MolError(
            f"`{name}.kl_weight` and `{name}.ce_weight` are both 0",
            allowed="at least one above 0, else nothing is learned",
            hint=f"{name}.ce_weight=1",
        )


def _evaluate(c: EvaluateConfig) -> None:
    _heldout("evaluate", c)
    _at_least("evaluate.num_prompts", c.num_prompts, 0)
    _at_least("evaluate.prompt_length", c.prompt_length, 1)
    _at_least("evaluate.continuation_length", c.continuation_length, 1)
    _at_least("evaluate.recall_sequences", c.recall_sequences, 0)
    _at_least("evaluate.recall_pairs", c.recall_pairs, 1)
    if not c.recall_distances or min(c.recall_distances) < 0:
        raise MolError(
            f"`evaluate.recall_distances` is {c.recall_distances}",
            allowed="one or more numbers of tokens, 0 or more",
        )
    _at_least("evaluate.seed", c.seed, 0)


def _heldout(section: str, c: EvaluateConfig | InspectConfig) -> None:
    _at_least(f"{section}.tokens", c.tokens, 1)
    _at_least(f"{section}.context_length", c.context_length, 2)
    _at_least(f"{section}.batch_size", c.batch_size, 1)


def _model(c: ModelConfig) -> None:
    _blocks("model", c.num_blocks, c.num_shared_blocks, c.top_k)
    _at_least("model.vocab_size", c.vocab_size, 1)
    _at_least("model.num_hidden_layers", c.num_hidden_layers, 1)
    _at_least("model.head_dim", c.head_dim, 2)
    _multiple("model.head_dim", c.head_dim, 2, "RoPE turns pairs")
    _at_least("model.hidden_size", c.hidden_size, 1)
    _multiple("model.hidden_size", c.hidden_size, c.head_dim, "model.head_dim")
    _at_least("model.d_thin", c.d_thin, 1)
    _multiple("model.d_thin", c.d_thin, c.head_dim, "model.head_dim")
    _at_least("model.d_ff_thin", c.d_ff_thin, 1)
    _positive("model.rope_theta", c.rope_theta)
    _at_least("model.max_position_embeddings", c.max_position_embeddings, 1)
    _at_least("model.seed", c.seed, 0)


def _blocks(section: str, num_blocks: int, num_shared: int, top_k: int) -> None:
    """N, S and K of one layer: S <= N, and K of the N - S routed blocks."""
    _at_least(f"{section}.num_blocks", num_blocks, 1)
    _between(f"{section}.num_shared_blocks", num_shared, 0, num_blocks)
    routed = num_blocks - num_shared
    lowest = 1 if routed else 0  # routed blocks that never run would be dead weight
    if not lowest <= top_k <= routed:
        raise MolError(
            f"`{section}.top_k` is {top_k}, with {num_blocks} blocks of which {num_shared} shared",
            allowed=f"{lowest} to {routed} routed blocks" if routed else "0: no block is routed",
            hint=f"{section}.top_k={min(max(top_k, lowest), routed)}",
        )


def _at_least(name: str, value: float, lowest: float) -> None:
    if value < lowest:
        raise MolError(f"`{name}` is {value}", allowed=f"{lowest} or more")


def _positive(name: str, value: float) -> None:
    if value <= 0:
        raise MolError(f"`{name}` is {value}", allowed="more than 0")


def _between(name: str, value: float, lowest: float, highest: float) -> None:
    if not lowest <= value <= highest:
        raise MolError(f"`{name}` is {value}", allowed=f"{lowest} to {highest}")


def _multiple(name: str, value: int, unit: int, reason: str) -> None:
    if value % unit:
        below = max(value // unit, 1) * unit
        raise MolError(
            f"`{name}` is {value}",
            allowed=f"a multiple of {unit} ({reason})",
            hint=f"{name}={below}",
        )


def _weights(name: str, data: Data | None) -> None:
    if not isinstance(data, dict):
        return
    if not data:
        raise MolError(f"`{name}` maps nothing", allowed="at least one source and its weight")
    for source, weight in data.items():
        _positive(f"{name}: {source}", weight)


def _indices(name: str, layers: list[int]) -> None:
    if any(layer < 0 for layer in layers):
        raise MolError(f"`{name}` is {layers}", allowed="layer numbers from 0")
    if len(set(layers)) < len(layers):
        raise MolError(
            f"`{name}` is {layers}",
            allowed="each layer once",
            hint=f"{name}={sorted(set(layers))}",
        )
