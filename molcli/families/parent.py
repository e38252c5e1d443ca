"""The dense model that an upcycling starts from, opened strictly and read tensor by tensor."""

import re
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from molcli.data.tokenizer import open_tokenizer
from molcli.errors import MolError
from molcli.families import FAMILIES
from molcli.families.base import EMBEDDING, FINAL_NORM, LM_HEAD, Family, Source
from molcli.families.config_file import open_config, refuse_variant
from molcli.families.gguf import convert_gguf, read_gguf_config
from molcli.families.rotary import check_rotary
from molcli.files.finite import FLOATS, check_all_finite
from molcli.files.generation_config import TOKENS, read_generation, write_generation
from molcli.files.paths import expanded
from molcli.files.tensors import TensorReader

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_HUB_FILES = ["*.json", "model*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]
_ROWS = 4096  # of two large matrices that are compared
_SHOWN = 3  # offending tensors that an error names


@dataclass(frozen=True)
class Parent:
    """A validated dense checkpoint. No method keeps what it returns in memory.

    name: as the user gave it. folder: where its safetensors are. note: a limit to tell the user
    about, or "". tied: whether the output head is the embedding. generation: how it generates; see
    `read_generation`.
    """

    name: str
    folder: Path
    config: PreTrainedConfig
    family: Family
    note: str
    tied: bool
    generation: dict[str, Any]
    _reader: TensorReader
    _tokenizer: PreTrainedTokenizerBase | None

    @cached_property
    def dtype(self) -> torch.dtype:
        """The smallest dtype that holds the weights of all tensors, which may be stored in several.

        float16 beside bfloat16 gives float32: neither holds all numbers of the other.
        """
        names = self.family.expected(self.config, tied=self.tied)
        stored = (FLOATS[self._reader.tensors[name].dtype] for name in names)
        return reduce(torch.promote_types, stored)

    def check_weights(self) -> None:
        """Refuse weights that are NaN or infinite, of any tensor. Reads all, at the first call.

        Whatever runs the parent calls this before. Raises MolError, which names the tensor.
        """
        _ = self._weights_are_finite

    @cached_property
    def _weights_are_finite(self) -> bool:
        check_all_finite(self._reader)
        return True

    def embedding(self) -> torch.Tensor:
        """(V, D), stored dtype."""
        return self._reader.read(EMBEDDING)

    def final_norm(self) -> torch.Tensor:
        """(D,), stored dtype; float32 where the family transforms it."""
        weight, transform = self._reader.read(FINAL_NORM), self.family.final_norm_transform()
        return weight if transform is None else transform(weight)

    def lm_head(self) -> torch.Tensor | None:
        """(V, D), stored dtype; None when tied to the embedding."""
        return None if self.tied else self._reader.read(LM_HEAD)

    def dense_layer(self, index: int) -> dict[str, torch.Tensor]:
        """Read a layer as a stack of one full-width block.

        Returns:
            (1, ...) each, in the stored dtype, or float32 where the family transforms them. The
            names are those of a MoL model below `model.layers.{index}.`.
        """
        sources = self.family.layer(self.config, index)
        return {ours: self._read(source)[None] for ours, source in sources.items()}

    def _read(self, source: Source) -> torch.Tensor:
        tensor = self._reader.read(source.name, source.rows)
        return tensor if source.transform is None else source.transform(tensor)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return all tensors by their names in the files, in the stored dtype.

        transformers, given a folder, reads a tensor that is in two shards from the last one,
        whatever the index says. They are mapped from the files, not loaded.
        """
        return self._reader.read_all()

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """None if the parent came without one."""
        return self._tokenizer

    def copy_tokenizer(self, out: Path) -> None:
        """Write the tokenizer, if there is one, as this process uses it."""
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(out)

    def copy_generation(self, out: Path) -> None:
        """Writes how it generates."""
        write_generation(self.generation, out)

    def fingerprint(self) -> str:
        """sha256 that tells this checkpoint from others; see `TensorReader.fingerprint`."""
        return self._reader.fingerprint()

    def check_context(self, length: int, setting: str, *, found: str = "") -> None:
        """Refuse a context in which a converted model would not compute what the parent computes.

        The arguments are those of `ContextLimit.check`. Every use of the parent through a model of
        ours calls this; `molcli data sample` runs transformers' own model.
        """
        self.family.context_limit(self.config).check(length, setting, found=found)

    def mol_config_kwargs(self) -> dict[str, Any]:
        """Arguments of the MoLConfig of the same model, all layers dense.

        Special tokens are those that generation uses: often a list of ends, of which the parent's
        config names the first alone.
        """
        tokens = {name: self.generation[name] for name in TOKENS if name in self.generation}
        return self.family.mol_config_kwargs(self.config, tied=self.tied) | tokens


def outline(spec: str | Path) -> dict[str, Any]:
    """Return `Parent.mol_config_kwargs` and `dtype`, from the parent's configuration alone.

    Reads no weights and downloads none from the Hub; of a .gguf file, it reads the metadata. Does
    not notice an output head that is stored although the configuration ties it. Raises MolError as
    `open_parent` does, as far as a configuration shows the reason.
    """
    path = expanded(spec)
    if path.is_file() and path.suffix == ".gguf":
        config = read_gguf_config(path)
        family = FAMILIES[config.model_type]
    else:
        config, family = open_config(_locate(str(spec), weights=False))
    refuse_variant(config, family)
    kwargs = family.mol_config_kwargs(config, tied=config.tie_word_embeddings)
    check_rotary(config, kwargs)
    return kwargs | {"dtype": config.dtype}


def open_parent(spec: str | Path) -> Parent:
    """Open a local safetensors folder, a Hub id or a .gguf file.

    Checks everything that could fail later, from the headers. Raises MolError for a
    family other than those of `FAMILIES`, missing, leftover or ill-shaped tensors, weights that
    are pickled, quantized or truncated, a tokenizer that does not fit the vocabulary, and a
    generation_config.json that cannot be read.
    """
    folder = _locate(str(spec))
    config, family = open_config(folder)
    refuse_variant(config, family)
    reader = TensorReader(folder)
    tied = config.tie_word_embeddings and not _head_differs(reader)
    _check_tensors(reader, config, family, tied=tied)
    tokenizer = open_tokenizer(folder)
    if tokenizer is not None:
        _check_tokenizer(tokenizer, folder, config, family)
    check_rotary(config, family.mol_config_kwargs(config, tied=tied))
    note = family.context_limit(config).note
    generation = read_generation(folder, config)
    return Parent(str(spec), folder, config, family, note, tied, generation, reader, tokenizer)


def _locate(spec: str, *, weights: bool = True) -> Path:
    """The folder of the parent. weights: whether to download those of a Hub id."""
    path = expanded(spec)
    if path.is_dir():
        return path
    if path.is_file() and path.suffix == ".gguf":
        return convert_gguf(path)
    allowed = "a folder with safetensors, a .gguf file, or a Hub id such as Qwen/Qwen3-0.6B"
    if path.is_file():
        raise MolError(f"{spec} is a file that is not GGUF", allowed=allowed)
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(spec):
        raise MolError(f"{spec} does not exist", allowed=allowed, hint="check the path")
    try:
        # The config comes first, so that a wrong family costs no download of weights.
        folder = Path(snapshot_download(spec, allow_patterns=["config.json"]))
        open_config(folder)
        if not weights:
            return folder
        return Path(snapshot_download(spec, allow_patterns=_HUB_FILES))
    except (OSError, HFValidationError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MolError(
            f"{spec} is no local path, and the Hub did not give it ({reason})",
            allowed=allowed,
            hint=f"check the name and the network; for a gated model: hf auth login ({spec})",
        ) from error


def _head_differs(reader: TensorReader) -> bool:
    """Whether a head is stored that is not the embedding.

    transformers then leaves the two untied, whatever `tie_word_embeddings` says.
    """
    if LM_HEAD not in reader.tensors or EMBEDDING not in reader.tensors:
        return False
    if reader.tensors[LM_HEAD].shape != reader.tensors[EMBEDDING].shape:
        return True
    count = reader.tensors[LM_HEAD].shape[0]
    parts = (slice(first, first + _ROWS) for first in range(0, count, _ROWS))
    return not all(torch.equal(reader.read(LM_HEAD, p), reader.read(EMBEDDING, p)) for p in parts)


def _check_tensors(
    reader: TensorReader, config: PreTrainedConfig, family: Family, *, tied: bool
) -> None:
    """Every tensor is consumed exactly once, with the shape that the config implies."""
    expected = family.expected(config, tied=tied)
    found = reader.tensors
    missing = [name for name in expected if name not in found]
    known = expected.keys() | family.redundant(config, tied=tied)
    leftover = [name for name in found if name not in known]
    if missing or leftover:
        raise MolError(
            f"{reader.folder} does not match its config.json: tensors "
            + "; ".join(
                f"{what}: {', '.join(names[:_SHOWN])} ({len(names)} in all)"
                for what, names in (("missing", missing), ("left over", leftover))
                if names
            ),
            allowed=f"exactly the tensors of a {family.model_type} causal language model",
            hint="save it with AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)",
        )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise MolError(
                f"{name} in {reader.folder} has shape {found[name].shape}",
                allowed=f"{shape}, as its config.json says",
                hint="use the config.json that belongs to the weights",
            )
        if found[name].dtype not in FLOATS:
            raise MolError(
                f"{name} in {reader.folder} is stored as {found[name].dtype}",
                allowed="weights stored as bfloat16, float16 or float32",
                hint="use the original checkpoint, before quantization",
            )


def _check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, config: PreTrainedConfig, family: Family
) -> None:
    """Raise MolError if the tokenizer has tokens that the model lacks."""
    size: int = config.vocab_size
    if len(tokenizer) <= size:
        return
    beyond = {token for token, index in tokenizer.get_vocab().items() if index >= size}
    if beyond - family.tokens_beyond_vocabulary:
        raise MolError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, but the model's vocab_size "
            f"is {size}",
            allowed="a tokenizer with at most vocab_size tokens",
            hint="use the tokenizer that the model was trained with",
        )
