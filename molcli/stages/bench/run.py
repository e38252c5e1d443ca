"""Run the sections of a benchmark."""

from collections.abc import Callable, Collection, Iterator

import torch

from molcli.estimate.parameters import count_parameters
from molcli.progress import Progress, silent
from molcli.stages.bench.inference import time_decoding, time_prefill
from molcli.stages.bench.kernels import time_gated_delta_rule, time_grouped_products
from molcli.stages.bench.measure import SECTIONS, Report, Row, free_memory, machine, sizes_for
from molcli.stages.bench.models import BenchmarkPair
from molcli.stages.bench.routing import forced_routing, load_extremes
from molcli.stages.bench.training import time_training


def bench(
    pair: BenchmarkPair,
    sections: Collection[str],
    *,
    seed: int = 0,
    compiled: bool = True,
    progress: Progress = silent,
    save: Callable[[Report], None] = lambda _: None,
) -> Report:
    """Time both models through the functions that users call.

    Args:
        pair: the two models.
        sections: names from SECTIONS.
        seed: of tokens and random weights.
        compiled: compile models for prefill and training on a GPU.
        progress: called with the number of finished sections.
        save: called with the report after every row, so that a stopped run keeps its results.
    """
    device = pair.device
    sizes, compiled = sizes_for(device), compiled and device.type == "cuda"
    timings: dict[str, Callable[[], Iterator[Row]]] = {
        "prefill": lambda: time_prefill(pair, sizes, compiled),
        "decode": lambda: time_decoding(pair, sizes),
        "train": lambda: time_training(pair, sizes, compiled),
        "grouped": lambda: time_grouped_products(pair, sizes),
        "gdn": lambda: time_gated_delta_rule(pair, sizes),
    }
    torch.manual_seed(seed)
    count, dense = count_parameters(pair.config), pair.dense
    report = Report(
        model=f"{count.total / 1e6:,.1f}M parameters, {count.active / 1e6:,.1f}M active",
        dense=f"{dense.model_type}, {dense.num_hidden_layers} layers of width {dense.hidden_size}",
        rows=[],
        loads=_loads(pair, sizes.prefill[0]),
        machine=machine(device, seed),
    )
    wanted = [name for name in SECTIONS if name in sections]
    for done, name in enumerate(wanted):
        progress(done, len(wanted), name)
        free_memory(device)
        torch.manual_seed(seed)
        for row in timings[name]():
            report.rows.append(row)
            save(report)
            progress(done, len(wanted), row.work)
    progress(len(wanted), len(wanted))
    return report


def _loads(pair: BenchmarkPair, length: int) -> dict[str, tuple[float, float]]:
    model = pair.mol(pair.dtype)
    ids = pair.random_tokens(1, length)
    loads = {}
    for kind in pair.routings:
        with forced_routing(model, kind, ids):
            loads[kind] = load_extremes(model, ids)
    return loads
