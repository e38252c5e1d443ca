"""Convert: softmax attention of a Mixture of Layers checkpoint becomes Gated DeltaNet."""

from molcli.stages.convert.run import ConversionText, convert
from molcli.stages.convert.selection import LayerSelection, select_layers
from molcli.stages.convert.source import SourceCheckpoint, open_source_checkpoint

__all__ = [
    "ConversionText",
    "LayerSelection",
    "SourceCheckpoint",
    "convert",
    "open_source_checkpoint",
    "select_layers",
]
