"""All sections, one after the other."""

from collections.abc import Callable, Collection, Iterator

import torch

from molcli.maths.parameters import count_parameters
from molcli.progress import Progress, silent
from molcli.stages.bench.inference import decode, prefill, prompts
from molcli.stages.bench.kernels import deltanet, grouped
from molcli.stages.bench.models import Contest, load, routed
from molcli.stages.bench.report import Report, Row, machine
from molcli.stages.bench.sizes import SECTIONS, sizes_for
from molcli.stages.bench.timing import release
from molcli.stages.bench.training import train


def bench(
    contest: Contest,
    sections: Collection[str],
    *,
    seed: int = 0,
    compiled: bool = True,
    progress: Progress = silent,
) -> Report:
    """sections: of SECTIONS. compiled: whether models are compiled where users would: for prefill
    and training on a GPU. What is timed is what users call.
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
    wanted = [name for name in SECTIONS if name in sections]
    rows: list[Row] = []
    for done, name in enumerate(wanted):
        progress(done, len(wanted))
        torch.manual_seed(seed)
        rows.extend(works[name]())
        release(device)
    torch.manual_seed(seed)
    loads = _loads(contest, sizes.prefill[0])
    progress(len(wanted), len(wanted))
    count = count_parameters(contest.config)
    dense = contest.dense
    return Report(
        model=f"{count.total / 1e6:,.1f}M parameters, {count.active / 1e6:,.1f}M active",
        dense=f"{dense.model_type}, {dense.num_hidden_layers} layers of width {dense.hidden_size}",
        rows=rows,
        loads=loads,
        machine=machine(device, seed),
    )


def _loads(contest: Contest, length: int) -> dict[str, tuple[float, float]]:
    model = contest.mol(contest.dtype)
    ids = prompts(contest, 1, length)
    found = {}
    for kind in contest.routings:
        with routed(model, kind):
            found[kind] = load(model, ids)
    return found
