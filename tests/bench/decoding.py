"""Where a decoding step's time goes: the graph alone, `generate` around it, and each kernel.

    python tests/bench/decoding.py [--recipe paper-1.3b-1+3of15] [--batch 1] [--context 8192]

Prints one JSON line: milliseconds of a step replayed without `generate`, of a token by `generate`,
and of reading the active weights and the cache once, at the bandwidth of a copy on this GPU; and
with --profile the kernels of one step, by time.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine

from molcli.config.recipe import load_recipe
from molcli.estimate.parameters import count_parameters
from molcli.model.decoding import generation
from molcli.stages.bench import open_benchmark_pair
from molcli.stages.init import untrained_config


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="paper-1.3b-1+3of15")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(0)
    config = untrained_config(load_recipe(args.recipe).model)
    model = open_benchmark_pair(config, None, None, torch.device("cuda")).mol(torch.bfloat16)
    ids = torch.randint(config.vocab_size, (args.batch, args.context), device="cuda")

    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static",
        )
        torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(3):
        seconds(65)
    token = sorted(seconds(65) - seconds(1) for _ in range(5))[2] / 64
    store = generation._KEPT[model].store
    store.length.filled.fill_(args.context)

    def replay() -> None:
        store.graph.graph.replay()
        store.length.filled.fill_(args.context)  # a step of its own, of a microsecond

    step = do_bench(replay, return_mode="median")
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() / do_bench(lambda: target.copy_(source), return_mode="median")
    per_token = config.num_hidden_layers * max(1, config.num_shared_blocks) * 4
    cache = per_token * config.num_kv_heads_thin * config.head_dim * args.context
    floor = (2 * count_parameters(config).active + args.batch * cache) / copied
    figures = {
        "command": "python " + " ".join(sys.argv),
        "generate_ms_a_token": round(token * 1e3, 3),
        "graph_ms": round(step, 3),
        "floor_ms": round(floor, 3),
    }
    print(json.dumps(figures | machine()), flush=True)
    if args.profile:
        with torch.profiler.profile() as profiler:
            replay()
            torch.cuda.synchronize()
        table = profiler.key_averages().table(sort_by="self_device_time_total", row_limit=25)
        print(table)


if __name__ == "__main__":
    main()
