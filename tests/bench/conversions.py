"""Cases of the conversion benchmarks, and a runner that reuses intermediate results."""

import json
import random
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from json_lines import measured
from pruned import (
    CUTS,
    Cut,
    activations,
    group_outputs,
    influences,
    kept_layers,
    kept_width,
    write_dense,
    write_narrow,
)
from speed import speeds
from torch import Tensor
from transformers.utils import logging

from molcli.config.recipe import load_recipe
from molcli.config.sections import Data, EvaluateConfig, Recipe
from molcli.data.mixture import load_documents
from molcli.data.token_folder import write_token_folder
from molcli.estimate.parameters import count_parameters
from molcli.families.parent import Parent
from molcli.fitting.calibration import Calibration, open_calibration
from molcli.fitting.converted_config import mol_config
from molcli.model import MoLConfig, MoLForCausalLM
from molcli.model.checkpoint import default_device, open_checkpoint
from molcli.model.parent import load_dense
from molcli.stages.calibrate import calibrate
from molcli.stages.evaluate import Models, measure
from molcli.stages.train import train
from molcli.stages.upcycle import upcycle

logging.disable_progress_bar()  # bars would surround each line of figures


@dataclass(frozen=True)
class Case:
    """A conversion to measure.

    Attributes:
        name: of its row.
        overrides: `section.key=value` texts, applied after those that all cases share.
    """

    name: str
    overrides: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Parse `name:key=value,key=[1, 2]`.

        A key without a section belongs to `upcycle`. The value of `method` may be one of CUTS, too.
        """
        name, _, settings = text.partition(":")
        parts = [part for part in re.split(r",(?=[\w.]+=)", settings) if part]
        keys = [part if "." in part.partition("=")[0] else f"upcycle.{part}" for part in parts]
        return cls(name, tuple(keys))

    @property
    def cut(self) -> Cut | None:
        """The baseline with fewer dense layers that replaces the conversion, if any."""
        return next((cut for cut in CUTS if _method(cut) in self.overrides), None)

    def recipe(self, base: str | None, shared: Iterable[str], seed: int) -> Recipe:
        """Return the recipe. The seed draws documents, clusters and the order of training."""
        seeds = [f"calibrate.seed={seed}", f"train.seed={seed}"]
        own = [text for text in self.overrides if text not in map(_method, CUTS)]
        return load_recipe(base, [*shared, *own, *seeds])


def _method(cut: Cut) -> str:
    return f"upcycle.method={cut}"


@dataclass
class ConversionRunner:
    """Convert one parent on one text in a scratch folder.

    Documents, the parent, calibrations and the latest conversion are reused by later calls.

    Attributes:
        parent: the dense model.
        data: source of the text, or sources by weight; all of it is read.
        folder: for checkpoints and calibrations.
        heldout: sources of text that is not used for fitting or selection, by name.
    """

    parent: Parent
    data: Data
    folder: Path
    heldout: dict[str, str] = field(default_factory=dict)
    _documents: list[list[Tensor]] = field(default_factory=list)
    _calibrations: dict[Any, tuple[Calibration, float]] = field(default_factory=dict)
    _teachers: dict[torch.dtype, MoLForCausalLM] = field(default_factory=dict)
    _newest: tuple[Any, dict[str, Any]] | None = None
    _tokens: dict[str, str] = field(default_factory=dict)

    def calibration(self, recipe: Recipe) -> tuple[Calibration, float]:
        """Return the calibration of a recipe, and the seconds that it took.

        Its documents are drawn from all of the data by the seed. `molcli calibrate` itself uses the
        first documents that are enough, in an order that depends on the seed.
        """
        about = recipe.calibrate
        if about not in self._calibrations:
            out = self.folder / f"calibration-{len(self._calibrations)}"
            text = out.with_suffix(".jsonl")
            self._draw(text, about.seed, about.tokens + about.heldout_tokens)
            settings = replace(about, data=str(text))
            _, seconds, _ = measured(lambda: calibrate(self.parent, settings, out))
            self._calibrations[about] = open_calibration(out, self.parent), seconds
        return self._calibrations[about]

    def convert(self, recipe: Recipe, cut: Cut | None = None) -> tuple[Path, dict[str, Any]]:
        """Convert. Return the checkpoint, which the next conversion overwrites, and figures."""
        out, key = self.folder / "converted", (recipe.upcycle, recipe.calibrate, cut)
        if self._newest is not None and self._newest[0] == key:
            return out, self._newest[1]
        shutil.rmtree(out, ignore_errors=True)
        self._newest = None
        calibration, calibrating = self.calibration(recipe)
        if cut is None:
            _, seconds, peak = measured(
                lambda: upcycle(self.parent, calibration.folder, recipe, out)
            )
        else:
            _, seconds, peak = measured(lambda: self._cut(cut, recipe, calibration, out))
        found = {
            "calibration_tokens": calibration.fit.tokens,
            "calibration_data": calibration.about["data"][:12],
            "calibration_seconds": calibrating,
            "seconds": seconds,
            "peak_gb": peak,
        }
        self._newest = key, found | self.size(out) | _receipt(out)
        return out, self._newest[1]

    def figures(
        self, checkpoint: Path, config: EvaluateConfig, *, generate: bool = False
    ) -> dict[str, Any]:
        """Return the figures of `molcli eval` on held-out text.

        gap: cross-entropy minus the parent's, in nats a token; gap, kl and the like are those of
        the first text. texts: the same of every text. With `generate`, also recall, the share of
        right answers of model and parent by distance, and greedy, the mean number of tokens before
        the greedy continuation differs from the parent's.
        """
        if not self.heldout:
            return {}
        model = open_checkpoint(checkpoint, default_device())
        models = Models(model, self.teacher(model.dtype), self.parent.tokenizer())
        quick = replace(config, num_prompts=0, recall_sequences=0)
        texts: dict[str, dict[str, Any]] = {}
        about: dict[str, Any] = {}
        for name, source in self.heldout.items():
            first = generate and not texts
            report = measure(models, source, config if first else quick)
            result = report.heldout
            assert result is not None and result.parent_ce is not None
            names = "ce", "parent_ce", "kl", "agreement", "tokens"
            own = {"gap": result.ce - result.parent_ce} | {n: getattr(result, n) for n in names}
            texts[name] = own
            if first and report.generation is not None:
                about["greedy"] = report.generation.matching_tokens
            if first:
                about["recall"] = {
                    str(r.distance): [x.accuracy for x in (r.model, r.parent) if x is not None]
                    for r in report.recall
                }
        return next(iter(texts.values())) | about | {"texts": texts}

    def train(self, checkpoint: Path, data: Data, recipe: Recipe) -> tuple[Path, dict[str, Any]]:
        """Train. Return the trained model, which the next training overwrites, and figures."""
        out, tokens = self.folder / "trained", self._tokenised(data)
        shutil.rmtree(out, ignore_errors=True)
        torch.compiler.reset()  # each training compiles anew, as a command would
        quiet = replace(recipe, train=replace(recipe.train, checkpoint_every=0))
        result, seconds, peak = measured(lambda: train(checkpoint, out, tokens, quiet, self.parent))
        speed = {"tokens_per_second": round(result.tokens_per_second), "skipped": result.skipped}
        return out, {"trained_tokens": result.tokens, "seconds": seconds, "peak_gb": peak} | speed

    def size(self, checkpoint: Path) -> dict[str, Any]:
        """Return parameter counts. share: active over the parent's, both without embeddings."""
        count = count_parameters(MoLConfig.from_pretrained(checkpoint))
        parent = count_parameters(MoLConfig(**self.parent.mol_config_kwargs()))
        share = (count.active - count.embedding) / parent.non_embedding
        return {"total": count.total, "active": count.active, "share": round(share, 4)}

    def dense(self) -> dict[str, Any]:
        """Return size and speed of the parent, as a checkpoint of ours and by transformers."""
        out = self.folder / "parent"
        write_dense(self.parent, list(range(self.parent.config.num_hidden_layers)), out)
        found = self.size(out) | {"speed": speeds(out, self.parent.config)}
        shutil.rmtree(out)
        return found

    def teacher(self, dtype: torch.dtype) -> MoLForCausalLM:
        """Return the parent as a model."""
        if dtype not in self._teachers:
            self._teachers[dtype] = load_dense(self.parent, dtype, default_device())
        return self._teachers[dtype]

    def _draw(self, out: Path, seed: int, tokens: int) -> None:
        """Write documents in an order drawn by the seed, until they have enough tokens. Of several
        sources, the next document is of the one that is furthest behind its weight."""
        weights = {self.data: 1.0} if isinstance(self.data, str) else self.data
        if not self._documents:
            size, tokenizer = self.parent.config.vocab_size, self.parent.tokenizer()
            for source in weights:
                found = load_documents(source, tokenizer, vocab_size=size, limit=None)
                self._documents.append(list(found))
        draw = random.Random(seed)
        orders = [iter(draw.sample(own, len(own))) for own in self._documents]
        written, shares = [0] * len(orders), list(weights.values())
        with out.open("w", encoding="utf-8") as file:
            while sum(written) < tokens:
                behind = min(range(len(orders)), key=lambda i: written[i] / shares[i])
                document = next(orders[behind], None)
                if document is None:
                    break
                file.write(json.dumps({"input_ids": document.tolist()}) + "\n")
                written[behind] += len(document)

    def _tokenised(self, data: Data) -> Data:
        if isinstance(data, str):
            return self._token_folder(data)
        return {self._token_folder(source): weight for source, weight in data.items()}

    def _token_folder(self, data: str) -> str:
        tokenizer = self.parent.tokenizer()
        if Path(data).is_dir() or tokenizer is None:
            return data
        if data not in self._tokens:
            out = self.folder / f"tokens-{len(self._tokens)}"
            size = self.parent.config.vocab_size
            documents = load_documents(data, tokenizer, vocab_size=size, limit=None)
            write_token_folder(documents, out, tokenizer, source=data)
            self._tokens[data] = str(out)
        return self._tokens[data]

    def _cut(self, cut: Cut, recipe: Recipe, calibration: Calibration, out: Path) -> None:
        shape = mol_config(self.parent, recipe.upcycle)
        # Conversions on a CPU compute in fp32; the checkpoint has the parent's dtype.
        dtype = self.parent.embedding().dtype if torch.cuda.is_available() else torch.float32
        if cut == "width_pruned":
            teacher, (groups, neurons) = self.teacher(dtype), kept_width(shape)
            scores = activations(teacher, calibration.fit), neurons
            outputs = group_outputs(teacher, calibration.fit), groups
            write_narrow(self.parent, out, scores, outputs)
            return
        layers = kept_layers(cut, shape, lambda: influences(self.teacher(dtype), calibration.fit))
        write_dense(self.parent, layers, out)


def _receipt(checkpoint: Path) -> dict[str, Any]:
    """Figures of the conversion's receipt, on rows that its calibration held out."""
    file = checkpoint / "receipt.json"
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))["heldout"]
    return {"receipt": {"gap": found["ce"] - found["parent_ce"], "kl": found["kl"]}}
