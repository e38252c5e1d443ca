"""Open a model, measure it, look at its routing, and plan the shape of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molcli.api.arguments import Settings, open_dense, resolve_recipe
from molcli.errors import MolError
from molcli.report.bars import bar

if TYPE_CHECKING:  # these import torch, or take time to import
    import torch

    from molcli.config.sections import Recipe
    from molcli.families.parent import Parent
    from molcli.model import MoLForCausalLM
    from molcli.stages.evaluate import Report
    from molcli.stages.inspect import RoutingReport
    from molcli.stages.plan import Plan


def open_model(
    checkpoint: str | Path, *, device: str | torch.device | None = None
) -> MoLForCausalLM:
    """Open a Mixture of Layers model, in evaluation mode.

    Also registers the model type, so that AutoModelForCausalLM.from_pretrained opens such folders.

    Args:
        checkpoint: The folder of a Mixture of Layers model.
        device: Where the weights go; None is the GPU if there is one. On a GPU they have the
            dtype in which they are stored, on a CPU float32.

    Returns:
        A transformers model, with `generate` and `save_pretrained`.

    Raises:
        MolError: The folder holds no Mixture of Layers model, or an incomplete one.

    Example:
        >>> model = molcli.open_model("out")
        >>> model.generate(**tokenizer("Gravity is", return_tensors="pt"), max_new_tokens=40)
    """
    import torch

    from molcli.model.checkpoint import default_device, open_checkpoint

    chosen = default_device() if device is None else torch.device(device)
    return open_checkpoint(Path(checkpoint), chosen)


def evaluate(
    checkpoint: str | Path,
    *,
    data: str | Path | None = None,
    parent: str | Path | Parent | None = None,
    tasks: Sequence[str] | None = None,
    include_path: str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    settings: Settings = (),
    progress: bool = True,
    **values: Any,
) -> Report:
    """Measure a model, and its parent beside it.

    Args:
        checkpoint: The folder of a Mixture of Layers model.
        data: Held-out text, for the cross-entropy and, with a parent, KL and agreement.
        parent: The dense model that it was made from.
        tasks: Names of lm-eval's tasks, which the extra `eval` installs.
        include_path: A folder with task files of your own.
        recipe: A .yaml file, the name of a bundled recipe, or a loaded recipe. None takes the one
            saved in the checkpoint.
        settings: Values that replace those of the recipe.
        progress: Draw progress bars.
        **values: Keys of the section `evaluate`, such as tokens=16_384.

    Returns:
        Losses on the text, agreement of greedy continuations, recall, and scores of tasks. What
        was not measured is None or empty.

    Raises:
        MolError: Checkpoint, parent, text or tasks cannot be used, or there is nothing to measure.

    Example:
        >>> molcli.evaluate("out", data="heldout.txt", parent="parent").heldout.kl
    """
    checkpoint = Path(checkpoint)
    config = resolve_recipe("evaluate", recipe, settings, values, checkpoint=checkpoint).evaluate
    from molcli.stages.evaluate import measure, open_models, open_tasks

    dense = None if parent is None else open_dense(parent, show_note=progress)
    if include_path is not None and tasks is None:
        raise MolError(
            f"--include-path is {include_path}, but there are no --tasks",
            hint=f"--include-path {include_path} --tasks NAME",
        )
    folder = None if include_path is None else Path(include_path)
    known = None if tasks is None else open_tasks(list(tasks), folder)
    with bar("evaluating", shown=progress) as report:
        models = open_models(checkpoint, dense)
        found = measure(models, None if data is None else str(data), config, report)
    if known is not None:
        return replace(found, tasks=known.run(models, config.batch_size))
    if found.heldout is None and not found.recall:
        reason = found.skipped.get("recall", "evaluate.recall_sequences is 0")
        raise MolError(
            f"there is nothing to measure: no --data, no --tasks, and no recall ({reason})",
            allowed="at least one of them",
            hint=f"molcli eval {checkpoint} --data heldout.txt",
        )
    return found


def inspect(
    checkpoint: str | Path,
    data: str | Path,
    *,
    recipe: str | Path | Recipe | None = None,
    settings: Settings = (),
    progress: bool = True,
    **values: Any,
) -> RoutingReport:
    """Count the tokens that each routed block processes.

    Args:
        checkpoint: The folder of a Mixture of Layers model.
        data: Text to route.
        recipe: A .yaml file, the name of a bundled recipe, or a loaded recipe. None takes the one
            saved in the checkpoint.
        settings: Values that replace those of the recipe.
        progress: Draw a progress bar.
        **values: Keys of the section `inspect`, such as tokens=16_384.

    Returns:
        For each layer: load, entropy, dead blocks, weights, and gaps between tokens.

    Raises:
        MolError: Checkpoint or text cannot be used, or the model has no routed blocks.

    Example:
        >>> molcli.inspect("out", "text.txt").layers[0].summary
    """
    checkpoint = Path(checkpoint)
    config = resolve_recipe("inspect", recipe, settings, values, checkpoint=checkpoint).inspect
    from molcli.stages.inspect import inspect_routing

    with bar("inspecting", shown=progress) as report:
        return inspect_routing(checkpoint, str(data), config, progress=report)


def plan(
    parent: str | Path,
    *,
    active: float = 0.5,
    tokens: int | None = None,
    gpu: str = "h100",
    calibration: str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    settings: Settings = (),
    progress: bool = True,
    **values: Any,
) -> Plan:
    """Estimate size, operations, memory and time of converted models of several shapes.

    Args:
        parent: The dense model; without a calibration, its configuration alone is read.
        active: Fraction of the parent's parameters, embeddings left out, that run on a token.
        tokens: Training tokens; None takes `train.tokens` of the recipe.
        gpu: The GPU that time and memory are estimated for, such as "h100" or "a100".
        calibration: A folder that `calibrate` wrote: the KL after conversion is forecast, too.
        recipe: A .yaml file, the name of a bundled recipe, or a loaded recipe.
        settings: Values that replace those of the recipe.
        progress: Draw a progress bar.
        **values: Keys of the section `upcycle` but for those of shapes, which are chosen here.

    Returns:
        The candidates, and the name of the recommended one.

    Raises:
        MolError: An argument is out of range, or parent or calibration cannot be used.

    Example:
        >>> molcli.plan("parent", active=0.6, tokens=30_000_000).recommended
    """
    found = resolve_recipe("upcycle", recipe, settings, values)
    if not 0 < active <= 1:
        raise MolError(f"active is {active}", allowed="more than 0, at most 1", hint="active=0.5")
    budget = found.train.tokens if tokens is None else tokens
    if budget < 1:
        raise MolError(f"tokens is {budget}", allowed="1 or more", hint="tokens=30_000_000")
    from molcli.estimate.forecast import layer_spectra
    from molcli.estimate.gpus import GPUS
    from molcli.families.parent import open_parent, outline
    from molcli.fitting.converted_config import converted_config
    from molcli.stages.plan import plan as run

    if gpu.lower() not in GPUS:
        raise MolError(f"--gpu is {gpu}", allowed=", ".join(GPUS), hint="--gpu h100")
    chosen = GPUS[gpu.lower()]
    if calibration is None:
        return run(outline(parent), found, active, budget, chosen)
    from molcli.fitting.calibration import open_calibration

    dense = open_parent(parent)
    text = open_calibration(Path(calibration), dense)
    converted = converted_config(dense.mol_config_kwargs(), found.upcycle)
    layers = converted.converted_layers
    spectra = {}
    with bar("spectra", shown=progress) as report:
        for i, spectrum in layer_spectra(dense, text.moment, layers):
            spectra[i] = spectrum
            report(len(spectra), len(layers))
    return run(outline(parent), found, active, budget, chosen, spectra, text.fit.tokens)
