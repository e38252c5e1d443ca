"""Plan: compare the cost of possible shapes of a converted model before converting.

Sizes, FLOPs, memory and time follow from the parent's configuration alone. The KL can be forecast,
too, from calibration statistics and the parent's weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from molcli.config.sections import Recipe, TrainConfig, UpcycleConfig
from molcli.errors import MolError
from molcli.estimate.cost import Cost, conversion_cost, parent_config, training_cost
from molcli.estimate.flops import count_flops
from molcli.estimate.forecast import FORECAST, compute_predictors
from molcli.estimate.gpus import Gpu
from molcli.estimate.parameters import count_parameters
from molcli.fitting.converted_config import converted_config, parent_shape
from molcli.fitting.shapes import split_shapes, thin_shape, widths_near
from molcli.model.configuration_mol import MoLConfig
from molcli.model.shapes import BlockShape

PRESETS: tuple[Literal["quality", "balanced", "fast"], ...] = ("quality", "balanced", "fast")
# (num_blocks, skipped_layers) of candidates with slices.
SLICES: tuple[tuple[int, Literal["auto", "none"]], ...] = ((9, "auto"), (9, "none"), (17, "auto"))
# (num_blocks, num_shared_blocks, top_k) of candidates whose shared blocks differ from the routed
# ones, and of candidates whose blocks all have one shape.
SPLIT_BLOCKS = ((9, 1, 1), (17, 1, 1))
UNIFORM_BLOCKS = ((9, 1, 2), (17, 1, 2), (15, 1, 3))
# Widths per entry of UNIFORM_BLOCKS: those nearest to equal fractions of d_model and d_ff.
WIDTHS = 2
# Smallest d_ff of all active blocks together, relative to the parent's. Wider blocks have fewer
# neurons.
FEWEST_NEURONS = 0.1


@dataclass(frozen=True)
class Candidate:
    """One possible shape and its cost.

    Attributes:
        name: unique within a plan.
        settings: keys of the recipe's section `upcycle` that produce this shape.
        total: parameters.
        active: parameters that one token uses.
        share: active parameters over the parent's, both without embeddings.
        flops: FLOPs per token with active blocks.
        checkpoint: bytes of the weights on disk.
        conversion: cost of the conversion.
        training: cost of the training.
        kl: forecast right after conversion, nats a token; None without calibration statistics.
    """

    name: str
    settings: dict[str, Any]
    total: int
    active: int
    share: float
    flops: int
    checkpoint: int
    conversion: Cost
    training: Cost
    kl: float | None = None


@dataclass(frozen=True)
class Plan:
    """All candidates, and the recommended one.

    Attributes:
        parent_total: parameters of the parent.
        parent_flops: FLOPs per token of the parent.
        tokens: training tokens that costs are estimated for.
        gpu: GPU that costs are estimated for.
        candidates: presets first.
        recommended: name of the candidate to choose at about the requested share, the first one
            after the presets: slices, which lose least after training.
    """

    parent_total: int
    parent_flops: int
    tokens: int
    gpu: Gpu
    candidates: list[Candidate]
    recommended: str

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        gpu = {key: getattr(self.gpu, key) for key in ("name", "bf16", "fp32", "memory")}
        return {**asdict(self), "gpu": gpu}


def plan(
    outline: dict[str, Any],
    recipe: Recipe,
    share: float,
    tokens: int,
    gpu: Gpu,
    spectra: Mapping[int, Tensor] | None = None,
    fit_tokens: int | None = None,
) -> Plan:
    """Estimate the cost of the presets and of shapes with about `share` active parameters.

    Args:
        outline: the parent's numbers, from `molcli.families.parent.outline`.
        recipe: calibration and training settings; of recipe.upcycle only the settings that do not
            concern shapes: layers and mixers.
        share: active parameters over the parent's, without embeddings, in (0, 1].
        tokens: training tokens.
        gpu: GPU that costs are estimated for.
        spectra: layer -> `reading_spectrum`, for a forecast of the KL.
        fit_tokens: tokens of the calibration, if not those of the recipe.

    Raises:
        MolError: the recipe does not fit the parent, or the share is too small.
    """
    dense = {name: value for name, value in outline.items() if name != "dtype"}
    dtype = outline["dtype"] or torch.bfloat16
    recipe = recipe if fit_tokens is None else _with_tokens(recipe, fit_tokens)
    recipe = _with_length_for(recipe, MoLConfig(**dense))
    candidates = []
    for name, options in _shapes(dense, recipe.upcycle, share):
        config = converted_config(dense, options)
        count, parent = count_parameters(config), count_parameters(parent_config(config))
        calibration = recipe.calibrate
        kl = None
        if spectra is not None and not options.has_slices:
            kl = FORECAST.kl(compute_predictors(config, spectra, calibration.tokens))
        candidates.append(
            Candidate(
                name=name,
                settings=_settings(config, options),
                total=count.total,
                active=count.active,
                share=(count.active - count.embedding) / parent.non_embedding,
                flops=count_flops(config, recipe.train.context_length).active,
                checkpoint=count.total * dtype.itemsize,
                conversion=conversion_cost(
                    config, calibration.tokens, calibration.heldout_tokens, gpu
                ),
                training=training_cost(config, recipe.train, tokens, gpu),
                kl=kl,
            )
        )
    dense_config = parent_config(config)
    return Plan(
        count_parameters(dense_config).total,
        count_flops(dense_config, recipe.train.context_length).active,
        tokens,
        gpu,
        candidates,
        next(c.name for c in candidates if c.name not in PRESETS),
    )


def _shapes(
    dense: dict[str, Any], options: UpcycleConfig, share: float
) -> Iterator[tuple[str, UpcycleConfig]]:
    """Yield presets first, then candidates, with the best guess without a forecast first."""
    free = replace(
        options,
        blocks="auto",
        active=None,
        skipped_layers="auto",
        d_thin=None,
        d_ff_thin=None,
        num_heads_thin=None,
        d_thin_shared=None,
        d_ff_thin_shared=None,
        num_heads_shared=None,
    )
    slices = replace(free, top_k=None, num_shared_blocks=1, num_blocks=9, gated_deltanet="none")
    for preset in PRESETS:
        yield preset, replace(slices, preset=preset)
    free = replace(free, blocks="thin")
    shape = parent_shape(dense)
    found = [
        *_sliced_candidates(slices, dense, share),
        *_split_candidates(free, shape, share),
        *_uniform_candidates(free, shape, share),
    ]
    if not found:
        raise MolError(
            f"--active is {share:.1%}, which leaves no room for neurons beside the parent's heads",
            allowed="a larger share",
            hint=f"--active {min(1.0, 1.5 * share):.0%}",
        )
    yield from found


def _sliced_candidates(
    slices: UpcycleConfig, dense: dict[str, Any], share: float
) -> Iterator[tuple[str, UpcycleConfig]]:
    """Yield slices, with and without layers that are left out, where attention leaves room."""
    for blocks, skipped in SLICES:
        options = replace(slices, num_blocks=blocks, skipped_layers=skipped, active=share)
        try:
            config = converted_config(dense, options)
        except MolError:  # no room for neurons
            continue
        few = config.layer_structures.count("skipped")
        if few > len(config.layer_structures) / 2:
            continue
        without = f", {few} layers left out" if few else ""
        if few or skipped == "none":
            yield f"{blocks - 1} slices{without}", options


def _split_candidates(
    free: UpcycleConfig, dense: BlockShape, share: float
) -> Iterator[tuple[str, UpcycleConfig]]:
    """Yield shapes whose shared blocks differ from the routed ones, as in the presets."""
    for blocks, shared, top_k in SPLIT_BLOCKS:
        wide, thin = split_shapes(share, shared, top_k, dense)
        cost = shared * wide.num_thin_weights(dense.width)
        cost += top_k * thin.num_thin_weights(dense.width)
        if cost <= share * dense.num_weights:  # it is larger where there is no room for neurons
            shapes = f"{wide.width}×{wide.d_ff}, {thin.width}×{thin.d_ff}"
            options = _with_blocks(free, blocks, shared, top_k, thin)
            yield (
                f"{shared}+{top_k}of{blocks}, {shapes}",
                replace(
                    options,
                    d_thin_shared=wide.width,
                    d_ff_thin_shared=wide.d_ff,
                    num_heads_shared=wide.num_heads,
                ),
            )


def _uniform_candidates(
    free: UpcycleConfig, dense: BlockShape, share: float
) -> Iterator[tuple[str, UpcycleConfig]]:
    """Yield shapes in which all blocks have one shape, as in the paper."""
    for blocks, shared, top_k in UNIFORM_BLOCKS:
        active, widths = shared + top_k, 0
        for width in widths_near(share, active, dense):
            thin = thin_shape(share, active, dense, width)
            if active * thin.d_ff < FEWEST_NEURONS * dense.d_ff or widths == WIDTHS:
                continue
            widths += 1
            options = _with_blocks(free, blocks, shared, top_k, thin)
            yield f"{shared}+{top_k}of{blocks}, {width}×{thin.d_ff}", options


def _with_blocks(
    free: UpcycleConfig, blocks: int, shared: int, top_k: int, thin: BlockShape
) -> UpcycleConfig:
    return replace(
        free,
        num_blocks=blocks,
        num_shared_blocks=shared,
        top_k=top_k,
        d_thin=thin.width,
        d_ff_thin=thin.d_ff,
        num_heads_thin=thin.num_heads,
    )


def _settings(config: MoLConfig, options: UpcycleConfig) -> dict[str, Any]:
    if options.has_slices:
        keys, usual = ("preset", "active", "skipped_layers", "num_blocks"), UpcycleConfig()
        own, defaults = ({key: getattr(c, key) for key in keys} for c in (options, usual))
        return {key: value for key, value in own.items() if value != defaults[key]}
    middle = {"layers": "middle", "layers_budget": options.layers_budget}
    own = {
        "d_thin_shared": config.d_thin_shared,
        "d_ff_thin_shared": config.d_ff_thin_shared,
        "num_heads_shared": config.num_heads_shared,
    }
    return {
        "num_blocks": config.num_blocks,
        "num_shared_blocks": config.num_shared_blocks,
        "top_k": config.num_blocks_per_tok,
        "d_thin": config.d_thin,
        "d_ff_thin": config.d_ff_thin,
        "num_heads_thin": config.num_heads_thin,
        **{key: number for key, number in own.items() if number is not None},
        **(middle if options.layers == "middle" else {}),
    }


def _with_length_for(recipe: Recipe, parent: MoLConfig) -> Recipe:
    """Check that the parent has positions for `train.context_length`.

    The default is shortened to fit, as it is in the stages that `molcli train` plans.
    """
    train, positions = recipe.train, parent.max_position_embeddings
    if train.context_length == TrainConfig.context_length:
        shorter = min(train.context_length, positions)
        return replace(recipe, train=replace(train, context_length=shorter))
    parent.check_context(train.context_length, "train.context_length")
    return recipe


def _with_tokens(recipe: Recipe, tokens: int) -> Recipe:
    return replace(recipe, calibrate=replace(recipe.calibrate, tokens=tokens))
