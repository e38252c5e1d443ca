"""Upcycle a dense model, convert its attention, and prepare the text that both are fitted to."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molcli.api.arguments import Settings, Text, as_data, open_dense, resolve_recipe
from molcli.config.layer_choice import parse_choice
from molcli.errors import MolError
from molcli.report.bars import bar

if TYPE_CHECKING:  # these import torch, or take time to import
    from molcli.config.sections import CalibrateConfig, Data, Preset, Recipe, SampleConfig
    from molcli.families.parent import Parent
    from molcli.stages.convert import ConversionText as PackedText
    from molcli.stages.convert import SourceCheckpoint


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint.

    folder: where it lies. report: the content of its `receipt.json` (upcycle) or `convert.json`
    (convert): errors and losses on held-out text, parameters, versions.
    """

    folder: Path
    report: dict[str, Any]


def upcycle(
    parent: str | Path | Parent,
    out: str | Path,
    *,
    data: Text | None = None,
    preset: Preset | None = None,
    calibration: str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    settings: Settings = (),
    progress: bool = True,
    **values: Any,
) -> Conversion:
    """Turn a dense model into a Mixture of Layers model.

    Args:
        parent: The dense model: a folder with safetensors, a Hub id, or a .gguf file.
        out: The folder to write; must not exist.
        data: Text to fit the blocks to, several sources mixed by weight. Without it, that of
            calibrate.data in the recipe, else of train.data, so that the blocks are fitted to what
            they are trained on, else text sampled from the parent. A part of it repeats itself
            (calibrate.repeats).
        preset: The active part of the layers' weights: "quality" 75%, "balanced" 50%, "fast" 37.5%.
            "paper" makes thin blocks in the form of the paper.
        calibration: A folder that `calibrate` wrote for this parent, in place of `data`.
        recipe: A .yaml file, the name of a bundled recipe, or a loaded recipe.
        settings: Values that replace those of the recipe, such as {"upcycle.d_thin": 192}.
        progress: Draw progress bars.
        **values: Keys of the section `upcycle`, such as d_thin=192.

    Returns:
        The folder and its receipt.

    Raises:
        MolError: Recipe, parent, text or output folder cannot be used. Nothing is left in `out`.

    Example:
        >>> molcli.upcycle("parent", "out", data="text.jsonl", preset="quality")
    """
    out = Path(out)
    found = resolve_recipe("upcycle", recipe, settings, values, preset=preset)
    found = with_data(found, as_data(data))
    from molcli.files.folders import refuse_existing
    from molcli.files.hidden_folders import SCRATCH, hidden_folder

    refuse_existing(out)
    dense = open_dense(parent, show_note=progress)
    from molcli.fitting.converted_config import mol_config, needs_text
    from molcli.stages.upcycle import upcycle as run

    # A recipe that does not fit the parent is refused here, before the long calibration.
    needed = needs_text(mol_config(dense, found.upcycle), found.upcycle)
    if needed and calibration is None:
        found = _with_train_data(found)
    folder = None if calibration is None else Path(calibration)
    with hidden_folder(out, SCRATCH) as scratch:  # /tmp is often small
        # Text is not sampled for blocks that are not fitted to it. Their receipt then has no
        # held-out figures.
        if folder is None and (found.calibrate.data is not None or needed):
            folder = scratch / "calibration"
            found = _as_sampled(dense, found)  # what recipe.yaml records
            calibrate(dense, folder, recipe=found, progress=progress)
        with bar("upcycling", shown=progress) as report:
            run(dense, folder, found, out, progress=report)
    return Conversion(out, _read_json(out / "receipt.json"))


