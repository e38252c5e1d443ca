"""Run one process of the weak scaling in `multi_gpu.py`; rank 0 prints a JSON line."""

import argparse
import json
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from molcli.config.recipe import load_recipe
from molcli.data.packing import pack
from molcli.estimate.parameters import count_parameters
from molcli.model import MoLForCausalLM
from molcli.model.compiled import compile_layers
from molcli.stages.init import untrained_config
from molcli.stages.train.batches import micro_batches
from molcli.stages.train.distributed import create_accelerator, uses_optimizer_sharding
from molcli.stages.train.objective import LossWeights, PredictionObjective, make_student
from molcli.stages.train.optimizer import make_optimizer, update

WARM_UP = 3  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, required=True, help="per GPU and step")
    parser.add_argument("--timed", type=int, required=True, help="number of steps that are timed")
    parser.add_argument("--sharding", choices=["auto", "full", "optimizer"], required=True)
    parser.add_argument("--compile", choices=["on", "off"], required=True)
    args = parser.parse_args()
    kind = "gated_deltanet" if find_spec("fla") else "attention"
    recipe = load_recipe("paper-1.3b-1+3of15", [f"model.layer_mixer={kind}"])
    accelerator, compiled = create_accelerator(recipe.train, Path("unused")), args.compile == "on"
    torch.manual_seed(0)
    with accelerator.device:
        model = MoLForCausalLM(untrained_config(recipe.model)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = replace(recipe.train, sharding=args.sharding)
    optimizer_sharding = uses_optimizer_sharding(
        settings, model.config, accelerator.device, accelerator.num_processes
    )
    student = make_student(
        model, torch.bfloat16, accelerator, optimizer_sharding=optimizer_sharding
    )
    if compiled:
        compile_layers(model)
    optimizer = make_optimizer(model, recipe.train)
    objective = PredictionObjective(
        student, None, LossWeights(ce=1.0, kl=0.0, compiled=compiled), 0.0
    )
    length, count = recipe.train.context_length, args.rows * accelerator.num_processes
    documents = torch.randint(recipe.model.vocab_size, (2 * count * length,), dtype=torch.int32)
    rows = pack(list(documents.split(length // 2)), length, seed=0)

    def step(number: int) -> None:
        index = torch.arange(count) + (number % 2) * count
        batches = micro_batches(rows, index, recipe.train.micro_batch_size, accelerator)
        objective.backward(batches, accelerator)
        update(model, optimizer, 1.0, accelerator)
        student.loads.update_biases(1e-3, accelerator)
        optimizer.zero_grad()

    for number in range(WARM_UP):
        step(number)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    accelerator.wait_for_everyone()
    begin = time.perf_counter()
    for number in range(args.timed):
        step(number)
    torch.cuda.synchronize()
    accelerator.wait_for_everyone()
    seconds = time.perf_counter() - begin
    if accelerator.is_main_process:
        figures = {
            "tokens_per_second": round(args.timed * count * length / seconds),
            "layer_kind": kind,
            "compiled": compiled,
            "sharding": "optimizer" if optimizer_sharding else "full",
            "parameters": count_parameters(model.config).total,
            "rows_a_gpu": args.rows,
            "context_length": length,
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        }
        print(json.dumps(figures), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
