"""A run that was stopped, and an object that does something when it is unpickled."""

import os
from pathlib import Path
from typing import Any

import pytest

from molcli.config.sections import Recipe, TrainConfig
from molcli.errors import MolError
from molcli.stages.train import train

NORM = "model.norm.weight"
SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "layer_structures": ["dense", "mixture"],
    "layer_mixers": ["attention", "attention"],
}
SETTINGS = TrainConfig(
    tokens=8 * 2 * 16,
    context_length=16,
    batch_size=2,
    micro_batch_size=1,
    checkpoint_every=2,
    log_every=1,
    precision="fp32",
)


class Stopped(Exception):
    pass


class Run:
    """A run that stopped after five of eight steps, with checkpoints of the second and fourth."""

    def __init__(self, checkpoint: Path, data: str, out: Path) -> None:
        self.checkpoint, self.data, self.out = checkpoint, data, out
        with pytest.raises(Stopped):
            train(checkpoint, out, data, Recipe(train=SETTINGS), progress=self.stop)
        self.newest = out / "checkpoints" / "step-00000004"

    @staticmethod
    def stop(done: int, total: int | None, note: str = "") -> None:
        if note and done == 5 * 2 * 16:
            raise Stopped

    def resume(self) -> None:
        train(self.checkpoint, self.out, self.data, Recipe(train=SETTINGS), resume=True)

    def refused(self) -> str:
        """The message, after a look that nothing was written."""
        with pytest.raises(MolError) as refused:
            self.resume()
        assert not (self.out / "config.json").exists()
        return str(refused.value)


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)
