"""Convert: softmax attention of a Mixture of Layers checkpoint becomes Gated DeltaNet."""

from molcli.stages.convert.choice import Plan, plan_layers
from molcli.stages.convert.run import Text, convert
from molcli.stages.convert.source import Source, open_source

__all__ = ["Plan", "Source", "Text", "convert", "open_source", "plan_layers"]
