"""A GGUF file becomes an ordinary safetensors folder, one tensor at a time.

transformers reads GGUF too, but whole models at once, and it drops RoPE scaling without a word;
here it reads the tokenizer only.
"""

import contextlib
import hashlib
import io
import sys
from collections.abc import Iterator
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from molcli import __version__
from molcli.errors import MolError
from molcli.families.table import EMBEDDING, FAMILIES, FINAL_NORM, LM_HEAD, refuse_family
from molcli.files.folders import cache_folder, lock_for, output_folder
from molcli.files.tensors import ShardedWriter

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

_MODEL = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": FINAL_NORM,
    "output.weight": LM_HEAD,
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
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
# Those whose tensors _LAYER names one by one.
_FAMILIES = [name for name, family in FAMILIES.items() if not family.fused]


def convert_gguf(path: Path, folder: Path | None = None) -> Path:
    """Writes the model and tokenizer of a .gguf file as safetensors and returns their folder.

    folder: must not exist yet; None takes one in the user's cache, made once for each state of
    the file, and by one process, for which others wait. Weights become bfloat16 where that is exact
    for all of them, else float32. Raises MolError for a damaged file, another family, or the
    package `gguf` missing.
    """
    cached, folder = folder is None, folder or _cache_folder(path)
    if cached and folder.is_dir():
        return folder
    status = Console(file=sys.stderr).status(f"Reading {path.name} (once)")
    with status, contextlib.redirect_stderr(io.StringIO()):  # hides the bars of transformers
        reader = _open(path)
        config = _config(path, reader)
        names = {tensor.name: _name(path, tensor.name) for tensor in reader.tensors}
        with lock_for(folder) if cached else contextlib.nullcontext():
            if not (cached and folder.is_dir()):
                _write(path, reader, config, names, folder)
    return folder


def _write(
    path: Path, reader: "GGUFReader", config: PreTrainedConfig, names: dict[str, str], folder: Path
) -> None:
    exact = all(_exact_in_bf16(_weights(tensor)) for tensor in reader.tensors)
    config.dtype = torch.bfloat16 if exact else torch.float32
    need_bytes = sum(int(tensor.n_elements) for tensor in reader.tensors) * (2 if exact else 4)
    with output_folder(folder, need_bytes=need_bytes) as staging:
        writer = ShardedWriter(staging)
        for tensor in reader.tensors:
            weights = _weights(tensor)
            if config.model_type == "llama":
                weights = _split_halves(tensor.name, weights, config)
            writer.add(names[tensor.name], weights.to(config.dtype))
        writer.close()
        config.save_pretrained(staging)
        if reader.get_field("tokenizer.ggml.model") is not None:
            with _read_already(reader):
                tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            for name in ("bos", "eos"):  # transformers 5.17 takes a Llama's BOS for both
                token = getattr(config, f"{name}_token_id")
                token = token[0] if isinstance(token, list) else token
                if token is not None:
                    word = tokenizer.convert_ids_to_tokens(token)
                    setattr(tokenizer, f"{name}_token", word)
            tokenizer.save_pretrained(staging)


def read_gguf_config(path: Path) -> PreTrainedConfig:
    """The model's configuration, from the file's metadata. Raises MolError as `convert_gguf`."""
    with contextlib.redirect_stderr(io.StringIO()):
        return _config(path, _open(path))


def _cache_folder(path: Path) -> Path:
    stat = path.stat()
    state = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {__version__}"
    key = hashlib.sha256(state.encode()).hexdigest()[:16]
    return cache_folder() / f"{path.stem}-{key}"


