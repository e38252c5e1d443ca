"""What the benchmarks of conversions share: cases, and a workshop that does nothing twice."""

import json
import random
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lines import measured
from pruned import CUTS, Cut, influences, kept_layers, write_dense
from torch import Tensor
from transformers.utils import logging

from molcli.config.recipe import load_recipe
from molcli.config.sections import Data, EvaluateConfig, Recipe
from molcli.data.mixture import load_documents
from molcli.data.token_folder import write_token_folder
from molcli.estimate.parameters import count_parameters
from molcli.families.parent import Parent
from molcli.fitting.calibration import Calibration, open_calibration
from molcli.fitting.shapes import mol_config
from molcli.model import MoLConfig, MoLForCausalLM
from molcli.model.checkpoint import default_device, open_checkpoint
from molcli.model.parent import load_dense
from molcli.stages.calibrate import calibrate
from molcli.stages.evaluate import Models, measure
from molcli.stages.train import train
from molcli.stages.upcycle import upcycle

logging.disable_progress_bar()  # lines of bars around each line of figures


@dataclass(frozen=True)
class Case:
    """A name, and `section.key=value` texts on top of what all cases share."""

    name: str
    overrides: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Case":
        """`name:key=value,key=[1, 2]`; a key without a section is one of `upcycle`, whose method
        may be one of CUTS, too."""
        name, _, settings = text.partition(":")
        parts = [part for part in re.split(r",(?=[\w.]+=)", settings) if part]
        keys = [part if "." in part.partition("=")[0] else f"upcycle.{part}" for part in parts]
        return cls(name, tuple(keys))

    @property
    def cut(self) -> Cut | None:
        """A dense model with fewer layers in the place of a conversion."""
        return next((cut for cut in CUTS if _method(cut) in self.overrides), None)

    def recipe(self, base: str | None, shared: Iterable[str], seed: int) -> Recipe:
        """The seed draws documents, clusters and the order of training."""
        seeds = [f"calibrate.seed={seed}", f"train.seed={seed}"]
        own = [text for text in self.overrides if text not in map(_method, CUTS)]
        return load_recipe(base, [*shared, *own, *seeds])


def _method(cut: Cut) -> str:
    return f"upcycle.method={cut}"


@dataclass
class Workshop:
    """Converts one parent on one text in a scratch folder. Texts, the parent, calibrations and the
    newest conversion are kept for what comes next.

    data: text, read whole. heldout: text that nothing is fitted to or chosen by.
    """

    parent: Parent
    data: str
    folder: Path
    heldout: str | None = None
    _documents: list[Tensor] = field(default_factory=list)
    _calibrations: dict[Any, tuple[Calibration, float]] = field(default_factory=dict)
    _teachers: dict[torch.dtype, MoLForCausalLM] = field(default_factory=dict)
    _newest: tuple[Any, dict[str, Any]] | None = None
    _tokens: dict[str, str] = field(default_factory=dict)

    def calibration(self, recipe: Recipe) -> tuple[Calibration, float]:
        """And the seconds that it took. On documents that its seed draws from all of the data:
        `molcli calibrate` takes the first that are enough, in an order of the seed's."""
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
        """The checkpoint, which the next conversion overwrites, and figures of the conversion."""
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

    def figures(self, checkpoint: Path, config: EvaluateConfig) -> dict[str, Any]:
        """As `molcli eval` has them of the held-out text: gap is the cross-entropy above the
        parent's, in nats a token."""
        if self.heldout is None:
            return {}
        model = open_checkpoint(checkpoint, default_device())
        models = Models(model, self.teacher(model.dtype), self.parent.tokenizer())
        only = replace(config, num_prompts=0, recall_sequences=0)
        found = measure(models, self.heldout, only).heldout
        assert found is not None and found.parent_ce is not None
        names = "ce", "parent_ce", "kl", "agreement", "tokens"
        return {"gap": found.ce - found.parent_ce} | {n: getattr(found, n) for n in names}

    def train(self, checkpoint: Path, data: Data, recipe: Recipe) -> tuple[Path, dict[str, Any]]:
        """The trained model, which the next training overwrites, and figures of the training."""
        out, tokens = self.folder / "trained", self._tokenised(data)
        shutil.rmtree(out, ignore_errors=True)
        quiet = replace(recipe, train=replace(recipe.train, checkpoint_every=0))
        result, seconds, peak = measured(lambda: train(checkpoint, out, tokens, quiet, self.parent))
        speed = {"tokens_per_second": round(result.tokens_per_second), "skipped": result.skipped}
        return out, {"trained_tokens": result.tokens, "seconds": seconds, "peak_gb": peak} | speed

    def size(self, checkpoint: Path) -> dict[str, Any]:
        """share: active parameters over the parent's, embeddings left out of both."""
        count = count_parameters(MoLConfig.from_pretrained(checkpoint))
        parent = count_parameters(MoLConfig(**self.parent.mol_config_kwargs()))
        share = (count.active - count.embedding) / parent.non_embedding
        return {"total": count.total, "active": count.active, "share": round(share, 4)}

    def teacher(self, dtype: torch.dtype) -> MoLForCausalLM:
        """The parent as a whole."""
        if dtype not in self._teachers:
            self._teachers[dtype] = load_dense(self.parent, dtype, default_device())
        return self._teachers[dtype]

    def _draw(self, out: Path, seed: int, tokens: int) -> None:
        """Writes documents of the data, drawn by the seed, until they are enough."""
        if not self._documents:
            size, tokenizer = self.parent.config.vocab_size, self.parent.tokenizer()
            found = load_documents(self.data, tokenizer, vocab_size=size, limit=None)
            self._documents = list(found)
        order = random.Random(seed).sample(self._documents, len(self._documents))
        with out.open("w", encoding="utf-8") as file:
            for document in order:
                file.write(json.dumps({"input_ids": document.tolist()}) + "\n")
                tokens -= len(document)
                if tokens <= 0:
                    break

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
        # Without a GPU in fp32, as the conversions there compute; stored as the parent is.
        dtype = self.parent.embedding().dtype if torch.cuda.is_available() else torch.float32
        layers = kept_layers(cut, shape, lambda: influences(self.teacher(dtype), calibration.fit))
        write_dense(self.parent, layers, out)


def _receipt(checkpoint: Path) -> dict[str, Any]:
    """What the conversion measured on rows that its calibration held out."""
    file = checkpoint / "receipt.json"
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))["heldout"]
    return {"receipt": {"gap": found["ce"] - found["parent_ce"], "kl": found["kl"]}}
