"""The rows of a step as its ranks take them."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from molcli.io.packing import Batch, Rows


@dataclass(frozen=True)
class MicroBatches:
    """This rank's share of a step's rows, on its device.

    batches: one after another, each with the indices of its rows. tokens, predicted: in the rows of
    all ranks, without padding; predicted are those that another one of their document and row
    precedes.
    """

    batches: list[tuple[Tensor, Batch]]
    tokens: int
    predicted: int

    def __len__(self) -> int:
        return len(self.batches)


def micro_batches(rows: Rows, index: Tensor, size: int, accelerator: Accelerator) -> MicroBatches:
    """The rows `index`, (batch_size,), of which a rank takes at most `size` at once.

    A GPU may still be at other work, for which nothing here waits.
    """
    packed = rows.rows(index)  # by every rank, so that none has to ask the others for its counts
    places = torch.arange(len(index)).view(accelerator.num_processes, -1)
    mine = places[accelerator.process_index].split(size)
    batches = [(index[part], packed.batch(part, accelerator.device)) for part in mine]
    return MicroBatches(batches, packed.tokens, packed.predicted)