def _open(path: Path) -> "GGUFReader":
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MolError(
            f"{path} is a GGUF file, and the package that reads those is not installed",
            hint="pip install 'molcli[gguf]'",
        ) from error

    class Reader(GGUFReader):
        """On a plain array: slicing a memmap, as for every word of a vocabulary, is slow."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    try:
        return Reader(path)
    except (ValueError, IndexError, OverflowError) as error:
        raise MolError(
            f"{path} is damaged or not a GGUF file ({error})",
            allowed="a complete GGUF file",
            hint="download it again",
        ) from error


@contextlib.contextmanager
def _read_already(reader: "GGUFReader") -> Iterator[None]:
    """transformers takes this reader, where it would read its file once or twice more."""
    import gguf

    module: Any = gguf  # its class is looked up there at every use
    original = module.GGUFReader
    module.GGUFReader = lambda _: reader
    try:
        yield
    finally:
        module.GGUFReader = original


def _config(path: Path, reader: "GGUFReader") -> PreTrainedConfig:
    """The transformers config that the file's metadata describes."""

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    family = value("general.architecture")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    # llama.cpp calls Mistral "llama" too.
    if family in FAMILIES and family not in _FAMILIES:
        raise MolError(
            f"{path} is a model of type {family!r}, whose fused projections GGUF names otherwise",
            allowed=f"GGUF files of type {', '.join(_FAMILIES)}",
            hint="use the model's safetensors",
        )
    if family not in _FAMILIES:
        refuse_family(path, family, _FAMILIES)
    if value(f"{family}.rope.scaling.type") not in (None, "none") or "rope_freqs.weight" in tensors:
        raise MolError(
            f"{path} scales its rotary frequencies, which GGUF describes only in part",
            allowed="GGUF files without RoPE scaling",
            hint="use the model's safetensors, which describe it in config.json",
        )
    kwargs = {ours: value(f"{family}.{key}") for key, ours in _CONFIG.items()}
    if None in kwargs.values() or "token_embd.weight" not in tensors:
        raise MolError(f"{path} lacks the metadata of a whole {family} model")
    for name in ("bos", "pad"):
        key = "padding" if name == "pad" else name
        kwargs[f"{name}_token_id"] = value(f"tokenizer.ggml.{key}_token_id")
    # Of a text, a turn and a message: llama.cpp stops at any of them. Each once, in this order.
    ends = [value(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    kwargs["eos_token_id"] = ends if len(ends) > 1 else ends[0] if ends else None
    if family != "qwen2":  # which has biases always, and implies the width of its heads
        kwargs["attention_bias"] = "blk.0.attn_q.bias" in tensors
        width = kwargs["hidden_size"] // kwargs["num_attention_heads"]
        kwargs["head_dim"] = value(f"{family}.attention.key_length") or width
    return AutoConfig.for_model(
        family,
        **kwargs,
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": value(f"{family}.rope.freq_base") or 10_000.0,
        },
        tie_word_embeddings="output.weight" not in tensors,
    )


def _name(path: Path, name: str) -> str:
    """The safetensors name of a GGUF tensor such as `blk.3.attn_q.weight`."""
    if name in _MODEL:
        return _MODEL[name]
    match name.split("."):
        case ["blk", layer, module, kind] if module in _LAYER:
            return f"model.layers.{layer}.{_LAYER[module]}.{kind}"
    raise MolError(
        f"{path} has a tensor {name} that dense decoders lack",
        allowed=f"dense decoders of type {', '.join(FAMILIES)}",
        hint="choose a dense parent (mixtures of experts are not)",
    )


def _weights(tensor: "ReaderTensor") -> torch.Tensor:
    """float32, (out, in) as in a linear layer, or (out,)."""
    from gguf import dequantize

    data = tensor.data
    if data.ndim > 1:  # gguf takes 16 rows at a time, which costs more than the work where short
        data = data.reshape(len(data) // gcd(len(data), 16), -1)
    weights = np.require(dequantize(data, tensor.tensor_type), np.float32, "W")
    return torch.from_numpy(weights).view(*reversed(tensor.shape.tolist()))


def _exact_in_bf16(weights: torch.Tensor) -> bool:
    return torch.equal(weights.bfloat16().float(), weights)


def _split_halves(name: str, weights: torch.Tensor, config: Any) -> torch.Tensor:
    """llama.cpp rotates neighbouring channels of a Llama head, transformers its two halves."""
    module = name.split(".")[-2]
    if module not in ("attn_q", "attn_k"):
        return weights
    heads = config.num_attention_heads if module == "attn_q" else config.num_key_value_heads
    return weights.view(heads, -1, 2, *weights.shape[1:]).transpose(1, 2).reshape(weights.shape)
