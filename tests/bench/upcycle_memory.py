"""Measure time and memory of a conversion, for a parent with random weights.

    python tests/bench/upcycle_memory.py --shape llama-1.3b --tokens 98304
    python tests/bench/upcycle_memory.py --shape llama-8b --tokens 32768
    python tests/bench/upcycle_memory.py --shape llama-1b --method random --layers 4
    python tests/bench/upcycle_memory.py --shape llama-1.3b --layers 4 --set upcycle.layers=[]
    python tests/bench/upcycle_memory.py --shape smollm2-135m --dtype float32 --layers 3 \
        --tokens 196608

Prints one JSON line. It has the seconds of calibration, of conversion, and of plainly reading the
parent's bytes and writing the checkpoint's, with all files in the page cache; the peak of GPU
memory; and the peak of host memory as the system counts it, of which imports take
`host_gb_at_start`. `bars` has measured values, their limits, and whether they are met.

The parent is stored in shards. Its layers are copies of one, which saves drawing random numbers.
--decompositions times the matrix factorisations that a conversion of this shape needs most.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import torch
from json_lines import machine, measured
from transformers import LlamaConfig

from molcli.config.recipe import load_recipe
from molcli.families.parent import Parent, open_parent
from molcli.files.tensors import ShardedWriter, TensorReader
from molcli.fitting.converted_config import mol_config, needs_text
from molcli.model.checkpoint import default_device
from molcli.stages.calibrate import calibrate
from molcli.stages.upcycle import upcycle

# d_model, d_ff, query heads, key-value heads, vocabulary, layers, whether embeddings are tied
SHAPES = {
    "smollm2-135m": (576, 1536, 9, 3, 49_152, 30, True),
    "llama-1b": (2048, 8192, 32, 8, 128_256, 16, True),
    "llama-1.3b": (2048, 5504, 32, 32, 32_000, 24, False),
    "llama-8b": (4096, 14_336, 32, 8, 128_256, 32, False),
}
HELDOUT, LENGTH = 8192, 512


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-1.3b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--tokens", type=int, default=98_304, help="to fit on")
    parser.add_argument("--method", choices=["fitted", "random", "svd", "pca"], default="fitted")
    parser.add_argument("--set", action="append", default=[], help="of the recipe")
    parser.add_argument("--decompositions", action="store_true")
    parser.add_argument("--work", type=Path, help="where the scratch folder is made")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with TemporaryDirectory(dir=args.work) as scratch:
        folder = Path(scratch)
        # In another process, whose memory does not count.
        making = (folder / "parent", args.shape, args.layers, args.dtype)
        child = get_context("spawn").Process(target=make_parent, args=making)
        child.start()
        child.join()
        text = folder / "text.jsonl"
        make_text(text, args.tokens + HELDOUT, SHAPES[args.shape][4])
        parent = open_parent(folder / "parent")
        recipe = load_recipe(
            None,
            [
                f"calibrate.data={text}",
                f"calibrate.tokens={args.tokens}",
                f"calibrate.heldout_tokens={HELDOUT}",
                f"calibrate.context_length={LENGTH}",
                f"upcycle.method={args.method}",
                *args.set,
            ],
        )
        config = mol_config(parent, recipe.upcycle)
        found: dict[str, Any] = {
            "command": "python " + " ".join(sys.argv),
            "shape": args.shape,
            "dtype": args.dtype,
            "threads": torch.get_num_threads(),
            "blocks": [config.num_blocks, config.d_thin, config.d_ff_thin],
            "layers": config.num_hidden_layers,
            "host_gb_at_start": host_gb(),
        }
        if args.decompositions:
            found["decompositions"] = decompositions(config)
        calibration = None
        if needs_text(config, recipe.upcycle):
            calibration = folder / "calibration"
            seconds, peak = run(lambda: calibrate(parent, recipe.calibrate, calibration))
            found |= {"tokens": args.tokens, "calibrate_seconds": seconds, "calibrate_gb": peak}
            found["calibrate_host_gb"] = host_gb()
        out = folder / "out"
        seconds, peak = run(lambda: upcycle(parent, calibration, recipe, out))
        found |= {
            "upcycle_seconds": seconds,
            "upcycle_gb": peak,
            "host_peak_gb": host_gb(),
            "plain_seconds": plain_seconds(parent, out, folder / "plain"),
            "parent_gb": size_gb(parent.folder),
            "checkpoint_gb": size_gb(out),
            "largest_layer_gb": largest_layer_gb(out),
        }
    print(json.dumps(found | {"bars": bars(found)} | machine()), flush=True)


def bars(found: dict[str, Any]) -> dict[str, list[Any]]:
    """Return limits of host memory, in GB, and of seconds over plain input and output."""
    limits = {"host_gb_2_layers_and_2": (found["host_peak_gb"], 2 * found["largest_layer_gb"] + 2)}
    if found["shape"] == "smollm2-135m":
        limits["host_gb_smollm2"] = found["host_peak_gb"], 2.5
    if "tokens" not in found:
        limits["seconds_over_plain"] = found["upcycle_seconds"] / found["plain_seconds"], 1.5
    return {name: [round(a, 3), round(b, 3), a <= b] for name, (a, b) in limits.items()}


def make_parent(folder: Path, shape: str, layers: int | None, dtype_name: str) -> None:
    d, d_ff, num_heads, num_kv_heads, vocabulary, count, tied = SHAPES[shape]
    folder.mkdir(parents=True)
    count, dtype = layers or count, getattr(torch, dtype_name)
    LlamaConfig(
        hidden_size=d,
        intermediate_size=d_ff,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        vocab_size=vocabulary,
        num_hidden_layers=count,
        tie_word_embeddings=tied,
        max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
        dtype=dtype_name,
    ).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype).normal_(std=0.02, generator=generator)

    kv = d // num_heads * num_kv_heads
    one = {
        "input_layernorm.weight": torch.ones(d, dtype=dtype),
        "post_attention_layernorm.weight": torch.ones(d, dtype=dtype),
        "self_attn.q_proj.weight": drawn(d, d),
        "self_attn.k_proj.weight": drawn(kv, d),
        "self_attn.v_proj.weight": drawn(kv, d),
        "self_attn.o_proj.weight": drawn(d, d),
        "mlp.gate_proj.weight": drawn(d_ff, d),
        "mlp.up_proj.weight": drawn(d_ff, d),
        "mlp.down_proj.weight": drawn(d, d_ff),
    }
    writer = ShardedWriter(folder)
    writer.add("model.embed_tokens.weight", drawn(vocabulary, d) * 50)
    for i in range(count):
        for name, tensor in one.items():
            writer.add(f"model.layers.{i}.{name}", tensor.clone())
    writer.add("model.norm.weight", torch.ones(d, dtype=dtype))
    if not tied:
        writer.add("lm_head.weight", drawn(vocabulary, d))
    writer.close()


def make_text(path: Path, tokens: int, vocabulary: int) -> None:
    """Write documents of 20 to 1,000 tokens with vocabularies of different sizes."""
    generator = torch.Generator().manual_seed(0)
    made = 0
    with path.open("w", encoding="utf-8") as file:
        while made < tokens + LENGTH:
            length, common = (
                int(torch.randint(low, high, (1,), generator=generator))
                for low, high in ((20, 1000), (100, vocabulary - 10))
            )
            ids = torch.randint(5, 5 + common, (length,), generator=generator)
            file.write(json.dumps({"input_ids": ids.tolist()}) + "\n")
            made += length


def run(work: Callable[[], Any]) -> tuple[float, float | None]:
    """Return seconds and peak GPU memory in GB."""
    _, seconds, peak = measured(work)
    return round(seconds, 2), peak


def plain_seconds(parent: Parent, out: Path, copy: Path) -> float:
    """Return the seconds of reading the parent's files and copying the checkpoint's."""
    start = time.perf_counter()
    for file in sorted(parent.folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as source:
            while source.read(2**24):
                pass
    for file in sorted(out.glob("*.safetensors")):
        with file.open("rb", buffering=0) as source, copy.open("wb", buffering=0) as target:
            shutil.copyfileobj(source, target, 2**24)
    return round(time.perf_counter() - start, 2)


def largest_layer_gb(out: Path) -> float:
    sizes: dict[str, int] = {}
    for name, info in TensorReader(out).tensors.items():
        if name.startswith("model.layers."):
            index = name.split(".")[2]
            sizes[index] = sizes.get(index, 0) + info.num_bytes
    return round(max(sizes.values()) / 1e9, 3)


def decompositions(config: Any) -> dict[str, float]:
    """Return the seconds of each factorisation, after one call for warm-up."""
    d, joint = (
        config.hidden_size,
        config.num_heads_thin * config.head_dim + config.d_ff_thin,
    )
    clones = -(-config.num_routed_blocks // max(1, config.num_blocks_per_tok))
    calls: dict[str, tuple[int, int, Callable[[torch.Tensor], Any]]] = {
        "eigh_d_model": (1, d, torch.linalg.eigh),
        "eigh_d_model_of_clones": (clones, d, torch.linalg.eigh),
        "cholesky_joint": (1, joint, torch.linalg.cholesky),
        "svd_d_thin_of_clones": (clones, config.d_thin, torch.linalg.svd),
    }
    found = {}
    for name, (batch, size, call) in calls.items():
        device = default_device()
        x = torch.randn(batch, size, size, dtype=torch.float64, device=device)
        gram = x @ x.mT + torch.eye(size, dtype=torch.float64, device=device)
        gram = gram[0] if batch == 1 else gram
        call(gram)
        found[f"{name}_{batch}x{size}"] = round(measured(lambda c=call, g=gram: c(g))[1], 4)
    return found


def size_gb(folder: Path) -> float:
    return round(sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e9, 3)


def host_gb() -> float:
    """Return the peak memory of this process so far, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