def convert(
    checkpoint: str | Path,
    out: str | Path,
    *,
    gated_deltanet: str | list[int] | None = None,
    data: Text | None = None,
    calibration: str | Path | None = None,
    parent: str | Path | Parent | None = None,
    recipe: str | Path | Recipe | None = None,
    settings: Settings = (),
    progress: bool = True,
    **values: Any,
) -> Conversion:
    """Turn softmax attention of a Mixture of Layers model into Gated DeltaNet.

    It is fitted to `data`, else to the text of a calibration, else to calibrate.data in the recipe,
    else to text sampled from the parent.

    Args:
        checkpoint: The folder of a Mixture of Layers model.
        out: The folder to write; must not exist.
        gated_deltanet: "all", "auto", "every:N", "none", or layers, which may be dense ones.
        data: Text to fit to.
        calibration: A folder that `calibrate` wrote.
        parent: The dense model that text is sampled from where there is no other.
        recipe: A .yaml file, the name of a bundled recipe, or a loaded recipe. None takes the one
            saved in the checkpoint.
        settings: Values that replace those of the recipe, such as {"convert.steps": 100}.
        progress: Draw progress bars.
        **values: Keys of the section `convert`, such as steps=100.

    Returns:
        The folder and the content of its `convert.json`.

    Raises:
        MolError: Checkpoint, layers, text or output folder cannot be used. Nothing is left in
            `out`.

    Example:
        >>> molcli.convert("out", "out-gdn", gated_deltanet="auto", data="text.jsonl")
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if isinstance(gated_deltanet, str):
        values["gated_deltanet"] = parse_choice(gated_deltanet)
    elif gated_deltanet is not None:
        values["gated_deltanet"] = gated_deltanet
    found = resolve_recipe("convert", recipe, settings, values, checkpoint=checkpoint)
    found = with_data(found, as_data(data))
    from molcli.files.folders import refuse_existing
    from molcli.files.hidden_folders import SCRATCH, hidden_folder

    refuse_existing(out)
    dense = None if parent is None else open_dense(parent, show_note=progress)
    from molcli.stages.convert import convert as run
    from molcli.stages.convert import open_source_checkpoint, select_layers

    source = open_source_checkpoint(checkpoint)
    # A choice that does not fit the model is refused here, before text is read or sampled.
    plan = select_layers(source.config, found.convert.gated_deltanet)
    folder = None if calibration is None or data is not None else Path(calibration)
    with hidden_folder(out, SCRATCH) as scratch:  # /tmp is often small
        text = None
        if plan.layers != set():
            try:
                text, found = _packed_text(source, found, dense, folder, scratch, progress=progress)
            except MolError as error:
                if data is None and folder is None and str(found.calibrate.data) in error.found:
                    error.hint = (  # of a recipe, often of the one that was saved long ago
                        "--data FILE or --calibration DIR; --set calibrate.data=null samples text "
                        "from --parent"
                    )
                raise
        with bar("converting", shown=progress) as report:
            run(source, text, found, out, progress=report)
    return Conversion(out, _read_json(out / "convert.json"))


def calibrate(
    parent: str | Path | Parent,
    out: str | Path,
    *,
    data: Text | None = None,
    recipe: str | Path | Recipe | None = None,
    settings: Settings = (),
    progress: bool = True,
    **values: Any,
) -> Path:
    """Run text through the parent and keep the statistics that `upcycle` fits to.

    Args:
        parent: The dense model: a folder with safetensors, a Hub id, or a .gguf file.
        out: The folder to write; must not exist.
        data: Text, several sources mixed by weight. Without it, that of calibrate.data in the
            recipe, else of train.data, else text sampled from the parent. A part of it repeats
            itself (calibrate.repeats).
        recipe: A .yaml file, the name of a bundled recipe, or a loaded recipe.
        settings: Values that replace those of the recipe.
        progress: Draw progress bars.
        **values: Keys of the section `calibrate`, such as tokens=262_144.

    Returns:
        The folder, for the argument `calibration` of other functions.

    Raises:
        MolError: Recipe, parent, text or output folder cannot be used.

    Example:
        >>> molcli.calibrate("parent", "calibration", data="text.jsonl")
    """
    out = Path(out)
    found = with_data(resolve_recipe("calibrate", recipe, settings, values), as_data(data))
    found = _with_train_data(found)
    from molcli.files.folders import refuse_existing
    from molcli.files.hidden_folders import SCRATCH, hidden_folder

    refuse_existing(out)
    dense = open_dense(parent, show_note=progress)
    from molcli.stages.calibrate import calibrate as run

    config, sampled = found.calibrate, None
    # Refused here too: sampling takes longer than reading text.
    dense.check_context(config.context_length, "calibrate.context_length")
    with hidden_folder(out, SCRATCH) as scratch:  # /tmp is often small
        if config.data is None:
            sampled = _needed_sample(dense, found)
            config = _with_sample(dense, found, scratch, progress=progress)
        with bar("calibrating", shown=progress) as report:
            run(dense, config, out, progress=report, sampled=sampled)
    return out


def sample(
    parent: str | Path | Parent,
    out: str | Path,
    *,
    recipe: str | Path | Recipe | None = None,
    settings: Settings = (),
    progress: bool = True,
    **values: Any,
) -> Path:
    """Write text sampled from the parent, for use where there is no data set.

    Args:
        parent: The dense model: a folder with safetensors, a Hub id, or a .gguf file.
        out: The .jsonl file to write; must not exist.
        recipe: A .yaml file, the name of a bundled recipe, or a loaded recipe.
        settings: Values that replace those of the recipe.
        progress: Draw a progress bar.
        **values: Keys of the section `sample`, such as tokens=1_000_000 or prompts="prompts.txt".

    Returns:
        The file.

    Raises:
        MolError: Recipe, parent, prompts or output file cannot be used.

    Example:
        >>> molcli.sample("parent", "text.jsonl", tokens=1_000_000)
    """
    out = Path(out)
    found = resolve_recipe("sample", recipe, settings, values)
    dense = open_dense(parent, show_note=progress)
    from molcli.stages.sample import sample as run

    with bar("sampling", shown=progress) as report:
        run(dense, found.sample, out, progress=report)
    return out


def with_data(recipe: Recipe, data: Data | None) -> Recipe:
    """Return the recipe with `data` as its calibrate.data, if there is any."""
    if data is None:
        return recipe
    return replace(recipe, calibrate=replace(recipe.calibrate, data=data))


def _with_train_data(recipe: Recipe) -> Recipe:
    """Return the recipe with train.data as its calibrate.data, where that is null."""
    return recipe if recipe.calibrate.data is not None else with_data(recipe, recipe.train.data)


def _packed_text(
    source: SourceCheckpoint,
    recipe: Recipe,
    parent: Parent | None,
    calibration: Path | None,
    scratch: Path,
    *,
    progress: bool,
) -> tuple[PackedText, Recipe]:
    """The text of the calibration, else recipe.calibrate.data, else a sample of the parent's.

    Returns:
        The text, and the recipe with the values that were in force for it.
    """
    from molcli.data.tokenizer import open_tokenizer
    from molcli.fitting.calibration import open_calibration, split_text, text_hash
    from molcli.stages.convert import ConversionText as PackedText

    size = source.config.vocab_size
    config = recipe.calibrate
    if calibration is None:
        source.config.check_context(config.context_length, "calibrate.context_length")
    if calibration is not None:
        found = open_calibration(calibration, parent)
        fit, heldout = found.fit, found.heldout
        recipe = found.in_force(recipe)
    else:
        if config.data is None:
            if parent is None:
                raise MolError(
                    "there is no text to fit Gated DeltaNet to",
                    allowed="--data FILE, --calibration DIR, or a --parent to sample text from",
                )
            recipe = _as_sampled(parent, recipe)
            config = _with_sample(parent, recipe, scratch, progress=progress)
        fit, heldout = split_text(config, open_tokenizer(source.folder), size)
    largest = max(int(rows.input_ids.max()) for rows in (fit, heldout))
    if largest >= size:
        raise MolError(
            f"the text has token {largest}, the model a vocabulary of {size}",
            allowed="text of the model's own vocabulary",
        )
    return PackedText(fit, heldout, text_hash(fit, heldout)), recipe


def _with_sample(
    parent: Parent, recipe: Recipe, scratch: Path, *, progress: bool
) -> CalibrateConfig:
    """recipe.calibrate, with as much text as it needs sampled from the parent into `scratch`."""
    text = scratch / "sample.jsonl"
    sample(parent, text, recipe=_as_sampled(parent, recipe), progress=progress)
    return replace(recipe.calibrate, data=str(text))


def _as_sampled(parent: Parent, recipe: Recipe) -> Recipe:
    """The recipe with the section `sample` that is in force where calibrate.data is null."""
    if recipe.calibrate.data is not None:
        return recipe
    return replace(recipe, sample=_needed_sample(parent, recipe))


def _needed_sample(parent: Parent, recipe: Recipe) -> SampleConfig:
    """recipe.sample, for as many tokens as a calibration needs, and with its seed.

    Without repeats: a calibration makes its own, and its held-out text has none.
    """
    config, length = recipe.calibrate, recipe.sample.length
    if length == type(recipe.sample).length:  # a default has to fit every parent
        length = min(length, parent.config.max_position_embeddings)
    tokens = config.tokens + config.heldout_tokens
    return replace(recipe.sample, tokens=tokens, seed=config.seed, length=length, repeats=0.0)


def _read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
