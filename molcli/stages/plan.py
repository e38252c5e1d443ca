"""Plan: what shapes of a converted model cost, before any of it is computed.

Sizes, operations, memory and time follow from the parent's configuration alone. With calibration
statistics and the parent's weights, the spectra of what its layers read forecast the KL, too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor

from molcli.config.sections import Recipe, UpcycleConfig
from molcli.errors import MolError
from molcli.estimate.flops import count_flops
from molcli.estimate.forecast import FORECAST, predictors
from molcli.estimate.parameters import count_parameters
from molcli.estimate.time import Cost, Gpu, conversion_cost, parent_of, training_cost
from molcli.fitting.converted_config import ACTIVE_FRACTION, converted_config, parent_shape
from molcli.fitting.shapes import split_shapes, thin_shape, widths_near
from molcli.model.configuration_mol import MoLConfig
from molcli.model.shapes import BlockShape

PRESETS: tuple[Literal["quality", "balanced", "fast"], ...] = ("quality", "balanced", "fast")
# num_blocks, num_shared_blocks, top_k: of shapes that differ, and of one shape
SPLIT_BLOCKS = ((9, 1, 1), (17, 1, 1))
BLOCKS = ((9, 1, 2), (17, 1, 2), (15, 1, 3))
WIDTHS = 2  # candidates for each of the latter, those nearest to equal shares of width and neurons
FORECAST_TOLERANCE = 0.05  # forecasts this close are alike: the model with fewer parameters wins
FEWEST_NEURONS = 0.1  # of the parent's, in the active blocks; narrower candidates have more


@dataclass(frozen=True)
class Candidate:
    """A shape. settings: of `upcycle`, those that make it. share: active parameters over the
    parent's, embeddings left out of both. flops: a token, active. checkpoint: bytes. kl: forecast
    in nats a token right after conversion; None without calibration statistics.
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
    """parent_total, parent_flops: the parent's. recommended: the name of a candidate of about the
    share asked for: the first guess, or the smallest of about the lowest forecast."""

    parent_total: int
    parent_flops: int
    tokens: int
    gpu: Gpu
    candidates: list[Candidate]
    recommended: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def plan(
    outline: dict[str, Any],
    recipe: Recipe,
    share: float,
    tokens: int,
    gpu: Gpu,
    spectra: Mapping[int, Tensor] | None = None,
    fit_tokens: int | None = None,
) -> Plan:
    """The presets, and shapes of about `share` active parameters.

    outline: of `molcli.families.parent.outline`. tokens: of the training budget. spectra:
    `layer_spectra` by layer; fit_tokens: of the calibration, if not those of the recipe. Of
    recipe.upcycle counts what is no matter of shape: layers and mixers. Raises MolError where
    it does not fit the parent.
    """
    dense = {name: value for name, value in outline.items() if name != "dtype"}
    dtype = outline["dtype"] or torch.bfloat16
    recipe = recipe if fit_tokens is None else _with_tokens(recipe, fit_tokens)
    found = []
    for name, options in _shapes(dense, recipe.upcycle, share):
        config = converted_config(dense, options)
        count, parent = count_parameters(config), count_parameters(parent_of(config))
        about = recipe.calibrate
        kl = None
        if spectra is not None:
            kl = FORECAST.kl(predictors(config, spectra, about.tokens))
        found.append(
            Candidate(
                name=name,
                settings=_settings(config, options),
                total=count.total,
                active=count.active,
                share=(count.active - count.embedding) / parent.non_embedding,
                flops=count_flops(config, recipe.train.context_length).active,
                checkpoint=count.total * dtype.itemsize,
                conversion=conversion_cost(config, about.tokens, about.heldout_tokens, gpu),
                training=training_cost(config, recipe.train, tokens, gpu),
                kl=kl,
            )
        )
    whole = parent_of(config)
    return Plan(
        count_parameters(whole).total,
        count_flops(whole, recipe.train.context_length).active,
        tokens,
        gpu,
        found,
        _recommended(found),
    )


def _shapes(
    dense: dict[str, Any], options: UpcycleConfig, share: float
) -> Iterator[tuple[str, UpcycleConfig]]:
    """Presets first, then the candidates, the best guess without a forecast first of these."""
    free = replace(
        options,
        d_thin=None,
        d_ff_thin=None,
        num_heads_thin=None,
        d_thin_shared=None,
        d_ff_thin_shared=None,
        num_heads_shared=None,
    )
    for preset in PRESETS:
        yield preset, replace(free, preset=preset)
    shape = parent_shape(dense)
    found = [*_split(free, shape, share), *_alike(free, shape, share)]
    if options.layers == "all":
        found = [*_of_some_layers(free, dense["num_hidden_layers"], share), *found]
    if not found:
        raise MolError(
            f"--active is {share:.1%}, which leaves no room for neurons beside the parent's heads",
            allowed="a larger share",
            hint="--active 50%",
        )
    yield from found


def _of_some_layers(
    free: UpcycleConfig, layers: int, share: float
) -> Iterator[tuple[str, UpcycleConfig]]:
    """Presets below the share, in as many of the middle layers as they take; the others stay
    dense. Of SmolLM2-135M, the thinner in fewer layers keep more right after conversion
    (tests/bench/results/shared-shape.md)."""
    for preset in reversed(PRESETS):
        saved = 1 - ACTIVE_FRACTION[preset]
        few = ceil(layers * (1 - share) / saved)
        if 0 < few < layers:
            budget = round(few / layers, 4)
            options = replace(free, preset=preset, layers="middle", layers_budget=budget)
            yield f"{preset} in {few} of {layers} layers", options


def _split(
    free: UpcycleConfig, dense: BlockShape, share: float
) -> Iterator[tuple[str, UpcycleConfig]]:
    """Shared blocks of another shape than the routed ones, as presets have them."""
    for blocks, shared, top_k in SPLIT_BLOCKS:
        wide, thin = split_shapes(share, shared, top_k, dense)
        cost = shared * wide.num_thin_weights(dense.width) + top_k * thin.num_thin_weights(
            dense.width
        )
        if cost <= share * dense.num_weights:  # more, where that leaves no room for neurons
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


def _alike(
    free: UpcycleConfig, dense: BlockShape, share: float
) -> Iterator[tuple[str, UpcycleConfig]]:
    """Blocks of one shape, as in the paper."""
    for blocks, shared, top_k in BLOCKS:
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


def _with_tokens(recipe: Recipe, tokens: int) -> Recipe:
    return replace(recipe, calibrate=replace(recipe.calibrate, tokens=tokens))


def _recommended(candidates: list[Candidate]) -> str:
    """Presets that cost no more than the candidates compete by forecast: without, they are no
    guess."""
    made = [c for c in candidates if c.name not in PRESETS]
    most = max(c.share for c in made)
    forecast = [(c.kl, c.total, c.name) for c in candidates if c.kl is not None and c.share <= most]
    if not forecast:
        return made[0].name
    enough = min(forecast)[0] * (1 + FORECAST_TOLERANCE)
    return min((total, kl, name) for kl, total, name in forecast if kl <= enough)[2]
