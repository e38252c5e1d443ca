"""Convert a GGUF file into an ordinary safetensors folder, one tensor at a time.

transformers reads GGUF too, but whole models at a time, and it drops RoPE scaling silently; here
it reads the tokenizer only. What a family does its own way is in the family's file.
"""

import contextlib
import hashlib
import io
import sys
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.text import Text
from transformers import (
    TOKENIZER_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from molcli import __version__
from molcli.console import console
from molcli.data.tokenizer import refuse_tokenizer_errors
from molcli.errors import MolError
from molcli.families import FAMILIES
from molcli.families.base import EMBEDDING, FINAL_NORM, LM_HEAD, Family, head_dim
from molcli.families.config_numbers import check_numbers
from molcli.families.gguf_header import damaged_gguf, read_gguf_header
from molcli.families.positions import gguf_rope, scaled_rope
from molcli.families.refused import refuse_type
from molcli.families.rotary import INVALID_CONFIG
from molcli.files.finite import check_finite
from molcli.files.folders import cache_folder, lock_for, output_folder, remove_leftovers
from molcli.files.json_files import shortened
from molcli.files.tensors import ShardedWriter

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

_MODEL = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": FINAL_NORM,
    "output.weight": LM_HEAD,
}
_CONFIG = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# Metadata of other models, with the values that stand for not having it.
_NOT_EXPRESSED: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
}
_FAMILIES = {
    family.gguf.architecture: family for family in FAMILIES.values() if family.gguf is not None
}


def convert_gguf(path: Path, folder: Path | None = None) -> Path:
    """Write the model and tokenizer of a .gguf file as safetensors.

    Weights become bfloat16 where that is exact for all of them, else float32.

    Args:
        path: the file.
        folder: must not exist yet. None stands for one in the user's cache, which is written once
            for each state of the file, and by one process while others wait.

    Returns:
        The folder.

    Raises:
        MolError: for a damaged file, another family, or the package `gguf` missing.
    """
    cached, folder = folder is None, folder or _cache_folder(path)
    if cached and folder.is_dir():
        remove_leftovers(folder)
        return folder
    stderr = console(file=sys.stderr)  # noqa: TID251 - the stream itself, which is redirected below
    status = stderr.status(Text(f"Reading {path.name} (once)"))
    with status, contextlib.redirect_stderr(io.StringIO()):  # hides the bars of transformers
        reader = _open(path)
        family = _family(path, reader)
        config = _config(path, reader, family)
        names = {tensor.name: _name(path, tensor.name, family) for tensor in reader.tensors}
        with lock_for(folder) if cached else contextlib.nullcontext():
            if not (cached and folder.is_dir()):
                _write(path, reader, config, family, names, folder)
    return folder


def read_gguf_config(path: Path) -> PreTrainedConfig:
    """Read the model's configuration from the metadata. Raises MolError as `convert_gguf`."""
    with contextlib.redirect_stderr(io.StringIO()):
        reader = _open(path)
        return _config(path, reader, _family(path, reader))


def _write(
    path: Path,
    reader: "GGUFReader",
    config: PreTrainedConfig,
    family: Family,
    names: dict[str, str],
    folder: Path,
) -> None:
    def stored(tensor: "ReaderTensor") -> torch.Tensor:
        return family.from_gguf(tensor.name, _weights(tensor), config)

    exact = all(_exact_in_bf16(stored(tensor)) for tensor in reader.tensors)
    config.dtype = torch.bfloat16 if exact else torch.float32
    need_bytes = sum(int(tensor.n_elements) for tensor in reader.tensors) * (2 if exact else 4)
    with output_folder(folder, need_bytes=need_bytes) as staging:
        writer = ShardedWriter(staging)
        for tensor in reader.tensors:
            weights = stored(tensor)
            check_finite(tensor.name, weights, path)
            writer.add(names[tensor.name], weights.to(config.dtype))
        writer.close()
        config.save_pretrained(staging)
        if reader.get_field("tokenizer.ggml.model") is not None:
            _tokenizer(path, config).save_pretrained(staging)


