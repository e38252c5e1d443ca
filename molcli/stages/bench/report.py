"""What was measured, and with what."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from molcli.io.machine import commit, device_name, versions


@dataclass(frozen=True)
class Row:
    """One work. mol, peer: in `unit`, None where it did not fit into memory or has no peer.
    peer_name: what the peer is, "dense" or a library. note: settings and peaks worth a word.
    """

    work: str
    unit: str
    mol: float | None
    peer: float | None
    peer_name: str = "dense"
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Above 1 where the Mixture of Layers model is faster."""
        if not self.mol or not self.peer:
            return None
        return self.peer / self.mol if self.unit.startswith("ms") else self.mol / self.peer


@dataclass(frozen=True)
class Report:
    """model, dense: what was compared, in words. loads: per kind of routing, the busiest and the
    least busy block's share of an even share, over layers."""

    model: str
    dense: str
    rows: list[Row]
    loads: dict[str, tuple[float, float]]
    machine: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        for row, written in zip(self.rows, found["rows"], strict=True):
            written["ratio"] = row.ratio
        return found


def machine(device: torch.device, seed: int) -> dict[str, str]:
    """Device, versions, seed and commit."""
    found = {"device": device_name(device), "seed": str(seed), **versions()}
    return found | {"molcli": f"{found['molcli']} {commit()}".strip()}
