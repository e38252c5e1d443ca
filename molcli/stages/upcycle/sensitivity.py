"""How much each converted layer costs on its own."""

import torch
from torch import Tensor

from molcli.io.packing import TokenRows
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import DenseLayer, MoLLayer
from molcli.stages.upcycle.ending import Ending
from molcli.stages.upcycle.streams import open_streams

TOKENS = 1024  # enough to rank layers by; every one of them goes through all layers above its own


class Sensitivity:
    """KL(parent || parent with one layer converted), for every converted layer.

    Measured on the first TOKENS held-out tokens, and exact: a residual for each converted layer
    goes through the parent's layers above it.
    """

    def __init__(
        self, rows: TokenRows, config: MoLConfig, embedding: Tensor, device: torch.device
    ) -> None:
        few = rows.rows(slice(0, max(1, TOKENS // rows.input_ids.shape[1])))
        if not few.predicted:
            few = rows
        self._streams = open_streams(few, config, embedding, device)
        self._altered: dict[int, Tensor] = {}

    def advance(self, index: int, dense: DenseLayer, converted: DenseLayer | MoLLayer) -> None:
        """Moves all residuals past layer `index`."""
        run, before = self._streams.context.run, self._streams.parent
        self._altered = {i: run(dense, x) for i, x in self._altered.items()}
        if converted is not dense:
            self._altered[index] = run(converted, before)
        self._streams.advance(dense, dense)

    def figures(self, ending: Ending) -> dict[int, float]:
        """After the last layer: nats a predicted token, by layer."""
        return {i: ending.figures(self._streams, x)["kl"] for i, x in self._altered.items()}