def _tokenizer(path: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    # The class that AutoTokenizer would choose, which parses the file once more for its config.
    kind: Any = TOKENIZER_MAPPING.get(type(config), PreTrainedTokenizerFast)
    tokenizer: PreTrainedTokenizerBase
    with refuse_tokenizer_errors(
        f"the tokenizer in {path} cannot be read",
        allowed="a tokenizer that transformers reads from GGUF files",
        hint="use the model's safetensors, with its tokenizer.json",
    ):
        tokenizer = kind.from_pretrained(path.parent, gguf_file=path.name)
        for name in ("bos", "eos"):  # transformers 5.17 takes a Llama's BOS for both
            token = getattr(config, f"{name}_token_id")
            token = token[0] if isinstance(token, list) else token
            if token is not None:
                setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token))
    return tokenizer


def _cache_folder(path: Path) -> Path:
    stat = path.stat()
    state = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {__version__}"
    key = hashlib.sha256(state.encode()).hexdigest()[:16]
    return cache_folder() / f"{path.stem}-{key}"


def _open(path: Path) -> "GGUFReader":
    try:
        from gguf import GGML_QUANT_SIZES, GGUFReader
    except ImportError as error:
        raise MolError(
            f"{path} is a GGUF file, and the package that reads those is not installed",
            hint="pip install 'molcli[gguf]'",
        ) from error

    class Reader(GGUFReader):
        """Reads the file as a plain array: slicing a memmap for every word of a vocabulary is slow.

        The array is a view of the memmap: the file's content is not loaded.
        """

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, value: Any) -> None:
            self._data = np.asarray(value)

    read_gguf_header(path, {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()})
    try:
        return Reader(path)
    except (ValueError, LookupError, OverflowError, TypeError) as error:
        raise damaged_gguf(path, error) from error


def _value(reader: "GGUFReader", key: str) -> Any:
    """A piece of metadata; None where the file has none of this name. ValueError for bad UTF-8."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _family(path: Path, reader: "GGUFReader") -> Family:
    """The family of the file's architecture. Raises MolError for another one."""
    try:
        architecture = _value(reader, "general.architecture")
    except ValueError as error:
        raise damaged_gguf(path, error) from error
    if not isinstance(architecture, str):
        raise damaged_gguf(path, f"general.architecture is {architecture}")
    if architecture in FAMILIES and architecture not in _FAMILIES:
        raise MolError(
            f"{path} is a model of type {architecture!r}, whose fused projections GGUF names "
            "otherwise",
            allowed=f"GGUF files of type {', '.join(_FAMILIES)}",
            hint="use the model's safetensors",
        )
    if architecture not in _FAMILIES:
        refuse_type(path, architecture, _FAMILIES)
    return _FAMILIES[architecture]


def _config(path: Path, reader: "GGUFReader", family: Family) -> PreTrainedConfig:
    """The transformers config that the file's metadata describes."""
    try:
        return _described(path, reader, family)
    except INVALID_CONFIG as error:
        raise damaged_gguf(path, f"its metadata describes no model: {error}") from error


