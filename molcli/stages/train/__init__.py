"""Train a Mixture of Layers model: towards its parent's predictions, or on text alone."""

from molcli.stages.train.loop import TrainResult, train

__all__ = ["TrainResult", "train"]
