"""The rows of a step, divided over its ranks."""

from types import SimpleNamespace
from typing import Any

import torch

from molcli.data.packing import pack
from molcli.stages.train.batches import micro_batches


def test_ranks_share_the_rows_and_agree_on_their_counts() -> None:
    sizes = (16, 9, 7, 30, 40, 20)
    documents = [torch.arange(n, dtype=torch.int32) for n in sizes]
    rows, index = pack(documents, 16, seed=None, pad_last=True), torch.tensor([7, 0, 3, 1, 5, 2])
    found = []
    for rank in (0, 1):
        one: Any = SimpleNamespace(num_processes=2, process_index=rank, device=torch.device("cpu"))
        step = micro_batches(rows, index, 2, one)
        assert [len(batch.input_ids) for _, batch in step.batches] == [2, 1]
        assert (step.tokens, step.predicted) == (6 * 16 - 6, rows.select(index).num_targets)
        for places, batch in step.batches:
            assert torch.equal(batch.input_ids, rows.batch(places).input_ids)
            found.append(places)
    assert torch.equal(torch.cat(found), index)
