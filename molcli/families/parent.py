"""The dense model that an upcycling starts from, opened strictly and read tensor by tensor."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from molcli.data.tokenizer import open_tokenizer
from molcli.errors import MolError
from molcli.families.gguf import convert_gguf, read_gguf_config
from molcli.families.table import (
    EMBEDDING,
    FAMILIES,
    FINAL_NORM,
    LM_HEAD,
    Family,
    head_dim,
    refuse_family,
    refuse_variant,
)
from molcli.files.tensors import TensorReader

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_HUB_FILES = ["*.json", "model*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]
_FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}
_ROWS = 4096  # of two large matrices that are compared
_SHOWN = 3  # offending tensors that an error names


@dataclass(frozen=True)
class Parent:
    """A validated dense checkpoint. No method holds more than what it returns.

    name: as the user gave it. folder: where its safetensors are. note: a limit that the user
    should hear of, or "". tied: whether the output head is the embedding.
    """

    name: str
    folder: Path
    config: PreTrainedConfig
    family: Family
    note: str
    tied: bool
    _reader: TensorReader
    _tokenizer: PreTrainedTokenizerBase | None

    def embedding(self) -> torch.Tensor:
        """(V, D), stored dtype."""
        return self._reader.read(EMBEDDING)

    def final_norm(self) -> torch.Tensor:
        """(D,), stored dtype."""
        return self._reader.read(FINAL_NORM)

    def lm_head(self) -> torch.Tensor | None:
        """(V, D), stored dtype; None when tied to the embedding."""
        return None if self.tied else self._reader.read(LM_HEAD)

    def dense_layer(self, index: int) -> dict[str, torch.Tensor]:
        """A layer as a stack of one full-width block: (1, ...) each, stored dtype.

        The names are those of a MoL model below `model.layers.{index}.`.
        """
        table = self.family.layer(self.config, index)
        return {
            ours: self._reader.read(source.name, source.rows)[None]
            for ours, source in table.items()
        }

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """None if the parent came without one."""
        return self._tokenizer

    def copy_tokenizer(self, out: Path) -> None:
        """Writes the tokenizer, if there is one, as this process uses it."""
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(out)

    def fingerprint(self) -> str:
        """sha256 that tells this checkpoint from others; see `TensorReader.fingerprint`."""
        return self._reader.fingerprint()

    def mol_config_kwargs(self) -> dict[str, Any]:
        """Arguments of the MoLConfig of the same model, all layers dense."""
        return _mol_config_kwargs(self.config, self.family, tied=self.tied)


def outline(spec: str | Path) -> dict[str, Any]:
    """`Parent.mol_config_kwargs`, and `dtype`, from the parent's configuration alone.

    No weights are read, nor fetched from the Hub; of a .gguf file the metadata is read. A head
    that is stored although the configuration ties it goes unnoticed. Raises MolError as
    `open_parent` does, as far as a configuration shows it.
    """
    path = Path(spec).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        config = read_gguf_config(path)
        family = FAMILIES[config.model_type]
    else:
        config, family = _open_config(_locate(str(spec), weights=False))
    refuse_variant(config)
    kwargs = _mol_config_kwargs(config, family, tied=config.tie_word_embeddings)
    return kwargs | {"dtype": config.dtype}


def open_parent(spec: str | Path) -> Parent:
    """Opens a local safetensors folder, a Hub id or a .gguf file.

    Everything that could fail later is checked here, from the headers: raises MolError for a
    family other than those of `FAMILIES`, missing, leftover or ill-shaped tensors, weights that
    are pickled, quantized or truncated, and a tokenizer that does not fit the vocabulary.
    """
    folder = _locate(str(spec))
    config, family = _open_config(folder)
    refuse_variant(config)
    reader = TensorReader(folder)
    tied = config.tie_word_embeddings and not _head_differs(reader)
    _check_tensors(reader, config, family, tied=tied)
    tokenizer = open_tokenizer(folder)
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise MolError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, but the model's vocab_size "
            f"is {config.vocab_size}",
            allowed="a tokenizer with at most vocab_size tokens",
            hint="use the tokenizer that the model was trained with",
        )
    _, note = _context(config, family)
    return Parent(str(spec), folder, config, family, note, tied, reader, tokenizer)


def _mol_config_kwargs(config: PreTrainedConfig, family: Family, *, tied: bool) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": head_dim(config),
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "mlp_gated": True,
        "attention_bias": family.has_qkv_bias(config),
        "attention_out_bias": family.has_out_bias(config),
        "qk_norm": family.qk_norm,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": _rotary(config),
        "max_position_embeddings": _context(config, family)[0],
        "tie_word_embeddings": tied,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "layer_structures": ["dense"] * config.num_hidden_layers,
    }


def _locate(spec: str, *, weights: bool = True) -> Path:
    """The folder of the parent; of a Hub's, without its weights where they are not wanted."""
    path = Path(spec).expanduser()
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
        _open_config(folder)
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


def _open_config(folder: Path) -> tuple[PreTrainedConfig, Family]:
    path = folder / "config.json"
    if not path.is_file():
        raise MolError(
            f"{folder} has no config.json",
            allowed="a folder as save_pretrained writes it",
            hint="give the folder that holds config.json and the safetensors",
        )
    try:
        model_type = json.loads(path.read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise MolError(f"{path} is not a JSON object ({error})") from error
    if model_type not in FAMILIES:
        refuse_family(folder, model_type, FAMILIES)
    try:
        return AutoConfig.from_pretrained(folder), FAMILIES[model_type]
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise MolError(f"{path} is not a valid {model_type} config: {error}") from error


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
        if found[name].dtype not in _FLOAT_DTYPES:
            raise MolError(
                f"{name} in {reader.folder} is stored as {found[name].dtype}",
                allowed="weights stored as bfloat16, float16 or float32",
                hint="use the original checkpoint, before quantization",
            )


def _context(config: PreTrainedConfig, family: Family) -> tuple[int, str]:
    """Positions up to which MoL sees what the parent sees, and a note where that is not all."""
    positions: int = config.max_position_embeddings
    window = family.sliding_window(config)
    trained = _longrope(config) or positions
    if window is not None and window < min(positions, trained):
        return window, (
            f"The parent attends to the last {window} tokens only. MoL has no sliding window, so "
            f"max_position_embeddings becomes {window}: up to there both see the same."
        )
    if trained < positions:
        return trained, (
            f"The parent turns its heads more slowly in sequences of more than {trained} tokens "
            f"(LongRoPE), and packed rows have no such length. max_position_embeddings becomes "
            f"{trained}: up to there both see the same."
        )
    return positions, ""


def _longrope(config: PreTrainedConfig) -> int | None:
    """Tokens up to which LongRoPE's short factors hold; None without LongRoPE."""
    rotary = config.rope_parameters
    if rotary["rope_type"] != "longrope":
        return None
    return int(rotary["original_max_position_embeddings"])


def _rotary(config: PreTrainedConfig) -> dict[str, Any]:
    """The config's rope_parameters, independent of its max_position_embeddings."""
    rotary = dict(config.rope_parameters)
    trained = _longrope(config)
    if trained is not None and rotary.get("factor") is None:
        rotary["factor"] = config.max_position_embeddings / trained  # what transformers takes
    return rotary
