"""Compare the converted model with baselines and with the parent on the held-out text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from molcli.data.packing import TokenRows
from molcli.estimate.parameters import count_parameters
from molcli.families.parent import Parent
from molcli.fitting.baselines import BaselineInputs, baseline_layer, methods_for
from molcli.fitting.residuals import LayerSensitivity, OutputHead, Residuals, influence
from molcli.model.checkpoint import default_device, open_checkpoint
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import DenseLayer, Layer
from molcli.model.parent import continue_greedily, dense_layer, load_dense

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 16, 32


def continuations(checkpoint: Path, parent: Parent, rows: TokenRows) -> list[dict[str, str]] | None:
    """Continue some documents greedily with the converted model and with its parent.

    The prompts are the first PROMPT_TOKENS tokens of the first PROMPTS documents that have so many.
    Both models are loaded completely, one after the other.

    Returns:
        For each prompt, the texts `prompt`, `parent` and `model`. None without a tokenizer, or
        where the prompts fill all positions.
    """
    tokenizer = parent.tokenizer()
    if tokenizer is None:
        return None
    documents = [ids[:PROMPT_TOKENS] for ids in _documents(rows)]
    longest = max(map(len, documents))
    prompts = [ids for ids in documents if len(ids) == longest][:PROMPTS]
    device = default_device()
    student = open_checkpoint(checkpoint, device)
    dtype, positions = student.dtype, student.config.max_position_embeddings
    new = min(NEW_TOKENS, positions - longest)
    if new < 1:
        return None
    ours = [continue_greedily(student, tokenizer, ids, new) for ids in prompts]
    del student
    dense = load_dense(parent, dtype, device)
    theirs = [continue_greedily(dense, tokenizer, ids, new) for ids in prompts]
    starts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in prompts]
    return [
        {
            "prompt": start,
            "parent": of_parent.removeprefix(start),
            "model": of_student.removeprefix(start),
        }
        for start, of_parent, of_student in zip(starts, theirs, ours, strict=True)
    ]


def _documents(rows: TokenRows) -> Iterator[list[int]]:
    for ids, documents, length in zip(
        rows.input_ids, rows.document_ids, rows.lengths.tolist(), strict=True
    ):
        for number in documents[:length].unique().tolist():
            yield ids[:length][documents[:length] == number].tolist()


class Comparison:
    """Run the baselines through all layers beside the student, up to the logits.

    "skipped": the converted layers add nothing. `methods_for`: the same shape, not fitted.
    "depth_pruned": the parent without its least influential layers, as many as bring it down to the
    student's active parameters; missing where the student has no fewer than the parent. Influence
    is one minus the cosine of a layer's input and output (arXiv 2403.03853), on the text that
    blocks are fitted to.

    Attributes:
        sensitivity: of every converted layer.
    """

    def __init__(
        self, parent: Parent, config: MoLConfig, rows: TokenRows, heldout: Residuals, seed: int
    ) -> None:
        """rows, heldout: the held-out text, and its residuals before the first layer."""
        device = heldout.parent.device
        self.sensitivity = LayerSensitivity(rows, config, parent.embedding(), device)
        self._parent, self._config, self._seed = parent, config, seed
        self._heldout, self._start = heldout, heldout.parent
        self._methods = methods_for(config)
        self._residuals = dict.fromkeys(("skipped", *self._methods), heldout.parent)
        self._influence: list[float] = []

    def advance(
        self,
        inputs: BaselineInputs,
        converted: Layer,
        before: Tensor,
        fit_after: Tensor,
    ) -> None:
        """Move the residuals of all baselines past a layer. `heldout` is past it already.

        Args:
            inputs: of the layer's baselines, with the text that blocks are fitted to.
            converted: the student's layer.
            before: (n, d_model), the parent's held-out residual before the layer.
            fit_after: `inputs.x` after the layer.
        """
        assert inputs.dense is not None
        self.sensitivity.advance(inputs.index, inputs.dense, converted)
        self._influence.append(influence(inputs.x, fit_after))
        if self._config.is_dense(inputs.index):
            self._residuals = self._run_dense(inputs.dense, before)
            return
        if self._config.is_skipped(inputs.index):
            return
        for method in self._methods:
            layer = baseline_layer(method, self._config, inputs, self._seed).layer
            self._residuals[method] = self._heldout.chunks.run(layer, self._residuals[method])

    def _run_dense(self, dense: DenseLayer, before: Tensor) -> dict[str, Tensor]:
        """Run a kept layer once per different residual: many are equal below the first converted
        layer."""
        after = {id(before): self._heldout.parent}
        for x in self._residuals.values():
            if id(x) not in after:
                after[id(x)] = self._heldout.chunks.run(dense, x)
        return {name: after[id(x)] for name, x in self._residuals.items()}

    def figures(self, head: OutputHead) -> dict[str, dict[str, Any]]:
        """Return the figures of each baseline. After the last layer.

        ce, kl (nats per predicted token), params_total, params_active; for depth_pruned also
        `layers`, those that are left out.
        """
        count = count_parameters(self._config)
        full = {"params_total": count.total, "params_active": count.active}
        structures = self._config.layer_structures
        skipped = self._dense_size(structures.count("dense"))
        sizes = dict.fromkeys(self._methods, full) | {"skipped": skipped}
        found: dict[str, dict[str, Any]] = {
            name: _losses(head, self._heldout, x) | sizes[name]
            for name, x in self._residuals.items()
        }
        kept = self._affordable_layers(count.active)
        if kept < len(structures):
            order = sorted(range(len(structures)), key=lambda i: self._influence[i])
            dropped = sorted(order[: len(structures) - kept])
            found["depth_pruned"] = (
                _losses(head, self._heldout, self._run_pruned(set(dropped)))
                | self._dense_size(kept)
                | {"layers": dropped}
            )
        return found

    def _run_pruned(self, dropped: set[int]) -> Tensor:
        """The parent's held-out residual after all layers but the dropped ones."""
        x, device = self._start, self._start.device
        for i in range(self._config.num_hidden_layers):
            if i not in dropped:
                layer = dense_layer(self._parent, self._config, i, device)
                x = self._heldout.chunks.run(layer, x)
        return x

    def _affordable_layers(self, active: int) -> int:
        """The most layers of a dense model with at most `active` parameters."""
        none, one = (self._dense_size(n)["params_total"] for n in (0, 1))
        return max(0, (active - none) // (one - none))

    def _dense_size(self, layers: int) -> dict[str, int]:
        kwargs = self._parent.mol_config_kwargs()
        dense = MoLConfig(
            **kwargs
            | {
                "num_hidden_layers": layers,
                "layer_structures": ["dense"] * layers,
                "sliding_windows": None,
            }
        )
        total = count_parameters(dense).total
        return {"params_total": total, "params_active": total}


def _losses(head: OutputHead, heldout: Residuals, x: Tensor) -> dict[str, Any]:
    losses = head.losses(heldout, x)
    return {name: losses[name] for name in ("ce", "kl")}
