"""From residuals after the last layer to figures."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from molcli.io.parent import Parent
from molcli.model.streams import Streams


@dataclass(frozen=True)
class Ending:
    """The parent's final norm (d_model,), its head (V, d_model), and the norm's epsilon."""

    norm: Tensor
    head: Tensor
    eps: float

    def figures(self, streams: Streams, student: Tensor) -> dict[str, float]:
        """Nats a predicted token: of the parent and a student (n, d_model) on the text, and
        KL(parent || student)."""
        losses = replace(streams, student=student).losses(self.norm, self.head, self.eps)
        tokens = int(losses.count)
        return {
            "tokens": tokens,
            "parent_ce": losses.parent_cross_entropy.item() / tokens,
            "ce": losses.cross_entropy.item() / tokens,
            "kl": losses.kl.item() / tokens,
        }


def open_ending(parent: Parent, device: torch.device) -> Ending:
    """In float32."""
    head = parent.lm_head()
    weight = parent.embedding() if head is None else head
    return Ending(
        parent.final_norm().to(device, torch.float32),
        weight.to(device).to(torch.float32),
        parent.config.rms_norm_eps,
    )
