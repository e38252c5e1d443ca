"""Measure tokens per second of distillation with the parent: SmolLM2-135M's shape, random weights.

    python tests/bench/distillation.py [--compile on] [--graph on] [--micro-batch 64] \
        [--layer-kind softmax]

Prints one JSON line. MFU counts the matrix products of active parameters: 6 FLOPs per token and
parameter for the model (2 of them forward), 2 for the parent, without attention scores. It is
relative to the bf16 peak of the GPU (molcli/estimate/gpus.py), or of an H100 for an unknown device.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parent))
from json_lines import machine

from molcli.config.recipe import load_recipe
from molcli.config.sections import TrainConfig
from molcli.data.packing import pack
from molcli.estimate.gpus import GPUS, find_gpu
from molcli.estimate.parameters import count_parameters
from molcli.fitting.converted_config import converted_config
from molcli.model import MoLForCausalLM
from molcli.model.compiled import compile_layers
from molcli.model.configuration_mol import MoLConfig
from molcli.report.machine import device_name
from molcli.stages.train.balance import RouterLoads
from molcli.stages.train.batches import MicroBatches, micro_batches
from molcli.stages.train.gradient_graph import GradientGraph
from molcli.stages.train.objective import LossWeights, PredictionObjective, Student
from molcli.stages.train.optimizer import make_optimizer, update

DENSE = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "tie_word_embeddings": True,
}


def config(layer_kind: str) -> MoLConfig:
    """Return the model that the recipe smollm2-135m makes; "dense" is the parent."""
    if layer_kind == "dense":
        return MoLConfig(
            **DENSE,
            layer_structures=["dense"] * DENSE["num_hidden_layers"],
            layer_mixers=["attention"] * DENSE["num_hidden_layers"],
        )
    kind = "all" if layer_kind == "gated_deltanet" else "none"
    options = replace(load_recipe("smollm2-135m").upcycle, gated_deltanet=kind)
    return converted_config(DENSE, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", choices=["on", "off"], default="on")
    parser.add_argument("--graph", choices=["on", "off"], default="on")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layer-kind", choices=["softmax", "gated_deltanet"], default="softmax")
    parser.add_argument("--profile", type=Path, help="a folder for tables of kernels")
    args = parser.parse_args()

    torch.manual_seed(0)
    accelerator = Accelerator()
    device, compiled = accelerator.device, args.compile == "on"
    model = MoLForCausalLM(config(args.layer_kind)).to(device).train()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    parent = MoLForCausalLM(config("dense")).to(device, dtype).eval().requires_grad_(False)
    if compiled:
        compile_layers(parent)
        compile_layers(model)
    optimizer = make_optimizer(model, TrainConfig())
    loads = RouterLoads(model)
    student = Student(model, dtype, loads)
    weights = LossWeights(ce=0.0, kl=1.0, compiled=compiled)
    graph = GradientGraph(model) if args.graph == "on" else None
    objective = PredictionObjective(student, parent, weights, balance_weight=0.0, graph=graph)
    lengths = torch.randint(20, 400, (args.batch * args.length // 100,)).tolist()
    documents = [torch.randint(49_152, (n,), dtype=torch.int32) for n in lengths]
    rows = pack(documents, args.length, seed=0)

    def next_batch() -> MicroBatches:
        index = torch.randint(len(rows), (args.batch,))
        return micro_batches(rows, index, args.micro_batch, accelerator)

    ahead = [next_batch()]

    def step() -> None:  # in the order of `molcli train`
        objective.backward(ahead.pop(), accelerator)
        _, finite = update(model, optimizer, 1.0, accelerator)
        ahead.append(next_batch())
        assert finite()
        loads.add_step_to_window()
        loads.update_biases(1e-3, accelerator)
        optimizer.zero_grad()

    start = time.perf_counter()
    for _ in range(4):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    warm = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(args.steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    tokens = args.steps * args.batch * args.length
    count, dense = count_parameters(model.config), count_parameters(parent.config)
    peak_flops = (find_gpu(device_name(device)) or GPUS["h100"]).bf16
    flops = 6 * count.active + 2 * dense.active  # tied embeddings count once, as heads
    print(
        json.dumps(
            {
                "command": "python " + " ".join(sys.argv),
                "tokens_per_second": round(tokens / seconds),
                "mfu": round(flops * tokens / seconds / peak_flops, 3),
                "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1)
                if device.type == "cuda"
                else None,
                "first_steps_seconds": round(warm, 1),
                **machine(),
            }
        ),
        flush=True,
    )
    if args.profile is not None:
        with torch.profiler.profile() as profiler:
            for _ in range(2):
                step()
        args.profile.mkdir(parents=True, exist_ok=True)
        for key in ("self_cpu_time_total", "self_device_time_total"):
            table = profiler.key_averages().table(
                sort_by=key, row_limit=50, max_name_column_width=80
            )
            (args.profile / f"{key}.txt").write_text(table)


if __name__ == "__main__":
    main()
