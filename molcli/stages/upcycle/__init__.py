"""Upcycle: a dense parent and its calibration become a Mixture of Layers checkpoint."""

from molcli.stages.upcycle.run import upcycle

__all__ = ["upcycle"]
