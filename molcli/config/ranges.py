"""What a recipe's values must satisfy, beyond their types."""

from typing import Any

from molcli.config.bounds import LARGEST_SIZE, Above, Between, check, check_fields
from molcli.config.sections import (
    Data,
    EvaluateConfig,
    ModelConfig,
    Recipe,
    SampleConfig,
    StageConfig,
    TrainConfig,
    UpcycleConfig,
)
from molcli.config.shown import cut, shown
from molcli.config.stages import SHORTEST_REPEATS, merged
from molcli.errors import MolError


def validate(recipe: Recipe) -> None:
    """Check each value against the range of its field, and the values of a section together.

    Raises:
        MolError: A value is out of range, or contradicts another one, whatever the parent and the
            text. The message states the range, and a value that works where there is one.
    """
    for name, section in vars(recipe).items():
        check_fields(name, section, type(section))
    _check_upcycle(recipe.upcycle)
    if not isinstance(recipe.convert.gated_deltanet, str):
        _check_layers(
            "convert.gated_deltanet", recipe.convert.gated_deltanet, "convert.gated_deltanet=none"
        )
    _check_weights("calibrate.data", recipe.calibrate.data)
    _check_repeats("calibrate", recipe.calibrate.repeats, recipe.calibrate.context_length)
    _check_sample(recipe.sample)
    _check_train(recipe.train)
    _check_evaluate(recipe.evaluate)
    _check_model(recipe.model)


def _check_upcycle(c: UpcycleConfig) -> None:
    _check_blocks("upcycle", c.num_blocks, c.num_shared_blocks, c.chosen_top_k)
    for key in ("d_thin_shared", "d_ff_thin_shared", "num_heads_shared"):
        if (value := getattr(c, key)) is not None and not c.num_shared_blocks:
            raise MolError(
                f"`upcycle.{key}` is {value}, but no block is shared",
                allowed="null where upcycle.num_shared_blocks is 0",
                hint=f"upcycle.{key}=null",
            )
    if c.has_slices:
        _check_slices(c)
    elif c.active is not None:
        raise MolError(
            f"`upcycle.active` is {c.active}, and the blocks are thin",
            allowed="null for thin blocks, whose shape is set by preset or numbers",
            hint="upcycle.blocks=slices",
        )
    if not isinstance(c.skipped_layers, str):
        _check_layers("upcycle.skipped_layers", c.skipped_layers, "upcycle.skipped_layers=auto")
    if not isinstance(c.layers, str):
        _check_layers("upcycle.layers", c.layers, "upcycle.layers=all")
    if c.layers == "auto" and c.method != "fitted":
        raise MolError(
            f"`upcycle.layers` is auto, `upcycle.method` {c.method}: auto compares fits",
            allowed="all, middle or a list of layers, where nothing is fitted",
            hint="upcycle.layers=middle",
        )
    if not isinstance(c.gated_deltanet, str):
        _check_layers("upcycle.gated_deltanet", c.gated_deltanet, "upcycle.gated_deltanet=none")
        if c.layers in ("middle", "auto"):
            raise MolError(
                f"`upcycle.gated_deltanet` is {shown(c.gated_deltanet)}, `upcycle.layers` "
                f"{c.layers}, which may keep these dense",
                allowed="all, none, every:N or auto, among the layers that upcycle.layers selects",
                hint="upcycle.gated_deltanet=auto",
            )
        if not isinstance(c.layers, str) and (
            dense := sorted(set(c.gated_deltanet) - set(c.layers))
        ):
            raise MolError(
                f"`upcycle.gated_deltanet` names {shown(dense)}, "
                "which `upcycle.layers` keeps dense",
                allowed=f"layers of {shown(c.layers)}",
            )
    if c.gated_deltanet == "auto" and c.method != "fitted":
        raise MolError(
            f"`upcycle.gated_deltanet` is auto, `upcycle.method` {c.method}: auto compares fits",
            allowed="all, none, every:N or a list of layers, where nothing is fitted",
            hint="upcycle.gated_deltanet=none",
        )


def _check_slices(c: UpcycleConfig) -> None:
    """Refuse what slices do not have."""
    only: dict[str, tuple[Any, ...]] = {
        "preset": ("quality", "balanced", "fast"),
        "num_shared_blocks": (1,),
        "top_k": (None, min(1, c.num_blocks - 1)),
        "method": ("fitted",),
        "gated_deltanet": ("none",),
        **dict.fromkeys(("d_thin", "num_heads_thin", "d_thin_shared", "num_heads_shared"), (None,)),
    }
    for key, allowed in only.items():
        if (value := getattr(c, key)) not in allowed:
            names = " or ".join("null" if x is None else str(x) for x in allowed)
            raise MolError(
                f"`upcycle.{key}` is {value}, `upcycle.blocks` slices",
                allowed=f"{names} for slices, or upcycle.blocks=thin",
                hint=f"upcycle.{key}={'null' if allowed[0] is None else allowed[0]}",
            )
    if c.layers == "auto":
        raise MolError(
            "`upcycle.layers` is auto, `upcycle.blocks` slices: auto compares thin blocks",
            allowed="all, middle or a list; upcycle.skipped_layers=auto leaves layers out",
            hint="upcycle.layers=all",
        )


