"""Train a Mixture of Layers model: towards its parent's predictions, or on text alone.

`loop` runs the stages and their steps; `state` is what changes. A step: `batches` loads its rows,
`objective` adds gradients, `optimizer` updates the weights, `balance` the router biases.
"""

from molcli.stages.train.loop import TrainResult, train

__all__ = ["TrainResult", "train"]
