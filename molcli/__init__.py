"""molcli: turn a dense language model into a Mixture of Layers model."""

__version__ = "0.1.0"