def _check_sample(c: SampleConfig) -> None:
    _check_repeats("sample", c.repeats, c.length, "length")
    if c.prompt_length is not None and c.prompt_length >= c.length:
        raise MolError(
            f"`sample.prompt_length` is {c.prompt_length}, `sample.length` {c.length}",
            allowed=f"prompts shorter than documents, 1 to {c.length - 1} tokens",
            hint=f"sample.length={2 * c.prompt_length}",
        )


def _check_repeats(
    section: str, repeats: float | None, length: int, key: str = "context_length"
) -> None:
    """key: of the length of a row."""
    if repeats and length < SHORTEST_REPEATS:
        raise MolError(
            f"`{section}.repeats` is {repeats}, `{section}.{key}` {length}",
            allowed=f"{SHORTEST_REPEATS} tokens or more, which have room to repeat themselves, or "
            "no repeats",
            hint=f"{section}.repeats=0",
        )


def _check_train(c: TrainConfig) -> None:
    _check_stage("train", c)
    if c.data is not None and c.logits is not None:
        raise MolError(
            "`train.data` and `train.logits` are both set",
            allowed="one of them: cached logits come with their own text",
            hint="train.data=null",
        )
    for beta in c.betas:
        check("train.betas", beta, Between(0, 0.999_999))
    if len(set(c.trackers)) < len(c.trackers):
        raise MolError(f"`train.trackers` is {shown(c.trackers)}", allowed="each tracker once")
    if isinstance(c.stages, list):
        if not c.stages:
            raise MolError(
                "`train.stages` is empty", allowed="at least one stage, auto, or null for one"
            )
        for number, stage in enumerate(c.stages):
            _check_stage(f"train.stages.{number}", merged(c, stage))


def _check_stage(name: str, c: TrainConfig) -> None:
    """Check the values that a stage may set."""
    check_fields(name, c, StageConfig)
    _check_weights(f"{name}.data", c.data)
    _check_repeats(name, c.repeats, c.context_length)
    if c.batch_size % c.micro_batch_size:
        size = c.micro_batch_size
        raise MolError(
            f"`{name}.batch_size` is {c.batch_size}, `{name}.micro_batch_size` {size}",
            allowed="a batch_size that is a multiple of micro_batch_size",
            hint=f"{name}.batch_size={-(-c.batch_size // size) * size}",
        )
    if c.kl_weight == 0 and c.ce_weight == 0:
        raise MolError(
            f"`{name}.kl_weight` and `{name}.ce_weight` are both 0",
            allowed="at least one above 0, else nothing is learned",
            hint=f"{name}.ce_weight=1",
        )


def _check_evaluate(c: EvaluateConfig) -> None:
    distances = c.recall_distances
    if not distances or not all(0 <= distance <= LARGEST_SIZE for distance in distances):
        raise MolError(
            f"`evaluate.recall_distances` is {shown(distances)}",
            allowed="one or more numbers of tokens, 0 or more",
        )


def _check_model(c: ModelConfig) -> None:
    _check_blocks("model", c.num_blocks, c.num_shared_blocks, c.top_k)
    _check_multiple("model.head_dim", c.head_dim, 2, "RoPE rotates pairs")
    _check_multiple("model.hidden_size", c.hidden_size, c.head_dim, "model.head_dim")
    _check_multiple("model.d_thin", c.d_thin, c.head_dim, "model.head_dim")


def _check_blocks(section: str, num_blocks: int, num_shared: int, top_k: int) -> None:
    """Check N, S and K of one layer: S <= N, and K of the N - S routed blocks."""
    check(f"{section}.num_shared_blocks", num_shared, Between(0, num_blocks))
    routed = num_blocks - num_shared
    lowest = 1 if routed else 0  # routed blocks that never run would be dead weight
    if not lowest <= top_k <= routed:
        raise MolError(
            f"`{section}.top_k` is {shown(top_k)}, "
            f"with {num_blocks} blocks of which {num_shared} shared",
            allowed=f"{lowest} to {routed} routed blocks" if routed else "0: no block is routed",
            hint=f"{section}.top_k={min(max(top_k, lowest), routed)}",
        )


def _check_multiple(name: str, value: int, unit: int, reason: str) -> None:
    if value % unit:
        below = max(value // unit, 1) * unit
        raise MolError(
            f"`{name}` is {value}",
            allowed=f"a multiple of {unit} ({reason})",
            hint=f"{name}={below}",
        )


def _check_weights(name: str, data: Data | None) -> None:
    if not isinstance(data, dict):
        return
    if not data:
        raise MolError(f"`{name}` maps nothing", allowed="at least one source and its weight")
    for source, weight in data.items():
        check(f"{name}: {cut(source)}", weight, Above(0))


def _check_layers(name: str, layers: list[int], empty: str) -> None:
    """Check the numbers of layers. empty: what to write for none, or for the usual ones."""
    if not layers:
        raise MolError(f"`{name}` is an empty list", allowed="at least one layer", hint=empty)
    if not all(0 <= layer <= LARGEST_SIZE for layer in layers):
        raise MolError(f"`{name}` is {shown(layers)}", allowed="layer numbers from 0")
    if len(set(layers)) < len(layers):
        raise MolError(
            f"`{name}` is {shown(layers)}",
            allowed="each layer once",
            hint=f"{name}={shown(sorted(set(layers)))}",
        )
