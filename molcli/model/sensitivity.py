"""How much each converted layer costs on its own."""

import torch
from torch import Tensor

from molcli.io.packing import TokenRows
from molcli.model.configuration_mol import MoLConfig
from molcli.model.ending import Ending
from molcli.model.layers import Layer
from molcli.model.streams import open_streams

TOKENS = 1024  # enough to rank layers by; every one of them goes through all layers above its own


class Sensitivity:
    """KL(original || original with one layer converted), for every converted layer.

    Measured on the first TOKENS tokens of `rows`, and exact: a residual for each converted layer
    goes through the original layers above it.
    """

    def __init__(
        self, rows: TokenRows, config: MoLConfig, embedding: Tensor, device: torch.device
    ) -> None:
        few = rows.rows(slice(0, max(1, TOKENS // rows.input_ids.shape[1])))
        if not few.predicted:
            few = rows
        self._streams = open_streams(few, config, embedding, device)
        self._altered: dict[int, Tensor] = {}

    def advance(self, index: int, original: Layer, converted: Layer) -> None:
        """Moves all residuals past layer `index`."""
        run, before = self._streams.chunks.run, self._streams.parent
        self._altered = {i: run(original, x) for i, x in self._altered.items()}
        if converted is not original:
            self._altered[index] = run(converted, before)
        self._streams.advance(original, original)

    def figures(self, ending: Ending) -> dict[int, float]:
        """After the last layer: nats a predicted token, by layer."""
        return {i: ending.figures(self._streams, x)["kl"] for i, x in self._altered.items()}


def split_rows(rows: TokenRows) -> tuple[TokenRows, TokenRows]:
    """Rows to fit layers on, and rows to measure them on: the last, of up to TOKENS tokens and at
    most half of all. Where there is one row alone, it is both."""
    if len(rows) == 1:
        return rows, rows
    kept = min(max(1, TOKENS // rows.input_ids.shape[1]), len(rows) // 2)
    return rows.rows(slice(0, -kept)), rows.rows(slice(-kept, None))
