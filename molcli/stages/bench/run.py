"""All sections, one after the other."""

from collections.abc import Callable, Collection, Iterator

import torch

from molcli.estimate.parameters import count_parameters
from molcli.progress import Progress, silent
from molcli.stages.bench.inference import decode, prefill, prompts
from molcli.stages.bench.kernels import deltanet, grouped
from molcli.stages.bench.measure import SECTIONS, Report, Row, machine, release, sizes_for
from molcli.stages.bench.models import BenchmarkPair, load, routed
from molcli.stages.bench.training import train


def bench(
    contest: BenchmarkPair,
    sections: Collection[str],
    *,
    seed: int = 0,
    compiled: bool = True,
    progress: Progress = silent,
    save: Callable[[Report], None] = lambda _: None,
) -> Report:
    """sections: of SECTIONS. compiled: whether models are compiled where users would: for prefill
    and training on a GPU. save: takes what is there after every row: timing takes minutes, and
    whoever stops it keeps those. What is timed is what users call.
    """
    device = contest.device
    sizes, compiled = sizes_for(device), compiled and device.type == "cuda"
    works: dict[str, Callable[[], Iterator[Row]]] = {
        "prefill": lambda: prefill(contest, sizes, compiled),
        "decode": lambda: decode(contest, sizes),
        "train": lambda: train(contest, sizes, compiled),
        "grouped": lambda: grouped(contest, sizes),
        "gdn": lambda: deltanet(contest, sizes),
    }
    torch.manual_seed(seed)
    count, dense = count_parameters(contest.config), contest.dense
    report = Report(
        model=f"{count.total / 1e6:,.1f}M parameters, {count.active / 1e6:,.1f}M active",
        dense=f"{dense.model_type}, {dense.num_hidden_layers} layers of width {dense.hidden_size}",
        rows=[],
        loads=_loads(contest, sizes.prefill[0]),
        machine=machine(device, seed),
    )
    wanted = [name for name in SECTIONS if name in sections]
    for done, name in enumerate(wanted):
        progress(done, len(wanted), name)
        release(device)
        torch.manual_seed(seed)
        for row in works[name]():
            report.rows.append(row)
            save(report)
            progress(done, len(wanted), row.work)
    progress(len(wanted), len(wanted))
    return report


def _loads(contest: BenchmarkPair, length: int) -> dict[str, tuple[float, float]]:
    model = contest.mol(contest.dtype)
    ids = prompts(contest, 1, length)
    found = {}
    for kind in contest.routings:
        with routed(model, kind, ids):
            found[kind] = load(model, ids)
    return found