def _described(path: Path, reader: "GGUFReader", family: Family) -> PreTrainedConfig:
    """The same, but raises `INVALID_CONFIG` for values of unexpected types."""
    assert family.gguf is not None
    prefix = family.gguf.architecture

    def read(key: str) -> Any:
        return _value(reader, f"{prefix}.{key}")

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    kwargs = {theirs: read(key) for key, theirs in _CONFIG.items()}
    if None in kwargs.values() or "token_embd.weight" not in tensors:
        raise MolError(
            f"{path} lacks the metadata of a whole {prefix} model",
            allowed="a GGUF file as llama.cpp's convert_hf_to_gguf.py writes it",
            hint="download it again, or use the model's safetensors",
        )
    check_numbers(kwargs, path)
    if "rope_freqs.weight" in tensors:
        raise scaled_rope(path)
    for key, expected in _NOT_EXPRESSED.items():
        if (found := read(key)) not in (None, *expected):
            raise MolError(
                f"{path} has {prefix}.{key}: {shortened(found)}, which MoL does not have",
                allowed=f"a file without {key}",
                hint="choose a parent of another family",
            )
    vocabulary = int(tensors["token_embd.weight"].shape[1])

    def token(name: str) -> int | None:
        """A special token. llama.cpp ignores those that the vocabulary lacks."""
        found = _value(reader, f"tokenizer.ggml.{name}_token_id")
        return found if isinstance(found, int) and 0 <= found < vocabulary else None

    kwargs["bos_token_id"] = token("bos")
    kwargs["pad_token_id"] = token("padding")
    # Of a text, a turn and a message: llama.cpp stops at any of them. Each once, in this order.
    ends = [token(name) for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(each for each in ends if each is not None))
    kwargs["eos_token_id"] = ends if len(ends) > 1 else ends[0] if ends else None
    kwargs["rope_parameters"] = gguf_rope(path, read, 10_000.0)
    kwargs |= family.gguf_config(path, read, set(tensors))
    kwargs["vocab_size"] = vocabulary
    check_numbers(kwargs, path)
    config = AutoConfig.for_model(
        family.model_type, **kwargs, tie_word_embeddings="output.weight" not in tensors
    )
    if (rotated := read("rope.dimension_count")) not in (None, head_dim(config)):
        raise MolError(
            f"{path} rotates {rotated} of {head_dim(config)} channels of a head",
            allowed="rotary positions in whole heads",
            hint="use the model's safetensors, or another parent",
        )
    _check_tensors(path, tensors, config, family)
    return config


def _check_tensors(
    path: Path, tensors: dict[str, "ReaderTensor"], config: PreTrainedConfig, family: Family
) -> None:
    """Raise MolError unless the tensors are those of the model, with their shapes."""
    found = {_name(path, n, family): tuple(reversed(t.shape.tolist())) for n, t in tensors.items()}
    expected = family.expected(config, tied=config.tie_word_embeddings)
    wrong = sorted({name for name, _ in found.items() ^ expected.items()})
    if wrong:
        name = wrong[0]
        shapes = [shape or "missing" for shape in (found.get(name), expected.get(name))]
        raise MolError(
            f"{path} does not match its metadata in {len(wrong)} tensors: {name} is {shapes[0]}",
            allowed=f"{name}: {shapes[1]}",
            hint="download it again, or use the model's safetensors",
        )


def _name(path: Path, name: str, family: Family) -> str:
    """The safetensors name of a GGUF tensor such as `blk.3.attn_q.weight`."""
    assert family.gguf is not None
    modules = family.gguf.modules
    if name in _MODEL:
        return _MODEL[name]
    match name.split("."):
        case ["blk", layer, module, kind] if module in modules:
            return f"model.layers.{layer}.{modules[module]}.{kind}"
    raise MolError(
        f"{path} has a tensor {name} that dense decoders lack",
        allowed=f"dense decoders of type {', '.join(FAMILIES)}",
        hint="choose a dense parent (mixtures of experts are not)",
    )


def _weights(tensor: "ReaderTensor") -> torch.Tensor:
    """float32, (out, in) as in a linear layer, or (out,)."""
    from gguf import dequantize

    data = tensor.data
    # gguf dequantizes 16 rows at a time, which costs more than the work itself where rows are short
    if data.ndim > 1:
        data = data.reshape(len(data) // gcd(len(data), 16), -1)
    try:
        weights = np.require(dequantize(data, tensor.tensor_type), np.float32, "W")
    except NotImplementedError as error:
        raise MolError(
            f"{tensor.name} is stored as {tensor.tensor_type.name}, which cannot be read",
            allowed="weights in 16 or 32 bits, or in the common quantizations such as Q4_K",
            hint="use a GGUF file of the same model in another quantization",
        ) from error
    return torch.from_numpy(weights).view(*reversed(tensor.shape.tolist()))


def _exact_in_bf16(weights: torch.Tensor) -> bool:
    return torch.equal(weights.bfloat16().float(), weights)
