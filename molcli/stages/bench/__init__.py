"""Bench: a Mixture of Layers model's speed beside a dense one's, on the machine at hand."""

from molcli.stages.bench.models import Contest, open_contest
from molcli.stages.bench.report import Report, Row
from molcli.stages.bench.run import bench
from molcli.stages.bench.sizes import SECTIONS

__all__ = ["SECTIONS", "Contest", "Report", "Row", "bench", "open_contest"]
